"""LoRA merged into the weights: W + s·B·A for a list of linears, in one launch of `csrc/merge_lora.cu`.

Always from the pristine base W, in place into buffers that a captured graph may hold: weights of the base's dtype, e4m3
weights with one scale per output row (amax/448, written on the device), or both.

Shapes:   per linear: base [N, K], a [r, K] float32, b [N, r] float32 -> outs [N, K] as base; fp8 data [N, K] e4m3 and
          scale [N, 1] float32.
Numerics: float32 inside, one rounding; e4m3 is quantised from the unrounded float32. Nothing here has a gradient.
"""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import List

import torch

from .._ops import add_op_namespace_prefix
from .._runtime import check_tensors, device_guard
from ._csrc import (
    Table,
    TableCache,
    aligned,
    check_launch,
    current_stream,
    is_capturing,
    loaded_library,
    pick_cuda_backend,
    pointer,
    stream_of,
)
from ._layers import FLOATS
from .fp8 import Fp8Tensor, fp8_quantize_ref

__all__ = ["merge_lora", "merge_lora_ref"]

FIRST_BLOCK = 9  # of the words of MergeModule in csrc/merge_lora.cu
_TABLES = TableCache()


@torch.library.custom_op(add_op_namespace_prefix("merge_lora"), mutates_args=("outs", "fp8_data", "fp8_scales"))
def _merge_lora_op(
    bases: List[torch.Tensor],
    a: List[torch.Tensor],
    b: List[torch.Tensor],
    scale: List[float],
    outs: List[torch.Tensor],
    fp8_data: List[torch.Tensor],
    fp8_scales: List[torch.Tensor],
    compiled: bool,
) -> None:
    """Write the merged weights; `outs` or the fp8 lists may be empty. compiled: run the library, else PyTorch."""
    for i, (base, out) in enumerate(zip(bases, outs)):
        if out.data_ptr() == base.data_ptr():
            raise ValueError(f"outs[{i}] is the base itself: the next merge would add the adapter twice")
    if compiled:
        _launch(bases, a, b, scale, outs, fp8_data, fp8_scales)
    else:
        merge_lora_ref(bases, a, b, scale, outs=outs, fp8=[Fp8Tensor(*pair) for pair in zip(fp8_data, fp8_scales)])


@_merge_lora_op.register_fake
def _(bases, a, b, scale, outs, fp8_data, fp8_scales, compiled):
    return None


def _launch(bases, a, b, scale, outs, fp8_data, fp8_scales) -> None:
    nothing = [None] * len(bases)
    linears = list(zip(bases, a, b, outs or nothing, fp8_data or nothing, fp8_scales or nothing))
    key = tuple((*(pointer(t) for t in linear), *linear[0].shape, len(linear[1])) for linear in linears), tuple(scale)
    table = _TABLES.get(
        key, lambda: _table(linears, scale), capturing=is_capturing(bases[0]), stream=stream_of(bases[0])
    )
    with device_guard(bases[0]):
        error = loaded_library().advgrpo_merge_lora(
            table.rows.data_ptr(),
            table.of_block.data_ptr(),
            table.blocks,
            FLOATS.index(bases[0].dtype),
            current_stream(bases[0]),
        )
    check_launch("merge_lora", error)


def _table(linears, scales: Sequence[float]) -> Table:
    rows_per_block = loaded_library().advgrpo_merge_lora_rows_per_block()
    rows, blocks = [], []
    for linear, scale in zip(linears, scales):
        (N, K), rank = linear[0].shape, linear[1].shape[0]
        rows.append([*(pointer(t) for t in linear), N, K, rank, 0, K % 8 == 0 and aligned(*linear), scale])
        blocks.append(-(-N // rows_per_block))
    return Table(rows, blocks, FIRST_BLOCK, linears[0][0].device)


def _check(bases, a, b, outs, fp8) -> None:
    """Raise ValueError unless the lists of `merge_lora` fit together."""
    lists = {"a": a, "b": b, **({"outs": outs} if outs else {}), **({"fp8": fp8} if fp8 else {})}
    if not bases or not (outs or fp8) or any(len(tensors) != len(bases) for tensors in lists.values()):
        lengths = {name: len(tensors) for name, tensors in {"bases": bases, **lists}.items()}
        raise ValueError(f"want lists of one length, and outs or fp8 among them, got {lengths}")
    for name, tensors in {"bases": bases, "a": a, "b": b, "outs": outs}.items():
        check_tensors(**{f"{name}[{i}]": tensor for i, tensor in enumerate(tensors)})
    first = bases[0]
    if first.dtype not in FLOATS:
        raise ValueError(f"bases must be one of {FLOATS}, got {first.dtype}")
    for i, base in enumerate(bases):
        if base.dim() != 2 or base.numel() == 0:
            raise ValueError(f"bases[{i}] must be a non-empty [N, K], got {list(base.shape)}")
        (N, K), rank = base.shape, a[i].shape[0]
        wanted = {"bases": (base, first.dtype, (N, K)), "a": (a[i], torch.float32, (rank, K))}
        wanted["b"] = (b[i], torch.float32, (N, rank))
        if outs:
            wanted["outs"] = (outs[i], first.dtype, (N, K))
        if fp8:
            wanted["fp8 data"] = (fp8[i].data, torch.float8_e4m3fn, (N, K))
            wanted["fp8 scale"] = (fp8[i].scale, torch.float32, (N, 1))
        for name, (tensor, dtype, shape) in wanted.items():
            fits = tuple(tensor.shape) == shape and tensor.dtype == dtype and tensor.is_contiguous()
            if not fits or tensor.device != first.device:
                got = f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}, strides {tensor.stride()}"
                raise ValueError(f"{name}[{i}] must be contiguous {dtype} {list(shape)} on {first.device}, got {got}")


def _scales(scale: float | Sequence[float], count: int) -> list[float]:
    """One number per linear."""
    scales = [scale] * count if isinstance(scale, numbers.Real) else scale
    fits = isinstance(scales, (list, tuple)) and len(scales) == count
    if not fits or not all(isinstance(value, numbers.Real) for value in scales):
        raise ValueError(f"scale must be a number or a list of {count} numbers, one per linear, got {scale!r}")
    return [float(value) for value in scales]


def merge_lora(
    bases: Sequence[torch.Tensor],
    a: Sequence[torch.Tensor],
    b: Sequence[torch.Tensor],
    scale: float | Sequence[float],
    *,
    outs: Sequence[torch.Tensor] = (),
    fp8: Sequence[Fp8Tensor] = (),
    backend: str = "auto",
) -> None:
    """Merge every adapter into `outs`, `fp8` or both, in place.

    Args:
        bases: contiguous [N, K] weights of one dtype (float32, float16 or bfloat16) on one device.
        a, b: contiguous float32 [r, K] and [N, r]; r may differ between linears.
        scale: alpha / r, a number or one for each linear.
        outs: contiguous buffers of the bases' shapes and dtype; not the bases themselves.
        fp8: contiguous buffers, data [N, K] and scale [N, 1].
        backend: "auto", "cuda" or "torch".

    Raises:
        ValueError: names the argument that does not fit.
    """
    _check(bases, a, b, outs, fp8)
    scale = _scales(scale, len(bases))
    compiled = pick_cuda_backend(backend, *bases) == "cuda"
    data, scales = [t.data for t in fp8], [t.scale for t in fp8]
    with torch.no_grad():
        _merge_lora_op(list(bases), list(a), list(b), scale, list(outs), data, scales, compiled)


@torch.no_grad()
def merge_lora_ref(
    bases: Sequence[torch.Tensor],
    a: Sequence[torch.Tensor],
    b: Sequence[torch.Tensor],
    scale: float | Sequence[float],
    *,
    outs: Sequence[torch.Tensor] = (),
    fp8: Sequence[Fp8Tensor] = (),
    compute_dtype: torch.dtype = torch.float32,
) -> None:
    """Plain PyTorch, one linear after the other."""
    scales = _scales(scale, len(bases))
    for i, base in enumerate(bases):
        merged = torch.addmm(base.to(compute_dtype), b[i].to(compute_dtype), a[i].to(compute_dtype), alpha=scales[i])
        if outs:
            outs[i].copy_(merged)
        if fp8:
            quantised = fp8_quantize_ref(merged)
            fp8[i].data.copy_(quantised.data)
            fp8[i].scale.copy_(quantised.scale)
