"""What an adversary offers: a reward that learns. Everything outside its files talks to these protocols only.

Shapes: B images [B, 3, H, W] float32 in [0, 1], one prompt each.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch

from advgrpo.config import AdversarySection
from advgrpo.types import Features

WEIGHT = "weight"  # name of the tensor of Features that says what each image counts, where not all count alike


def image_weights(reference: Features, generated: Features) -> tuple[torch.Tensor, torch.Tensor] | None:
    """What the images of both sides count, [B] float32 each; None: all of them 1."""
    if WEIGHT not in reference.tensors:
        return None
    return reference[WEIGHT], generated[WEIGHT]


@runtime_checkable
class DiscriminatorLoss(Protocol):
    """Result of `Adversary.loss`."""

    @property
    def loss(self) -> torch.Tensor:
        """Scalar float32, differentiable in `Adversary.parameters()`."""
        ...

    @property
    def accuracy(self) -> torch.Tensor | None:
        """Scalar float32, the share of images on the right side of the head's own threshold, times local images /
        `total`; detached. None where scores have no threshold: then only pairs of a prompt tell how well it judges."""
        ...


@runtime_checkable
class Score(Protocol):
    """Result of `Adversary.score`."""

    @property
    def reward(self) -> torch.Tensor:
        """[B] float32."""
        ...


@runtime_checkable
class Adversary(Protocol):
    """A learned reward: a frozen part that computes features once, and a trained part, the head, that scores them.

    `features` runs once per image; the reward, the head's training and the reference cache all use its result.
    Draws are keyed by (run seed, purpose, iteration, global image number), never by batch or process.

    `training_features`, `loss`, `optimizer.zero_grad(set_to_none=False)` and `step` run inside a captured CUDA graph:
    none of them may read a device value on the host or make a device tensor from a host value, and parameters,
    gradients and optimizer state stay in the same storage for the whole run.
    """

    config: AdversarySection
    seed: int  # of the run
    optimizer: torch.optim.Optimizer  # over `parameters()`; a `DiscriminatorAdam`, or another that a graph can hold
    # An adversary whose state_dict has grown names what checkpoints of before may lack in `state_added_later`, a tuple.
    text_dependent: bool  # features depend on the prompt: the reference cache then keys by it too
    backbone: Any  # the frozen network whose features these are, for others that look through the same one; or None

    @property
    def device(self) -> torch.device:
        """Where features and head live."""
        ...

    @property
    def cache_key(self) -> str:
        """What `cached_features(features(...))` depends on beside image and prompt: weights, precision, sizes."""
        ...

    def features(self, images: torch.Tensor, prompts: list[str]) -> Features:
        """Everything the head may look at, without gradient; each image's independent of the rest of the batch.

        Args:
            images: [B, 3, H, W] float32 in [0, 1], on any device.
            prompts: their B prompts; an adversary that judges the image alone (DINO) ignores them.

        Returns:
            Named tensors [B, ...] on `device`, the same names on every call.
        """
        ...

    def score(self, features: Features, sample_ids: torch.Tensor, *, purpose: str, iteration: int) -> Score:
        """The reward of every image under the head as it stands, without gradient.

        Args:
            features: from `features`, or `cached_features` of them.
            sample_ids: [B] int64 on `device`, global image numbers of the iteration.
            purpose: "reward" or "reference"; keys the draws together with `iteration`.
        """
        ...

    def training_features(self, features: Features, sample_ids: torch.Tensor, seed: int | torch.Tensor) -> Features:
        """What one discriminator update looks at, and what the replay buffer holds (DINO: `num_patches` random
        patches).

        Args:
            features: of B images, B = 0 included: a process may hold none of the drawn images.
            sample_ids: [B] int64 on `device`; with `seed` they key every draw.
            seed: integer, or int64 tensor of one element on `device` (then nothing may be read on the host).

        Returns:
            The same names, shapes [B, ...] that depend on the settings only.
        """
        ...

    def cached_features(self, features: Features) -> Features:
        """What the reference cache keeps of a prompt's references (DINO: at most `cached_patches` random patches).

        Same names; a function of the features alone, so cached and fresh ones agree to the last bit.
        """
        ...

    def centre(self, generated: float, reference: float) -> None:
        """Hear the mean rewards of both sides over all processes, once before an iteration's discriminator updates.

        An objective that compares scores with a threshold puts it between them, unless its head has a bias to learn.
        Called outside captured graphs; what it sets stays in the same storage.
        """
        ...

    def loss(self, reference: Features, generated: Features, *, total: int | None = None) -> DiscriminatorLoss:
        """The head's loss, references as positives and generations as negatives.

        Args:
            reference, generated: `training_features`s; the two sides may differ in length, and either may be empty.
                Both may have a tensor `WEIGHT` [B] float32 besides: what each image counts in the sums. Images of
                weight 0 fill the batch up to a size that is the same in every update.
            total: images per side over all processes; means divide by it, so that losses, accuracies and gradients
                summed over processes are those of the whole batch. None: each side's own.
        """
        ...

    def parameters(self) -> list[torch.nn.Parameter]:
        """The head's, float32, in a fixed order."""
        ...

    def step(self) -> None:
        """One step of `optimizer` on the gradients in `parameters()`, already summed over processes."""
        ...

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The head for a checkpoint, detached; the optimizer is saved by the trainer."""
        ...

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Copy `state` into the existing parameters."""
        ...


@torch.no_grad()
def features_of_black(adversary: Adversary) -> Features:
    """What an adversary's frozen part computes of one black image, [1, ...] each: for names, shapes and dtypes."""
    side = 64  # which it makes its own
    return adversary.features(torch.zeros(1, 3, side, side, device=adversary.device), [""])


@runtime_checkable
class Restarts(Protocol):
    """An adversary that can forget what it has learned (adversary.reset_every)."""

    def restart(self, number: int) -> None:
        """Begin anew, from initial weights that are keyed by the run's seed and `number`, 1 for the first time.

        Weights, moments and whatever else an update changes keep their storage, for captured graphs.
        """
        ...
