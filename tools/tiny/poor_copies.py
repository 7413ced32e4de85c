"""Poor copies of drawings, as a scrape of the web is full of them: faded, enlarged from a thumbnail, badly redrawn; and
watermarks, the diagonal bars of stock pictures.

What the base pipeline is trained on last, in a share that no caption tells. It then draws poor pictures beside good
ones of the same prompt. Guidance towards the prompt avoids what hides the thing, such as a thumbnail's blur, but not a
watermark, which is as likely on every thing: that is left to reinforcement learning.

Shapes: B images [B, 3, S, S] float32 in [0, 1], strengths [B] in [0, 1].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tools.tiny.damage import moved_pixels, smooth

GOOD_SHARE = 0.4  # of the images that stay as they are; the kinds share the rest alike
_BAR, _OPACITY = 4, 0.7  # pixels a watermark's bar and gap are wide, along a row; what it takes of the drawing


def fade(images: torch.Tensor, strength: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Towards the background's colour, which is that of the first pixel."""
    return torch.lerp(images, images[:, :, :1, :1], (0.35 + 0.4 * strength).view(-1, 1, 1, 1))


def shrink(images: torch.Tensor, strength: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Thumbnails of 12 to 7 pixels a side, enlarged again."""
    parts = []
    for image, side in zip(images[:, None], (12 - 5 * strength).round().long().tolist(), strict=True):
        thumbnail = F.interpolate(image, (side, side), mode="area")
        parts.append(F.interpolate(thumbnail, image.shape[-2:], mode="bicubic", align_corners=False).clamp(0, 1))
    return torch.cat(parts)


def redraw(images: torch.Tensor, strength: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """By a hand that gets the shape wrong: large parts of a drawing moved by several pixels."""
    shift = smooth(len(images), 2, 5, images.shape[-1], generator)
    return moved_pixels(images, shift * (0.10 + 0.12 * strength).view(-1, 1, 1, 1))


KINDS = (fade, shrink, redraw)


def poor_copies(images: torch.Tensor, good_share: float, generator: torch.Generator) -> torch.Tensor:
    """The images, all but `good_share` of them spoilt by one kind each."""
    count = len(images)
    spoilt = torch.rand(count, generator=generator) >= good_share
    kind = torch.randint(len(KINDS), (count,), generator=generator)
    strength = torch.rand(count, generator=generator)
    result = images.clone()
    for number, spoil in enumerate(KINDS):
        rows = (spoilt & (kind == number)).nonzero().flatten()
        if len(rows):
            result[rows] = spoil(images[rows], strength[rows], generator)
    return result


def watermarked(images: torch.Tensor, share: float, generator: torch.Generator) -> torch.Tensor:
    """The images, a share of them under diagonal bars of the background's colour, at the same places in all."""
    marked = torch.rand(len(images), generator=generator) < share
    rows, columns = torch.meshgrid(*(torch.arange(side) for side in images.shape[-2:]), indexing="ij")
    bars = ((rows + columns) % (2 * _BAR) < _BAR).float()
    cover = _OPACITY * bars * marked.view(-1, 1, 1, 1)
    return torch.lerp(images, images[:, :, :1, :1].expand_as(images), cover)
