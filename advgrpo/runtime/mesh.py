"""The processes of a job as a mesh of two dimensions, "data" and "sequence".

Those of one place along "data", a sequence group, compute the same rows together, each a share of their tokens
(policy/fused/sequence.py); the sequence groups share an iteration's micro-batches. The processes of one are next to
each other in rank, so that it lies within a machine wherever its size divides the machine's GPUs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.distributed.device_mesh import DeviceMesh

from advgrpo.runtime.distributed import Distributed


@dataclass(frozen=True)
class Mesh:
    """A process's place in it.

    Args:
        rank, world_size: in the job.
        sequence_size: processes of a sequence group; divides world_size.

    Raises:
        ValueError: it does not.
    """

    rank: int = 0
    world_size: int = 1
    sequence_size: int = 1

    def __post_init__(self) -> None:
        if self.world_size % self.sequence_size:
            raise ValueError(f"{self.world_size} processes are no sequence groups of {self.sequence_size}")

    @classmethod
    def of(cls, distributed: Distributed, sequence_size: int) -> Mesh:
        """Of this process in a job."""
        return cls(distributed.rank, distributed.world_size, sequence_size)

    @property
    def data_size(self) -> int:
        """How many sequence groups there are."""
        return self.world_size // self.sequence_size

    @property
    def data_rank(self) -> int:
        """The number of this process's sequence group."""
        return self.rank // self.sequence_size

    @property
    def sequence_rank(self) -> int:
        """The number of this process in its sequence group."""
        return self.rank % self.sequence_size

    def is_judge(self, number: int) -> bool:
        """Whether this process decodes and judges what its sequence group has drawn as number `number`: they take
        turns."""
        return number % self.sequence_size == self.sequence_rank

    def one_of_each(self, gathered: torch.Tensor) -> torch.Tensor:
        """[data_size, ...] of [world_size, ...]: what all of a sequence group know alike, once."""
        return gathered[:: self.sequence_size]

    def sequence(self, distributed: Distributed) -> DeviceMesh:
        """PyTorch's mesh of this process's sequence group; a collective of all processes, of more than one.

        What goes along "data" is of all processes, so that no group of its own is needed. Collectives of the mesh wait
        for `SLOW_SECONDS`, since one process may judge images while the others draw.
        """
        ranks = torch.arange(self.world_size).view(self.data_size, self.sequence_size)
        group = distributed.patient_group(ranks.tolist())
        return DeviceMesh.from_group(group, distributed.device.type, mesh_dim_names=("sequence",))
