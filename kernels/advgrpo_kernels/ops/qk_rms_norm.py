"""RMSNorm of q and k over the head dim, with rotary embedding where it is given, ready for attention.

    n = x·w/sqrt(mean(x²) + eps)                 image tokens first, then text tokens
    q[b, h, t, j] = n[j]·cos[t, i] - n[k]·sin[t, i]       (rotary, of pair i = (j, k); else q = n)
    q[b, h, t, k] = n[k]·cos[t, i] + n[j]·sin[t, i]

One launch stands for the four norms, three concatenations and the transposes of SD3.5's joint attention (diffusers'
JointAttnProcessor2_0), and for two rotations besides of FLUX.1's (FluxAttnProcessor; arXiv 2104.09864); without a
context it serves the image-only second attention of the dual blocks. v is moved only where it must be, to join two
tensors; where both streams' linears wrote into one, it is read in place.

Legend:   B images, T image tokens, S text tokens, H heads, D head dim.
          Pairs (2i, 2i + 1), or of halves (i, i + D/2); cos, sin [T + S, D/2] float32, or [H, T + S, D/2] by head.
          qkv [B, T, 3, H, D] (one linear) or three [B, T, H, D] -> query, key, value [B, H, T + S, D]
Memory:   heads lie side by side, as in qkv: query and key are views of [B, T + S, H, D], or of [T + S, B, H, D] where
          qkv is a transposed [T, B, ...]. Attention that keeps the order of its query needs no copy before to_out.
Numerics: float32 inside, one rounding; diffusers rounds again before the product with a half-precision weight, and
          before the rotation. Of halves a sum adds both of a pair first, so its last bit may be another.
Gradient: of the activations, in the layout they came in; the norm weights are frozen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import List, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from .._ops import add_op_namespace_prefix
from .._runtime import HAS_TRITON, check_tensors, device_guard
from .._tuning import Launch, launch_of
from . import _cpu_layers
from ._layers import FLOATS, check_float, given, pick_layer_backend
from ._rotary import RotaryPairs, check_pairs, check_rotary, is_by_head, turned_ref

__all__ = ["AttentionInputs", "qk_rms_norm", "qk_rms_norm_ref"]

ROWS, WARPS = 64, 4  # (token, head) pairs per program, of heads up to 64 wide


def tile_rows(head_dim: int, rows: int = ROWS) -> int:
    """Pairs per program: fewer of wider heads, whose tile is as large and keeps as many registers."""
    return max(1, min(rows, rows * 64 // head_dim))


if HAS_TRITON:
    import triton
    import triton.language as tl

    from ._qk_rows import (
        copy_rows,
        lanes_of_tile,
        norm_halves,
        norm_halves_bwd,
        norm_rows,
        norm_rows_bwd,
        rows_of_tile,
        turns_of_tile,
    )

    @triton.jit
    def _qk_rms_norm_fwd_kernel(
        q_ptr,
        k_ptr,
        v_ptr,
        txt_q_ptr,
        txt_k_ptr,
        txt_v_ptr,
        q_weight_ptr,
        k_weight_ptr,
        txt_q_weight_ptr,
        txt_k_weight_ptr,
        cos_ptr,
        sin_ptr,
        query_ptr,
        key_ptr,
        value_ptr,
        T,
        S,
        H,
        D,
        stride_b,
        stride_t,
        txt_stride_b,
        txt_stride_t,
        out_stride_b,
        out_stride_t,
        eps,
        BY_HEAD: tl.constexpr,
        HALVES: tl.constexpr,
        BLOCK_R: tl.constexpr,
        BLOCK_D: tl.constexpr,
    ):
        b = tl.program_id(1).to(tl.int64)
        tile, first_token, tokens = tl.program_id(0), 0, T + S
        if txt_q_ptr is not None:
            txt = tile >= tl.cdiv(T * H, BLOCK_R)
            tile -= tl.where(txt, tl.cdiv(T * H, BLOCK_R), 0)
            first_token += tl.where(txt, T, 0)
            T = tl.where(txt, S, T)
            q_ptr, k_ptr = tl.where(txt, txt_q_ptr, q_ptr), tl.where(txt, txt_k_ptr, k_ptr)
            if value_ptr is not None:
                v_ptr = tl.where(txt, txt_v_ptr, v_ptr)
            q_weight_ptr = tl.where(txt, txt_q_weight_ptr, q_weight_ptr)
            k_weight_ptr = tl.where(txt, txt_k_weight_ptr, k_weight_ptr)
            stride_b, stride_t = tl.where(txt, txt_stride_b, stride_b), tl.where(txt, txt_stride_t, stride_t)
        t, h, token, valid = rows_of_tile(tile, first_token, T, H, BLOCK_R)
        d, exists = lanes_of_tile(D, HALVES, BLOCK_D)
        mask = valid[:, None] & exists[None, :]
        load_at = (b * stride_b + t * stride_t + h * D)[:, None] + d[None, :]
        store_at = (b * out_stride_b + token * out_stride_t + h * D)[:, None] + d[None, :]
        cos = None  # one by one: Triton 3.3 has no pairs of None
        sin = None
        if cos_ptr is not None:
            turn = token + h * tokens if BY_HEAD else token
            cos, sin = turns_of_tile(cos_ptr, sin_ptr, turn, valid, D, BLOCK_D)
        if HALVES:
            norm_halves(q_ptr, q_weight_ptr, query_ptr, cos, sin, load_at, store_at, mask, d, D, eps)
            norm_halves(k_ptr, k_weight_ptr, key_ptr, cos, sin, load_at, store_at, mask, d, D, eps)
        else:
            norm_rows(q_ptr, q_weight_ptr, query_ptr, cos, sin, load_at, store_at, mask, d, D, eps)
            norm_rows(k_ptr, k_weight_ptr, key_ptr, cos, sin, load_at, store_at, mask, d, D, eps)
        if value_ptr is not None:
            copy_rows(v_ptr, value_ptr, load_at, store_at, mask, D, HALVES)

    @triton.jit
    def _qk_rms_norm_bwd_kernel(
        q_ptr,
        k_ptr,
        txt_q_ptr,
        txt_k_ptr,
        q_weight_ptr,
        k_weight_ptr,
        txt_q_weight_ptr,
        txt_k_weight_ptr,
        cos_ptr,
        sin_ptr,
        query_grad_ptr,
        key_grad_ptr,
        value_grad_ptr,
        q_grad_ptr,
        k_grad_ptr,
        v_grad_ptr,
        txt_q_grad_ptr,
        txt_k_grad_ptr,
        txt_v_grad_ptr,
        T,
        S,
        H,
        D,
        stride_b,
        stride_t,
        txt_stride_b,
        txt_stride_t,
        grad_stride_b,
        grad_stride_h,
        grad_stride_t,
        x_grad_stride_b,
        x_grad_stride_t,
        txt_x_grad_stride_b,
        txt_x_grad_stride_t,
        eps,
        BY_HEAD: tl.constexpr,
        HALVES: tl.constexpr,
        BLOCK_R: tl.constexpr,
        BLOCK_D: tl.constexpr,
    ):
        b = tl.program_id(1).to(tl.int64)
        tile, first_token, tokens = tl.program_id(0), 0, T + S
        if txt_q_ptr is not None:
            txt = tile >= tl.cdiv(T * H, BLOCK_R)
            tile -= tl.where(txt, tl.cdiv(T * H, BLOCK_R), 0)
            first_token += tl.where(txt, T, 0)
            T = tl.where(txt, S, T)
            q_ptr, k_ptr = tl.where(txt, txt_q_ptr, q_ptr), tl.where(txt, txt_k_ptr, k_ptr)
            q_weight_ptr = tl.where(txt, txt_q_weight_ptr, q_weight_ptr)
            k_weight_ptr = tl.where(txt, txt_k_weight_ptr, k_weight_ptr)
            q_grad_ptr, k_grad_ptr = (
                tl.where(txt, txt_q_grad_ptr, q_grad_ptr),
                tl.where(txt, txt_k_grad_ptr, k_grad_ptr),
            )
            if v_grad_ptr is not None:
                v_grad_ptr = tl.where(txt, txt_v_grad_ptr, v_grad_ptr)
            stride_b, stride_t = tl.where(txt, txt_stride_b, stride_b), tl.where(txt, txt_stride_t, stride_t)
            x_grad_stride_b = tl.where(txt, txt_x_grad_stride_b, x_grad_stride_b)
            x_grad_stride_t = tl.where(txt, txt_x_grad_stride_t, x_grad_stride_t)
        t, h, token, valid = rows_of_tile(tile, first_token, T, H, BLOCK_R)
        d, exists = lanes_of_tile(D, HALVES, BLOCK_D)
        mask = valid[:, None] & exists[None, :]
        x_at = (b * stride_b + t * stride_t + h * D)[:, None] + d[None, :]
        load_at = (b * grad_stride_b + h * grad_stride_h + token * grad_stride_t)[:, None] + d[None, :]
        store_at = (b * x_grad_stride_b + t * x_grad_stride_t + h * D)[:, None] + d[None, :]
        cos = None  # one by one: Triton 3.3 has no pairs of None
        sin = None
        if cos_ptr is not None:
            turn = token + h * tokens if BY_HEAD else token
            cos, sin = turns_of_tile(cos_ptr, sin_ptr, turn, valid, D, BLOCK_D)
        if HALVES:
            norm_halves_bwd(
                q_ptr, q_weight_ptr, query_grad_ptr, q_grad_ptr, cos, sin, x_at, load_at, store_at, mask, d, D, eps
            )
            norm_halves_bwd(
                k_ptr, k_weight_ptr, key_grad_ptr, k_grad_ptr, cos, sin, x_at, load_at, store_at, mask, d, D, eps
            )
        else:
            norm_rows_bwd(
                q_ptr, q_weight_ptr, query_grad_ptr, q_grad_ptr, cos, sin, x_at, load_at, store_at, mask, d, D, eps
            )
            norm_rows_bwd(
                k_ptr, k_weight_ptr, key_grad_ptr, k_grad_ptr, cos, sin, x_at, load_at, store_at, mask, d, D, eps
            )
        if value_grad_ptr is not None:
            copy_rows(value_grad_ptr, v_grad_ptr, load_at, store_at, mask, D, HALVES)


class AttentionInputs(NamedTuple):
    """Result of `qk_rms_norm`, in the shape that scaled_dot_product_attention takes; strided, heads side by side."""

    query: torch.Tensor  # [B, H, T + S, D]
    key: torch.Tensor  # [B, H, T + S, D]
    value: torch.Tensor  # [B, H, T + S, D]


def _empty(like: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Uninitialised [B, tokens, ...], dense, token after token where `like` has its images closer than its tokens."""
    B, tokens, *rest = shape
    if B > 1 and like.shape[1] > 1 and like.stride(0) < like.stride(1):
        return like.new_empty(tokens, B, *rest).transpose(0, 1)
    return like.new_empty(B, tokens, *rest)


def _split(qkv: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """[q, k, v] or [q, k], each [B, T, H, D] with dense heads and common strides; views of a fused one stay views."""
    parts = list(qkv[0].unbind(2)) if len(qkv) == 1 else list(qkv)
    D = parts[0].shape[3]
    dense = all(p.stride()[2:] == (D, 1) and p.stride() == parts[0].stride() for p in parts)
    return parts if dense else [p.contiguous() for p in parts]


def _streams(qkv, txt_qkv, txt_tokens: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Parts of the image and of the text, which the last `txt_tokens` of qkv are where it has no tensors of its own."""
    if txt_tokens:
        images = qkv[0].shape[1] - txt_tokens
        return _split([t[:, :images] for t in qkv]), _split([t[:, images:] for t in qkv])
    return _split(qkv), _split(txt_qkv) if txt_qkv else []


def _outputs(qkv: Sequence[torch.Tensor], txt_qkv: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Query, key and, where two tensors are joined, value: [B, H, tokens, D]; otherwise an empty one."""
    B, H, D = qkv[0].shape[0], qkv[0].shape[-2], qkv[0].shape[-1]
    tokens = qkv[0].shape[1] + (txt_qkv[0].shape[1] if txt_qkv else 0)
    made = [_empty(qkv[0], (B, tokens, H, D)).transpose(1, 2) for _ in range(3 if txt_qkv else 2)]
    return made if txt_qkv else [*made, qkv[0].new_empty(0)]


def _launch(part: torch.Tensor) -> tuple[int, int]:
    """Pairs per program and warps for a part [B, T, H, D]; what is known of a GPU by name is of heads 64 wide."""
    rows, warps = launch_of("qk_rms_norm", part, Launch(ROWS, WARPS))
    return tile_rows(triton.next_power_of_2(part.shape[-1]), rows), warps


def _geometry(parts: list[torch.Tensor], txt: list[torch.Tensor], rows: int) -> tuple[tuple[int, int], tuple[int, ...]]:
    """(grid, (T, S, H, D, strides of the image rows, strides of the text rows))."""
    B, T, H, D = parts[0].shape
    S = txt[0].shape[1] if txt else 0
    return (triton.cdiv(T * H, rows) + triton.cdiv(S * H, rows), B), (T, S, H, D, *_row_strides(parts, txt))


def _row_strides(parts: list[torch.Tensor], txt: list[torch.Tensor]) -> tuple[int, ...]:
    return *parts[0].stride()[:2], *(txt[0].stride()[:2] if txt else (0, 0))


def _pad(tensors: Sequence[torch.Tensor], count: int) -> list[torch.Tensor | None]:
    return [*tensors, *[None] * (count - len(tensors))]


@torch.library.custom_op(add_op_namespace_prefix("qk_rms_norm"), mutates_args=())
def _qk_rms_norm_op(
    qkv: List[torch.Tensor], weights: List[torch.Tensor], txt_qkv: List[torch.Tensor], txt_weights: List[torch.Tensor],
    rotary: List[torch.Tensor], txt_tokens: int, eps: float, halves: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Query, key, value. Two tensors: one fused or three each. One stream or a joint one: (q, k), value empty.

    `rotary` is cos and sin, of all heads or by head, or nothing; `halves`, that pairs are (i, i + D/2), goes with them.
    """
    query, key, value = _outputs(qkv, txt_qkv)
    parts, txt = _streams(qkv, txt_qkv, txt_tokens)
    rows, warps = _launch(parts[0])
    grid, sizes = _geometry(parts, txt, rows)
    if query.numel():
        with device_guard(parts[0]):
            _qk_rms_norm_fwd_kernel[grid](
                *(*_pad(parts, 3), *_pad(txt, 3)),
                *(*(w.contiguous() for w in weights), *_pad([w.contiguous() for w in txt_weights], 2)),
                *_pad(rotary, 2),
                *(query, key, value if txt_qkv else None),
                *(*sizes, query.stride(0), query.stride(2), eps),
                BY_HEAD=is_by_head(rotary),
                HALVES=halves,
                BLOCK_R=rows,
                BLOCK_D=triton.next_power_of_2(sizes[3]),
                num_warps=warps,
            )
    return query, key, value


@_qk_rms_norm_op.register_fake
def _(qkv, weights, txt_qkv, txt_weights, rotary, txt_tokens, eps, halves):
    return tuple(_outputs(qkv, txt_qkv))


def _results(qkv: Sequence[torch.Tensor], txt_qkv: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [_empty(qkv[0], t.shape) for t in [*qkv, *txt_qkv]]


def _with_common_strides(grads: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    same = all(g.stride() == grads[0].stride() and g.stride(3) == 1 for g in grads)
    return list(grads) if same else [g.contiguous() for g in grads]


@torch.library.custom_op(add_op_namespace_prefix("qk_rms_norm_backward"), mutates_args=())
def _qk_rms_norm_backward_op(
    grads: List[torch.Tensor], qkv: List[torch.Tensor], weights: List[torch.Tensor], txt_qkv: List[torch.Tensor],
    txt_weights: List[torch.Tensor], rotary: List[torch.Tensor], txt_tokens: int, eps: float, halves: bool,
) -> List[torch.Tensor]:  # fmt: skip
    """Gradients of the tensors in qkv, then of those in txt_qkv, in one launch; a fused qkv needs that of value."""
    results = _results(qkv, txt_qkv)
    x_grads, txt_grads = _streams(results[: len(qkv)], results[len(qkv) :], txt_tokens)
    parts, txt = _streams(qkv, txt_qkv, txt_tokens)
    rows, warps = _launch(parts[0])
    grid, sizes = _geometry(parts, txt, rows)
    grads = _with_common_strides(grads)
    if grads[0].numel():
        with device_guard(parts[0]):
            _qk_rms_norm_bwd_kernel[grid](
                *(*parts[:2], *_pad(txt[:2], 2)),
                *(*(w.contiguous() for w in weights), *_pad([w.contiguous() for w in txt_weights], 2)),
                *_pad(rotary, 2),
                *(*_pad(grads, 3), *_pad(x_grads, 3), *_pad(txt_grads, 3)),
                *(*sizes, *grads[0].stride()[:3], *_row_strides(x_grads, txt_grads), eps),
                BY_HEAD=is_by_head(rotary),
                HALVES=halves,
                BLOCK_R=rows,
                BLOCK_D=triton.next_power_of_2(sizes[3]),
                num_warps=warps,
            )
    return results


@_qk_rms_norm_backward_op.register_fake
def _(grads, qkv, weights, txt_qkv, txt_weights, rotary, txt_tokens, eps, halves):
    return _results(qkv, txt_qkv)


def _setup_context(ctx, inputs, output):
    groups, ctx.settings = inputs[:5], inputs[5:]
    ctx.counts = [len(group) for group in groups]
    ctx.save_for_backward(*(tensor for group in groups for tensor in group))


def _backward(ctx, *grads):
    saved, groups = list(ctx.saved_tensors), []
    for count in ctx.counts:
        groups.append(saved[:count])
        saved = saved[count:]
    images, weights, texts, txt_weights, turns = ctx.counts
    results = _qk_rms_norm_backward_op(list(grads[: 3 if texts else 2]), *groups, *ctx.settings)
    nothing = [None] * weights, [None] * txt_weights, [None] * turns
    return results[:images], nothing[0], results[images:], *nothing[1:], None, None, None


_qk_rms_norm_op.register_autograd(_backward, setup_context=_setup_context)


class _ValueInPlace(torch.autograd.Function):
    """The op on q and k of a fused tensor, with v a view of it: one kernel then writes the whole gradient."""

    @staticmethod
    def forward(ctx, qkv, txt_tokens, eps, halves, turns, *tensors):
        """tensors: cos and sin where `turns` is 2, not 0, then the weights."""
        ctx.settings, ctx.turns = (txt_tokens, eps, halves), turns
        ctx.save_for_backward(qkv, *tensors)
        q_and_k, rotary, weights = list(qkv.unbind(2)[:2]), list(tensors[:turns]), list(tensors[turns:])
        query, key, _ = _qk_rms_norm_op(q_and_k, weights[:2], [], weights[2:], rotary, *ctx.settings)
        return query, key, qkv.select(2, 2).transpose(1, 2)

    @staticmethod
    def backward(ctx, *grads):
        qkv, *tensors = ctx.saved_tensors
        weights = tensors[ctx.turns :]
        groups = [qkv], weights[:2], [], weights[2:], tensors[: ctx.turns]
        (grad,) = _qk_rms_norm_backward_op(list(grads), *groups, *ctx.settings)
        return grad, None, None, None, None, *[None] * len(tensors)


class _OnCpu(torch.autograd.Function):
    """The same by the CPU's kernel."""

    @staticmethod
    def forward(ctx, qkv, txt_tokens, eps, halves, turns, *tensors):
        """tensors: cos and sin where `turns` is 2, not 0, then the weights; all dense."""
        ctx.txt_tokens, ctx.eps, ctx.halves, ctx.turns = txt_tokens, eps, halves, turns
        ctx.save_for_backward(qkv, *tensors)
        return _forward_on_cpu(qkv, tensors[turns:], tensors[:turns], txt_tokens, eps, halves)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        qkv, *tensors = ctx.saved_tensors
        (qkv_grad,), grads = _results([qkv], []), _with_common_strides(grads)
        turns, images = _cpu_layers.Turns(tensors[: ctx.turns], ctx.halves), qkv.shape[1] - ctx.txt_tokens
        weights, qkv = tensors[ctx.turns :], _dense_heads(qkv)
        _cpu_layers.qk_rms_norm_backward(qkv, weights, turns, images, grads, qkv_grad, ctx.eps)
        return qkv_grad, None, None, None, None, *[None] * len(tensors)


def _forward_on_cpu(qkv, weights, rotary, txt_tokens: int, eps: float, halves: bool) -> tuple[torch.Tensor, ...]:
    """Query, key and value of a fused qkv."""
    B, T, _, H, D = qkv.shape
    query, key = (_empty(qkv, (B, T, H, D)).transpose(1, 2) for _ in range(2))
    turns = _cpu_layers.Turns(rotary, halves)
    _cpu_layers.qk_rms_norm(_dense_heads(qkv), weights, turns, T - txt_tokens, query, key, eps)
    return query, key, qkv.select(2, 2).transpose(1, 2)


def _dense_heads(qkv: torch.Tensor) -> torch.Tensor:
    return qkv if qkv.stride()[3:] == (qkv.shape[4], 1) else qkv.contiguous()


def _check_stream(name: str, qkv, weights) -> tuple[list[torch.Tensor], list[torch.Tensor], tuple[int, ...]]:
    """(tensors, weights, (B, T, H, D)) of one stream.

    Raises:
        ValueError: names the argument that does not fit.
    """
    tensors = [qkv] if isinstance(qkv, torch.Tensor) else list(qkv)
    if not all(isinstance(tensor, torch.Tensor) for tensor in tensors):
        check_tensors(**{f"{name}[{i}]": tensor for i, tensor in enumerate(tensors)})
    first = tensors[0]
    if len(tensors) not in (1, 3) or first.dim() != (5 if len(tensors) == 1 else 4) or first.dtype not in FLOATS:
        raise ValueError(
            f"{name} must be [B, T, 3, H, D] or three [B, T, H, D], got {[list(t.shape) for t in tensors]}"
        )
    B, T, H, D = *first.shape[:2], *first.shape[-2:]
    for tensor in tensors:
        check_float(name, tensor, (B, T, 3, H, D) if len(tensors) == 1 else (B, T, H, D), first.device)
        if tensor.dtype != first.dtype:
            raise ValueError(f"{name}: q, k and v must have one dtype, got {tensor.dtype} and {first.dtype}")
    for weight in weights:
        check_float(f"a weight of {name}", weight, (D,), first.device)
    if len(weights) != 2 or weights[0].dtype != weights[1].dtype:
        raise ValueError(f"{name} needs two weights of one dtype (q, k), got {[w.dtype for w in weights]}")
    return tensors, list(weights), (B, T, H, D)


def _check_text(txt_qkv, txt_weights, txt_tokens, image, weights) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """(tensors, weights) of the text, given apart, as the last tokens of `image`, or not at all.

    Raises:
        ValueError: names the argument that does not fit.
    """
    if (txt_qkv is None and not txt_tokens) != (txt_weights is None):
        raise ValueError("give txt_qkv and txt_weights together, or txt_tokens and txt_weights")
    if txt_weights is None:
        return [], []
    if txt_qkv is None:
        if not 0 < txt_tokens < image.shape[1]:
            raise ValueError(f"txt_tokens must leave image tokens of the {image.shape[1]} in qkv, got {txt_tokens}")
        _, text_weights, _ = _check_stream("qkv", image, txt_weights)
    elif txt_tokens:
        raise ValueError("give txt_qkv or txt_tokens, not both")
    else:
        texts, text_weights, shape = _check_stream("txt_qkv", txt_qkv, txt_weights)
        want = image.shape[0], *image.shape[-2:]
        if (shape[0], *shape[2:]) != want or texts[0].dtype != image.dtype:
            raise ValueError(f"txt_qkv must be {image.dtype} with B, H, D = {want}, got {texts[0].dtype} {shape}")
    if text_weights[0].dtype != weights[0].dtype:
        raise ValueError(f"txt_weights must be {weights[0].dtype} as weights, got {text_weights[0].dtype}")
    return [] if txt_qkv is None else texts, text_weights


def qk_rms_norm(
    qkv: torch.Tensor | Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    *,
    txt_qkv: torch.Tensor | Sequence[torch.Tensor] | None = None,
    txt_weights: Sequence[torch.Tensor] | None = None,
    txt_tokens: int = 0,
    rotary: Sequence[torch.Tensor] | None = None,
    rotary_pairs: RotaryPairs = "interleaved",
    eps: float = 1e-6,
    backend: str = "auto",
) -> AttentionInputs:
    """Normalise q and k, turn them where `rotary` is given, and give q, k, v in attention's shape, image tokens first.

    Args:
        qkv: [B, T, 3, H, D], the output of one linear, or (q, k, v) of [B, T, H, D]; views are read in place.
        weights: (q_weight, k_weight), [D] any float dtype.
        txt_qkv: the text tokens, [B, S, 3, H, D] or three, in the dtype of qkv. Only then is v moved.
        txt_tokens: without txt_qkv: S, the last tokens of a fused qkv [B, T + S, 3, H, D], are text.
        txt_weights: norms of the text.
        rotary: (cos, sin), [T + S, D/2] float32 each, of the tokens in the result's order, or [H, T + S, D/2] by head.
        rotary_pairs: of which elements an angle turns: "interleaved" (2i, 2i + 1), or "half" (i, i + D/2) as
            `rotate_half` does. Checkpoints are trained for one of them, and the other raises no error.

    Raises:
        ValueError: names the argument that does not fit.
        RuntimeError: backend="triton" with a weight that requires a gradient.
    """
    tensors, weights, _ = _check_stream("qkv", qkv, weights)
    if txt_tokens and len(tensors) != 1:
        raise ValueError("txt_tokens needs qkv as one tensor [B, T + S, 3, H, D]")
    texts, text_weights = _check_text(txt_qkv, txt_weights, txt_tokens, tensors[0], weights)
    tokens = tensors[0].shape[1] + (texts[0].shape[1] if texts else 0)
    check_pairs(rotary_pairs, rotary)
    turns, halves = check_rotary(rotary, tokens, tensors[0]), rotary_pairs == "half"
    frozen = {f"norm weight {i}": weight for i, weight in enumerate([*weights, *text_weights])}
    frozen |= {f"rotary[{i}]": turn for i, turn in enumerate(turns)}
    fused = not texts and len(tensors) == 1
    chosen = pick_layer_backend(backend, [*tensors, *texts], frozen, cpu=fused)
    if chosen == "torch":
        return qk_rms_norm_ref(
            qkv,
            weights,
            txt_qkv=txt_qkv,
            txt_weights=txt_weights,
            txt_tokens=txt_tokens,
            rotary=rotary,
            rotary_pairs=rotary_pairs,
            eps=eps,
        )
    if chosen == "cpu":
        own = [weight.contiguous() for weight in (*weights, *text_weights)]
        if not _cpu_layers.learns(tensors[0]):
            return AttentionInputs(*_forward_on_cpu(tensors[0], own, turns, txt_tokens, eps, halves))
        return AttentionInputs(*_OnCpu.apply(tensors[0], txt_tokens, eps, halves, len(turns), *turns, *own))
    if fused:
        own = len(turns), *turns, *weights, *text_weights
        return AttentionInputs(*_ValueInPlace.apply(tensors[0], txt_tokens, eps, halves, *own))
    if texts:
        return AttentionInputs(*_qk_rms_norm_op(tensors, weights, texts, text_weights, turns, 0, eps, halves))
    query, key, _ = _qk_rms_norm_op(tensors[:2], weights, [], [], turns, 0, eps, halves)
    return AttentionInputs(query, key, tensors[2].transpose(1, 2))


def qk_rms_norm_ref(
    qkv: torch.Tensor | Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    *,
    txt_qkv: torch.Tensor | Sequence[torch.Tensor] | None = None,
    txt_weights: Sequence[torch.Tensor] | None = None,
    txt_tokens: int = 0,
    rotary: Sequence[torch.Tensor] | None = None,
    rotary_pairs: RotaryPairs = "interleaved",
    eps: float = 1e-6,
    compute_dtype: torch.dtype = torch.float32,
) -> AttentionInputs:
    """Plain PyTorch, differentiable in every input."""
    check_pairs(rotary_pairs, rotary)

    def split(x):
        return list(x.unbind(2)) if isinstance(x, torch.Tensor) else list(x)

    def normed(x, weight):
        y = x.to(compute_dtype)
        mean_square = torch.linalg.vecdot(y, y).unsqueeze(-1) / y.shape[-1]  # half the time of square().mean() on a CPU
        y = y * torch.rsqrt(mean_square + eps) * weight.to(compute_dtype)
        return y if rotary is not None else y.to(x.dtype)

    if txt_tokens:  # one weight per token, so that nothing has to be joined
        if not isinstance(qkv, torch.Tensor):
            raise ValueError("txt_tokens needs qkv as one tensor [B, T + S, 3, H, D]")
        images = qkv.shape[1] - txt_tokens
        pairs = zip(weights, given("txt_weights", txt_weights))
        weights = [torch.cat([w.expand(images, 1, -1), t.expand(txt_tokens, 1, -1)]) for w, t in pairs]
    joint = split(qkv)
    joint[:2] = [normed(x, weight) for x, weight in zip(joint, weights)]
    if txt_qkv is not None:
        text = split(txt_qkv)
        text[:2] = [normed(x, weight) for x, weight in zip(text, given("txt_weights", txt_weights))]
        joint = [torch.cat(pair, dim=1) for pair in zip(joint, text)]
    if rotary is not None:
        joint[:2] = [turned_ref(y, rotary, rotary_pairs, compute_dtype).to(joint[2].dtype) for y in joint[:2]]
    return AttentionInputs(*(x.transpose(1, 2) for x in joint))
