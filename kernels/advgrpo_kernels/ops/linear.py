"""x·Wᵀ + b, and the product of two matrices behind it, for CPUs whose registers PyTorch's products do not use.

PyTorch's float32 products are MKL's, and MKL runs its kernels of AVX2 on AMD's CPUs: half of the speed of a Zen 5.
There, and nowhere else, `auto` takes ours (`cpu/product.cpp`); `_cpu.why_no_products` says why not. There is no kernel
for a GPU.

Shapes:   rows M, inputs K, outputs N. a [M, K], b [K, N], bias [N] -> [M, N]; x [..., K], weight [N, K] -> [..., N].
Memory:   a and b have any strides and are read in place, transposed ones as fast as others.
Numerics: float32. An element is one chain of multiply-adds for every 256 of K, in their order, the bias added to the
          first and the others one after the other: no bit depends on M, on other rows or on threads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from .. import _cpu, _runtime
from .._runtime import check_tensors
from ._cpu_layers import address, integers, learns

__all__ = ["linear", "linear_ref", "matrix_product", "matrix_product_ref"]

_Maybe = torch.Tensor | None


def _product(a: torch.Tensor, b: torch.Tensor, bias: _Maybe = None, out: _Maybe = None) -> torch.Tensor:
    """a·b + bias by the CPU's kernel; `out` has dense rows."""
    (rows, depth), columns = a.shape, b.shape[1]
    out = a.new_empty(rows, columns) if out is None else out
    bias = None if bias is None else bias.contiguous()
    product = integers(rows, columns, depth, *a.stride(), *b.stride(), out.stride(0))
    pointers = map(address, (a, b, bias, out))
    _cpu.library().advgrpo_product(*pointers, product, torch.get_num_threads())
    torch.autograd.graph.increment_version(out)  # as PyTorch's `out=` does: who saved it for a backward is told
    return out


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, bias: _Maybe) -> torch.Tensor:
        of_x, of_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(x if of_weight else None, weight if of_x else None)
        return _forward(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, y_grad: torch.Tensor):
        (x, weight), rows_grad = ctx.saved_tensors, y_grad.reshape(-1, y_grad.shape[-1])
        product = _product if _cpu.takes(rows_grad) else torch.mm  # a gradient may be a view of negated values
        x_grad = None if weight is None else product(rows_grad, weight).view(*y_grad.shape[:-1], -1)
        weight_grad = None if x is None else product(rows_grad.t(), x.reshape(-1, x.shape[-1]))
        return x_grad, weight_grad, rows_grad.sum(0) if ctx.needs_input_grad[2] else None


def _forward(x: torch.Tensor, weight: torch.Tensor, bias: _Maybe) -> torch.Tensor:
    return _product(x.reshape(-1, x.shape[-1]), weight.t(), bias).view(*x.shape[:-1], -1)


def _on_cpu(requested: str, *given: _Maybe) -> bool:
    """Whether the CPU's kernel runs; `given` are the factors, and what may be None."""
    tensors = [tensor for tensor in given if tensor is not None]
    if requested == "cpu":
        _cpu.check(*tensors)
        if not all(tensor.numel() for tensor in tensors):
            raise RuntimeError("backend='cpu' has no kernel for empty matrices: use backend='torch'")
        return True
    if requested not in ("auto", "torch"):
        raise ValueError(f"backend must be one of ('auto', 'cpu', 'torch'), got {requested!r}")
    if requested == "torch" or _runtime.DEFAULT_BACKEND != "auto" or torch.compiler.is_compiling():
        return False
    return _cpu.gains_by_products() and _cpu.takes(*tensors) and all(tensor.numel() for tensor in tensors)


def _check(name: str, tensor: _Maybe, shape: tuple[int, ...], like: torch.Tensor) -> None:
    """Raise unless `tensor`, where there is one, has this shape and the dtype and device of `like`."""
    if tensor is None:
        return
    check_tensors(**{name: tensor})
    if tuple(tensor.shape) != shape or tensor.dtype != like.dtype or tensor.device != like.device:
        raise ValueError(
            f"{name} must be {like.dtype} {list(shape)} on {like.device}, got {tensor.dtype} {list(tensor.shape)} on "
            f"{tensor.device}"
        )


def _pytorchs(a: torch.Tensor, b: torch.Tensor, bias: _Maybe, out: _Maybe) -> torch.Tensor:
    return torch.mm(a, b, out=out) if bias is None else torch.addmm(bias, a, b, out=out)


def _is_cast(device: torch.device) -> bool:
    """Whether autocast chooses the dtype of products, whatever their factors have."""
    return device.type in ("cpu", "cuda") and torch.is_autocast_enabled(device.type)


def _has_rows_apart(out: torch.Tensor) -> bool:
    rows, columns = out.shape
    return (columns < 2 or out.stride(1) == 1) and (rows < 2 or out.stride(0) >= columns)


def matrix_product(
    a: torch.Tensor, b: torch.Tensor, bias: _Maybe = None, *, out: _Maybe = None, backend: str = "auto"
) -> torch.Tensor:
    """a·b + bias [M, N], in `out` where it is given; not for autograd but in a backward of its own.

    Args:
        a, b: [M, K] and [K, N] of one floating dtype.
        bias: [N].
        out: [M, N] that shares no memory with the others; of dense rows, which may lie apart.

    Under autocast it is PyTorch's, as all products are.

    Raises:
        ValueError: names the argument that does not fit.
        RuntimeError: a gradient is required; or backend="cpu" for tensors that its kernel does not take, or where it
            cannot be compiled.
    """
    check_tensors(a=a, b=b)
    if _is_cast(a.device):
        return _pytorchs(a, b, bias, out)
    if a.dim() != 2 or not a.is_floating_point():
        raise ValueError(f"a must be floating point [M, K], got {a.dtype} {list(a.shape)}")
    _check("b", b, (a.shape[1], b.shape[-1] if b.dim() else 1), a)
    _check("bias", bias, (b.shape[1],), a)
    _check("out", out, (a.shape[0], b.shape[1]), a)
    if learns(*(tensor for tensor in (a, b, bias, out) if tensor is not None)):
        raise RuntimeError("matrix_product has no gradient: use linear, or call it in an autograd function's backward")
    if out is not None and not _has_rows_apart(out):
        raise ValueError(f"out must have dense rows that do not overlap, got strides {list(out.stride())}")
    if _on_cpu(backend, a, b, bias, out):
        return _product(a, b, bias, out)
    return _pytorchs(a, b, bias, out)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: _Maybe = None, *, backend: str = "auto") -> torch.Tensor:
    """x·weightᵀ + bias [..., N], differentiable in every input, by the CPU's kernel once; PyTorch's under autocast.

    Args:
        x: [..., K] of a floating dtype.
        weight: [N, K] in its dtype.
        bias: [N].

    Raises:
        ValueError: names the argument that does not fit.
        RuntimeError: backend="cpu" for tensors that its kernel does not take, or where it cannot be compiled; a
            gradient of its gradient, where the kernel ran.
    """
    check_tensors(x=x, weight=weight)
    if _is_cast(x.device):
        return F.linear(x, weight, bias)
    if x.dim() == 0 or not x.is_floating_point():
        raise ValueError(f"x must be floating point [..., K], got {x.dtype} {list(x.shape)}")
    _check("weight", weight, (weight.shape[0] if weight.dim() else 1, x.shape[-1]), x)
    _check("bias", bias, (weight.shape[0],), x)
    if not _on_cpu(backend, x, weight, bias):
        return F.linear(x, weight, bias)
    given = [x, weight] if bias is None else [x, weight, bias]
    return _Linear.apply(x, weight, bias) if learns(*given) else _forward(x, weight, bias)


def matrix_product_ref(
    a: torch.Tensor, b: torch.Tensor, bias: _Maybe = None, *, compute_dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Plain PyTorch."""
    product = a.to(compute_dtype) @ b.to(compute_dtype)
    return (product if bias is None else product + bias.to(compute_dtype)).to(a.dtype)


def linear_ref(
    x: torch.Tensor, weight: torch.Tensor, bias: _Maybe = None, *, compute_dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Plain PyTorch, differentiable in every input."""
    wide = None if bias is None else bias.to(compute_dtype)
    return F.linear(x.to(compute_dtype), weight.to(compute_dtype), wide).to(x.dtype)
