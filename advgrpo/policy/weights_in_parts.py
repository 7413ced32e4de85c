"""Every weight of a transformer trained, in parts on all processes: what `FullWeights` (adapters.py) is on one.

What is trained are this process's shares, plain tensors over FSDP2's own storage, and so are the gradients that it
sums into them, the optimizer's moments, the averages and the frozen base. An optimizer or an average need not know: the
same arithmetic is done to every element, on whichever process it lies. Only norms, exports and checkpoints are of all
shares (parts.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from diffusers import ModelMixin
from torch.distributed.tensor import DTensor, Shard

from advgrpo.policy.adapters import save_network
from advgrpo.policy.parts import Parts
from advgrpo.policy.sharding import BlockSharding


class WeightsInParts:
    """Every weight in float32, 1/N of each on a process; a share of the base is kept beside it.

    Args:
        network: whole, and perhaps on the host; its parameters become shares on the device.
    """

    def __init__(self, network: ModelMixin, sharding: BlockSharding):
        self._kind = type(network)  # before `fully_shard` makes another class of it
        sharding.shard_trained(network)
        self.network, shares = network, dict(network.named_parameters())
        self._trained = {name: _trained(share) for name, share in shares.items()}
        shapes = {name: share.shape for name, share in shares.items()}
        self.parts = Parts(sharding.distributed, self._trained, shapes)
        self._base = {name: share.detach().clone() for name, share in self._trained.items()}

    def parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """This process's rows of every parameter, which may be none, with their gradient."""
        return iter(self._trained.items())

    def disabled(self) -> contextlib.AbstractContextManager[None]:
        return self.parts.lent(self._base)

    def export(self, folder: Path, notes: Mapping[str, str] | None = None) -> None:
        """As `FullWeights.export`, by process 0; a collective, in which the others give it their rows."""
        state, main = {}, self.parts.distributed.is_main
        for name, parameter in self._trained.items():
            whole = self.parts.gathered(name, parameter)
            if main:
                state[name] = whole.cpu()
        if not main:
            return
        with torch.device("meta"):
            network = self._kind.from_config(self.network.config)
        state |= {name: buffer.cpu() for name, buffer in self.network.state_dict().items() if name not in state}
        network.load_state_dict(state, assign=True)
        save_network(network, folder)


def _trained(share: torch.nn.Parameter) -> torch.nn.Parameter:
    """A parameter over the rows of an FSDP2 share, whose gradient is the one that FSDP2 adds to."""
    assert isinstance(share, DTensor)
    trained = torch.nn.Parameter(share.to_local().detach())
    trained.grad = torch.zeros_like(trained)
    shape, stride = share.shape, share.stride()
    share.grad = DTensor.from_local(
        trained.grad, share.device_mesh, [Shard(0)], run_check=False, shape=shape, stride=stride
    )
    return trained
