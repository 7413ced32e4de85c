"""The frozen base shared out over the processes, block by block, by PyTorch's own `fully_shard` (FSDP2).

Every process holds 1/N of each frozen parameter, cut along its first dimension. A block is gathered before it runs, in
the forward pass and again in the backward pass, while its neighbour still computes, and let go of after it. Adapters
are left out: they lie whole on every process, and their gradient is summed in one all-reduce as without sharding.

A gather moves bits and computes nothing, so a sharded network gives the bits of a whole one, on any number of
processes. But each of its forwards is a collective: all processes must run the same ones in the same order.

The network is diffusers' own. Our forward (fused/transformer.py) stacks q, k and v of a stream, and the modulation of
all blocks, into matrices that no block owns: to gather these by block would be another forward, with other bits.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.distributed as dist
from diffusers import ModelMixin
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather

from advgrpo.policy.adapters import block_names
from advgrpo.runtime.distributed import Distributed


class BlockSharding:
    """Shards networks over all processes of a job; made by all of them at the same place.

    Args:
        distributed: the job, of more than one process.
    """

    def __init__(self, distributed: Distributed):
        self.device = distributed.device
        self._mesh = DeviceMesh.from_group(distributed.patient_group(), self.device.type)
        self._gather = _Gather(distributed)

    def shard(self, network: ModelMixin) -> None:
        """Leave this process its share of the frozen parameters, and move it and the trainable ones to the device.

        The network may lie on the host: no more of it than its share and one block is on the device at a time.
        """
        adapters = {parameter for parameter in network.parameters() if parameter.requires_grad}
        for parameter in adapters:
            parameter.data = parameter.data.to(self.device)
        blocks = [network.get_submodule(name) for name in block_names(network)]
        units = [
            fully_shard(module, mesh=self._mesh, ignored_params=adapters, reshard_after_forward=True)
            for module in (*blocks, network)  # the last one has what is outside of blocks
        ]
        for unit in units:
            unit.set_custom_all_gather(self._gather)
        for block, following in pairwise(units[:-1]):
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
        with self._distributed.collective("gathering a block of the base"):
            return super().__call__(output_tensor, input_tensor, group, async_op)
