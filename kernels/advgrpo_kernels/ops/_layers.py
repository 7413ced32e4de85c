"""What the transformer layer ops share: backend choice for frozen parameters, row strides, argument checks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch

from .. import _cpu, _runtime
from .._runtime import _warn_once, check_tensors, pick_backend

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
Given = TypeVar("Given")


def pick_layer_backend(
    requested: str, activations: Sequence[torch.Tensor], frozen: dict[str, torch.Tensor], *, cpu: bool = True
) -> str:
    """ "triton", "cpu" or "torch", for kernels whose backward has gradients for `activations` only.

    `pick_backend`'s choice, but for float32 tensors on a CPU the kernels compiled for it (`_cpu.py`), where these serve
    the call's other arguments (`cpu`). A `frozen` tensor that requires a gradient would silently get none: an explicit
    "triton" or "cpu" raises, "auto" takes the PyTorch reference, whose autograd covers every input, and says so once.
    """
    tensors = [*activations, *frozen.values()]
    if requested == "cpu":
        _cpu.check(*tensors)
        if not cpu:
            raise RuntimeError("backend='cpu' has no kernel for these arguments: use backend='torch'")
        choice = "cpu"
    elif cpu and requested == "auto" == _runtime.DEFAULT_BACKEND and _cpu.takes(*tensors):
        choice = "cpu"
    else:
        choice = pick_backend(requested, *tensors)
    if choice == "torch" or not torch.is_grad_enabled():
        return choice
    trained = [name for name, tensor in frozen.items() if tensor.requires_grad]
    if not trained:
        return choice
    if requested != "auto":
        raise RuntimeError(f"backend={requested!r} has no gradient for {trained}: detach them, or use backend='torch'")
    _warn_once(f"{trained} require gradients, which the fused layer kernels do not compute: running PyTorch instead")
    return "torch"


def parts_of_row(width: int) -> tuple[int, int, int]:
    """(part, rest, warps) of a program with a whole row: the largest power of two within it, the smallest that holds
    what is left, 0 for nothing, and 96 elements a thread.

    One power of two for all would leave up to half of the lanes idle, a quarter of 6144; and what a program does once,
    its maximum and a division, costs each element half as much as with 48.
    """
    part = 1 << (width.bit_length() - 1)
    left = width - part
    rest = 1 << (left - 1).bit_length() if left else 0
    threads = -(-(part + rest) // 96)
    return part, rest, min(16, max(2, 1 << (-(-threads // 32) - 1).bit_length()))


def check_float(name: str, tensor: torch.Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    """Raise unless `tensor` is a float tensor of `shape` on `device`; shapes are never broadcast."""
    if (
        isinstance(tensor, torch.Tensor)
        and tensor.shape == shape
        and tensor.dtype in FLOATS
        and tensor.device == device
    ):
        return  # at once: there are dozens of them in a block
    check_tensors(**{name: tensor})
    if tuple(tensor.shape) != shape or tensor.dtype not in FLOATS:
        raise ValueError(f"{name} must be floating point {list(shape)}, got {tensor.dtype} {list(tensor.shape)}")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, expected {device}")


def given(name: str, value: Given | None) -> Given:
    """`value`; ValueError where it was left out although another argument needs it."""
    if value is None:
        raise ValueError(f"{name} is missing: it goes with another argument that was given")
    return value


def shared_stride(tensors: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], int]:
    """[B, C] tensors of one dtype and one row stride, which chunks of one linear's output already have."""
    tensors = list(tensors)
    if not tensors:
        return tensors, 0
    strides = {(t.stride(), t.dtype) for t in tensors}
    if len(strides) > 1 or tensors[0].stride(1) != 1:
        tensors = [t.contiguous() for t in tensors]
    return tensors, tensors[0].stride(0)
