"""Group-relative advantages: A_i = (R_i - mean of its group) / (std + eps), clipped (eq. 1 of arXiv 2511.20256).

The standard deviation is the population's, over the group (`group`), over all rewards of the call (`global`, the
default of the authors' code) or left out (`none`). Groups are keyed by integer ids of any value, in any order.

Shapes:   rewards [B] float, group_ids [B] int64 -> all per-row results [B] float32.
Numerics: float64 inside. The mean enters as `R_i - mean = Σ_j (R_i - R_j)/n`, so a group of equal rewards gives
          exactly A = 0 and std = 0 rather than a rounding error divided by eps.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .._runtime import pick_backend

__all__ = ["Advantages", "group_advantages", "group_advantages_ref"]

STDS = ("group", "global", "none")


class Advantages(NamedTuple):
    """Result of `group_advantages`; row i of the group statistics belongs to the group of reward i."""

    advantages: torch.Tensor  # [B] float32
    group_mean: torch.Tensor  # [B] float32
    group_std: torch.Tensor  # [B] float32, of the group whatever `std` was used
    zero_std_fraction: torch.Tensor  # scalar float32, share of the groups whose rewards are all equal


def group_advantages(
    rewards: torch.Tensor,
    group_ids: torch.Tensor,
    *,
    std: str = "group",
    eps: float = 1e-4,
    clip: float | None = 5.0,
    backend: str = "auto",
) -> Advantages:
    """Advantages of `rewards` within the groups of `group_ids`, without a host round trip.

    Args:
        rewards: [B] floating point, finite.
        group_ids: [B] int64; rows with the same id form a group.
        std: "group", "global" or "none"; see the module docstring.
        eps: added to the standard deviation.
        clip: advantages are clipped to ±clip; None leaves them.

    Raises:
        ValueError: names the argument that does not fit.
    """
    if rewards.dim() != 1 or rewards.numel() == 0 or not rewards.is_floating_point():
        raise ValueError(f"rewards must be a non-empty floating point [B], got {rewards.dtype} {tuple(rewards.shape)}")
    if group_ids.shape != rewards.shape or group_ids.dtype != torch.int64:
        raise ValueError(f"group_ids must be int64 [{rewards.numel()}], got {group_ids.dtype} {tuple(group_ids.shape)}")
    if std not in STDS:
        raise ValueError(f"std must be one of {STDS}, got {std!r}")
    if eps < 0 or (clip is not None and not clip > 0):
        raise ValueError(f"eps must be >= 0 and clip > 0 or None, got eps={eps}, clip={clip}")
    if pick_backend(backend, rewards, group_ids) == "triton":
        raise NotImplementedError("group_advantages has no Triton kernel yet: use backend='torch' or 'auto'")
    return group_advantages_ref(rewards, group_ids, std=std, eps=eps, clip=clip)


def group_advantages_ref(
    rewards: torch.Tensor,
    group_ids: torch.Tensor,
    *,
    std: str = "group",
    eps: float = 1e-4,
    clip: float | None = 5.0,
) -> Advantages:
    """Plain PyTorch by a [B, B] comparison: no sort and no `unique`, which would synchronise; fine to B ~ 10,000."""
    reward = rewards.detach().double()
    same = group_ids[:, None] == group_ids[None, :]
    size = same.sum(1)
    centred = torch.where(same, reward[:, None] - reward[None, :], 0.0).sum(1) / size
    mean = reward - centred
    group_std = torch.where(same, reward[None, :] - mean[:, None], 0.0).square().sum(1).div(size).sqrt()
    if std == "none":
        advantages = centred
    else:
        scale = group_std if std == "group" else (reward - reward.mean()).square().mean().sqrt()
        advantages = centred / (scale + eps)
    if clip is not None:
        advantages = advantages.clamp(-clip, clip)
    advantages = torch.where(centred == 0, 0.0, advantages)  # eps = 0 and std = 0 would be 0/0
    weight = 1.0 / size  # each group counts once in the share of groups
    zero_std_fraction = torch.where(group_std == 0, weight, 0.0).sum() / weight.sum()
    return Advantages(advantages.float(), mean.float(), group_std.float(), zero_std_fraction.float())
