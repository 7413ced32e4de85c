"""The experiments end to end on untrained unit models, and the rules by which their pages judge what was found.

Bugs planted in a copy, each seen red: a note that is not on its page; one that is not in the index; a committed page
with an older note.
"""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console

from advgrpo import tiny
from advgrpo.errors import UserError
from advgrpo.experiments import __main__ as experiments
from advgrpo.experiments import figures as experiment_figures
from advgrpo.experiments import runs as experiment_runs
from advgrpo.experiments.figures import draw_comparison
from advgrpo.experiments.pages import heading, index, page
from advgrpo.experiments.plan import ARMS, EXPERIMENTS, METRICS, Arm, Claim, Job, chains, select, settings, take_shard
from advgrpo.experiments.report import sample_rows
from advgrpo.experiments.results import Change, Results, numbers
from advgrpo.experiments.runs import Plan

ROOT = Path(__file__).parents[2]


@pytest.fixture
def small(unit_config, tmp_path, monkeypatch) -> Path:
    """--config for runs of about a second: unit models, 64 prompts (512 references), 4 report prompts.

    A run's own curves.png, two thirds of the time, is left out: test_plots.py and test_run.py look at it.
    """
    monkeypatch.setattr("advgrpo.training.run.draw_curves", lambda *_: None)
    prompts = tiny.prompts_file().read_text().splitlines()[:64]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    (tmp_path / "report.txt").write_text("\n".join(tiny.report_prompts_file().read_text().splitlines()[:4]))
    plain = unit_config.model_dump(mode="json")
    content = {
        "model": {"path": plain["model"]["path"], "lora": {"rank": 4, "alpha": 8}},
        "data": {
            "prompts": str(tmp_path / "prompts.txt"),
            "held_out_prompts": str(tmp_path / "report.txt"),
            "cache_dir": plain["data"]["cache_dir"],
        },
        "rollout": plain["rollout"],
        "adversary": {"updates_per_iteration": 1, "warmup_iterations": 0, "batch_size": 6, "replay_capacity": 16},
        "evaluation": {"images_per_prompt": 1, "during_images_per_prompt": 1, "num_steps": 2, "grid_prompts": 2},
        "output": {"checkpoint_every": 1},
    }
    file = tmp_path / "small.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


def call(command: str, tmp_path, small: Path, *more: str, names=("all",)) -> int:
    places = ["--output", str(tmp_path / "results"), "--work", str(tmp_path / "work"), "--config", str(small)]
    return experiments.main([command, *names, *places, "--iterations", "2", *more])


def test_every_experiment_runs_and_is_written_up(tmp_path, small, capsys):
    assert call("run", tmp_path, small, "--seeds", "0") == 0
    work, results = tmp_path / "work", tmp_path / "results"
    assert sorted(p.parent.parent.name for p in work.glob("*/seed-0/summary.json")) == sorted(ARMS)
    found = json.loads((results / "results.json").read_text())
    assert list(found) == list(EXPERIMENTS)
    for name, entry in found.items():
        page = (results / f"{name}.md").read_text()
        assert EXPERIMENTS[name].title in page
        assert f"experiments run {name} --seeds 0 --iterations 2" in page
        assert torch.__version__ in page
        assert (results / f"{name}.png").stat().st_size > 5_000
        assert (results / f"{name}-samples.png").stat().st_size > 5_000
        assert entry["missing"] == {}
        assert {claim["verdict"] for claim in entry["claims"]} == {"undecided"}  # one seed has no interval
        assert f"{name}.md" in (results / "README.md").read_text()
    summary = json.loads((work / "dino" / "seed-0" / "summary.json").read_text())
    run = found["dino"]["arms"]["dino"]["runs"]["0"]
    assert {metric: run["final"][metric] for metric in METRICS} == summary["final"]
    gap = abs(run["final"]["saturation"] - run["references"]["saturation"])
    assert run["final"]["saturation_distance"] == pytest.approx(gap)
    styles = Results("style", Plan(work, 2, small), (0,))
    labels = [label for label, _ in sample_rows(styles, EXPERIMENTS["style"])[0][1]]
    arms = [*EXPERIMENTS["style"].arms.values()]
    for with_references in (6, 4, 2):  # after the last of the two arms that share them
        arms.insert(with_references, f"{arms[with_references - 1]}: references")
    assert labels == ["base", *arms]

    capsys.readouterr()
    stamps = {file: file.stat().st_mtime_ns for file in work.rglob("*")}
    assert call("run", tmp_path, small, "--seeds", "0") == 0  # nothing is left to do
    assert {file: file.stat().st_mtime_ns for file in work.rglob("*")} == stamps
    assert capsys.readouterr().out.count("there already") == len(ARMS)


def test_a_stopped_run_goes_on_and_gives_what_an_unstopped_one_gives(tmp_path, small, monkeypatch, capsys):
    saved = experiment_runs.Run.save

    def save_and_ask_to_stop(run):
        saved(run)
        if run.trainer.iteration == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(experiment_runs.Run, "save", save_and_ask_to_stop)
        assert call("run", tmp_path, small, "--seeds", "0", "--iterations", "3", names=["dino"]) == 130
    folder = tmp_path / "work" / "dino" / "seed-0"
    assert "dino, seed 0 was stopped after 1 iterations" in capsys.readouterr().err
    assert not (folder / "summary.json").exists()
    assert call("run", tmp_path, small, "--seeds", "0", "--iterations", "3", names=["dino"]) == 0
    assert "at iteration 1" in (folder / "log.txt").read_text()
    straight = Plan(tmp_path / "straight", 3, small)
    experiment_runs.make(Job("dino", 0), straight)
    assert (
        Plan(tmp_path / "work", 3, small).finished(Job("dino", 0)).summary["final"]
        == (straight.finished(Job("dino", 0)).summary["final"])
    )


def test_a_run_cut_short_before_its_first_checkpoint_or_its_samples_is_made_again(tmp_path, small):
    plan, job = Plan(tmp_path / "work", 1, small), Job("dino", 0)
    folder = plan.folder(job)
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("")
    experiment_runs.make(job, plan)
    final = plan.finished(job).summary["final"]
    (folder / "samples.safetensors").unlink()
    assert plan.finished(job) is None
    experiment_runs.make(job, plan)
    assert plan.finished(job).summary["final"] == final


def test_a_failing_arm_is_reported_and_the_others_go_on(tmp_path, small, monkeypatch, capsys):
    """A wrong path fails with its own words; the arm that starts from it fails for that reason; exit status 1."""
    monkeypatch.setitem(ARMS, "flow-pickscore", Arm("tiny-flow-grpo-pickscore", {"data": {"references": "nowhere"}}))
    assert call("run", tmp_path, small, "--seeds", "0", names=["repair", "dino"]) == 1
    output = capsys.readouterr().out
    assert "flow-pickscore, seed 0: FAILED: reference folder nowhere does not exist" in output
    assert "repair, seed 0: FAILED: it starts from flow-pickscore, seed 0, which failed" in output
    assert json.loads((tmp_path / "results" / "results.json").read_text()).keys() == {"dino"}
    assert not (tmp_path / "results" / "repair.md").exists()
    assert "missing: flow-pickscore, seed 0: reference folder nowhere" in output


def test_a_repair_is_made_again_when_its_start_is(tmp_path, small):
    plan, hacked, repaired = Plan(tmp_path / "work", 1, small), Job("flow-pickscore", 0), Job("repair", 0)
    with pytest.raises(UserError, match="starts from flow-pickscore, seed 0, which is not finished"):
        experiment_runs.make(repaired, plan)
    failure = plan.folder(hacked) / "failure.txt"
    failure.parent.mkdir(parents=True)
    failure.write_text("an earlier attempt's")
    assert experiment_runs.make_all([[hacked, repaired]], plan, Console(quiet=True)) == []
    assert plan.finished(repaired) is not None
    assert not failure.exists()
    file = plan.folder(hacked) / "summary.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"finished": "2100-01-01T00:00:00Z"}))
    assert plan.finished(repaired) is None
    experiment_runs.make(repaired, plan)
    assert plan.finished(repaired) is not None


def test_settings_that_differ_are_not_taken_for_finished(tmp_path, small):
    plan, job = Plan(tmp_path / "work", 1, small), Job("dino", 0)
    experiment_runs.make(job, plan)
    assert Plan(tmp_path / "work", 2, small).finished(job) is None
    other = tmp_path / "other.yaml"
    other.write_text(yaml.safe_dump(yaml.safe_load(small.read_text()) | {"advantage": {"clip": 2.0}}))
    assert Plan(tmp_path / "work", 1, other).finished(job) is None
    with pytest.raises(UserError, match=r"advantage\.clip: 5\.0 -> 2\.0"):
        experiment_runs.make(job, Plan(tmp_path / "work", 1, other))
    assert plan.finished(job) is not None  # and what was there is still there


def test_side_by_side_processes_share_the_runs(tmp_path, small, monkeypatch, capfd):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "kernels")]))
    handler = signal.getsignal(signal.SIGTERM)
    assert call("run", tmp_path, small, "--seeds", "0", "1", "--jobs", "2", names=["dino"]) == 0
    assert signal.getsignal(signal.SIGTERM) is handler
    output = capfd.readouterr().out
    assert output.count("[1/1] dino, seed 0") == output.count("[1/1] dino, seed 1") == 1
    assert json.loads((tmp_path / "results" / "results.json").read_text())["dino"]["seeds"] == [0, 1]


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_shards_cover_every_run_once_and_keep_starts_together(count):
    every = chains(select(["all"]), [0, 1, 2])
    parts = [take_shard(every, f"{number}/{count}") for number in range(count)]
    jobs = [job for part in parts for chain in part for job in chain]
    assert sorted(map(str, jobs)) == sorted(str(Job(arm, seed)) for arm in ARMS for seed in range(3))
    for part in parts:
        order = [job for chain in part for job in chain]
        for job in order:
            assert job.origin is None or order.index(job.origin) < order.index(job)
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1


def test_an_experiment_brings_the_arms_it_starts_from():
    assert chains(["repair"], [4]) == [[Job("flow-pickscore", 4), Job("repair", 4)]]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["run", "hack"], "experiment hack: want all, or some of hacking"),
        (["run", "all", "--shard", "2/2"], "--shard 2/2: want I/N"),
        (["run", "all", "--shard", "half"], "--shard half: want I/N"),
        (["report", "all", "--iterations", "0"], "--iterations 0"),
        (["report", "all", "--config", "absent.yaml"], "config file absent.yaml"),
    ],
)
def test_bad_input_is_named(tmp_path, arguments, complaint, capsys):
    assert experiments.main([*arguments, "--work", str(tmp_path), "--output", str(tmp_path)]) == 2
    assert complaint in capsys.readouterr().err


def test_a_report_without_runs_names_them_and_fails(tmp_path, capsys):
    assert experiments.main(["report", "dino", "--work", str(tmp_path / "w"), "--output", str(tmp_path / "r")]) == 1
    assert "missing: dino, seed 2: not made yet" in capsys.readouterr().out
    assert not (tmp_path / "r" / "dino.md").exists()


def test_arms_are_what_they_say():
    """Every arm's settings are valid and evaluated alike; neither prompts nor seeds are those of tuning."""
    for arm in ARMS:
        made = settings(Job(arm, 1), Path("/w"), 60)
        assert made.data.held_out_prompts == "tiny:report"
        assert (made.seed, made.iterations, made.evaluation.every) == (1, 60, 15)
        assert made.evaluation.metrics == METRICS
    assert not {7, 42} & set(experiments.Report().seeds)
    assert settings(Job("repair", 1), Path("/w"), 60).model.lora.start_from == "/w/flow-pickscore/seed-1/lora"
    betas = [settings(Job(arm, 0), Path("/w"), 60).update.kl_weight for arm in EXPERIMENTS["kl"].arms]
    assert betas == sorted(set(betas))
    assert betas[0] == 0
    for experiment in EXPERIMENTS.values():
        for claim in experiment.claims:
            assert {claim.arm, claim.against} - {""} <= set(experiment.arms)
            assert claim.metric in experiment.metrics


@pytest.mark.parametrize(
    ("values", "expected", "margin", "verdict", "direction"),
    [
        ([0.10, 0.11, 0.12], "rises", 0, "as expected", "rises"),
        ([0.10, 0.11, 0.12], "falls", 0, "contradicts", "rises"),
        ([-0.10, -0.11, -0.12], "falls", 0, "as expected", "falls"),
        ([-0.10, -0.11, -0.12], "rises", 0, "contradicts", "falls"),
        ([0.10, -0.05, 0.02], "rises", 0, "undecided", "interval includes 0"),
        ([-0.010, -0.011, -0.012], "does not fall", 0.05, "as expected", "falls"),
        ([-0.10, -0.11, -0.12], "does not fall", 0.05, "contradicts", "falls"),
        ([-0.10, 0.02, 0.05], "does not fall", 0.05, "undecided", "interval includes 0"),
        ([0.10, 0.11, 0.12], "does not fall", 0.05, "as expected", "rises"),
        ([0.10, 0.11, 0.12], "does not rise", 0.05, "contradicts", "rises"),
        ([0.010, 0.011, 0.012], "does not rise", 0.05, "as expected", "rises"),
        ([0.010, 0.011, 0.012], "stays", 0.05, "as expected", "rises"),
        ([0.10, 0.11, 0.12], "stays", 0.05, "contradicts", "rises"),
        ([-0.10, -0.11, -0.12], "stays", 0.05, "contradicts", "falls"),
        ([0.04, 0.05, 0.06], "stays", 0.05, "undecided", "rises"),
        ([0.10], "rises", 0, "undecided", "one seed, no interval"),
    ],
)
def test_verdicts_follow_from_the_interval(values, expected, margin, verdict, direction):
    change = Change(values)
    assert change.verdict(Claim("dino", "pickscore", expected, margin=margin)) == verdict
    assert change.direction == direction


@pytest.fixture
def made_up(tmp_path, monkeypatch):
    """Runs that were never trained: hacking's arms over three seeds with chosen numbers."""
    finals = {
        "flow-pickscore": {"pickscore": 0.9, "saturation": 0.9, "rule_accuracy": 0.4, "dino_similarity": 0.7},
        "adv-pickscore": {"pickscore": 0.85, "saturation": 0.6, "rule_accuracy": 0.8, "dino_similarity": 0.9},
    }
    base = {"pickscore": 0.8, "saturation": 0.5, "rule_accuracy": 0.6, "dino_similarity": 0.8}
    plan = Plan(tmp_path, 60)

    def finished(_plan, job):
        jitter = 0.01 * job.seed
        final = {name: value + jitter for name, value in finals[job.arm].items()}
        machine = {"platform": "Linux-test", "cpus": 2, "gpu": None}
        summary = {"base": base, "final": final, "iterations": 60, "machine": machine, "versions": {"torch": "2"}}
        summary |= {"training_seconds": 60.0, "finished": "2030-01-01T00:00:00Z"}
        return experiment_runs.Finished(summary, plan.config(job))

    monkeypatch.setattr(Plan, "finished", finished)
    monkeypatch.setattr("advgrpo.experiments.results._reference_statistics", lambda _: {"saturation": 0.6})
    return Results("hacking", plan, [0, 1, 2])


def test_changes_are_paired_and_distances_are_from_the_references(made_up):
    assert made_up.change("flow-pickscore", "pickscore").values == pytest.approx([0.10, 0.11, 0.12])
    assert made_up.change("adv-pickscore", "rule_accuracy", "flow-pickscore").values == pytest.approx([0.4] * 3)
    # base is 0.1 from the references' 0.6, the final images 0.30, 0.31, 0.32
    assert made_up.change("flow-pickscore", "saturation_distance").values == pytest.approx([0.20, 0.21, 0.22])
    assert made_up.change("adv-pickscore", "saturation_distance").values == pytest.approx([-0.10, -0.09, -0.08])


def test_the_page_says_what_the_numbers_say(made_up):
    found = numbers(made_up)
    text = page(made_up, found)
    assert "| preference reward | Flow-GRPO | 0.800 | 0.910 | +0.110 [+0.085, +0.135] |" in text
    assert "The references' saturation is 0.600." in text
    assert "| Flow-GRPO: rule-judge accuracy falls | -0.190 [-0.215, -0.165]: falls | as expected |" in text
    compared = "Adv-GRPO: rule-judge accuracy is higher than with Flow-GRPO"
    assert f"| {compared} | +0.400 [+0.400, +0.400]: higher | as expected |" in text
    assert f"Of {len(found['claims'])} expectations: {len(found['claims'])} as expected (3 seeds)" in text
    assert "Linux-test, 2 CPU cores" in text
    assert "torch 2" in text


def test_the_committed_pages_begin_as_they_would_be_written_today():
    """Notes included, such as that no style was reproduced: they are what the counts do not say."""
    folder = ROOT / "docs" / "results"
    known = json.loads((folder / "results.json").read_text())
    assert list(known) == list(EXPERIMENTS)
    for name, found in known.items():
        beginning = f"{heading(EXPERIMENTS[name], found)}\n\n## Result\n"
        assert (folder / f"{name}.md").read_text().startswith(beginning), name
        assert EXPERIMENTS[name].note in (folder / "README.md").read_text()
    assert "**not reproduced**" in (folder / "style.md").read_text()
    assert (folder / "README.md").read_text() == index(known)


def test_a_contradiction_is_called_one(made_up, monkeypatch):
    claims = (Claim("flow-pickscore", "pickscore", "falls"),)
    monkeypatch.setitem(EXPERIMENTS, "hacking", replace(EXPERIMENTS["hacking"], claims=claims))
    results = Results("hacking", made_up.plan, [0, 1, 2])
    assert "1 **contradicts** the expectation (3 seeds)" in page(results, numbers(results))


def test_curves_of_different_lengths_are_refused(tmp_path):
    curve = [(0, {"pickscore": 0.1}), (2, {"pickscore": 0.2})]
    with pytest.raises(ValueError, match="the seeds of 'a' were evaluated at different iterations"):
        draw_comparison({"a": [curve, curve[:1]]}, {"pickscore": "reward"}, {}, tmp_path / "x.png")


def test_every_arm_is_drawn(tmp_path, monkeypatch):
    """No experiment has more arms than there are colours; more are refused, not left out."""
    drawn, real = [], experiment_figures._draw_arm
    monkeypatch.setattr(experiment_figures, "_draw_arm", lambda axes, *a: drawn.append(a[0]) or real(axes, *a))
    largest = max((experiment.arms.values() for experiment in EXPERIMENTS.values()), key=len)
    curve = [[(0, {"a": 1.0}), (1, {"a": 2.0})]]
    draw_comparison(dict.fromkeys(largest, curve), {"a": "A"}, {}, tmp_path / "a.png")
    assert drawn == list(largest)
    with pytest.raises(ValueError, match="9 arms, but"):
        draw_comparison({str(i): curve for i in range(9)}, {"a": "A"}, {}, tmp_path / "a.png")
