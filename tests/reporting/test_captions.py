"""Captions in any script, wrapped and cut.

Planted bugs that turn it red: drawing every character in the first font; wrapping by the number of characters.
"""

import matplotlib
import numpy as np
import pytest
from PIL import Image, ImageDraw

from advgrpo.reporting import captions
from advgrpo.reporting.captions import Writer

STIX = f"{matplotlib.get_data_path()}/fonts/ttf/STIXGeneral.ttf"
ONLY_STIX = chr(0x1D8E)  # DejaVu Sans lacks it


@pytest.fixture
def fonts(monkeypatch):
    """Which fonts are installed, besides the one that is shipped."""

    def install(*paths):
        monkeypatch.setattr(captions, "_installed", lambda: paths)
        captions._font_with.cache_clear()

    yield install
    captions._font_with.cache_clear()


def ink(writer, text):
    canvas = Image.new("L", (400, 40), 255)
    writer.draw(ImageDraw.Draw(canvas), (4, 4), text, "black")
    return np.array(canvas) < 128


def test_a_character_comes_from_the_first_font_that_has_it(fonts):
    fonts(STIX)
    writer = Writer(20)
    runs = [(font.path, run) for font, run in writer._runs(f"ab{ONLY_STIX}c")]
    assert [run for _, run in runs] == ["ab", ONLY_STIX, "c"]
    assert [path == STIX for path, _ in runs] == [False, True, False]
    alone = ink(writer, ONLY_STIX)
    assert alone.any()
    fonts()
    assert not np.array_equal(ink(writer, ONLY_STIX), alone)


def test_what_no_font_has_is_its_code_point(fonts):
    fonts()
    writer = Writer(14)
    assert [run for _, run in writer._runs("a \u4e2d\u6587 b")] == ["a <U+4E2D><U+6587> b"]
    assert writer.width("\u4e2d") == writer.width("<U+4E2D>")


@pytest.mark.parametrize(
    "text",
    [
        "a small red star on the left of a blue background " * 4 + "x" * 200,
        "\u0437\u0432\u0435\u0437\u0434\u0430" * 40,
        f"ab {ONLY_STIX * 90} cd",
    ],
    ids=["latin", "cyrillic", "mixed"],
)
def test_lines_fit_and_hold_everything(text, fonts):
    fonts(STIX)
    writer = Writer(14)
    lines = writer.wrap(text, 200)
    assert len(lines) >= 4
    assert max(writer.width(line) for line in lines) <= 200
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")


def test_more_lines_than_wanted_end_in_an_ellipsis():
    writer = Writer(14)
    lines = writer.wrap("a small red star " * 50, 200, most=3)
    assert len(lines) == 3
    assert lines[2].endswith(" …")
    assert max(writer.width(line) for line in lines) <= 200
    assert writer.wrap("a star", 200, most=3) == ["a star"]
    assert writer.wrap("", 200) == []


def test_text_of_two_fonts_shares_a_baseline(fonts):
    fonts(STIX)
    rows = [np.flatnonzero(ink(Writer(20), text).any(1)).max() for text in ("x", f"x{ONLY_STIX}x")]
    assert abs(rows[0] - rows[1]) <= 6  # the letter has a hook below the baseline
