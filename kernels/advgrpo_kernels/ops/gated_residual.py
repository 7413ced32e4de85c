"""h = residual + gate·out (+ gate2·out2), and the next adaptive LayerNorm of h in the same pass.

The second pair is the dual attention of SD3.5, whose two results reach the residual before the next norm. With
modulations, `y_i = (h - mean)/sqrt(var + eps)·(1 + scale_i) + shift_i` is taken of the stored, rounded h, so fusing
changes no bit of what `gated_residual` and `ada_layer_norm` give one after the other.

Shapes:   B images, T tokens, C channels. residual, out [B, T, C]; gate, shift, scale [B, C], rows may be strided.
Memory:   residual may be a transposed [T, B, C]; results then are too, and an out in another order is copied.
Numerics: float32 inside, one rounding per result; diffusers rounds the product and each sum.
Gradient: of residual and outs; gates, shifts and scales come from frozen layers. Kept: those, and h for a norm.
"""

from __future__ import annotations

from typing import List, Literal, Union, cast, overload

import torch

from .._ops import add_op_namespace_prefix
from .._runtime import check_tensors
from ._cpu_layers import residual_norm
from ._layers import check_float, given, pick_layer_backend
from ._residual_norm import empty_like_rows, empty_row_scales, launch_backward, launch_forward
from .ada_layer_norm import ada_layer_norm_ref, modulation_sets
from .fp8 import Fp8Tensor

__all__ = ["gated_residual", "gated_residual_ref"]

# h alone, or with one or two modulated norms of it, which may be quantised.
Residual = Union[torch.Tensor, "tuple[torch.Tensor | Fp8Tensor, ...]"]


@torch.library.custom_op(add_op_namespace_prefix("gated_residual"), mutates_args=())
def _gated_residual_op(
    residual: torch.Tensor,
    outs: List[torch.Tensor],
    gates: List[torch.Tensor],
    shifts: List[torch.Tensor],
    scales: List[torch.Tensor],
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(h, y, y2); the last ones are empty without their modulation."""
    hidden, ys = launch_forward(residual, outs, gates, shifts, scales, eps)
    y, y2 = [*ys, residual.new_empty(0), residual.new_empty(0)][:2]
    return hidden, y, y2


@_gated_residual_op.register_fake
def _(residual, outs, gates, shifts, scales, eps):
    results = [empty_like_rows(residual) for _ in range(1 + len(shifts))]
    return tuple([*results, residual.new_empty(0), residual.new_empty(0)][:3])


@torch.library.custom_op(add_op_namespace_prefix("gated_residual_fp8"), mutates_args=())
def _gated_residual_fp8_op(
    residual: torch.Tensor,
    outs: List[torch.Tensor],
    gates: List[torch.Tensor],
    shifts: List[torch.Tensor],
    scales: List[torch.Tensor],
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(h, y, y2, row scales [sets, B, T]); y2 is empty with one modulation."""
    hidden, (*ys, fp8_scales) = launch_forward(residual, outs, gates, shifts, scales, eps, fp8=True)
    return hidden, ys[0], ys[1] if len(ys) > 1 else ys[0].new_empty(0), fp8_scales


@_gated_residual_fp8_op.register_fake
def _(residual, outs, gates, shifts, scales, eps):
    y, y2 = (empty_like_rows(residual, torch.float8_e4m3fn) for _ in range(2))
    row_scales = empty_row_scales(residual, len(shifts))
    return empty_like_rows(residual), y, y2 if len(shifts) > 1 else y.new_empty(0), row_scales


@torch.library.custom_op(add_op_namespace_prefix("gated_residual_backward"), mutates_args=())
def _gated_residual_backward_op(
    hidden: torch.Tensor,
    hidden_grad: torch.Tensor | None,
    y_grads: List[torch.Tensor],
    scales: List[torch.Tensor],
    gates: List[torch.Tensor],
    eps: float,
    out_dtype: torch.dtype,
) -> List[torch.Tensor]:
    """[gradient of residual, of out, of out2]; without a norm the first is hidden_grad itself and left out."""
    return launch_backward(hidden, hidden_grad, y_grads, scales, gates, eps, out_dtype=out_dtype, want_x=bool(y_grads))


@_gated_residual_backward_op.register_fake
def _(hidden, hidden_grad, y_grads, scales, gates, eps, out_dtype):
    dtypes = [*([hidden.dtype] if y_grads else []), *[out_dtype] * len(gates)]
    return [empty_like_rows(hidden, dtype) for dtype in dtypes]


def _setup_context(ctx, inputs, output):
    _, outs, gates, shifts, scales, ctx.eps = inputs
    ctx.out_dtype = outs[0].dtype
    ctx.counts = len(outs), len(shifts)
    ctx.set_materialize_grads(False)  # a result that nothing used costs no zeros
    ctx.save_for_backward(output[0] if shifts else None, *gates, *scales)


def _backward(ctx, hidden_grad, *y_grads):
    outs, sets = ctx.counts
    hidden, *vectors = ctx.saved_tensors
    gates, scales = vectors[:outs], vectors[outs:]
    used = [i for i in range(sets) if y_grads[i] is not None]
    constants = [None] * outs, [None] * sets, [None] * sets, None
    if hidden_grad is None and not used:
        return None, [None] * outs, *constants
    norm = [y_grads[i] for i in used], [scales[i] for i in used]
    grads = _gated_residual_backward_op(
        hidden if used else hidden_grad, hidden_grad, *norm, gates, ctx.eps, ctx.out_dtype
    )
    residual_grad, out_grads = (grads[0], grads[1:]) if used else (hidden_grad, grads)
    return residual_grad, out_grads, *constants


_gated_residual_op.register_autograd(_backward, setup_context=_setup_context)


@overload
def gated_residual(
    residual: torch.Tensor,
    out: torch.Tensor,
    gate: torch.Tensor,
    out2: torch.Tensor | None = ...,
    gate2: torch.Tensor | None = ...,
    *,
    shift: None = ...,
    scale: None = ...,
    shift2: None = ...,
    scale2: None = ...,
    eps: float = ...,
    quantize: Literal[False] = ...,
    backend: str = ...,
) -> torch.Tensor: ...
@overload
def gated_residual(
    residual: torch.Tensor,
    out: torch.Tensor,
    gate: torch.Tensor,
    out2: torch.Tensor | None = ...,
    gate2: torch.Tensor | None = ...,
    *,
    shift: torch.Tensor,
    scale: torch.Tensor,
    shift2: None = ...,
    scale2: None = ...,
    eps: float = ...,
    quantize: Literal[False] = ...,
    backend: str = ...,
) -> tuple[torch.Tensor, torch.Tensor]: ...
@overload
def gated_residual(
    residual: torch.Tensor,
    out: torch.Tensor,
    gate: torch.Tensor,
    out2: torch.Tensor | None = ...,
    gate2: torch.Tensor | None = ...,
    *,
    shift: torch.Tensor,
    scale: torch.Tensor,
    shift2: torch.Tensor,
    scale2: torch.Tensor,
    eps: float = ...,
    quantize: Literal[False] = ...,
    backend: str = ...,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]: ...
@overload
def gated_residual(
    residual: torch.Tensor,
    out: torch.Tensor,
    gate: torch.Tensor,
    out2: torch.Tensor | None = ...,
    gate2: torch.Tensor | None = ...,
    *,
    shift: torch.Tensor | None = ...,
    scale: torch.Tensor | None = ...,
    shift2: torch.Tensor | None = ...,
    scale2: torch.Tensor | None = ...,
    eps: float = ...,
    quantize: bool = ...,
    backend: str = ...,
) -> Residual: ...
def gated_residual(
    residual: torch.Tensor,
    out: torch.Tensor,
    gate: torch.Tensor,
    out2: torch.Tensor | None = None,
    gate2: torch.Tensor | None = None,
    *,
    shift: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    shift2: torch.Tensor | None = None,
    scale2: torch.Tensor | None = None,
    eps: float = 1e-6,
    quantize: bool = False,
    backend: str = "auto",
) -> Residual:
    """The new residual h; with modulations (h, y) or (h, y, y2), where y is the input of the next layer.

    Args:
        residual: [B, T, C] float32, float16 or bfloat16; h has its dtype, all results its order in memory.
        out, out2: [B, T, C] what the layer gave; any of these dtypes, the same for both.
        gate, gate2, shift, scale, shift2, scale2: [B, C] any of these dtypes.
        quantize: y and y2 come as `Fp8Tensor`s with row scales; no gradient.

    Raises:
        ValueError: names the argument that does not fit.
        RuntimeError: backend="triton" with a gate, shift or scale that requires a gradient.
    """
    check_tensors(residual=residual)
    shifts, scales = modulation_sets(residual, shift, scale, shift2, scale2)
    if (out2 is None) != (gate2 is None):
        raise ValueError("give out2 and gate2 together")
    outs, gates = [out] if out2 is None else [out, out2], [gate] if gate2 is None else [gate, gate2]
    for name, tensor in zip(("out", "out2"), outs):
        check_float(name, tensor, tuple(residual.shape), residual.device)
        if tensor.dtype != out.dtype:
            raise ValueError(f"out2 must be {out.dtype} as out, got {tensor.dtype}")
    for name, tensor in zip(("gate", "gate2"), gates):
        check_float(name, tensor, (residual.shape[0], residual.shape[2]), residual.device)
    if quantize and not shifts:
        raise ValueError("quantize needs shift and scale: only the modulated norm is quantised")
    frozen = {f"gate or modulation {i}": tensor for i, tensor in enumerate([*gates, *shifts, *scales])}
    chosen = pick_layer_backend(backend, [residual, *outs], frozen, cpu=not quantize)
    if chosen == "torch":
        return gated_residual_ref(
            *(residual, out, gate, out2, gate2),
            shift=shift,
            scale=scale,
            shift2=shift2,
            scale2=scale2,
            eps=eps,
            quantize=quantize,
        )
    if chosen == "cpu":
        results = residual_norm(residual, outs, gates, shifts, scales, eps)
        return results if shifts else results[0]
    if quantize:
        with torch.no_grad():
            hidden, y, y2, row_scales = _gated_residual_fp8_op(residual, outs, gates, shifts, scales, eps)
        return hidden, *(Fp8Tensor(data, s.unsqueeze(-1)) for data, s in zip((y, y2), row_scales.unbind(0)))
    results = _gated_residual_op(residual, outs, gates, shifts, scales, eps)
    return tuple(results[: 1 + len(shifts)]) if shifts else results[0]


def gated_residual_ref(
    residual: torch.Tensor,
    out: torch.Tensor,
    gate: torch.Tensor,
    out2: torch.Tensor | None = None,
    gate2: torch.Tensor | None = None,
    *,
    shift: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    shift2: torch.Tensor | None = None,
    scale2: torch.Tensor | None = None,
    eps: float = 1e-6,
    quantize: bool = False,
    compute_dtype: torch.dtype = torch.float32,
) -> Residual:
    """Plain PyTorch, differentiable in every input."""
    hidden = torch.addcmul(residual.to(compute_dtype), gate.to(compute_dtype).unsqueeze(1), out.to(compute_dtype))
    if out2 is not None:
        gate2 = given("gate2", gate2)
        hidden = torch.addcmul(hidden, gate2.to(compute_dtype).unsqueeze(1), out2.to(compute_dtype))
    hidden = hidden.to(residual.dtype)
    if shift is None:
        return hidden
    results = ada_layer_norm_ref(
        *(hidden, shift, given("scale", scale), shift2, scale2),
        eps=eps,
        quantize=quantize,
        compute_dtype=compute_dtype,
    )
    ys = results if shift2 is not None else (results,)  # not by isinstance: an Fp8Tensor is a tuple too
    return hidden, *cast("tuple[torch.Tensor | Fp8Tensor, ...]", ys)
