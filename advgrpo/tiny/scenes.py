"""The tiny world's images: drawings of 64 things by several artists, on plain backgrounds.

The drawings are open emoji sets (NOTICE names them and their licences), kept as sheets of 64 drawings with
transparency, one per artist and size; `tools.tiny.draw_sheets` makes them from the published vector files. An
image is fully described by a `Scene` (name, size, place, background) and an artist, and reads, as a caption that does
not name the artist, "a small fox on blue, left".

- `BASE_ARTISTS` drew what the base model was trained on;
- `REFERENCE_ARTIST` drew the references: neither the base model nor its VAE has seen a drawing of theirs;
- `JUDGE_ARTISTS` are seen by judges only;
- `STYLE_ARTISTS` drew the styles: of them there are pictures without prompts, and their sheets for judges of style.

Shapes: B scenes, S = image size in pixels; images are [B, 3, S, S] float32 in [0, 1].
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from advgrpo.runtime.atomic import write_atomically

# the word of a caption -> the icon's name in every set
ICONS = {
    "bear": "bear", "cow": "cow", "crab": "crab", "dolphin": "dolphin", "fox": "fox", "horse": "horse",
    "monkey": "monkey", "mouse": "mouse", "panda": "panda", "palm": "palm-tree", "avocado": "avocado",
    "bread": "bread", "cookie": "cookie", "egg": "egg", "hamburger": "hamburger", "hotdog": "hot-dog",
    "pepper": "hot-pepper", "lollipop": "lollipop", "pineapple": "pineapple", "popcorn": "popcorn",
    "spaghetti": "spaghetti", "strawberry": "strawberry", "watermelon": "watermelon", "airplane": "airplane",
    "clock": "alarm-clock", "ambulance": "ambulance", "anchor": "anchor", "cloud": "cloud", "moon": "crescent-moon",
    "droplet": "droplet", "house": "house", "rainbow": "rainbow", "rocket": "rocket", "snowflake": "snowflake",
    "star": "star", "taxi": "taxi", "umbrella": "umbrella", "bomb": "bomb", "dress": "dress", "envelope": "envelope",
    "gear": "gear", "handbag": "handbag", "jeans": "jeans", "key": "key", "laptop": "laptop", "bulb": "light-bulb",
    "pencil": "pencil", "ring": "ring", "saxophone": "saxophone", "scissors": "scissors",
    "sunglasses": "sunglasses", "shirt": "t-shirt", "telephone": "telephone", "television": "television",
    "trumpet": "trumpet", "violin": "violin", "wrench": "wrench", "balloon": "balloon", "baseball": "baseball",
    "basketball": "basketball", "tree": "christmas-tree", "joystick": "joystick", "football": "soccer-ball",
    "trophy": "trophy",
}  # fmt: skip
NAMES = tuple(sorted(ICONS))
BASE_ARTISTS = ("noto", "twemoji")
REFERENCE_ARTIST = "fluent-emoji-flat"
JUDGE_ARTISTS = ("emojione", "noto-v1")
ARTISTS = (*BASE_ARTISTS, REFERENCE_ARTIST, *JUDGE_ARTISTS)
STYLE_ARTISTS = {"ink": "fluent-emoji-high-contrast", "outline": "streamline-emojis"}  # by the name of their style
BACKGROUNDS = {
    "white": (0.96, 0.96, 0.96),
    "grey": (0.47, 0.47, 0.51),
    "blue": (0.47, 0.67, 0.90),
    "green": (0.55, 0.78, 0.55),
    "yellow": (0.96, 0.86, 0.47),
    "pink": (0.96, 0.67, 0.75),
}
IMAGE_SIZE = 48
SIZES = {"large": 42, "small": 32}  # pixels of a drawing
PLACES = {"": (0, 0), "left": (-7, 0), "right": (7, 0), "top": (0, -7), "bottom": (0, 7)}  # pixels off the middle
JITTER = 1  # pixels by which a drawing may stand off its place, both ways
CAPTION_WORDS = 7  # the comma is one

_SHEETS = Path(__file__).parent / "assets" / "drawings"
_SHEET_COLUMNS = 8
_CAPTION = re.compile(
    rf"a (?P<size>{'|'.join(SIZES)}) (?P<name>{'|'.join(NAMES)}) on (?P<background>{'|'.join(BACKGROUNDS)})"
    rf"(?:, (?P<place>{'|'.join(filter(None, PLACES))}))?"
)


@dataclass(frozen=True)
class Scene:
    name: str
    size: str
    place: str  # "" is the middle
    background: str

    @property
    def caption(self) -> str:
        return f"a {self.size} {self.name} on {self.background}" + (f", {self.place}" if self.place else "")

    @classmethod
    def parse(cls, caption: str) -> Scene:
        """The scene a caption describes; ValueError for any other text."""
        match = _CAPTION.fullmatch(caption.strip())
        if match is None or (match["size"] == "large") != (match["place"] is None):
            example = Scene("fox", "small", "left", "blue").caption
            raise ValueError(f"not a caption of the tiny world: {caption!r} (they read like {example!r})")
        return cls(match["name"], match["size"], match["place"] or "", match["background"])


def compositions() -> list[tuple[str, str, str]]:
    """Every (size, place, background): a large drawing stands in the middle, a small one to a side."""
    places = [("large", ""), *(("small", place) for place in PLACES if place)]
    return [(size, place, background) for (size, place), background in itertools.product(places, BACKGROUNDS)]


def all_scenes(names: Sequence[str] = NAMES) -> list[Scene]:
    """Every composition of every name, in a fixed order."""
    return [Scene(name, *composition) for name in names for composition in compositions()]


def vocabulary() -> list[str]:
    """Every word a caption can contain, sorted; the comma is one."""
    return sorted({word for scene in all_scenes() for word in scene.caption.replace(",", " ,").split()})


@functools.cache
def drawings(artist: str, size: str) -> torch.Tensor:
    """Drawings of all NAMES by one artist: [64, 4, s, s] float32, premultiplied colour and coverage, s = SIZES[size].

    What an artist has not drawn, as one of STYLE_ARTISTS has not all of it, is empty: `has_drawn` tells.

    Raises:
        ValueError: an unknown artist.
    """
    known = (*ARTISTS, *STYLE_ARTISTS.values())
    if artist not in known:
        raise ValueError(f"unknown artist {artist!r}: one of {known}")
    return read_sheet(_SHEETS / f"{artist}-{size}.png", len(NAMES))


def has_drawn(artist: str) -> torch.Tensor:
    """[64] bool: of which of NAMES there is a drawing by the artist; ValueError for an unknown one."""
    return drawings(artist, "large")[:, 3].amax((1, 2)) > 0


def read_sheet(path: Path, count: int) -> torch.Tensor:
    """The first `count` square drawings of a sheet with 8 columns: [count, 4, s, s] float32, premultiplied."""
    pixels = torch.from_numpy(np.asarray(Image.open(path).convert("RGBA")).copy()).permute(2, 0, 1).float() / 255
    side = pixels.shape[2] // _SHEET_COLUMNS
    tiles = pixels.unfold(1, side, side).unfold(2, side, side).flatten(1, 2).transpose(0, 1)[:count].contiguous()
    return torch.cat([tiles[:, :3] * tiles[:, 3:], tiles[:, 3:]], dim=1)


def write_sheet(tiles: Sequence[Image.Image], path: Path) -> None:
    """The inverse of `read_sheet`, from RGBA pictures of one size."""
    side, rows = tiles[0].width, -(-len(tiles) // _SHEET_COLUMNS)
    sheet = Image.new("RGBA", (_SHEET_COLUMNS * side, rows * side))
    for i, tile in enumerate(tiles):
        sheet.paste(tile, (i % _SHEET_COLUMNS * side, i // _SHEET_COLUMNS * side))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: sheet.save(file, "PNG", optimize=True))


def render(scenes: Sequence[Scene], artists: Sequence[str], generator: torch.Generator | None = None) -> torch.Tensor:
    """Draw scenes by the artist of each, [B, 3, 48, 48] float32 in [0, 1].

    Args:
        scenes: B scenes.
        artists: B names of ARTISTS.
        generator: where drawings stand off their place by up to JITTER pixels; None: exactly in place.
    """
    jitter = torch.zeros(len(scenes), 2, dtype=torch.long)
    if generator is not None:
        jitter = torch.randint(-JITTER, JITTER + 1, (len(scenes), 2), generator=generator)
    images = [
        compose(drawings(artist, scene.size)[NAMES.index(scene.name)], scene, shift)
        for scene, artist, shift in zip(scenes, artists, jitter.tolist(), strict=True)
    ]
    return torch.stack(images)


def compose(drawing: torch.Tensor, scene: Scene, jitter: Sequence[int] = (0, 0)) -> torch.Tensor:
    """A premultiplied drawing [4, s, s] over the scene's background, at the scene's place: [3, 48, 48] in [0, 1]."""
    image = torch.tensor(BACKGROUNDS[scene.background]).view(3, 1, 1).repeat(1, IMAGE_SIZE, IMAGE_SIZE)
    side = drawing.shape[-1]
    left, top = (
        (IMAGE_SIZE - side) // 2 + offset + shift for offset, shift in zip(PLACES[scene.place], jitter, strict=True)
    )
    part = image[:, top : top + side, left : left + side]
    part.mul_(1 - drawing[3:]).add_(drawing[:3])
    return image.clamp_(0, 1)
