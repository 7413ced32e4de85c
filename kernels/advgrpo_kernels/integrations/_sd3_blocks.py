"""diffusers' SD3 and SD3.5: joint blocks, with a second attention over the image alone or without, and the last norm.

Fused: AdaLN norms (both of a dual-attention block in one pass), gate and residual with the following norm, GELU, and
the norms of q and k with the layout of attention, the last for models with RMS-normalised q and k (SD3.5) and the stock
attention processor; other attentions run as they are. The last norm is also FLUX.1's and Qwen-Image's.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..ops.ada_layer_norm import ada_layer_norm
from ..ops.gated_residual import gated_residual
from ..ops.qk_rms_norm import qk_rms_norm
from . import _blocks
from ._self_check import Case

PROCESSORS = ("JointAttnProcessor2_0",)


def _misfit(block: Any) -> str | None:
    norms, layers = [block.norm1.norm, block.norm2, block.norm1_context.norm], [block.ff]
    if not block.context_pre_only:
        norms.append(block.norm2_context)
        layers.append(block.ff_context)
    return _blocks.norm_misfit(*norms) or _blocks.feed_forward_misfit(*layers)


def _parts(block: Any) -> Iterator[nn.Module]:
    for norm in (block.norm1, block.norm1_context):
        yield from (norm, norm.norm)
    yield from (block.norm2, block.ff, block.ff.net[0])
    if not block.context_pre_only:
        yield from (block.norm2_context, block.ff_context, block.ff_context.net[0])
    for attn in (block.attn, block.attn2):
        yield from _blocks.parts_of_attention(attn)


def _frozen(block: Any) -> Iterator[nn.Module]:
    yield from (block.norm1.linear, block.norm1_context.linear)
    for attn in (block.attn, block.attn2):
        yield from () if attn is None else _blocks.qk_norms(attn)


def _attention(attn: Any, x: torch.Tensor, context: torch.Tensor | None = None, **kwargs):
    """What `attn(hidden_states=x, encoder_hidden_states=context)` gives."""
    if kwargs or not _blocks.is_fusible(attn, PROCESSORS):
        if context is None:
            return attn(hidden_states=x, **kwargs)
        return attn(hidden_states=x, encoder_hidden_states=context, **kwargs)
    qkv = _blocks.image_heads(attn, x)
    text, text_weights = None, None
    if context is not None:
        text = _blocks.text_heads(attn, context)
        text_weights = (attn.norm_added_q.weight, attn.norm_added_k.weight)
    weights = (attn.norm_q.weight, attn.norm_k.weight)
    inputs = qk_rms_norm(qkv, weights, txt_qkv=text, txt_weights=text_weights, eps=attn.norm_q.eps)
    out = F.scaled_dot_product_attention(*inputs).transpose(1, 2).flatten(2)
    image = attn.to_out[1](attn.to_out[0](out[:, : x.shape[1]]))
    if context is None:
        return image
    text = out[:, x.shape[1] :]
    return image, text if attn.context_pre_only else attn.to_add_out(text)


def block_forward(
    self,
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    temb: torch.Tensor,
    joint_attention_kwargs: dict | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """`JointTransformerBlock.forward`: (encoder_hidden_states, hidden_states)."""
    # Feed-forward in chunks saves memory at the price of speed: not fused.
    if self._chunk_size is not None or _blocks.runs_stock(self, _parts(self), _frozen(self), _misfit(self)):
        return _blocks.stock(self)(self, hidden_states, encoder_hidden_states, temb, joint_attention_kwargs)
    kwargs, images = joint_attention_kwargs or {}, hidden_states.shape[0]
    emb = self.norm1.linear(self.norm1.silu(temb))
    emb = _blocks.modulation(emb, images, 9 if self.use_dual_attention else 6)
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp, *second = emb
    normed: Any = ada_layer_norm(hidden_states, shift, scale, *second[:2], eps=self.norm1.norm.eps)
    normed, *normed2 = normed if self.use_dual_attention else (normed,)
    if self.context_pre_only:
        context, text_emb = continuous_norm_forward(self.norm1_context, encoder_hidden_states, temb), []
    else:
        text_emb = _blocks.modulation(self.norm1_context.linear(self.norm1_context.silu(temb)), images, 6)
        context = ada_layer_norm(encoder_hidden_states, text_emb[0], text_emb[1], eps=self.norm1_context.norm.eps)
    out, text_out = _attention(self.attn, normed, context, **kwargs)
    dual = (_attention(self.attn2, *normed2, **kwargs), second[2]) if self.use_dual_attention else ()
    following = {"shift": shift_mlp, "scale": scale_mlp, "eps": self.norm2.eps}
    hidden_states, normed = gated_residual(hidden_states, out, gate, *dual, **following)
    hidden_states = gated_residual(hidden_states, _blocks.feed_forward(self.ff, normed), gate_mlp)
    if self.context_pre_only:
        return None, hidden_states
    text = encoder_hidden_states, text_out, text_emb[2:], self.norm2_context, self.ff_context
    return _blocks.rest_of_stream(*text), hidden_states


def _norm_misfit(module: Any) -> str | None:
    return _blocks.norm_misfit(module.norm)


def continuous_norm_forward(self, x: torch.Tensor, conditioning_embedding: torch.Tensor) -> torch.Tensor:
    """`AdaLayerNormContinuous.forward`; its linear gives the scale first."""
    if _blocks.runs_stock(self, iter((self.norm,)), iter((self.linear,)), _norm_misfit(self)):
        return _blocks.stock(self)(self, x, conditioning_embedding)
    emb = self.linear(self.silu(conditioning_embedding).to(x.dtype))
    scale, shift = _blocks.modulation(emb, x.shape[0], 2)
    return ada_layer_norm(x, shift, scale, eps=self.norm.eps)


def _block_cases(original: Any, cls: Any) -> Iterator[Case]:
    """Blocks as SD3.5-medium has them, with two attentions, and as the last one is."""
    sizes = {"num_attention_heads": _blocks.HEADS, "attention_head_dim": _blocks.WIDTH // _blocks.HEADS}
    for kinds in ({"use_dual_attention": True}, {"context_pre_only": True}):

        def make(kinds=kinds):
            return cls(_blocks.WIDTH, **sizes, qk_norm="rms_norm", **kinds)

        def call(function, block, image, text, temb):
            return function(block, image, text, temb)[::-1]

        for case in _blocks.block_cases(make, call):
            yield dataclasses.replace(case, name=f"{next(iter(kinds))}, {case.name}")


def _norm_cases(original: Any, cls: Any) -> Iterator[Case]:
    def make():
        return cls(_blocks.WIDTH, _blocks.WIDTH, elementwise_affine=False, eps=1e-6)

    yield from _blocks.block_cases(make, lambda function, norm, image, text, temb: (function(norm, image, temb),))


BLOCK = _blocks.Fused(
    "JointTransformerBlock",
    "diffusers.models.attention",
    (block_forward,),
    _block_cases,
    _misfit,
    functools.partial(_blocks.about_block, PROCESSORS),
)
NORM = _blocks.Fused(
    "AdaLayerNormContinuous",
    "diffusers.models.normalization",
    (continuous_norm_forward,),
    _norm_cases,
    _norm_misfit,
    lambda module: "fused norm and modulation",
)
