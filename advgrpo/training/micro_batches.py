"""Which images an iteration has, and who computes which of them together (architecture.md, "Micro-batches").

Any number of processes shares them (runtime/shares.py). A process may have more than another, or none; it takes part in
whatever all do together all the same. Where processes compute images together (runtime/mesh.py), it is their sequence
groups that share the micro-batches, and the processes of one take turns in judging them.

Where groups branch apart (`rollout.window.branching`), S consecutive groups have one prompt, and each its own of the
window's S steps: group g has step g mod S.
"""

from __future__ import annotations

import torch

from advgrpo.config import RolloutSection
from advgrpo.data.prompts import GroupSampler
from advgrpo.runtime.mesh import Mesh
from advgrpo.runtime.shares import share
from advgrpo.types import MicroBatch


class MicroBatches:
    """Cuts every iteration's images into micro-batches; which ones exist does not depend on the processes.

    Args:
        prompts: those that are trained on.
        rollout: how many groups of how many images, and how many are computed at once.
        minibatches: optimizer steps of an iteration.
        seed: of the run; with the iteration it decides the prompts.
        mesh: this process's place; its sequence group takes its share of every minibatch.
        together: images that stay on one process, a multiple of a micro-batch's; 0: those of a micro-batch.
    """

    def __init__(
        self,
        prompts: list[str],
        rollout: RolloutSection,
        minibatches: int,
        *,
        seed: int,
        mesh: Mesh,
        together: int = 0,
    ):
        self.prompts, self.minibatches = prompts, minibatches
        self._branching, self._branches = rollout.window.branching, rollout.window.branches
        self._groups = GroupSampler(len(prompts), rollout.prompts_per_iteration // self._branches, seed)
        self._group_size, self._micro = rollout.group_size, rollout.micro_batch
        self._together = max(together, rollout.micro_batch)
        self._images, self.mesh = rollout.images, mesh

    @property
    def images_per_minibatch(self) -> int:
        """Over all processes."""
        return self._images // self.minibatches

    def prompts_of(self, iteration: int) -> list[str]:
        """One per group, of all processes."""
        return [self.prompts[number] for number in self._groups.next(iteration) for _ in range(self._branches)]

    def of(self, iteration: int, chosen: torch.Tensor | None = None) -> list[MicroBatch]:
        """The micro-batches of this process's sequence group, in order of minibatch and of image numbers.

        Args:
            chosen: int64 by image number, over all processes: which scout each image is.
        """
        prompt_of_group = self.prompts_of(iteration)
        mine = []
        for minibatch in range(self.minibatches):
            for first in self._own_images(minibatch)[:: self._micro]:
                ids = torch.arange(first, first + self._micro)
                group_ids = ids // self._group_size
                groups = group_ids.unique()
                prompts = [prompt_of_group[g] for g in groups.tolist()]
                row = torch.searchsorted(groups, group_ids)
                branch = int(groups[0]) % self._branches if self._branching else None  # one group, as checks.py wants
                draws = None if chosen is None else chosen[ids]
                judged = self.mesh.is_judge(len(mine))
                mine.append(MicroBatch(ids, prompts, groups, row, minibatch, draws, branch, judged))
        return mine

    def _own_images(self, minibatch: int) -> range:
        """The sequence group's images of a minibatch, next to each other; it may have none."""
        pieces = self.images_per_minibatch // self._together
        own = share(pieces, minibatch, rank=self.mesh.data_rank, world_size=self.mesh.data_size)
        first = minibatch * self.images_per_minibatch
        return range(first + own.start * self._together, first + own.stop * self._together)
