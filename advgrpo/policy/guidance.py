"""Classifier-free guidance over any network: unconditional rows first, one for each conditional row, one forward.

Apart from `diffusers_policy.py`, so that the benchmark at full size can use it without diffusers.

Shapes: R rows, latents [R, C, H, W] float32, text [R, L, D], pooled [R, E].
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch

from advgrpo.policy.base import Prediction, PreparedPrompts
from advgrpo.policy.fused.transformer import Weights
from advgrpo.types import Conditioning

Own = TypeVar("Own")


class NetworkPrompts(PreparedPrompts, Protocol):
    """Prepared rows of a network, by tensors that can be exchanged."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything it holds on the device, by name."""
        ...

    def with_tensors(self: Own, tensors: dict[str, torch.Tensor]) -> Own:
        """The same over other tensors of the same shapes."""
        ...


N = TypeVar("N", bound=NetworkPrompts)


class Network(Protocol[N]):
    """A way to run one network, with the trained weights, the frozen ones or the merged ones."""

    def prepare(self, text: torch.Tensor, pooled: torch.Tensor, timesteps: torch.Tensor) -> N:
        """What the steps at `timesteps` [T] need of text [R, L, D] and pooled [R, E]."""
        ...

    def predict(self, latents: torch.Tensor, step: torch.Tensor, prepared: N, weights: Weights) -> torch.Tensor:
        """[R, C, H, W] in the model's dtype at step number `step`, int64 [1] on the device, or [R] for one per row."""
        ...

    def merge(self) -> None:
        """Bring merged weights up to date; nothing where there are none."""
        ...

    def merge_error(self) -> torch.Tensor | None:
        """See `Trainable.merge_error`."""
        ...


@dataclass
class Guided:
    """A network's prepared rows; with guidance the unconditional ones come first, one for each conditional row."""

    rows_of_network: NetworkPrompts
    count: int  # prompts
    guided: bool

    def rows(self, index: torch.Tensor) -> Guided:
        both = torch.cat([index, index + self.count]) if self.guided else index
        return Guided(self.rows_of_network.rows(both), len(index), self.guided)


Net = TypeVar("Net", bound=Network[Any])  # whatever its prompts are: what it prepares is what it is given


class GuidedPolicy(ABC, Generic[Net]):
    """The parts of `Generator`, `Trainable` and `Capturable` (base.py) that run the network."""

    network: Net
    has_merged: bool
    _trained: Weights = "adapted"  # the weights that `predict` runs

    @abstractmethod
    def unconditional(self) -> Conditioning:
        """One row: what guidance leads away from, the embeddings of the empty prompt."""

    def prepare(self, conditioning: Conditioning, timesteps: torch.Tensor, *, guidance: float) -> Guided:
        text, pooled, rows = conditioning.text, conditioning.pooled, len(conditioning.text)
        guided = guidance != 1.0
        if guided:
            empty = self.unconditional()
            text = torch.cat([empty.text.expand(rows, -1, -1), text])
            pooled = torch.cat([empty.pooled.expand(rows, -1), pooled])
        return Guided(self.network.prepare(text, pooled, timesteps), rows, guided)

    def predict(self, latents: torch.Tensor, step: torch.Tensor, prepared: Guided) -> Prediction:
        return self._forward(latents, step, prepared, self._trained)

    def predict_merged(self, latents: torch.Tensor, step: torch.Tensor, prepared: Guided) -> Prediction:
        return self._forward(latents, step, prepared, "merged")

    def _forward(self, latents: torch.Tensor, step: torch.Tensor, prepared: Guided, weights: Weights) -> Prediction:
        hidden = torch.cat([latents, latents]) if prepared.guided else latents
        predicted = self.network.predict(hidden, step, prepared.rows_of_network, weights)
        return (predicted[len(latents) :], predicted[: len(latents)]) if prepared.guided else (predicted, None)

    def prompt_tensors(self, prepared: Guided) -> dict[str, torch.Tensor]:
        return prepared.rows_of_network.tensors()

    def with_prompt_tensors(self, prepared: Guided, tensors: dict[str, torch.Tensor]) -> Guided:
        return Guided(prepared.rows_of_network.with_tensors(tensors), prepared.count, prepared.guided)

    def merge(self) -> None:
        self.network.merge()

    def merge_error(self) -> torch.Tensor | None:
        return self.network.merge_error()

    @contextlib.contextmanager
    def disable_adapter(self) -> Generator[None, None, None]:
        before, self._trained = self._trained, "base"
        try:
            yield
        finally:
            self._trained = before
