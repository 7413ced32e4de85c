"""Launches of the CPU's kernels (`cpu/*.cpp`) behind the layer ops, and their autograd functions.

All tensors are float32 on a CPU. What a launch allocates lies in memory as its Triton counterpart's results do.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable

from .. import _cpu
from ._layers import shared_stride
from ._residual_norm import _ordered, _two, token_major
from ._rotary import is_by_head


def address(tensor: torch.Tensor | None) -> int | None:
    """Raises RuntimeError for a view of negated values, as a gradient may be: memory does not show the sign."""
    if tensor is None:
        return None
    if tensor.is_neg():
        raise RuntimeError("the CPU's kernels do not read views of negated values: call resolve_neg() on it")
    return tensor.data_ptr()


def integers(*values: int) -> ctypes.Array:
    """A struct of 64-bit integers."""
    return (ctypes.c_int64 * len(values))(*values)


def learns(*tensors: torch.Tensor) -> bool:
    """Whether autograd has to know of a call; without it a call takes half of the time."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def gelu(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """gelu_tanh(x + bias): x [..., F], bias [F] or None, frozen."""
    return _Gelu.apply(x, bias) if learns(x) else _gelu(x.contiguous(), bias)


def _gelu(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    y, bias = torch.empty_like(x), None if bias is None else bias.contiguous()
    F = x.shape[-1]
    _cpu.library().advgrpo_gelu(address(x), address(bias), address(y), x.numel() // F, F, torch.get_num_threads())
    return y


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x, bias)
        return _gelu(x, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, y_grad: torch.Tensor):
        x, bias = ctx.saved_tensors
        y_grad, x_grad, bias = y_grad.contiguous(), torch.empty_like(x), None if bias is None else bias.contiguous()
        F = x.shape[-1]
        pointers = map(address, (x, bias, y_grad, x_grad))
        _cpu.library().advgrpo_gelu_backward(*pointers, x.numel() // F, F, torch.get_num_threads())
        return x_grad, None


def residual_norm(
    x: torch.Tensor,
    outs: Sequence[torch.Tensor],
    gates: Sequence[torch.Tensor],
    shifts: Sequence[torch.Tensor],
    scales: Sequence[torch.Tensor],
    eps: float,
) -> tuple[torch.Tensor, ...]:
    """h where there are outs, then y_1 and y_2 as many as shifts: `_residual_norm.py`. Differentiable in x, outs.

    Args:
        x, outs: [B, T, C].
        gates, shifts, scales: [B, C], frozen.
    """
    if learns(x, *outs):
        return _ResidualNorm.apply(eps, len(outs), len(shifts), x, *outs, *gates, *shifts, *scales)
    hidden, ys = _forward(x, outs, gates, shifts, scales, eps)
    return (hidden, *ys) if outs else tuple(ys)


class _ResidualNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, eps: float, outs: int, sets: int, x: torch.Tensor, *tensors: torch.Tensor):
        """tensors: `outs` of them and as many gates, `sets` shifts and as many scales."""
        gates, shifts, scales = (
            tensors[outs : 2 * outs],
            tensors[2 * outs : 2 * outs + sets],
            tensors[2 * outs + sets :],
        )
        hidden, ys = _forward(x, tensors[:outs], gates, shifts, scales, eps)
        ctx.eps, ctx.outs, ctx.sets = eps, outs, sets
        ctx.set_materialize_grads(False)  # a result that nothing used costs no zeros
        ctx.save_for_backward(hidden if sets else None, *gates, *scales)
        return (hidden, *ys) if outs else tuple(ys)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: torch.Tensor | None):
        outs, sets = ctx.outs, ctx.sets
        hidden, *vectors = ctx.saved_tensors
        hidden_grad, y_grads = (grads[0], grads[1:]) if outs else (None, grads)
        used = [(grad, scale) for grad, scale in zip(y_grads, vectors[outs:]) if grad is not None]
        frozen, rows = [None] * (outs + 2 * sets), hidden if used else hidden_grad
        if rows is None:
            return None, None, None, None, *[None] * outs, *frozen
        norm_grads, scales = [grad for grad, _ in used], [scale for _, scale in used]
        found = _backward(rows, hidden_grad, norm_grads, scales, vectors[:outs], ctx.eps)
        return None, None, None, *(found if used else [hidden_grad, *found]), *frozen


class _Order:
    """How the rows of x [B, T, C] lie: image after image, or token after token."""

    def __init__(self, x: torch.Tensor):
        self.by_token, self.shape = token_major(x), x.shape
        self.strides = x.stride() if self.by_token or x.is_contiguous() else None

    def ordered(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if tensor.stride() == self.strides else _ordered(tensor, self.by_token)

    def empty(self, like: torch.Tensor) -> torch.Tensor:
        B, T, C = self.shape
        return like.new_empty(T, B, C).transpose(0, 1) if self.by_token else like.new_empty(B, T, C)

    def rows(self, gate_stride: int, modulation_stride: int) -> ctypes.Array:
        """The struct of that name."""
        B, T, C = self.shape
        return integers(B, T, C, *((1, B) if self.by_token else (T, 1)), gate_stride, modulation_stride)


def _forward(
    x: torch.Tensor,
    outs: Sequence[torch.Tensor],
    gates: Sequence[torch.Tensor],
    shifts: Sequence[torch.Tensor],
    scales: Sequence[torch.Tensor],
    eps: float,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """(h, which is x without outs; [y, y2] as many as shifts)."""
    order = _Order(x)
    x, outs = order.ordered(x), [order.ordered(out) for out in outs]
    hidden, ys = order.empty(x) if outs else None, [order.empty(x) for _ in shifts]
    gates, gate_stride = shared_stride(gates)
    modulation, modulation_stride = shared_stride([*shifts, *scales])
    (out, out2), (gate, gate2), sets = _two(outs), _two(gates), len(shifts)
    (shift, shift2), (scale, scale2) = _two(modulation[:sets]), _two(modulation[sets:])
    pointers = map(address, (x, out, gate, out2, gate2, shift, scale, shift2, scale2, hidden, *_two(ys)))
    rows = order.rows(gate_stride, modulation_stride)
    _cpu.library().advgrpo_residual_norm(*pointers, rows, eps, torch.get_num_threads())
    return x if hidden is None else hidden, ys


def _backward(
    hidden: torch.Tensor,
    hidden_grad: torch.Tensor | None,
    y_grads: Sequence[torch.Tensor],
    scales: Sequence[torch.Tensor],
    gates: Sequence[torch.Tensor],
    eps: float,
) -> list[torch.Tensor]:
    """[gradient of x where a norm was used, gradients of the outs]."""
    order = _Order(hidden)
    x_grad, out_grads = order.empty(hidden) if y_grads else None, [order.empty(hidden) for _ in gates]
    gates, gate_stride = shared_stride(gates)
    scales, modulation_stride = shared_stride(scales)
    hidden, y_grads = order.ordered(hidden), [order.ordered(grad) for grad in y_grads]
    hidden_grad = None if hidden_grad is None else order.ordered(hidden_grad)
    read = hidden, hidden_grad, *_two(y_grads), *_two(scales), *_two(gates)
    pointers = map(address, (*read, x_grad, *_two(out_grads)))
    rows = order.rows(gate_stride, modulation_stride)
    _cpu.library().advgrpo_residual_norm_backward(*pointers, rows, eps, torch.get_num_threads())
    return out_grads if x_grad is None else [x_grad, *out_grads]


def group_norm(
    x: torch.Tensor, groups: int, weight: torch.Tensor, bias: torch.Tensor, eps: float, silu: bool
) -> torch.Tensor:
    """GroupNorm of x [B, C, H, W] in channels_last, with SiLU behind it where `silu`; no gradient."""
    y, (B, C, H, W) = torch.empty_like(x), x.shape
    weight, bias = weight.contiguous(), bias.contiguous()  # that outlive the call
    pointers = map(address, (x, weight, bias, y))
    sizes = integers(B, H * W, C, groups, int(silu))
    _cpu.library().advgrpo_group_norm(*pointers, sizes, eps, torch.get_num_threads())
    return y


class Turns(NamedTuple):
    """Rotary embedding: see `_rotary.py`."""

    tables: Sequence[torch.Tensor]  # cos and sin [T, D/2], or [H, T, D/2] by head; or none, and nothing is turned
    halves: bool  # pairs are (i, i + D/2), not neighbours


def qk_rms_norm(
    qkv: torch.Tensor,
    weights: Sequence[torch.Tensor],
    turns: Turns,
    images: int,
    query: torch.Tensor,
    key: torch.Tensor,
    eps: float,
) -> None:
    """Write query and key [B, H, T, D].

    Args:
        qkv: [B, T, 3, H, D] with dense heads.
        weights: of the image's q and k, and of the text's where there are tokens beyond the first `images`; [D], dense.
    """
    tokens = _tokens(qkv, images, turns, query.stride(), (0, 0, 0))
    pointers = map(address, (*_two(turns.tables), query, key))
    run = _cpu.library().advgrpo_qk_rms_norm
    run(qkv.data_ptr(), _addresses(weights), *pointers, tokens, eps, torch.get_num_threads())


def qk_rms_norm_backward(
    qkv: torch.Tensor,
    weights: Sequence[torch.Tensor],
    turns: Turns,
    images: int,
    grads: Sequence[torch.Tensor],
    qkv_grad: torch.Tensor,
    eps: float,
) -> None:
    """Write the gradient of qkv [B, T, 3, H, D] from those of query, key and value, of common strides."""
    tokens = _tokens(qkv, images, turns, grads[0].stride(), qkv_grad.stride())
    pointers = map(address, (*_two(turns.tables), *grads, qkv_grad))
    run = _cpu.library().advgrpo_qk_rms_norm_backward
    run(qkv.data_ptr(), _addresses(weights), *pointers, tokens, eps, torch.get_num_threads())


def _tokens(qkv: torch.Tensor, images: int, turns: Turns, out: Sequence[int], grad: Sequence[int]) -> ctypes.Array:
    """The struct of that name, from the strides of query (or its gradient) and of the gradient of qkv."""
    B, T, _, H, D = qkv.shape
    turn_stride_h = T * D // 2 if is_by_head(turns.tables) else 0
    return integers(B, T, H, D, images, turn_stride_h, turns.halves, *qkv.stride()[:3], *out[:3], *grad[:3])


def _addresses(tensors: Sequence[torch.Tensor]) -> ctypes.Array:
    return integers(*(tensor.data_ptr() for tensor in tensors))
