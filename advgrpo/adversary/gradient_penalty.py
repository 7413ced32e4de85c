"""R1: the head's slope at the references is held small (arXiv 1801.04406, eq. 9), on features instead of pixels.

    R1 = γ/2 · (λ_g·mean |∇h(x_cls)|² + λ_l·mean |∇h(x_j)|²)          means over references, and over chosen patches j
    ∇h(x) = w1ᵀ (w2 ⊙ gelu'(w1 x + b1))     gelu'(z) = Φ(z) + z φ(z)

x is what enters the head's first layer: the feature, or the L2-normalised one where the loss takes that. The gradient
by x is written out, so its derivative by the weights is an ordinary backward pass.

Shapes: B references with n chosen patches each, D feature width; head as in `score_features`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F

from advgrpo.types import Features


def r1_penalty(
    reference: Features,
    head: Mapping[str, torch.Tensor],
    *,
    gamma: float,
    weights: tuple[float, float],
    normalize: bool,
    total: int | None = None,
    image_weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """The penalty, a scalar of the features' dtype, differentiable in the head.

    Args:
        reference: "cls" [B, D] and "patches" [B, n, D], constants; B may be 0.
        gamma: strength γ.
        weights: (λ_g, λ_l), those of the hinge loss.
        normalize: whether the head gets L2-normalised features.
        total: references over all processes; means divide by it, so that penalties summed over processes are that of
            the whole batch. Default B.
        image_weights: [B] what a reference counts in the sums; None: 1.
    """
    cls, patches = (tensor.detach() for tensor in (reference["cls"], reference["patches"]))
    if normalize:
        cls, patches = (F.normalize(tensor, dim=-1, eps=1e-12) for tensor in (cls, patches))
    slopes = [squared_slope(cls, head), squared_slope(patches, head).mean(1)]
    of_cls, of_patches = ((each if image_weights is None else each * image_weights).sum() for each in slopes)
    count = max(1, len(cls)) if total is None else total
    return gamma / 2 * (weights[0] * of_cls + weights[1] * of_patches) / count


def squared_slope(x: torch.Tensor, head: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """|∇h(x)|² of x [..., D], by x: [...]."""
    z = F.linear(x, head["w1"], head["b1"])
    by_z = head["w2"][0] * (torch.special.ndtr(z) + z * torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi))
    return (by_z @ head["w1"]).square().sum(-1)
