"""Ways in which a drawing can be bad: what an unfinished generator, a careless artist or a poor copy does to it.

Shapes: B images [B, 3, S, S] float32 in [0, 1], strengths [B] in [0, 1].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def smooth(count: int, channels: int, cells: int, size: int, generator: torch.Generator) -> torch.Tensor:
    """Noise [count, channels, size, size] of unit variance at its `cells` x `cells` knots, smooth in between."""
    knots = torch.randn(count, channels, cells, cells, generator=generator)
    return F.interpolate(knots, (size, size), mode="bicubic", align_corners=False)


def moved_pixels(images: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Every pixel from `shift` [B, 2, S, S] away, in halves of the image's side."""
    still = F.affine_grid(torch.eye(2, 3).expand(len(images), 2, 3), images.shape, align_corners=False)
    moved = still + shift.permute(0, 2, 3, 1)
    return F.grid_sample(images, moved, align_corners=False, padding_mode="border")


def chroma(images: torch.Tensor) -> torch.Tensor:
    """[B] mean over pixels of max - min over the colour channels."""
    return (images.amax(1) - images.amin(1)).mean((1, 2))


def saturate(images: torch.Tensor, factor: torch.Tensor | float) -> torch.Tensor:
    """Scale every pixel's distance to its own grey by `factor` (a number or [B]); 1 changes nothing."""
    factor = torch.as_tensor(factor, dtype=images.dtype).reshape(-1, 1, 1, 1)
    grey = images.mean(1, keepdim=True)
    return (grey + factor * (images - grey)).clamp(0, 1)


def blur(images: torch.Tensor, strength: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Towards the mean of 5 x 5 pixels."""
    soft = images
    for _ in range(2):
        soft = F.avg_pool2d(F.pad(soft, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    return torch.lerp(images, soft, (0.3 + 0.7 * strength).view(-1, 1, 1, 1))


def mottle(images: torch.Tensor, strength: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Colour noise of two low frequencies."""
    count, size = len(images), images.shape[-1]
    noise = smooth(count, 3, size // 6, size, generator) + smooth(count, 3, size // 3, size, generator)
    return (images + noise * (0.02 + 0.08 * strength).view(-1, 1, 1, 1)).clamp(0, 1)


def bend(images: torch.Tensor, strength: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Every pixel moved by some pixels, neighbours alike."""
    shift = smooth(len(images), 2, 7, images.shape[-1], generator)
    return moved_pixels(images, shift * (0.03 + 0.09 * strength).view(-1, 1, 1, 1))


def ghost(images: torch.Tensor, strength: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Patches of the batch's next drawing show through."""
    share = (smooth(len(images), 1, 4, images.shape[-1], generator) * 2).sigmoid()
    return torch.lerp(images, images.roll(1, 0), share * (0.3 + 0.6 * strength).view(-1, 1, 1, 1))


KINDS = (blur, mottle, bend, ghost)


def damage(
    images: torch.Tensor, kind: torch.Tensor, strength: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """Every image with the damage of its kind [B], a number of `KINDS`; two kinds where it has bit 4 set too."""
    for number, harm in enumerate(KINDS):
        for chosen in (
            (kind % 4 == number).nonzero().flatten(),
            ((kind >= 4) & ((kind + 1) % 4 == number)).nonzero().flatten(),
        ):
            if len(chosen):
                images[chosen] = harm(images[chosen], strength[chosen], generator)
    return images
