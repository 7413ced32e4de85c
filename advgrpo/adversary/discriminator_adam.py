"""Adam for the trained part of an adversary: ready for CUDA graphs where there is a GPU."""

from __future__ import annotations

from typing import Any

import torch

_OF_THIS_MACHINE = ("fused", "capturable", "foreach")


class DiscriminatorAdam(torch.optim.Adam):
    """torch.optim.Adam, on a GPU as one kernel with its step count in device memory, so that a graph can hold it.

    Checkpoints may move between machines: how the step is computed stays this machine's, whatever the state dict says.

    Args:
        parameters: float32, on one device.
        lr, betas: Adam's.
    """

    def __init__(self, parameters: list[torch.nn.Parameter], *, lr: float, betas: tuple[float, float]):
        flags = {"fused": True, "capturable": True} if parameters[0].is_cuda else {}
        super().__init__(parameters, lr=lr, betas=betas, **flags)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raises ValueError when the groups do not fit, as torch's does."""
        own = {name: self.defaults[name] for name in _OF_THIS_MACHINE}
        groups = [{**group, **own} for group in state_dict["param_groups"]]
        super().load_state_dict({**state_dict, "param_groups": groups})


def forget_moments(optimizer: torch.optim.Optimizer) -> None:
    """Moments and step counts of an Adam become 0, in the storage that is there: a captured graph goes on using it."""
    for state in optimizer.state.values():
        for value in state.values():
            value.zero_()
