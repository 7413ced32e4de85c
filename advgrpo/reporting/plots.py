"""The images a run leaves: curves of its metrics and grids of its samples. No display and no global state."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image, ImageDraw
from torch import Tensor

from advgrpo.reporting.captions import Writer
from advgrpo.reporting.metric_names import CI95, FIRST, HELD_OUT, OF_REFERENCES, fixed_rewards, held_out_metrics
from advgrpo.runtime.atomic import write_atomically

_BLUE, _ORANGE, _GREEN, _GREY = "#1f6fb4", "#d95f0e", "#2a9d5c", "#8a8a8a"

GridRows = Sequence[tuple[str, Sequence[tuple[str, Tensor]]]]
_Values = Mapping[str, Any]


@dataclass(frozen=True)
class HeldOut:
    """The evaluations at the two ends of a run, which `metrics.jsonl` does not hold."""

    base: _Values  # metric_names.py says what the keys are called
    final: _Values  # empty before the run has ended
    during_images: int  # images per prompt of the evaluations in between, and of the "_first" values
    end_images: int  # images per prompt of `base` and `final`


def draw_curves(metrics: Sequence[_Values], path: str | Path, held_out: HeldOut | None = None) -> None:
    """Draw the records of `metrics.jsonl` as a PNG with one titled panel per quantity.

    Panels: generated against reference reward (with the iterations that trained the adversary marked), every fixed
    reward beside what the references get from it, every held-out metric, adversary loss and accuracy, policy loss, KL,
    likelihood ratio, clip fraction, gradient norm, the supervised loss, and the off-policy drift before the first step.
    Quantities without a finite value have no panel. A record's own quantities stand at its iteration, which is the
    number of updates before it; an evaluation stands after the iteration in whose record it is.

    Raises:
        ValueError: nothing to draw.
    """
    figure = _curves_figure(metrics, held_out)
    write_atomically(Path(path), lambda file: figure.savefig(file, format="png"))


def _curves_figure(metrics: Sequence[_Values], held_out: HeldOut | None = None) -> Figure:
    panels = _drawn(metrics, held_out)
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(_PANEL[0] * columns, _PANEL[1] * rows), dpi=110)
    figure.subplots_adjust(**_margins(rows, columns))
    for i, (draw, drawn) in enumerate(panels):
        axes = figure.add_subplot(rows, columns, i + 1)
        draw(axes, drawn)
        axes.set_xlabel("iteration")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _drawn(metrics: Sequence[_Values], held_out: HeldOut | None) -> list[tuple[Any, dict[str, Any]]]:
    """(how a panel is drawn, what is in it by name) in their order."""
    curves = _curves(metrics)
    evaluations = _evaluations(metrics, held_out)
    panels = [(draw, {key: curves[key] for key in keys if key in curves}) for draw, keys in _panels(curves)]
    panels[_HELD_OUT_AT:_HELD_OUT_AT] = [(_draw_held_out, {name: of}) for name, of in evaluations.items()]
    panels = [(draw, drawn) for draw, drawn in panels if drawn]
    if not panels:
        raise ValueError("the metrics hold nothing to draw: no finite reward, adversary or held-out value")
    return panels


def _margins(rows: int, columns: int) -> dict[str, float]:
    """Room for titles, axis labels and tick labels around equal panels, in the shares that matplotlib asks for.

    Its constrained layout measures every text twice, which is most of what a figure costs.
    """
    (width, height), (left, right, bottom, top) = _PANEL, (0.95, 0.15, 0.55, 0.35)  # inches
    inner = width - left - right, height - bottom - top
    return {
        "left": left / (width * columns),
        "right": 1 - right / (width * columns),
        "bottom": bottom / (height * rows),
        "top": 1 - top / (height * rows),
        "wspace": (left + right) / inner[0],
        "hspace": (bottom + top) / inner[1],
    }


_PANEL = (6.4, 3.4)  # inches
_Curves = dict[str, tuple[list[int], list[float]]]
_HELD_OUT_AT = 1  # the held-out panels follow the rewards


def _curves(metrics: Sequence[_Values]) -> _Curves:
    """metric -> (iterations, values), finite values only."""
    curves: _Curves = {}
    for record in metrics:
        for key, value in record.items():
            if isinstance(value, (int, float)) and math.isfinite(value):
                iterations, values = curves.setdefault(key, ([], []))
                iterations.append(record["iteration"])
                values.append(value)
    return curves


@dataclass
class _Evaluations:
    """One metric's evaluations: (iteration after which, mean, half of the 95 % interval or NaN)."""

    line: list[tuple[int, float, float]]  # all of equally many images
    ends: list[tuple[int, float, float]]  # base and final of more; empty where they are no more
    labels: tuple[str, str]


def _evaluations(metrics: Sequence[_Values], held_out: HeldOut | None) -> dict[str, _Evaluations]:
    stages = [(record["iteration"] + 1, record) for record in metrics if held_out_metrics(record)]
    outer = [] if held_out is None else [(0, held_out.base), (len(metrics), held_out.final)]
    names = sorted({name for _, values in [*stages, *outer] for name in held_out_metrics(values)})
    more = held_out is not None and held_out.end_images > held_out.during_images
    found = {}
    for name in names:
        key = HELD_OUT + name
        whole = [_point(at, values, key) for at, values in outer if key in values]
        first = [_point(at, values, key + FIRST) for at, values in outer if key + FIRST in values]
        line = sorted([_point(at, values, key) for at, values in stages if key in values] + (first if more else whole))
        labels = ("", "")
        if held_out is not None:
            labels = _per_prompt(held_out.during_images), _per_prompt(held_out.end_images)
        found[name] = _Evaluations(line, whole if more else [], labels)
    return found


def _point(at: int, values: _Values, key: str) -> tuple[int, float, float]:
    return at, values[key], values.get(key + CI95, math.nan)


def _per_prompt(images: int) -> str:
    return f"{images} image{'s' if images > 1 else ''} per prompt"


def _panels(curves: _Curves) -> list[tuple[Any, list[str]]]:
    mixed = "reward_adversary" in curves  # then reward_generated is a composition, which r_ref has no part in
    own = ["reward_adversary"] if mixed else ["reward_generated", "reward_std"]
    return [
        (_draw_rewards, [*own, "reward_reference", "discriminator_updates"]),
        *((_draw_fixed_reward, [key, key + OF_REFERENCES]) for key in fixed_rewards(curves)),
        (_draw_adversary_loss, ["discriminator_loss"]),
        (_draw_adversary_accuracy, ["discriminator_paired_accuracy", "discriminator_accuracy"]),
        (_line("Supervised loss", "mean squared error of the velocity"), ["sft_loss"]),
        (_line("Negative-aware loss", "loss"), ["nft_loss"]),
        (_line("Advantage-weighted matching loss", "loss"), ["awm_loss"]),
        (_line("Distance from the old policy", "mean squared velocity", floor=0.0), ["old_policy_distance"]),
        (_line("Policy loss", "loss"), ["policy_loss"]),
        (_line("KL to the base model", "KL"), ["kl"]),
        (_line("Likelihood ratio", "mean ratio", level=1.0), ["ratio_mean"]),
        (_line("Clipped ratios", "share", floor=0.0), ["clip_fraction"]),
        (_draw_grad_norm, ["grad_norm"]),
        (_draw_drift, ["log_prob_mismatch_max", "pre_update_clip_fraction"]),
    ]


def _line(title: str, label: str, *, level: float | None = None, floor: float | None = None) -> Any:
    """A panel of one quantity; `level` is where nothing has changed yet, `floor` the smallest value there can be."""

    def draw(axes: Axes, curves: _Curves) -> None:
        ((iterations, values),) = curves.values()
        axes.plot(iterations, values, color=_BLUE, **_style(iterations))
        if level is not None:
            axes.axhline(level, color=_GREY, linewidth=1, linestyle="--")
        axes.set(title=title, ylabel=label)
        if floor is not None:
            axes.set_ylim(floor, max(max(values) * 1.1, floor + 0.01))

    return draw


def _draw_rewards(axes: Axes, curves: _Curves) -> None:
    generated = curves.get("reward_adversary") or curves.get("reward_generated")
    if generated:
        iterations, means = generated
        axes.plot(iterations, means, color=_BLUE, label="generated (r_gen)", **_style(iterations))
        deviations = dict(zip(*curves.get("reward_std", ([], []))))
        if all(i in deviations for i in iterations):
            low, high = ([m + sign * deviations[i] for i, m in zip(iterations, means)] for sign in (-1, 1))
            axes.fill_between(iterations, low, high, color=_BLUE, alpha=0.15, linewidth=0, label="± one std")
    if "reward_reference" in curves:
        iterations, means = curves["reward_reference"]
        axes.plot(iterations, means, color=_ORANGE, label="references (r_ref)", **_style(iterations))
    trained = [i for i, updates in zip(*curves.get("discriminator_updates", ([], []))) if updates > 0]
    if trained:
        bottom = {"transform": axes.get_xaxis_transform(), "clip_on": False}  # y in shares of the axes' height
        axes.plot(trained, [0.02] * len(trained), "|", color=_GREY, label="adversary trained", **bottom)
    learned = "reward_reference" in curves
    title = "Adversarial reward: generated against references" if learned else "Reward of the generated images"
    axes.set(title=title, ylabel="mean reward")
    axes.legend(fontsize="small", frameon=False)


def _draw_fixed_reward(axes: Axes, curves: _Curves) -> None:
    """Generated images that outscore the references of their prompts are not better: the reward is being hacked."""
    (key, _), *_ = curves.items()
    for (_, (iterations, values)), color, label in zip(curves.items(), (_BLUE, _ORANGE), ("generated", "references")):
        axes.plot(iterations, values, color=color, label=label, **_style(iterations))
    axes.set(title=f"Fixed reward: {key.removeprefix('reward_').replace('_', ' ')}", ylabel="mean reward")
    axes.legend(fontsize="small", frameon=False)


def _draw_held_out(axes: Axes, evaluations: Mapping[str, _Evaluations]) -> None:
    """One line only joins evaluations of equally many images; bars are 95 % intervals over prompts."""
    ((key, found),) = evaluations.items()
    name = key.replace("_", " ")
    for points, label, style in (
        (found.line, found.labels[0], {"color": _GREEN, "marker": "o", "markersize": 3.5, "linewidth": 1.6}),
        (found.ends, found.labels[1], {"color": _BLUE, "marker": "D", "markersize": 5, "linewidth": 0, "zorder": 3}),
    ):
        if points:
            at, means, halves = zip(*points)
            label = f"{label}, 95 % interval" if label and all(map(math.isfinite, halves)) else label or None
            axes.errorbar(at, means, yerr=halves, elinewidth=1, capsize=2.5, label=label, **style)
    axes.set(title=f"Held-out prompts: {name}", ylabel=name)
    _widen(axes)
    if any(found.labels):
        axes.legend(fontsize="small", frameon=False)


def _widen(axes: Axes) -> None:
    """A change of less than a hundredth of the value does not fill the axis."""
    low, high = axes.get_ylim()
    least = 0.02 * max(abs(low), abs(high))
    if high - low < least:
        middle = (low + high) / 2
        axes.set_ylim(middle - least / 2, middle + least / 2)


def _draw_adversary_loss(axes: Axes, curves: _Curves) -> None:
    iterations, values = curves["discriminator_loss"]
    axes.plot(iterations, values, color=_ORANGE, **_style(iterations))
    axes.set(title="Adversary loss", ylabel="loss")


def _draw_adversary_accuracy(axes: Axes, curves: _Curves) -> None:
    """Pairs of a prompt, which the red flags judge, and the head's own threshold where it has one."""
    paired, own = (curves.get(key) for key in ("discriminator_paired_accuracy", "discriminator_accuracy"))
    for curve, label, color in ((paired, "pairs of a prompt", _ORANGE), (own, "own threshold", _BLUE)):
        if curve is not None and not (curve is own and own == paired):  # without a threshold both are of pairs
            axes.plot(*curve, color=color, label=label, **_style(curve[0]))
    axes.axhline(0.5, color=_GREY, linewidth=1, linestyle="--", label="chance: fully fooled")
    axes.set(title="Adversary accuracy", ylabel="share told apart", ylim=(-0.03, 1.03))
    axes.legend(fontsize="small", frameon=False)


def _draw_grad_norm(axes: Axes, curves: _Curves) -> None:
    iterations, values = curves["grad_norm"]
    axes.plot(iterations, values, color=_BLUE, **_style(iterations))
    axes.set(title="Policy gradient norm", ylabel="norm")
    if min(values) > 0:
        axes.set_yscale("log")


def _draw_drift(axes: Axes, curves: _Curves) -> None:
    labels = {"log_prob_mismatch_max": "largest |log-prob mismatch|", "pre_update_clip_fraction": "clip fraction"}
    for (key, (iterations, values)), color in zip(curves.items(), (_BLUE, _ORANGE)):
        axes.plot(iterations, values, color=color, label=labels[key], **_style(iterations))
    axes.set(title="Before the first step (must be exactly 0)", ylabel="off-policy error")
    if not any(value for _, values in curves.values() for value in values):
        axes.set(ylim=(-1, 1), yticks=[0])  # autoscaling would show ±0.04 around a line at zero
    axes.legend(fontsize="small", frameon=False)


def _style(iterations: list[int]) -> dict[str, Any]:
    """Few points are marked, so that a single evaluation is visible at all."""
    return {"linewidth": 1.6, "marker": "o" if len(iterations) <= 25 else None, "markersize": 3.5}


_MARGIN, _GAP, _BLOCK_GAP = 16, 3, 20  # pixels: around the grid, between images, between column blocks
_CAPTION_LINES = 3  # of a prompt; the whole of it is in the prompt file
_MIN_WIDTH = 360  # captions over a single small image stay readable


def draw_grid(rows: GridRows, path: str | Path, **how: Any) -> None:
    """Write `grid_image(rows, **how)` to a file, whose suffix says its format."""
    _write(grid_image(rows, **how), Path(path))


def draw_below(picture: Image.Image, rows: GridRows, path: str | Path, **how: Any) -> None:
    """`draw_grid` below a picture that is there."""
    grid = grid_image(rows, **how)
    canvas = Image.new("RGB", (max(picture.width, grid.width), picture.height + grid.height), "white")
    canvas.paste(picture, (0, 0))
    canvas.paste(grid, (0, picture.height))
    _write(canvas, Path(path))


def _write(canvas: Image.Image, path: Path) -> None:
    kind = Image.registered_extensions()[path.suffix.lower()]
    write_atomically(path, lambda file: canvas.save(file, kind))


def grid_image(rows: GridRows, *, header: str = "", min_size: int = 64, max_size: int = 256) -> Image.Image:
    """Images as one grid: a row per caption, in blocks such as "base" | "final" | "references".

    Args:
        rows: (caption, [(block title, float images [n, 3, H, W] in [0, 1]), ...]) with the same titles in every row; n
            and the image sizes may differ. Captions are wrapped to the grid's width and cut after three lines.
        header: what the images are (run, iteration, seed, guidance, scores), written above them.
        min_size: smaller images are enlarged by a whole factor, nearest neighbour, until their shorter side has this.
        max_size: larger images are reduced to this longer side.

    Raises:
        ValueError: no rows or images, differing titles, or an image that is no finite [n, 3, H, W] float tensor.
    """
    titles = _check_rows(rows)
    blocks = [images for _, row in rows for _, images in row]
    tile = _tile_size(blocks, min_size, max_size)
    counts = [max(len(row[k][1]) for _, row in rows) for k in range(len(titles))]
    writer, title_writer = Writer(14), Writer(15, bold=True)
    widths = [max(n * (tile[1] + _GAP) - _GAP, math.ceil(title_writer.width(t))) for n, t in zip(counts, titles)]
    lefts = [_MARGIN + sum(widths[:k]) + k * _BLOCK_GAP for k in range(len(titles))]
    width = max(_MIN_WIDTH, lefts[-1] + widths[-1] + _MARGIN)
    captions = [writer.wrap(caption, width - 2 * _MARGIN, most=_CAPTION_LINES) for caption, _ in rows]
    heading = writer.wrap(header, width - 2 * _MARGIN)
    line = writer.line_height
    above = _MARGIN + len(heading) * line + (6 if heading else 0)
    height = above + 24 + sum(len(lines) * line + tile[0] + 18 for lines in captions) + _MARGIN

    canvas = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(canvas)
    for number, text in enumerate(heading):
        writer.draw(draw, (_MARGIN, _MARGIN + number * line), text, "#666666")
    for left, title in zip(lefts, titles):
        title_writer.draw(draw, (left, above), title, "#111111")
    top = above + 24
    for lines, (_, row) in zip(captions, rows):
        top += 6
        for text in lines:
            writer.draw(draw, (_MARGIN, top), text, "#333333")
            top += line
        top += 4
        for left, (_, images) in zip(lefts, row):
            for i, image in enumerate(_tiles(images, tile)):
                canvas.paste(image, (left + i * (tile[1] + _GAP), top))
        top += tile[0] + 8
    return canvas


def _check_rows(rows: GridRows) -> list[str]:
    if not rows or not rows[0][1]:
        raise ValueError("rows is empty: at least one caption with one block of images is needed")
    titles = [title for title, _ in rows[0][1]]
    for caption, row in rows:
        if [title for title, _ in row] != titles:
            raise ValueError(f"row {caption!r} has blocks {[title for title, _ in row]}, the first row has {titles}")
        for title, images in row:
            if images.dim() != 4 or images.shape[1] != 3 or not images.is_floating_point() or not images.numel():
                shape = f"{images.dtype} {list(images.shape)}"
                raise ValueError(f"row {caption!r}, block {title!r}: expected float [n, 3, H, W], got {shape}")
            if not torch.isfinite(images).all():
                raise ValueError(f"row {caption!r}, block {title!r}: an image is not finite")
    return titles


def _tile_size(blocks: list[Tensor], min_size: int, max_size: int) -> tuple[int, int]:
    """(height, width) of every tile: that of the largest image, enlarged by a whole factor or reduced."""
    height, width = max((tuple(images.shape[-2:]) for images in blocks), key=math.prod)
    if max(height, width) > max_size:
        scale = max_size / max(height, width)
        return max(1, round(height * scale)), max(1, round(width * scale))
    factor = max(1, math.ceil(min_size / min(height, width)))
    return height * factor, width * factor


def _tiles(images: Tensor, tile: tuple[int, int]) -> list[Image.Image]:
    pixels = (images.detach().float().cpu().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    height, width = images.shape[-2:]
    enlarged = tile[0] % height == 0 and tile[1] % width == 0
    how = Image.Resampling.NEAREST if enlarged else Image.Resampling.BICUBIC
    return [Image.fromarray(image).resize((tile[1], tile[0]), how) for image in pixels]


def draw_front(report: _Values, path: str | Path, names: tuple[str, str]) -> None:
    """Draw frontier.json as a PNG: accuracy and diversity over distance, a line per model with its guidance scales.

    Args:
        report: of `advgrpo.frontier.report`.
        names: of the accuracy and of the distance.
    """
    figure = Figure(figsize=(10, 4), layout="constrained", dpi=100)
    for axes, key, title in zip(figure.subplots(1, 2), ("accuracy", "diversity"), (names[0], "diversity in a prompt")):
        for number, rows in enumerate([report["base"], *report["models"].values()]):
            colour, label = (_BLUE, "trained") if number else (_GREY, "base")
            x, y = ([row[which] for row in rows] for which in ("kid", key))
            axes.plot(x, y, "o-", color=colour, label=label if number < 2 else None, alpha=0.8)
            if number < 2:
                for row, at in zip(rows, zip(x, y)):
                    axes.annotate(f"{row['guidance']:g}", at, textcoords="offset points", xytext=(4, 4), fontsize=8)
        axes.set(xlabel=names[1], ylabel=title)
        axes.grid(alpha=0.25)
        axes.legend()
    write_atomically(Path(path), lambda file: figure.savefig(file, format="png"))
