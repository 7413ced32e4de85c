"""Similarity of an image to the reference images of its own prompt (docs/method.md 6.4's second term).

Shapes: B images, R references of a prompt, embeddings of width D.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F

from advgrpo.data.per_reference import PerReference
from advgrpo.runtime.cache import LastUsed

Reduction = Literal["mean", "max"]
_PROMPTS_IN_MEMORY = 8192


def check_reduction(reduction: str) -> Reduction:
    if reduction not in ("mean", "max"):
        raise ValueError(f'reduction {reduction!r}: want "mean" or "max"')
    return reduction


def reference_cosine(
    embeddings: torch.Tensor, prompts: list[str], own: Callable[[str], torch.Tensor], reduction: Reduction = "mean"
) -> torch.Tensor:
    """[B] mean or max cosine of each image to its prompt's references.

    Args:
        embeddings: [B, D], any length.
        prompts: the B prompts of the images.
        own: prompt -> embeddings [R, D] of its references, any length; called once per different prompt.
        reduction: "mean" is what the paper reports as DINO similarity, "max" the released code's OCR partner.
    """
    unit = F.normalize(embeddings, dim=-1)
    references = {prompt: F.normalize(own(prompt), dim=-1) for prompt in dict.fromkeys(prompts)}
    if reduction == "mean":  # of cosines: the cosine's numerator with the mean of the unit vectors
        centres = {prompt: reference.mean(0) for prompt, reference in references.items()}
        return (unit * torch.stack([centres[prompt] for prompt in prompts])).sum(1)
    return torch.stack([(references[prompt] @ row).amax() for prompt, row in zip(prompts, unit)])


def reference_embeddings(embed: Callable[[torch.Tensor], torch.Tensor]) -> PerReference[torch.Tensor]:
    """Embeddings [R, D] of a prompt's references, in memory.

    Args:
        embed: images [n, 3, H, W] float32 in [0, 1] on the CPU -> [n, D].
    """
    return PerReference(
        lambda batches, prompt: torch.cat([embed(images) for images in batches]), LastUsed(_PROMPTS_IN_MEMORY)
    )
