"""A transformer shared out over the processes, block by block, by PyTorch's own `fully_shard` (FSDP2).

Every process holds 1/N of each parameter, cut along its first dimension. A block is gathered before it runs, in the
forward pass and again in the backward pass, while its neighbour still computes, and let go of after it. Adapters are
left out: they lie whole on every process, and their gradient is summed in one all-reduce as without sharding. Where
every weight is trained (weights_in_parts.py), a block's gradient is summed as soon as it is known, and each process
keeps its share of it.

A gather moves bits and computes nothing, so a sharded network gives the bits of a whole one, on any number of
processes. But each of its forwards is a collective: all processes must run the same ones in the same order.

The network is diffusers' own, or, where sequence groups share out tokens, our forward (fused/transformer.py): its
blocks are shared out over all processes of the job, whatever group they are in, since the least that each can hold is
1/N of the job, and all run the same forwards anyway. Whole, it has the modulation of all blocks in one matrix, which no
block owns; in parts each block's is gathered when a trajectory is prepared, not in every forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import torch
import torch.distributed as dist
from diffusers import ModelMixin
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather, DefaultReduceScatter

from advgrpo.policy.adapters import block_names
from advgrpo.policy.fused.transformer import Together
from advgrpo.runtime.distributed import Distributed


class BlockSharding:
    """Shards networks over all processes of a job; made by all of them at the same place.

    Args:
        distributed: the job, of more than one process.
    """

    def __init__(self, distributed: Distributed):
        self.distributed, self.device = distributed, distributed.device
        self._mesh = DeviceMesh.from_group(distributed.patient_group(), self.device.type)
        self._gather, self._sum = _Gather(distributed), _SumAndScatter(distributed)

    def shard(self, network: ModelMixin, prepare: Callable[[str], None] = lambda block: None) -> None:
        """Leave this process its share of the frozen parameters, and move it and the trainable ones to the device.

        The network may lie on the host: no more of it than its share and one block is on the device at a time.

        Args:
            prepare: is called with each block's name before it is shared out.
        """
        adapters = {parameter for parameter in network.parameters() if parameter.requires_grad}
        for parameter in adapters:
            parameter.data = parameter.data.to(self.device)
        self._share_out(network, adapters, prepare)

    def shard_trained(self, network: ModelMixin) -> None:
        """As `shard`, of a network whose parameters are all trained; their gradients are summed over processes."""
        for unit in self._share_out(network.requires_grad_(True), set()):
            unit.set_custom_reduce_scatter(self._sum)
            unit.set_gradient_divide_factor(1.0)  # a loss is divided by the images of all processes already
            unit.set_force_sum_reduction_for_comms(True)

    @contextmanager
    def gathered(self, unit: torch.nn.Module) -> Iterator[None]:
        """Within it this process has all of the parameters of a block, or of the network those outside of blocks; on
        all processes at the same place."""
        assert isinstance(unit, FSDPModule)
        unit.unshard()
        try:
            yield
        finally:
            unit.reshard()

    def _share_out(
        self,
        network: ModelMixin,
        whole: set[torch.nn.Parameter],
        prepare: Callable[[str], None] = lambda block: None,
    ) -> list[FSDPModule]:
        """The blocks, then the network, which has what is outside of them; but for the parameters that stay `whole`."""
        units = []
        for name in block_names(network):
            prepare(name)
            units.append(self._cut(network.get_submodule(name), whole))
        units.append(self._cut(network, whole))
        _prefetch_next(units[:-1])
        return units

    def share_out(self, unit: Together) -> None:
        """See `Sharding` (fused/transformer.py), as which our forward is given this."""
        self._cut(unit, set())

    def join(self, network: Together, *runs: Sequence[Together]) -> None:
        """See `share_out`."""
        self._cut(network, set(network.parameters()))
        for run in runs:
            units = [unit for unit in run if isinstance(unit, FSDPModule)]
            _prefetch_next(units)
            # Before its first block runs backward, FSDP2 would gather what ran before it: another forward's last one.
            for block, preceding in zip(units, [units[0], *units], strict=False):
                block.set_modules_to_backward_prefetch([preceding])

    def _cut(self, module: torch.nn.Module, whole: set[torch.nn.Parameter]) -> FSDPModule:
        unit = fully_shard(module, mesh=self._mesh, ignored_params=whole, reshard_after_forward=True)
        unit.set_custom_all_gather(self._gather)
        return unit


def _prefetch_next(units: Sequence[FSDPModule]) -> None:
    """A unit's gather is issued before the one ahead of it computes."""
    for block, following in pairwise(units):
        block.set_modules_to_forward_prefetch([following])


class _Gather(DefaultAllGather):
    """FSDP2's gather, whose failures become those of the job's other collectives."""

    def __init__(self, distributed: Distributed):
        super().__init__()
        self._distributed = distributed

    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: dist.ProcessGroup,
        async_op: bool = False,
    ) -> dist.Work | None:
        with self._distributed.collective("gathering a block"):
            return super().__call__(output_tensor, input_tensor, group, async_op)


class _SumAndScatter(DefaultReduceScatter):
    """FSDP2's sum of gradients, whose failures become those of the job's other collectives."""

    def __init__(self, distributed: Distributed):
        super().__init__()
        self._distributed = distributed

    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: dist.ProcessGroup,
        op: dist.ReduceOp.RedOpType,
        async_op: bool = False,
    ) -> dist.Work:
        with self._distributed.collective("summing a block's gradient"):
            return super().__call__(output_tensor, input_tensor, group, op, async_op)
