"""`bench.quality`: what the released contender is, runs that end in time and go on, and when a level is reached.

Planted bugs that turned this file red: a schedule's setting left out; time before a resume left out; a run that ends
between evaluations; the first crossing of a noisy curve; a run that was cut off taken for one that got there; scores
for gains; a target without a gain; any run taken for ours; what a crash left behind a checkpoint counted; seconds by
place in a log that lacks an iteration.
"""

import io
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from advgrpo import config as configuration
from advgrpo.errors import UserError
from advgrpo.reporting.evaluations import Evaluated
from advgrpo.reporting.tracking import load_metrics, metrics_line
from bench import quality, quality_report
from bench.quality import OURS, OVER, RELEASED, Plan

ROOT = Path(__file__).parents[2]
QUIET = Console(quiet=True)
STEP = {"ratio": 1.5, "low": 1.25, "high": 1.75}
# What the released contender has of the world instead of the released run's.
OF_THE_WORLD = {
    "rollout": {"prompts_per_iteration", "group_size", "micro_batch", "guidance_scale"},
    "adversary": {"backbone", "image_size", "dtype", "batch_size", "cached_patches", "warmup_updates"},
}


def plan(tmp_path, **changes) -> Plan:
    world = configuration.read_preset(quality.WORLD)
    return replace(Plan(world, tmp_path, {OURS: [1, 2], RELEASED: [1]}, minutes=1.0), **changes)


def test_the_released_contender_is_the_released_run_in_our_world(tmp_path):
    ours, theirs = (plan(tmp_path).config(name, 1) for name in (OURS, RELEASED))
    released = configuration.build(configuration.read_preset(quality.RELEASED_PRESET), "released")
    for section in ("rollout", "advantage", "update", "adversary"):
        one, other = (getattr(each, section).model_dump() for each in (theirs, released))
        assert {name for name in one if one[name] != other[name]} == OF_THE_WORLD.get(section, set())
    assert (theirs.iterations, theirs.global_steps, theirs.fast) == (910, 1000, False)
    assert theirs.adversary.batch_size == theirs.images_per_iteration == ours.images_per_iteration
    assert ours == configuration.build(
        configuration.merge(configuration.read_preset("tiny"), {**_changed(ours)}), "the default"
    )


def _changed(ours) -> dict:
    """What of the default run's settings ours may have otherwise: how it is looked at, and where it is kept."""
    evaluation = {name: getattr(ours.evaluation, name) for name in ("every", "images_per_prompt", "metrics")}
    evaluation["during_images_per_prompt"] = ours.evaluation.during_images_per_prompt
    output = {"tensorboard": False}
    return {
        "evaluation": evaluation,
        "output": output,
        **{n: getattr(ours, n) for n in ("seed", "device", "output_dir")},
    }


def test_the_time_is_over_after_an_evaluation_and_an_iteration_done_again_counts_once(tmp_path):
    made = plan(tmp_path)
    console = Console(file=io.StringIO())
    watch = quality.Watch("a run", made.config(OURS, 1), made.metric, 5.0, {4: 4.0}, console)  # evaluated every six
    assert watch.on_iteration({"iteration": 3, "cpu_seconds": 2.0, "seconds": 9.0}, []) is None
    assert watch.on_iteration({"iteration": 4, "cpu_seconds": 3.5, "seconds": 9.0}, []) is None
    assert watch.spent == 5.5
    watch.on_evaluation("during", {"eval_retrieval": 0.25}, 6)
    assert watch.on_iteration({"iteration": 5, "cpu_seconds": 0.5, "seconds": 9.0, "eval_retrieval": 0.25}, []) == OVER
    assert console.file.getvalue() == "a run: 6/60, 6 s, retrieval 0.250\n"


def test_iterations_that_a_crash_left_behind_a_checkpoint_are_no_seconds_of_the_run(tmp_path, monkeypatch):
    """Ten of two seconds are logged and six are kept: 12 of its 15 seconds are over, and it goes on."""
    made = plan(tmp_path, minutes=0.25)
    folder = made.folder(RELEASED, 1)
    (folder / "checkpoints" / "iteration-000006").mkdir(parents=True)
    write_run(folder, made.config(RELEASED, 1).model_dump(mode="json"))
    seen = []
    monkeypatch.setattr("advgrpo.train", lambda *_, callbacks, **__: seen.extend(callbacks) or Stopped)
    assert not quality.make(made, RELEASED, 1, QUIET)
    (watch,) = seen
    assert watch.spent == 12.0
    watch.taken = dict.fromkeys(range(10), 2.0)  # where that checkpoint was damaged, and four are kept
    watch.on_iteration({"iteration": 4, "cpu_seconds": 3.0, "seconds": 9.0}, [])
    assert watch.spent == 4 * 2.0 + 3.0


class Stopped:
    stopped = "by a signal"


@pytest.mark.weekly
def test_a_run_ends_after_an_evaluation_goes_on_and_can_be_ours_elsewhere(unit_config, tmp_path, monkeypatch):
    monkeypatch.setattr(quality, "EVALUATIONS", {OURS: 2, RELEASED: 2})
    world = {**unit_config.model_dump(mode="json"), "iterations": 4}
    short = plan(tmp_path, world=world, minutes=1e-9, metric="dino_similarity")
    assert quality.make(short, RELEASED, 1, QUIET)
    folder = short.folder(RELEASED, 1)
    assert len(load_metrics(folder / "metrics.jsonl")) == 2  # its time was over after one, the evaluation is after two
    assert OVER in (folder / "log.txt").read_text()
    assert quality.make(short, RELEASED, 1, QUIET)
    assert len(load_metrics(folder / "metrics.jsonl")) == 2  # there already
    spent = sum(row["cpu_seconds"] for row in load_metrics(folder / "metrics.jsonl"))
    assert quality.make(replace(short, minutes=(spent + 1e-3) / 60), RELEASED, 1, QUIET)
    rows = load_metrics(folder / "metrics.jsonl")
    assert len(rows) == 4  # what it had before counts
    found = quality_report.read(short, RELEASED)
    assert found.iterations.tolist() == [0, 2, 4]
    assert found.seconds[-1] == pytest.approx(sum(row["cpu_seconds"] for row in rows))
    assert found.gains.shape == (1, 3, 3)
    assert not found.gains[:, 0].any()
    with pytest.raises(UserError, match=r"seed-1 holds another run \(advantage\); remove it, or name another folder"):
        quality.make(replace(short, world={**world, "advantage": {"clip": 4.0}}), RELEASED, 1, QUIET)
    with pytest.raises(UserError, match=r"holds another run \(.*adversary.*\)"):
        quality_report.read(replace(short, there=(folder,)), OURS)
    with pytest.raises(UserError, match=r"ours/seed-1 has no evaluations by dino_similarity; call without --report"):
        quality_report.read(short, OURS)


def test_runs_that_are_there_stand_for_ours_however_they_were_evaluated(tmp_path):
    settings = {"seed": 5, "output_dir": str(tmp_path), "evaluation": {"every": 10, "images_per_prompt": 1}}
    default = configuration.merge(configuration.read_preset("tiny"), settings)
    write_run(tmp_path, default)
    found = quality_report.read(plan(tmp_path / "work", there=(tmp_path,)), OURS)
    assert found.iterations.tolist() == [0, 10]
    assert found.seconds.tolist() == [0.0, 20.0]
    assert found.gains[0, 1].tolist() == pytest.approx([0.25, 0.0])
    rows = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_text("".join(rows[:3] + rows[4:]))
    with pytest.raises(UserError, match=r"metrics.jsonl lacks iteration 3: what it took is not known"):
        quality_report.read(plan(tmp_path / "work", there=(tmp_path,)), OURS)
    for section, change in (("update", {"learning_rate": 1e-3}), ("evaluation", {"guidance_scale": 3.0})):
        write_run(tmp_path, configuration.merge(default, {section: change}))
        with pytest.raises(UserError, match=rf"holds another run \({section}\)"):
            quality_report.read(plan(tmp_path / "work", there=(tmp_path,)), OURS)


def write_run(folder, settings) -> None:
    """The files of a run of ten iterations of two CPU seconds, evaluated on two prompts."""
    (folder / "config.yaml").write_text(configuration.dump(configuration.build(settings, "a run")))
    scores = {0: [0.25, 0.5], 10: [0.5, 0.5]}
    stages = [("base", 0), ("final", 10)]
    lines = [Evaluated(stage, done, 1, {}, {"retrieval": scores[done]}, {}).line() for stage, done in stages]
    (folder / "evaluations.jsonl").write_text("".join(lines))
    rows = [{"iteration": done, "cpu_seconds": 2.0, "seconds": 9.0} for done in range(10)]
    (folder / "metrics.jsonl").write_text("".join(map(metrics_line, rows)))


@pytest.mark.parametrize(
    ("gains", "level", "done"),
    [
        ([0.0, 0.1, 0.2, 0.3], 0.15, 15.0),
        ([0.0, 0.3, 0.0, 0.3], 0.2, 20 + 10 * (0.2 - 0.15) / (0.3 - 0.15)),  # one lucky evaluation is not there yet
        ([0.0, 0.1, 0.2, 0.3], 0.31, math.inf),
        ([0.0, 0.1, 0.2, 0.3], 0.0, 0.0),
    ],
)
def test_a_level_is_reached_by_the_rising_curve_nearest_to_the_gains(gains, level, done):
    assert quality_report.reached(np.arange(0, 40, 10), np.array(gains), level) == pytest.approx(done)


def curve(gain, *, seeds: int, seconds: float, pictures: int = 64) -> quality_report.Curve:
    """Of 40 prompts; `gain` of the iterations, at 0, 10, ... 60."""
    iterations = np.arange(0, 70, 10)
    spread = 0.1 * torch.randn(seeds, 1, 40, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    mean = torch.tensor([gain(each) for each in iterations], dtype=torch.float64)[None, :, None]
    return quality_report.Curve(iterations, mean * (1 + spread - spread.mean()), seconds * iterations, pictures)


def test_contenders_are_compared_at_a_share_of_what_ours_gains(tmp_path):
    curves = {
        OURS: curve(lambda done: 0.2 * done / 60, seeds=2, seconds=2.0),
        RELEASED: curve(lambda done: 0.2 * done / 80, seeds=1, seconds=4.0),
    }
    found = quality_report.compare(plan(tmp_path), curves, 0.5, STEP)
    assert found["target"]["value"] == pytest.approx(0.1)
    ours, theirs = (found["contenders"][name]["reached"] for name in (OURS, RELEASED))
    assert (ours["pictures"]["value"], ours["seconds"]["value"]) == pytest.approx((30 * 64, 60.0))
    assert (theirs["pictures"]["value"], theirs["seconds"]["value"]) == pytest.approx((40 * 64, 160.0))
    assert ours["seconds"]["low"] == pytest.approx(60.0)  # its own share: a resample moves target and curve together
    over = found["released_over_ours"]
    assert not over["bound"]
    assert (over["pictures"]["value"], over["seconds"]["value"]) == pytest.approx((4 / 3, 8 / 3))
    assert over["seconds"]["low"] < 8 / 3 < over["seconds"]["high"]


def test_what_was_not_reached_is_a_lower_bound(tmp_path):
    curves = {
        OURS: curve(lambda done: 0.2 * done / 60, seeds=2, seconds=2.0),
        RELEASED: curve(lambda done: 0.02 * done / 60, seeds=1, seconds=4.0),
    }
    report = {"environment": {"device": "cpu"}, **quality_report.compare(plan(tmp_path), curves, 0.5, STEP)}
    assert report["contenders"][RELEASED]["reached"]["seconds"] == {"value": None, "low": None, "high": None}
    over = report["released_over_ours"]
    assert over["bound"]
    assert over["pictures"]["high"] is None
    assert (over["pictures"]["value"], over["seconds"]["value"]) == pytest.approx((2.0, 4.0))
    json.dumps(report, allow_nan=False)
    text = "\n".join(quality_report.lines(report))
    assert (
        "| released schedule | 1 | not reached | not reached | at least 2.0 [2.0, –], at least 4.0 [4.0, –] |" in text
    )
    assert "| B1, by `bench.step` | – | as ours | 90 | 1, 1.50x [1.25, 1.75] |" in text
    quality_report.draw(report, tmp_path / "quality.png")
    assert (tmp_path / "quality.png").stat().st_size > 10_000


def test_without_a_gain_there_is_no_target(tmp_path):
    flat = curve(lambda done: -0.01, seeds=1, seconds=1.0)
    with pytest.raises(UserError, match=r"ours gained -0.010 of retrieval: there is no gain to reach"):
        quality_report.compare(plan(tmp_path), {OURS: flat, RELEASED: flat}, 0.5, STEP)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--share", "1.5"], "--share 1.5 --minutes 25: want a share in (0, 1] and some minutes"),
        (["--seeds", "1", "1"], "--seeds 1 1: want different numbers of at least 0"),
        (["--ours", "no/run"], "no/run/config.yaml"),
    ],
)
def test_bad_flags_are_told_before_any_run(flags, message, capsys):
    assert quality.main(flags) == 2
    assert message in capsys.readouterr().err


def test_a_step_file_without_b1_is_refused(tmp_path, capsys):
    (tmp_path / "step.json").write_text("{}")
    assert quality.main(["--report", "--step", str(tmp_path / "step.json")]) == 2
    assert "want what bench.step wrote, with iteration_shared over_b1" in capsys.readouterr().err


def test_the_page_and_the_committed_table_say_what_was_measured():
    """Rows of docs/performance.md by numbers, since it has them in other columns."""
    folder = ROOT / "bench" / "results" / "cpu"
    report = json.loads((folder / "quality.json").read_text())
    assert (folder / "quality.md").read_text() == "\n".join(quality_report.lines(report)) + "\n"
    page = (ROOT / "docs" / "performance.md").read_text()
    page = page[page.index("## Time to quality") : page.index("## What a CPU says")].replace("\n", " ")
    ours, theirs = (report["contenders"][name] for name in (OURS, RELEASED))
    over, step = report["released_over_ours"], report["b1_seconds_over_ours"]
    reached, seconds = ours["reached"]["pictures"], ours["reached"]["seconds"]
    for said in (
        f"{reached['value']:,.0f} [{reached['low']:,.0f}, {reached['high']:,.0f}]",
        f"{seconds['value']:.0f} [{seconds['low']:.0f}, {seconds['high']:.0f}]",
        f"{ours['trained']['pictures']:,.0f} pictures, {ours['trained']['seconds']:.0f} CPU seconds",
        f"{theirs['trained']['pictures']:,.0f} pictures, {theirs['trained']['seconds']:,.0f} CPU seconds",
        f"{seconds['value'] * step['ratio']:.0f}, by a step",
        f"{step['ratio']:.2f}x ours [{step['low']:.2f}, {step['high']:.2f}]",
        f"at least {over['pictures']['value']:.1f} times [{over['pictures']['low']:.1f}, –]",
        f"at least {over['seconds']['value']:.1f} times [{over['seconds']['low']:.1f}, –]",
        *("{value:+.3f} [{low:+.3f}, {high:+.3f}]".format(**each["trained"]["gain"]) for each in (ours, theirs)),
    ):
        assert said in page, said
