"""diffusers' Qwen-Image: blocks of two streams, as FLUX.1's, with rotations as complex numbers and a mask of the text.

Fused: both AdaLN norms, gate and residual with the norm that follows, GELU, the norms of q and k with their rotation
and the joining of text and image. Blocks whose time differs by token (`zero_cond_t` of editing models, or a
`modulate_index`) run their own forward; other attention processors and arguments for the attention run the block's own
attention between the fused rest.

Until diffusers 0.37 the stock attention was given the text's mask and did not use it, but an `attention_mask` of all
tokens among its arguments, where the model made one; `patch` and `accelerate` find out which it is.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..ops.ada_layer_norm import ada_layer_norm
from . import _blocks

PROCESSORS = ("QwenDoubleStreamAttnProcessor2_0",)


def _rotary(image_rotary_emb: Any) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Turns of image and text as complex numbers [tokens, D/2] -> (cos, sin) of the joint tokens, text first."""
    if image_rotary_emb is None:
        return None
    image, text = image_rotary_emb
    return torch.cat([text.real, image.real]), torch.cat([text.imag, image.imag])


def _is_known(image_rotary_emb: Any) -> bool:
    return image_rotary_emb is None or all(t.dim() == 2 and t.dtype == torch.complex64 for t in image_rotary_emb)


def _misfit(block: Any) -> str | None:
    if getattr(block, "zero_cond_t", False):
        return "its time differs by token (zero_cond_t)"
    norms = (block.img_norm1, block.img_norm2, block.txt_norm1, block.txt_norm2)
    return _blocks.norm_misfit(*norms) or _blocks.feed_forward_misfit(block.img_mlp, block.txt_mlp)


def _parts(block: Any) -> Iterator[nn.Module]:
    yield from (block.img_norm1, block.img_norm2, block.txt_norm1, block.txt_norm2)
    for ff in (block.img_mlp, block.txt_mlp):
        yield from (ff, ff.net[0])
    yield from _blocks.parts_of_attention(block.attn)


def _runs_stock(block: Any, modulate_index: Any) -> bool:
    frozen = iter((block.img_mod, block.txt_mod, *_blocks.qk_norms(block.attn)))
    misfit = _misfit(block)
    if misfit is None and modulate_index is not None:
        misfit = "it is told which time each token has (modulate_index)"
    return _blocks.runs_stock(block, _parts(block), frozen, misfit)


def _attention(block: Any, x: torch.Tensor, text: torch.Tensor, mask: Any, rotary: Any, kwargs: dict, masked: bool):
    """(image, text) of the block's attention."""
    attn, others = block.attn, dict(kwargs)
    joint_mask = None if masked else others.pop("attention_mask", None)  # the model's own, of 0.36 and 0.37
    if others or not _blocks.is_fusible(attn, PROCESSORS) or not _is_known(rotary):
        return attn(x, encoder_hidden_states=text, encoder_hidden_states_mask=mask, image_rotary_emb=rotary, **kwargs)
    if masked and mask is not None:
        image_mask = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        joint_mask = torch.cat([mask, image_mask], dim=1)[:, None, None, :]
    image, text_out = _blocks.joint_attention(attn, x, text, _rotary(rotary), joint_mask)
    for layer in attn.to_out:
        image = layer(image)
    return image, attn.to_add_out(text_out)


def _forward(block: Any, x: torch.Tensor, text: torch.Tensor, mask: Any, temb: torch.Tensor, *attention: Any):
    emb = _blocks.modulation(block.img_mod(temb), x.shape[0], 6)
    text_emb = _blocks.modulation(block.txt_mod(temb), x.shape[0], 6)
    normed = ada_layer_norm(x, emb[0], emb[1], eps=block.img_norm1.eps)
    text_normed = ada_layer_norm(text, text_emb[0], text_emb[1], eps=block.txt_norm1.eps)
    out, text_out = _attention(block, normed, text_normed, mask, *attention)
    x = _blocks.rest_of_stream(x, out, emb[2:], block.img_norm2, block.img_mlp)
    text = _blocks.rest_of_stream(text, text_out, text_emb[2:], block.txt_norm2, block.txt_mlp)
    return _blocks.within_float16(text), _blocks.within_float16(x)


def _run(block: Any, *streams: Any, arguments: dict | None, modulate_index: Any, masked: bool):
    """`block_forward`, or the block's own forward where it is to run that."""
    if _runs_stock(block, modulate_index):
        more = () if modulate_index is None else (modulate_index,)
        return _blocks.stock(block)(block, *streams, arguments, *more)
    return _forward(block, *streams, arguments or {}, masked)


def block_forward(
    self,
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    encoder_hidden_states_mask: torch.Tensor | None,
    temb: torch.Tensor,
    image_rotary_emb: Any = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
    modulate_index: Any = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`QwenImageTransformerBlock.forward` since diffusers 0.38: (encoder_hidden_states, hidden_states)."""
    streams = hidden_states, encoder_hidden_states, encoder_hidden_states_mask, temb, image_rotary_emb
    return _run(self, *streams, arguments=joint_attention_kwargs, modulate_index=modulate_index, masked=True)


def maskless_forward(
    self,
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    encoder_hidden_states_mask: torch.Tensor | None,
    temb: torch.Tensor,
    image_rotary_emb: Any = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
    modulate_index: Any = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same before 0.38, whose attention does not use the mask."""
    streams = hidden_states, encoder_hidden_states, encoder_hidden_states_mask, temb, image_rotary_emb
    return _run(self, *streams, arguments=joint_attention_kwargs, modulate_index=modulate_index, masked=False)


def _cases(original: Any, cls: Any):
    head = _blocks.WIDTH // _blocks.HEADS

    def make():
        return cls(dim=_blocks.WIDTH, num_attention_heads=_blocks.HEADS, attention_head_dim=head)

    def call(function, block, image, text, temb):
        rotary = [
            torch.polar(torch.ones(n, head // 2), 6 * torch.rand(n, head // 2)) for n in (_blocks.IMAGE, _blocks.TEXT)
        ]
        mask = torch.arange(_blocks.TEXT) < torch.tensor([_blocks.TEXT, 1])[:, None]
        text, image = function(block, image, text, mask, temb, tuple(rotary))
        return image, text

    yield from _blocks.block_cases(make, call)


BLOCK = _blocks.Fused(
    "QwenImageTransformerBlock",
    "diffusers.models.transformers.transformer_qwenimage",
    (block_forward, maskless_forward),
    _cases,
    _misfit,
    functools.partial(_blocks.about_block, PROCESSORS),
)
