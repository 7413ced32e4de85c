"""The checks and conversion of images shared by rewards that are no network of ours."""

from __future__ import annotations

import numpy as np
import torch

from advgrpo.rewards.checks import check_batch


def check_images(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    """`images` as float32 [B, 3, H, W] on the CPU, known to be in [0, 1].

    Raises:
        ValueError: another shape or type, another number of prompts than images, or an image that is not finite or
            leaves [0, 1] (the message names its prompt): clipping it silently would score another image.
    """
    check_batch(images, prompts)
    if not images.numel():
        raise ValueError(f"want at least one image, got {list(images.shape)}")
    images = images.detach().float().cpu()
    flat = images.flatten(1)
    # Comparisons with NaN are false, so this finds non-finite images too.
    good = (flat.amin(1) >= 0) & (flat.amax(1) <= 1)
    if not good.all():
        bad = int((~good).nonzero()[0])
        low, high = flat[bad].amin().item(), flat[bad].amax().item()
        raise ValueError(f"the image for prompt {prompts[bad]!r} spans [{low}, {high}]; want finite values in [0, 1]")
    return images


def to_uint8(images: torch.Tensor, prompts: list[str]) -> np.ndarray:
    """Float images [B, 3, H, W] in [0, 1] -> uint8 RGB [B, H, W, 3] on the CPU, rounded to the nearest level.

    Raises:
        ValueError: as `check_images`.
    """
    return (check_images(images, prompts) * 255).round().byte().permute(0, 2, 3, 1).numpy()
