"""A frozen linear layer, stacked from stock ones, in the forms the trainer needs.

    base      W, in the model's dtype or as e4m3 quantised once
    adapted   W with LoRA beside it: what is trained, and what the window's steps run
    merged    W + (alpha/r)·B·A, in the model's dtype or as e4m3, rewritten in place after every update

Only x, A·x and the adapter are saved for the backward: the frozen weight needs no gradient, and dx, dA and dB are
written out. Low-rank products are never quantised.

Where a low-rank product costs more than a full one, `adapted` folds the adapter into W in the forward and takes dA and
dB from dW: per row that is 2KN instead of 6r(K + N) operations, less for K < 6r. Only in float32: in bfloat16 small
updates would vanish in W.

Shapes: rows M, inputs K, outputs N = g·n of g stacked parts, rank r: x [..., K] -> [..., N]; A [g, r, K], B [g, n, r].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from advgrpo.policy.fused.lora import Pair, StackedAdapter
from advgrpo_kernels import Fp8Tensor, fp8_linear, fp8_quantize, gelu


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

    def folds(self, rank: int) -> bool:
        """Whether W + scale·B·A is computed instead of low-rank products."""
        narrow = self.weight.dtype == torch.float32 and self.weight.shape[1] < 6 * rank
        return narrow and self.base_fp8 is None

    def folded(self, a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
        """W + scale·B·A [N, K]."""
        weight = self.weight.clone()
        for parts, own in self._adapted_rows(weight):
            own.baddbmm_(b[parts], a[parts], alpha=scale)
        return weight

    def folded_gradients(self, weight_grad: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float):
        """(dA, dB) from dW [N, K]."""
        a_grad, b_grad = torch.empty_like(a), torch.empty_like(b)
        for parts, own in self._adapted_rows(weight_grad):
            a_part, b_part = a_grad[parts], b_grad[parts]
            torch.baddbmm(b_part, own, a[parts].transpose(1, 2), beta=0, alpha=scale, out=b_part)
            torch.baddbmm(a_part, b[parts].transpose(1, 2), own, beta=0, alpha=scale, out=a_part)
        return a_grad, b_grad

    def _adapted_rows(self, weight: torch.Tensor) -> list[tuple[slice, torch.Tensor]]:
        """(which adapters, the [g', n, K] view of their rows), in one piece where every part is adapted."""
        by_part = weight.view(len(self.names), self.part_size, -1)
        if len(self.adapted) == len(self.names):
            return [(slice(None), by_part)]
        return [(slice(i, i + 1), by_part[part : part + 1]) for i, part in enumerate(self.adapted)]

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
        return _FrozenLinear.apply(1.0, [self], x, None, None)

    def run_adapted(self, x: torch.Tensor, pair: Pair, scale: float) -> torch.Tensor:
        return _FrozenLinear.apply(scale, [self], x, *pair)

    def run_merged(self, x: torch.Tensor | Fp8Tensor) -> torch.Tensor:
        if self.merged_fp8 is not None:
            dtype = x.dtype if isinstance(x, torch.Tensor) else self.weight.dtype
            return fp8_linear(x, self.merged_fp8, self.bias, out_dtype=dtype)
        return F.linear(x, self._merged_or_base(), self.bias)

    def run_merged_gelu(self, x: torch.Tensor) -> torch.Tensor:
        """gelu_tanh(x·Wᵀ + b) of merged weights in the model's dtype, no gradient.

        On a GPU it is cuBLASLt's epilogue of the product: the wide result is written once and never read for GELU. The
        same operator on a CPU takes the exact GELU in place of the tanh form, so there it is not used.
        """
        if not x.is_cuda:
            return gelu(self.run_merged(x))
        y = torch._addmm_activation(self.bias, x.flatten(0, -2), self._merged_or_base().t(), use_gelu=True)
        return y.view(*x.shape[:-1], -1)

    def _merged_or_base(self) -> torch.Tensor:
        return self.weight if self.merged is None else self.merged

    def product(self, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """x·Wᵀ + b of the base, into `out` where it is given: x [M, K] -> [M, N]."""
        if self.base_fp8 is None:
            return torch.addmm(self.bias, x, self.weight.t(), out=out)
        y = fp8_linear(x, self.base_fp8[0], self.bias, out_dtype=x.dtype)
        return y if out is None else out.copy_(y)

    def product_back(self, y: torch.Tensor) -> torch.Tensor:
        """y·W of the base."""
        if self.base_fp8 is None:
            return y @ self.weight
        return fp8_linear(y, self.base_fp8[1], out_dtype=y.dtype)


def run_joint(
    layers: Sequence[StackedLinear], inputs: Sequence[torch.Tensor], pairs: Sequence[Pair | None], scale: float
) -> torch.Tensor:
    """Each layer of its own input [T_i, ..., K], base weights with LoRA, one after the other in one [ΣT_i, ..., N]."""
    flat = [t for x, pair in zip(inputs, pairs, strict=True) for t in (x, *(pair or (None, None)))]
    return _FrozenLinear.apply(scale, list(layers), *flat)


def run_joint_merged(layers: Sequence[StackedLinear], inputs: Sequence[torch.Tensor]) -> torch.Tensor:
    """Likewise with merged weights in the model's dtype; no gradient."""
    y = _joint_empty(layers, inputs)
    for layer, x, out in zip(layers, inputs, y.split([len(x) for x in inputs]), strict=True):
        torch.addmm(layer.bias, x.flatten(0, -2), layer._merged_or_base().t(), out=out.flatten(0, -2))
    return y


def _joint_empty(layers: Sequence[StackedLinear], inputs: Sequence[torch.Tensor]) -> torch.Tensor:
    first = inputs[0]
    return first.new_empty(sum(len(x) for x in inputs), *first.shape[1:-1], len(layers[0].weight))


class _FrozenLinear(torch.autograd.Function):
    """y_i = x_i·W_iᵀ + b_i + scale·(x_i·A_iᵀ)·B_iᵀ part by part, one below the other; A and B may be None."""

    @staticmethod
    def forward(ctx, scale, layers: list[StackedLinear], *tensors):
        ctx.layers, ctx.scale = layers, scale
        inputs = tensors[::3]
        ctx.shapes, ctx.adapted = [x.shape for x in inputs], [a is not None for a in tensors[1::3]]
        joint = len(layers) > 1
        y = _joint_empty(layers, inputs) if joint else None
        outs = [out.flatten(0, -2) for out in y.split([len(x) for x in inputs])] if joint else [None]
        saved = []
        for i, (layer, out) in enumerate(zip(layers, outs, strict=True)):
            x, a, b = tensors[3 * i : 3 * i + 3]
            rows = x.reshape(-1, x.shape[-1])
            if a is not None and layer.folds(a.shape[1]):
                weight = layer.folded(a, b, scale)
                product = torch.addmm(layer.bias, rows, weight.t(), out=out)
                saved += [rows, weight, a, b]
                continue
            product = layer.product(rows, out)
            if a is not None:
                low = rows @ a.flatten(0, 1).t()  # [M, g·r]
                for part, out_part in _parts(layer, product):
                    torch.baddbmm(
                        out_part, _by_part(low, len(a))[part], b[part].transpose(1, 2), alpha=scale, out=out_part
                    )
                saved += [rows, low, a, b]
        ctx.save_for_backward(*saved)
        return y if joint else product.view(*inputs[0].shape[:-1], -1)

    @staticmethod
    def backward(ctx, y_grad):
        saved = list(ctx.saved_tensors)  # read once: under recomputation a second read fails
        grads: list[torch.Tensor | None] = []
        y_grads = y_grad.split([shape[0] for shape in ctx.shapes]) if len(ctx.shapes) > 1 else [y_grad]
        for i, (layer, part, shape) in enumerate(zip(ctx.layers, y_grads, ctx.shapes, strict=True)):
            rows_grad = part.reshape(-1, part.shape[-1])
            wants_x, pair_grads = ctx.needs_input_grad[2 + 3 * i], (None, None)
            if ctx.adapted[i] and layer.folds(saved[2].shape[1]):
                rows, weight, a, b = saved[:4]
                x_grad = rows_grad @ weight if wants_x else None
                pair_grads = layer.folded_gradients(rows_grad.t() @ rows, a, b, ctx.scale)
                grads += [None if x_grad is None else x_grad.view(shape), *pair_grads]
                saved = saved[4:]
                continue
            x_grad = layer.product_back(rows_grad) if wants_x else None
            if ctx.adapted[i]:
                x_grad, *pair_grads = _adapter_gradients(layer, ctx.scale, rows_grad, x_grad, *saved[:4])
                saved = saved[4:]
            grads += [None if x_grad is None else x_grad.view(shape), *pair_grads]
        return None, None, *grads


def _adapter_gradients(layer: StackedLinear, scale: float, y_grad, x_grad, rows, low, a, b):
    """(x_grad with the adapter's part, gradients of A and B)."""
    low_grad, b_grad = torch.empty_like(low), torch.empty_like(b)
    for part, out in _parts(layer, y_grad):
        low_part, b_part = _by_part(low_grad, len(a))[part], b_grad[part]
        torch.baddbmm(low_part, out, b[part], beta=0, alpha=scale, out=low_part)
        torch.baddbmm(b_part, out.transpose(1, 2), _by_part(low, len(a))[part], beta=0, alpha=scale, out=b_part)
    if x_grad is not None:
        x_grad = x_grad.addmm_(low_grad, a.flatten(0, 1))
    return x_grad, (low_grad.t() @ rows).view(a.shape), b_grad


def _by_part(low: torch.Tensor, parts: int) -> torch.Tensor:
    """[M, g·r] as [g, M, r]."""
    return low.view(len(low), parts, -1).transpose(0, 1)


def _parts(linear: StackedLinear, y: torch.Tensor) -> list[tuple[slice, torch.Tensor]]:
    """(which adapters, the [g', M, n] view of their outputs), in one piece where every part is adapted."""
    by_part = y.view(len(y), len(linear.names), linear.part_size).transpose(0, 1)
    if len(linear.adapted) == len(linear.names):
        return [(slice(None), by_part)]
    return [(slice(i, i + 1), by_part[part : part + 1]) for i, part in enumerate(linear.adapted)]
