"""e4m3 quantisation by row or by tensor, and the linear layer on it. For sampling steps: nothing here has a gradient.

    data = e4m3(x·(448/amax)),  scale = amax·(1/448),  x ≈ data·scale    amax over a row or over the whole tensor

Shapes:   x [..., K] -> data [..., K] float8_e4m3fn, scale [..., 1] (row) or [] (tensor) float32.
Numerics: float32 inside; a maximum has one result in any order, so the scales do not depend on the launch. amax is at
          least 1e-30: a row of zeros keeps a finite scale. Values beyond a given scale saturate at ±448.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from .._ops import add_op_namespace_prefix
from .._runtime import HAS_TRITON, check_tensors, device_guard, pick_backend
from ._layers import FLOATS, check_float
from ._residual_norm import FP8_FLOOR, FP8_MAX

__all__ = ["Fp8Tensor", "fp8_linear", "fp8_linear_ref", "fp8_quantize", "fp8_quantize_ref"]

GRANULARITIES = ("row", "tensor")
LANES = 8192  # elements of a program that does not need whole rows
PARTIALS = 1024  # at most this many partial maxima: every quantising program reads them all

if HAS_TRITON:
    import triton
    import triton.language as tl

    from ._residual_norm import LARGEST, quantize_rows, row_scales

    @triton.jit
    def _fp8_rows_kernel(x_ptr, data_ptr, scale_ptr, M, K, ROWS: tl.constexpr, BLOCK_K: tl.constexpr):
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        k = tl.arange(0, BLOCK_K)
        mask = (row < M)[:, None] & (k < K)[None, :]
        offsets = row.to(tl.int64)[:, None] * K + k[None, :]
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        scale, inverse = row_scales(tl.max(tl.abs(x), axis=1))
        tl.store(scale_ptr + row, scale, mask=row < M)
        tl.store(data_ptr + offsets, quantize_rows(x, inverse[:, None]), mask=mask)

    @triton.jit
    def _fp8_amax_kernel(x_ptr, partial_ptr, N, TILES: tl.constexpr, LANES: tl.constexpr):
        first = tl.program_id(0).to(tl.int64) * TILES * LANES
        amax = tl.zeros((LANES,), tl.float32)
        for tile in range(TILES):
            offsets = first + tile * LANES + tl.arange(0, LANES)
            amax = tl.maximum(amax, tl.abs(tl.load(x_ptr + offsets, mask=offsets < N, other=0.0).to(tl.float32)))
        tl.store(partial_ptr + tl.program_id(0), tl.max(amax, axis=0))

    @triton.jit
    def _fp8_tensor_kernel(
        x_ptr, partial_ptr, given_scale_ptr, data_ptr, scale_ptr, N, partials, LANES: tl.constexpr,
        PARTIALS: tl.constexpr,
    ):  # fmt: skip
        if given_scale_ptr is None:
            p = tl.arange(0, PARTIALS)
            scale, inverse = row_scales(tl.max(tl.load(partial_ptr + p, mask=p < partials, other=0.0), axis=0))
        else:
            scale = tl.load(given_scale_ptr)
            inverse = tl.div_rn(1.0, scale)
        if tl.program_id(0) == 0:
            tl.store(scale_ptr, scale)
        offsets = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
        x = tl.load(x_ptr + offsets, mask=offsets < N, other=0.0).to(tl.float32)
        scaled = tl.minimum(tl.maximum(x * inverse, -LARGEST), LARGEST)  # a given scale may be too small
        tl.store(data_ptr + offsets, scaled.to(tl.float8e4nv), mask=offsets < N)


@torch.library.custom_op(add_op_namespace_prefix("fp8_quantize"), mutates_args=())
def _fp8_quantize_op(
    x: torch.Tensor, by_row: bool, given_scale: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(data, scale). One launch by row or with a given scale, two by tensor."""
    data, scale = empty_fp8(x, x.shape, by_row=by_row)
    x, K = x.contiguous(), x.shape[-1]
    with device_guard(x):
        if by_row:
            M, block = x.numel() // K, triton.next_power_of_2(K)
            rows = max(1, 4096 // block)
            warps = 8 if block > 4096 else 4
            _fp8_rows_kernel[(triton.cdiv(M, rows),)](x, data, scale, M, K, rows, block, num_warps=warps)
            return data, scale
        N = x.numel()
        tiles = triton.cdiv(N, LANES * PARTIALS)
        partials = triton.cdiv(N, LANES * tiles)
        partial = None if given_scale is not None else x.new_empty(partials, dtype=torch.float32)
        if partial is not None:
            _fp8_amax_kernel[(partials,)](x, partial, N, tiles, LANES, num_warps=8)
        args = (x, partial, given_scale, data, scale, N, partials)
        _fp8_tensor_kernel[(triton.cdiv(N, LANES),)](*args, LANES, PARTIALS, num_warps=8)
    return data, scale


@_fp8_quantize_op.register_fake
def _(x, by_row, given_scale):
    return empty_fp8(x, x.shape, by_row=by_row)


def empty_fp8(like: torch.Tensor, shape: Sequence[int], *, by_row: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """Uninitialised data and scale of an `Fp8Tensor` of that shape, on the device of `like`."""
    data = like.new_empty(shape, dtype=torch.float8_e4m3fn)
    return data, like.new_empty((*shape[:-1], 1) if by_row else (), dtype=torch.float32)


class Fp8Tensor(NamedTuple):
    """A quantised tensor: value ≈ data·scale."""

    data: torch.Tensor  # [..., K] float8_e4m3fn
    scale: torch.Tensor  # float32, [..., 1] by row or [] by tensor

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return (self.data.float() * self.scale).to(dtype)


def fp8_quantize(
    x: torch.Tensor, *, granularity: str = "row", scale: torch.Tensor | None = None, backend: str = "auto"
) -> Fp8Tensor:
    """Quantise x to e4m3.

    Args:
        x: [..., K] float32, float16 or bfloat16, not empty.
        granularity: "row" or "tensor".
        scale: float32 scalar tensor, a static scale by tensor, read on the device; larger values saturate.

    Raises:
        ValueError: names the argument that does not fit.
    """
    check_tensors(x=x)
    if x.dim() < 1 or x.numel() == 0 or x.dtype not in FLOATS:
        raise ValueError(f"x must be a non-empty floating point [..., K], got {x.dtype} {list(x.shape)}")
    if granularity not in GRANULARITIES:
        raise ValueError(f"granularity must be one of {GRANULARITIES}, got {granularity!r}")
    if scale is not None:
        check_float("scale", scale, (), x.device)
        if granularity != "tensor" or scale.dtype != torch.float32:
            raise ValueError(f"a given scale is float32 and needs granularity='tensor', got {granularity!r}")
    with torch.no_grad():
        if pick_backend(backend, x) == "triton":
            return Fp8Tensor(*_fp8_quantize_op(x, granularity == "row", scale))
        return fp8_quantize_ref(x, granularity=granularity, scale=scale)


def fp8_quantize_ref(
    x: torch.Tensor,
    *,
    granularity: str = "row",
    scale: torch.Tensor | None = None,
    compute_dtype: torch.dtype = torch.float32,
) -> Fp8Tensor:
    """Plain PyTorch, the same bits as the kernels on a GPU."""
    x = x.detach().to(compute_dtype)
    if scale is not None:
        inverse = 1.0 / scale.to(compute_dtype)
    else:
        amax = (x.abs().amax(-1, keepdim=True) if granularity == "row" else x.abs().amax()).clamp(min=FP8_FLOOR)
        scale, inverse = amax * (1 / FP8_MAX), FP8_MAX / amax
    return Fp8Tensor((x * inverse).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn), scale.float())


def fp8_linear(
    x: torch.Tensor | Fp8Tensor,
    weight: Fp8Tensor,
    bias: torch.Tensor | None = None,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
    out: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """x·weightᵀ + bias with `torch._scaled_mm` (on a CPU `fp8_linear_ref`), in `out_dtype`. No gradient.

    Args:
        x: [..., K], quantised here with the weight's granularity, or an `Fp8Tensor` of that granularity, e.g. from
            `ada_layer_norm(quantize=True)`.
        weight: data [N, K]; K and N multiples of 16.
        bias: [N]; on a GPU added in `out_dtype` by the matrix product's epilogue.
        out_dtype: by row, the GPU library has bfloat16 only.
        out: contiguous [..., N] of `out_dtype` to write and return, such as rows of a larger tensor.

    Raises:
        ValueError: names the argument that does not fit.
    """
    _check_linear(weight, bias)
    by_row = weight.scale.dim() > 0
    if not isinstance(x, Fp8Tensor):
        x = fp8_quantize(x, granularity="row" if by_row else "tensor", backend=backend)
    N, K = weight.data.shape
    if x.data.shape[-1] != K or x.data.dtype != torch.float8_e4m3fn:
        raise ValueError(f"x must be float8_e4m3fn [..., {K}], got {x.data.dtype} {list(x.data.shape)}")
    if tuple(x.scale.shape) != ((*x.data.shape[:-1], 1) if by_row else ()):
        want = "one scale per row" if by_row else "a scalar scale"
        raise ValueError(f"x.scale: the weight's granularity wants {want}, got {list(x.scale.shape)}")
    shape = (*x.data.shape[:-1], N)
    if out is not None:
        check_tensors(x=x.data, out=out)
        if tuple(out.shape) != shape or out.dtype != out_dtype or not out.is_contiguous():
            raise ValueError(f"out must be contiguous {out_dtype} {list(shape)}, got {out.dtype} {list(out.shape)}")
    if x.data.device.type == "cpu":  # torch 2.6 has no such product there, 2.11 none with a scale per row
        y = fp8_linear_ref(x, weight, bias, out_dtype=out_dtype)
        return y if out is None else out.copy_(y)
    rows = x.data.reshape(math.prod(x.data.shape[:-1]), K)
    y = torch._scaled_mm(
        rows,
        weight.data.t(),
        scale_a=x.scale.reshape(-1, 1) if by_row else x.scale,
        scale_b=weight.scale.reshape(1, -1) if by_row else weight.scale,
        bias=None if bias is None else bias.to(out_dtype),
        out_dtype=out_dtype,
        use_fast_accum=True,
        out=None if out is None else out.view(-1, N),
    )
    return y.view(shape) if out is None else out


def _check_linear(weight: Fp8Tensor, bias: torch.Tensor | None) -> None:
    data, scale = weight
    if data.dim() != 2 or data.dtype != torch.float8_e4m3fn or data.shape[0] % 16 or data.shape[1] % 16:
        raise ValueError(
            f"weight.data must be float8_e4m3fn [N, K], multiples of 16, got {data.dtype} {list(data.shape)}"
        )
    if tuple(scale.shape) not in ((data.shape[0], 1), ()) or scale.dtype != torch.float32:
        want = [data.shape[0], 1]
        raise ValueError(f"weight.scale must be float32 {want} or [], got {scale.dtype} {list(scale.shape)}")
    if bias is not None:
        check_float("bias", bias, (data.shape[0],), data.device)


def fp8_linear_ref(
    x: Fp8Tensor,
    weight: Fp8Tensor,
    bias: torch.Tensor | None = None,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
    compute_dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Dequantise, multiply: the oracle of the product alone, on the same e4m3 values."""
    x_, weight_ = (t.data.to(compute_dtype) * t.scale.to(compute_dtype) for t in (x, weight))
    return torch.nn.functional.linear(x_, weight_, None if bias is None else bias.to(compute_dtype)).to(out_dtype)
