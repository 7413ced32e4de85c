"""Frozen weights that lie in host memory and are on the device only while they are used: `model.offload`.

A copy moves bits and computes nothing, so results are those of weights that stay on the device, to the bit. On a GPU
the host's memory is pinned: copies are queued like kernels, and nobody waits for them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from advgrpo.runtime.transfer import pinned_for, to_device


class HostWeights:
    """A frozen module's parameters and buffers, moved to host memory.

    Args:
        module: on any device; without gradients. Who shares a tensor with it keeps that one.
        device: where it computes.
    """

    def __init__(self, module: nn.Module, device: torch.device):
        self.device, self._module = device, module
        kept: dict[int, Tensor] = {}  # by the tensor: what several modules share lies in the host's memory once
        self._own: dict[nn.Module, dict[str, Tensor]] = {}
        for owner in module.modules():
            for name, tensor in (*owner._parameters.items(), *owner._buffers.items()):  # a tensor by all of its names
                if tensor is None:
                    continue
                if id(tensor) not in kept:
                    kept[id(tensor)] = pinned_for(tensor.detach().cpu(), device)
                self._own.setdefault(owner, {})[name] = kept[id(tensor)]
        for owner in self._own:
            self._give_back(owner)

    @contextlib.contextmanager
    def lent(self) -> Iterator[None]:
        """All of it is on the device within; not to be nested."""
        try:
            for owner in self._own:
                self._bring(owner)
            yield
        finally:
            for owner in self._own:
                self._give_back(owner)

    @contextlib.contextmanager
    def lent_by_layer(self) -> Iterator[None]:
        """Within it a module has its own tensors on the device while its forward runs, and nothing else is there.

        For modules that touch no other module's tensors but by calling it, as text encoders do. Tensors that the whole
        is called with are brought along: diffusers sends some to the device on which it finds the weights.
        """
        hooks = [self._module.register_forward_pre_hook(self._bring_inputs, with_kwargs=True)]
        for owner in self._own:
            hooks.append(owner.register_forward_pre_hook(lambda module, _: self._bring(module)))
            hooks.append(owner.register_forward_hook(lambda module, *_: self._give_back(module), always_call=True))
        try:
            yield
        finally:  # hooks that know this object would keep the module, and all that is pinned, until a collection
            for hook in hooks:
                hook.remove()

    def _bring_inputs(
        self, _, args: tuple[Any, ...], options: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        def here(value: Any) -> Any:
            return to_device(value, self.device) if isinstance(value, Tensor) else value

        return tuple(map(here, args)), {name: here(value) for name, value in options.items()}

    def _bring(self, owner: nn.Module) -> None:
        for name, tensor in self._own[owner].items():
            _put(owner, name, tensor.to(self.device, non_blocking=True))

    def _give_back(self, owner: nn.Module) -> None:
        for name, tensor in self._own[owner].items():
            _put(owner, name, tensor)


def _put(owner: nn.Module, name: str, tensor: Tensor) -> None:
    """In the place of a parameter or buffer, whose own data may be of a device that takes no other's."""
    if name in owner._parameters:
        owner._parameters[name] = nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[name] = tensor
