"""What the trainer asks of a generator. A new model is one new file that implements this."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

import torch

from advgrpo.types import Conditioning

Velocity = tuple[torch.Tensor, torch.Tensor | None]  # conditional and, when guided, unconditional: [R, C, H, W] each


class PreparedPrompts(Protocol):
    """What the network needs of R prompts for the steps of one trajectory, computed once."""

    def rows(self, index: torch.Tensor) -> PreparedPrompts:
        """The same for rows `index` [R'] int64 of it."""
        ...

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything it holds on the device, by name."""
        ...

    def with_tensors(self, tensors: dict[str, torch.Tensor]) -> PreparedPrompts:
        """The same over other tensors of the same shapes: a captured graph reads them where they always are."""
        ...


class Policy(Protocol):
    """A text-to-image model with trainable parameters on top of a frozen base."""

    device: torch.device
    prediction_type: (
        str  # diffusers' word for what `predict` returns: "flow_prediction" (velocity) or "epsilon" (noise)
    )
    component: str  # its folder in the pipeline: "transformer" or "unet"
    has_merged: bool  # `predict_merged` is another, faster forward than `predict`

    def schedule(self, num_steps: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Levels [T+1] float64 of a trajectory, from noise to image, and the timesteps [T] float32 for the network.

        The levels are σ, falling to 0, of a model that predicts velocity, and ᾱ, rising, of one that predicts noise.
        """
        ...

    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image's latents."""
        ...

    def encode(self, prompts: list[str]) -> Conditioning:
        """Text embeddings, cached on disk by content."""
        ...

    def prepare(self, conditioning: Conditioning, timesteps: torch.Tensor, *, guided: bool) -> PreparedPrompts:
        """Everything about the prompts that does not depend on the latents, for all timesteps [T]."""
        ...

    def predict(self, latents: torch.Tensor, step: torch.Tensor, prepared: PreparedPrompts) -> Velocity:
        """From the trainable weights, at the step whose number the device tensor `step` (int64 [1]) holds."""
        ...

    def predict_merged(self, latents: torch.Tensor, step: torch.Tensor, prepared: PreparedPrompts) -> Velocity:
        """As `predict`, from adapters merged into the weights: faster, for steps without a likelihood."""
        ...

    def merge(self) -> None:
        """Bring the merged weights up to date, in place."""
        ...

    def merge_error(self) -> torch.Tensor | None:
        """Share of the adapters' change that rounding takes from the merged weights, a scalar on the device; None
        without merged weights."""
        ...

    def disable_adapter(self) -> AbstractContextManager[None]:
        """Within it `predict` is the frozen base model's."""
        ...

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Images [R, 3, H, W] float32 in [0, 1]."""
        ...

    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        """Latents [R, C, H, W] float32 of images [R, 3, H, W] in [0, 1], what `decode` turns into these again."""
        ...

    def training_sigmas(self, quantiles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """σ [K] float32 in (0, 1) at quantiles in (0, 1) of the training schedule, and their timesteps [K] float32.

        Of a model that predicts velocity; supervised training draws its levels so.
        """
        ...

    def trainable_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]: ...

    def element_name(self, parameter: str, index: int) -> str:
        """The layer that element `index` of a trainable parameter belongs to, for error messages."""
        ...

    def export(self, folder: Path) -> None:
        """Write the trained weights in the format stock diffusers loads."""
        ...
