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


def pinned_bytes(size: int) -> int:
    """What a tensor of `size` bytes takes of pinned memory: PyTorch's allocator rounds it up to a power of two."""
    return 1 << (size - 1).bit_length() if size else 0


def release_pinned(device: torch.device) -> None:
    """Return to the system what no tensor is in any more: PyTorch keeps pinned memory for the next one of its size.

    `torch.cuda.graph` does so before it captures; a run without graphs would keep it to its end.
    """
    if device.type == "cuda":
        torch._C._host_emptyCache()


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
