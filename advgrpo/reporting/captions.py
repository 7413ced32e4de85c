"""Text on images, in any script: a character is drawn in the first font that has it.

DejaVu, which matplotlib ships, has most alphabets but no Chinese, Japanese or Korean; those come from the fonts that
are installed on the machine (Debian: fonts-noto-cjk). What no font has is written as its code point, "<U+4E2D>", never
as an empty box.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import matplotlib
from matplotlib import font_manager
from matplotlib.ft2font import FT2Font
from PIL import ImageDraw, ImageFont

_MORE = " …"


class Writer:
    """Measures, wraps and draws text of one size."""

    def __init__(self, size: int, bold: bool = False):
        self.size = size
        self._first = _shipped("DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf")

    @property
    def line_height(self) -> int:
        return sum(_font(self._first, self.size).getmetrics())

    def width(self, text: str) -> float:
        """In pixels."""
        return sum(font.getlength(run) for font, run in self._runs(text))

    def wrap(self, text: str, width: float, most: int = 0) -> list[str]:
        """`text` in lines of at most `width` pixels, broken at blanks where there are any; at most `most` lines (0: any
        number), the last of which then ends in "…"."""
        lines = []
        for paragraph in text.splitlines():
            lines += self._wrap_paragraph(paragraph, width)
        if most and len(lines) > most:
            last = lines[most - 1]
            while last and self.width(last + _MORE) > width:
                last = last[:-1]
            lines = [*lines[: most - 1], last.rstrip() + _MORE]
        return lines

    def draw(self, canvas: ImageDraw.ImageDraw, at: tuple[float, float], text: str, fill: str) -> None:
        """Write one line with its upper left corner at `at`; fonts of several scripts share one baseline."""
        left, top = at
        base = top + _font(self._first, self.size).getmetrics()[0]
        for font, run in self._runs(text):
            canvas.text((left, base), run, fill=fill, font=font, anchor="ls")
            left += font.getlength(run)

    def _wrap_paragraph(self, text: str, width: float) -> Iterator[str]:
        line = ""
        for word in text.split():
            longer = f"{line} {word}" if line else word
            if self.width(longer) <= width:
                line = longer
                continue
            if line:
                yield line
            while self.width(word) > width and len(word) > 1:  # no blank to break at: Chinese, or a very long word
                fits = self._fitting(word, width)
                yield word[:fits]
                word = word[fits:]
            line = word
        if line:
            yield line

    def _fitting(self, word: str, width: float) -> int:
        """The most characters of `word` that fit, at least one; by bisection, widths grow with length."""
        low, high = 1, len(word)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.width(word[:middle]) <= width else (low, middle - 1)
        return low

    def _runs(self, text: str) -> Iterator[tuple[ImageFont.FreeTypeFont, str]]:
        """(font, consecutive characters that it has)."""
        run, own = "", self._first
        for character in text:
            path = _font_with(ord(character), self._first)
            shown = character if path else f"<U+{ord(character):04X}>"
            path = path or self._first
            if run and path != own:
                yield _font(own, self.size), run
                run = ""
            run, own = run + shown, path
        if run:
            yield _font(own, self.size), run


def _shipped(name: str) -> str:
    return str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name)


@functools.lru_cache(maxsize=64)
def _font(path: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, size)


@functools.lru_cache(maxsize=4096)
def _font_with(character: int, first: str) -> str | None:
    """Path of `first`, or else of the first installed font, that has the character; None if none has."""
    return next((path for path in (first, *_installed()) if character in _characters(path)), None)


@functools.lru_cache(maxsize=1)
def _installed() -> tuple[str, ...]:
    """Paths of this machine's fonts, upright sans-serif ones first, in an order that does not depend on the disk."""
    paths = sorted(font_manager.findSystemFonts())
    plain = [p for p in paths if "sans" in p.lower() and "bold" not in p.lower() and "oblique" not in p.lower()]
    return (*plain, *(p for p in paths if p not in plain))


@functools.lru_cache(maxsize=512)
def _characters(path: str) -> frozenset[int]:
    try:
        return frozenset(FT2Font(path).get_charmap())
    except (RuntimeError, OSError):  # a file FreeType cannot read has no characters for us
        return frozenset()
