"""The epilogue of a feed-forward layer's first linear: y = gelu_tanh(x + bias), as diffusers' GELU(approximate="tanh").

`0.5·u·(1 + tanh(z)) = u·sigmoid(2z)` with z = sqrt(2/π)(u + 0.044715u³): one exponential, and no cancellation in the
left tail. sigmoid(2z) = rsqrt(1 + e)² with e = exp(-2z): a division costs a reciprocal and eight instructions around
it, this one multiplication; 13.7 instead of 21.3 instructions an element (`tests/kernels/ahead_of_time/budgets.json`).

Shapes:   x [..., F], bias [F] -> y [..., F] as x.
Numerics: float32 inside, one rounding.
Gradient: of x only, from x itself; the bias is frozen.
"""

from __future__ import annotations

from typing import Literal, overload

import torch

from .._ops import add_op_namespace_prefix
from .._runtime import HAS_TRITON, check_tensors, device_guard
from .._tuning import Launch, launch_of
from . import _cpu_layers
from ._layers import FLOATS, check_float, parts_of_row, pick_layer_backend
from .fp8 import Fp8Tensor, empty_fp8, fp8_quantize_ref

__all__ = ["gelu", "gelu_ref"]

ROWS, BLOCK_F, WARPS = 4, 1024, 4

if HAS_TRITON:
    import triton
    import triton.language as tl

    from ._residual_norm import load_vector, store_quantized

    @triton.jit
    def _load_biased(x_ptr, bias_ptr, offsets, mask, f, F):
        u = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        return u if bias_ptr is None else u + load_vector(bias_ptr, f, f < F)

    @triton.jit
    def inverse_of_one_plus(e):
        """1/(1 + e) of e >= 0, 0 where e is infinite; to two units in the last place, as the compiler's division."""
        root = tl.rsqrt(1.0 + e)
        return root * root

    @triton.jit
    def _exponent(u):
        """-2z/ln 2, so that 2 to its power is exp(-2z)."""
        return u * (-2.3022081981 - 0.10294323958 * u * u)

    @triton.jit
    def _sigmoid_of_2z(u):
        return inverse_of_one_plus(tl.exp2(_exponent(u)))

    @triton.jit
    def _gelu_fwd_kernel(x_ptr, bias_ptr, y_ptr, M, F, ROWS: tl.constexpr, BLOCK_F: tl.constexpr):
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
        mask = (row < M)[:, None] & (f < F)[None, :]
        offsets = row.to(tl.int64)[:, None] * F + f[None, :]
        u = _load_biased(x_ptr, bias_ptr, offsets, mask, f, F)
        tl.store(y_ptr + offsets, (u * _sigmoid_of_2z(u)).to(y_ptr.dtype.element_ty), mask=mask)

    @triton.jit
    def _gelu_of_part(x_ptr, bias_ptr, f, F):
        u = tl.load(x_ptr + f, mask=f < F, other=0.0).to(tl.float32)
        if bias_ptr is not None:
            u += tl.load(bias_ptr + f, mask=f < F, other=0.0).to(tl.float32)
        return u * _sigmoid_of_2z(u)

    @triton.jit
    def _gelu_fp8_kernel(
        x_ptr, bias_ptr, y_ptr, fp8_scale_ptr, F, BLOCK_F: tl.constexpr, REST_F: tl.constexpr
    ):  # fmt: skip
        """A row, in two parts (`parts_of_row`)."""
        row = tl.program_id(0).to(tl.int64)
        f, rest_f, rest = tl.arange(0, BLOCK_F), None, None
        y = _gelu_of_part(x_ptr + row * F, bias_ptr, f, F)
        if REST_F > 0:
            rest_f = BLOCK_F + tl.arange(0, REST_F)
            rest = _gelu_of_part(x_ptr + row * F, bias_ptr, rest_f, F)
        store_quantized(y_ptr + row * F, fp8_scale_ptr + row, F, f, y, rest_f, rest)

    @triton.jit
    def _gelu_bwd_kernel(
        x_ptr, bias_ptr, y_grad_ptr, x_grad_ptr, M, F, ROWS: tl.constexpr, BLOCK_F: tl.constexpr
    ):  # fmt: skip
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
        mask = (row < M)[:, None] & (f < F)[None, :]
        offsets = row.to(tl.int64)[:, None] * F + f[None, :]
        u = _load_biased(x_ptr, bias_ptr, offsets, mask, f, F)
        u = tl.maximum(u, -10.0, propagate_nan=tl.PropagateNan.ALL)  # e < 2^126; and |u|³ grows no further
        e = tl.exp2(_exponent(u))
        s = inverse_of_one_plus(e)
        slope = s * (1.0 + u * (e * s) * (1.5957691216057308 + 0.21406444881780048 * u * u))  # e·s is 1 - s
        grad = tl.load(y_grad_ptr + offsets, mask=mask, other=0.0).to(tl.float32) * slope
        tl.store(x_grad_ptr + offsets, grad.to(x_grad_ptr.dtype.element_ty), mask=mask)


@torch.library.custom_op(add_op_namespace_prefix("gelu"), mutates_args=())
def _gelu_op(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    _launch(_gelu_fwd_kernel, x, bias, y)
    return y


@_gelu_op.register_fake
def _(x, bias):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op(add_op_namespace_prefix("gelu_backward"), mutates_args=())
def _gelu_backward_op(y_grad: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    x_grad = torch.empty_like(x, memory_format=torch.contiguous_format)
    _launch(_gelu_bwd_kernel, x, bias, y_grad.contiguous(), x_grad)
    return x_grad


@_gelu_backward_op.register_fake
def _(y_grad, x, bias):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op(add_op_namespace_prefix("gelu_fp8"), mutates_args=())
def _gelu_fp8_op(x: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """(e4m3 values, row scales [..., 1])."""
    y, scales = empty_fp8(x, x.shape)
    F = x.shape[-1]
    block, rest, warps = parts_of_row(F)
    bias = None if bias is None else bias.contiguous()
    if x.numel():
        with device_guard(x):
            args = (x.contiguous(), bias, y, scales, F, block, rest)
            _gelu_fp8_kernel[(x.numel() // F,)](*args, num_warps=warps)
    return y, scales


@_gelu_fp8_op.register_fake
def _(x, bias):
    return empty_fp8(x, x.shape)


def _launch(kernel, x, bias, *others: torch.Tensor) -> None:
    F = x.shape[-1]
    M = x.numel() // F
    rows, warps = launch_of("gelu", x, Launch(ROWS, WARPS))
    block = min(BLOCK_F, triton.next_power_of_2(F))
    bias = None if bias is None else bias.contiguous()
    if M:
        with device_guard(x):
            kernel[(triton.cdiv(M, rows), triton.cdiv(F, block))](
                *(x.contiguous(), bias, *others, M, F),
                ROWS=rows,
                BLOCK_F=block,
                num_warps=warps,
            )


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, y_grad):
    return _gelu_backward_op(y_grad, *ctx.saved_tensors), None


_gelu_op.register_autograd(_backward, setup_context=_setup_context)


@overload
def gelu(
    x: torch.Tensor, bias: torch.Tensor | None = ..., *, quantize: Literal[False] = ..., backend: str = ...
) -> torch.Tensor: ...
@overload
def gelu(
    x: torch.Tensor, bias: torch.Tensor | None = ..., *, quantize: bool, backend: str = ...
) -> torch.Tensor | Fp8Tensor: ...
def gelu(
    x: torch.Tensor, bias: torch.Tensor | None = None, *, quantize: bool = False, backend: str = "auto"
) -> torch.Tensor | Fp8Tensor:
    """gelu_tanh(x + bias).

    Args:
        x: [..., F] float32, float16 or bfloat16: the matrix product, without its bias when that is given here.
        bias: [F] any of these dtypes, or None.
        quantize: return an `Fp8Tensor` with row scales, quantised before any rounding to x's dtype; no gradient.

    Raises:
        ValueError: names the argument that does not fit.
        RuntimeError: backend="triton" with a bias that requires a gradient.
    """
    check_tensors(x=x)
    if x.dim() < 1 or x.shape[-1] == 0 or x.dtype not in FLOATS:
        raise ValueError(f"x must be floating point [..., F], got {x.dtype} {list(x.shape)}")
    if bias is not None:
        check_float("bias", bias, (x.shape[-1],), x.device)
    chosen = pick_layer_backend(backend, [x], {} if bias is None else {"bias": bias}, cpu=not quantize)
    if chosen == "torch":
        return gelu_ref(x, bias, quantize=quantize)
    if chosen == "cpu":
        return _cpu_layers.gelu(x, bias)
    if quantize:
        with torch.no_grad():
            data, scale = _gelu_fp8_op(x, bias)
        return Fp8Tensor(data, scale)
    return _gelu_op(x, bias)


@overload
def gelu_ref(
    x: torch.Tensor,
    bias: torch.Tensor | None = ...,
    *,
    quantize: Literal[False] = ...,
    compute_dtype: torch.dtype = ...,
) -> torch.Tensor: ...
@overload
def gelu_ref(
    x: torch.Tensor, bias: torch.Tensor | None = ..., *, quantize: bool, compute_dtype: torch.dtype = ...
) -> torch.Tensor | Fp8Tensor: ...
def gelu_ref(
    x: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    quantize: bool = False,
    compute_dtype: torch.dtype = torch.float32,
) -> torch.Tensor | Fp8Tensor:
    """Plain PyTorch, differentiable in both inputs."""
    u = x.to(compute_dtype)
    y = torch.nn.functional.gelu(u if bias is None else u + bias.to(compute_dtype), approximate="tanh")
    return fp8_quantize_ref(y.detach()) if quantize else y.to(x.dtype)
