r"""Draw the tiny world's styles: 300 images each by one artist, without prompts, as a style transfer's references are.

    python -m tools.tiny.build_styles --output advgrpo/tiny/assets/styles \
        --sheets advgrpo/tiny/assets/drawings

- ink: black drawings without a colour, of lines and silhouettes (Microsoft's Fluent Emoji High Contrast);
- outline: comic drawings, bright fills within a dark outline (Streamline Emojis).

The things, backgrounds, sizes and places are those of the training prompts, as far as the artist drew the thing, so an
image in a style can still be what its prompt asks for. The artists are no others of the world's. Their sheets are for
judges of style alone, with an empty place for what an artist has not drawn.
"""

from __future__ import annotations

import argparse
import functools
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from advgrpo.runtime import rng
from advgrpo.tiny.assets import write_image
from advgrpo.tiny.rules import look
from advgrpo.tiny.scenes import ICONS, JITTER, NAMES, SIZES, STYLE_ARTISTS, Scene, compose, write_sheet
from tools.tiny.build_references import split_prompts
from tools.tiny.corpus import premultiplied
from tools.tiny.draw_sheets import IconSet


@dataclass(frozen=True)
class Style:
    """An artist's icon set, and what it calls the things that it names otherwise than the world does."""

    icons: IconSet
    renamed: tuple[tuple[str, str], ...] = ()

    def icon_of(self, name: str) -> str | None:
        """The set's name for a thing; None where the artist has not drawn it."""
        icon = dict(self.renamed).get(name, ICONS[name])
        return icon if icon in self.icons.names() else None


STYLES = {
    "ink": Style(
        IconSet(
            "fluent-emoji-high-contrast", "1.2.6", "0b92d48c90d2200bd499e3cdd09a127ca6a8c8ddefd34c35eb5a1e4994012ae0"
        )
    ),
    "outline": Style(
        IconSet("streamline-emojis", "1.2.4", "5dac87c876b322500989828c5823143e0100d78881627a2e4081a4b897cbfdbc"),
        (
            ("bear", "bear-face"),
            ("cloud", "cloud-1"),
            ("fox", "fox-face-1"),
            ("hamburger", "hamburger-1"),
            ("house", "house-with-garden"),
            ("panda", "panda-face"),
            ("ring", "ring-2"),
            ("strawberry", "strawberry-1"),
            ("watermelon", "watermelon-1"),
        ),
    ),
}


def training_scenes(style: str, count: int) -> list[Scene]:
    """`count` scenes of the training prompts whose things the style's artist has drawn, repeated where they run out.

    Raises:
        ValueError: an unknown style.
    """
    if style not in STYLES:
        raise ValueError(f"unknown style {style!r}: one of {tuple(STYLES)}")
    scenes = [Scene.parse(prompt) for prompt in split_prompts()["prompts"]]
    drawn = [scene for scene in scenes if STYLES[style].icon_of(scene.name)]
    return [drawn[i % len(drawn)] for i in range(count)]


@functools.cache
def drawing(style: str, name: str, size: str) -> torch.Tensor:
    """One thing in one of the world's SIZES, premultiplied: [4, s, s] float32."""
    icon = STYLES[style].icon_of(name)
    if icon is None:
        raise ValueError(f"the artist of style {style!r} has drawn no {name}")
    side = SIZES[size]
    return premultiplied(STYLES[style].icons.draw(icon, side), side)


def draw(style: str, scenes: list[Scene], generator: torch.Generator) -> torch.Tensor:
    """Images [B, 3, 48, 48] float32 in [0, 1], up to JITTER pixels off their place."""
    jitter = torch.randint(-JITTER, JITTER + 1, (len(scenes), 2), generator=generator).tolist()
    drawings = [drawing(style, scene.name, scene.size) for scene in scenes]
    return torch.stack([compose(*each) for each in zip(drawings, scenes, jitter, strict=True)])


def write_style(folder: Path, style: str, count: int, seed: int) -> torch.Tensor:
    """PNG files folder/NNN.png; returns the images."""
    folder.mkdir(parents=True, exist_ok=True)
    images = draw(style, training_scenes(style, count), rng.generator(seed, f"style:{style}"))
    for number, image in enumerate(images):
        write_image(folder / f"{number:03d}.png", (image * 255).round().byte())
    return images


def write_sheets(folder: Path, style: str) -> None:
    """The artist's drawings of all the world's things, folder/ARTIST-SIZE.png."""
    for size, side in SIZES.items():
        icons = [STYLES[style].icon_of(name) for name in NAMES]
        empty = Image.new("RGBA", (side, side))
        tiles = [empty if icon is None else STYLES[style].icons.draw(icon, side) for icon in icons]
        write_sheet(tiles, folder / f"{STYLE_ARTISTS[style]}-{size}.png")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder to write one folder per style into")
    parser.add_argument("--sheets", type=Path, required=True, help="folder to write ARTIST-SIZE.png into")
    parser.add_argument("--count", type=int, default=300, help="images per style")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    for style in STYLES:
        write_sheets(args.sheets, style)
        images = write_style(args.output / style, style, args.count, args.seed)
        scenes = training_scenes(style, args.count)
        layout = look(images, [scene.caption for scene in scenes])
        things = len({scene.name for scene in scenes})
        right = layout.correct.float().mean().item()
        print(f"{style}: {args.count} images of {things} things, {right:.2f} laid out as their prompts ask")


if __name__ == "__main__":
    main()
