"""What all policies over a diffusers pipeline share: its folder, cached text, guidance, the VAE, the trained network.

Text encoders are loaded only when a prompt is not in the cache yet and dropped afterwards. With `model.offload` their
weights, and the VAE's, lie on the host but while they are used (offload.py).

Shapes: R rows, latents [R, C, H, W] float32, text [R, L, D], pooled [R, E].
"""

from __future__ import annotations

import contextlib
import json
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ModelMixin

from advgrpo.config import ModelSection
from advgrpo.errors import UserError
from advgrpo.policy.fused.decoder import GATED_IMAGES, Decoder, DecoderConfig, decoded_at_once, psnr_gate
from advgrpo.policy.fused.sequence import SequenceGroup
from advgrpo.policy.guidance import GuidedPolicy
from advgrpo.policy.model_files import DIFFUSERS_STEM, of_variant, pipeline_variant
from advgrpo.policy.networks import FusedNetwork, StockNetwork
from advgrpo.policy.offload import HostWeights
from advgrpo.policy.parts import Parts
from advgrpo.policy.pipelines import PREDICTION_TYPES, pipeline_folder
from advgrpo.policy.sharding import BlockSharding
from advgrpo.policy.text_cache import TextCache
from advgrpo.runtime import transfer
from advgrpo.runtime.fingerprint import FileStamps, folder_fingerprint
from advgrpo.runtime.transfer import to_device
from advgrpo.types import Conditioning

_TEXT_BATCH = 32


class DiffusersPolicy(GuidedPolicy[StockNetwork | FusedNetwork]):
    """`Policy` and `Capturable` (base.py) but for what differs between families: schedule, text, the network.

    A subclass names its parts, loads the stock module into the attribute called `component`, builds a network over it
    and hands that to `_train`.
    """

    component: str  # the network's folder in the pipeline
    network_class: type[ModelMixin]
    vae_class: type[ModelMixin] = AutoencoderKL
    text_parts: tuple[str, ...]  # folders of text encoders and tokenizers
    negative_prompt = ""  # what guidance by two rows leads away from

    def __init__(self, model: ModelSection, *, device: torch.device, cache_dir: Path):
        self.model, self.device = model, device
        self.folder = pipeline_folder(model.path)
        self.index = json.loads((self.folder / "model_index.json").read_text())
        self.variant = pipeline_variant(self.folder, f"model.path = {model.path!r}")
        self.prediction_type = PREDICTION_TYPES[self.index["_class_name"]]
        self.dtype = getattr(torch, model.dtype)
        offload = "none" if device.type == "cpu" else model.offload  # whose memory is the host's
        self._offloads_text, self._offloads_vae = offload != "none", offload == "text_vae"
        host = torch.device("cpu") if self._offloads_vae else None
        self.vae = self._load(self.vae_class, "vae", torch.float32, host)
        self._vae_weights = HostWeights(self.vae, device) if self._offloads_vae else None
        self._decoder_weights: HostWeights | None = None
        self._empty: Conditioning | None = None
        # Ours beside a fused transformer. In bfloat16 the first images must pass a gate against float32.
        self.decoder: Decoder | None = None
        self.decoder_psnr: float | None = None
        self.text_cache = TextCache(cache_dir / "text", self._text_fingerprint(cache_dir), self._encode_text)

    def _text_fingerprint(self, cache_dir: Path) -> str:
        """What an embedding depends on beside the prompt: every file of encoders and tokenizers, which of them there
        are, the longest text, and the precision."""
        files = folder_fingerprint(self.folder, self.text_parts, FileStamps(cache_dir / "stamps", self.folder))
        parts = {part: self.index.get(part) for part in self.text_parts}
        settings = [self.index["_class_name"], parts, self.model.max_sequence_length, self.model.dtype]
        return f"{files}:{json.dumps(settings)}"

    def _load(self, kind: type, part: str, dtype: torch.dtype, device: torch.device | None = None) -> ModelMixin:
        """A frozen part of the pipeline, on the policy's device unless told; UserError where its files are missing.

        On the host what is stored in `dtype` stays mapped from its files.
        """
        variant = of_variant(self.folder / part, DIFFUSERS_STEM, self.variant)
        try:
            module = kind.from_pretrained(
                self.folder, subfolder=part, dtype=dtype, use_safetensors=True, variant=variant
            )
        except OSError as error:
            raise UserError(f"model.path = {self.model.path!r}: {error}") from error
        return module.to(device or self.device).requires_grad_(False).eval()

    def _load_flow_scheduler(self) -> FlowMatchEulerDiscreteScheduler:
        """A rectified flow's schedule; UserError where its file is missing."""
        try:
            return FlowMatchEulerDiscreteScheduler.from_pretrained(self.folder, subfolder="scheduler")
        except OSError as error:
            raise UserError(f"model.path = {self.model.path!r}: {error}") from error

    def _train(self, network: StockNetwork | FusedNetwork) -> None:
        self.network = network
        if self.model.lora.start_from:
            network.load_lora(Path(self.model.lora.start_from))
        self.has_merged = network.has_merged

    @classmethod
    @abstractmethod
    def check_resolution(cls, resolution: int, network: Any, vae: Any, field: str = "model.resolution") -> None:
        """UserError naming `field` unless a network and a VAE of these configurations draw images of that side."""

    @classmethod
    @abstractmethod
    def check_parts(
        cls, model: ModelSection, index: Mapping[str, Any], network: Any, vae: Any, scheduler: Mapping[str, Any]
    ) -> None:
        """UserError for parts, by their configurations, or for settings that a model of this family is not served with.

        Args:
            index: model_index.json.
            network, vae: configurations of diffusers.
            scheduler: scheduler_config.json.
        """

    @staticmethod
    def pixels_of_latent(vae: Any) -> int:
        """Of a latent's side, for a VAE of this configuration."""
        return 2 ** (len(vae.block_out_channels) - 1)

    @property
    def vae_scale(self) -> int:
        return self.pixels_of_latent(self.vae.config)

    @property
    def latent_channels(self) -> int:
        return self.vae.config.latent_channels

    def latent_shape(self) -> tuple[int, int, int]:
        side = self.model.resolution // self.vae_scale
        return self.latent_channels, side, side

    @abstractmethod
    def schedule(self, num_steps: int) -> tuple[torch.Tensor, torch.Tensor]: ...

    @abstractmethod
    def _encode_batch(self, pipe: DiffusionPipeline, prompts: list[str]) -> Conditioning:
        """Embeddings of a few prompts, as the stock pipeline computes them."""

    def encode(self, prompts: list[str]) -> Conditioning:
        """Embeddings on the policy's device, in its dtype."""
        loaded = self.text_cache.load(prompts)
        tensors = {name: to_device(tensor, self.device) for name, tensor in loaded.tensors().items()}
        return Conditioning(**{n: t.to(self.dtype) if t.is_floating_point() else t for n, t in tensors.items()})

    def unconditional(self) -> Conditioning:
        if self._empty is None:
            self._empty = self.encode([self.negative_prompt])
        return self._empty

    def _encode_text(self, prompts: list[str]) -> Iterator[Conditioning]:
        """Embeddings on the host, `_TEXT_BATCH` prompts at a time; the encoders are loaded once for all of them."""
        kept = {*self.text_parts, "vae", "scheduler", self.component}
        listed = {name for name, value in self.index.items() if isinstance(value, list)}
        absent = {name for name in listed if name not in kept or self.index[name][0] is None}
        given = {"vae": self.vae, self.component: getattr(self, self.component), **dict.fromkeys(absent)}
        pipe = DiffusionPipeline.from_pretrained(
            self.folder, dtype=self.dtype, use_safetensors=True, variant=self.variant, **given
        )
        encoders = [each for part in self.text_parts if isinstance(each := getattr(pipe, part, None), torch.nn.Module)]
        with contextlib.ExitStack() as lent:
            while encoders:
                encoder = encoders.pop()
                if self._offloads_text:
                    lent.enter_context(HostWeights(encoder, self.device).lent_by_layer())
                else:
                    encoder.to(self.device)
            for start in range(0, len(prompts), _TEXT_BATCH):
                with torch.no_grad():
                    batch = self._encode_batch(pipe, prompts[start : start + _TEXT_BATCH])
                yield Conditioning(**{name: tensor.cpu() for name, tensor in batch.tensors().items()})
        del pipe, given, encoder
        if self._offloads_text:
            transfer.release_pinned(self.device)

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Images [R, 3, H, W] float32 in [0, 1], by our decoder where it is in use, else the stock VAE in float32."""
        if self.decoder is not None:
            with _lent(self._decoder_weights):
                return self._decode_fast(self.decoder, latents)
        with _lent(self._vae_weights):
            return self._decode_stock(latents)

    def _decode_stock(self, latents: torch.Tensor) -> torch.Tensor:
        config = self.vae.config
        latents = latents / config.scaling_factor + (config.shift_factor or 0.0)
        return (self.vae.decode(latents, return_dict=False)[0].float() / 2 + 0.5).clamp(0, 1)

    def _use_fast_decoder(self) -> None:
        if self.model.decoder_dtype == "auto":
            dtype = self.dtype if self.device.type == "cuda" else torch.float32
        else:
            dtype = getattr(torch, self.model.decoder_dtype)
        self.decoder = self._build_decoder(dtype, channels_last=True)
        if self._offloads_vae:
            self._decoder_weights = HostWeights(self.decoder, self.device)

    def _decode_fast(self, decoder: Decoder, latents: torch.Tensor) -> torch.Tensor:
        if decoder.dtype != torch.float32 and self.decoder_psnr is None:
            reference = self._build_decoder(torch.float32)
            self.decoder_psnr = psnr_gate(decoder, reference, latents[:GATED_IMAGES].contiguous())
        return decoder.images(latents)

    def _build_decoder(self, dtype: torch.dtype, **options) -> Decoder:
        config = DecoderConfig.from_mapping(self.vae.config)
        options |= {"dtype": dtype, "device": self.device, "micro_batch": decoded_at_once(self.model.resolution)}
        return Decoder.from_state_dict(config, self.vae.state_dict(), **options)

    @torch.no_grad()
    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        """[R, C, H, W] float32, the mean of the stock VAE's posterior, as the network knows latents."""
        with _lent(self._vae_weights):
            return self._encode_stock(images)

    def _encode_stock(self, images: torch.Tensor) -> torch.Tensor:
        config = self.vae.config
        mean = self.vae.encode(images.to(self.device, torch.float32) * 2 - 1).latent_dist.mode()
        return (mean - (config.shift_factor or 0.0)) * config.scaling_factor

    def trainable_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        return self.network.parameters()

    @property
    def parts(self) -> Parts | None:
        """How the trainable parameters lie on the processes; None where each has all of them."""
        return self.network.parts

    @property
    def sequence(self) -> SequenceGroup | None:
        """The processes that compute the same rows together; None: this one alone."""
        return self.network.sequence

    def parameters_of_lora(self, folder: Path, field: str) -> dict[str, torch.Tensor]:
        """See `LoraReader`: loaded in the parameters' place, which then get their own values back, to the bit."""
        own = {name: parameter.detach().clone() for name, parameter in self.trainable_parameters()}
        self.network.load_lora(folder, field)
        found = {name: parameter.detach().clone() for name, parameter in self.trainable_parameters()}
        with torch.no_grad():
            for name, parameter in self.trainable_parameters():
                parameter.copy_(own[name])
        return found

    def element_name(self, parameter: str, index: int) -> str:
        return self.network.element_name(parameter, index)

    def export(self, folder: Path, notes: Mapping[str, str] | None = None) -> None:
        self.network.export(folder, notes)


def _lent(weights: HostWeights | None) -> contextlib.AbstractContextManager[None]:
    """Within it weights that lie on the host are on the device; None: they are always there."""
    return contextlib.nullcontext() if weights is None else weights.lent()


class TransformerPolicy(DiffusersPolicy):
    """`DiffusersPolicy` of a rectified flow's transformer, for which there is our forward as well.

    Args:
        fused: run our forward (fused/transformer.py) instead of diffusers'.
        precision: of the merged weights, "model" or "fp8"; without `fused` the latter are a whole copy in our forward
            beside diffusers' (merged_copy.py), and "model" has none. With `fused` and `sharding` nothing is merged.
        sharding: shares the weights out over processes. None: they are whole on each.
        sequence: the processes that run every forward together; fused only. None: this one alone.

    Raises:
        UserError: as `check_parts`.
    """

    component = "transformer"

    def __init__(
        self,
        model: ModelSection,
        *,
        device: torch.device,
        cache_dir: Path,
        seed: int,
        fused: bool = False,
        precision: str = "model",
        sharding: BlockSharding | None = None,
        sequence: SequenceGroup | None = None,
    ):
        super().__init__(model, device=device, cache_dir=cache_dir)
        host = None if sharding is None else torch.device("cpu")
        self.transformer = self._load(self.network_class, "transformer", self.dtype, host)
        self._scheduler = self._load_flow_scheduler()
        self.check_parts(model, self.index, self.transformer.config, self.vae.config, self._scheduler.config)
        if fused:
            ours = FusedNetwork(
                self.transformer, model, seed, precision=precision, sequence=sequence, sharding=sharding
            )
            self._train(ours)
            self._use_fast_decoder()
        else:
            network = self._stock_network(seed)
            network.place(device, sharding, copied=precision == "fp8")
            self._train(network)

    @abstractmethod
    def _stock_network(self, seed: int) -> StockNetwork:
        """diffusers' forward over `transformer`."""
