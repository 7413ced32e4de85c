"""A `Generator` whose network is a formula: what a sampler does with it can be computed by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from advgrpo.types import Conditioning


def bent(latents: torch.Tensor, sigma: float = 0.0) -> torch.Tensor:
    """A velocity that is not linear in the latents, and the same at every level: what peers were recorded with."""
    return torch.tanh(2 * latents) - 0.3 * latents


@dataclass(frozen=True)
class ToyPrompts:
    """Prepared prompts of which a formula wants nothing."""

    count: int

    def rows(self, index: torch.Tensor) -> ToyPrompts:
        return ToyPrompts(len(index))


class ToyGenerator:
    """Predicts `predicted(latents [R, ...], level)` at the levels given, σ or ᾱ: float64 [T+1]."""

    device = torch.device("cpu")

    def __init__(
        self,
        levels: torch.Tensor,
        predicted: Callable[[torch.Tensor, float], torch.Tensor],
        shape: tuple[int, int, int] = (2, 3, 3),
        prediction_type: str = "flow_prediction",
    ):
        self.levels, self.predicted, self.shape = levels.double(), predicted, shape
        self.prediction_type = prediction_type

    def schedule(self, num_steps: int) -> tuple[torch.Tensor, torch.Tensor]:
        assert num_steps == len(self.levels) - 1
        return self.levels, (1000 * self.levels[:-1]).float()

    def latent_shape(self) -> tuple[int, int, int]:
        return self.shape

    def encode(self, prompts: list[str]) -> Conditioning:
        return Conditioning(torch.zeros(len(prompts), 1, 1), torch.zeros(len(prompts), 1))

    def prepare(self, conditioning: Conditioning, timesteps: torch.Tensor, *, guidance: float) -> ToyPrompts:
        return ToyPrompts(len(conditioning.text))

    def predict(self, latents: torch.Tensor, step: torch.Tensor, prompts: ToyPrompts):
        assert len(latents) == prompts.count
        return self.predicted(latents, float(self.levels[int(step)])).contiguous(), None
