"""A run's curves.png without its picture, which takes longer than a training of the unit models.

What a run has to draw is chosen as ever, and laid out where a quantity is the first of its name in this process; forks
(zygote.py), each of which would be a first one, only choose. tests/reporting/test_plots.py looks at the pictures and
test_run.py at a run's; commands with an interpreter of their own render.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from advgrpo.reporting import plots

DRAWN_BY = "advgrpo.training.run.draw_curves"  # what these stand in for
_LAID_OUT: set[str] = set()


def choose(rows: Sequence[Mapping[str, Any]], file: Path, held_out: plots.HeldOut | None) -> set[str]:
    """The names of what would be drawn."""
    Image.new("RGB", (1, 1)).save(file)
    return {name for _, drawn in plots._drawn(rows, held_out) for name in drawn}


def lay_out(rows: Sequence[Mapping[str, Any]], file: Path, held_out: plots.HeldOut | None) -> None:
    names = choose(rows, file, held_out)
    if not names <= _LAID_OUT:
        plots._curves_figure(rows, held_out)
        _LAID_OUT.update(names)
