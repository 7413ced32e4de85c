"""Frozen linear layers of diffusers' own blocks as e4m3, quantised once: `model.base_precision fp8` of a base in parts
(sharding.py).

    y  = x̂·Wᵀ + b, W = s ∘ Q        x̂ is x, quantised row by row; Q e4m3 and a scale s for each row (kernels: fp8.py)
    dx = (dy ∘ s)·Q                 in the dtype of dy, of the same Q: no transpose is kept, a weight takes one byte

Which layers: those of all blocks but the first and the last, without the modulation, as our forward has it
(fused/transformer.py). Adapters and their products keep their dtype.

Shapes: x [..., K] -> y [..., N]; Q [N, K], s [N, 1] float32.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import ModelMixin
from torch import nn
from torch.autograd.function import once_differentiable

from advgrpo.policy.adapters import block_names, modulates
from advgrpo_kernels import Fp8Tensor, fp8_linear, fp8_quantize


class Fp8Linear(nn.Module):
    """A frozen linear layer, in the place of a stock one or under PEFT's adapter.

    Its weight and scales are parameters, so that `fully_shard` cuts both by rows, and a gather brings the same bits.

    Args:
        linear: frozen, of sizes that are multiples of 16.
        device: where it is quantised and lies; the linear may be on the host.
    """

    def __init__(self, linear: nn.Linear, device: torch.device):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        data, scale = fp8_quantize(linear.weight.detach().to(device))
        self.weight, self.scale = (nn.Parameter(each, requires_grad=False) for each in (data, scale))
        bias = linear.bias
        self.bias = None if bias is None else nn.Parameter(bias.detach().to(device), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Product.apply(x, self.weight, self.scale, self.bias)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, data: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.save_for_backward(data, scale)
        return fp8_linear(x, Fp8Tensor(data, scale), bias, out_dtype=x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor):
        data, scale = ctx.saved_tensors
        # Multiplied in float32, rounded once; on a GPU in one kernel, without a float32 tensor of the gradient's size.
        scaled = torch.mul(gradient, scale.t(), out=torch.empty_like(gradient))
        return scaled @ data.to(gradient.dtype), None, None, None


def quantized_blocks(network: ModelMixin) -> list[str]:
    """Names of the blocks whose linear layers are quantised."""
    return block_names(network)[1:-1]


def quantize(block: nn.Module, device: torch.device) -> None:
    """Put `Fp8Linear` in the place of a block's frozen linear layers, but for its modulation's."""
    linear = {n: m for n, m in block.named_modules() if isinstance(m, nn.Linear) and not m.weight.requires_grad}
    for name, module in linear.items():
        if not modulates(name) and all(size % 16 == 0 for size in module.weight.shape):
            parent, _, own = name.rpartition(".")
            setattr(block.get_submodule(parent), own, Fp8Linear(module, device))
