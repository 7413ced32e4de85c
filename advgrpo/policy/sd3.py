"""SD3-family policy: SD3-medium, SD3.5-medium, SD3.5-large, and the shipped tiny pipeline.

Loads a stock diffusers pipeline by folder or hub id. Text encoders are loaded only when a prompt is not in the cache
yet and dropped afterwards.

Shapes: R rows, latents [R, C, H, W] float32, text [R, L, D], pooled [R, E].
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)

from ..config import ModelSection
from ..errors import UserError
from ..types import Conditioning
from .base import PreparedPrompts, Velocity
from .decoder import Decoder, DecoderConfig, psnr_gate
from .networks import FusedNetwork, StockNetwork
from .text_cache import TextCache, folder_fingerprint

_TEXT_PARTS = ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3")
_TEXT_BATCH = 32
_GATED_PICTURES = 2


def pipeline_folder(path: str, field: str = "model.path") -> Path:
    """The local folder of a pipeline given as "tiny", a folder, or a hub id; UserError naming `field` otherwise."""
    if path == "tiny":
        from ..tiny import pipeline_dir

        folder = Path(pipeline_dir())
    elif Path(path).expanduser().is_dir():
        folder = Path(path).expanduser()
    else:
        try:
            folder = Path(DiffusionPipeline.download(path))
        except Exception as error:
            raise UserError(
                f"{field} = {path!r} is neither a folder nor a hub model that can be downloaded ({error})"
            ) from error
    index = folder / "model_index.json"
    if not index.is_file():
        raise UserError(f"{field} = {path!r}: {index} is missing; want a diffusers pipeline folder")
    class_name = json.loads(index.read_text()).get("_class_name")
    if class_name != "StableDiffusion3Pipeline":
        raise UserError(f"{field} = {path!r} holds a {class_name}; want a StableDiffusion3Pipeline")
    return folder


@dataclass
class Guided:
    """A network's prepared rows; with guidance the unconditional ones come first, one for each conditional row."""

    rows_of_network: PreparedPrompts
    count: int  # prompts
    guided: bool

    def rows(self, index: torch.Tensor) -> Guided:
        both = torch.cat([index, index + self.count]) if self.guided else index
        return Guided(self.rows_of_network.rows(both), len(index), self.guided)

    def tensors(self) -> dict[str, torch.Tensor]:
        return self.rows_of_network.tensors()

    def with_tensors(self, tensors: dict[str, torch.Tensor]) -> Guided:
        return Guided(self.rows_of_network.with_tensors(tensors), self.count, self.guided)


class SD3Policy:
    """The `Policy` protocol for the SD3 family.

    Args:
        fused: run our forward (transformer.py) instead of diffusers'.
        precision: of the merged weights, "model" or "fp8"; fused only.
    """

    def __init__(
        self,
        model: ModelSection,
        *,
        device: torch.device,
        cache_dir: Path,
        seed: int,
        fused: bool = False,
        precision: str = "model",
    ):
        self.model, self.device = model, device
        self.folder = pipeline_folder(model.path)
        self.dtype = getattr(torch, model.dtype)
        try:
            transformer = self._part(SD3Transformer2DModel, "transformer", self.dtype)
            self.vae = self._part(AutoencoderKL, "vae", torch.float32).to(device).requires_grad_(False).eval()
            self._scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(self.folder, subfolder="scheduler")
        except OSError as error:
            raise UserError(f"model.path = {model.path!r}: {error}") from error
        transformer = transformer.to(device).requires_grad_(False).eval()
        self._check_resolution(transformer)
        self.transformer = transformer
        if fused:
            self.network = FusedNetwork(transformer, model, seed, precision=precision)
        else:
            self.network = StockNetwork(transformer, model, seed)
        if model.lora.start_from:
            self.network.load_lora(Path(model.lora.start_from))
        self.has_merged = self.network.has_merged
        # Ours on the fast path. In bfloat16 the first pictures must pass a gate against float32.
        self.decoder = self._build_decoder(self._decoder_dtype()) if fused else None
        self.decoder_psnr: float | None = None
        self._trained = "adapted"  # the weights that `velocity` runs
        fingerprint = f"{folder_fingerprint(self.folder, _TEXT_PARTS)}:{model.max_sequence_length}:{model.dtype}"
        self._unconditional: Conditioning | None = None
        self.text_cache = TextCache(cache_dir / "text", fingerprint, self._encode_text)

    def _decoder_dtype(self) -> torch.dtype:
        if self.model.decoder_dtype == "auto":
            return self.dtype if self.device.type == "cuda" else torch.float32
        return getattr(torch, self.model.decoder_dtype)

    def _part(self, kind: type, name: str, dtype: torch.dtype):
        return kind.from_pretrained(self.folder, subfolder=name, dtype=dtype)

    def _check_resolution(self, transformer: SD3Transformer2DModel) -> None:
        unit = self.vae_scale * transformer.config.patch_size
        largest = transformer.config.pos_embed_max_size * unit
        if self.model.resolution % unit or self.model.resolution > largest:
            raise UserError(
                f"model.resolution = {self.model.resolution}: this model wants a multiple of {unit}, at most {largest}"
            )

    @property
    def vae_scale(self) -> int:
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    def latent_shape(self) -> tuple[int, int, int]:
        side = self.model.resolution // self.vae_scale
        return self.transformer.config.in_channels, side, side

    def schedule(self, num_steps: int) -> tuple[torch.Tensor, torch.Tensor]:
        config = self._scheduler.config
        if config.get("use_dynamic_shifting"):
            raise UserError("model.path: its scheduler uses use_dynamic_shifting; only SD3's fixed shift is supported")
        self._scheduler.set_timesteps(num_steps)
        return self._scheduler.sigmas.double(), self._scheduler.timesteps.float()

    def encode(self, prompts: list[str]) -> Conditioning:
        """Embeddings on the policy's device, in its dtype; the empty prompt is the unconditional one."""
        loaded = self.text_cache.load(prompts)
        return Conditioning(loaded.text.to(self.device, self.dtype), loaded.pooled.to(self.device, self.dtype))

    def _encode_text(self, prompts: list[str]) -> Conditioning:
        components = json.loads((self.folder / "model_index.json").read_text())
        absent = {part: None for part in _TEXT_PARTS if components.get(part, [None])[0] is None}
        pipe = StableDiffusion3Pipeline.from_pretrained(
            self.folder, transformer=self.transformer, vae=self.vae, dtype=self.dtype, **absent
        )
        for part in _TEXT_PARTS[:3]:
            if getattr(pipe, part) is not None:
                getattr(pipe, part).to(self.device)
        rows = []
        with torch.no_grad():
            for start in range(0, len(prompts), _TEXT_BATCH):
                text, _, pooled, _ = pipe.encode_prompt(
                    prompts[start : start + _TEXT_BATCH],
                    None,
                    None,
                    device=self.device,
                    do_classifier_free_guidance=False,
                    max_sequence_length=self.model.max_sequence_length,
                )
                rows.append(Conditioning(text.cpu(), pooled.cpu()))
        return Conditioning(torch.cat([r.text for r in rows]), torch.cat([r.pooled for r in rows]))

    def prepare(self, conditioning: Conditioning, timesteps: torch.Tensor, *, guided: bool) -> Guided:
        text, pooled, rows = conditioning.text, conditioning.pooled, len(conditioning.text)
        if guided:
            if self._unconditional is None:
                self._unconditional = self.encode([""])
            empty = self._unconditional
            text = torch.cat([empty.text.expand(rows, -1, -1), text])
            pooled = torch.cat([empty.pooled.expand(rows, -1), pooled])
        return Guided(self.network.prepare(text, pooled, timesteps), rows, guided)

    def velocity(self, latents: torch.Tensor, step: torch.Tensor, prepared: Guided) -> Velocity:
        return self._forward(latents, step, prepared, self._trained)

    def merged_velocity(self, latents: torch.Tensor, step: torch.Tensor, prepared: Guided) -> Velocity:
        return self._forward(latents, step, prepared, "merged")

    def _forward(self, latents, step, prepared: Guided, weights: str) -> Velocity:
        hidden = torch.cat([latents, latents]) if prepared.guided else latents
        velocity = self.network.velocity(hidden, step, prepared.rows_of_network, weights)
        return (velocity[len(latents) :], velocity[: len(latents)]) if prepared.guided else (velocity, None)

    def merge(self) -> None:
        self.network.merge()

    @contextlib.contextmanager
    def reference(self) -> Iterator[None]:
        before, self._trained = self._trained, "base"
        try:
            yield
        finally:
            self._trained = before

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        if self.decoder is None:
            config = self.vae.config
            latents = latents / config.scaling_factor + (config.shift_factor or 0.0)
            return (self.vae.decode(latents, return_dict=False)[0].float() / 2 + 0.5).clamp(0, 1)
        if self.decoder.dtype != torch.float32 and self.decoder_psnr is None:
            reference = self._build_decoder(torch.float32)
            self.decoder_psnr = psnr_gate(self.decoder, reference, latents[:_GATED_PICTURES].contiguous())
        return self.decoder.images(latents)

    def _build_decoder(self, dtype: torch.dtype) -> Decoder:
        config = DecoderConfig.from_mapping(self.vae.config)
        return Decoder.from_state_dict(config, self.vae.state_dict(), dtype=dtype, device=self.device)

    def trainable_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        return self.network.parameters()

    def element_name(self, parameter: str, index: int) -> str:
        return self.network.element_name(parameter, index)

    def export(self, folder: Path) -> None:
        self.network.export(folder)
