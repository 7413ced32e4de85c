"""The processes of a job as a mesh: groups, which share an iteration's micro-batches, and the members of each.

The members of a group compute the same rows together, each a share of their tokens (policy/fused/sequence.py). They are
next to each other in rank, so that a group lies within a machine wherever its size divides the machine's GPUs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.distributed.device_mesh import DeviceMesh

from advgrpo.runtime.distributed import Distributed

SEQUENCE = "sequence"  # the mesh's dimension along a group's members


@dataclass(frozen=True)
class Mesh:
    """A process's place in it.

    Args:
        rank, processes: in the job.
        members: of a group; divides the processes.

    Raises:
        ValueError: it does not.
    """

    rank: int = 0
    processes: int = 1
    members: int = 1

    def __post_init__(self) -> None:
        if self.processes % self.members:
            raise ValueError(f"{self.processes} processes are no groups of {self.members}")

    @classmethod
    def of(cls, distributed: Distributed, members: int) -> Mesh:
        """Of this process in a job."""
        return cls(distributed.rank, distributed.world_size, members)

    @property
    def groups(self) -> int:
        return self.processes // self.members

    @property
    def group(self) -> int:
        """The number of this process's group."""
        return self.rank // self.members

    @property
    def member(self) -> int:
        """The number of this process in its group."""
        return self.rank % self.members

    def is_judge(self, number: int) -> bool:
        """Whether this process is the one of its group that decodes and judges what the group has drawn as number
        `number`: members take turns."""
        return number % self.members == self.member

    def one_of_each_group(self, gathered: torch.Tensor) -> torch.Tensor:
        """[groups, ...] of [processes, ...]: what the members of a group know alike, once."""
        return gathered[:: self.members]

    def on(self, distributed: Distributed) -> DeviceMesh:
        """The mesh "data" x "sequence" with its process groups; a collective of all processes, of more than one.

        Its collectives wait for `SLOW_SECONDS`, since a member may judge images while the others draw.
        """
        ranks = torch.arange(self.processes).view(self.groups, self.members)
        groups = [distributed.patient_group(each.tolist()) for each in (ranks.T, ranks)]
        names = ("data", SEQUENCE)
        return DeviceMesh.from_group(groups, distributed.device.type, mesh=ranks, mesh_dim_names=names)
