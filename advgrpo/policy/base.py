"""What the trainer asks of a text-to-image model, in contracts as small as their callers.

    Generator         draws: all that sampling takes. A new family of models begins with it, in one file
    Trainable         learns: parameters beside a frozen base, their merged form, their export
    Policy            both: what the trainer, the update and evaluation work with
    SupervisedTarget  a generator that supervised fine-tuning can fit: not one that predicts noise
    Capturable        a generator whose steps can become CUDA graphs; another's run eagerly
    LoraReader        a policy that can say what another LoRA's parameters would be: what distillation asks

`P` is a policy's own form of prepared prompts: what its `prepare` gives and its `predict` takes.

Shapes: R rows, latents [R, C, H, W] float32, T steps of a trajectory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol, TypeVar, runtime_checkable

import torch

from advgrpo.types import Conditioning

# Of the conditional rows and, when guided by two predictions, of the unconditional ones: [R, C, H, W] each.
Prediction = tuple[torch.Tensor, "torch.Tensor | None"]
Rows = TypeVar("Rows")


class PreparedPrompts(Protocol):
    """What the network needs of R prompts for the steps of one trajectory, computed once."""

    def rows(self: Rows, index: torch.Tensor) -> Rows:
        """The same for rows `index` [R'] int64 of it."""
        ...


def combining_scale(predicted: Prediction, guidance: float) -> float:
    """The scale g of (1 - g) * unconditional + g * conditional: 1 where one prediction is all there is."""
    return 1.0 if predicted[1] is None else guidance


P = TypeVar("P", bound=PreparedPrompts)
P_contra = TypeVar("P_contra", bound=PreparedPrompts, contravariant=True)


class Generator(Protocol[P]):
    """A text-to-image model as the sampler sees it."""

    device: torch.device
    prediction_type: str  # diffusers' word for what `predict` returns: "flow_prediction" (velocity), "epsilon" (noise)

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

    def prepare(self, conditioning: Conditioning, timesteps: torch.Tensor, *, guidance: float) -> P:
        """Everything about the prompts that does not depend on the latents, for all timesteps [T].

        Args:
            guidance: the scale to be drawn at. How is the model's own matter: by two predictions, which the caller
                combines (`combining_scale`), by two that it combines itself, or by an input of the network. The last
                two give one prediction, guided already. 1 means none but to the last.
        """
        ...

    def predict(self, latents: torch.Tensor, step: torch.Tensor, prepared: P) -> Prediction:
        """From the trainable weights, at the step whose number the device tensor `step` (int64 [1]) holds.

        A model that learns at noise levels of its own (update.objective nft) also takes int64 [R], one per row, of
        prompts prepared at guidance 1.
        """
        ...

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Images [R, 3, H, W] float32 in [0, 1]."""
        ...


@runtime_checkable
class Trainable(Protocol[P_contra]):
    """Trained weights on top of a frozen base."""

    component: str  # the network's folder in the pipeline: "transformer" or "unet"
    has_merged: bool  # `predict_merged` is another, faster forward than `predict`

    def trainable_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """By name, float32, always in the same order."""
        ...

    def disable_adapter(self) -> AbstractContextManager[None]:
        """Within it `predict` is the frozen base model's."""
        ...

    def merge(self) -> None:
        """Bring the merged weights up to date, in place; nothing without them."""
        ...

    def predict_merged(self, latents: torch.Tensor, step: torch.Tensor, prepared: P_contra) -> Prediction:
        """As `Generator.predict`, from adapters merged into the weights: faster, for steps without a likelihood."""
        ...

    def merge_error(self) -> torch.Tensor | None:
        """Share of the adapters' change that rounding takes from the merged weights, a scalar on the device; None
        without merged weights."""
        ...

    def element_name(self, parameter: str, index: int) -> str:
        """The layer that element `index` of a trainable parameter belongs to, for error messages."""
        ...

    def export(self, folder: Path, notes: Mapping[str, str] | None = None) -> None:
        """Write the trained weights in the format stock diffusers loads; a LoRA's header also says `notes`."""
        ...


class Policy(Generator[P], Trainable[P], Protocol[P]):
    """A generator that is trained."""


class SupervisedTarget(Generator[P], Protocol[P]):
    """What supervised fine-tuning asks beside: a way from images to latents, and levels to draw noise at."""

    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        """Latents [R, C, H, W] float32 of images [R, 3, H, W] in [0, 1], what `decode` turns into these again."""
        ...

    def training_sigmas(self, quantiles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """σ [K] float32 in (0, 1) at quantiles in (0, 1) of the training schedule, and their timesteps [K] float32."""
        ...


@runtime_checkable
class LoraReader(Protocol):
    """A policy that knows files of its own adapters. Nothing but a teacher (`update.teacher`) asks for it."""

    def parameters_of_lora(self, folder: Path, field: str) -> dict[str, torch.Tensor]:
        """What the trainable parameters would be with the LoRA in `folder`, by name, on the policy's device.

        Raises:
            UserError: no LoRA there, or another rank, targets or blocks; names `field`, the setting it comes from.
        """
        ...


@runtime_checkable
class Capturable(Protocol[P]):
    """Prepared prompts that can lie in static storage, where a captured graph reads them (runtime/graphs.py).

    Sampler and updater ask for it, and only where they capture.
    """

    def prompt_tensors(self, prepared: P) -> dict[str, torch.Tensor]:
        """Everything `prepared` holds on the device, by name."""
        ...

    def with_prompt_tensors(self, prepared: P, tensors: dict[str, torch.Tensor]) -> P:
        """`prepared` over other tensors of the same names and shapes."""
        ...
