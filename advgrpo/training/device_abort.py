"""How an iteration's update is called off without the host: what is wrong is known on the device, and acted on there.

The rule, in its three parts:

1. `DeviceAbort` holds a scalar on the device, 0 or NaN, and adds it to the first gradient before gradients are summed
   over processes: NaN on one process is NaN on all. Where gradients lie in parts, it is part of their norm instead.
2. The optimizer (optimizer.py; on a GPU the kernel `multi_tensor_adamw`) takes no step whose gradient norm is not
   finite: weights, moments and averages keep their bits.
3. The norm comes back to the scalar, so that the later steps of the iteration are refused as the first one was. The log
   reads the norms once, and `Updater.check` raises.

Nothing branches, so it costs no wait and can be part of a captured graph. The discriminator has another rule
(adversary/trainer.py): its optimizers are torch's, which refuse nothing, so there the gradients of a bad update become
zero.
"""

from __future__ import annotations

import math

import torch


class DeviceAbort:
    """Whether the iteration's remaining optimizer steps are refused; see the module's docstring."""

    def __init__(self, device: torch.device):
        self._called_off = torch.zeros((), device=device)  # 0, or NaN

    def begin(self, wrong: torch.Tensor) -> None:
        """An iteration's first step: called off where `wrong`, a bool scalar on the device, is true, and only there."""
        self._called_off.copy_(torch.where(wrong, math.nan, 0.0))

    @property
    def value(self) -> torch.Tensor:
        """0, or NaN where the iteration is called off: beside gradients that are summed already it spoils the norm."""
        return self._called_off

    def spoil(self, gradients: list[torch.Tensor]) -> None:
        """Before they are summed over processes: not finite any more, in place, where the iteration is called off."""
        gradients[0].add_(self._called_off)

    def watch(self, norm: torch.Tensor) -> None:
        """Call off the later steps of the iteration unless `norm`, the scalar of the step just taken, is finite."""
        self._called_off.add_(norm * 0.0)
