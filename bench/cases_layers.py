"""Workloads of the layer ops. Baselines round and lay out as diffusers' SD3 (of SwiGLU: FLUX.2) and VAE do, eager."""

from __future__ import annotations

import torch
import torch.nn.functional as F

import advgrpo_kernels as k

from .workload import Bench, Workload, nbytes


def _tokens(bench: Bench, width: int | None = None) -> torch.Tensor:
    sizes = bench.sizes
    return bench.randn(sizes.batch, sizes.tokens, width or sizes.channels, dtype=bench.dtype)


def _modulation(bench: Bench, count: int) -> list[torch.Tensor]:
    """[B, C] chunks of one linear's output, as AdaLN makes them."""
    sizes = bench.sizes
    return list(bench.randn(sizes.batch, count * sizes.channels, dtype=bench.dtype).chunk(count, dim=1))


def _modulate(normed: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return normed * (1 + scale[:, None]) + shift[:, None]


def _norm(x: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def qk_rms_norm(bench: Bench) -> Workload:
    """Four norms, three concatenations and the transposes of a joint attention."""
    sizes = bench.sizes
    shape = (sizes.batch, sizes.tokens, 3, sizes.heads, sizes.head_dim)
    qkv = bench.randn(*shape, dtype=bench.dtype)
    txt = bench.randn(shape[0], sizes.text, *shape[2:], dtype=bench.dtype)
    weights, txt_weights = ([bench.randn(sizes.head_dim, dtype=bench.dtype) for _ in range(2)] for _ in range(2))

    def rms(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        normed = x * torch.rsqrt(x.to(bench.wide).square().mean(-1, keepdim=True) + 1e-6)
        return normed.to(weight.dtype) * weight

    def eager():
        streams = []
        for x, (q_weight, k_weight) in ((qkv, weights), (txt, txt_weights)):
            q, key, value = (part.transpose(1, 2) for part in x.unbind(2))
            streams.append((rms(q, q_weight), rms(key, k_weight), value))
        return [torch.cat(pair, dim=2) for pair in zip(*streams)]

    def ours():
        return k.qk_rms_norm(qkv, weights, txt_qkv=txt, txt_weights=txt_weights)

    return Workload(ours, eager, 2 * nbytes(qkv, txt))


def _rotary(bench: Bench, *by_head: int) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """qkv as one product, the norms of q and k, and cos and sin, for all heads or by so many."""
    sizes = bench.sizes
    tokens = sizes.tokens + sizes.text
    qkv = bench.randn(sizes.batch, tokens, 3, sizes.heads, sizes.head_dim, dtype=bench.dtype)
    weights = [bench.randn(sizes.head_dim, dtype=bench.dtype) for _ in range(2)]
    angles = bench.randn(*by_head, tokens, sizes.head_dim // 2)
    return qkv, weights, angles.cos(), angles.sin()


def qk_rms_norm_rotary(bench: Bench) -> Workload:
    """Two norms and two rotations of FLUX.1's blocks of one stream, whose q, k and v are one product."""
    qkv, weights, cos, sin = _rotary(bench)
    both = [turn.repeat_interleave(2, dim=1)[:, None] for turn in (cos, sin)]

    def turned(x: torch.Tensor) -> torch.Tensor:
        even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
        swapped = torch.stack([-odd, even], dim=-1).flatten(-2)
        return (x.to(bench.wide) * both[0] + swapped.to(bench.wide) * both[1]).to(x.dtype)

    def eager():
        q, key, value = qkv.unbind(2)
        normed = (F.rms_norm(x, x.shape[-1:], weight, 1e-6) for x, weight in zip((q, key), weights))
        return [x.transpose(1, 2) for x in (*map(turned, normed), value)]

    def ours():
        return k.qk_rms_norm(qkv, weights, rotary=(cos, sin))

    return Workload(ours, eager, 2 * nbytes(qkv[:, :, :2]) + nbytes(cos, sin))  # value stays where it is


def qk_rms_norm_rotary_half(bench: Bench) -> Workload:
    """The same of halves as pairs with tables by head, as LTX-2's (norms of each head here), by `rotate_half`."""
    qkv, weights, cos, sin = _rotary(bench, bench.sizes.heads)
    both = [torch.cat([turn, turn], dim=-1) for turn in (cos, sin)]

    def turned(x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim=-1)
        swapped = torch.cat([-second, first], dim=-1)
        return (x.to(bench.wide) * both[0] + swapped.to(bench.wide) * both[1]).to(x.dtype)

    def eager():
        q, key, value = (part.transpose(1, 2) for part in qkv.unbind(2))
        normed = (F.rms_norm(x, x.shape[-1:], weight, 1e-6) for x, weight in zip((q, key), weights))
        return [*map(turned, normed), value]

    def ours():
        return k.qk_rms_norm(qkv, weights, rotary=(cos, sin), rotary_pairs="half")

    return Workload(ours, eager, 2 * nbytes(qkv[:, :, :2]) + nbytes(cos, sin))  # value stays where it is


def ada_layer_norm(bench: Bench) -> Workload:
    """The two modulated norms of a dual-attention block."""
    x, (shift, scale, shift2, scale2) = _tokens(bench), _modulation(bench, 4)

    def eager():
        normed = _norm(x)
        return _modulate(normed, shift, scale), _modulate(normed, shift2, scale2)

    return Workload(lambda: k.ada_layer_norm(x, shift, scale, shift2, scale2), eager, 3 * nbytes(x))


def ada_layer_norm_backward(bench: Bench) -> Workload:
    """The same with the gradient of x."""
    forward, (x, dy, dy2) = _modulation(bench, 4), (_tokens(bench) for _ in range(3))
    x.requires_grad_()
    shift, scale, shift2, scale2 = forward

    def eager():
        normed = _norm(x)
        return torch.autograd.grad((_modulate(normed, shift, scale), _modulate(normed, shift2, scale2)), x, (dy, dy2))

    def ours():
        return torch.autograd.grad(k.ada_layer_norm(x, shift, scale, shift2, scale2), x, (dy, dy2))

    return Workload(ours, eager, 3 * nbytes(x) + 4 * nbytes(x))


def gated_residual(bench: Bench) -> Workload:
    """The attention's result added to the residual, and the feed-forward layer's norm of the sum."""
    residual, out = _tokens(bench), _tokens(bench)
    gate, shift, scale = _modulation(bench, 3)

    def eager():
        hidden = residual + gate[:, None] * out
        return hidden, _norm(hidden) * (1 + scale[:, None]) + shift[:, None]

    return Workload(
        lambda: k.gated_residual(residual, out, gate, shift=shift, scale=scale), eager, 4 * nbytes(residual)
    )


def gelu(bench: Bench) -> Workload:
    """Bias and GELU between the two linears of a feed-forward layer."""
    x, bias = _tokens(bench, bench.sizes.mlp), bench.randn(bench.sizes.mlp, dtype=bench.dtype)
    return Workload(lambda: k.gelu(x, bias), lambda: F.gelu(x + bias, approximate="tanh"), 2 * nbytes(x))


def swiglu(bench: Bench) -> Workload:
    """Gate and value between the two linears of a gated feed-forward layer of that hidden width, as in FLUX.2."""
    x = _tokens(bench, 2 * bench.sizes.mlp)

    def eager():
        gate, value = x.chunk(2, dim=-1)
        return F.silu(gate) * value

    return Workload(lambda: k.swiglu(x), eager, nbytes(x) * 3 // 2)


def group_norm(bench: Bench) -> Workload:
    """A norm with SiLU of the VAE decoder's last block; x is larger than the L2, so its statistics are a read of their
    own."""
    images, channels, side = bench.sizes.decoded
    x = bench.randn(images, channels, side, side, dtype=bench.dtype).to(memory_format=torch.channels_last)
    weight, bias = (bench.randn(channels, dtype=bench.dtype) for _ in range(2))

    def eager():
        return F.silu(F.group_norm(x, 32, weight, bias, 1e-6))

    return Workload(lambda: k.group_norm(x, 32, weight, bias, silu=True), eager, 3 * nbytes(x))


def fp8_quantize(bench: Bench) -> Workload:
    """A linear's input, one scale per row."""
    x = _tokens(bench)
    rows = x.numel() // x.shape[-1]
    moved = nbytes(x) + x.numel() + 4 * rows
    return Workload(lambda: k.fp8_quantize(x), lambda: k.fp8_quantize_ref(x, compute_dtype=bench.wide), moved)


def fp8_linear(bench: Bench) -> Workload:
    """The first linear of a feed-forward layer on quantised inputs, against the bf16 linear."""
    sizes = bench.sizes
    x, weight = _tokens(bench), bench.randn(sizes.mlp, sizes.channels, dtype=bench.dtype) / sizes.channels**0.5
    x8, weight8 = (k.fp8_quantize(t.to(bench.dtype)) for t in (x, weight))
    out = bench.wide if bench.exact else torch.bfloat16
    flops = 2 * sizes.batch * sizes.tokens * sizes.channels * sizes.mlp
    moved = x.numel() + weight.numel() + 2 * sizes.batch * sizes.tokens * sizes.mlp
    return Workload(
        lambda: k.fp8_linear(x8, weight8),
        lambda: F.linear(x, weight),
        moved,
        flops,
        same=lambda: k.fp8_linear_ref(x8, weight8, out_dtype=out, compute_dtype=bench.wide),
    )
