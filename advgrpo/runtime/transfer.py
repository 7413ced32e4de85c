"""Between host and device without waiting: a copy from or to ordinary memory waits until the GPU has done all that is
queued."""

from __future__ import annotations

from collections.abc import Callable

import torch

PINNED_FOR = ("cuda",)  # types of devices that copy from pinned memory only without a wait


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`tensor` on `device`: to a GPU through pinned memory and without a wait; as it is if it is there already."""
    if tensor.device.type == "cpu" and device.type in PINNED_FOR:
        return pinned_for(tensor, device).to(device, non_blocking=True)
    return tensor.to(device)


def pinned_for(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """What `device` copies a host's tensor from without a wait: for a GPU a copy in pinned memory, else the tensor."""
    return tensor.pin_memory() if device.type in PINNED_FOR else tensor


def to_host(tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
    """What gives `tensor` on the host, once it has arrived: from a GPU the copy is queued now and waited for then, by
    whichever thread asks. One that is there already is given as it is."""
    if tensor.device.type not in PINNED_FOR:
        return tensor.cpu
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def arrived() -> torch.Tensor:
        copied.synchronize()
        return host

    return arrived
