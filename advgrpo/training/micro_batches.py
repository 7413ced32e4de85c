"""Which images an iteration has, and who computes which of them together (architecture.md, "Micro-batches").

Where groups branch apart (`rollout.window.branching`), S consecutive groups have one prompt, and each its own of the
window's S steps: group g has step g mod S.
"""

from __future__ import annotations

import torch

from advgrpo.config import RolloutSection
from advgrpo.data.prompts import GroupSampler
from advgrpo.types import MicroBatch


class MicroBatches:
    """Cuts every iteration's images into micro-batches; which ones exist does not depend on the processes.

    Args:
        prompts: those that are trained on.
        rollout: how many groups of how many images, and how many are computed at once.
        minibatches: optimizer steps of an iteration.
        seed: of the run; with the iteration it decides the prompts.
        rank, world_size: a process takes its share of every minibatch.
    """

    def __init__(
        self, prompts: list[str], rollout: RolloutSection, minibatches: int, *, seed: int, rank: int, world_size: int
    ):
        self.prompts, self.minibatches = prompts, minibatches
        self._branching, self._branches = rollout.window.branching, rollout.window.branches
        self._groups = GroupSampler(len(prompts), rollout.prompts_per_iteration // self._branches, seed)
        self._group_size, self._micro = rollout.group_size, rollout.micro_batch
        self._images, self.rank, self.world_size = rollout.images, rank, world_size

    @property
    def images_per_minibatch(self) -> int:
        """Over all processes."""
        return self._images // self.minibatches

    def prompts_of(self, iteration: int) -> list[str]:
        """One per group, of all processes."""
        return [self.prompts[number] for number in self._groups.next(iteration) for _ in range(self._branches)]

    def of(self, iteration: int, chosen: torch.Tensor | None = None) -> list[MicroBatch]:
        """This process's micro-batches, in order of minibatch.

        Args:
            chosen: int64 by image number, over all processes: which scout each image is.
        """
        prompt_of_group = self.prompts_of(iteration)
        per_minibatch = self._images // (self._micro * self.minibatches)
        share = per_minibatch // self.world_size
        mine = []
        for minibatch in range(self.minibatches):
            first = minibatch * per_minibatch + self.rank * share
            for number in range(first, first + share):
                ids = torch.arange(number * self._micro, (number + 1) * self._micro)
                group_ids = ids // self._group_size
                groups = group_ids.unique()
                prompts = [prompt_of_group[g] for g in groups.tolist()]
                row = torch.searchsorted(groups, group_ids)
                branch = int(groups[0]) % self._branches if self._branching else None  # one group, as checks.py wants
                draws = None if chosen is None else chosen[ids]
                mine.append(MicroBatch(ids, prompts, groups, row, minibatch, draws, branch))
        return mine
