"""Layers whose `forward` a model's own layer adopts, in the form that `kernelize` of Hugging Face's `kernels` asks for.

A layer here has no state and no constructor: its annotations name what the adopting module has. Each has the name and
the signature of the class that it stands for:

| layer | of | fused |
|---|---|---|
| `AdaLayerNormZero`, `SD35AdaLayerNormZeroX`, `AdaLayerNormContinuous` | diffusers | norm and modulation |
| `GELU` | diffusers' feed-forward, with `approximate="tanh"` | what follows its matrix product |
| `GeluTanh`, `NewGELU` | transformers' names of tanh-GELU | the whole layer |
| `Flux2SwiGLU` | diffusers' FLUX.2, in all its feed-forwards | the whole layer |

The other ops are no layers: `qk_rms_norm` stands for four norms, three concatenations and a transpose, `gated_residual`
for a line in a block's forward, and `fp8_linear` needs weights that are stored otherwise.

Gradients reach the activations. While the linear of an adaptive norm trains, so that its shift and scale need a
gradient, the norm runs in PyTorch and says so once. Its inner `norm` is not called as a module, so hooks on it do not
fire.
"""

from __future__ import annotations

import torch
from torch import nn

from .ops.ada_layer_norm import ada_layer_norm
from .ops.gelu import gelu
from .ops.swiglu import swiglu

__all__ = [
    "GELU",
    "AdaLayerNormContinuous",
    "AdaLayerNormZero",
    "Flux2SwiGLU",
    "GeluTanh",
    "NewGELU",
    "SD35AdaLayerNormZeroX",
]


def _eps_of(norm: nn.Module) -> float:
    if not isinstance(norm, nn.LayerNorm) or norm.elementwise_affine:
        raise ValueError(f"norm must be a LayerNorm without affine parameters, which alone is fused, got {norm}")
    return norm.eps


class AdaLayerNormZero(nn.Module):
    """Norm of x [B, T, C], modulated by a linear of emb [B, E]: (y, gate_msa, shift_mlp, scale_mlp, gate_mlp).

    Raises:
        ValueError: the adopting module's norm is another than a LayerNorm without affine parameters.
    """

    can_torch_compile = True
    emb: nn.Module | None
    silu: nn.Module
    linear: nn.Module
    norm: nn.Module

    def forward(
        self,
        x: torch.Tensor,
        timestep: torch.Tensor | None = None,
        class_labels: torch.Tensor | None = None,
        hidden_dtype: torch.dtype | None = None,
        emb: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        if self.emb is not None:
            emb = self.emb(timestep, class_labels, hidden_dtype=hidden_dtype)
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = self.linear(self.silu(emb)).chunk(6, dim=1)
        return ada_layer_norm(x, shift, scale, eps=_eps_of(self.norm)), gate, shift_mlp, scale_mlp, gate_mlp


class SD35AdaLayerNormZeroX(nn.Module):
    """One norm of hidden_states [B, T, C] under the two modulations of a dual-attention block, in one pass.

    Gives (y, gate_msa, shift_mlp, scale_mlp, gate_mlp, y2, gate_msa2).

    Raises:
        ValueError: the adopting module's norm is another than a LayerNorm without affine parameters.
    """

    can_torch_compile = True
    silu: nn.Module
    linear: nn.Module
    norm: nn.Module

    def forward(self, hidden_states: torch.Tensor, emb: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp, shift2, scale2, gate2 = self.linear(self.silu(emb)).chunk(
            9, dim=1
        )
        y, y2 = ada_layer_norm(hidden_states, shift, scale, shift2, scale2, eps=_eps_of(self.norm))
        return y, gate, shift_mlp, scale_mlp, gate_mlp, y2, gate2


class AdaLayerNormContinuous(nn.Module):
    """Norm of x [B, T, C], modulated by a linear of conditioning_embedding [B, E]; that linear gives the scale first.

    Raises:
        ValueError: the adopting module's norm is another than a LayerNorm without affine parameters.
    """

    can_torch_compile = True
    silu: nn.Module
    linear: nn.Module
    norm: nn.Module

    def forward(self, x: torch.Tensor, conditioning_embedding: torch.Tensor) -> torch.Tensor:
        scale, shift = self.linear(self.silu(conditioning_embedding).to(x.dtype)).chunk(2, dim=1)
        return ada_layer_norm(x, shift, scale, eps=_eps_of(self.norm))


class GELU(nn.Module):
    """gelu_tanh(proj(hidden_states)) for hidden_states [..., C]; proj is called as it is, adapters included.

    Raises:
        ValueError: the adopting module's `approximate` is another than "tanh".
    """

    can_torch_compile = True
    proj: nn.Module
    approximate: str

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.approximate != "tanh":
            raise ValueError(f'approximate must be "tanh", which alone is fused, got {self.approximate!r}')
        return gelu(self.proj(hidden_states))


class GeluTanh(nn.Module):
    """gelu_tanh(input), any shape."""

    can_torch_compile = True

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return gelu(input)


class NewGELU(nn.Module):
    """gelu_tanh(input), any shape: the same formula under the name that GPT-2's activation has."""

    can_torch_compile = True

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return gelu(input)


class Flux2SwiGLU(nn.Module):
    """silu(gate)·value for x [..., 2F], gate first: [..., F].

    Raises:
        ValueError: the adopting module's `gate_fn` is another than a SiLU.
    """

    can_torch_compile = True
    gate_fn: nn.Module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not isinstance(self.gate_fn, nn.SiLU):
            raise ValueError(f"gate_fn must be a SiLU, which alone is fused, got {self.gate_fn}")
        return swiglu(x)
