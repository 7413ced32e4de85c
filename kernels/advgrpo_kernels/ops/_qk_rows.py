"""What the Triton kernels of `qk_rms_norm` do with a tile of rows, the heads of some tokens: norm, turn, and backward.

    n = x·w/sqrt(mean(x²) + eps), y = n turned by the row's angles where there are any

Legend:  R rows of a tile, D head dim.
Lanes:   a tile [R, D], of which neighbours are split where they are pairs. Of halves two tiles [R, D/2], elements i and
         i + D/2, are loaded: a thread then has both of a pair, and no element moves between threads.
"""

from __future__ import annotations

from .._runtime import HAS_TRITON

if HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def rows_of_tile(tile, first_token, T, H, BLOCK_R: tl.constexpr):
        """(token, head, token among image + text, valid) of a tile of (token, head) pairs, heads running fastest."""
        row = tile * BLOCK_R + tl.arange(0, BLOCK_R)
        t = (row // H).to(tl.int64)
        return t, row % H, first_token + t, row < T * H

    @triton.jit
    def lanes_of_tile(D, HALVES: tl.constexpr, BLOCK_D: tl.constexpr):
        """(elements of a row that a tile has, which of them there are); of halves those of the first."""
        if HALVES:
            d = tl.arange(0, BLOCK_D // 2)
            exists = d < D // 2
        else:
            d = tl.arange(0, BLOCK_D)
            exists = d < D
        return d, exists

    @triton.jit
    def turns_of_tile(cos_ptr, sin_ptr, row, valid, D, BLOCK_D: tl.constexpr):
        """cos and sin [R, D/2] of the tables' rows."""
        pair = tl.arange(0, BLOCK_D // 2)
        at = (row * (D // 2))[:, None] + pair[None, :]
        mask = valid[:, None] & (pair < D // 2)[None, :]
        return tl.load(cos_ptr + at, mask=mask, other=1.0), tl.load(sin_ptr + at, mask=mask, other=0.0)

    @triton.jit
    def _turned(first, second, cos, sin):
        """Both elements of pairs; the inverse turn with -sin."""
        return first * cos - second * sin, second * cos + first * sin

    @triton.jit
    def _rotated(x, cos, sin):
        """Tile [R, D] with its pairs of neighbours turned by [R, D/2]."""
        even, odd = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))
        even, odd = _turned(even, odd, cos, sin)
        return tl.reshape(tl.join(even, odd), (x.shape[0], x.shape[1]))

    @triton.jit
    def norm_rows(x_ptr, weight_ptr, out_ptr, cos, sin, load_at, store_at, mask, d, D, eps):
        x = tl.load(x_ptr + load_at, mask=mask, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
        inverse = tl.rsqrt(tl.sum(x * x, axis=1) / D + eps)[:, None]
        y = x * inverse * weight
        if cos is not None:
            y = _rotated(y, cos, sin)
        tl.store(out_ptr + store_at, y.to(out_ptr.dtype.element_ty), mask=mask)

    @triton.jit
    def norm_rows_bwd(x_ptr, weight_ptr, grad_ptr, x_grad_ptr, cos, sin, at_x, at_grad, at_x_grad, mask, d, D, eps):
        x = tl.load(x_ptr + at_x, mask=mask, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
        grad = tl.load(grad_ptr + at_grad, mask=mask, other=0.0).to(tl.float32)
        if cos is not None:
            grad = _rotated(grad, cos, -sin)
        grad = grad * weight
        inverse = tl.rsqrt(tl.sum(x * x, axis=1) / D + eps)[:, None]
        normed = x * inverse
        x_grad = inverse * (grad - normed * (tl.sum(grad * normed, axis=1) / D)[:, None])
        tl.store(x_grad_ptr + at_x_grad, x_grad.to(x_grad_ptr.dtype.element_ty), mask=mask)

    @triton.jit
    def _load_halves(ptr, at, mask, half):
        first = tl.load(ptr + at, mask=mask, other=0.0).to(tl.float32)
        return first, tl.load(ptr + at + half, mask=mask, other=0.0).to(tl.float32)

    @triton.jit
    def _store_halves(ptr, at, mask, half, first, second):
        tl.store(ptr + at, first.to(ptr.dtype.element_ty), mask=mask)
        tl.store(ptr + at + half, second.to(ptr.dtype.element_ty), mask=mask)

    @triton.jit
    def norm_halves(x_ptr, weight_ptr, out_ptr, cos, sin, load_at, store_at, mask, d, D, eps):
        """`norm_rows` of pairs (i, i + D/2)."""
        half = D // 2
        x, x2 = _load_halves(x_ptr, load_at, mask, half)
        weight, weight2 = _load_halves(weight_ptr, d[None, :], (d < half)[None, :], half)
        inverse = tl.rsqrt(tl.sum(x * x + x2 * x2, axis=1) / D + eps)[:, None]
        y, y2 = _turned(x * inverse * weight, x2 * inverse * weight2, cos, sin)
        _store_halves(out_ptr, store_at, mask, half, y, y2)

    @triton.jit
    def norm_halves_bwd(x_ptr, weight_ptr, grad_ptr, x_grad_ptr, cos, sin, at_x, at_grad, at_x_grad, mask, d, D, eps):
        """`norm_rows_bwd` of pairs (i, i + D/2)."""
        half = D // 2
        x, x2 = _load_halves(x_ptr, at_x, mask, half)
        weight, weight2 = _load_halves(weight_ptr, d[None, :], (d < half)[None, :], half)
        grad, grad2 = _load_halves(grad_ptr, at_grad, mask, half)
        grad, grad2 = _turned(grad, grad2, cos, -sin)
        grad, grad2 = grad * weight, grad2 * weight2
        inverse = tl.rsqrt(tl.sum(x * x + x2 * x2, axis=1) / D + eps)[:, None]
        normed, normed2 = x * inverse, x2 * inverse
        along = (tl.sum(grad * normed + grad2 * normed2, axis=1) / D)[:, None]
        x_grad, x_grad2 = inverse * (grad - normed * along), inverse * (grad2 - normed2 * along)
        _store_halves(x_grad_ptr, at_x_grad, mask, half, x_grad, x_grad2)

    @triton.jit
    def copy_rows(from_ptr, to_ptr, load_at, store_at, mask, D, HALVES: tl.constexpr):
        tl.store(to_ptr + store_at, tl.load(from_ptr + load_at, mask=mask, other=0.0), mask=mask)
        if HALVES:
            second = tl.load(from_ptr + load_at + D // 2, mask=mask, other=0.0)
            tl.store(to_ptr + store_at + D // 2, second, mask=mask)
