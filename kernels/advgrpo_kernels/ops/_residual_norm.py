"""The launches behind `ada_layer_norm`, `gated_residual` and their fp8 outputs: one forward, one backward kernel.

    h   = x + gate·out (+ gate2·out2)                   stored rounded; h = x without outs
    y_i = (h - mean)/sqrt(var + eps)·(1 + scale_i) + shift_i          of the stored h, i = 1, 2

What is absent is a None pointer, and the compiler drops it with everything that depended on it.

Legend:   B images, T tokens, C channels. x, out, h, y [B, T, C]; gate, shift, scale [B, C], rows may be strided.
Memory:   image after image, or token after token (x a transposed [T, B, C]); results lie as x does.
Numerics: float32 inside, one rounding per store. A program owns whole tokens: no atomics, nothing depends on the batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .._runtime import HAS_TRITON, device_guard
from .._tuning import Launch, launch_of
from ._layers import shared_stride

# Tokens per program, which reads the vectors of modulation once for all of them. With 4 an SM's registers hold as many
# tokens as with 2 (12 instead of 10 in the dual forward), and a token costs half of these reads and a ninth to a fifth
# fewer instructions; 8 spend them on registers.
ROWS = 4
WARPS = 8  # with 4, Triton 3.6 spills where two outs meet two modulations
FP8_MAX = torch.finfo(torch.float8_e4m3fn).max  # 448
FP8_FLOOR = 1e-30  # a row of zeros gets this amax: 448/amax and amax/448 stay normal; gradients of 1e-20 are kept

if HAS_TRITON:
    import triton
    import triton.language as tl

    FLOOR: tl.constexpr = tl.constexpr(FP8_FLOOR)
    LARGEST: tl.constexpr = tl.constexpr(FP8_MAX)

    @triton.jit
    def load_vector(ptr, offsets, inside):
        return tl.load(ptr + offsets, mask=inside, other=0.0).to(tl.float32)[None, :]

    @triton.jit
    def standardize(hidden, inside, C, eps):
        """(normalised rows, 1/std [rows, 1]) of hidden [rows, BLOCK_C], zero outside."""
        centred = tl.where(inside, hidden - (tl.sum(hidden, axis=1) / C)[:, None], 0.0)
        inverse_std = tl.rsqrt(tl.sum(centred * centred, axis=1) / C + eps)[:, None]
        return centred * inverse_std, inverse_std

    @triton.jit
    def quantize_rows(y, inverse_scale):
        """e4m3 of y times the row's factor. What float32's rounding leaves above 448 is rounded to it: the next number
        would be 480."""
        return (y * inverse_scale).to(tl.float8e4nv)

    @triton.jit
    def row_scales(amax):
        """(scale that undoes the quantisation, its inverse) for rows of largest magnitude `amax`.

        One division: every thread does it for its rows, and it is as much work as an element's norm.
        """
        amax = tl.maximum(amax, FLOOR)
        return amax * (1.0 / LARGEST), tl.div_rn(LARGEST, amax)

    @triton.jit
    def store_rows(y_ptr, offsets, mask, y, fp8_scale_ptr, row, is_row):
        """y in y_ptr's dtype; with fp8_scale_ptr as e4m3, each row's scale at `row`: the program sees rows whole, and y
        is 0 in their columns beyond the tensor."""
        if fp8_scale_ptr is not None:
            scale, inverse = row_scales(tl.max(tl.abs(y), axis=1))
            tl.store(fp8_scale_ptr + row, scale, mask=is_row)
            tl.store(y_ptr + offsets, quantize_rows(y, inverse[:, None]), mask=mask)
        else:
            tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=mask)

    @triton.jit
    def store_quantized(y_ptr, scale_ptr, F, f, y, rest_f, rest):
        """A row as e4m3 with its scale: y at f, all within it, and `rest`, 0 beyond it, at `rest_f`, or None."""
        amax = tl.max(tl.abs(y), axis=0)
        if rest is not None:
            amax = tl.maximum(amax, tl.max(tl.abs(rest), axis=0))
        scale, inverse = row_scales(amax)
        tl.store(scale_ptr, scale)
        tl.store(y_ptr + f, quantize_rows(y, inverse))
        if rest is not None:
            tl.store(y_ptr + rest_f, quantize_rows(rest, inverse), mask=rest_f < F)

    @triton.jit
    def _residual_norm_fwd_kernel(
        x_ptr,
        out_ptr,
        gate_ptr,
        out2_ptr,
        gate2_ptr,
        shift_ptr,
        scale_ptr,
        shift2_ptr,
        scale2_ptr,
        hidden_ptr,
        y_ptr,
        y2_ptr,
        fp8_scale_ptr,
        T,
        C,
        row_stride_b,
        row_stride_t,
        gate_stride,
        modulation_stride,
        eps,
        ROWS: tl.constexpr,
        BLOCK_C: tl.constexpr,
    ):
        b = tl.program_id(1).to(tl.int64)
        t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        c = tl.arange(0, BLOCK_C)
        inside = c < C
        mask = (t < T)[:, None] & inside[None, :]
        row = b * row_stride_b + t.to(tl.int64) * row_stride_t
        offsets = row[:, None] * C + c[None, :]
        hidden = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        if out_ptr is not None:
            gates = b * gate_stride + c
            out = tl.load(out_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
            hidden += load_vector(gate_ptr, gates, inside) * out
            if out2_ptr is not None:
                out2 = tl.load(out2_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
                hidden += load_vector(gate2_ptr, gates, inside) * out2
            stored = hidden.to(hidden_ptr.dtype.element_ty)
            tl.store(hidden_ptr + offsets, stored, mask=mask)
            hidden = stored.to(tl.float32)
        if y_ptr is not None:
            modulation = b * modulation_stride + c
            normed, _ = standardize(hidden, inside[None, :], C, eps)
            scale = load_vector(scale_ptr, modulation, inside)
            y = normed * (1.0 + scale) + load_vector(shift_ptr, modulation, inside)
            store_rows(y_ptr, offsets, mask, y, fp8_scale_ptr, row, t < T)
            if y2_ptr is not None:
                scale2 = load_vector(scale2_ptr, modulation, inside)
                y2 = normed * (1.0 + scale2) + load_vector(shift2_ptr, modulation, inside)
                second = tl.num_programs(1).to(tl.int64) * T  # scales of the second set follow all of the first
                store_rows(y2_ptr, offsets, mask, y2, fp8_scale_ptr, second + row, t < T)

    @triton.jit
    def _residual_norm_bwd_kernel(
        hidden_ptr,
        hidden_grad_ptr,
        y_grad_ptr,
        y2_grad_ptr,
        scale_ptr,
        scale2_ptr,
        gate_ptr,
        gate2_ptr,
        x_grad_ptr,
        out_grad_ptr,
        out2_grad_ptr,
        T,
        C,
        row_stride_b,
        row_stride_t,
        gate_stride,
        modulation_stride,
        eps,
        ROWS: tl.constexpr,
        BLOCK_C: tl.constexpr,
    ):
        b = tl.program_id(1).to(tl.int64)
        t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        c = tl.arange(0, BLOCK_C)
        inside = c < C
        mask = (t < T)[:, None] & inside[None, :]
        row = b * row_stride_b + t.to(tl.int64) * row_stride_t
        offsets = row[:, None] * C + c[None, :]
        grad = tl.zeros((ROWS, BLOCK_C), tl.float32)
        if y_grad_ptr is not None:
            modulation = b * modulation_stride + c
            hidden = tl.load(hidden_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
            y_grad = tl.load(y_grad_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
            normed_grad = y_grad * (1.0 + load_vector(scale_ptr, modulation, inside))
            if y2_grad_ptr is not None:
                y2_grad = tl.load(y2_grad_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
                normed_grad += y2_grad * (1.0 + load_vector(scale2_ptr, modulation, inside))
            normed, inverse_std = standardize(hidden, inside[None, :], C, eps)
            along = (tl.sum(normed_grad * normed, axis=1) / C)[:, None]
            grad = inverse_std * (normed_grad - (tl.sum(normed_grad, axis=1) / C)[:, None] - normed * along)
        if hidden_grad_ptr is not None:
            grad += tl.load(hidden_grad_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        if x_grad_ptr is not None:
            tl.store(x_grad_ptr + offsets, grad.to(x_grad_ptr.dtype.element_ty), mask=mask)
        if out_grad_ptr is not None:
            gates = b * gate_stride + c
            out_grad = load_vector(gate_ptr, gates, inside) * grad
            tl.store(out_grad_ptr + offsets, out_grad.to(out_grad_ptr.dtype.element_ty), mask=mask)
            if out2_grad_ptr is not None:
                out2_grad = load_vector(gate2_ptr, gates, inside) * grad
                tl.store(out2_grad_ptr + offsets, out2_grad.to(out2_grad_ptr.dtype.element_ty), mask=mask)


def token_major(x: torch.Tensor) -> bool:
    """Whether x [B, T, ...] lies in memory as a dense [T, B, ...]."""
    return not x.is_contiguous() and x.transpose(0, 1).is_contiguous()


def empty_like_rows(x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """An uninitialised [B, T, C], dense, its rows in the order of x's."""
    if token_major(x):
        return torch.empty_like(x.transpose(0, 1), dtype=dtype).transpose(0, 1)
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


def empty_row_scales(x: torch.Tensor, sets: int) -> torch.Tensor:
    """Uninitialised float32 [sets, B, T], each set's rows in the order of x's."""
    B, T, _ = x.shape
    if token_major(x):
        return x.new_empty(sets, T, B, dtype=torch.float32).transpose(1, 2)
    return x.new_empty(sets, B, T, dtype=torch.float32)


def _ordered(tensor: torch.Tensor, by_token: bool) -> torch.Tensor:
    return tensor.transpose(0, 1).contiguous().transpose(0, 1) if by_token else tensor.contiguous()


def _two(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
    return [*tensors, None, None][:2]


def launch_forward(
    x: torch.Tensor,
    outs: Sequence[torch.Tensor],
    gates: Sequence[torch.Tensor],
    shifts: Sequence[torch.Tensor],
    scales: Sequence[torch.Tensor],
    eps: float,
    *,
    fp8: bool = False,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """(h, which is x without outs; [y, y2] as many as shifts, and fp8 row scales [sets, B, T]) in one launch."""
    B, T, C = x.shape
    by_token = token_major(x)
    hidden = empty_like_rows(x) if outs else None
    ys = [empty_like_rows(x, torch.float8_e4m3fn if fp8 else x.dtype) for _ in shifts]
    fp8_scales = empty_row_scales(x, len(shifts)) if fp8 else None
    gates, gate_stride = shared_stride(gates)
    modulation, modulation_stride = shared_stride([*shifts, *scales])
    shifts, scales = modulation[: len(shifts)], modulation[len(shifts) :]
    out, out2 = _two([_ordered(o, by_token) for o in outs])
    gate, gate2 = _two(gates)
    (shift, shift2), (scale, scale2) = _two(shifts), _two(scales)
    if x.numel():
        with device_guard(x):
            rows, warps = launch_of("residual_norm", x, Launch(ROWS, WARPS))
            _residual_norm_fwd_kernel[(triton.cdiv(T, rows), B)](
                *(_ordered(x, by_token), out, gate, out2, gate2, shift, scale, shift2, scale2),
                *(hidden, *_two(ys), fp8_scales),
                *(T, C, *((1, B) if by_token else (T, 1)), gate_stride, modulation_stride, eps),
                ROWS=rows,
                BLOCK_C=triton.next_power_of_2(C),
                num_warps=warps,
            )
    return x if hidden is None else hidden, ys if fp8_scales is None else [*ys, fp8_scales]


def launch_backward(
    hidden: torch.Tensor,
    hidden_grad: torch.Tensor | None,
    y_grads: Sequence[torch.Tensor],
    scales: Sequence[torch.Tensor],
    gates: Sequence[torch.Tensor],
    eps: float,
    *,
    out_dtype: torch.dtype | None = None,
    want_x: bool = True,
) -> list[torch.Tensor]:
    """[gradient of x if wanted, gradients of the outs] in one launch."""
    B, T, C = hidden.shape
    by_token = token_major(hidden)
    x_grad = empty_like_rows(hidden) if want_x else None
    out_grads = [empty_like_rows(hidden, out_dtype) for _ in gates]
    gates, gate_stride = shared_stride(gates)
    scales, modulation_stride = shared_stride(scales)
    y_grad, y2_grad = _two([_ordered(g, by_token) for g in y_grads])
    (scale, scale2), (gate, gate2) = _two(scales), _two(gates)
    if hidden_grad is not None:
        hidden_grad = _ordered(hidden_grad, by_token)
    if hidden.numel():
        with device_guard(hidden):
            rows, warps = launch_of("residual_norm", hidden, Launch(ROWS, WARPS))
            _residual_norm_bwd_kernel[(triton.cdiv(T, rows), B)](
                *(_ordered(hidden, by_token), hidden_grad, y_grad, y2_grad, scale, scale2, gate, gate2),
                *(x_grad, *_two(out_grads)),
                *(T, C, *((1, B) if by_token else (T, 1)), gate_stride, modulation_stride, eps),
                ROWS=rows,
                BLOCK_C=triton.next_power_of_2(C),
                num_warps=warps,
            )
    return out_grads if x_grad is None else [x_grad, *out_grads]
