"""What the transformer layer ops share: backend choice for frozen parameters, row strides, argument checks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch

from .._runtime import _warn_once, check_tensors, pick_backend

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
Given = TypeVar("Given")


def pick_layer_backend(requested: str, activations: Sequence[torch.Tensor], frozen: dict[str, torch.Tensor]) -> str:
    """`pick_backend`, for kernels whose backward has gradients for `activations` only.

    A `frozen` tensor that requires a gradient would silently get none: an explicit "triton" raises, "auto" takes the
    PyTorch reference, whose autograd covers every input, and says so once.
    """
    choice = pick_backend(requested, *activations, *frozen.values())
    if choice == "torch" or not torch.is_grad_enabled():
        return choice
    trained = [name for name, tensor in frozen.items() if tensor.requires_grad]
    if not trained:
        return choice
    if requested == "triton":
        raise RuntimeError(f"backend='triton' has no gradient for {trained}: detach them, or use backend='torch'")
    _warn_once(f"{trained} require gradients, which the fused layer kernels do not compute: running PyTorch instead")
    return "torch"


def check_float(name: str, tensor: torch.Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    """Raise unless `tensor` is a float tensor of `shape` on `device`; shapes are never broadcast."""
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
