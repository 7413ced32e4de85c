"""The two ways to run the same transformer: diffusers' forward with PEFT adapters, and our fused one.

Both take latents and the number of a step of a prepared trajectory, and one of three sets of weights: "adapted" (what
is trained), "base" (frozen), "merged" (fused only: adapters folded into the weights, for steps without a likelihood).

Shapes: R rows, latents [R, C, h, w], text [R, S, E], pooled [R, E'], K steps.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import SD3Transformer2DModel

from ..config import ModelSection
from .adapters import FullWeights, LoraAdapters, export_lora, read_lora, target_modules
from .transformer import FusedTransformer, Prepared, TransformerConfig


@dataclass
class StockPrepared:
    text: torch.Tensor  # [R, S, E]
    pooled: torch.Tensor  # [R, E']
    timesteps: torch.Tensor  # [K]

    def rows(self, index: torch.Tensor) -> StockPrepared:
        return StockPrepared(self.text.index_select(0, index), self.pooled.index_select(0, index), self.timesteps)

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"text": self.text, "pooled": self.pooled, "timesteps": self.timesteps}

    def with_tensors(self, tensors: dict[str, torch.Tensor]) -> StockPrepared:
        return StockPrepared(**tensors)


class StockNetwork:
    """diffusers' SD3Transformer2DModel as it is; LoRA by PEFT, or every weight."""

    has_merged = False

    def __init__(self, transformer: SD3Transformer2DModel, model: ModelSection, seed: int):
        if model.train == "lora":
            self.adapters = LoraAdapters(transformer, model.lora, seed)
        else:
            self.adapters = FullWeights(transformer)
        if model.gradient_checkpointing:
            transformer.enable_gradient_checkpointing()
            transformer.train()  # diffusers checkpoints in train mode only; SD3 has no dropout, so nothing else changes
        self.transformer = transformer

    def prepare(self, text: torch.Tensor, pooled: torch.Tensor, timesteps: torch.Tensor) -> StockPrepared:
        return StockPrepared(text, pooled, timesteps)

    def velocity(self, latents: torch.Tensor, step: torch.Tensor, prepared: StockPrepared, weights: str):
        with self.adapters.disabled() if weights == "base" else contextlib.nullcontext():
            return self.transformer(
                hidden_states=latents.to(self.transformer.dtype),
                timestep=prepared.timesteps.index_select(0, step).expand(len(latents)),
                encoder_hidden_states=prepared.text,
                pooled_projections=prepared.pooled,
                return_dict=False,
            )[0]

    def parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        return self.adapters.parameters()

    def element_name(self, parameter: str, index: int) -> str:
        return parameter

    def merge(self) -> None:
        """Nothing to merge: sampling runs the trained weights."""

    def load_lora(self, folder: Path) -> None:
        self.adapters.load_state_dict(read_lora(folder, "model.lora.start_from"), str(folder))

    def export(self, folder: Path) -> None:
        self.adapters.export(folder)


class FusedNetwork:
    """`FusedTransformer` over the weights of a stock module, which shares them."""

    has_merged = True

    def __init__(self, transformer: SD3Transformer2DModel, model: ModelSection, seed: int, *, precision: str):
        targets = set(target_modules(transformer, model.lora))
        tensors = {name: t.detach() for name, t in [*transformer.named_parameters(), *transformer.named_buffers()]}
        self.transformer = FusedTransformer(
            TransformerConfig.from_stock(transformer.config),
            tensors,
            stock=transformer,
            attention=model.attention,
            checkpointing=model.gradient_checkpointing,
        )
        lora = model.lora
        self.lora = self.transformer.adapt(
            targets.__contains__, rank=lora.rank, alpha=lora.alpha, init=lora.init, seed=seed
        )
        self.transformer.prepare_merged(fp8=precision == "fp8")
        if model.base_precision == "fp8":
            self.transformer.prepare_fp8_base()

    def prepare(self, text: torch.Tensor, pooled: torch.Tensor, timesteps: torch.Tensor) -> Prepared:
        return self.transformer.prepare(text, pooled, timesteps)

    def velocity(self, latents: torch.Tensor, step: torch.Tensor, prepared: Prepared, weights: str) -> torch.Tensor:
        return self.transformer.velocity(latents, step, prepared, weights)

    def parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        yield "lora", self.lora.master

    def element_name(self, parameter: str, index: int) -> str:
        """The stock module that an element of a parameter belongs to, for error messages."""
        return self.lora.name_at(index)

    def merge(self) -> None:
        self.transformer.merge()

    def load_lora(self, folder: Path) -> None:
        self.lora.load_state_dict(read_lora(folder, "model.lora.start_from"), str(folder))

    def export(self, folder: Path) -> None:
        export_lora(folder, self.lora.state_dict(), self.lora.metadata())
