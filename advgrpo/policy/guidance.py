"""Classifier-free guidance over any network: unconditional rows first, one for each conditional row, one forward.

Apart from `diffusers_policy.py`, so that the benchmark at full size can use it without diffusers.

Shapes: R rows, latents [R, C, H, W] float32, text [R, L, D], pooled [R, E].
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from advgrpo.policy.base import PreparedPrompts, Velocity
from advgrpo.types import Conditioning


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


class GuidedPolicy(ABC):
    """The part of the `Policy` protocol that runs the network: with trained, base or merged weights."""

    network: Any  # prepare(text, pooled, timesteps), velocity(latents, step, prepared, weights), merge()
    has_merged: bool
    _trained = "adapted"  # the weights that `velocity` runs

    @abstractmethod
    def unconditional(self) -> Conditioning:
        """One row: what guidance leads away from, the embeddings of the empty prompt."""

    def prepare(self, conditioning: Conditioning, timesteps: torch.Tensor, *, guided: bool) -> Guided:
        text, pooled, rows = conditioning.text, conditioning.pooled, len(conditioning.text)
        if guided:
            empty = self.unconditional()
            text = torch.cat([empty.text.expand(rows, -1, -1), text])
            pooled = torch.cat([empty.pooled.expand(rows, -1), pooled])
        return Guided(self.network.prepare(text, pooled, timesteps), rows, guided)

    def predict(self, latents: torch.Tensor, step: torch.Tensor, prepared: Guided) -> Velocity:
        return self._forward(latents, step, prepared, self._trained)

    def predict_merged(self, latents: torch.Tensor, step: torch.Tensor, prepared: Guided) -> Velocity:
        return self._forward(latents, step, prepared, "merged")

    def _forward(self, latents: torch.Tensor, step: torch.Tensor, prepared: Guided, weights: str) -> Velocity:
        hidden = torch.cat([latents, latents]) if prepared.guided else latents
        velocity = self.network.predict(hidden, step, prepared.rows_of_network, weights)
        return (velocity[len(latents) :], velocity[: len(latents)]) if prepared.guided else (velocity, None)

    def merge(self) -> None:
        self.network.merge()

    def merge_error(self) -> torch.Tensor | None:
        return self.network.merge_error() if self.has_merged else None

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        before, self._trained = self._trained, "base"
        try:
            yield
        finally:
            self._trained = before
