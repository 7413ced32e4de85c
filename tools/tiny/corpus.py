"""Every thing that several artists drew: what the VAE and the backbone are trained on, far more than the world's 64.

Drawn from the vector files at build time and not shipped.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from advgrpo.tiny.scenes import JITTER, SIZES, Scene, compose, compositions
from tools.tiny.draw_sheets import SETS, archive_of

_CATEGORIES = ("Animals & Nature", "Food & Drink", "Travel & Places", "Objects", "Activities")
_DULL = ("oclock", "thirty", "-moon-face", "button", "globe-showing")  # many drawings that differ by a hand


def things() -> list[str]:
    """Names of things in the sets of all artists, sorted: people, faces, flags, symbols and clock faces left out."""
    with tarfile.open(archive_of(SETS["noto"])) as tar:
        categories = json.load(tar.extractfile("package/metadata.json"))["categories"]
    named = {name for category in _CATEGORIES for name in categories[category]}
    common = set.intersection(named, *(icon_set.names() for icon_set in SETS.values()))
    return sorted(name for name in common if not any(word in name for word in _DULL))


@dataclass(frozen=True)
class Corpus:
    """Drawings by several artists in the world's sizes, premultiplied: {size: [artists x names, 4, s, s]}."""

    drawings: dict[str, torch.Tensor]

    @classmethod
    def draw(cls, artists: Sequence[str]) -> Corpus:
        names = things()
        print(f"drawing {len(names)} things by {', '.join(artists)}", flush=True)
        largest = max(SIZES.values())
        fine = [SETS[artist].draw(name, largest) for artist in artists for name in names]
        return cls({size: torch.stack([premultiplied(tile, side) for tile in fine]) for size, side in SIZES.items()})

    def __len__(self) -> int:
        return len(next(iter(self.drawings.values())))

    def images(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """Random drawings in random compositions, [count, 3, 48, 48] in [0, 1]."""
        return self.composed(torch.randint(len(self), (count,), generator=generator).tolist(), generator)

    def composed(self, which: Sequence[int], generator: torch.Generator) -> torch.Tensor:
        """The drawings `which`, each in a random composition."""
        known = compositions()
        where = torch.randint(len(known), (len(which),), generator=generator).tolist()
        jitter = torch.randint(-JITTER, JITTER + 1, (len(which), 2), generator=generator).tolist()
        scenes = [Scene("", *known[i]) for i in where]
        return torch.stack([compose(self.drawings[s.size][i], s, shift) for s, i, shift in zip(scenes, which, jitter)])


def premultiplied(tile: Image.Image, side: int) -> torch.Tensor:
    """An RGBA picture in another size, [4, s, s] float32: colour times coverage, and coverage."""
    if tile.width != side:
        tile = tile.resize((side, side), Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.asarray(tile).copy()).permute(2, 0, 1).float() / 255
    return torch.cat([pixels[:3] * pixels[3:], pixels[3:]])
