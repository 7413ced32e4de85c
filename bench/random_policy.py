"""A policy, references and an adversary with random weights: full-size work without downloads and without diffusers."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from transformers import Dinov2Config, Dinov2Model

from advgrpo.config import ModelSection
from advgrpo.data.references import ReferenceSet
from advgrpo.policy.fused.decoder import SD3_DECODER, Decoder, DecoderConfig
from advgrpo.policy.fused.transformer import FusedTransformer, TransformerConfig
from advgrpo.policy.guidance import GuidedPolicy
from advgrpo.runtime import rng
from advgrpo.runtime.transfer import to_device
from advgrpo.types import Conditioning

from .baseline import FlowScheduler
from .stock_model import LORA_TARGETS, SD35_MEDIUM, TINY, StockConfig, StockTransformer


@dataclass(frozen=True)
class Size:
    """What is built at random."""

    transformer: StockConfig
    decoder: DecoderConfig
    latent_side: int
    text_tokens: int
    backbone: dict  # of Dinov2Config
    prompts: int = 8  # of training, each with references


FULL = Size(
    SD35_MEDIUM,
    SD3_DECODER,
    64,
    205,
    {"image_size": 518, "patch_size": 14},  # Dinov2Config's defaults are ViT-B
    prompts=192,  # so that no iteration of a session meets one that another has seen
)
SMALL = Size(
    replace(TINY, num_layers=2, dual_attention_layers=(0,)),
    DecoderConfig(block_out_channels=(16, 16, 16), layers_per_block=1, norm_num_groups=8),
    8,
    5,
    {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 4},
)


def stock_weights(config: StockConfig, device: torch.device, dtype: torch.dtype, seed: int) -> StockTransformer:
    """PyTorch's default initialisation on the device itself, frozen; activations keep their order of magnitude."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), device:
        torch.manual_seed(rng.derive_seed(seed, "bench_transformer"))
        before = torch.get_default_dtype()
        try:
            torch.set_default_dtype(dtype)
            return StockTransformer(config).to(dtype).requires_grad_(False)
        finally:
            torch.set_default_dtype(before)


class RandomPolicy(GuidedPolicy[FusedTransformer]):
    """`Policy` and `Capturable` (advgrpo/policy/base.py) over `FusedTransformer`.

    Prompts are any strings; their embeddings are drawn.
    """

    component = "transformer"
    has_merged = True
    prediction_type = "flow_prediction"

    def __init__(self, model: ModelSection, size: Size, *, device: torch.device, seed: int, precision: str) -> None:
        self.device, self.size, self.seed = device, size, seed
        self.dtype = getattr(torch, model.dtype)
        self.stock = stock_weights(size.transformer, device, self.dtype, seed)
        tensors = {n: t.detach() for n, t in [*self.stock.named_parameters(), *self.stock.named_buffers()]}
        self.network = FusedTransformer(
            TransformerConfig.from_stock(asdict(size.transformer)),
            tensors,
            stock=self.stock,
            attention=model.attention,
            checkpointing=model.gradient_checkpointing,
        )
        targets = tuple(f".attn.{name}" for name in LORA_TARGETS)
        settings = {"rank": model.lora.rank, "alpha": model.lora.alpha, "init": model.lora.init, "seed": seed}
        self.lora = self.network.adapt(lambda name: name.endswith(targets), **settings)
        self.network.prepare_merged(fp8=precision == "fp8")
        if model.base_precision == "fp8":
            self.network.prepare_fp8_base()
        self.decoder, self.reference_decoder = (self._decoder(dtype) for dtype in (self.dtype, torch.float32))
        self._embeddings: dict[str, Conditioning] = {}  # on the host
        self._empty: Conditioning | None = None

    def _decoder(self, dtype: torch.dtype) -> Decoder:
        """Random weights that keep the scale of what flows through: norms are the identity, kernels Kaiming."""
        decoder = Decoder(self.size.decoder, dtype=dtype, device=self.device)
        generator = rng.generator(self.seed, "bench_decoder")
        with torch.no_grad():
            for name, parameter in decoder.named_parameters():
                if parameter.ndim > 1:
                    drawn = torch.randn(parameter.shape, generator=generator) / parameter[0].numel() ** 0.5
                    parameter.copy_(drawn)
                else:
                    parameter.fill_(1.0 if name.endswith("weight") else 0.0)
        return decoder

    def schedule(self, num_steps: int) -> tuple[torch.Tensor, torch.Tensor]:
        scheduler = FlowScheduler(torch.device("cpu"))
        scheduler.set_timesteps(num_steps)
        return scheduler.sigmas.double(), scheduler.timesteps

    def latent_shape(self) -> tuple[int, int, int]:
        return self.size.transformer.in_channels, self.size.latent_side, self.size.latent_side

    def encode(self, prompts: list[str]) -> Conditioning:
        """From the host's memory, as from a run's text cache."""
        rows = [self._embedding(prompt) for prompt in prompts]
        parts = (torch.cat(part) for part in zip(*((row.text, row.pooled) for row in rows)))
        return Conditioning(*(to_device(part, self.device) for part in parts))

    def _embedding(self, prompt: str) -> Conditioning:
        if prompt not in self._embeddings:
            config, generator = self.size.transformer, rng.generator(self.seed, f"bench_text:{prompt}")
            shapes = ((1, self.size.text_tokens, config.joint_attention_dim), (1, config.pooled_projection_dim))
            drawn = (torch.randn(shape, generator=generator).to(self.dtype) for shape in shapes)
            self._embeddings[prompt] = Conditioning(*drawn)
        return self._embeddings[prompt]

    def unconditional(self) -> Conditioning:
        if self._empty is None:
            self._empty = self.encode([""])
        return self._empty

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return self.decoder.images(latents)

    def trainable_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        yield "lora", self.lora.master

    def element_name(self, parameter: str, index: int) -> str:
        return self.lora.name_at(index)

    def export(self, folder: Path, notes: Mapping[str, str] | None = None) -> None:
        raise NotImplementedError("random weights are not exported")


def save_backbone(size: Size, folder: Path, seed: int) -> None:
    """A random DINOv2 where `FeatureHeadAdversary` can load it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rng.derive_seed(seed, "bench_backbone"))
        Dinov2Model(Dinov2Config(**size.backbone)).save_pretrained(folder)


def save_references(folder: Path, prompts: Sequence[str], side: int, seed: int) -> ReferenceSet:
    """Eight images of noise for every prompt, as the files that a run reads."""
    folder.mkdir(parents=True, exist_ok=True)

    def save(number: int, prompt: str) -> list[str]:
        generator = rng.generator(seed, f"bench_images:{prompt}")
        drawn = torch.randint(256, (8, side, side, 3), generator=generator, dtype=torch.uint8).numpy()
        names = [f"{number}-{i}.png" for i in range(len(drawn))]
        for name, pixels in zip(names, drawn):
            Image.fromarray(pixels).save(folder / name, compress_level=1)
        return names

    with ThreadPoolExecutor(max_workers=min(16, os.cpu_count() or 1)) as pool:  # Pillow packs without the GIL
        index = dict(zip(prompts, pool.map(save, range(len(prompts)), prompts)))
    (folder / "references.json").write_text(json.dumps(index))
    return ReferenceSet.load(folder, list(prompts))
