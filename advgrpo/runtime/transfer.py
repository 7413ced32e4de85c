"""From host to device without waiting: a copy from ordinary memory waits until the GPU has done all that is queued."""

from __future__ import annotations

import torch

PINNED_FOR = ("cuda",)  # types of devices that copy from pinned memory only without a wait


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`tensor` on `device`: to a GPU through pinned memory and without a wait; as it is if it is there already."""
    if tensor.device.type == "cpu" and device.type in PINNED_FOR:
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
