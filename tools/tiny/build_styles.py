"""Draw the tiny world's styles: 300 images each, without prompts, as a style transfer's references are.

python -m tools.tiny.build_styles --output advgrpo/tiny/assets/styles

- outline: shapes of blank paper with a contour in their colour;
- pastel: pale colours and soft edges;
- hatched: shapes with a thin contour, filled with diagonal strokes.

Backgrounds keep their colour, so that an image in a style can still be what its prompt asks for. `measure` says how
much of that the judge recognises.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F

from advgrpo.runtime import rng
from advgrpo.tiny.assets import write_image
from advgrpo.tiny.judge import judge
from advgrpo.tiny.shapes import IMAGE_SIZE, PALETTE, Scene, pixel_grid, render, split_prompts

STYLES = ("outline", "pastel", "hatched")
TRAINING_PROMPTS = 96  # as build_references draws them; the held-out combinations stay unseen
PAPER = 0.96
_FINE = 4  # drawn at this multiple of the size, then averaged down


def training_scenes(count: int) -> list[Scene]:
    """The first `count` of the training prompts' scenes, repeated."""
    prompts, _ = split_prompts(TRAINING_PROMPTS, 0)
    return [Scene.parse(prompts[i % TRAINING_PROMPTS]) for i in range(count)]


def draw(style: str, scenes: list[Scene], generator: torch.Generator, size: int = IMAGE_SIZE) -> torch.Tensor:
    """Images [B, 3, S, S] float32 in [0, 1]; the same generator state gives the same scenes in every style.

    Raises:
        ValueError: an unknown style.
    """
    if style not in STYLES:
        raise ValueError(f"unknown style {style!r}: one of {STYLES}")
    _, inside = render(scenes, generator, size=_FINE * size, return_coverage=True)
    colour, background = (
        torch.tensor([PALETTE[getattr(scene, part)] for scene in scenes]).view(-1, 3, 1, 1)
        for part in ("colour", "background")
    )
    if style == "outline":
        sheet = torch.lerp(background, torch.tensor(PAPER), inside)
        fine = torch.lerp(sheet, colour, _contour(inside, 7))
    elif style == "pastel":
        colour, background = torch.lerp(colour, torch.ones(()), 0.25), torch.lerp(background, torch.ones(()), 0.25)
        soft = F.avg_pool2d(F.pad(inside, (4, 4, 4, 4), mode="replicate"), 9, stride=1)
        fine = torch.lerp(background, colour, soft)
    else:
        strokes = torch.where(_diagonals(_FINE * size, period=16), 1.0, 0.35)  # a pale fill keeps the silhouette
        fine = torch.lerp(background, colour, torch.maximum(_contour(inside, 3), inside * strokes))
    return F.avg_pool2d(fine, _FINE)


def _contour(inside: torch.Tensor, width: int) -> torch.Tensor:
    """The outermost `width` pixels of masks [B, 1, S, S]: what an erosion takes away."""
    return inside + F.max_pool2d(-inside, 2 * width + 1, stride=1, padding=width)


def _diagonals(size: int, period: int) -> torch.Tensor:
    """[S, S] bool: diagonal stripes half a period wide, in pixels along a row."""
    x, y = pixel_grid(size)
    return torch.remainder((x + y) * size / 2, period) < period / 2


def write_style(folder: Path, style: str, count: int, seed: int) -> None:
    """PNG files folder/NNN.png."""
    folder.mkdir(parents=True, exist_ok=True)
    images = draw(style, training_scenes(count), rng.generator(seed, f"style:{style}"))
    for number, image in enumerate(images):
        write_image(folder / f"{number:03d}.png", (image * 255).round().byte())


def measure(style: str, count: int, seed: int) -> dict[str, float]:
    """What the judge sees in a style's drawings and how far they are from plain ones to the tiny DINO.

    Returns:
        shape, colour, background, all_correct: shares of images; similarity: mean cosine of class tokens between the
        same scenes in the style and drawn plainly; spread: the same between different scenes of the style.
    """
    from advgrpo.rewards.dino_similarity import DinoSimilarity

    scenes = training_scenes(count)
    styled = draw(style, scenes, rng.generator(seed, f"style:{style}"))
    plain = render(scenes, rng.generator(seed, "plain"))
    verdict = judge(styled, [scene.caption for scene in scenes])
    dino = DinoSimilarity(path="tiny", image_size=IMAGE_SIZE)
    own, other = (F.normalize(dino.embed(images), dim=-1) for images in (styled, plain))
    between = own @ own.T
    return {
        "shape": verdict.shape_correct.float().mean().item(),
        "colour": verdict.colour_correct.float().mean().item(),
        "background": verdict.background_correct.float().mean().item(),
        "all_correct": (verdict.correct & verdict.background_correct).float().mean().item(),
        "similarity": (own * other).sum(1).mean().item(),
        "spread": ((between.sum() - between.trace()) / (count * (count - 1))).item(),
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder to write one folder per style into")
    parser.add_argument("--count", type=int, default=300, help="images per style")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    for style in STYLES:
        write_style(args.output / style, style, args.count, args.seed)
        found = measure(style, args.count, args.seed)
        print(f"{style}: " + ", ".join(f"{name} {value:.2f}" for name, value in found.items()))


if __name__ == "__main__":
    main()
