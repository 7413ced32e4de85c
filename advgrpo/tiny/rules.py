"""A rule-based judge of the tiny world, in the manner of GenEval (arXiv 2310.11513): is the layout the prompt's?

It sees pixels and no network: which colour the border has, and which box the drawing fills. That box is compared with
the boxes that the five artists fill with the prompt's name, size and place on its background, measured in the same way.
What is drawn inside it does not see: that is the independent judge's question (`judge.py`), which no reward asks.

Shapes: B images [B, 3, S, S] float32 in [0, 1]; boxes (left, top, right, bottom) in shares of the width.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from advgrpo.tiny.scenes import ARTISTS, BACKGROUNDS, IMAGE_SIZE, JITTER, PLACES, Scene, render

MIN_CONTRAST = 0.15  # RGB distance from the border's colour from which a pixel counts as drawn
MIN_OVERLAP = 0.7  # of the boxes, for a drawing of the prompt's size and place
_MIN_PIXELS = 2  # drawn pixels of a row or column inside the box: a stray one does not enlarge it
_FRAME = 2  # pixels at the border that show the background
_PLAIN_SHARE = 0.75  # of the border's pixels in its own colour; below it there is no background to stand out from


@dataclass
class Layout:
    """What the rules see, one entry per image."""

    overlap: torch.Tensor  # [B] intersection over union with the nearest artist's box, 0 where nothing is drawn
    background_correct: torch.Tensor  # [B] bool
    place_correct: torch.Tensor  # [B] bool

    @property
    def correct(self) -> torch.Tensor:
        """[B] bool: all of it, with a box of the prompt's size."""
        return self.background_correct & self.place_correct & (self.overlap >= MIN_OVERLAP)


def look(images: torch.Tensor, captions: Sequence[str]) -> Layout:
    """Compare images [B, 3, S, S] on the CPU with the layouts that their captions ask for.

    Raises:
        ValueError: another shape, or a text that is no caption of the tiny world.
    """
    if images.dim() != 4 or images.shape[1] != 3 or len(images) != len(captions):
        raise ValueError(f"want images [B, 3, S, S] and B captions; got {tuple(images.shape)} and {len(captions)}")
    scenes = [Scene.parse(caption) for caption in captions]
    seen, drawn = boxes(images.float())
    overlap, place = torch.zeros(len(scenes)), torch.zeros(len(scenes), dtype=torch.bool)
    for i, scene in enumerate(scenes):
        if drawn[i]:
            overlap[i], place[i] = _compare(seen[i], scene)
    return Layout(overlap, background_right(images, scenes), place)


def border_colour(images: torch.Tensor) -> torch.Tensor:
    """[B, 3] median colour of the outermost two pixels."""
    return _frame(images).median(2).values


def background_right(images: torch.Tensor, scenes: Sequence[Scene]) -> torch.Tensor:
    """[B] bool: of all backgrounds, the border's colour is nearest to the scene's."""
    palette = torch.tensor(list(BACKGROUNDS.values()))
    nearest = torch.cdist(border_colour(images).float().cpu(), palette).argmin(1)
    return nearest == torch.tensor([list(BACKGROUNDS).index(scene.background) for scene in scenes])


def boxes(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The box [B, 4] around all that stands out from the border's colour, and whether anything does [B].

    Nothing does on a blank image, nor on one whose border has no colour of its own, such as noise.
    """
    colour = border_colour(images)
    drawn = (images - colour[:, :, None, None]).norm(dim=1) > MIN_CONTRAST
    plain = (_frame(images) - colour[:, :, None]).norm(dim=1) <= MIN_CONTRAST
    spans = [_span(drawn.sum(axis) >= _MIN_PIXELS) for axis in (1, 2)]  # of columns, of rows
    box = torch.stack([spans[0][0], spans[1][0], spans[0][1], spans[1][1]], dim=1) / images.shape[-1]
    return box, (box[:, 2:] > box[:, :2]).all(1) & (plain.float().mean(1) >= _PLAIN_SHARE)


def _frame(images: torch.Tensor) -> torch.Tensor:
    """The border's pixels, [B, 3, N]."""
    sides = (images[:, :, :_FRAME], images[:, :, -_FRAME:], images[..., :_FRAME], images[..., -_FRAME:])
    return torch.cat([side.flatten(2) for side in sides], dim=2)


def _span(inside: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """First true index and one past the last, each [B], of flags [B, S]; 0 and 0 where none is."""
    count = inside.shape[1]
    some = inside.any(1)
    first = inside.int().argmax(1)
    last = count - inside.flip(1).int().argmax(1)
    return first * some, last * some


@functools.cache
def _expected(scene: Scene) -> torch.Tensor:
    """The boxes that artists fill in a scene, [N, 4]; those whose drawing does not stand out are left out."""
    box, drawn = boxes(render([scene] * len(ARTISTS), ARTISTS))
    return box[drawn]


def _compare(seen: torch.Tensor, scene: Scene) -> tuple[torch.Tensor, bool]:
    """Overlap of a box [4] with the nearest artist's, forgiving JITTER, and whether its place is the scene's."""
    expected = _expected(scene)
    middle = lambda box: (box[..., :2] + box[..., 2:]) / 2  # noqa: E731
    offset = middle(seen) - middle(expected)
    slack = JITTER / IMAGE_SIZE
    moved = seen - offset.clamp(-slack, slack).repeat(1, 2)
    low, high = torch.maximum(moved[:, :2], expected[:, :2]), torch.minimum(moved[:, 2:], expected[:, 2:])
    area = lambda a, b: (b - a).clamp_min(0).prod(-1)  # noqa: E731
    shared = area(low, high)
    union = area(moved[:, :2], moved[:, 2:]) + area(expected[:, :2], expected[:, 2:]) - shared
    overlap, best = (shared / union).max(0)
    places = torch.tensor(list(PLACES.values())) / IMAGE_SIZE
    where = torch.tensor(PLACES[scene.place]) / IMAGE_SIZE + offset[best]
    nearest = torch.cdist(where[None], places).argmin().item()
    return overlap, list(PLACES)[nearest] == scene.place
