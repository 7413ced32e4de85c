"""`PerPromptStatTracker.update` of the GRPO codebases on the sorted form of `group_advantages`."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..ops.group_advantages import advantages_of_columns
from . import _patching
from ._self_check import Case


def grpo_advantages(tracker, prompts, rewards):
    """Advantages as a float64 array of rewards' shape [B] or [B, T], and the tracker's books kept as it keeps them.

    All T columns are computed at once, in O(B·T) memory. A group of equal rewards gives exactly 0 where the original
    divides its rounding error by 1e-4.
    """
    import numpy as np  # the trackers speak numpy; this package does not need it otherwise

    rewards, prompts = np.asarray(rewards, dtype=np.float64), np.array(prompts)
    if prompts.shape != rewards.shape[:1] or rewards.ndim not in (1, 2):
        raise ValueError(
            f"rewards must be [{len(prompts)}] or [{len(prompts)}, T] like prompts, got {rewards.shape} "
            f"for prompts of {prompts.shape}"
        )
    number = {name: group for group, name in enumerate(sorted(set(prompts.tolist())))}
    repeated = [name for name in number if name in tracker.stats]
    if repeated:  # the original fails here too, on an array without `extend`
        raise ValueError(f"{len(repeated)} prompts have rewards from an earlier update: call clear() between updates")
    groups = np.fromiter((number[name] for name in prompts.tolist()), dtype=np.int64, count=len(prompts))
    by_group = np.argsort(groups, kind="stable")
    sizes = np.bincount(groups, minlength=len(number))
    for name, of_group in zip(number, np.split(rewards[by_group], np.cumsum(sizes)[:-1])):
        tracker.stats[name] = of_group
        tracker.history_prompts.add(hash(name))
    std = "global" if tracker.global_std else "group"
    columns = torch.from_numpy(rewards.reshape(len(prompts), -1)).T
    result = advantages_of_columns(columns, torch.from_numpy(groups), std=std, eps=1e-4, clip=None)
    return result.advantages.T.contiguous().numpy().reshape(rewards.shape)


def run_original(tracker, *args, type):
    """The method this one took the place of, for the advantage types that are not GRPO's."""
    original = _patching.original_method(tracker.__class__, "update")
    if original is None:
        raise ValueError(f"type must be 'grpo' unless the tracker's class is patched, got {type!r}")
    return original(tracker, *args, type=type)


def update(self, prompts, rewards, type="grpo"):
    """`PerPromptStatTracker.update`: float64 advantages of rewards' shape; other types than "grpo" run the original."""
    if type != "grpo":
        return run_original(self, prompts, rewards, type=type)
    return grpo_advantages(self, prompts, rewards)


def update_with_dists(self, prompts, rewards, dists=None, type="grpo"):
    """`update` of the later versions of Flow-GRPO, whose "gardo" takes features of the images."""
    if type != "grpo":
        return run_original(self, prompts, rewards, dists, type=type)
    return grpo_advantages(self, prompts, rewards)


def cases(original, cls) -> Iterator[Case]:
    """Group and global deviation, rewards per image and per timestep, groups of one and of equal rewards."""
    import numpy as np

    prompts = [f"prompt {i}" for i in (0, 1, 0, 2, 1, 0, 3, 0)]
    rewards = np.random.default_rng(0).normal(size=(2, 8, 3))
    rewards[:, [1, 4]] = 0.7

    def run(function, global_std, columns):
        tracker, results = cls(global_std), {}
        for epoch in range(2):
            values = rewards[epoch] if columns else rewards[epoch, :, 0]
            results[f"advantages of update {epoch}"] = torch.from_numpy(function(tracker, prompts, values))
            books = [torch.from_numpy(np.asarray(tracker.stats[name])).reshape(-1) for name in sorted(set(prompts))]
            results[f"rewards kept by update {epoch}"] = torch.cat(books)
            results[f"statistics of update {epoch}"] = torch.tensor(tracker.get_stats(), dtype=torch.float64)
            tracker.clear()
        return results

    for global_std in (False, True):
        for columns in (False, True):
            name = f"global_std={global_std}, rewards [{'B, T' if columns else 'B'}]"
            yield Case(name, lambda function, setting=(global_std, columns): run(function, *setting))


def tracker(*modules: str) -> _patching.Target:
    """`PerPromptStatTracker.update` as these modules define it."""
    return _patching.Target("PerPromptStatTracker.update", modules, (update_with_dists, update), cases)
