"""A frozen linear layer, stacked from stock ones, in the forms the trainer needs.

    base      W, in the model's dtype or as e4m3 quantised once
    adapted   W with LoRA beside it: what is trained, and what the window's steps run
    merged    W + (alpha/r)·B·A, in the model's dtype or as e4m3, rewritten in place after every update

Only x, A·x and the adapter are saved for the backward: the frozen weight needs no gradient, and dx, dA and dB are
written out. What has a gradient is one autograd function for each way to compute it:

    _Quantised  W as e4m3, no adapter
    _LowRank    W in either form and low-rank products beside it, which are never quantised
    _Folded     W + scale·B·A in the forward, dA and dB from dW, where a low-rank product costs more than a full one:
                per row 2KN instead of 6r(K + N) operations, less for K < 6r. Only in float32: in bfloat16 small updates
                would vanish in W
    _Joint      two layers into one tensor, each in the way it has alone

Shapes: rows M, inputs K, outputs N = g·n of g stacked parts, rank r: x [..., K] -> [..., N]; A [g, r, K], B [g, n, r].
Of joint layers T image tokens and S text tokens, R rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, overload

import torch

from advgrpo.policy.fused.lora import Pair, StackedAdapter
from advgrpo_kernels import Fp8Tensor, fp8_linear, fp8_quantize, gelu, linear, matrix_product

Activations = torch.Tensor | Fp8Tensor  # the latter between merged linears in e4m3
_Both = tuple[torch.Tensor, torch.Tensor]  # of image and of text
_Two = tuple["StackedLinear", "StackedLinear"]


def as_written(tensors: Iterable[torch.Tensor]) -> tuple[int, ...]:
    """Changes when one of them is another or is written to, as autograd counts it: not through `.data`. Only of tensors
    that are kept, since another could come to lie where one was."""
    return tuple(value for each in tensors for value in (each.data_ptr(), each._version))


class StackedLinear(torch.nn.Module):
    """Rows of several stock linears in one weight; the stock modules can be pointed at its slices.

    A module, so that weight and bias can lie in parts on several processes, here while its block runs (sharding.py);
    who reads them otherwise reads their shapes alone.
    """

    def __init__(self, names: Sequence[str], weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor]):
        super().__init__()
        self.names = tuple(names)
        stacked = (parts[0] if len(parts) == 1 else torch.cat(list(parts)) for parts in (weights, biases))
        self.weight, self.bias = (torch.nn.Parameter(tensor, requires_grad=False) for tensor in stacked)
        self.sizes = [len(weight) for weight in weights]
        self.part_size = self.sizes[0]  # of all, but of a modulation's
        self.adapted: list[int] = []  # parts with an adapter
        self.adapter_number: int | None = None  # which of `LoraWeights.pairs` is theirs
        self.merged: torch.Tensor | None = None
        self.merged_fp8: Fp8Tensor | None = None
        self.base_fp8: tuple[Fp8Tensor, Fp8Tensor] | None = None  # W and its transpose, each with row scales
        self.shared_out = False  # whether weight and bias lie in parts on several processes
        self._kept_fold: tuple[tuple[float, ...], tuple[torch.Tensor, ...], torch.Tensor] | None = None

    def folds(self, rank: int) -> bool:
        """Whether W + scale·B·A is computed instead of low-rank products."""
        narrow = self.weight.dtype == torch.float32 and self.weight.shape[1] < 6 * rank
        return narrow and self.base_fp8 is None

    def folded(self, a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
        """W + scale·B·A [N, K], which nobody may write to.

        On a CPU it is kept until A, B or W are others or are written to, which autograd counts but through `.data`: the
        forwards of a rollout share it, and those between two optimizer steps. Never on a GPU, where a captured graph
        has to compute it at every replay, nor where W lies in parts, which would be whole here for good.
        """
        if not self.weight.is_cpu or self.shared_out or any(each.is_inference() for each in (self.weight, a, b)):
            return self._fold(a, b, scale)
        given = self.weight.detach(), a.detach(), b.detach()  # kept with it, so that no other has their addresses
        key = scale, *as_written(given)
        if self._kept_fold is None or self._kept_fold[0] != key:
            self._kept_fold = key, given, self._fold(a, b, scale)
        return self._kept_fold[-1]

    def _fold(self, a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
        weight = self.weight.clone()
        for parts, own in self._adapted_rows(weight):
            own.baddbmm_(b[parts], a[parts], alpha=scale)
        return weight

    def folded_gradients(
        self, weight_grad: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
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

    def adapter(self, is_target: Callable[[str], bool]) -> StackedAdapter | None:
        """Decide which parts are adapted; None without any."""
        self.adapted = [i for i, name in enumerate(self.names) if is_target(name)]
        if not self.adapted:
            return None
        return StackedAdapter(tuple(self.names[i] for i in self.adapted), self.weight.shape[1], self.part_size)

    def slices(self) -> list[torch.Tensor]:
        """The stock weights [n, K], as views."""
        return list(self.weight.split(self.sizes))

    def prepare_merged(self, fp8: bool) -> None:
        """Allocate what `merged` runs, starting from the base; without adapters the base itself serves."""
        if fp8:
            self.merged_fp8 = fp8_quantize(self.weight)
        elif self.adapted:
            self.merged = self.weight.clone()

    def allocate_merged(self, fp8: bool, device: torch.device) -> None:
        """Room for what `merged` runs, where the weight is on the meta device; whoever has it writes the rows."""
        if fp8:
            scale = torch.empty(len(self.weight), 1, device=device)
            self.merged_fp8 = Fp8Tensor(torch.empty_like(self.weight, dtype=torch.float8_e4m3fn, device=device), scale)
        else:
            self.merged = torch.empty_like(self.weight, device=device)

    def merged_rows(self, part: int) -> torch.Tensor | Fp8Tensor:
        """The rows of a part in what `merged` runs, as views."""
        rows = slice(part * self.part_size, (part + 1) * self.part_size)
        if self.merged_fp8 is not None:
            return Fp8Tensor(self.merged_fp8.data[rows], self.merged_fp8.scale[rows])
        return self._merged_or_base()[rows]

    def prepare_fp8_base(self) -> None:
        self.base_fp8 = fp8_quantize(self.weight), fp8_quantize(self.weight.t().contiguous())

    def run_base(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., K] -> [..., N] of W alone."""
        if self.base_fp8 is None:
            return linear(x, self.weight, self.bias)
        return _Quantised.apply(x, self)

    def run_adapted(self, x: torch.Tensor, pair: Pair, scale: float) -> torch.Tensor:
        """x [..., K] -> [..., N] of W + scale·B·A, differentiable in x, A and B."""
        a, b = pair
        way = _Folded if self.folds(a.shape[1]) else _LowRank
        return way.apply(x, a, b, self, scale)

    def run_merged(self, x: Activations) -> torch.Tensor:
        if self.merged_fp8 is not None:
            dtype = x.dtype if isinstance(x, torch.Tensor) else self.weight.dtype
            return fp8_linear(x, self.merged_fp8, self.bias, out_dtype=dtype)
        return linear(x, self._merged_or_base(), self.bias)

    def merged_into(self, x: Activations, out: torch.Tensor) -> None:
        """`run_merged` of x [..., K] into out [M, N]."""
        if self.merged_fp8 is None:
            matrix_product(_as_rows(x), self._merged_or_base().t(), self.bias, out=out)
            return
        rows = Fp8Tensor(*map(_as_rows, x)) if isinstance(x, Fp8Tensor) else _as_rows(x)
        fp8_linear(rows, self.merged_fp8, self.bias, out_dtype=out.dtype, out=out)

    def run_merged_gelu(self, x: torch.Tensor) -> torch.Tensor:
        """gelu_tanh(x·Wᵀ + b) of merged weights in the model's dtype, no gradient.

        On a GPU it is cuBLASLt's epilogue of the product: the wide result is written once and never read for GELU. The
        same operator on a CPU takes the exact GELU in place of the tanh form, so there it is not used, and our kernel
        adds the bias.
        """
        if not x.is_cuda:
            return gelu(linear(x, self._merged_or_base()), self.bias)
        y = torch._addmm_activation(self.bias, x.flatten(0, -2), self._merged_or_base().t(), use_gelu=True)
        return y.view(*x.shape[:-1], -1)

    def _merged_or_base(self) -> torch.Tensor:
        return self.weight if self.merged is None else self.merged

    def product(self, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """x·Wᵀ + b of the base, into `out` where it is given: x [M, K] -> [M, N]."""
        if self.base_fp8 is None:
            return matrix_product(x, self.weight.t(), self.bias, out=out)
        return fp8_linear(x, self.base_fp8[0], self.bias, out_dtype=x.dtype, out=out)

    def product_back(self, y: torch.Tensor) -> torch.Tensor:
        """y·W of the base."""
        if self.base_fp8 is None:
            return matrix_product(y, self.weight)
        return fp8_linear(y, self.base_fp8[1], out_dtype=y.dtype)


def run_joint(layers: _Two, inputs: _Both, pairs: tuple[Pair | None, Pair | None], scale: float) -> torch.Tensor:
    """Image and text layer of their inputs [T, R, K] and [S, R, K], base weights with LoRA or without, as one
    [T + S, R, N], image first."""
    (image_a, image_b), (text_a, text_b) = (pair or (None, None) for pair in pairs)
    return _Joint.apply(inputs[0], image_a, image_b, inputs[1], text_a, text_b, layers, scale)


def run_joint_merged(layers: _Two, inputs: tuple[Activations, Activations]) -> torch.Tensor:
    """Likewise with merged weights; no gradient."""
    image, text = inputs
    y, outs = _joint_output(layers, (image.data, text.data))
    for layer, x, out in zip(layers, inputs, outs, strict=True):
        layer.merged_into(x, out)
    return y


def _joint_output(layers: _Two, inputs: _Both) -> tuple[torch.Tensor, _Both]:
    """Uninitialised [T + S, R, N] in the model's dtype, and its parts as matrices [T·R, N] and [S·R, N]."""
    image, text = inputs
    shape = len(image) + len(text), *image.shape[1:-1], len(layers[0].weight)
    y = image.new_empty(shape, dtype=layers[0].weight.dtype)
    image_out, text_out = (part.flatten(0, -2) for part in y.split([len(image), len(text)]))
    return y, (image_out, text_out)


class _Quantised(torch.autograd.Function):
    """x·Wᵀ + b with W as e4m3; nothing is saved."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, layer: StackedLinear) -> torch.Tensor:
        """x [..., K] -> [..., N]."""
        ctx.layer = layer
        return _as_tokens(layer.product(_as_rows(x)), x)

    @staticmethod
    def backward(ctx, y_grad: torch.Tensor):
        """dy [..., N] -> dx [..., K]."""
        return _as_tokens(ctx.layer.product_back(_as_rows(y_grad)), y_grad), None


class _LowRank(torch.autograd.Function):
    """x·Wᵀ + b + scale·(x·Aᵀ)·Bᵀ part by part."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, layer: StackedLinear, scale: float):
        """x [..., K], A [g, r, K], B [g, n, r] -> [..., N]."""
        rows = _as_rows(x)
        y, low = _low_rank(layer, scale, rows, a, b)
        ctx.layer, ctx.scale = layer, scale
        ctx.save_for_backward(rows, low, a, b)
        return _as_tokens(y, x)

    @staticmethod
    def backward(ctx, y_grad: torch.Tensor):
        """dy [..., N] -> dx [..., K], dA, dB."""
        rows, low, a, b = ctx.saved_tensors
        x_grad, a_grad, b_grad = _low_rank_gradients(
            ctx.layer, ctx.scale, _as_rows(y_grad), rows, low, a, b, wants_x=ctx.needs_input_grad[0]
        )
        return _as_tokens(x_grad, y_grad), a_grad, b_grad, None, None


class _Folded(torch.autograd.Function):
    """x·(W + scale·B·A)ᵀ + b."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, layer: StackedLinear, scale: float):
        """x [..., K], A [g, r, K], B [g, n, r] -> [..., N]."""
        rows = _as_rows(x)
        y, weight = _folded(layer, scale, rows, a, b)
        ctx.layer, ctx.scale = layer, scale
        ctx.save_for_backward(rows, weight, a, b)
        return _as_tokens(y, x)

    @staticmethod
    def backward(ctx, y_grad: torch.Tensor):
        """dy [..., N] -> dx [..., K], dA, dB."""
        rows, weight, a, b = ctx.saved_tensors
        x_grad, a_grad, b_grad = _folded_gradients(
            ctx.layer, ctx.scale, _as_rows(y_grad), rows, weight, a, b, wants_x=ctx.needs_input_grad[0]
        )
        return _as_tokens(x_grad, y_grad), a_grad, b_grad, None, None


class _Joint(torch.autograd.Function):
    """Image and text layer one below the other."""

    @staticmethod
    def forward(
        ctx,
        image: torch.Tensor,
        image_a: torch.Tensor | None,
        image_b: torch.Tensor | None,
        text: torch.Tensor,
        text_a: torch.Tensor | None,
        text_b: torch.Tensor | None,
        layers: _Two,
        scale: float,
    ):
        """image [T, R, K], text [S, R, K], A [g, r, K] and B [g, n, r] of each or None -> [T + S, R, N]."""
        y, (image_out, text_out) = _joint_output(layers, (image, text))
        image_saved = _write(image_out, layers[0], scale, image, image_a, image_b)
        text_saved = _write(text_out, layers[1], scale, text, text_a, text_b)
        ctx.layers, ctx.scale, ctx.lengths = layers, scale, [len(image), len(text)]
        ctx.save_for_backward(*image_saved, *text_saved)
        return y

    @staticmethod
    def backward(ctx, y_grad: torch.Tensor):
        """dy [T + S, R, N] -> image and text of [., R, K], each followed by dA and dB."""
        saved = ctx.saved_tensors  # read once: under recomputation a second read fails
        (image, text), (image_grad, text_grad) = ctx.layers, y_grad.split(ctx.lengths)
        of_image = _written_gradients(image_grad, image, ctx.scale, _Saved(*saved[:4]), ctx.needs_input_grad[0])
        of_text = _written_gradients(text_grad, text, ctx.scale, _Saved(*saved[4:]), ctx.needs_input_grad[3])
        return *of_image, *of_text, None, None


class _Saved(NamedTuple):
    """What a joint layer's backward reads; nothing without an adapter."""

    rows: torch.Tensor | None = None  # [M, K]
    kept: torch.Tensor | None = None  # `low` of `_low_rank` or `weight` of `_folded`
    a: torch.Tensor | None = None
    b: torch.Tensor | None = None


def _write(
    out: torch.Tensor,
    layer: StackedLinear,
    scale: float,
    x: torch.Tensor,
    a: torch.Tensor | None,
    b: torch.Tensor | None,
) -> _Saved:
    """The layer of x [..., K] into `out` [M, N]."""
    rows = _as_rows(x)
    if a is None or b is None:
        layer.product(rows, out)
        return _Saved()
    way = _folded if layer.folds(a.shape[1]) else _low_rank
    _, kept = way(layer, scale, rows, a, b, out)
    return _Saved(rows, kept, a, b)


def _written_gradients(
    y_grad: torch.Tensor, layer: StackedLinear, scale: float, saved: _Saved, wants_x: bool
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """dy [..., N] -> (dx [..., K] or None, dA, dB), the last two None without an adapter."""
    rows_grad = _as_rows(y_grad)
    rows, kept, a, b = saved
    if rows is None or kept is None or a is None or b is None:
        return _as_tokens(layer.product_back(rows_grad) if wants_x else None, y_grad), None, None
    way = _folded_gradients if layer.folds(a.shape[1]) else _low_rank_gradients
    x_grad, a_grad, b_grad = way(layer, scale, rows_grad, rows, kept, a, b, wants_x=wants_x)
    return _as_tokens(x_grad, y_grad), a_grad, b_grad


def _low_rank(
    layer: StackedLinear,
    scale: float,
    rows: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """rows [M, K] -> (y [M, N], in `out` where it is given, and low = x·Aᵀ [M, g·r])."""
    y = layer.product(rows, out)
    low = matrix_product(rows, a.flatten(0, 1).t())
    for part, y_part in _parts(layer, y):
        torch.baddbmm(y_part, _by_part(low, len(a))[part], b[part].transpose(1, 2), alpha=scale, out=y_part)
    return y, low


def _low_rank_gradients(
    layer: StackedLinear,
    scale: float,
    y_grad: torch.Tensor,
    rows: torch.Tensor,
    low: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    wants_x: bool,
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """dy [M, N] -> (dx [M, K] or None, dA [g, r, K], dB [g, n, r]) from rows [M, K] and low [M, g·r]."""
    x_grad = layer.product_back(y_grad) if wants_x else None
    low_grad, b_grad = torch.empty_like(low), torch.empty_like(b)
    for part, y_part in _parts(layer, y_grad):
        low_part, b_part = _by_part(low_grad, len(a))[part], b_grad[part]
        torch.baddbmm(low_part, y_part, b[part], beta=0, alpha=scale, out=low_part)
        torch.baddbmm(b_part, y_part.transpose(1, 2), _by_part(low, len(a))[part], beta=0, alpha=scale, out=b_part)
    if x_grad is not None:
        x_grad = x_grad.addmm_(low_grad, a.flatten(0, 1))
    return x_grad, matrix_product(low_grad.t(), rows).view(a.shape), b_grad


def _folded(
    layer: StackedLinear,
    scale: float,
    rows: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """rows [M, K] -> (y [M, N], in `out` where it is given, and weight = W + scale·B·A [N, K])."""
    weight = layer.folded(a, b, scale)
    return matrix_product(rows, weight.t(), layer.bias, out=out), weight


def _folded_gradients(
    layer: StackedLinear,
    scale: float,
    y_grad: torch.Tensor,
    rows: torch.Tensor,
    weight: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    wants_x: bool,
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """dy [M, N] -> (dx [M, K] or None, dA [g, r, K], dB [g, n, r]) from rows [M, K] and weight [N, K]."""
    x_grad = matrix_product(y_grad, weight) if wants_x else None
    a_grad, b_grad = layer.folded_gradients(matrix_product(y_grad.t(), rows), a, b, scale)
    return x_grad, a_grad, b_grad


def _as_rows(x: torch.Tensor) -> torch.Tensor:
    """[..., K] as [M, K]."""
    return x.reshape(-1, x.shape[-1])


@overload
def _as_tokens(rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor: ...
@overload
def _as_tokens(rows: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor | None: ...
def _as_tokens(rows: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor | None:
    """[M, N] as [..., N] where `like` is [..., any]."""
    return None if rows is None else rows.view(*like.shape[:-1], -1)


def _by_part(low: torch.Tensor, parts: int) -> torch.Tensor:
    """[M, g·r] as [g, M, r]."""
    return low.view(len(low), parts, -1).transpose(0, 1)


def _parts(linear: StackedLinear, y: torch.Tensor) -> list[tuple[slice, torch.Tensor]]:
    """(which adapters, the [g', M, n] view of their outputs), in one piece where every part is adapted."""
    by_part = y.view(len(y), len(linear.names), linear.part_size).transpose(0, 1)
    if len(linear.adapted) == len(linear.names):
        return [(slice(None), by_part)]
    return [(slice(i, i + 1), by_part[part : part + 1]) for i, part in enumerate(linear.adapted)]
