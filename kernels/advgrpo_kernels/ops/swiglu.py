"""SwiGLU, what stands between the two linears of a gated feed-forward layer (arXiv 2002.05202): y = silu(g)·u.

    g, u = x[..., :F], x[..., F:]         s = 1/(1 + exp(-g)), silu(g) = g·s
    dg   = dy·u·s·(1 + g·(1 - s))         du = dy·g·s

One exponential, and the inverse without a division of `gelu`. The gate is the first half, as in diffusers' Flux2SwiGLU
and Flux3SwiGLU. In diffusers' `SwiGLU` (Mochi, Ovis-Image, Stable Audio) it is the second, which is not this op: with
the two halves of its linear's weight and bias exchanged it is.

Shapes:   x [..., 2F] -> y [..., F] as x.
Memory:   rows that lie apart, such as a part of a wider product's, are read in place, in the gradient of y as well.
Numerics: float32 inside, one rounding.
Gradient: of x, from x itself; nothing else is kept.
"""

from __future__ import annotations

from typing import Literal, overload

import torch

from .._ops import add_op_namespace_prefix
from .._runtime import HAS_TRITON, check_tensors, device_guard
from .._tuning import Launch, launch_of
from ._layers import FLOATS, parts_of_row, pick_layer_backend
from .fp8 import Fp8Tensor, empty_fp8, fp8_quantize_ref

__all__ = ["swiglu", "swiglu_ref"]

ROWS, BLOCK_F, WARPS = 2, 1024, 4

if HAS_TRITON:
    import triton
    import triton.language as tl

    from ._residual_norm import store_quantized
    from .gelu import inverse_of_one_plus

    @triton.jit
    def _exp_of_minus(g):
        return tl.exp2(-1.4426950409 * g)

    @triton.jit
    def silu(g):
        return g * inverse_of_one_plus(_exp_of_minus(g))

    @triton.jit
    def _swiglu_fwd_kernel(x_ptr, y_ptr, M, F, x_stride, ROWS: tl.constexpr, BLOCK_F: tl.constexpr):
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
        mask = (row < M)[:, None] & (f < F)[None, :]
        gates = row.to(tl.int64)[:, None] * x_stride + f[None, :]
        g = tl.load(x_ptr + gates, mask=mask, other=0.0).to(tl.float32)
        u = tl.load(x_ptr + gates + F, mask=mask, other=0.0).to(tl.float32)
        offsets = row.to(tl.int64)[:, None] * F + f[None, :]
        tl.store(y_ptr + offsets, (silu(g) * u).to(y_ptr.dtype.element_ty), mask=mask)

    @triton.jit
    def _swiglu_of_part(x_ptr, f, F):
        g = tl.load(x_ptr + f, mask=f < F, other=0.0).to(tl.float32)
        return silu(g) * tl.load(x_ptr + F + f, mask=f < F, other=0.0).to(tl.float32)

    @triton.jit
    def _swiglu_fp8_kernel(
        x_ptr, y_ptr, fp8_scale_ptr, F, x_stride, BLOCK_F: tl.constexpr, REST_F: tl.constexpr
    ):  # fmt: skip
        """A row, in two parts (`parts_of_row`)."""
        row = tl.program_id(0).to(tl.int64)
        f, rest_f, rest = tl.arange(0, BLOCK_F), None, None
        y = _swiglu_of_part(x_ptr + row * x_stride, f, F)
        if REST_F > 0:
            rest_f = BLOCK_F + tl.arange(0, REST_F)
            rest = _swiglu_of_part(x_ptr + row * x_stride, rest_f, F)
        store_quantized(y_ptr + row * F, fp8_scale_ptr + row, F, f, y, rest_f, rest)

    @triton.jit
    def _swiglu_bwd_kernel(
        x_ptr, y_grad_ptr, x_grad_ptr, M, F, x_stride, y_grad_stride, ROWS: tl.constexpr, BLOCK_F: tl.constexpr
    ):  # fmt: skip
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
        mask = (row < M)[:, None] & (f < F)[None, :]
        row = row.to(tl.int64)[:, None]
        gates = row * x_stride + f[None, :]
        g = tl.load(x_ptr + gates, mask=mask, other=0.0).to(tl.float32)
        u = tl.load(x_ptr + gates + F, mask=mask, other=0.0).to(tl.float32)
        y_grad = tl.load(y_grad_ptr + row * y_grad_stride + f[None, :], mask=mask, other=0.0).to(tl.float32)
        g = tl.maximum(g, -87.0, propagate_nan=tl.PropagateNan.ALL)  # e is finite, and e·s is 1 - s
        e = _exp_of_minus(g)
        s = inverse_of_one_plus(e)
        gate_grad = y_grad * u * (s * (1.0 + g * (e * s)))
        u_grad = y_grad * (g * s)
        offsets = row * (2 * F) + f[None, :]
        tl.store(x_grad_ptr + offsets, gate_grad.to(x_grad_ptr.dtype.element_ty), mask=mask)
        tl.store(x_grad_ptr + offsets + F, u_grad.to(x_grad_ptr.dtype.element_ty), mask=mask)


@torch.library.custom_op(add_op_namespace_prefix("swiglu"), mutates_args=())
def _swiglu_op(x: torch.Tensor) -> torch.Tensor:
    y = x.new_empty(_shape(x))
    rows = _rows(x)
    _launch(_swiglu_fwd_kernel, (rows, y), rows.stride(0), like=y)
    return y


@_swiglu_op.register_fake
def _(x):
    return x.new_empty(_shape(x))


@torch.library.custom_op(add_op_namespace_prefix("swiglu_backward"), mutates_args=())
def _swiglu_backward_op(y_grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    x_grad = x.new_empty(x.shape)
    rows, grads = _rows(x), _rows(y_grad)
    _launch(_swiglu_bwd_kernel, (rows, grads, x_grad), rows.stride(0), grads.stride(0), like=y_grad)
    return x_grad


@_swiglu_backward_op.register_fake
def _(y_grad, x):
    return x.new_empty(x.shape)


@torch.library.custom_op(add_op_namespace_prefix("swiglu_fp8"), mutates_args=())
def _swiglu_fp8_op(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(e4m3 values, row scales [..., 1])."""
    y, scales = empty_fp8(x, _shape(x))
    rows, F = _rows(x), y.shape[-1]
    block, rest, warps = parts_of_row(F)
    if y.numel():
        with device_guard(y):
            args = (rows, y, scales, F, rows.stride(0), block, rest)
            _swiglu_fp8_kernel[(len(rows),)](*args, num_warps=warps)
    return y, scales


@_swiglu_fp8_op.register_fake
def _(x):
    return empty_fp8(x, _shape(x))


def _shape(x: torch.Tensor) -> tuple[int, ...]:
    return *x.shape[:-1], x.shape[-1] // 2


def _rows(x: torch.Tensor) -> torch.Tensor:
    """x as dense rows [M, columns] of one stride: x itself wherever it lies so."""
    rows = x.reshape(x.numel() // x.shape[-1], x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _launch(kernel, tensors, *strides: int, like: torch.Tensor) -> None:
    """`like` is [..., F] with a row for each of y."""
    F = like.shape[-1]
    M = like.numel() // F
    rows, warps = launch_of("swiglu", like, Launch(ROWS, WARPS))
    block = min(BLOCK_F, triton.next_power_of_2(F))
    if M:
        with device_guard(like):
            kernel[(triton.cdiv(M, rows), triton.cdiv(F, block))](
                *tensors, M, F, *strides, ROWS=rows, BLOCK_F=block, num_warps=warps
            )


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, y_grad):
    return _swiglu_backward_op(y_grad, *ctx.saved_tensors)


_swiglu_op.register_autograd(_backward, setup_context=_setup_context)


@overload
def swiglu(x: torch.Tensor, *, quantize: Literal[False] = ..., backend: str = ...) -> torch.Tensor: ...
@overload
def swiglu(x: torch.Tensor, *, quantize: bool, backend: str = ...) -> torch.Tensor | Fp8Tensor: ...
def swiglu(x: torch.Tensor, *, quantize: bool = False, backend: str = "auto") -> torch.Tensor | Fp8Tensor:
    """silu of x's first half, times its second.

    Args:
        x: [..., 2F] float32, float16 or bfloat16: gate, then what it gates.
        quantize: return an `Fp8Tensor` with row scales, quantised before any rounding to x's dtype; no gradient.
        backend: on a CPU "auto" is the reference; there is no "cpu".

    Returns:
        [..., F] as x.

    Raises:
        ValueError: names the argument that does not fit.
        RuntimeError: a backend that cannot take x.
    """
    check_tensors(x=x)
    if x.dim() < 1 or x.shape[-1] == 0 or x.shape[-1] % 2 or x.dtype not in FLOATS:
        raise ValueError(f"x must be floating point [..., 2F], got {x.dtype} {list(x.shape)}")
    if pick_layer_backend(backend, [x], {}, cpu=False) == "torch":
        return swiglu_ref(x, quantize=quantize)
    if quantize:
        with torch.no_grad():
            data, scale = _swiglu_fp8_op(x)
        return Fp8Tensor(data, scale)
    return _swiglu_op(x)


@overload
def swiglu_ref(
    x: torch.Tensor, *, quantize: Literal[False] = ..., compute_dtype: torch.dtype = ...
) -> torch.Tensor: ...
@overload
def swiglu_ref(x: torch.Tensor, *, quantize: bool, compute_dtype: torch.dtype = ...) -> torch.Tensor | Fp8Tensor: ...
def swiglu_ref(
    x: torch.Tensor, *, quantize: bool = False, compute_dtype: torch.dtype = torch.float32
) -> torch.Tensor | Fp8Tensor:
    """Plain PyTorch, differentiable."""
    g, u = x.to(compute_dtype).chunk(2, dim=-1)
    y = torch.nn.functional.silu(g) * u
    return fp8_quantize_ref(y.detach()) if quantize else y.to(x.dtype)
