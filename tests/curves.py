"""A run's curves.png laid out and not rendered, which takes longer than a training of the unit models.

tests/reporting/test_plots.py looks at the pictures and test_run.py at a run's; commands with an interpreter of their
own render.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from advgrpo.reporting import plots

DRAWN_BY = "advgrpo.training.run.draw_curves"  # what `lay_out` stands in for


def lay_out(rows: Sequence[Mapping[str, Any]], file: Path, held_out: plots.HeldOut | None) -> None:
    plots._curves_figure(rows, held_out)
    Image.new("RGB", (1, 1)).save(file)
