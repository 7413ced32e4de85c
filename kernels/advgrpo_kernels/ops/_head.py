"""Launches of the two-layer head on frozen features, shared by `score_features` and `hinge_head_loss`.

Rows are the feature vectors the head sees: the B cls features, then the B·n chosen patches image by image. A second
side (generations behind references) continues the count in the same way.

    hidden[r] = w1·f_r/|f_r| + b1     score[r] = w2·gelu(hidden[r]) + b2      (the norm only with `normalize`)
    d hidden  = d score·w2·gelu'(hidden)     dw1 = Σ_r d hidden[r] ⊗ f_r/|f_r|     and so on

Legend:   B images, n chosen of P stored patches per image, R = B·(n+1) rows, D feature width, H hidden width.
Numerics: float32 accumulation of products in tf32x3 (three tf32 tensor-core products per float32 product, close to
          float32). Each gradient element is summed by one program in the order of the rows: no atomics.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

from .._runtime import HAS_TRITON, device_guard

BLOCK_R, BLOCK_H, BLOCK_D = 64, 128, 32  # forward: rows, hidden units and features per step
GRAD_H, GRAD_D = 64, 64  # backward: tile of w1 per program
WARPS = 8  # with 4 the forward spills 32 bytes
COUNTS = ("B", "B2")  # images: they differ from call to call where processes share a batch; one kernel for all

if HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def tile_rows(
        cls_ptr,
        patches_ptr,
        indices_ptr,
        cls2_ptr,
        patches2_ptr,
        tile,
        B,
        B2,
        n,
        P,
        D,
        BLOCK_R: tl.constexpr,
    ):
        """Tile of BLOCK_R rows of one kind: (base pointer, element offsets, row numbers, valid, present).

        A tile never mixes cls and patch rows, so its base pointer is one scalar and the offsets are multiples of D,
        which the compiler needs to see for 128-bit loads.
        """
        row = 0
        if cls2_ptr is not None:
            second = tile >= tl.cdiv(B, BLOCK_R) + tl.cdiv(B * n, BLOCK_R)
            tile -= tl.where(second, tl.cdiv(B, BLOCK_R) + tl.cdiv(B * n, BLOCK_R), 0)
            row += tl.where(second, B * (n + 1), 0)
            cls_ptr, patches_ptr = tl.where(second, cls2_ptr, cls_ptr), tl.where(second, patches2_ptr, patches_ptr)
            B = tl.where(second, B2, B)
        is_patch = tile >= tl.cdiv(B, BLOCK_R)
        local = (tile - tl.where(is_patch, tl.cdiv(B, BLOCK_R), 0)) * BLOCK_R + tl.arange(0, BLOCK_R)
        valid = local < tl.where(is_patch, B * n, B)
        patch = (local % n).to(tl.int64)
        if indices_ptr is not None:
            patch = tl.load(indices_ptr + local, mask=local < tl.where(is_patch, B * n, 0), other=0)
        present = valid & (patch >= 0) & (patch < P)
        vector = tl.where(is_patch, (local // n).to(tl.int64) * P + patch, local.to(tl.int64))
        row += tl.where(is_patch, B, 0)
        return tl.where(is_patch, patches_ptr, cls_ptr), vector * D, row + local, valid, present

    @triton.jit(do_not_specialize=COUNTS)
    def _head_rows_kernel(
        cls_ptr,
        patches_ptr,
        indices_ptr,
        cls2_ptr,
        patches2_ptr,
        w1_ptr,
        b1_ptr,
        w2_ptr,
        b2_ptr,
        scores_ptr,
        hidden_ptr,
        inverse_norm_ptr,
        B,
        B2,
        n,
        P,
        D,
        H,
        NORMALIZE: tl.constexpr,
        STORE_HIDDEN: tl.constexpr,
        D_TILES: tl.constexpr,
        H_TILES: tl.constexpr,
        BLOCK_R: tl.constexpr,
        BLOCK_H: tl.constexpr,
        BLOCK_D: tl.constexpr,
    ):
        base, offset, row, valid, present = tile_rows(
            cls_ptr, patches_ptr, indices_ptr, cls2_ptr, patches2_ptr, tl.program_id(0), B, B2, n, P, D, BLOCK_R
        )
        scale = tl.where(present, 1.0, float("nan"))
        if NORMALIZE:
            scale = scale * _inverse_norms(base, offset, present, D, D_TILES, BLOCK_R, BLOCK_D)
        score = tl.zeros((BLOCK_R,), tl.float32) + tl.load(b2_ptr)
        d = tl.arange(0, BLOCK_D)
        for h_tile in range(H_TILES):
            h = h_tile * BLOCK_H + tl.arange(0, BLOCK_H)
            products = tl.zeros((BLOCK_R, BLOCK_H), tl.float32)
            for d_tile in range(D_TILES):
                column = d_tile * BLOCK_D + d
                inside = column < D
                mask = present[:, None] & inside[None, :]
                x = tl.load(base + offset[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)
                w1_mask = inside[:, None] & (h < H)[None, :]
                w1 = tl.load(w1_ptr + h[None, :] * D + column[:, None], mask=w1_mask, other=0.0)
                products = tl.dot(x, w1, products, input_precision="tf32x3")
            b1 = tl.load(b1_ptr + h, mask=h < H, other=0.0)
            w2 = tl.load(w2_ptr + h, mask=h < H, other=0.0)
            hidden = tl.fma(products, scale[:, None], b1[None, :])
            if STORE_HIDDEN:
                store_mask = valid[:, None] & (h < H)[None, :]
                tl.store(hidden_ptr + row.to(tl.int64)[:, None] * H + h[None, :], hidden, mask=store_mask)
            score += tl.sum(0.5 * hidden * (1.0 + tl.erf(hidden * 0.7071067811865476)) * w2[None, :], axis=1)
        tl.store(scores_ptr + row, score, mask=valid)
        if STORE_HIDDEN:
            tl.store(inverse_norm_ptr + row, scale, mask=valid)

    @triton.jit
    def _inverse_norms(base, offset, present, D, D_TILES: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
        squares = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
        for d_tile in range(D_TILES):
            column = d_tile * BLOCK_D + tl.arange(0, BLOCK_D)
            mask = present[:, None] & (column < D)[None, :]
            x = tl.load(base + offset[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)
            squares = tl.fma(x, x, squares)
        return tl.div_rn(1.0, tl.maximum(tl.sqrt_rn(tl.sum(squares, axis=1)), 1e-12))

    @triton.jit(do_not_specialize=COUNTS)
    def _head_bwd_kernel(
        cls_ptr,
        patches_ptr,
        indices_ptr,
        cls2_ptr,
        patches2_ptr,
        w2_ptr,
        hidden_ptr,
        inverse_norm_ptr,
        grad_scores_ptr,
        upstream_ptr,
        w1_grad_ptr,
        b1_grad_ptr,
        w2_grad_ptr,
        b2_grad_ptr,
        B,
        B2,
        n,
        P,
        D,
        H,
        R_TILES: tl.constexpr,
        BLOCK_R: tl.constexpr,
        BLOCK_H: tl.constexpr,
        BLOCK_D: tl.constexpr,
    ):
        h = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
        d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        w2 = tl.load(w2_ptr + h, mask=h < H, other=0.0)
        upstream = 1.0 if upstream_ptr is None else tl.load(upstream_ptr)
        w1_grad = tl.zeros((BLOCK_H, BLOCK_D), tl.float32)
        b1_grad = tl.zeros((BLOCK_H,), tl.float32)
        w2_grad = tl.zeros((BLOCK_H,), tl.float32)
        b2_grad = tl.zeros((BLOCK_R,), tl.float32)
        for r_tile in range(R_TILES):
            base, offset, row, valid, present = tile_rows(
                cls_ptr, patches_ptr, indices_ptr, cls2_ptr, patches2_ptr, r_tile, B, B2, n, P, D, BLOCK_R
            )
            mask = present[:, None] & (d < D)[None, :]
            x = tl.load(base + offset[:, None] + d[None, :], mask=mask, other=0.0).to(tl.float32)
            x = x * tl.load(inverse_norm_ptr + row, mask=valid, other=0.0)[:, None]
            hidden_mask = valid[:, None] & (h < H)[None, :]
            hidden_at = hidden_ptr + row.to(tl.int64)[:, None] * H + h[None, :]
            hidden = tl.load(hidden_at, mask=hidden_mask, other=0.0)
            grad_score = tl.load(grad_scores_ptr + row, mask=valid, other=0.0) * upstream
            cdf = 0.5 * (1.0 + tl.erf(hidden * 0.7071067811865476))
            slope = cdf + hidden * 0.3989422804014327 * tl.exp(-0.5 * hidden * hidden)
            hidden_grad = grad_score[:, None] * w2[None, :] * slope
            w1_grad = tl.dot(tl.trans(hidden_grad), x, w1_grad, input_precision="tf32x3")
            b1_grad += tl.sum(hidden_grad, axis=0)
            w2_grad += tl.sum(grad_score[:, None] * hidden * cdf, axis=0)
            b2_grad += grad_score
        tl.store(w1_grad_ptr + h[:, None] * D + d[None, :], w1_grad, mask=(h < H)[:, None] & (d < D)[None, :])
        if tl.program_id(1) == 0:
            tl.store(b1_grad_ptr + h, b1_grad, mask=h < H)
            tl.store(w2_grad_ptr + h, w2_grad, mask=h < H)
            if tl.program_id(0) == 0:
                tl.store(b2_grad_ptr, tl.sum(b2_grad, axis=0))


def coarse(tiles: int) -> int:
    """`tiles` rounded up to one of eight steps per octave: loop lengths are compiled in, and each is another kernel.

    A process's share of a batch differs in every update; 20 to 32 tiles are four kernels so. Tiles beyond the rows load
    nothing and add zeros.
    """
    step = max(1, (1 << (tiles - 1).bit_length()) // 8)
    return -(-tiles // step) * step


class Rows(NamedTuple):
    """The feature rows of a call; `cls2` and `patches2` are the second side, if any."""

    cls: torch.Tensor  # [B, D]
    patches: torch.Tensor  # [B, P, D] in the dtype of cls
    indices: torch.Tensor | None  # [B, n] int64; None takes all P
    cls2: torch.Tensor | None = None  # [B2, D]
    patches2: torch.Tensor | None = None  # [B2, P, D]

    def sizes(self) -> tuple[int, int, int, int, int]:
        """(B, B2, n, P, D)."""
        B, P, D = self.patches.shape
        n = P if self.indices is None else self.indices.shape[1]
        return B, 0 if self.cls2 is None else self.cls2.shape[0], n, P, D

    def tiles(self) -> int:
        B, B2, n, _, _ = self.sizes()
        return sum(triton.cdiv(count, BLOCK_R) for count in (B, B * n, B2, B2 * n))


def launch_rows(
    rows: Rows, head: tuple[torch.Tensor, ...], *, normalize: bool, store_hidden: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(scores [R], hidden [R, H], factor of each feature vector [R]), one launch; the last two empty if not stored."""
    w1, b1, w2, b2 = head
    B, B2, n, P, D = rows.sizes()
    H, R = w1.shape[0], (B + B2) * (n + 1)
    scores = w1.new_empty(R)
    hidden, inverse_norm = w1.new_empty((R, H) if store_hidden else 0), w1.new_empty(R if store_hidden else 0)
    with device_guard(w1):
        _head_rows_kernel[(rows.tiles(),)](
            *(*rows, w1, b1, w2, b2, scores, hidden, inverse_norm),
            *(B, B2, n, P, D, H),
            NORMALIZE=normalize,
            STORE_HIDDEN=store_hidden,
            D_TILES=triton.cdiv(D, BLOCK_D),
            H_TILES=triton.cdiv(H, BLOCK_H),
            BLOCK_R=BLOCK_R,
            BLOCK_H=BLOCK_H,
            BLOCK_D=BLOCK_D,
            num_warps=WARPS,
        )
    return scores, hidden, inverse_norm


def launch_head_gradients(
    rows: Rows,
    w2: torch.Tensor,
    hidden: torch.Tensor,
    inverse_norm: torch.Tensor,
    grad_scores: torch.Tensor,
    upstream: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of (w1, b1, w2, b2) from d score [R], times the scalar `upstream` if given, in one launch."""
    B, B2, n, P, D = rows.sizes()
    H = w2.shape[1]
    grads = w2.new_empty(H, D), w2.new_empty(H), w2.new_empty(1, H), w2.new_empty(1)
    with device_guard(w2):
        _head_bwd_kernel[(triton.cdiv(H, GRAD_H), triton.cdiv(D, GRAD_D))](
            *(*rows, w2, hidden, inverse_norm, grad_scores, upstream, *grads),
            *(B, B2, n, P, D, H),
            R_TILES=coarse(rows.tiles()),
            BLOCK_R=BLOCK_R,
            BLOCK_H=GRAD_H,
            BLOCK_D=GRAD_D,
            num_warps=WARPS,
        )
    return grads


def head_tensors(head: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """(w1, b1, w2, b2), contiguous float32."""
    return tuple(head[name].float().contiguous() for name in ("w1", "b1", "w2", "b2"))
