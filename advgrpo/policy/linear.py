"""A frozen linear layer, stacked from stock ones, in the forms the trainer needs.

    base      W, in the model's dtype or as e4m3 quantised once
    adapted   W with LoRA beside it: what is trained, and what the window's steps run
    merged    W + (alpha/r)·B·A, in the model's dtype or as e4m3, rewritten in place after every update

Only x, A·x and the adapter are saved for the backward: the frozen weight needs no gradient, and dx, dA and dB are
written out. Low-rank products are never quantised.

Shapes: rows M, inputs K, outputs N = g·n of g stacked parts, rank r: x [..., K] -> [..., N]; A [g, r, K], B [g, n, r].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from advgrpo_kernels import Fp8Tensor, fp8_linear, fp8_quantize

from .lora import Pair, StackedAdapter


class StackedLinear:
    """Rows of several stock linears in one weight; the stock modules can be pointed at its slices."""

    def __init__(self, names: Sequence[str], weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor]):
        self.names = tuple(names)
        self.weight = weights[0] if len(weights) == 1 else torch.cat(list(weights))
        self.bias = biases[0] if len(biases) == 1 else torch.cat(list(biases))
        self.part_size = len(weights[0])
        self.adapted: list[int] = []  # parts with an adapter
        self.merged: torch.Tensor | None = None
        self.merged_fp8: Fp8Tensor | None = None
        self.base_fp8: tuple[Fp8Tensor, Fp8Tensor] | None = None  # W and its transpose, each with row scales

    @property
    def can_quantize(self) -> bool:
        """Whether the tensor cores take the shape."""
        return all(size % 16 == 0 for size in self.weight.shape)

    def adapter(self, is_target) -> StackedAdapter | None:
        """Decide which parts are adapted; None without any."""
        self.adapted = [i for i, name in enumerate(self.names) if is_target(name)]
        if not self.adapted:
            return None
        return StackedAdapter(tuple(self.names[i] for i in self.adapted), self.weight.shape[1], self.part_size)

    def slices(self) -> list[torch.Tensor]:
        """The stock weights [n, K], as views."""
        return list(self.weight.split(self.part_size))

    def prepare_merged(self, fp8: bool) -> None:
        """Allocate what `merged` runs, starting from the base; without adapters the base itself serves."""
        if fp8:
            self.merged_fp8 = fp8_quantize(self.weight)
        elif self.adapted:
            self.merged = self.weight.clone()

    def prepare_fp8_base(self) -> None:
        self.base_fp8 = fp8_quantize(self.weight), fp8_quantize(self.weight.t().contiguous())

    def run_base(self, x: torch.Tensor) -> torch.Tensor:
        if self.base_fp8 is None:
            return F.linear(x, self.weight, self.bias)
        return _FrozenLinear.apply(x, None, None, 1.0, self)

    def run_adapted(self, x: torch.Tensor, pair: Pair, scale: float) -> torch.Tensor:
        return _FrozenLinear.apply(x, *pair, scale, self)

    def run_merged(self, x: torch.Tensor | Fp8Tensor) -> torch.Tensor:
        if self.merged_fp8 is not None:
            dtype = x.dtype if isinstance(x, torch.Tensor) else self.weight.dtype
            return fp8_linear(x, self.merged_fp8, self.bias, out_dtype=dtype)
        return F.linear(x, self.weight if self.merged is None else self.merged, self.bias)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """x·Wᵀ + b of the base, a fresh tensor."""
        if self.base_fp8 is None:
            return F.linear(x, self.weight, self.bias)
        return fp8_linear(x, self.base_fp8[0], self.bias, out_dtype=x.dtype)

    def product_back(self, y: torch.Tensor) -> torch.Tensor:
        """y·W of the base."""
        if self.base_fp8 is None:
            return y @ self.weight
        return fp8_linear(y, self.base_fp8[1], out_dtype=y.dtype)


class _FrozenLinear(torch.autograd.Function):
    """y = x·Wᵀ + b + scale·(x·Aᵀ)·Bᵀ part by part; A and B may be None."""

    @staticmethod
    def forward(ctx, x, a, b, scale, linear: StackedLinear):
        ctx.linear, ctx.scale, ctx.shape = linear, scale, x.shape
        rows = x.reshape(-1, x.shape[-1])
        y = linear.product(rows)
        if a is None:
            ctx.save_for_backward()
        else:
            low = rows @ a.flatten(0, 1).t()  # [M, g·r]
            for part, out in _parts(linear, y):
                torch.baddbmm(out, _by_part(low, len(a))[part], b[part].transpose(1, 2), alpha=scale, out=out)
            ctx.save_for_backward(rows, low, a, b)
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx, y_grad):
        linear, scale = ctx.linear, ctx.scale
        y_grad = y_grad.reshape(-1, y_grad.shape[-1])
        x_grad = linear.product_back(y_grad) if ctx.needs_input_grad[0] else None
        saved = ctx.saved_tensors  # read once: under recomputation a second read fails
        if not saved:
            return x_grad.view(ctx.shape), None, None, None, None
        rows, low, a, b = saved
        low_grad, b_grad = torch.empty_like(low), torch.empty_like(b)
        for part, out in _parts(linear, y_grad):
            torch.bmm(out, b[part], out=_by_part(low_grad, len(a))[part])
            torch.bmm(out.transpose(1, 2), _by_part(low, len(a))[part], out=b_grad[part])
        low_grad *= scale
        b_grad *= scale
        if x_grad is not None:
            x_grad = x_grad.addmm_(low_grad, a.flatten(0, 1)).view(ctx.shape)
        a_grad = (low_grad.t() @ rows).view(a.shape)
        return x_grad, a_grad, b_grad, None, None


def _by_part(low: torch.Tensor, parts: int) -> torch.Tensor:
    """[M, g·r] as [g, M, r]."""
    return low.view(len(low), parts, -1).transpose(0, 1)


def _parts(linear: StackedLinear, y: torch.Tensor) -> list[tuple[slice, torch.Tensor]]:
    """(which adapters, the [g', M, n] view of their outputs), in one piece where every part is adapted."""
    by_part = y.view(len(y), len(linear.names), linear.part_size).transpose(0, 1)
    if len(linear.adapted) == len(linear.names):
        return [(slice(None), by_part)]
    return [(slice(i, i + 1), by_part[part : part + 1]) for i, part in enumerate(linear.adapted)]
