"""RMSNorm of q and k over the head dim, written with v straight into the attention layout.

    q[b, h, t, :] = x·w/sqrt(mean(x²) + eps)     image tokens first, then text tokens; v is moved as it is

One launch stands for the four norms, three concatenations and the transposes of SD3.5's joint attention (diffusers'
JointAttnProcessor2_0); without a context it serves the image-only second attention of the dual blocks.

Legend:   B images, T image tokens, S text tokens, H heads, D head dim.
          qkv [B, T, 3, H, D] (one linear) or three [B, T, H, D] -> query, key, value [B, H, T + S, D]
Numerics: float32 inside, one rounding; diffusers rounds again before the product with a half-precision weight.
Gradient: of the activations, in the layout they came in; the norm weights are frozen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from .._runtime import HAS_TRITON, NAMESPACE, device_guard
from ._layers import FLOATS, check_float, pick_layer_backend

__all__ = ["AttentionInputs", "qk_rms_norm", "qk_rms_norm_ref"]

ROWS = 64  # (token, head) pairs per program

if HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def _norm_rows(x_ptr, weight_ptr, out_ptr, load_at, store_at, mask, d, D, eps):
        x = tl.load(x_ptr + load_at, mask=mask, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
        inverse = tl.rsqrt(tl.sum(x * x, axis=1) / D + eps)[:, None]
        tl.store(out_ptr + store_at, (x * inverse * weight).to(out_ptr.dtype.element_ty), mask=mask)

    @triton.jit
    def _norm_rows_bwd(x_ptr, weight_ptr, grad_ptr, x_grad_ptr, at_x, at_grad, at_x_grad, mask, d, D, eps):
        x = tl.load(x_ptr + at_x, mask=mask, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
        grad = tl.load(grad_ptr + at_grad, mask=mask, other=0.0).to(tl.float32) * weight
        inverse = tl.rsqrt(tl.sum(x * x, axis=1) / D + eps)[:, None]
        normed = x * inverse
        x_grad = inverse * (grad - normed * (tl.sum(grad * normed, axis=1) / D)[:, None])
        tl.store(x_grad_ptr + at_x_grad, x_grad.to(x_grad_ptr.dtype.element_ty), mask=mask)

    @triton.jit
    def _rows_of_tile(tile, first_token, T, H, BLOCK_R: tl.constexpr):
        """(token, head, token among image + text, valid) of a tile of (token, head) pairs, heads running fastest."""
        row = tile * BLOCK_R + tl.arange(0, BLOCK_R)
        return (row // H).to(tl.int64), row % H, first_token + row // H, row < T * H

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
        eps,
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
            v_ptr = tl.where(txt, txt_v_ptr, v_ptr)
            q_weight_ptr = tl.where(txt, txt_q_weight_ptr, q_weight_ptr)
            k_weight_ptr = tl.where(txt, txt_k_weight_ptr, k_weight_ptr)
            stride_b, stride_t = tl.where(txt, txt_stride_b, stride_b), tl.where(txt, txt_stride_t, stride_t)
        t, h, token, valid = _rows_of_tile(tile, first_token, T, H, BLOCK_R)
        d = tl.arange(0, BLOCK_D)
        mask = valid[:, None] & (d < D)[None, :]
        load_at = (b * stride_b + t * stride_t + h * D)[:, None] + d[None, :]
        store_at = (((b * H + h) * tokens + token) * D)[:, None] + d[None, :]
        _norm_rows(q_ptr, q_weight_ptr, query_ptr, load_at, store_at, mask, d, D, eps)
        _norm_rows(k_ptr, k_weight_ptr, key_ptr, load_at, store_at, mask, d, D, eps)
        tl.store(value_ptr + store_at, tl.load(v_ptr + load_at, mask=mask, other=0.0), mask=mask)

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
        grad_stride_t,
        txt_grad_stride_t,
        eps,
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
            v_grad_ptr = tl.where(txt, txt_v_grad_ptr, v_grad_ptr)
            stride_b, stride_t = tl.where(txt, txt_stride_b, stride_b), tl.where(txt, txt_stride_t, stride_t)
            grad_stride_t = tl.where(txt, txt_grad_stride_t, grad_stride_t)
        t, h, token, valid = _rows_of_tile(tile, first_token, T, H, BLOCK_R)
        d = tl.arange(0, BLOCK_D)
        mask = valid[:, None] & (d < D)[None, :]
        x_at = (b * stride_b + t * stride_t + h * D)[:, None] + d[None, :]
        load_at = (((b * H + h) * tokens + token) * D)[:, None] + d[None, :]
        store_at = ((b * T + t) * grad_stride_t + h * D)[:, None] + d[None, :]
        _norm_rows_bwd(q_ptr, q_weight_ptr, query_grad_ptr, q_grad_ptr, x_at, load_at, store_at, mask, d, D, eps)
        _norm_rows_bwd(k_ptr, k_weight_ptr, key_grad_ptr, k_grad_ptr, x_at, load_at, store_at, mask, d, D, eps)
        tl.store(v_grad_ptr + store_at, tl.load(value_grad_ptr + load_at, mask=mask, other=0.0), mask=mask)


class AttentionInputs(NamedTuple):
    """Result of `qk_rms_norm`, contiguous in the layout that scaled_dot_product_attention takes."""

    query: torch.Tensor  # [B, H, T + S, D]
    key: torch.Tensor  # [B, H, T + S, D]
    value: torch.Tensor  # [B, H, T + S, D]


def _split(qkv: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """[q, k, v], each [B, T, H, D] with dense heads and common strides; views of a fused tensor stay views."""
    parts = list(qkv[0].unbind(2)) if len(qkv) == 1 else list(qkv)
    D = parts[0].shape[3]
    dense = all(p.stride()[2:] == (D, 1) and p.stride() == parts[0].stride() for p in parts)
    return parts if dense else [p.contiguous() for p in parts]


def _outputs(qkv: Sequence[torch.Tensor], txt_qkv: Sequence[torch.Tensor]) -> AttentionInputs:
    B, H, D = qkv[0].shape[0], qkv[0].shape[-2], qkv[0].shape[-1]
    tokens = qkv[0].shape[1] + (txt_qkv[0].shape[1] if txt_qkv else 0)
    return AttentionInputs(*(qkv[0].new_empty(B, H, tokens, D) for _ in range(3)))


def _geometry(parts: list[torch.Tensor], txt: list[torch.Tensor]) -> tuple[tuple[int, int], tuple[int, ...]]:
    """(grid, (T, S, H, D, strides of the image rows, strides of the text rows))."""
    B, T, H, D = parts[0].shape
    S = txt[0].shape[1] if txt else 0
    strides = (*parts[0].stride()[:2], *(txt[0].stride()[:2] if txt else (0, 0)))
    return (triton.cdiv(T * H, ROWS) + triton.cdiv(S * H, ROWS), B), (T, S, H, D, *strides)


@torch.library.custom_op(f"{NAMESPACE}::qk_rms_norm", mutates_args=())
def _qk_rms_norm_op(
    qkv: list[torch.Tensor], weights: list[torch.Tensor], txt_qkv: list[torch.Tensor], txt_weights: list[torch.Tensor],
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """The fields of AttentionInputs; qkv and txt_qkv hold one fused tensor or three, txt_qkv may be empty."""
    outputs = _outputs(qkv, txt_qkv)
    parts, txt = _split(qkv), _split(txt_qkv) if txt_qkv else []
    grid, sizes = _geometry(parts, txt)
    if outputs.query.numel():
        with device_guard(parts[0]):
            _qk_rms_norm_fwd_kernel[grid](
                *(*parts, *(txt or [None] * 3)),
                *(*(w.contiguous() for w in weights), *([w.contiguous() for w in txt_weights] or [None] * 2)),
                *(*outputs, *sizes, eps),
                BLOCK_R=ROWS,
                BLOCK_D=triton.next_power_of_2(sizes[3]),
                num_warps=4,
            )
    return tuple(outputs)


@_qk_rms_norm_op.register_fake
def _(qkv, weights, txt_qkv, txt_weights, eps):
    return tuple(_outputs(qkv, txt_qkv))


@torch.library.custom_op(f"{NAMESPACE}::qk_rms_norm_backward", mutates_args=())
def _qk_rms_norm_backward_op(
    grads: list[torch.Tensor], qkv: list[torch.Tensor], weights: list[torch.Tensor], txt_qkv: list[torch.Tensor],
    txt_weights: list[torch.Tensor], eps: float,
) -> list[torch.Tensor]:  # fmt: skip
    """Gradients of the tensors in qkv, then of those in txt_qkv, in one launch."""
    results = [t.new_empty(t.shape) for t in [*qkv, *txt_qkv]]
    x_grads, txt_grads = _split(results[: len(qkv)]), _split(results[len(qkv) :]) if txt_qkv else []
    parts, txt = _split(qkv), _split(txt_qkv) if txt_qkv else []
    grid, sizes = _geometry(parts, txt)
    grad_strides = x_grads[0].stride(1), txt_grads[0].stride(1) if txt else 0
    if grads[0].numel():
        with device_guard(parts[0]):
            _qk_rms_norm_bwd_kernel[grid](
                *(*parts[:2], *(txt[:2] or [None] * 2)),
                *(*(w.contiguous() for w in weights), *([w.contiguous() for w in txt_weights] or [None] * 2)),
                *(*(g.contiguous() for g in grads), *x_grads, *(txt_grads or [None] * 3), *sizes, *grad_strides, eps),
                BLOCK_R=ROWS,
                BLOCK_D=triton.next_power_of_2(sizes[3]),
                num_warps=4,
            )
    return results


@_qk_rms_norm_backward_op.register_fake
def _(grads, qkv, weights, txt_qkv, txt_weights, eps):
    return [t.new_empty(t.shape) for t in [*qkv, *txt_qkv]]


def _setup_context(ctx, inputs, output):
    qkv, weights, txt_qkv, txt_weights, ctx.eps = inputs
    ctx.counts = [len(group) for group in inputs[:4]]
    ctx.save_for_backward(*qkv, *weights, *txt_qkv, *txt_weights)


def _backward(ctx, *grads):
    saved, groups = list(ctx.saved_tensors), []
    for count in ctx.counts:
        groups.append(saved[:count])
        saved = saved[count:]
    images, weights, _, txt_weights = ctx.counts
    results = _qk_rms_norm_backward_op(list(grads), *groups, ctx.eps)
    return results[:images], [None] * weights, results[images:], [None] * txt_weights, None


_qk_rms_norm_op.register_autograd(_backward, setup_context=_setup_context)


def _check_stream(name: str, qkv, weights) -> tuple[list[torch.Tensor], list[torch.Tensor], tuple[int, ...]]:
    """(tensors, weights, (B, T, H, D)) of one stream.

    Raises:
        ValueError: names the argument that does not fit.
    """
    tensors = [qkv] if isinstance(qkv, torch.Tensor) else list(qkv)
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


def qk_rms_norm(
    qkv: torch.Tensor | Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    *,
    txt_qkv: torch.Tensor | Sequence[torch.Tensor] | None = None,
    txt_weights: Sequence[torch.Tensor] | None = None,
    eps: float = 1e-6,
    backend: str = "auto",
) -> AttentionInputs:
    """Normalise q and k and lay q, k, v out for attention, image tokens first.

    Args:
        qkv: [B, T, 3, H, D], the output of one linear, or (q, k, v) of [B, T, H, D]; views are read in place.
        weights: (q_weight, k_weight), [D] any float dtype.
        txt_qkv, txt_weights: the text tokens [B, S, 3, H, D] or three, in the dtype of qkv, and their norms.

    Raises:
        ValueError: names the argument that does not fit.
        RuntimeError: backend="triton" with a weight that requires a gradient.
    """
    tensors, weights, (B, _, H, D) = _check_stream("qkv", qkv, weights)
    texts, text_weights = [], []
    if (txt_qkv is None) != (txt_weights is None):
        raise ValueError("give txt_qkv and txt_weights together")
    if txt_qkv is not None:
        texts, text_weights, shape = _check_stream("txt_qkv", txt_qkv, txt_weights)
        if (shape[0], *shape[2:]) != (B, H, D) or texts[0].dtype != tensors[0].dtype:
            raise ValueError(
                f"txt_qkv must be {tensors[0].dtype} with B, H, D = {B, H, D}, got {texts[0].dtype} {shape}"
            )
        if text_weights[0].dtype != weights[0].dtype:
            raise ValueError(f"txt_weights must be {weights[0].dtype} as weights, got {text_weights[0].dtype}")
    frozen = {f"norm weight {i}": weight for i, weight in enumerate([*weights, *text_weights])}
    if pick_layer_backend(backend, [*tensors, *texts], frozen) == "torch":
        return qk_rms_norm_ref(qkv, weights, txt_qkv=txt_qkv, txt_weights=txt_weights, eps=eps)
    return AttentionInputs(*_qk_rms_norm_op(tensors, weights, texts, text_weights, eps))


def qk_rms_norm_ref(
    qkv: torch.Tensor | Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    *,
    txt_qkv: torch.Tensor | Sequence[torch.Tensor] | None = None,
    txt_weights: Sequence[torch.Tensor] | None = None,
    eps: float = 1e-6,
    compute_dtype: torch.dtype = torch.float32,
) -> AttentionInputs:
    """Plain PyTorch, differentiable in every input."""
    streams = [(qkv, weights)] if txt_qkv is None else [(qkv, weights), (txt_qkv, txt_weights)]
    parts = [list(x.unbind(2)) if isinstance(x, torch.Tensor) else list(x) for x, _ in streams]
    for part, (_, norm_weights) in zip(parts, streams):
        for i, weight in enumerate(norm_weights):
            x = part[i].to(compute_dtype)
            normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.to(compute_dtype)
            part[i] = normed.to(part[i].dtype)
    return AttentionInputs(*(torch.cat(stream, dim=1).transpose(1, 2).contiguous() for stream in zip(*parts)))
