"""Rotary position embedding (arXiv 2104.09864) as the layer ops apply it: pairs, tables, and the turn of a pair.

    y[j] = x[j]·cos[i] - x[k]·sin[i]        y[k] = x[k]·cos[i] + x[j]·sin[i]        of pair i, elements j and k

Pairs:    "interleaved", (2i, 2i + 1): FLUX.1, Qwen-Image, and diffusers' Wan and HunyuanVideo.
          "half", (i, i + D/2), as `rotate_half` has them: Llama and GPT-NeoX; diffusers' Cosmos, CogView4 and OmniGen,
          and "split" of its LTX-2.
Tables:   cos, sin [tokens, D/2] float32 for all heads, or [H, tokens, D/2] by head, as LTX-2's are; without gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch

from .._runtime import check_tensors

RotaryPairs = Literal["interleaved", "half"]


def check_pairs(pairs: str, rotary: Sequence[torch.Tensor] | None) -> None:
    """ValueError for pairs that are not known, or that nothing turns."""
    if pairs not in get_args(RotaryPairs):
        raise ValueError(f"rotary_pairs = {pairs!r}: want one of {', '.join(map(repr, get_args(RotaryPairs)))}")
    if rotary is None and pairs != "interleaved":
        raise ValueError(f"rotary_pairs = {pairs!r} goes with rotary, which is missing: give (cos, sin)")


def check_rotary(rotary: Sequence[torch.Tensor] | None, tokens: int, qkv: torch.Tensor) -> list[torch.Tensor]:
    """cos and sin, dense, for heads of qkv [..., H, D], or nothing; ValueError naming the one that does not fit."""
    if rotary is None:
        return []
    turns = list(rotary)
    check_tensors(**{f"rotary[{i}]": turn for i, turn in enumerate(turns)})
    H, D = qkv.shape[-2:]
    shapes = (tokens, D // 2), (H, tokens, D // 2)
    for i, turn in enumerate(turns):
        if tuple(turn.shape) not in shapes or turn.dtype != torch.float32 or turn.device != qkv.device or D % 2:
            raise ValueError(
                f"rotary[{i}] must be float32 [{tokens}, {D}/2], or [{H}, {tokens}, {D}/2] by head, on {qkv.device}, "
                f"of an even head dim, got {turn.dtype} {list(turn.shape)} on {turn.device}"
            )
    if len(turns) != 2:
        raise ValueError(f"rotary must be (cos, sin), got {len(turns)} tensors")
    if turns[0].shape != turns[1].shape:
        raise ValueError(f"rotary: cos and sin must have one shape, got {[list(turn.shape) for turn in turns]}")
    return [turn.contiguous() for turn in turns]


def is_by_head(rotary: Sequence[torch.Tensor]) -> bool:
    return bool(rotary) and rotary[0].dim() == 3


def turned_ref(
    x: torch.Tensor, rotary: Sequence[torch.Tensor], pairs: RotaryPairs, compute_dtype: torch.dtype
) -> torch.Tensor:
    """x [B, tokens, H, D] with its pairs turned, in `compute_dtype` and in x's memory order."""
    cos, sin = (turn.to(compute_dtype) for turn in rotary)
    at, of_pair = (-1, (-1, 2)) if pairs == "interleaved" else (-2, (2, -1))  # which of a pair, and where this stands
    cos, sin = torch.stack([cos, cos], dim=at), torch.stack([-sin, sin], dim=at)
    cos, sin = (_before_heads(turn.flatten(-2)) for turn in (cos, sin))
    partner = x.unflatten(-1, of_pair).flip(at).flatten(-2)
    return x * cos + partner * sin  # joining two turned halves would lose the memory order


def _before_heads(table: torch.Tensor) -> torch.Tensor:
    """[tokens, D], the same for all heads, as [tokens, 1, D]; [H, tokens, D] as [tokens, H, D]."""
    return table[:, None] if table.dim() == 2 else table.transpose(0, 1)
