"""OUT/report.html: one page that needs nothing but itself, however long the run.

It holds at most `pictures.MOST_PICTURES` sample grids of `pictures.MOST_BYTES` each and curves of `charts.MOST_POINTS`
points, so that it stays below MOST_PAGE_BYTES.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from advgrpo.config import direction
from advgrpo.config.nearest import Change, nearest_preset
from advgrpo.intervals import Interval
from advgrpo.monitor.held_out import independent
from advgrpo.monitor.monitor import RED_FLAGS, Knobs
from advgrpo.report.band import Band, Outside, band_of
from advgrpo.report.charts import WIDTH, Chart, Line, draw, draw_path, draw_stack
from advgrpo.report.judged import judged_section
from advgrpo.report.pictures import embed, spread
from advgrpo.report.run_files import Point, RunFiles
from advgrpo.reporting.evaluations import gains
from advgrpo.reporting.metric_names import OF_REFERENCES, fixed_rewards
from advgrpo.runtime.atomic import write_atomically

REPORT_FILE = "report.html"
MOST_PAGE_BYTES = 8_000_000
_NOT_SHOWN = ("output_dir", "output", "device", "collective_timeout", "data.cache_dir", "iterations", "seed")
_PHASES = "seconds_"
_PATHS = 3  # plots of one metric against another


def write_report(folder: Path) -> Path:
    """OUT/report.html of the run in `folder`, as far as it has come; UserError as `RunFiles.read`."""
    file = folder / REPORT_FILE
    write_atomically(file, render(RunFiles.read(folder)))
    return file


def render(run: RunFiles) -> str:
    """The page's HTML."""
    band = band_of(run.config)
    sections = [
        ("curves", "Held-out metrics", _held_out(run, band)),
        ("judged", "The independent judge", judged_section(run.folder)),
        ("samples", "Samples", _samples(run)),
        ("flags", "Red flags", _flags(run)),
        ("against", "One metric against another", _paths(run)),
        ("training", "Training", _training(run)),
        ("time", "Where the time goes", _time(run)),
        ("settings", "Settings", _settings(run)),
    ]
    sections = [each for each in sections if each[2]]
    links = "".join(f'<a href="#{name}">{title}</a>' for name, title, _ in sections)
    body = [f'<header>{_head(run)}<nav aria-label="Sections">{links}</nav></header><main>{_tiles(run)}']
    for name, title, content in sections:
        body.append(f'<section id="{name}"><h2>{title}</h2>{content}</section>')
    body.append(f"</main><footer>{_foot(run)}</footer>")
    template = (resources.files("advgrpo.report") / "template.html").read_text(encoding="utf-8")
    title = escape(f"{_name(run)}: report")
    return Template(template).substitute(title=title, body="\n".join(body), width=WIDTH)


def _name(run: RunFiles) -> str:
    return run.folder.resolve().name


def _head(run: RunFiles) -> str:
    preset, changed = nearest_preset(run.config, ignoring=_NOT_SHOWN)
    early = run.summary.get("ended_early")
    status = f"ended early: {early}" if early else "ended" if run.summary else "not ended yet"
    settings = f"{len(changed)} setting{'' if len(changed) == 1 else 's'} changed" if changed else "unchanged"
    return (
        f'<h1>{escape(_name(run))}</h1><p><span class="status">{escape(status)}</span> '
        f"iteration {run.done} of {run.config.iterations} · preset <code>{escape(preset)}</code>, {settings} · "
        f"seed {run.config.seed}</p>"
    )


def _tiles(run: RunFiles) -> str:
    """What a visitor wants to know first: every held-out metric, from the start to now."""
    tiles, gained = [], gains(run.evaluations)
    for name, points in run.held_out().items():
        if not points:
            continue
        first, last = points[0], points[-1]
        change, way = last.value - first.value, direction(name)
        kind = "" if not way or len(points) < 2 else "better" if change * way > 0 else "worse" if change else ""
        half = f" ± {last.half:.3g}" if last.half is not None else ""
        before = f"{_signed(change)} since the start, {first.value:.4g}" if len(points) > 1 else "the start"
        peak = max(points, key=lambda point: point.value * way) if way else last
        at_best = f"; best {peak.value:.4g} at iteration {peak.iteration}" if way and peak is not last else ""
        tiles.append(
            f'<div class="tile"><h3>{escape(_words(name))}</h3><div class="number">{last.value:.4g}'
            f'<span class="soft">{half}</span></div>'
            f'<div class="soft"><span class="{kind}">{before}</span>{at_best}</div>{_gain(gained.get(name))}</div>'
        )
    seconds = [row["seconds"] for row in run.rows if isinstance(row.get("seconds"), (int, float))]
    if seconds:
        speed = run.config.images_per_iteration * len(seconds) / sum(seconds)
        tiles.append(
            f'<div class="tile"><h3>time</h3><div class="number">{_duration(sum(seconds))}</div>'
            f'<div class="soft">of training, {speed:.3g} images/s</div></div>'
        )
    return f'<div class="tiles">{"".join(tiles)}</div>' if tiles else ""


def _gain(gain: Interval | None) -> str:
    """Of the end over the base model, over all images, prompt by prompt: what the terminal says at the end."""
    if gain is None:
        return ""
    return f'<div class="soft">gain over the base {gain.text("+.3g").replace("-", "−")}</div>'


def _held_out(run: RunFiles, band: Band | None) -> str:
    metrics = run.config.evaluation.metrics
    trained_on = set(metrics) - set(independent(metrics, run.config.rewards))
    charts, outside = [], []
    for number, (name, points) in enumerate(run.held_out().items()):
        line = Line(
            _words(name),
            [point.iteration for point in points],
            [point.value for point in points],
            number % 8,
            [point.half for point in points],
            marked=True,
        )
        title = _words(name) + (" (trained on)" if direction(name) and name in trained_on else "")
        chart = Chart(title, [line])
        if band is not None and (shape := band.shape(name)) is not None:
            chart = Chart(title, [line], band=shape, band_name=f"{band.runs} recorded runs of {band.preset}")
            outside += band.outside({name: [(point.iteration, point.value) for point in points]})
        charts.append(_figure(chart, table=_point_table(points)))
    if not charts:
        return ""
    note = "Means over prompts that are not trained on, with 95 % intervals over prompts, of the same noise every time."
    return f'<p class="soft">{note}</p>{_outside(outside)}<div class="charts">{"".join(charts)}</div>'


def _outside(outside: Iterable[Outside]) -> str:
    lines = "".join(f"<p>{escape(str(each))}</p>" for each in outside)
    return f'<div class="card outside" role="note">{lines}</div>' if lines else ""


def _samples(run: RunFiles) -> str:
    frames = []
    for caption, iteration, file in spread(run.grids()):
        if (picture := embed(file)) is not None:
            frames.append((caption, iteration, picture))
    if not frames:
        return ""
    last = len(frames) - 1
    images = "".join(
        f'<img src="{picture.address}" width="{picture.width}" height="{picture.height}" data-name="{escape(caption)}" '
        f'alt="Sample grid, {escape(caption)}: a row per held-out prompt, base, trained and reference images"'
        f"{'' if k == last else ' hidden'}>"
        for k, (caption, _, picture) in enumerate(frames)
    )
    return (
        '<div class="card samples"><div class="player"><label for="slider">Iteration</label>'
        f'<input id="slider" type="range" min="0" max="{last}" step="1" value="{last}">'
        f'<output id="frame" for="slider">{escape(frames[-1][0])}</output>'
        '<button type="button" id="ends">First or last</button>'
        '<button type="button" id="large" aria-pressed="false">Full size</button></div>'
        f'<div id="frames">{images}</div></div>'
    )


def _flags(run: RunFiles) -> str:
    """Every flag that was up, when, and what to do about it."""
    spans: dict[str, list[list[int]]] = {}
    for row in run.rows:
        for name in row.get("flags", []):
            held = spans.setdefault(name, [])
            if held and held[-1][1] == row["iteration"]:
                held[-1][1] = row["iteration"] + 1
            else:
                held.append([row["iteration"], row["iteration"] + 1])
    if not spans:
        return "<p>None was raised.</p>" if run.rows and run.config.monitor.every else ""
    kinds, knobs = {kind.name: kind for kind in RED_FLAGS}, Knobs.of(run.config)
    whole = max(run.done, 1)
    cards = []
    for name, held in sorted(spans.items(), key=lambda each: each[1][0]):
        kind = kinds.get(name)
        meaning = " ".join((kind.__doc__ or "").split("\n\n")[0].split()) if kind else ""
        advice = kind(run.config.monitor, knobs).advice() if kind else ""
        when = ", ".join(f"{a + 1} to {b}" if b > a + 1 else f"{b}" for a, b in held[:12])
        when += f" and {len(held) - 12} times more" if len(held) > 12 else ""
        bars = "".join(
            f'<i style="left:{100 * a / whole:.2f}%;width:{100 * (b - a) / whole:.2f}%"></i>' for a, b in held
        )
        up = held[-1][1] == run.done
        cards.append(
            f'<div class="card flag"><h3>{escape(_words(name))}{" (up)" if up else ""}</h3><p>{escape(meaning)}</p>'
            f'<span class="strip" role="img" aria-label="up in iterations {when}">{bars}</span>'
            f"<p>Iterations {when}.</p><p><strong>What to turn:</strong> {escape(advice)}.</p></div>"
        )
    return f'<div class="charts">{"".join(cards)}</div>'


def _paths(run: RunFiles) -> str:
    """The first metric that nothing is trained on against the others: is one bought with the other?"""
    held = {name: points for name, points in run.held_out().items() if direction(name) and len(points) > 1}
    order = [*independent(held, run.config.rewards), *held]
    order = list(dict.fromkeys(order))
    charts = []
    for other in order[1 : _PATHS + 1]:
        along = {point.iteration: point.value for point in held[order[0]]}
        points = [(p.iteration, along[p.iteration], p.value) for p in held[other] if p.iteration in along]
        if len(points) < 2:
            continue
        names = (_words(order[0]), _words(other))
        signs = direction(order[0]), direction(other)
        front = {
            a[0] for a in points if not any(_dominates([(b[k] - a[k]) * signs[k - 1] for k in (1, 2)]) for b in points)
        }
        svg = draw_path(f"{names[1]} against {names[0]}", names, points, front)
        charts.append(f'<figure class="card"><h3>{escape(names[1])} against {escape(names[0])}</h3>{svg}</figure>')
    note = "Numbers are iterations; filled points are those that no other beats in both (the Pareto front)."
    return f'<p class="soft">{note}</p><div class="charts">{"".join(charts)}</div>' if charts else ""


def _dominates(gains: Sequence[float]) -> bool:
    return min(gains) >= 0 and max(gains) > 0


def _training(run: RunFiles) -> str:
    found = _columns(run.rows)
    mixed = "reward_adversary" in found
    own = "reward_adversary" if mixed else "reward_generated"
    trained = [x for x, updates in zip(*found.get("discriminator_updates", ((), ()))) if updates > 0]
    rewards = [(own, "generated"), ("reward_reference", "references")]
    charts = [_chart(found, "Learned reward" if "reward_reference" in found else "Reward", rewards, ticks=trained)]
    for name in fixed_rewards(found):
        label = _words(name.removeprefix("reward_"))
        charts.append(_chart(found, f"Reward: {label}", [(name, "generated"), (name + OF_REFERENCES, "references")]))
    accuracy = [("discriminator_paired_accuracy", "pairs of a prompt"), ("discriminator_accuracy", "own threshold")]
    named = (
        ("Adversary: told apart", accuracy),
        ("Adversary's loss", [("discriminator_loss", "loss")]),
        ("Supervised loss", [("sft_loss", "loss")]),
        ("KL to the base model", [("kl", "KL")]),
        ("Share of clipped ratios", [("clip_fraction", "share")]),
        ("Gradient norm", [("grad_norm", "norm")]),
        ("Diversity within groups", [("monitor_group_diversity", "mean pairwise distance")]),
        ("Likelihoods before the first step", [("log_prob_mismatch_max", "largest mismatch, must be 0")]),
    )
    charts += [_chart(found, title, lines, floor=0.0) for title, lines in named]
    drawn = "".join(_figure(chart) for chart in charts if chart is not None)
    return f'<div class="charts">{drawn}</div>' if drawn else ""


def _chart(
    found: Mapping[str, tuple[list[int], list[float]]],
    title: str,
    lines: Sequence[tuple[str, str]],
    *,
    ticks: Sequence[int] = (),
    floor: float | None = None,
) -> Chart | None:
    drawn = [Line(label, *found[name], number) for number, (name, label) in enumerate(lines) if name in found]
    if not drawn:
        return None
    return Chart(title, drawn, ticks=ticks, ticks_name="adversary trained" if ticks else "", floor=floor)


def _time(run: RunFiles) -> str:
    """Seconds of an iteration by phase, and what is in none."""
    rows = [row for row in run.rows if isinstance(row.get("seconds"), (int, float))]
    names = sorted({name for row in rows for name in row if name.startswith(_PHASES)})
    if len(rows) < 2 or not names:
        return ""
    total = {name: sum(row.get(name) or 0.0 for row in rows) for name in names}
    names.sort(key=lambda name: -total[name])
    step = math.ceil(len(rows) / 60)  # bars of means: single iterations alternate
    parts = [rows[k : k + step] for k in range(0, len(rows), step)]
    xs = [sum(row["iteration"] for row in part) / len(part) for part in parts]
    layers = [(_words(name.removeprefix(_PHASES)), [_mean(part, name) for part in parts]) for name in names]
    whole = [_mean(part, "seconds") for part in parts]
    rest = [max(0.0, all_ - sum(values[k] for _, values in layers)) for k, all_ in enumerate(whole)]
    layers.append(("rest", rest))
    title = "Seconds per iteration" + (f", means of {step}" if step > 1 else "")
    seconds = sum(row["seconds"] for row in rows)
    shares = [(name, sum(values) / (sum(whole) or 1)) for name, values in layers]
    legend = _legend([(f"{name} {share:.0%}", number % 8) for number, (name, share) in enumerate(shares)])
    return (
        f'<div class="charts"><figure class="card"><h3>{title}</h3>{draw_stack(title, xs, layers)}'
        f'<div class="read soft">{_duration(seconds)} in {len(rows)} iterations; evaluations are not in it</div>'
        f"{legend}</figure></div>"
    )


def _mean(rows: Sequence[Mapping[str, Any]], name: str) -> float:
    return sum(row.get(name) or 0.0 for row in rows) / len(rows)


def _settings(run: RunFiles) -> str:
    preset, changed = nearest_preset(run.config, ignoring=_NOT_SHOWN)
    if not changed:
        return f"<p>Every setting is that of the preset <code>{escape(preset)}</code>.</p>"
    rows = "".join(
        f'<tr><td class="code">{escape(each.name)}</td><td class="code" data-name="preset">{_value(each.there)}</td>'
        f'<td class="code" data-name="this run">{_value(each.here)}</td></tr>'
        for each in changed
    )
    return (
        f'<div class="card"><table class="settings"><caption>Where this run differs from <code>{escape(preset)}</code>'
        f", the nearest preset; everything is in config.yaml.</caption><thead><tr><th scope=col>setting</th>"
        f"<th scope=col>{escape(preset)}</th><th scope=col>this run</th></tr></thead>"
        f"<tbody>{rows}</tbody></table></div>"
    )


def _foot(run: RunFiles) -> str:
    versions = run.summary.get("versions") or {}
    machine = run.summary.get("machine") or {}
    said = [", ".join(f"{name} {value}" for name, value in versions.items())]
    said.append(", ".join(str(value) for value in (machine.get("gpu"), machine.get("platform")) if value))
    said.append(f"finished {run.summary['finished']}" if "finished" in run.summary else "")
    shown = " · ".join(escape(each) for each in said if each)
    return f"{shown}<p>Written by advgrpo. This page asks for nothing outside itself.</p>"


def _figure(chart: Chart, *, table: str = "") -> str:
    legend = [(line.name, line.colour) for line in chart.lines] if len(chart.lines) > 1 else []
    extra = f'<span><i class="of-band"></i>{escape(chart.band_name)}</span>' if chart.band_name else ""
    extra += f"<span>| {escape(chart.ticks_name)}</span>" if chart.ticks_name else ""
    return (
        f'<figure class="card"><h3>{escape(chart.title)}</h3>{draw(chart)}<div class="read soft" aria-live="polite">'
        f"{_now(chart)}</div>{_legend(legend, extra)}{table}</figure>"
    )


def _now(chart: Chart) -> str:
    """What stands below a chart while nobody points at it."""
    last = [(line.name, line.ys[-1]) for line in chart.lines if len(line.ys)]
    if len(last) == 1:
        return f"now {last[0][1]:.4g}"
    return "now: " + escape(", ".join(f"{name} {value:.4g}" for name, value in last))


def _legend(names: Sequence[tuple[str, int]], extra: str = "") -> str:
    shown = "".join(f'<span><i class="c{colour}"></i>{escape(name)}</span>' for name, colour in names)
    return f'<div class="legend">{shown}{extra}</div>' if shown or extra else ""


def _point_table(points: Sequence[Point]) -> str:
    rows = "".join(
        f"<tr><td>{p.iteration}</td><td>{p.value:.5g}</td><td>{'' if p.half is None else f'± {p.half:.2g}'}</td></tr>"
        for p in points
    )
    head = "<tr><th scope=col>iteration</th><th scope=col>mean</th><th scope=col>95 %</th></tr>"
    return (
        '<details><summary>Values</summary><div class="scroll"><table>'
        f"<thead>{head}</thead><tbody>{rows}</tbody></table></div></details>"
    )


def _columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, tuple[list[int], list[float]]]:
    """metric -> (iterations, values), of finite numbers."""
    found: dict[str, tuple[list[int], list[float]]] = {}
    for row in rows:
        for name, value in row.items():
            if isinstance(value, (int, float)) and math.isfinite(value):
                iterations, values = found.setdefault(name, ([], []))
                iterations.append(row["iteration"] + 1)
                values.append(value)
    return found


def _value(value: Any) -> str:
    """Of a path the name alone: a report is sent around."""
    if isinstance(value, str):
        shown = Path(value).name if Path(value).is_absolute() else value
        return escape(shown) if shown else '<span class="soft">empty</span>'
    return escape(json.dumps(value, ensure_ascii=False))


def _words(name: str) -> str:
    return name.replace("_", " ")


def _signed(value: float) -> str:
    return f"{value:+.3g}".replace("-", "−")


def _duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    minutes, seconds = divmod(rest, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"


__all__ = ["MOST_PAGE_BYTES", "REPORT_FILE", "Change", "render", "write_report"]
