"""What every reward checks about its input and its scores."""

from __future__ import annotations

import torch

from advgrpo.data.references import ReferenceSet
from advgrpo.errors import UserError


def check_batch(images: torch.Tensor, prompts: list[str]) -> None:
    """ValueError unless images are [B, 3, H, W] of a float type and there are B prompts."""
    if images.dim() != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ValueError(f"want float images [B, 3, H, W], got {images.dtype} {list(images.shape)}")
    if len(prompts) != len(images):
        raise ValueError(f"{len(images)} images but {len(prompts)} prompts; want one prompt per image")


def finite_scores(scores: torch.Tensor, images: torch.Tensor, prompts: list[str], name: str) -> torch.Tensor:
    """`scores` [B] as float32 on the device of `images`; reads one number on the host.

    Raises:
        FloatingPointError: a score is not finite; the message names the reward and the first such prompt.
    """
    scores = scores.float()
    good = torch.isfinite(scores)
    if not good.all():
        bad = int((~good).nonzero()[0])
        if not images[bad].isfinite().all():
            raise FloatingPointError(
                f"reward {name} cannot score the image of prompt {prompts[bad]!r}, which holds numbers that are not "
                "finite: look at what drew it (guidance scale, model.dtype, the LoRA, the learning rate), not at the "
                "reward"
            )
        raise FloatingPointError(
            f"reward {name}: the score for prompt {prompts[bad]!r} is {scores[bad].item()} (the image is finite). No "
            "score is made up for it; check the reward's model and its precision (dtype)"
        )
    return scores.to(images.device)


def required(references: ReferenceSet | None, name: str) -> ReferenceSet:
    """`references`, or a UserError that says that this reward needs them."""
    if references is None:
        raise UserError(f"reward {name} compares with reference images, but the run has none; set data.references")
    return references
