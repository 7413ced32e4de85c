"""Charts as SVG text: lines with intervals and bands, stacked areas, scatter plots, bars of time. Colours are CSS's.

A chart is 440 x 250 units, about its size in CSS pixels, so that its text is readable on a phone and beside others on a
desk. What the page's script shows where the pointer or the arrow keys are stands in `data-chart` as JSON.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

WIDTH, HEIGHT = 440, 250
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 12, 30
MOST_POINTS = 300  # of a line; longer ones are thinned by the mean of neighbours


@dataclass(frozen=True)
class Line:
    """A quantity over iterations."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    colour: int = 0  # a number of the page's palette
    halves: Sequence[float | None] = ()  # of intervals; then points are marked
    marked: bool = False

    def thinned(self) -> Line:
        """At most MOST_POINTS points, each the mean of its neighbours."""
        step = math.ceil(len(self.xs) / MOST_POINTS)
        if step <= 1 or self.halves:
            return self
        parts = [slice(start, start + step) for start in range(0, len(self.xs), step)]
        xs, ys = ([sum(v[part]) / len(v[part]) for part in parts] for v in (self.xs, self.ys))
        return Line(f"{self.name} (mean of {step})", xs, ys, self.colour)


@dataclass(frozen=True)
class Chart:
    """Lines in one frame."""

    title: str
    lines: Sequence[Line]
    band: tuple[Sequence[float], Sequence[float], Sequence[float]] | None = None  # iterations, lowest, highest
    band_name: str = ""
    ticks: Sequence[float] = ()  # iterations marked at the bottom
    ticks_name: str = ""
    floor: float | None = None
    note: str = ""
    extra: str = field(default="", repr=False)


class Scale:
    """Values to units of the drawing, with ticks at round numbers."""

    def __init__(self, low: float, high: float, start: float, end: float, count: int = 4):
        if high - low < 1e-12 * max(1.0, abs(high)):  # a constant, in the middle; 0 at the bottom
            low, high = low - 0.5 * abs(low), high + 0.5 * (abs(high) or 2)
        self.low, self.high, self.start, self.end = low, high, start, end
        size = (high - low) / count
        unit = 10.0 ** math.floor(math.log10(size))
        step = next(unit * n for n in (1, 2, 2.5, 5, 10) if unit * n >= size)
        first = math.ceil(low / step - 1e-9)
        self.ticks = [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]
        self._digits = max(0, -math.floor(math.log10(step) + 1e-9) + (0 if step / unit in (1, 2, 5, 10) else 1))

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def text(self, value: float) -> str:
        if 0 < abs(value) < 1e-4 or abs(value) >= 1e6:
            return f"{value:.1e}".replace("-", "−")
        return f"{value:.{min(self._digits, 6)}f}".replace("-", "−")


def draw(chart: Chart) -> str:
    """The chart's SVG, with its values for the pointer."""
    lines = [line.thinned() for line in chart.lines if line.xs]
    xs = [x for line in lines for x in line.xs]
    ys = [y for line in lines for y in line.ys]
    for line in lines:
        for y, half in zip(line.ys, line.halves):
            ys += [y - half, y + half] if half is not None else []
    if chart.band is not None:
        xs, ys = [*xs, *chart.band[0]], [*ys, *chart.band[1], *chart.band[2]]
    if chart.floor is not None:
        ys.append(chart.floor)
    room = 0.06 * (max(ys) - min(ys))
    across = Scale(min(xs), max(xs), LEFT, WIDTH - RIGHT)
    up = Scale(min(ys) - (0 if chart.floor is not None else room), max(ys) + room, HEIGHT - BOTTOM, TOP)
    parts = [_frame(across, up), _band(chart, across, up)]
    for line in lines:
        parts.append(_line(line, across, up))
    if chart.ticks:
        marks = "".join(f"M{across(x):.1f} {HEIGHT - BOTTOM - 6}v5" for x in _thin(chart.ticks))
        parts.append(f'<path class="tick-marks" d="{marks}"/>')
    parts.append('<line class="cursor" y1="12" y2="220" hidden=""/>')
    return _svg(chart.title, "".join(parts), lines, across, up)


def draw_stack(title: str, xs: Sequence[float], layers: Sequence[tuple[str, Sequence[float]]]) -> str:
    """Areas on each other, from the first at the bottom; each layer has a value at every x."""
    across = Scale(min(xs), max(xs), LEFT, WIDTH - RIGHT)
    tops = [sum(values[i] for _, values in layers) for i in range(len(xs))]
    up = Scale(0.0, max(tops) * 1.04, HEIGHT - BOTTOM, TOP)
    parts, below, lines = [_frame(across, up)], [0.0] * len(xs), []
    for number, (name, values) in enumerate(layers):
        above = [b + v for b, v in zip(below, values)]
        outline = _points(xs, above, across, up) + _points(xs[::-1], below[::-1], across, up).replace("M", "L", 1)
        parts.append(f'<path class="area c{number % 8}" d="{outline}Z"/>')
        lines.append(Line(name, xs, values, number % 8))
        below = above
    parts.append('<line class="cursor" y1="12" y2="220" hidden=""/>')
    return _svg(title, "".join(parts), lines, across, None)


def draw_path(title: str, names: tuple[str, str], points: Sequence[tuple[int, float, float]], best: set[int]) -> str:
    """Two metrics against each other, joined in the order of training; `best`: iterations that nothing dominates, which
    are labelled, as are the ends."""
    xs, ys = [x for _, x, _ in points], [y for _, _, y in points]
    room = [0.08 * ((max(v) - min(v)) or 1e-6) for v in (xs, ys)]
    across = Scale(min(xs) - room[0], max(xs) + room[0], LEFT, WIDTH - RIGHT)
    up = Scale(min(ys) - room[1], max(ys) + room[1], HEIGHT - BOTTOM - 12, TOP)
    marks = []
    for number, (iteration, x, y) in enumerate(points):
        kind = "front" if iteration in best else "behind"
        label = "start" if not number else f"{iteration}"
        shown = label if kind == "front" or number in (0, len(points) - 1) else ""  # all would lie on each other
        text = f"{label}: {names[0]} {x:.4g}, {names[1]} {y:.4g}"
        left = across(x) > WIDTH - 60
        anchor = ' text-anchor="end"' if left else ""
        marks.append(
            f'<g><circle class="dot {kind}" cx="{across(x):.1f}" cy="{up(y):.1f}" r="4.5"><title>{escape(text)}</title>'
            f'</circle><text class="label" x="{across(x) + (-8 if left else 8):.1f}" y="{up(y) - 6:.1f}"'
            f"{anchor}>{shown}</text></g>"
        )
    frame = _frame(across, up, bottom=HEIGHT - BOTTOM - 12)
    names_at = f'<text class="axis" x="{WIDTH - RIGHT}" y="{HEIGHT - 6}" text-anchor="end">{escape(names[0])} →</text>'
    body = f'{frame}<path class="joined" d="{_points(xs, ys, across, up)}"/>{"".join(marks)}{names_at}'
    return _svg(title, body, [], across, None)


def _frame(across: Scale, up: Scale, bottom: float = HEIGHT - BOTTOM) -> str:
    grid = "".join(
        f'<path class="grid" d="M{LEFT} {up(y):.1f}H{WIDTH - RIGHT}"/>'
        f'<text class="axis" x="{LEFT - 6}" y="{up(y) + 4:.1f}" text-anchor="end">{up.text(y)}</text>'
        for y in up.ticks
    )
    below = "".join(
        f'<text class="axis" x="{across(x):.1f}" y="{bottom + 16}" text-anchor="middle">{across.text(x)}</text>'
        for x in across.ticks
    )
    return f'{grid}<path class="base" d="M{LEFT} {bottom}H{WIDTH - RIGHT}"/>{below}'


def _band(chart: Chart, across: Scale, up: Scale) -> str:
    if chart.band is None:
        return ""
    at, low, high = chart.band
    outline = _points(at, high, across, up) + _points(at[::-1], low[::-1], across, up).replace("M", "L", 1)
    return f'<path class="band" d="{outline}Z"/>'


def _line(line: Line, across: Scale, up: Scale) -> str:
    parts = []
    whiskers = "".join(
        f"M{across(x):.1f} {up(y - half):.1f}V{up(y + half):.1f}"
        for x, y, half in zip(line.xs, line.ys, line.halves)
        if half is not None
    )
    if whiskers:
        parts.append(f'<path class="whisker c{line.colour}" d="{whiskers}"/>')
    parts.append(f'<path class="line c{line.colour}" d="{_points(line.xs, line.ys, across, up)}"/>')
    if line.halves or line.marked or len(line.xs) == 1:
        dots = "".join(f'<circle cx="{across(x):.1f}" cy="{up(y):.1f}" r="3"/>' for x, y in zip(line.xs, line.ys))
        parts.append(f'<g class="dots c{line.colour}">{dots}</g>')
    return "".join(parts)


def _points(xs: Sequence[float], ys: Sequence[float], across: Scale, up: Scale) -> str:
    return "".join(f"{'L' if i else 'M'}{across(x):.1f} {up(y):.1f}" for i, (x, y) in enumerate(zip(xs, ys)))


def _thin(values: Sequence[float]) -> Sequence[float]:
    return values[:: max(1, math.ceil(len(values) / MOST_POINTS))]


def _svg(title: str, body: str, lines: Sequence[Line], across: Scale, up: Scale | None) -> str:
    data = {
        "x": [across.low, across.high, across.start, across.end],
        "y": None if up is None else [up.low, up.high, up.start, up.end],
        "lines": [
            [line.name, line.colour, [_short(x) for x in line.xs], [_short(y) for y in line.ys],
             [None if half is None else _short(half) for half in line.halves]]
            for line in lines
        ],
    }  # fmt: skip
    values = f' data-chart="{escape(json.dumps(data, separators=(",", ":")), quote=True)}"' if lines else ""
    focus = ' tabindex="0"' if lines else ""
    label = escape(title, quote=True)
    hint = ". Left and right arrow keys read the values" if lines else ""
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}{hint}"{focus}{values}>{body}</svg>'


def _short(value: float) -> float:
    return float(f"{value:.6g}")
