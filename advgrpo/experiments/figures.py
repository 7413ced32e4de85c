"""Curves and fronts of several arms over several seeds, as PNGs, from results.json alone. No global state."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from advgrpo.experiments.plan import METRIC_LABELS
from advgrpo.runtime.atomic import write_atomically

_COLOURS = ("#1f6fb4", "#d95f0e", "#2a9d5c", "#7b4fa3", "#c2a000", "#c23b6b")
_GREY = "#8a8a8a"  # the base model
_IN_CURVES = ("retrieval", "dino_similarity", "pickscore")
Points = Sequence[Mapping[str, float]]  # of one run


def draw_curves(found: Mapping, path: Path) -> None:
    """Held-out metrics over iterations, and retrieval over CPU seconds; per arm the mean over its seeds, and the range
    between them shaded.

    Raises:
        ValueError: seeds of an arm at different iterations, or more arms than colours.
    """
    arms = _made(found, "curve")
    known = [metric for metric in _IN_CURVES if all(metric in point for runs in arms.values() for point in runs[0])]
    panels = [("retrieval", "cpu_seconds"), *((metric, "iteration") for metric in known)]
    figure, every = _panels(len(panels))
    for axes, (metric, over) in zip(every, panels):
        for colour, (label, runs) in zip(_COLOURS, arms.items()):
            _draw_curve(axes, label, colour, runs, metric, over)
        xlabel = "CPU seconds of training" if over == "cpu_seconds" else over
        _finish(axes, f"{METRIC_LABELS[metric]}, held-out prompts", xlabel, METRIC_LABELS[metric])
    _write(figure, path)


def draw_fronts(found: Mapping, path: Path, metrics: Sequence[str]) -> None:
    """What the judge saw at every guidance scale, the report prompts: every metric over the distance to the references,
    of the mean over an arm's seeds, thin of every seed, and of the base model.

    Args:
        metrics: of the experiment; the distance itself is the other axis.

    Raises:
        ValueError: more arms than colours.
    """
    arms = _made(found, "front")
    shown = [metric for metric in metrics if metric != "kid"]
    figure, every = _panels(len(shown))
    base = {"base": [found["base"]["front"]]} if found["base"] else {}
    for axes, metric in zip(every, shown):
        for colour, (label, runs) in zip((_GREY, *_COLOURS) if base else _COLOURS, (base | arms).items()):
            if metric in runs[0][0]:
                _draw_front(axes, label, colour, runs, metric)
        _finish(axes, f"{METRIC_LABELS[metric]}, report prompts", METRIC_LABELS["kid"], METRIC_LABELS[metric])
    _write(figure, path)


def _made(found: Mapping, what: str) -> dict[str, list[Points]]:
    """Label -> one list of points per seed, of the arms with runs."""
    arms = {arm["label"]: [run[what] for run in arm["runs"].values()] for arm in found["arms"].values() if arm["runs"]}
    if len(arms) > len(_COLOURS):
        raise ValueError(f"{len(arms)} arms, but {len(_COLOURS)} colours: add some to _COLOURS")
    return arms


def _draw_curve(axes: Axes, label: str, colour: str, runs: Sequence[Points], metric: str, over: str) -> None:
    iterations = [point["iteration"] for point in runs[0]]
    if any([point["iteration"] for point in run] != iterations for run in runs):
        raise ValueError(f"the seeds of {label!r} were evaluated at different iterations")
    columns = list(zip(*([point[metric] for point in run] for run in runs)))
    x = [_mean(column) for column in zip(*([point[over] for point in run] for run in runs))]
    axes.plot(
        x, [_mean(column) for column in columns], color=colour, label=label, linewidth=1.6, marker="o", markersize=3
    )
    if len(runs) > 1:
        low, high = [min(column) for column in columns], [max(column) for column in columns]
        axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)


def _draw_front(axes: Axes, label: str, colour: str, runs: Sequence[Points], metric: str) -> None:
    mean = [{name: _mean(p[name] for p in column) for name in ("kid", metric)} for column in zip(*runs)]
    if len(runs) > 1:
        for run in runs:
            axes.plot([p["kid"] for p in run], [p[metric] for p in run], color=colour, linewidth=0.8, alpha=0.4)
    axes.plot([p["kid"] for p in mean], [p[metric] for p in mean], "o-", color=colour, label=label, linewidth=1.8)
    for point, own in zip(runs[0], mean):
        text, at = f"{point['guidance']:g}", (own["kid"], own[metric])
        axes.annotate(text, at, textcoords="offset points", xytext=(4, 4), fontsize=8, color=colour)


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    columns = min(2, count)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(6.0 * columns, 3.6 * rows), layout="constrained", dpi=100)
    return figure, [figure.add_subplot(rows, columns, number + 1) for number in range(count)]


def _finish(axes: Axes, title: str, xlabel: str, ylabel: str) -> None:
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize="small", frameon=False)


def _write(figure: Figure, path: Path) -> None:
    write_atomically(path, lambda file: figure.savefig(file, format="png"))


def _mean(values) -> float:
    found = list(values)
    return sum(found) / len(found)
