"""Curves of several arms over several seeds, as one PNG. No display and no global state."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from advgrpo.runtime.atomic import write_atomically

_COLOURS = ("#1f6fb4", "#d95f0e", "#2a9d5c", "#7b4fa3", "#8a8a8a", "#c2a000")
Curve = Sequence[tuple[int, Mapping[str, float]]]  # (iteration, values by metric)


def draw_comparison(
    arms: Mapping[str, Sequence[Curve]], panels: Mapping[str, str], levels: Mapping[str, float], path: str | Path
) -> None:
    """One panel per metric; per arm the mean over its seeds, and the range between them shaded.

    Args:
        arms: label -> one curve per seed, all at the same iterations.
        panels: metric -> title.
        levels: the references' value of a metric, drawn as a dashed line.
        path: the PNG to write.

    Raises:
        ValueError: curves of an arm at different iterations, or more arms than colours.
    """
    if len(arms) > len(_COLOURS):
        raise ValueError(f"{len(arms)} arms, but {len(_COLOURS)} colours: add some to _COLOURS")
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(6.0 * columns, 3.2 * rows), layout="constrained", dpi=100)
    for number, (metric, title) in enumerate(panels.items()):
        axes = figure.add_subplot(rows, columns, number + 1)
        for colour, (label, curves) in zip(_COLOURS, arms.items()):
            _draw_arm(axes, label, colour, curves, metric)
        if metric in levels:
            axes.axhline(levels[metric], color="#444444", linewidth=1, linestyle="--", label="references")
        axes.set(title=title, xlabel="iteration")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize="small", frameon=False)
    write_atomically(Path(path), lambda file: figure.savefig(file, format="png"))


def _draw_arm(axes: Axes, label: str, colour: str, curves: Sequence[Curve], metric: str) -> None:
    iterations = [iteration for iteration, _ in curves[0]]
    if any([iteration for iteration, _ in curve] != iterations for curve in curves):
        raise ValueError(f"the seeds of {label!r} were evaluated at different iterations")
    columns = list(zip(*([values[metric] for _, values in curve] for curve in curves)))
    means = [sum(column) / len(column) for column in columns]
    axes.plot(iterations, means, color=colour, label=label, linewidth=1.6, marker="o", markersize=3)
    if len(curves) > 1:
        low, high = [min(column) for column in columns], [max(column) for column in columns]
        axes.fill_between(iterations, low, high, color=colour, alpha=0.15, linewidth=0)
