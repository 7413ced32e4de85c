"""LayerNorm without affine, modulated: y = (x - mean)/sqrt(var + eps)·(1 + scale) + shift, for one or two modulations.

Two share the normalisation and the read of x, as diffusers' SD35AdaLayerNormZeroX wants them for dual attention.

Shapes:   B images, T tokens, C channels. x [B, T, C]; shift, scale [B, C], rows may be strided -> y [B, T, C] as x.
Memory:   x may be a transposed [T, B, C]; y then is one too.
Numerics: float32 inside, one rounding; diffusers rounds after the norm, the product and the sum.
Gradient: of x only, shift and scale are outputs of frozen layers. It recomputes the statistics: only x is kept.
"""

from __future__ import annotations

from typing import List, Literal, Union, overload

import torch

from .._ops import add_op_namespace_prefix
from .._runtime import check_tensors
from ._cpu_layers import residual_norm
from ._layers import FLOATS, check_float, given, pick_layer_backend
from ._residual_norm import empty_like_rows, empty_row_scales, launch_backward, launch_forward, token_major
from .fp8 import Fp8Tensor, fp8_quantize_ref

__all__ = ["ada_layer_norm", "ada_layer_norm_ref"]

# One result or two, quantised or not.
Modulated = Union[torch.Tensor, Fp8Tensor, "tuple[torch.Tensor | Fp8Tensor, torch.Tensor | Fp8Tensor]"]


@torch.library.custom_op(add_op_namespace_prefix("ada_layer_norm"), mutates_args=())
def _ada_layer_norm_op(
    x: torch.Tensor, shifts: List[torch.Tensor], scales: List[torch.Tensor], eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, y2); y2 is empty with one modulation."""
    _, ys = launch_forward(x, (), (), shifts, scales, eps)
    return ys[0], ys[1] if len(ys) > 1 else x.new_empty(0)


@_ada_layer_norm_op.register_fake
def _(x, shifts, scales, eps):
    return empty_like_rows(x), empty_like_rows(x) if len(shifts) > 1 else x.new_empty(0)


@torch.library.custom_op(add_op_namespace_prefix("ada_layer_norm_backward"), mutates_args=())
def _ada_layer_norm_backward_op(
    x: torch.Tensor, y_grads: List[torch.Tensor], scales: List[torch.Tensor], eps: float
) -> torch.Tensor:
    return launch_backward(x, None, y_grads, scales, (), eps)[0]


@_ada_layer_norm_backward_op.register_fake
def _(x, *_):
    return empty_like_rows(x)


@torch.library.custom_op(add_op_namespace_prefix("ada_layer_norm_fp8"), mutates_args=())
def _ada_layer_norm_fp8_op(
    x: torch.Tensor, shifts: List[torch.Tensor], scales: List[torch.Tensor], eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(y, y2, row scales [sets, B, T]); y2 is empty with one modulation."""
    _, (*ys, fp8_scales) = launch_forward(x, (), (), shifts, scales, eps, fp8=True)
    return ys[0], ys[1] if len(ys) > 1 else ys[0].new_empty(0), fp8_scales


@_ada_layer_norm_fp8_op.register_fake
def _(x, shifts, scales, eps):
    y, y2 = (empty_like_rows(x, torch.float8_e4m3fn) for _ in range(2))
    return y, y2 if len(shifts) > 1 else y.new_empty(0), empty_row_scales(x, len(shifts))


def _setup_context(ctx, inputs, output):
    x, _, scales, ctx.eps = inputs
    ctx.set_materialize_grads(False)  # a result that nothing used costs no zeros
    ctx.save_for_backward(x, *scales)


def _backward(ctx, *y_grads):
    x, *scales = ctx.saved_tensors
    used = [(grad, scale) for grad, scale in zip(y_grads, scales) if grad is not None]
    x_grad = _ada_layer_norm_backward_op(x, *map(list, zip(*used)), ctx.eps) if used else None
    return x_grad, [None] * len(scales), [None] * len(scales), None


_ada_layer_norm_op.register_autograd(_backward, setup_context=_setup_context)


def modulation_sets(
    x: torch.Tensor,
    shift: torch.Tensor | None,
    scale: torch.Tensor | None,
    shift2: torch.Tensor | None,
    scale2: torch.Tensor | None,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """(shifts, scales) of the sets that are given, checked against x [B, T, C].

    Raises:
        ValueError: names the argument that does not fit.
    """
    if x.dim() != 3 or x.shape[2] == 0 or x.dtype not in FLOATS:
        raise ValueError(f"want floating point [B, T, C], got {x.dtype} {list(x.shape)}")
    given = {"shift": shift, "scale": scale, "shift2": shift2, "scale2": scale2}
    for first, second in (("shift", "scale"), ("shift2", "scale2")):
        if (given[first] is None) != (given[second] is None):
            raise ValueError(f"give {first} and {second} together")
    if shift is None and shift2 is not None:
        raise ValueError("shift2 and scale2 need shift and scale")
    for name, tensor in given.items():
        if tensor is not None:
            check_float(name, tensor, (x.shape[0], x.shape[2]), x.device)
    return [s for s in (shift, shift2) if s is not None], [s for s in (scale, scale2) if s is not None]


@overload
def ada_layer_norm(
    x: torch.Tensor,
    shift: torch.Tensor,
    scale: torch.Tensor,
    shift2: None = ...,
    scale2: None = ...,
    *,
    eps: float = ...,
    quantize: Literal[False] = ...,
    backend: str = ...,
) -> torch.Tensor: ...
@overload
def ada_layer_norm(
    x: torch.Tensor,
    shift: torch.Tensor,
    scale: torch.Tensor,
    shift2: torch.Tensor,
    scale2: torch.Tensor,
    *,
    eps: float = ...,
    quantize: Literal[False] = ...,
    backend: str = ...,
) -> tuple[torch.Tensor, torch.Tensor]: ...
@overload
def ada_layer_norm(
    x: torch.Tensor,
    shift: torch.Tensor,
    scale: torch.Tensor,
    shift2: torch.Tensor | None = ...,
    scale2: torch.Tensor | None = ...,
    *,
    eps: float = ...,
    quantize: bool = ...,
    backend: str = ...,
) -> Modulated: ...
def ada_layer_norm(
    x: torch.Tensor,
    shift: torch.Tensor,
    scale: torch.Tensor,
    shift2: torch.Tensor | None = None,
    scale2: torch.Tensor | None = None,
    *,
    eps: float = 1e-6,
    quantize: bool = False,
    backend: str = "auto",
) -> Modulated:
    """Normalise and modulate x: y, or (y, y2) with a second modulation.

    Args:
        x: [B, T, C] float32, float16 or bfloat16; results lie in memory in its order of images and tokens.
        shift, scale, shift2, scale2: [B, C] any of these dtypes.
        quantize: return `Fp8Tensor`s with row scales, quantised before any rounding to x's dtype; no gradient.

    Raises:
        ValueError: names the argument that does not fit.
        RuntimeError: backend="triton" with a shift or scale that requires a gradient.
    """
    check_tensors(x=x)
    shifts, scales = modulation_sets(x, shift, scale, shift2, scale2)
    if not shifts:
        raise ValueError("ada_layer_norm needs shift and scale")
    frozen = {f"modulation {i}": tensor for i, tensor in enumerate([*shifts, *scales])}
    chosen = pick_layer_backend(backend, [x], frozen, cpu=not quantize)
    if chosen == "torch":
        return ada_layer_norm_ref(x, shift, scale, shift2, scale2, eps=eps, quantize=quantize)
    if chosen == "cpu":
        ys = residual_norm(x, (), (), shifts, scales, eps)
        return (ys[0], ys[1]) if len(shifts) > 1 else ys[0]
    if quantize:
        with torch.no_grad():
            y, y2, row_scales = _ada_layer_norm_fp8_op(x, shifts, scales, eps)
        results = [Fp8Tensor(data, s.unsqueeze(-1)) for data, s in zip((y, y2), row_scales.unbind(0))]
        return (results[0], results[1]) if len(shifts) > 1 else results[0]
    y, y2 = _ada_layer_norm_op(x, shifts, scales, eps)
    return (y, y2) if len(shifts) > 1 else y


def ada_layer_norm_ref(
    x: torch.Tensor,
    shift: torch.Tensor,
    scale: torch.Tensor,
    shift2: torch.Tensor | None = None,
    scale2: torch.Tensor | None = None,
    *,
    eps: float = 1e-6,
    quantize: bool = False,
    compute_dtype: torch.dtype = torch.float32,
) -> Modulated:
    """Plain PyTorch, differentiable in every input."""
    order = (1, 0, 2) if token_major(x) else (0, 1, 2)  # layer_norm makes its input contiguous
    normed = torch.nn.functional.layer_norm(x.to(compute_dtype).permute(order), x.shape[-1:], eps=eps).permute(order)

    def modulated(shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor | Fp8Tensor:
        shift, scale = (t.to(compute_dtype).unsqueeze(1) for t in (shift, scale))
        y = torch.addcmul(shift, normed, 1.0 + scale)
        return fp8_quantize_ref(y.detach()) if quantize else y.to(x.dtype)

    y = modulated(shift, scale)
    return y if shift2 is None else (y, modulated(shift2, given("scale2", scale2)))
