"""What the runs of `bench.quality` say: when each contender has gained what is asked for, as numbers, table and plot.

A gain is a held-out prompt's score less the base model's, of the same seed and noise. A contender's curve is the mean
over seeds and prompts at each of its evaluations, and the target a share of what ours has gained at its end. A noisy
curve crosses a level too early, so the crossing is that of the rising curve nearest to it (isotonic regression), and
linear between evaluations. Intervals are the 2.5 and 97.5 percentiles over resamples of seeds and prompts, the same
prompts for all, the target drawn anew each time; one seed has no spread of its own, and its interval is over prompts.

Shapes: B resamples, S seeds, P prompts, K evaluations.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from scipy.optimize import isotonic_regression

from advgrpo.errors import UserError
from advgrpo.evaluation.frontier import Resamples
from advgrpo.reporting.evaluations import EVALUATIONS_FILE, load_evaluations
from advgrpo.reporting.tracking import METRICS_FILE

from . import timing
from .budget import Report
from .quality import OURS, PREDICTED, RELEASED, Plan, check_settings, taken

SCHEMA = 1
RESAMPLES = 2000
UNITS = ("iterations", "pictures", "seconds")


@dataclass(frozen=True)
class Curve:
    """What a contender had gained, and spent, at each evaluation.

    Args:
        iterations: [K] done, from 0.
        gains: [S, K, P] float64, in the seeds' order.
        seconds: [K] of training, the mean over seeds.
        pictures: drawn in an iteration.
    """

    iterations: np.ndarray
    gains: torch.Tensor
    seconds: np.ndarray
    pictures: int

    def means(self, prompts: torch.Tensor, seeds: torch.Tensor) -> np.ndarray:
        """[B, K] of how often every prompt [B, P] and seed [B, S] counts."""
        total = torch.einsum("bs,skp,bp->bk", seeds, self.gains, prompts)
        return (total / (seeds.sum(1) * prompts.sum(1))[:, None]).numpy()

    def spent(self, iterations: float) -> dict[str, float]:
        """Iterations, pictures and seconds after so many iterations; infinite after infinitely many."""
        seconds = float(np.interp(iterations, self.iterations, self.seconds)) if math.isfinite(iterations) else math.inf
        return {"iterations": iterations, "pictures": iterations * self.pictures, "seconds": seconds}


def read(plan: Plan, contender: str) -> Curve:
    """The curve that its runs have left, up to the evaluation that all its seeds have.

    Raises:
        UserError: a run that is missing, is another, was never evaluated after its start, or whose log lacks an
            iteration.
    """
    scores, seconds, pictures = [], [], 0
    for run in plan.runs(contender):
        evaluations = load_evaluations(run.folder / EVALUATIONS_FILE)
        found = {each.iteration: each.scores[plan.metric] for each in evaluations if plan.metric in each.scores}
        if len(found) < 2 or 0 not in found:
            raise UserError(f"{run.folder} has no evaluations by {plan.metric}; call without --report to make the run")
        check_settings(run)
        logged = taken(run)
        if missing := set(range(max(found))) - logged.keys():
            raise UserError(f"{run.folder / METRICS_FILE} lacks iteration {min(missing)}: what it took is not known")
        scores.append(found)
        seconds.append({done: sum(logged[number] for number in range(done)) for done in found})
        pictures = run.config.images_per_iteration
    common = sorted(set.intersection(*(set(each) for each in scores)))
    values = torch.tensor([[each[done] for done in common] for each in scores], dtype=torch.float64)
    spent = np.array([[each[done] for done in common] for each in seconds]).mean(0)
    return Curve(np.array(common), values - values[:, :1], spent, pictures)


def reached(iterations: np.ndarray, gains: np.ndarray, level: float) -> float:
    """After how many iterations the rising curve nearest to `gains` [K] is at `level`; infinite if it never is."""
    fitted = isotonic_regression(gains).x
    above = np.flatnonzero(fitted >= level)
    if not len(above):
        return math.inf
    first = above[0]
    if first == 0:
        return float(iterations[0])
    part = (level - fitted[first - 1]) / (fitted[first] - fitted[first - 1])
    return float(iterations[first - 1] + part * (iterations[first] - iterations[first - 1]))


def step_ratio(file: Path) -> dict[str, float]:
    """What an iteration of B1 takes in units of ours, the same algorithm on both sides: "ratio", "low", "high".

    Raises:
        UserError: not a file that `bench.step` has written with B1 and shared noise.
    """
    try:
        found = json.loads(file.read_text())["iteration_shared"]["over_b1"]
        return {name: float(found[name]) for name in ("ratio", "low", "high")}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"--step {file}: want what bench.step wrote, with iteration_shared over_b1 ({error})") from None


def compare(plan: Plan, curves: Mapping[str, Curve], share: float, step: Mapping[str, float]) -> dict:
    """Everything that table and plot show, as JSON; what was not reached is null.

    Raises:
        UserError: ours gained nothing.
    """
    drawn = {name: _drawn(curve) for name, curve in curves.items()}
    level = share * drawn[OURS][:, -1]
    if level[0] <= 0:
        raise UserError(f"ours gained {drawn[OURS][0, -1]:.3f} of {plan.metric}: there is no gain to reach")
    done = {
        name: np.array([reached(curve.iterations, *each) for each in zip(drawn[name], level)])
        for name, curve in curves.items()
    }
    found = {name: _contender(plan, name, curve, drawn[name], done[name]) for name, curve in curves.items()}
    return {
        "metric": plan.metric,
        "share": share,
        "target": _interval(level),
        "contenders": found,
        "b1_seconds_over_ours": dict(step),
        "released_over_ours": {
            "bound": not math.isfinite(done[RELEASED][0]),
            **{unit: _over(unit, curves, done) for unit in ("pictures", "seconds")},
        },
        "predicted_over_ours": PREDICTED,
    }


def _over(unit: str, curves: Mapping[str, Curve], done: Mapping[str, np.ndarray]) -> dict[str, float | None]:
    """The released schedule's in units of ours. Where it did not get there it needs more than it had: a lower bound."""
    had = np.minimum(done[RELEASED], curves[RELEASED].iterations[-1])
    ours = np.array([curves[OURS].spent(each)[unit] for each in done[OURS]])
    theirs = np.array([curves[RELEASED].spent(each)[unit] for each in had])
    ratios = np.divide(theirs, ours, out=np.zeros_like(ours), where=ours > 0)  # 0: ours gained nothing
    low = _interval(ratios)
    return {**low, "high": _interval(np.where(np.isfinite(done[RELEASED]), ratios, math.inf))["high"]}


def _drawn(curve: Curve) -> np.ndarray:
    """[1 + B, K] means, of all seeds and prompts, then of resamples."""
    seeds, _, prompts = curve.gains.shape
    every = torch.ones(1, prompts).double(), torch.ones(1, seeds).double()
    resampled = Resamples.draw(prompts, seeds, resamples=RESAMPLES, seed=0)
    return np.concatenate([curve.means(*every), curve.means(resampled.prompts, resampled.seeds)])


def _contender(plan: Plan, name: str, curve: Curve, drawn: np.ndarray, done: np.ndarray) -> dict:
    spent = [curve.spent(each) for each in done]
    return {
        "seeds": [run.config.seed for run in plan.runs(name)],
        "reached": {unit: _interval([each[unit] for each in spent]) for unit in UNITS},
        "trained": {**curve.spent(float(curve.iterations[-1])), "gain": _interval(drawn[:, -1])},
        "curve": {
            **{unit: [curve.spent(float(done))[unit] for done in curve.iterations] for unit in UNITS},
            "gain": drawn[0].tolist(),
            "gain_by_seed": curve.gains.mean(2).tolist(),
        },
    }


def _interval(values) -> dict[str, float | None]:
    """The first value, and the percentiles of the others, which may be infinite: null."""
    first, others = values[0], np.asarray(values[1:])
    ends = (np.quantile(others, q, method=method) for q, method in ((0.025, "lower"), (0.975, "higher")))
    found = dict(zip(("value", "low", "high"), (first, *ends)))
    return {name: float(each) if math.isfinite(each) else None for name, each in found.items()}


def write(plan: Plan, share: float, step: Mapping[str, float], folder: Path, console: Console) -> None:
    """quality.json, quality.md and quality.png."""
    curves = {name: read(plan, name) for name in (OURS, RELEASED)}
    report = Report(folder / "quality.json", schema=SCHEMA, environment=timing.environment(plan.device))
    report |= compare(plan, curves, share, step)
    report.save()
    table = "\n".join(lines(report)) + "\n"
    (folder / "quality.md").write_text(table)
    draw(report, folder / "quality.png")
    console.print(table, markup=False, soft_wrap=True)


def lines(report: Mapping) -> Iterator[str]:
    """The table and what is beside it, as Markdown."""
    clock = "CPU seconds" if report["environment"]["device"] == "cpu" else "seconds"
    ours, theirs = (report["contenders"][name] for name in (OURS, RELEASED))
    target, trained, step = report["target"], ours["trained"], report["b1_seconds_over_ours"]
    yield f"Target: held-out {report['metric']} {target['value']:.3f} above the base model's, {report['share']:.0%} of"
    yield f"what ours has gained after {trained['pictures']:.0f} pictures, {_text(trained['gain'], '.3f')}.\n"
    yield f"| | seeds | pictures [95 %] | {clock} [95 %] | over ours: pictures, {clock} | trained for | gain then |"
    yield "|---|---|---|---|---|---|---|"
    yield _row("**ours**", ours, "1, 1", clock)
    ratio = f"{step['ratio']:.2f}x [{step['low']:.2f}, {step['high']:.2f}]"
    seconds = ours["reached"]["seconds"]["value"] * step["ratio"]
    yield f"| B1, by `bench.step` | – | as ours | {seconds:.0f} | 1, {ratio} | not trained | – |"
    over = report["released_over_ours"]
    least = "at least " if over["bound"] else ""
    both = (f"{least}{_text(over[unit], '.1f')}" for unit in ("pictures", "seconds"))
    yield _row("released schedule", theirs, ", ".join(both), clock)
    predicted = report["predicted_over_ours"]
    yield f"\nPredicted of the released schedule, before it ran: {predicted['pictures']:.0f}x the pictures of ours and"
    yield f"{predicted['seconds']:.0f}x the {clock}, or more."


def _row(label: str, found: Mapping, over: str, clock: str) -> str:
    trained, reached_at = found["trained"], found["reached"]
    until = (_text(reached_at[unit], ".0f") for unit in ("pictures", "seconds"))
    spent = f"{trained['pictures']:.0f} pictures, {trained['seconds']:.0f} {clock}"
    seeds = ", ".join(map(str, found["seeds"]))
    return f"| {label} | {seeds} | {' | '.join(until)} | {over} | {spent} | {_text(trained['gain'], '+.3f')} |"


def _text(found: Mapping[str, float | None], form: str) -> str:
    value, low, high = (found[name] for name in ("value", "low", "high"))
    if value is None:
        return "not reached" if low is None else f"not reached [{low:{form}}, –]"
    return f"{value:{form}} [{low:{form}}, {'–' if high is None else format(high, form)}]"


def draw(report: Mapping, file: Path) -> None:
    """Gains over pictures and over seconds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), layout="constrained")
    for axes, unit in zip(figure.subplots(1, 2), ("pictures", "seconds")):
        for name, colour in ((OURS, "tab:blue"), (RELEASED, "tab:orange")):
            curve = report["contenders"][name]["curve"]
            axes.plot(curve[unit], curve["gain"], "o-", color=colour, markersize=3, label=name)
            for each in curve["gain_by_seed"]:
                axes.plot(curve[unit], each, color=colour, linewidth=0.7, alpha=0.4)
        if unit == "seconds":
            curve, ratio = report["contenders"][OURS]["curve"], report["b1_seconds_over_ours"]["ratio"]
            axes.plot(
                [ratio * each for each in curve[unit]], curve["gain"], "--", color="tab:green", label="B1, by its step"
            )
        axes.axhline(report["target"]["value"], color="0.4", linewidth=1, linestyle=":", label="target")
        clock = "CPU seconds of training" if report["environment"]["device"] == "cpu" else "seconds of training"
        axes.set(
            xlabel="pictures drawn" if unit == "pictures" else clock, ylabel=f"gain of held-out {report['metric']}"
        )
        axes.grid(alpha=0.25)
        axes.legend(fontsize="small", frameon=False)
    figure.savefig(file, dpi=110)
