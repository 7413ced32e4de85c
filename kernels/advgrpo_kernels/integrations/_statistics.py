"""`PerPromptStatTracker.update` of the GRPO codebases on `group_advantages`."""

from __future__ import annotations

import torch

from ..ops.group_advantages import group_advantages
from . import _patching


def grpo_advantages(tracker, prompts, rewards):
    """Advantages as a float64 array of rewards' shape [B] or [B, T], and the tracker's books kept as it keeps them.

    The numbers are those of float32, and a group of equal rewards gives exactly 0 where the original divides its
    rounding error by 1e-4.
    """
    import numpy as np  # the trackers speak numpy; this package does not need it otherwise

    rewards = np.asarray(rewards, dtype=np.float64)
    names, groups = np.unique(np.array(prompts), return_inverse=True)
    if groups.shape != rewards.shape[:1] or rewards.ndim not in (1, 2):
        raise ValueError(f"rewards must be [{len(groups)}] or [{len(groups)}, T] like prompts, got {rewards.shape}")
    repeated = [name for name in names if name in tracker.stats]
    if repeated:  # the original fails here too, on an array without `extend`
        raise ValueError(f"{len(repeated)} prompts have rewards from an earlier update: call clear() between updates")
    for group, name in enumerate(names):
        tracker.stats[name] = rewards[groups == group]
        tracker.history_prompts.add(hash(name))
    std = "global" if tracker.global_std else "group"
    columns = torch.from_numpy(rewards.reshape(len(groups), -1)).unbind(1)
    ids = torch.from_numpy(groups.astype(np.int64))
    advantages = [group_advantages(column, ids, std=std, eps=1e-4, clip=None).advantages for column in columns]
    return torch.stack(advantages, dim=1).double().numpy().reshape(rewards.shape)


def run_original(tracker, *args, type):
    """The method this one took the place of, for the advantage types that are not GRPO's."""
    original = _patching.original_method(tracker.__class__, "update")
    if original is None:
        raise ValueError(f"type must be 'grpo' unless the tracker's class is patched, got {type!r}")
    return original(tracker, *args, type=type)
