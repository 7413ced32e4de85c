"""Captioned images of short words, for the OCR reward: `the word "CAT" in red on a white background`.

python -m advgrpo.tiny.words --output words/     # prompts.txt, held_out_prompts.txt, references/ with references.json

What the OCR reward (RapidOCR 3.10, detection_size 192) says of 32-pixel images, mean and share read exactly:

| images | guidance | mean | exact |
|---|---|---|---|
| crisp, 96 | – | 0.99 | – |
| drawn by "tiny:words", 24 training captions x 2 | 1 | 0.70 | 0.33 |
| | 2 | 0.88 | 0.75 |
| | 3 | 0.87 | 0.67 |
| drawn by "tiny:words", 24 held-out captions x 2 | 1 | 0.69 | 0.38 |
| | 2 | 0.83 | 0.62 |
| | 3 | 0.81 | 0.58 |

"tiny:words" was pre-trained on every word in every pair of colours, so the held-out captions are held out from
reinforcement learning only. Without guidance there is room above its 0.69 for a reward to work in.

Shapes: B scenes, S = image size in pixels; images are [B, 3, S, S] float32 in [0, 1].
"""

from __future__ import annotations

import argparse
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from advgrpo.runtime.atomic import write_atomically
from advgrpo.runtime.rng import generator
from advgrpo.tiny.assets import write_image

WORDS = (
    *("ACE", "ANT", "ART", "BAT", "BED", "BEE", "BIG", "BOX", "BUS", "CAB", "CAN", "CAP", "CAR", "CAT", "COW", "CUP"),
    *("DOG", "EAR", "EGG", "ELF", "FAN", "FIG", "FOX", "GAS", "HAT", "HEN", "ICE", "INK", "JAM", "JAR", "KEY", "KIT"),
    *("LEG", "LOG", "MAP", "MUD", "NET", "NUT", "OAK", "OWL", "PEN", "PIG", "RAT", "RED", "SEA", "SKY", "SUN", "TEA"),
    *("TOY", "VAN", "WAX", "WEB", "YAK", "ZIP", "ZOO"),
)
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
IMAGE_SIZE = 64
_MIN_CONTRAST = (
    0.6  # RGB distance of letters and background; leaves out red on orange, orange on yellow, blue on purple
)
_WIDTH_SHARE = 0.84  # of the image, taken by the word
_SUPERSAMPLING = 4  # glyphs are drawn this much larger, so that jitter below a pixel shows
_CAPTION = re.compile(
    rf'the word "(?P<word>[A-Z]+)" in (?P<colour>{"|".join(COLOURS)}) '
    rf"on a (?P<background>{'|'.join(COLOURS)}) background"
)


@dataclass(frozen=True)
class WordScene:
    """One word in one colour on a plain background."""

    word: str
    colour: str
    background: str

    @property
    def caption(self) -> str:
        return f'the word "{self.word}" in {self.colour} on a {self.background} background'

    @classmethod
    def parse(cls, caption: str) -> WordScene:
        """The scene a caption describes; ValueError for any other text."""
        match = _CAPTION.fullmatch(caption.strip())
        if match is None:
            example = cls("CAT", "red", "white").caption
            raise ValueError(f"not a caption of the word images: {caption!r} (they read like {example!r})")
        return cls(**match.groupdict())


def all_scenes() -> list[WordScene]:
    """Every word in every pair of colours that contrast, in a fixed order."""
    pairs = [(a, b) for a in COLOURS for b in COLOURS if math.dist(PALETTE[a], PALETTE[b]) >= _MIN_CONTRAST]
    return [WordScene(word, *pair) for word in WORDS for pair in pairs]


def vocabulary() -> list[str]:
    """Every word of a caption but the one to draw, sorted."""
    return sorted({*COLOURS, *["the", "word", "in", "on", "a", "background"]})


def split_prompts(train: int, held_out: int, seed: int = 0) -> tuple[list[str], list[str]]:
    """Captions for training and evaluation: disjoint combinations, every word equally often in each."""
    scenes = all_scenes()
    per_word = len(scenes) // len(WORDS)
    rounds = -(-(train + held_out) // len(WORDS))
    if rounds > per_word:
        raise ValueError(f"train + held_out = {train + held_out} exceeds the {len(scenes)} combinations")
    draw = generator(seed, "word_prompts")
    orders = [torch.randperm(per_word, generator=draw).tolist() for _ in WORDS]
    words = torch.randperm(len(WORDS), generator=draw).tolist()
    captions = [scenes[w * per_word + orders[w][r]].caption for r in range(rounds) for w in words]
    return captions[:train], captions[train : train + held_out]


def render(scenes: list[WordScene], generator: torch.Generator, *, size: int = IMAGE_SIZE) -> torch.Tensor:
    """Draw words across the image's middle with a little jitter in place and scale: [B, 3, S, S].

    The same generator state gives the same images. RapidOCR reads them at 64 and at 32 pixels.
    """
    jitter = torch.rand(len(scenes), 3, generator=generator) * 2 - 1
    alphas = [_alpha(scene.word, size, *row) for scene, row in zip(scenes, jitter.tolist())]
    alpha = torch.from_numpy(np.stack(alphas)).float().div_(255)[:, None]
    colour = torch.tensor([PALETTE[s.colour] for s in scenes]).view(-1, 3, 1, 1)
    background = torch.tensor([PALETTE[s.background] for s in scenes]).view(-1, 3, 1, 1)
    return torch.lerp(background.expand(-1, -1, size, size), colour.expand(-1, -1, size, size), alpha)


def _alpha(word: str, size: int, dx: float, dy: float, scale: float) -> np.ndarray:
    """The word's coverage [S, S] uint8; the jitters are in [-1, 1]."""
    large = size * _SUPERSAMPLING
    font = _font(1000)
    points = 1000 * large * _WIDTH_SHARE * (1 + 0.06 * scale) / font.getlength(word)
    font = _font(round(min(points, 0.5 * large)))
    canvas = Image.new("L", (large, large))
    centre = (large / 2 * (1 + 0.04 * dx), large / 2 * (1 + 0.12 * dy))
    ImageDraw.Draw(canvas).text(centre, word, fill=255, font=font, anchor="mm")
    return np.asarray(canvas.resize((size, size), Image.Resampling.BOX))


def _font(points: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans Bold, which matplotlib ships."""
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans-Bold.ttf"), points)


def write_set(folder: Path, *, train: int, held_out: int, per_prompt: int, size: int, seed: int) -> None:
    """prompts.txt, held_out_prompts.txt and references/ with its index, in the format of `ReferenceSet`."""
    parts = dict(zip(("prompts", "held_out_prompts"), split_prompts(train, held_out, seed)))
    references = folder / "references"
    references.mkdir(parents=True, exist_ok=True)
    index: dict[str, list[str]] = {}
    for number, prompt in enumerate(prompt for part in parts.values() for prompt in part):
        draw = generator(seed, "word_references", number)
        pixels = (render([WordScene.parse(prompt)] * per_prompt, draw, size=size) * 255).round().byte()
        index[prompt] = [f"{number:03d}-{k}.png" for k in range(per_prompt)]
        for name, image in zip(index[prompt], pixels):
            write_image(references / name, image)
    write_atomically(references / "references.json", json.dumps(index, indent=1) + "\n")
    for name, prompts in parts.items():
        write_atomically(folder / f"{name}.txt", "".join(f"{prompt}\n" for prompt in prompts))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder to write into")
    parser.add_argument("--train", type=int, default=96, help="training prompts")
    parser.add_argument("--held-out", type=int, default=48, help="evaluation prompts")
    parser.add_argument("--per-prompt", type=int, default=8)
    parser.add_argument("--size", type=int, default=IMAGE_SIZE, help="pixels")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    write_set(
        args.output,
        train=args.train,
        held_out=args.held_out,
        per_prompt=args.per_prompt,
        size=args.size,
        seed=args.seed,
    )
    print(f"wrote {args.train} + {args.held_out} prompts with {args.per_prompt} references each to {args.output}")


if __name__ == "__main__":
    main()
