"""Sample grids as small WebP pictures inside the page."""

from __future__ import annotations

import base64
import functools
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from PIL import Image

MOST_PICTURES = 16
MOST_BYTES = 300_000  # of one; in base64 a third more
MOST_WIDTH = 1600  # pixels
_Item = TypeVar("_Item")


@dataclass(frozen=True)
class Picture:
    """A picture as the address of an <img>."""

    address: str
    width: int
    height: int


def spread(items: Sequence[_Item], most: int = MOST_PICTURES) -> list[_Item]:
    """At most `most` of them, evenly, with the first and the last."""
    if len(items) <= most:
        return list(items)
    return [items[round(k * (len(items) - 1) / (most - 1))] for k in range(most)]


def embed(file: Path) -> Picture | None:
    """The picture in at most MOST_BYTES, in a lower quality or size where it takes more; None where it is damaged.

    A run writes its report again and again: a file that has not changed is not encoded again.
    """
    try:
        status = file.stat()
    except OSError:
        return None
    return _embed(file, status.st_mtime_ns, status.st_size)


@functools.lru_cache(4 * MOST_PICTURES)
def _embed(file: Path, changed: int, size: int) -> Picture | None:
    try:
        with Image.open(file, formats=["PNG"]) as opened:
            image = opened.convert("RGB")
    except (OSError, SyntaxError, ValueError):
        return None
    if image.width > MOST_WIDTH:
        image = image.resize((MOST_WIDTH, round(image.height * MOST_WIDTH / image.width)), Image.Resampling.LANCZOS)
    for quality in (88, 75, 60, 40):
        raw = _webp(image, quality)
        if len(raw) <= MOST_BYTES:
            break
    while len(raw) > MOST_BYTES:
        image = image.resize((max(1, image.width // 2), max(1, image.height // 2)), Image.Resampling.LANCZOS)
        raw = _webp(image, 60)
    return Picture("data:image/webp;base64," + base64.b64encode(raw).decode(), image.width, image.height)


def _webp(image: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=quality, method=4)
    return buffer.getvalue()
