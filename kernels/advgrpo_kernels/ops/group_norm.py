"""GroupNorm, and SiLU behind it: y = silu((x - mean)/sqrt(var + eps)·weight + bias), as image decoders want it.

Three launches: mean and M2 = Σ(x - mean)² of every channel over stretches of pixels, scale and shift of every channel
from them, and one pass that writes the result. x is read twice and y written once.

    within a stretch        Welford's update (Technometrics 4, 1962), a chain of TILES_PER_STRETCH pixels per lane
    lanes, then stretches   mean = Σ n_s mean_s / n,  M2 = Σ M2_s + Σ n_s (mean_s - mean)²
    step by step            the same of two parts (Chan, Golub and LeVeque, COMPSTAT 1982), where stretches are many
    var of a group          mean of its channels' variances + variance of their means

Nothing is squared before a mean is taken from it, so neither a far mean nor a pixel that is far from all others costs
digits, wherever it lies.

Shapes:   B images, C channels in G groups, N = H·W pixels. x [B, C, H, W], weight, bias [C] -> y as x.
Memory:   channels_last or contiguous; y lies as x does.
Numerics: float32 inside, one rounding. Fixed reduction trees, no atomics; nothing depends on the batch.
Gradient: none, for inference.
"""

from __future__ import annotations

import torch

from .._ops import add_op_namespace_prefix
from .._runtime import HAS_TRITON, check_tensors, device_guard
from . import _cpu_layers
from ._layers import FLOATS, check_float, pick_layer_backend

__all__ = ["group_norm", "group_norm_ref"]

# (pixels, channels) that a program holds at once, by whether channels lie side by side in memory.
TILES = {True: (32, 128), False: (1024, 4)}
TILES_PER_STRETCH = 16  # of one program
STRETCHES = 256  # put together at once
WARPS = 8

if HAS_TRITON:
    import triton
    import triton.language as tl

    from .swiglu import silu

    @triton.jit
    def _tile(C, N, b, p, c, CHANNELS_LAST: tl.constexpr):
        """Offsets [pixels, channels] in x, and which exist."""
        inside = (p < N)[:, None] & (c < C)[None, :]
        image = b.to(tl.int64) * C * N
        if CHANNELS_LAST:
            return image + p.to(tl.int64)[:, None] * C + c[None, :], inside
        return image + c.to(tl.int64)[None, :] * N + p[:, None], inside

    @triton.jit
    def _combined(counts, means, m2):
        """Mean and M2 [columns] of parts [rows, columns] of so many pixels each; a part of none counts nothing."""
        n = tl.sum(counts, axis=0)
        mean = tl.sum(counts * means, axis=0) / tl.maximum(n, 1.0)
        apart = means - mean[None, :]
        return mean, tl.sum(m2 + counts * apart * apart, axis=0)

    @triton.jit
    def _group_norm_moments_kernel(
        x_ptr, moments_ptr, C, N, stretches,
        CHANNELS_LAST: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr, TILES: tl.constexpr,
    ):  # fmt: skip
        """moments [B, stretches, 2, C]: mean and M2 of every channel over one stretch of pixels."""
        stretch, b = tl.program_id(0), tl.program_id(2)
        c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
        mean = tl.zeros([PIXELS, CHANNELS], tl.float32)
        m2 = tl.zeros([PIXELS, CHANNELS], tl.float32)
        for i in range(TILES):
            p = (stretch * TILES + i) * PIXELS + tl.arange(0, PIXELS)
            offsets, inside = _tile(C, N, b, p, c, CHANNELS_LAST)
            x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
            apart = tl.where(inside, x - mean, 0.0)  # a lane's pixels end together with the image's
            mean += apart * (1.0 / (i + 1))
            m2 += tl.where(inside, apart * (x - mean), 0.0)
        left = N - stretch * TILES * PIXELS - tl.arange(0, PIXELS)
        counts = tl.minimum(tl.maximum((left + PIXELS - 1) // PIXELS, 0), TILES).to(tl.float32)
        mean, m2 = _combined(counts[:, None], mean, m2)
        row = (b.to(tl.int64) * stretches + stretch) * 2 * C + c
        tl.store(moments_ptr + row, mean, mask=c < C)
        tl.store(moments_ptr + row + C, m2, mask=c < C)

    @triton.jit
    def _group_norm_scales_kernel(
        moments_ptr, weight_ptr, bias_ptr, scales_ptr, C, N, stretches, pixels, eps,
        WIDTH: tl.constexpr, CHANNELS: tl.constexpr, STRETCHES: tl.constexpr, STEPS: tl.constexpr,
    ):  # fmt: skip
        """scales [B, 2, C]: what x is multiplied by, and what is added, of one group of WIDTH channels."""
        b, own = tl.program_id(1), tl.arange(0, CHANNELS)
        c = tl.program_id(0) * WIDTH + own
        inside = own < WIDTH
        mean = tl.zeros([CHANNELS], tl.float32)
        m2 = tl.zeros([CHANNELS], tl.float32)
        done = 0
        for i in range(STEPS):
            stretch = i * STRETCHES + tl.arange(0, STRETCHES)
            offsets = (b.to(tl.int64) * stretches + stretch)[:, None] * 2 * C + c[None, :]
            mask = (stretch < stretches)[:, None] & inside[None, :]
            counts = tl.minimum(tl.maximum(N - stretch * pixels, 0), pixels).to(tl.float32)
            means = tl.load(moments_ptr + offsets, mask=mask, other=0.0)
            m2s = tl.load(moments_ptr + offsets + C, mask=mask, other=0.0)
            mean_here, m2_here = _combined(counts[:, None], means, m2s)
            before, here = tl.minimum(done, N) * 1.0, tl.minimum(N - done, STRETCHES * pixels) * 1.0
            share = here / (before + here)
            apart = mean_here - mean
            mean += apart * share
            m2 += m2_here + apart * apart * before * share
            done += STRETCHES * pixels
        variance = m2 / N
        group_mean = tl.sum(tl.where(inside, mean, 0.0), axis=0) / WIDTH
        apart = tl.where(inside, mean - group_mean, 0.0)
        group_variance = tl.sum(tl.where(inside, variance, 0.0) + apart * apart, axis=0) / WIDTH
        scale = tl.rsqrt(group_variance + eps) * tl.load(weight_ptr + c, mask=inside, other=0.0).to(tl.float32)
        shift = tl.load(bias_ptr + c, mask=inside, other=0.0).to(tl.float32) - group_mean * scale
        row = b.to(tl.int64) * 2 * C + c
        tl.store(scales_ptr + row, scale, mask=inside)
        tl.store(scales_ptr + row + C, shift, mask=inside)

    @triton.jit
    def _group_norm_fwd_kernel(
        x_ptr, scales_ptr, y_ptr, C, N,
        SILU: tl.constexpr, CHANNELS_LAST: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
    ):  # fmt: skip
        b = tl.program_id(2)
        p = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
        c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
        offsets, inside = _tile(C, N, b, p, c, CHANNELS_LAST)
        row = b.to(tl.int64) * 2 * C + c
        scale = tl.load(scales_ptr + row, mask=c < C, other=0.0)[None, :]
        shift = tl.load(scales_ptr + row + C, mask=c < C, other=0.0)[None, :]
        y = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32) * scale + shift
        if SILU:
            y = silu(y)
        tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=inside)


@torch.library.custom_op(add_op_namespace_prefix("group_norm"), mutates_args=())
def _group_norm_op(
    x: torch.Tensor, groups: int, weight: torch.Tensor, bias: torch.Tensor, eps: float, silu: bool
) -> torch.Tensor:
    channels_last = x.is_contiguous(memory_format=torch.channels_last)  # also where both are true: the faster one
    x = x if channels_last else x.contiguous()
    y = torch.empty_like(x)
    if x.numel():
        with device_guard(x):
            _launch(x, groups, weight.contiguous(), bias.contiguous(), y, eps, silu, channels_last)
    return y


@_group_norm_op.register_fake
def _(x, groups, weight, bias, eps, silu):
    return torch.empty_like(x if x.is_contiguous(memory_format=torch.channels_last) else x.contiguous())


def _launch(x, groups, weight, bias, y, eps, silu, channels_last) -> None:
    B, C, H, W = x.shape
    N, (pixels, channels) = H * W, TILES[channels_last]
    channels = min(channels, triton.next_power_of_2(C))
    stretches = triton.cdiv(N, TILES_PER_STRETCH * pixels)
    moments = torch.empty((B, stretches, 2, C), dtype=torch.float32, device=x.device)
    scales = torch.empty((B, 2, C), dtype=torch.float32, device=x.device)
    blocks, tile = triton.cdiv(C, channels), {"PIXELS": pixels, "CHANNELS": channels}
    _group_norm_moments_kernel[stretches, blocks, B](
        *(x, moments, C, N, stretches), CHANNELS_LAST=channels_last, **tile, TILES=TILES_PER_STRETCH, num_warps=WARPS
    )
    at_once = min(STRETCHES, triton.next_power_of_2(stretches))
    _group_norm_scales_kernel[groups, B](
        *(moments, weight, bias, scales, C, N, stretches, TILES_PER_STRETCH * pixels, eps),
        WIDTH=C // groups,
        CHANNELS=triton.next_power_of_2(C // groups),
        STRETCHES=at_once,
        STEPS=triton.cdiv(stretches, at_once),
        num_warps=4,
    )
    _group_norm_fwd_kernel[triton.cdiv(N, pixels), blocks, B](
        *(x, scales, y, C, N), SILU=silu, CHANNELS_LAST=channels_last, **tile, num_warps=WARPS
    )


def group_norm(
    x: torch.Tensor,
    groups: int,
    weight: torch.Tensor,
    bias: torch.Tensor,
    *,
    eps: float = 1e-6,
    silu: bool = False,
    backend: str = "auto",
) -> torch.Tensor:
    """GroupNorm over `groups` runs of channels, with SiLU behind it where `silu`.

    Args:
        x: [B, C, H, W] float32, float16 or bfloat16; the result lies in memory as x does, contiguous where x is neither
            that nor channels_last.
        groups: divides C.
        weight, bias: [C] any of these dtypes.

    Raises:
        ValueError: names the argument that does not fit.
        RuntimeError: backend="triton" or "cpu" with an argument that requires a gradient; "cpu" with x in another order
            than channels_last.
    """
    check_tensors(x=x, weight=weight, bias=bias)
    if x.dim() != 4 or x.dtype not in FLOATS or not x.shape[1]:
        raise ValueError(f"x must be floating point [B, C, H, W], got {x.dtype} {list(x.shape)}")
    if groups < 1 or x.shape[1] % groups:
        raise ValueError(f"groups = {groups} must divide the {x.shape[1]} channels of x")
    for name, tensor in (("weight", weight), ("bias", bias)):
        check_float(name, tensor, (x.shape[1],), x.device)
    given = {"x": x, "weight": weight, "bias": bias}
    chosen = pick_layer_backend(backend, [], given, cpu=x.is_contiguous(memory_format=torch.channels_last))
    if chosen == "torch":
        return group_norm_ref(x, groups, weight, bias, eps=eps, silu=silu)
    if chosen == "cpu":
        return _cpu_layers.group_norm(x, groups, weight, bias, eps, silu)
    return _group_norm_op(x, groups, weight, bias, eps, silu)


def group_norm_ref(
    x: torch.Tensor,
    groups: int,
    weight: torch.Tensor,
    bias: torch.Tensor,
    *,
    eps: float = 1e-6,
    silu: bool = False,
    compute_dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Plain PyTorch, differentiable in every input.

    Of an x in another dtype no copy in `compute_dtype` is made where nothing needs a gradient: statistics of every
    channel are accumulated straight from its values, and the norm is rounded before SiLU.
    """
    weight, bias = weight.to(compute_dtype), bias.to(compute_dtype)
    trained = torch.is_grad_enabled() and any(t.requires_grad for t in (x, weight, bias))
    if x.dtype == compute_dtype or trained:
        y = torch.nn.functional.group_norm(x.to(compute_dtype), groups, weight, bias, eps)
    else:
        y = _norm_without_copy(x, groups, weight, bias, eps)
    return (torch.nn.functional.silu(y, inplace=not trained) if silu else y).to(x.dtype)


def _norm_without_copy(x, groups, weight, bias, eps) -> torch.Tensor:
    """The norm of x [B, C, H, W] in x's dtype, its statistics in that of weight and bias [C].

    The variance's relative error is the rounding times mean² / variance of a channel, which is small in a VAE.
    """
    batch, channels, height, width = x.shape
    dtype = weight.dtype
    # Rows first, then over them: one float32 chain over all pixels loses three digits.
    mean = x.mean(3, dtype=dtype).mean(2)  # [B, C]
    square = torch.linalg.vector_norm(x, dim=3, dtype=dtype).square_().sum(2).div_(height * width)
    variance = square.addcmul_(mean, mean, value=-1).clamp_min_(0)
    of_means, group_mean = torch.var_mean(mean.view(batch, groups, -1), dim=2, correction=0, keepdim=True)
    inverse = of_means.add_(variance.view(batch, groups, -1).mean(2, keepdim=True)).add_(eps).rsqrt_()
    scale = inverse * weight.view(1, groups, -1)  # [B, G, C / G]
    shift = torch.addcmul(bias.view(1, groups, -1), group_mean, scale, value=-1)
    shift, scale = (t.view(batch, channels, 1, 1) for t in (shift, scale))
    return torch.addcmul(shift, x, scale, out=torch.empty_like(x))
