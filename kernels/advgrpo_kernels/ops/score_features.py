"""The adversarial reward: a two-layer head on frozen backbone features (arXiv 2511.20256, eqs. 9-11).

    h(f) = w2·gelu(w1·f + b1) + b2         gelu by erf
    global = h(f_cls),  local = mean over the chosen patches of h(f_j),  reward = λ_g·global + λ_l·local

The same function scores images for the reward and trains the head, with the same optional L2 normalisation of the
features, so the two cannot drift apart.

Shapes:   B images, P patches, D feature width, H hidden width. cls [B, D], patches [B, P, D], indices [B, n] int64,
          head w1 [H, D], b1 [H], w2 [1, H], b2 [1] float32 -> reward, global_score, local_score [B] float32.
Numerics: float32 inside; features are constants, gradients go to the head only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

from .._runtime import pick_backend
from .patches import check_indices, l2_normalize

__all__ = ["FeatureScore", "score_features", "score_features_ref"]


class FeatureScore(NamedTuple):
    """Result of `score_features`."""

    reward: torch.Tensor  # [B] float32
    global_score: torch.Tensor  # [B] float32, of the cls feature
    local_score: torch.Tensor  # [B] float32, mean over the chosen patches


def score_features(
    cls: torch.Tensor,
    patches: torch.Tensor,
    indices: torch.Tensor | None,
    head: Mapping[str, torch.Tensor],
    *,
    weights: tuple[float, float] = (0.7, 0.3),
    normalize: bool = False,
    backend: str = "auto",
) -> FeatureScore:
    """Score images by their features; differentiable in the head.

    Args:
        cls: [B, D] any float dtype.
        patches: [B, P, D] any float dtype.
        indices: [B, n] int64 in [0, P), the patches that count (see `sample_patches`); None takes all P.
        head: mapping with w1 [H, D], b1 [H], w2 [1, H], b2 [1].
        weights: (λ_g, λ_l) of global and local score in the reward.
        normalize: L2-normalise cls and patch features first.

    Raises:
        ValueError: names the argument that does not fit.
    """
    _check(cls, patches, indices, head)
    if pick_backend(backend, cls, patches) == "triton":
        raise NotImplementedError("score_features has no Triton kernel yet: use backend='torch' or 'auto'")
    return score_features_ref(cls, patches, indices, head, weights=weights, normalize=normalize)


def score_features_ref(
    cls: torch.Tensor,
    patches: torch.Tensor,
    indices: torch.Tensor | None,
    head: Mapping[str, torch.Tensor],
    *,
    weights: tuple[float, float] = (0.7, 0.3),
    normalize: bool = False,
    compute_dtype: torch.dtype = torch.float32,
) -> FeatureScore:
    """Plain PyTorch, differentiable in the head by autograd; results in `compute_dtype`."""
    chosen = patches.detach()
    if indices is not None:
        chosen = chosen.gather(1, indices[:, :, None].expand(-1, -1, patches.shape[2]))
    features = torch.cat([cls.detach()[:, None].to(compute_dtype), chosen.to(compute_dtype)], dim=1)
    scores = _head_scores(l2_normalize(features) if normalize else features, head)
    global_score, local_score = scores[:, 0], scores[:, 1:].mean(1)
    return FeatureScore(weights[0] * global_score + weights[1] * local_score, global_score, local_score)


def _head_scores(features: torch.Tensor, head: Mapping[str, torch.Tensor]) -> torch.Tensor:
    w1, b1, w2, b2 = (head[name].to(features.dtype) for name in ("w1", "b1", "w2", "b2"))
    hidden = torch.nn.functional.gelu(torch.nn.functional.linear(features, w1, b1))
    return torch.nn.functional.linear(hidden, w2, b2).squeeze(-1)


def _check(
    cls: torch.Tensor, patches: torch.Tensor, indices: torch.Tensor | None, head: Mapping[str, torch.Tensor]
) -> None:
    if patches.dim() != 3 or patches.numel() == 0 or not patches.is_floating_point():
        raise ValueError(
            f"patches must be non-empty floating point [B, P, D], got {patches.dtype} {tuple(patches.shape)}"
        )
    B, P, D = patches.shape
    if cls.shape != (B, D) or not cls.is_floating_point():
        raise ValueError(f"cls must be floating point [{B}, {D}], got {cls.dtype} {tuple(cls.shape)}")
    if indices is not None:
        check_indices(indices, B, indices.shape[-1] if indices.dim() else 0, P)
    missing = [name for name in ("w1", "b1", "w2", "b2") if name not in head]
    if missing:
        raise ValueError(f"head must have the keys w1, b1, w2, b2; missing {missing}")
    H = head["w1"].shape[0]
    expected = {"w1": (H, D), "b1": (H,), "w2": (1, H), "b2": (1,)}
    for name, shape in expected.items():
        if head[name].shape != shape or not head[name].is_floating_point():
            raise ValueError(f"head[{name!r}] must be float {shape}, got {head[name].dtype} {tuple(head[name].shape)}")
