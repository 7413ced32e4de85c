"""Hinge loss of the adversarial head on frozen features (arXiv 2511.20256, eqs. 12-14).

    L = λ_g·½[mean relu(1 - h(ref_cls)) + mean relu(1 + h(gen_cls))]
      + λ_l·½[mean relu(1 - h(ref_j))   + mean relu(1 + h(gen_j))]       j over the chosen patches, each with its own hinge

References are positives, generations negatives; h is the head of `score_features`, with the same normalisation.

Shapes:   B pictures on each side, n chosen patches, D feature width. cls [B, D], patches [B, n, D].
Numerics: float32 inside; features are constants, gradients go to the head only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

from .patches import l2_normalize
from .score_features import _head_scores

__all__ = ["HingeHeadLoss", "hinge_head_loss"]


class HingeHeadLoss(NamedTuple):
    """Result of `hinge_head_loss`."""

    loss: torch.Tensor  # scalar float32, differentiable in the head
    accuracy: torch.Tensor  # scalar float32, share of cls scores on the right side of 0 (times B / total), detached


def hinge_head_loss(
    reference_cls: torch.Tensor,
    reference_patches: torch.Tensor,
    generated_cls: torch.Tensor,
    generated_patches: torch.Tensor,
    head: Mapping[str, torch.Tensor],
    *,
    weights: tuple[float, float] = (0.7, 0.3),
    normalize: bool = False,
    total: int | None = None,
) -> HingeHeadLoss:
    """Head loss on chosen patches; see the module docstring.

    Args:
        reference_cls, generated_cls: [B, D] any float dtype.
        reference_patches, generated_patches: [B, n, D], already gathered (`sample_patches`).
        head: mapping with w1 [H, D], b1 [H], w2 [1, H], b2 [1].
        weights: (λ_g, λ_l).
        total: pictures per side over all processes; means divide by it, so that gradients summed over processes are
            those of the whole batch. Default B.

    Raises:
        ValueError: names the argument that does not fit.
    """
    for name, cls, patches in (
        ("reference", reference_cls, reference_patches),
        ("generated", generated_cls, generated_patches),
    ):
        if cls.dim() != 2 or patches.dim() != 3 or (patches.shape[0], patches.shape[2]) != cls.shape:
            raise ValueError(
                f"want {name}_cls [B, D] and {name}_patches [B, n, D], got {tuple(cls.shape)} and {tuple(patches.shape)}"
            )
    if reference_patches.shape[1] != generated_patches.shape[1]:
        raise ValueError(f"patches per picture differ: {reference_patches.shape[1]} and {generated_patches.shape[1]}")
    sides = ((1.0, reference_cls, reference_patches), (-1.0, generated_cls, generated_patches))
    losses, right = [], []
    for sign, cls, patches in sides:
        features = torch.cat([cls[:, None].float(), patches.float()], dim=1).detach()
        scores = _head_scores(l2_normalize(features) if normalize else features, head)
        hinge = torch.relu(1 - sign * scores)
        count = 2 * (len(cls) if total is None else total)
        losses.append((weights[0] * hinge[:, 0].sum() + weights[1] * hinge[:, 1:].mean(1).sum()) / count)
        right.append((sign * scores[:, 0].detach() > 0).float().sum() / count)
    return HingeHeadLoss(losses[0] + losses[1], right[0] + right[1])
