"""The ways to run a network: diffusers' forward with PEFT adapters (MMDiT or UNet), and our fused MMDiT.

All take latents and the number of a step of a prepared trajectory, and one of three sets of weights: "adapted" (what
is trained), "base" (frozen), "merged" (adapters folded into the weights, for steps without a likelihood; by our forward
alone, which diffusers' may have a copy for beside it: merged_copy.py).

Shapes: R rows, latents [R, C, h, w], text [R, S, E], pooled [R, E'], K steps.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin

from advgrpo.config import ModelSection
from advgrpo.policy.adapters import START, FullWeights, LoraAdapters, export_lora, start_state, target_modules
from advgrpo.policy.fp8_base import quantize, quantized_blocks
from advgrpo.policy.fused.sequence import SequenceGroup
from advgrpo.policy.fused.transformer import FusedTransformer, Prepared, Sharding, TransformerConfig, Weights
from advgrpo.policy.merged_copy import MergedCopy
from advgrpo.policy.parts import Parts
from advgrpo.policy.sharding import BlockSharding
from advgrpo.policy.weights_in_parts import WeightsInParts


@dataclass
class StockPrepared:
    text: torch.Tensor  # [R, S, E]
    pooled: torch.Tensor  # [R, E']
    timesteps: torch.Tensor  # [K]
    guidance: torch.Tensor | None = None  # [1] float32, of a network that takes it as an input
    mask: torch.Tensor | None = None  # [R, S] bool, text tokens that are attended to; None: all
    merged: Prepared | None = None  # the same for a copy in our forward, where there is one

    def rows(self, index: torch.Tensor) -> StockPrepared:
        own = {name: getattr(self, name) for name in ("text", "pooled", "mask") if getattr(self, name) is not None}
        merged = None if self.merged is None else self.merged.rows(index)
        return replace(self, merged=merged, **{name: tensor.index_select(0, index) for name, tensor in own.items()})

    def tensors(self) -> dict[str, torch.Tensor]:
        held = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "merged"}
        of_copy = {} if self.merged is None else self.merged.tensors()
        own = {name: tensor for name, tensor in held.items() if tensor is not None}
        return own | {f"merged.{name}": tensor for name, tensor in of_copy.items()}

    def with_tensors(self, tensors: dict[str, torch.Tensor]) -> StockPrepared:
        of_copy = {n.removeprefix("merged."): t for n, t in tensors.items() if n.startswith("merged.")}
        own = {name: tensor for name, tensor in tensors.items() if not name.startswith("merged.")}
        return StockPrepared(**own, merged=Prepared(**of_copy) if of_copy else None)


class StockNetwork:
    """A diffusers network as it is, with LoRA by PEFT, or with every weight trained.

    Args:
        pooled_arguments: pooled text [R, E'] -> the arguments of the network's call that depend on it, for `run`.
    """

    sequence = None

    def __init__(
        self,
        network: ModelMixin,
        model: ModelSection,
        seed: int,
        pooled_arguments: Callable[[torch.Tensor], dict[str, Any]] = lambda pooled: {},
    ):
        self.adapters: LoraAdapters | FullWeights | WeightsInParts
        if model.train == "lora":
            self.adapters = LoraAdapters(network, model.lora, seed)
        else:
            self.adapters = FullWeights(network)
        if model.gradient_checkpointing:
            network.enable_gradient_checkpointing()
            network.train()  # diffusers checkpoints in train mode only; there is no dropout, so nothing else changes
        self.network, self.pooled_arguments = network, pooled_arguments
        self._quantized = set(quantized_blocks(network)) if model.base_precision == "fp8" else set()
        self._attention = model.attention
        self.copy: MergedCopy | None = None

    @property
    def has_merged(self) -> bool:
        return self.copy is not None

    def place(self, device: torch.device, sharding: BlockSharding | None, *, copied: bool = False) -> None:
        """Leave this process what it holds of the network, on the device, quantised if `model.base_precision` says so.

        Args:
            sharding: its part; made by all processes at the same place. None: all of it, which is there already.
            copied: merged weights in FP8, whole, are held beside it; of a network with adapters.
        """

        def quantize_block(name: str) -> None:
            if name in self._quantized:
                quantize(self.network.get_submodule(name), device)

        if sharding is None:
            for name in self._quantized:
                quantize_block(name)
        elif isinstance(self.adapters, FullWeights):
            self.adapters = WeightsInParts(self.network, sharding)
        else:
            sharding.shard(self.network, quantize_block)
        if copied:
            assert isinstance(self.adapters, LoraAdapters)
            gathered = (lambda module: contextlib.nullcontext()) if sharding is None else sharding.gathered
            self.copy = MergedCopy(self.network, self.adapters, gathered, self._attention)

    def prepare(
        self,
        text: torch.Tensor,
        pooled: torch.Tensor,
        timesteps: torch.Tensor,
        guidance: float | None = None,
        mask: torch.Tensor | None = None,
    ) -> StockPrepared:
        scale = None if guidance is None else torch.full((1,), guidance, device=text.device)
        merged = None
        if self.copy is not None:
            merged = self.copy.transformer.prepare(text, pooled, timesteps, guidance, mask)
        return StockPrepared(text, pooled, timesteps, scale, mask, merged)

    def predict(
        self, latents: torch.Tensor, step: torch.Tensor, prepared: StockPrepared, weights: Weights
    ) -> torch.Tensor:
        if weights == "merged" and self.copy is not None:
            assert prepared.merged is not None
            return self.copy.transformer.predict(latents, step, prepared.merged, weights)
        with self.adapters.disabled() if weights == "base" else contextlib.nullcontext():
            timesteps = prepared.timesteps.index_select(0, step).expand(len(latents))
            return self.run(latents.to(self.network.dtype), timesteps, prepared)

    def run(self, latents: torch.Tensor, timesteps: torch.Tensor, prepared: StockPrepared) -> torch.Tensor:
        """The network's call: [R, C, h, w] of latents [R, C, h, w] in its dtype, at timesteps [R]."""
        return self.network(
            latents,
            timestep=timesteps,
            encoder_hidden_states=prepared.text,
            return_dict=False,
            **self.pooled_arguments(prepared.pooled),
        )[0]

    def parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        return self.adapters.parameters()

    @property
    def parts(self) -> Parts | None:
        """How what is trained lies on the processes; None where each has all of it."""
        return self.adapters.parts if isinstance(self.adapters, WeightsInParts) else None

    def element_name(self, parameter: str, index: int) -> str:
        return parameter

    def merge(self) -> None:
        """Of the copy; without one there is nothing to merge: sampling runs the trained weights."""
        if self.copy is not None:
            self.copy.merge()

    def merge_error(self) -> torch.Tensor | None:
        """Of the copy; without one nothing is rounded."""
        return None if self.copy is None else self.copy.merge_error()

    def load_lora(self, folder: Path, field: str = START) -> None:
        self.adapters.load_lora(folder, field)

    def export(self, folder: Path, notes: Mapping[str, str] | None = None) -> None:
        self.adapters.export(folder, notes)


class FusedNetwork:
    """`FusedTransformer` over the weights of a stock module, which shares them.

    Args:
        precision: of the merged weights, "model" or "fp8".
        sequence: see there.
        sharding: see there; the stock module may lie on the host, and has no weights afterwards. There are no merged
            ones then.
    """

    parts = None

    def __init__(
        self,
        transformer: ModelMixin,
        model: ModelSection,
        seed: int,
        *,
        precision: str,
        sequence: SequenceGroup | None = None,
        sharding: Sharding | None = None,
    ):
        targets = set(target_modules(transformer, model.lora))
        tensors = {name: t.detach() for name, t in [*transformer.named_parameters(), *transformer.named_buffers()]}
        self.transformer = FusedTransformer(
            TransformerConfig.from_stock(transformer.config),
            tensors,
            stock=transformer if sharding is None else None,
            attention=model.attention,
            checkpointing=model.gradient_checkpointing,
            sequence=sequence,
            sharding=sharding,
        )
        self.has_merged = sharding is None
        lora = model.lora
        self.export_format = lora.export_format
        self.lora = self.transformer.adapt(
            targets.__contains__, rank=lora.rank, alpha=lora.alpha, init=lora.init, seed=seed
        )
        if not self.has_merged:
            torch.nn.Module.to(transformer, "meta")  # diffusers' own warns of what is to stay float32: nothing is left
            return
        self.transformer.prepare_merged(fp8=precision == "fp8")
        if model.base_precision == "fp8":
            self.transformer.prepare_fp8_base()

    def prepare(
        self,
        text: torch.Tensor,
        pooled: torch.Tensor,
        timesteps: torch.Tensor,
        guidance: float | None = None,
        mask: torch.Tensor | None = None,
    ) -> Prepared:
        return self.transformer.prepare(text, pooled, timesteps, guidance, mask)

    def predict(self, latents: torch.Tensor, step: torch.Tensor, prepared: Prepared, weights: Weights) -> torch.Tensor:
        return self.transformer.predict(latents, step, prepared, weights)

    def parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        yield "lora", self.lora.master

    @property
    def sequence(self) -> SequenceGroup | None:
        """The processes that run every forward together; None: this one alone."""
        return self.transformer.sequence

    def element_name(self, parameter: str, index: int) -> str:
        """The stock module that an element of a parameter belongs to, for error messages."""
        return self.lora.name_at(index)

    def merge(self) -> None:
        if self.has_merged:
            self.transformer.merge()

    def merge_error(self) -> torch.Tensor | None:
        return self.transformer.merge_error() if self.has_merged else None

    def load_lora(self, folder: Path, field: str = START) -> None:
        self.lora.load_state_dict(start_state(folder, "transformer", self.lora.scale, field), str(folder))

    def export(self, folder: Path, notes: Mapping[str, str] | None = None) -> None:
        export_lora(folder, self.lora.modules(), self.lora.scale, "transformer", self.export_format, notes)
