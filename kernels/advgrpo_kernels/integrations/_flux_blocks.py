"""diffusers' FLUX.1: blocks of two streams (image and text, each with norms and feed-forward) and of one.

Fused in a block of two streams: both AdaLN norms, gate and residual with the norm that follows, GELU, the norms of q
and k with their rotation and the joining of text and image; in one of a single stream: norm, q and k, GELU, gate and
residual. IP-Adapters, other attention processors, fused projections and arguments for the attention run the block's own
attention between the fused rest.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..ops.ada_layer_norm import ada_layer_norm
from ..ops.gated_residual import gated_residual
from ..ops.gelu import gelu
from . import _blocks

PROCESSORS = ("FluxAttnProcessor", "FluxAttnProcessor2_0")  # since 0.35, before


def _rotary(image_rotary_emb: Any) -> tuple[torch.Tensor, torch.Tensor] | None:
    """diffusers repeats every turn for both elements of its pair: [tokens, D] -> [tokens, D/2]."""
    if image_rotary_emb is None:
        return None
    cos, sin = image_rotary_emb
    return cos[:, ::2], sin[:, ::2]


def _is_known(image_rotary_emb: Any, x: torch.Tensor) -> bool:
    if image_rotary_emb is None:
        return True
    tensors = image_rotary_emb if isinstance(image_rotary_emb, (tuple, list)) else ()
    return len(tensors) == 2 and all(
        t.dim() == 2 and t.dtype == torch.float32 and t.device == x.device for t in tensors
    )


def _attention(attn: Any, x: torch.Tensor, context: torch.Tensor | None, image_rotary_emb: Any, kwargs: dict) -> Any:
    """What the block's attention gives: (image, text), with an IP-Adapter a third; without context one tensor."""
    if kwargs or not _blocks.is_fusible(attn, PROCESSORS) or not _is_known(image_rotary_emb, x):
        streams = {} if context is None else {"encoder_hidden_states": context}
        return attn(hidden_states=x, **streams, image_rotary_emb=image_rotary_emb, **kwargs)
    image, text = _blocks.joint_attention(attn, x, context, _rotary(image_rotary_emb))
    if text is None:
        return image
    return attn.to_out[1](attn.to_out[0](image)), attn.to_add_out(text)


def _block_misfit(block: Any) -> str | None:
    norms = (block.norm1.norm, block.norm1_context.norm, block.norm2, block.norm2_context)
    return _blocks.norm_misfit(*norms) or _blocks.feed_forward_misfit(block.ff, block.ff_context)


def _parts_of_block(block: Any) -> Iterator[nn.Module]:
    for norm in (block.norm1, block.norm1_context):
        yield from (norm, norm.norm)
    yield from (block.norm2, block.norm2_context)
    for ff in (block.ff, block.ff_context):
        yield from (ff, ff.net[0])
    yield from _blocks.parts_of_attention(block.attn)


def _frozen_of_block(block: Any) -> Iterator[nn.Module]:
    yield from (block.norm1.linear, block.norm1_context.linear, *_blocks.qk_norms(block.attn))


def block_forward(
    self,
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    temb: torch.Tensor,
    image_rotary_emb: Any = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`FluxTransformerBlock.forward`: (encoder_hidden_states, hidden_states)."""
    if _blocks.runs_stock(self, _parts_of_block(self), _frozen_of_block(self), _block_misfit(self)):
        own = _blocks.stock(self)
        return own(self, hidden_states, encoder_hidden_states, temb, image_rotary_emb, joint_attention_kwargs)
    x, text, images = hidden_states, encoder_hidden_states, hidden_states.shape[0]
    emb = _blocks.modulation(self.norm1.linear(self.norm1.silu(temb)), images, 6)
    text_emb = _blocks.modulation(self.norm1_context.linear(self.norm1_context.silu(temb)), images, 6)
    normed = ada_layer_norm(x, emb[0], emb[1], eps=self.norm1.norm.eps)
    text_normed = ada_layer_norm(text, text_emb[0], text_emb[1], eps=self.norm1_context.norm.eps)
    out, text_out, *adapted = _attention(self.attn, normed, text_normed, image_rotary_emb, joint_attention_kwargs or {})
    x = _blocks.rest_of_stream(x, out, emb[2:], self.norm2, self.ff)
    for more in adapted:  # an IP-Adapter's
        x = x + more
    text = _blocks.rest_of_stream(text, text_out, text_emb[2:], self.norm2_context, self.ff_context)
    return _blocks.within_float16(text), x


def _single_misfit(block: Any) -> str | None:
    if getattr(block.act_mlp, "approximate", None) != "tanh":
        return f"its act_mlp must be GELU with tanh, got {block.act_mlp}"
    return _blocks.norm_misfit(block.norm.norm)


def _parts_of_single(block: Any) -> Iterator[nn.Module]:
    yield from (block.norm, block.norm.norm, block.act_mlp)
    yield from _blocks.parts_of_attention(block.attn)


def _single_runs_stock(block: Any) -> bool:
    frozen = iter((block.norm.linear, *_blocks.qk_norms(block.attn)))
    return _blocks.runs_stock(block, _parts_of_single(block), frozen, _single_misfit(block))


def _single_stream(block: Any, x: torch.Tensor, temb: torch.Tensor, image_rotary_emb: Any, kwargs: dict):
    emb = block.norm.linear(block.norm.silu(temb))
    shift, scale, gate = _blocks.modulation(emb, x.shape[0], 3)
    normed = ada_layer_norm(x, shift, scale, eps=block.norm.norm.eps)
    feed = gelu(block.proj_mlp(normed))
    out = _attention(block.attn, normed, None, image_rotary_emb, kwargs)
    return _blocks.within_float16(gated_residual(x, block.proj_out(torch.cat([out, feed], dim=2)), gate))


def single_forward(
    self,
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    temb: torch.Tensor,
    image_rotary_emb: Any = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`FluxSingleTransformerBlock.forward` since diffusers 0.35: (encoder_hidden_states, hidden_states)."""
    if _single_runs_stock(self):
        own = _blocks.stock(self)
        return own(self, hidden_states, encoder_hidden_states, temb, image_rotary_emb, joint_attention_kwargs)
    x = torch.cat([encoder_hidden_states, hidden_states], dim=1)
    x = _single_stream(self, x, temb, image_rotary_emb, joint_attention_kwargs or {})
    tokens = encoder_hidden_states.shape[1]
    return x[:, :tokens], x[:, tokens:]


def joined_single_forward(
    self,
    hidden_states: torch.Tensor,
    temb: torch.Tensor,
    image_rotary_emb: Any = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> torch.Tensor:
    """The same before 0.35, where the model joins text and image tokens: hidden_states."""
    if _single_runs_stock(self):
        return _blocks.stock(self)(self, hidden_states, temb, image_rotary_emb, joint_attention_kwargs)
    return _single_stream(self, hidden_states, temb, image_rotary_emb, joint_attention_kwargs or {})


def _turns(tokens: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    angles = torch.rand(tokens, width // 2).repeat_interleave(2, dim=1) * 6
    return angles.cos(), angles.sin()


def _cases(original: Any, cls: Any):
    def make():
        return cls(
            dim=_blocks.WIDTH, num_attention_heads=_blocks.HEADS, attention_head_dim=_blocks.WIDTH // _blocks.HEADS
        )

    joins_itself = "encoder_hidden_states" in original.__code__.co_varnames[: original.__code__.co_argcount]

    def call(function, block, image, text, temb):
        rotary = _turns(_blocks.TEXT + _blocks.IMAGE, _blocks.WIDTH // _blocks.HEADS)
        if not joins_itself:
            x = function(block, torch.cat([text, image], dim=1), temb, rotary)
            return x[:, _blocks.TEXT :], x[:, : _blocks.TEXT]
        text, image = function(block, image, text, temb, rotary)
        return image, text

    yield from _blocks.block_cases(make, call)


_about = functools.partial(_blocks.about_block, PROCESSORS)
MODULE = "diffusers.models.transformers.transformer_flux"
BLOCK = _blocks.Fused("FluxTransformerBlock", MODULE, (block_forward,), _cases, _block_misfit, _about)
SINGLE = _blocks.Fused(
    "FluxSingleTransformerBlock", MODULE, (single_forward, joined_single_forward), _cases, _single_misfit, _about
)
