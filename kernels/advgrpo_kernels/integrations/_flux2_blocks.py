"""diffusers' FLUX.2: the SwiGLU in the feed-forwards of both streams and beside the attention of blocks of one.

It is a module that all of them call, so that blocks, their attention processors (those with a cache of a reference
image's keys among them) and LoRA run as they are. In a block of one stream its input is a part of a wider product,
which the op reads in place. Not fused are the blocks' norms, gates and residuals, which are lines of their forwards,
and the norms of q and k.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..ops.swiglu import swiglu
from . import _blocks
from ._self_check import Case


def _misfit(module: Any) -> str | None:
    if not isinstance(module.gate_fn, nn.SiLU):
        return f"its gate_fn must be SiLU, got {module.gate_fn}"
    return None


def swiglu_forward(self, x: torch.Tensor) -> torch.Tensor:
    """`Flux2SwiGLU.forward`."""
    if _blocks.runs_stock(self, iter((self.gate_fn,)), iter(()), _misfit(self)):
        return _blocks.stock(self)(self, x)
    return swiglu(x)


def _cases(original: Any, cls: Any) -> Iterator[Case]:
    def call(function, module, image, text, temb):
        return function(module, image), function(module, text)

    yield from _blocks.block_cases(cls, call)


SWIGLU = _blocks.Fused(
    "Flux2SwiGLU",
    "diffusers.models.transformers.transformer_flux2",
    (swiglu_forward,),
    _cases,
    _misfit,
    lambda module: "fused gate",
)
