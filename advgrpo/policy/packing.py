"""Latents packed into tokens, as FLUX.1's and Qwen-Image's transformers read them: a 2 x 2 patch is one token.

It needs no diffusers: an engine's latents are unpacked where there may be none.

Shapes: R rows, latents [R, C, H, W] float32 and packed [R, T, 4·C] with T = H/2 · W/2.
"""

from __future__ import annotations

import torch

PATCH = 2  # latents of a token's side


def pack(latents: torch.Tensor) -> torch.Tensor:
    """[R, T, 4·C] of latents [R, C, H, W]: rows of patches, and of each patch channel, row, column."""
    rows, channels, height, width = latents.shape
    patches = latents.reshape(rows, channels, height // PATCH, PATCH, width // PATCH, PATCH).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(rows, -1, channels * PATCH**2)


def unpack(tokens: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Latents [R, C, H, W] of `pack`'s tokens [R, T, 4·C], of `size` (H, W)."""
    height, width = size
    patches = tokens.view(len(tokens), height // PATCH, width // PATCH, -1, PATCH, PATCH).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(len(tokens), -1, height, width)
