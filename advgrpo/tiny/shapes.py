"""The tiny world's images: one flat shape on a plain background, drawn as a signed distance function.

An image is fully described by a `Scene` (shape, colour, background, size, position) and reads, as a caption,
"a small red star on the left of a blue background". `render` draws scenes crisply (the references) or roughly:
`roughness` in [0, 1] warps the outline, softens the edge, washes the colour out and adds stains. The base model is
pre-trained on a mix of crisp and rough images, as web-scale models are, so it draws recognisably but untidily, and
reinforcement learning against crisp references has something visible to teach it.

Shapes: B scenes, S = image size in pixels; images are [B, 3, S, S] float32 in [0, 1].
"""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import dataclass

import torch
import torch.nn.functional as F

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
PALETTE = {
    "red": (0.90, 0.10, 0.10),
    "orange": (1.00, 0.55, 0.05),
    "yellow": (1.00, 0.92, 0.15),
    "green": (0.10, 0.65, 0.20),
    "blue": (0.12, 0.25, 0.90),
    "purple": (0.58, 0.15, 0.72),
    "white": (0.97, 0.97, 0.97),
    "black": (0.05, 0.05, 0.05),
}
COLOURS = tuple(PALETTE)
SIZES = {"small": 0.36, "medium": 0.52, "large": 0.68}  # radius; the image spans [-1, 1]
POSITIONS = {
    "in the center of": (0.0, 0.0),
    "on the left of": (-1.0, 0.0),
    "on the right of": (1.0, 0.0),
    "at the top of": (0.0, -1.0),
    "at the bottom of": (0.0, 1.0),
}
IMAGE_SIZE = 32
CAPTION_WORDS = 11

_CAPTION = re.compile(
    rf"a (?P<size>{'|'.join(SIZES)}) (?P<colour>{'|'.join(COLOURS)}) (?P<shape>{'|'.join(SHAPES)}) "
    rf"(?P<position>{'|'.join(POSITIONS)}) a (?P<background>{'|'.join(COLOURS)}) background"
)


@dataclass(frozen=True)
class Scene:
    shape: str
    colour: str
    background: str
    size: str
    position: str

    @property
    def caption(self) -> str:
        return f"a {self.size} {self.colour} {self.shape} {self.position} a {self.background} background"

    @classmethod
    def parse(cls, caption: str) -> Scene:
        """The scene a caption describes; ValueError for any other text."""
        match = _CAPTION.fullmatch(caption.strip())
        if match is None:
            example = Scene("star", "red", "blue", "small", "on the left of").caption
            raise ValueError(f"not a caption of the tiny world: {caption!r} (they read like {example!r})")
        return cls(**match.groupdict())


def all_scenes() -> list[Scene]:
    """Every combination whose object and background differ in colour, in a fixed order."""
    combinations = itertools.product(SHAPES, COLOURS, COLOURS, SIZES, POSITIONS)
    return [Scene(*c) for c in combinations if c[1] != c[2]]


def vocabulary() -> list[str]:
    """Every word a caption can contain, sorted."""
    return sorted({word for scene in all_scenes() for word in scene.caption.split()})


def sample_scenes(count: int, generator: torch.Generator) -> list[Scene]:
    scenes = all_scenes()
    picks = torch.randint(len(scenes), (count,), generator=generator)
    return [scenes[i] for i in picks.tolist()]


def split_prompts(*counts: int, seed: int = 20_256) -> tuple[list[str], ...]:
    """One list of captions per count: disjoint combinations, every shape and colour equally often in each.

    Longer arguments only add lists: the ones before stay as they are.
    """
    generator = torch.Generator().manual_seed(seed)
    scenes = all_scenes()
    order = torch.randperm(len(scenes), generator=generator).tolist()
    parts: list[list[str]] = []
    taken: set[str] = set()
    for count in counts:
        wanted = [(SHAPES[i % len(SHAPES)], COLOURS[(i // len(SHAPES) + i) % len(COLOURS)]) for i in range(count)]
        part = []
        for shape, colour in wanted:
            caption = next(
                s.caption
                for s in (scenes[i] for i in order)
                if (s.shape, s.colour) == (shape, colour) and s.caption not in taken
            )
            taken.add(caption)
            part.append(caption)
        parts.append(part)
    return tuple(parts)


def shape_distance(shape: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Signed distance (negative inside) to a shape of unit radius at the origin; y points down, as in images."""
    radius = torch.hypot(x, y)
    if shape == "circle":
        return radius - 0.92
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) - 0.80
    if shape == "triangle":
        side = math.sqrt(3) / 2
        return torch.stack([y, side * x - 0.5 * y, -side * x - 0.5 * y]).amax(0) - 0.52
    if shape == "cross":
        arm, half = 0.95, 0.30
        upright = torch.maximum(x.abs() - half, y.abs() - arm)
        return torch.minimum(upright, torch.maximum(x.abs() - arm, y.abs() - half))
    if shape == "ring":
        return (radius - 0.70).abs() - 0.24
    if shape == "star":
        sector = 2 * math.pi / 5
        angle = torch.remainder(torch.atan2(x, -y) + sector / 2, sector) - sector / 2
        px, py = radius * angle.sin().abs(), radius * angle.cos()
        # The edge from the tip (0, 1) to the inner corner at half a sector.
        inner = 0.42
        cx, cy = inner * math.sin(sector / 2), inner * math.cos(sector / 2)
        nx, ny = 1.0 - cy, cx
        return (px * nx + (py - 1.0) * ny) / math.hypot(nx, ny)
    raise ValueError(f"unknown shape {shape!r}: one of {SHAPES}")


def pixel_grid(size: int, device: torch.device | str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """x and y of every pixel centre, each [S, S], spanning [-1, 1]."""
    ticks = (torch.arange(size, dtype=torch.float32, device=device) + 0.5) * (2 / size) - 1
    y, x = torch.meshgrid(ticks, ticks, indexing="ij")
    return x, y


def _uniform(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=generator) * 2 - 1


def _warp(count: int, size: int, generator: torch.Generator) -> torch.Tensor:
    """A smooth random displacement field [B, 2, S, S] of about unit amplitude."""
    field = torch.randn(count, 2, 5, 5, generator=generator)
    return F.interpolate(field, size=(size, size), mode="bicubic", align_corners=True)


def render(
    scenes: list[Scene],
    generator: torch.Generator,
    *,
    roughness: torch.Tensor | float = 0.0,
    size: int = IMAGE_SIZE,
    return_coverage: bool = False,
):
    """Draw scenes with a little jitter in place, radius and rotation.

    `roughness` is a number or [B]. Returns images [B, 3, S, S]; with `return_coverage` also the object's alpha
    [B, 1, S, S]. The same generator state gives the same images.
    """
    count = len(scenes)
    rough = torch.as_tensor(roughness, dtype=torch.float32).expand(count)
    jitter = _uniform(generator, count, 4)
    radius = torch.tensor([SIZES[s.size] for s in scenes]) * (1 + 0.06 * jitter[:, 0])
    centre = torch.tensor([POSITIONS[s.position] for s in scenes])
    centre = centre * (0.94 - radius).clamp(max=0.45).unsqueeze(1) + 0.03 * jitter[:, 1:3]
    rotation = 0.12 * jitter[:, 3] * (1 + 2 * rough)
    warp = _warp(count, size, generator) * (0.20 * rough).view(-1, 1, 1, 1)
    stains = _warp(count, size, generator)[:, :1] * (0.10 * rough).view(-1, 1, 1, 1)
    grain = torch.randn(count, 3, size, size, generator=generator) * (0.05 * rough).view(-1, 1, 1, 1)

    grid_x, grid_y = pixel_grid(size)
    x = (grid_x - centre[:, 0].view(-1, 1, 1)) / radius.view(-1, 1, 1) + warp[:, 0]
    y = (grid_y - centre[:, 1].view(-1, 1, 1)) / radius.view(-1, 1, 1) + warp[:, 1]
    cos, sin = rotation.cos().view(-1, 1, 1), rotation.sin().view(-1, 1, 1)
    x, y = cos * x + sin * y, cos * y - sin * x
    distance = torch.empty(count, size, size)
    for shape in {s.shape for s in scenes}:
        rows = [i for i, s in enumerate(scenes) if s.shape == shape]
        distance[rows] = shape_distance(shape, x[rows], y[rows])
    edge = (2 / size) / radius * (1 + 5 * rough)  # an antialiased edge is one pixel wide, a rough one up to six
    alpha = (0.5 - distance / edge.view(-1, 1, 1)).clamp(0, 1).unsqueeze(1)

    colour = torch.tensor([PALETTE[s.colour] for s in scenes]).view(-1, 3, 1, 1)
    background = torch.tensor([PALETTE[s.background] for s in scenes]).view(-1, 3, 1, 1)
    washed = torch.lerp(colour, background, (0.35 * rough).view(-1, 1, 1, 1))
    images = (torch.lerp(background.expand(-1, -1, size, size), washed, alpha) + stains + grain).clamp(0, 1)
    return (images, alpha) if return_coverage else images


def sample_roughness(count: int, generator: torch.Generator, crisp_share: float = 0.35) -> torch.Tensor:
    """Roughness [B] of the pre-training mix: `crisp_share` exactly 0, the rest uniform in [0.25, 0.75]."""
    draw = torch.rand(2, count, generator=generator)
    return torch.where(draw[0] < crisp_share, torch.zeros(count), 0.25 + 0.5 * draw[1])
