"""What the trainer asks of a generator. A new rectified-flow model is one new file that implements this."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

import torch

from ..types import Conditioning


class Policy(Protocol):
    """A text-to-image flow model with trainable parameters on top of a frozen base."""

    device: torch.device
    merged: bool  # `merged_velocity` is available

    def schedule(self, num_steps: int) -> tuple[torch.Tensor, torch.Tensor]:
        """sigmas [T+1] float64, decreasing to 0, and the timesteps [T] float32 the network is given."""
        ...

    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one picture's latents."""
        ...

    def encode(self, prompts: list[str]) -> Conditioning:
        """Text embeddings, cached on disk by content."""
        ...

    def velocity(
        self, latents: torch.Tensor, timestep: torch.Tensor, conditioning: Conditioning, *, guided: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Conditional and, when guided, unconditional velocity [R, C, H, W] from the trainable weights."""
        ...

    def merged_velocity(
        self, latents: torch.Tensor, timestep: torch.Tensor, conditioning: Conditioning, *, guided: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As `velocity`, from adapters merged into the weights: faster, for steps without a likelihood."""
        ...

    def merge(self) -> None:
        """Bring the merged weights up to date, in place."""
        ...

    def reference(self) -> AbstractContextManager[None]:
        """Within it `velocity` is the frozen base model's."""
        ...

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Pictures [R, 3, H, W] float32 in [0, 1]."""
        ...

    def trainable_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]: ...

    def export(self, folder: Path) -> None:
        """Write the trained weights in the format stock diffusers loads."""
        ...
