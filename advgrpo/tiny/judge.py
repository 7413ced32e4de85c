"""A rule-based judge in the manner of GenEval: does the drawn object have the prompt's shape and colour?

It segments the image by colour, fits every shape as a template to the object's mask and reads colours off the
palette. It never sees a network and is never a training reward of the default run: it is the independent witness.

Shapes: B images [B, 3, S, S] in [0, 1], K shapes x R rotations of templates.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from advgrpo.tiny.shapes import COLOURS, PALETTE, SHAPES, Scene, pixel_grid, shape_distance

MIN_CONTRAST = 0.20  # RGB distance below which nothing counts as drawn
MIN_OVERLAP = 0.70  # intersection over union of mask and template; crisp drawings reach 0.9, blobs stay below
_ROTATIONS = (-0.2, -0.1, 0.0, 0.1, 0.2)


@dataclass
class Verdict:
    """What the judge saw, one entry per image."""

    shape: list[str]  # best-fitting shape, "none" when nothing is drawn
    colour: list[str]
    background: list[str]
    overlap: torch.Tensor  # [B] intersection over union with the best template
    correct: torch.Tensor  # [B] bool: shape and colour are the prompt's and the outline fits
    shape_correct: torch.Tensor  # [B] bool, outline fits included
    colour_correct: torch.Tensor  # [B] bool
    background_correct: torch.Tensor  # [B] bool


def _nearest_colour(rgb: torch.Tensor) -> list[str]:
    palette = torch.tensor(list(PALETTE.values()), device=rgb.device)
    return [COLOURS[i] for i in torch.cdist(rgb, palette).argmin(1).tolist()]


def _segment(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Background colour [B, 3], object colour [B, 3], soft mask [B, S, S], contrast [B]."""
    frame = torch.cat([images[:, :, :2].flatten(2), images[:, :, -2:].flatten(2), images[:, :, :, :2].flatten(2),
                       images[:, :, :, -2:].flatten(2)], dim=2)  # fmt: skip
    background = frame.median(2).values
    offset = images - background[:, :, None, None]
    distance = offset.norm(dim=1).flatten(1)
    contrast = distance.quantile(0.97, dim=1)
    inside = distance > 0.6 * contrast[:, None]
    pixels = images.flatten(2).masked_fill(~inside[:, None], float("nan"))
    colour = pixels.nanmedian(2).values
    direction = colour - background
    mask = torch.einsum("bchw,bc->bhw", offset, direction) / direction.square().sum(1).clamp_min(1e-6)[:, None, None]
    # Soft edges and stains below a third of the contrast are not outline.
    return background, colour, ((mask - 0.3) / 0.4).clamp(0, 1), contrast


def _template_masks(mask: torch.Tensor) -> torch.Tensor:
    """Every shape at the mask's own centroid and area: [B, K, R, S, S] alphas."""
    batch, size = mask.shape[0], mask.shape[-1]
    x, y = pixel_grid(size, mask.device)
    area = mask.sum((1, 2)).clamp_min(1e-6)
    centre = torch.stack([(mask * x).sum((1, 2)), (mask * y).sum((1, 2))], 1) / area[:, None]
    fine_x, fine_y = (t * 1.25 for t in pixel_grid(128, mask.device))
    templates = torch.empty(batch, len(SHAPES), len(_ROTATIONS), size, size, device=mask.device)
    for k, shape in enumerate(SHAPES):
        inside = (shape_distance(shape, fine_x, fine_y) < 0).float()
        unit_area = inside.mean() * 2.5**2
        unit_centre_y = (inside * fine_y).sum() / inside.sum()
        radius = (area * (2 / size) ** 2 / unit_area).sqrt().view(-1, 1, 1)
        px = (x - centre[:, 0].view(-1, 1, 1)) / radius
        py = (y - centre[:, 1].view(-1, 1, 1)) / radius
        for r, angle in enumerate(torch.tensor(_ROTATIONS)):
            cos, sin = angle.cos(), angle.sin()
            distance = shape_distance(shape, cos * px + sin * py, cos * py - sin * px + unit_centre_y)
            templates[:, k, r] = (0.5 - distance * radius * size / 2).clamp(0, 1)
    return templates


def judge(images: torch.Tensor, captions: list[str]) -> Verdict:
    """Judge images [B, 3, S, S] in [0, 1] against the captions they were drawn for."""
    if images.dim() != 4 or images.shape[1] != 3 or len(images) != len(captions):
        raise ValueError(f"want images [B, 3, S, S] and B captions; got {tuple(images.shape)} and {len(captions)}")
    scenes = [Scene.parse(c) for c in captions]
    images = images.float()
    background, colour, mask, contrast = _segment(images)
    templates = _template_masks(mask)
    mask = mask[:, None, None]
    overlap = torch.minimum(mask, templates).sum((3, 4)) / torch.maximum(mask, templates).sum((3, 4)).clamp_min(1e-6)
    best, index = overlap.amax(2).max(1)
    drawn = contrast >= MIN_CONTRAST
    shapes = [SHAPES[i] if ok else "none" for i, ok in zip(index.tolist(), drawn.tolist())]
    colours, backgrounds = _nearest_colour(colour), _nearest_colour(background)
    matches = torch.tensor(
        [[a == s.shape, b == s.colour, c == s.background] for a, b, c, s in zip(shapes, colours, backgrounds, scenes)],
        device=images.device,
    )
    shape_correct = matches[:, 0] & (best >= MIN_OVERLAP)
    colour_correct = matches[:, 1] & drawn
    return Verdict(shapes, colours, backgrounds, best, shape_correct & colour_correct, shape_correct, colour_correct,
                   matches[:, 2])  # fmt: skip
