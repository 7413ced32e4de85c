"""The pictures a run leaves: curves of its metrics and grids of its samples. No display and no global state."""

import math
import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .metric_names import OF_REFERENCES, fixed_rewards

_BLUE, _ORANGE, _GREEN, _GREY = "#1f6fb4", "#d95f0e", "#2a9d5c", "#8a8a8a"


def draw_curves(metrics: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Draw the records of `metrics.jsonl` as a PNG with one titled panel per quantity.

    Panels: generated against reference reward (with the iterations that trained the adversary marked), every fixed
    reward beside what the references get from it, every held-out metric (keys starting with "eval_"), adversary loss
    and accuracy, gradient norm, and the off-policy drift before the first step. Quantities without a finite value have
    no panel.

    Raises:
        ValueError: nothing to draw.
    """
    figure = _curves_figure(metrics)
    temporary = Path(path).with_suffix(".tmp.png")
    figure.savefig(temporary)
    os.replace(temporary, path)


def _curves_figure(metrics: Sequence[Mapping[str, Any]]) -> Figure:
    curves = _curves(metrics)
    panels = [(draw, keys) for draw, keys in _panels(curves) if any(key in curves for key in keys)]
    if not panels:
        raise ValueError("the metrics hold nothing to draw: no finite reward, adversary or eval_ value")
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(6.4 * columns, 3.4 * rows), layout="constrained", dpi=110)
    for i, (draw, keys) in enumerate(panels):
        axes = figure.add_subplot(rows, columns, i + 1)
        draw(axes, {key: curves[key] for key in keys if key in curves})
        axes.set_xlabel("iteration")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


_Curves = dict[str, tuple[list[int], list[float]]]


def _curves(metrics: Sequence[Mapping[str, Any]]) -> _Curves:
    """metric -> (iterations, values), finite values only."""
    curves: _Curves = {}
    for record in metrics:
        for key, value in record.items():
            if isinstance(value, (int, float)) and math.isfinite(value):
                iterations, values = curves.setdefault(key, ([], []))
                iterations.append(record["iteration"])
                values.append(value)
    return curves


def _panels(curves: _Curves) -> list[tuple[Any, list[str]]]:
    mixed = "reward_adversary" in curves  # then reward_generated is a composition, which r_ref has no part in
    own = ["reward_adversary"] if mixed else ["reward_generated", "reward_std"]
    return [
        (_draw_rewards, [*own, "reward_reference", "adversary_updates"]),
        *((_draw_fixed_reward, [key, key + OF_REFERENCES]) for key in fixed_rewards(curves)),
        *((_draw_held_out, [key]) for key in sorted(curves) if key.startswith("eval_")),
        (_draw_adversary_loss, ["adversary_loss"]),
        (_draw_adversary_accuracy, ["adversary_accuracy"]),
        (_draw_grad_norm, ["grad_norm"]),
        (_draw_drift, ["log_prob_drift_max", "pre_update_clip_fraction"]),
    ]


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
    trained = [i for i, updates in zip(*curves.get("adversary_updates", ([], []))) if updates > 0]
    if trained:
        bottom = {"transform": axes.get_xaxis_transform(), "clip_on": False}  # y in shares of the axes' height
        axes.plot(trained, [0.02] * len(trained), "|", color=_GREY, label="adversary trained", **bottom)
    learned = "reward_reference" in curves
    title = "Adversarial reward: generated against references" if learned else "Reward of the generated pictures"
    axes.set(title=title, ylabel="mean reward")
    axes.legend(fontsize="small", frameon=False)


def _draw_fixed_reward(axes: Axes, curves: _Curves) -> None:
    """Generated pictures that outscore the references of their prompts are not better: the reward is being hacked."""
    (key, _), *_ = curves.items()
    for (_, (iterations, values)), color, label in zip(curves.items(), (_BLUE, _ORANGE), ("generated", "references")):
        axes.plot(iterations, values, color=color, label=label, **_style(iterations))
    axes.set(title=f"Fixed reward: {key.removeprefix('reward_').replace('_', ' ')}", ylabel="mean reward")
    axes.legend(fontsize="small", frameon=False)


def _draw_held_out(axes: Axes, curves: _Curves) -> None:
    (key, (iterations, values)), *_ = curves.items()
    name = key.removeprefix("eval_").replace("_", " ")
    axes.plot(iterations, values, color=_GREEN, **_style(iterations))
    axes.set(title=f"Held-out prompts: {name}", ylabel=name)


def _draw_adversary_loss(axes: Axes, curves: _Curves) -> None:
    iterations, values = curves["adversary_loss"]
    axes.plot(iterations, values, color=_ORANGE, **_style(iterations))
    axes.set(title="Adversary loss", ylabel="loss")


def _draw_adversary_accuracy(axes: Axes, curves: _Curves) -> None:
    iterations, values = curves["adversary_accuracy"]
    axes.plot(iterations, values, color=_ORANGE, **_style(iterations))
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
    labels = {"log_prob_drift_max": "largest |log-prob drift|", "pre_update_clip_fraction": "clip fraction"}
    for (key, (iterations, values)), color in zip(curves.items(), (_BLUE, _ORANGE)):
        axes.plot(iterations, values, color=color, label=labels[key], **_style(iterations))
    axes.set(title="Before the first step (must be exactly 0)", ylabel="off-policy error")
    if not any(value for _, values in curves.values() for value in values):
        axes.set(ylim=(-1, 1), yticks=[0])  # autoscaling would show ±0.04 around a line at zero
    axes.legend(fontsize="small", frameon=False)


def _style(iterations: list[int]) -> dict[str, Any]:
    """Few points are marked, so that a single evaluation is visible at all."""
    return {"linewidth": 1.6, "marker": "o" if len(iterations) <= 25 else None, "markersize": 3.5}


_MARGIN, _GAP, _BLOCK_GAP = 16, 3, 20  # pixels: around the grid, between pictures, between column blocks
_MIN_WIDTH = 360  # captions over a single small picture stay readable


def draw_grid(
    rows: Sequence[tuple[str, Sequence[tuple[str, Tensor]]]],
    path: str | Path,
    *,
    min_size: int = 64,
    max_size: int = 256,
) -> None:
    """Draw pictures as a PNG grid: one row per caption, in blocks such as "base" | "final" | "references".

    Args:
        rows: (caption, [(block title, float images [n, 3, H, W] in [0, 1]), ...]) with the same titles in every row; n
            and the picture sizes may differ. Captions are wrapped to the grid's width.
        path: the PNG to write.
        min_size: smaller pictures are enlarged by a whole factor, nearest neighbour, until their shorter side has this.
        max_size: larger pictures are reduced to this longer side.

    Raises:
        ValueError: no rows or pictures, differing titles, or a picture that is no finite [n, 3, H, W] float tensor.
    """
    titles = _check_rows(rows)
    blocks = [images for _, row in rows for _, images in row]
    tile = _tile_size(blocks, min_size, max_size)
    counts = [max(len(row[k][1]) for _, row in rows) for k in range(len(titles))]
    caption_font, title_font = _font(14), _font(15, bold=True)
    widths = [max(n * (tile[1] + _GAP) - _GAP, math.ceil(title_font.getlength(t))) for n, t in zip(counts, titles)]
    lefts = [_MARGIN + sum(widths[:k]) + k * _BLOCK_GAP for k in range(len(titles))]
    width = max(_MIN_WIDTH, lefts[-1] + widths[-1] + _MARGIN)
    captions = [_wrap(caption, caption_font, width - 2 * _MARGIN) for caption, _ in rows]
    line = sum(caption_font.getmetrics())
    height = 2 * _MARGIN + 24 + sum(len(lines) * line + tile[0] + 18 for lines in captions)

    canvas = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(canvas)
    for left, title in zip(lefts, titles):
        draw.text((left, _MARGIN), title, fill="#111111", font=title_font)
    top = _MARGIN + 24
    for lines, (_, row) in zip(captions, rows):
        top += 6
        for text in lines:
            draw.text((_MARGIN, top), text, fill="#333333", font=caption_font)
            top += line
        top += 4
        for left, (_, images) in zip(lefts, row):
            for i, picture in enumerate(_tiles(images, tile)):
                canvas.paste(picture, (left + i * (tile[1] + _GAP), top))
        top += tile[0] + 8
    temporary = Path(path).with_suffix(".tmp.png")
    canvas.save(temporary)
    os.replace(temporary, path)


def _check_rows(rows: Sequence[tuple[str, Sequence[tuple[str, Tensor]]]]) -> list[str]:
    if not rows or not rows[0][1]:
        raise ValueError("rows is empty: at least one caption with one block of pictures is needed")
    titles = [title for title, _ in rows[0][1]]
    for caption, row in rows:
        if [title for title, _ in row] != titles:
            raise ValueError(f"row {caption!r} has blocks {[title for title, _ in row]}, the first row has {titles}")
        for title, images in row:
            if images.dim() != 4 or images.shape[1] != 3 or not images.is_floating_point() or not images.numel():
                shape = f"{images.dtype} {list(images.shape)}"
                raise ValueError(f"row {caption!r}, block {title!r}: expected float [n, 3, H, W], got {shape}")
            if not torch.isfinite(images).all():
                raise ValueError(f"row {caption!r}, block {title!r}: a picture is not finite")
    return titles


def _tile_size(blocks: list[Tensor], min_size: int, max_size: int) -> tuple[int, int]:
    """(height, width) of every tile: that of the largest picture, enlarged by a whole factor or reduced."""
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
    return [Image.fromarray(picture).resize((tile[1], tile[0]), how) for picture in pixels]


def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """matplotlib ships DejaVu, which covers far more of Unicode than Pillow's default font."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Break `text` into lines of at most `width` pixels."""
    characters = len(text)
    while text.strip() and characters > 1:
        lines = textwrap.wrap(text, characters)
        longest = max(font.getlength(line) for line in lines)
        if longest <= width:
            return lines
        characters = min(characters - 1, max(1, int(max(map(len, lines)) * width / longest)))
    return textwrap.wrap(text, 1)
