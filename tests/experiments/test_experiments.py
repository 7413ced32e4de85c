"""The experiments end to end on untrained unit models, and the rules of their plan.

Bugs planted in a copy, each seen red: "2 pictures" on every page; a figure of the note on over-optimisation; a note
that is not on its page; one that does not name AWM; one that is not in the index; a run that is taken for finished
before it is judged; a judge's file of other weights that is kept.
"""

import copy
import json
import os
import re
import signal
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from rich.console import Console

from advgrpo import config, tiny
from advgrpo.errors import UserError
from advgrpo.experiments import __main__ as experiments
from advgrpo.experiments import runs as experiment_runs
from advgrpo.experiments.judging import LISTS, Judging, missing
from advgrpo.experiments.pages import index, page
from advgrpo.experiments.plan import (
    ARMS,
    BASES,
    EXPERIMENTS,
    GUIDANCE,
    LEVERS,
    REPORT_PROMPTS,
    TUNING_PROMPTS,
    WORLD,
    Job,
    chains,
    select,
    settings,
    take_shard,
)
from advgrpo.experiments.report import sample_rows
from advgrpo.experiments.results import Results
from advgrpo.experiments.runs import Plan
from advgrpo.tiny import judge as tiny_judge

ROOT = Path(__file__).parents[2]
SCALES = (2.0, 3.0)


@pytest.fixture
def small(unit_config, tmp_path, monkeypatch) -> Path:
    """--config for runs of about a second: unit models, 4 prompts on each list, and a judge that sees 27 numbers."""
    monkeypatch.setattr(tiny_judge, "_network", lambda: None)
    monkeypatch.setattr(
        tiny_judge.Judge, "features", lambda _, images, scenes: F.adaptive_avg_pool2d(images, 3).flatten(1)
    )
    monkeypatch.setitem(tiny.PREFERENCE_MODELS, WORLD, tiny.PREFERENCE_MODELS["tiny"])  # any will do
    experiment_runs._witness.cache_clear()  # and with it what it has seen of references
    shipped = {"held_out": tiny.WORLDS[WORLD].held_out_prompts, "report": tiny.other_prompts()[REPORT_PROMPTS]}
    shipped["tuning"] = tiny.other_prompts()[TUNING_PROMPTS]
    for name, file in shipped.items():
        (tmp_path / f"{name}.txt").write_text("\n".join(file.read_text().splitlines()[:4]))
    plain = unit_config.model_dump(mode="json")
    content = {
        "model": {"path": plain["model"]["path"], "lora": {"rank": 4, "alpha": 8}},
        "data": {"held_out_prompts": str(tmp_path / "held_out.txt"), "cache_dir": plain["data"]["cache_dir"]},
        "rollout": {
            "prompts_per_iteration": 4,
            "group_size": 4,
            "micro_batch": 2,
            "num_steps": 8,
            "tail_agreement": 0.0,
        },
        "adversary": {"updates_per_iteration": 1, "batch_size": 6, "replay_capacity": 16},
        "evaluation": {"images_per_prompt": 1, "during_images_per_prompt": 1, "num_steps": 2, "grid_prompts": 2},
        "output": {"checkpoint_every": 1},
    }
    file = tmp_path / "small.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


def judging(folder: Path) -> Judging:
    """What `call` is judged on."""
    return Judging({name: str(folder / f"{name}.txt") for name in LISTS}, WORLD, SCALES, 2)


def plan_of(tmp_path: Path, iterations: int, small: Path, work: str = "work") -> Plan:
    return Plan(tmp_path / work, iterations, judging(tmp_path), small)


def call(command: str, tmp_path, small: Path, *more: str, names=("all",)) -> int:
    places = ["--output", str(tmp_path / "results"), "--work", str(tmp_path / "work"), "--config", str(small)]
    lists = ["--prompts", str(tmp_path / "report.txt"), "--tuning-prompts", str(tmp_path / "tuning.txt")]
    how = ["--guidance-scales", *map(str, SCALES), "--resamples", "200", "--iterations", "2"]
    return experiments.main([command, *names, *places, *lists, *how, *more])


@pytest.mark.parametrize("names", [["sft"], pytest.param(list(EXPERIMENTS), marks=pytest.mark.weekly)])
def test_every_experiment_runs_and_is_written_up(names, tmp_path, small, capsys):
    assert call("run", tmp_path, small, "--seeds", "0", names=names) == 0
    arms = {job.arm for chain in chains(names, [0]) for job in chain}
    work, results = tmp_path / "work", tmp_path / "results"
    assert sorted(p.parent.parent.name for p in work.glob("*/seed-0/summary.json")) == sorted(arms - BASES.keys())
    assert {p.name for p in work.iterdir()} == arms
    found = json.loads((results / "results.json").read_text())
    assert list(found) == names
    for name, entry in found.items():
        text = (results / f"{name}.md").read_text()
        assert EXPERIMENTS[name].title in text
        assert EXPERIMENTS[name].note in text
        assert f"experiments run {name} --seeds 0 --iterations 2" in text
        assert torch.__version__ in text
        for picture in (f"{name}.png", f"{name}-front.png", f"{name}-samples.png"):
            assert (results / picture).stat().st_size > 5_000
        assert entry["missing"] == {}
        assert all("found" in claim and "evidence" not in claim for claim in entry["claims"])  # one seed is not tested
        assert f"({name}.md)" in (results / "README.md").read_text()
        assert all(run["held_out_images"] == {"ends": 1, "between": 1} for run in runs_of(entry))
        assert "Held-out prompts, 1 picture each; mean over seeds" in text
        for metric in EXPERIMENTS[name].metrics:
            assert all(set(arm["changes"][metric]) == {"2", "3", "best"} for arm in entry["arms"].values())
    costs = {arm: found["sft"]["arms"][arm]["runs"]["0"] for arm in ("sft", "dino")}
    images = settings(Job("sft"), work, 2, small).images_per_iteration
    assert (costs["sft"]["images_drawn"], costs["sft"]["references_shown"]) == (0, 2 * images)
    assert (costs["dino"]["images_drawn"], costs["dino"]["references_shown"]) == (2 * images, 2 * 6)
    assert costs["dino"]["cpu_seconds"] > 0
    curve = costs["dino"]["curve"]
    assert [point["iteration"] for point in curve] == [0, 1, 2]
    assert curve[-1]["cpu_seconds"] == pytest.approx(costs["dino"]["cpu_seconds"])
    if "style" in names:
        references_stand_beside_the_last_arm_that_shows_them(plan_of(tmp_path, 2, small))

    capsys.readouterr()
    stamps = {file: file.stat().st_mtime_ns for file in work.rglob("*")}
    assert call("run", tmp_path, small, "--seeds", "0", names=names) == 0  # nothing is left to do
    assert {file: file.stat().st_mtime_ns for file in work.rglob("*")} == stamps
    assert capsys.readouterr().out.count("there already") == len(arms)

    pages = {file: file.read_bytes() for file in results.glob("*.md")}
    for file in [*pages, *results.glob("*-front.png")]:
        file.unlink()
    assert experiments.main(["pages", "--output", str(results)]) == 0  # from the numbers alone
    assert {file: file.read_bytes() for file in results.glob("*.md")} == pages
    assert all((results / f"{name}-front.png").is_file() for name in names)


def runs_of(entry: dict) -> list[dict]:
    return [run for arm in entry["arms"].values() for run in arm["runs"].values()]


def references_stand_beside_the_last_arm_that_shows_them(plan: Plan) -> None:
    styles = Results("style", plan, (0,), resamples=100)
    labels = [label for label, _ in sample_rows(styles, styles.arms)[0][1]]
    arms = [*EXPERIMENTS["style"].arms.values()]
    for with_references in (5, 3):  # after the last of the arms that share them, three of ink and two of outline
        arms.insert(with_references, f"{arms[with_references - 1]}: references")
    assert labels == ["base", *arms]


@pytest.mark.weekly
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
    straight, job = plan_of(tmp_path, 3, small, "straight"), Job("dino", 0)
    experiment_runs.make(job, straight)
    stopped = plan_of(tmp_path, 3, small)
    assert stopped.finished(job).summary["final"] == straight.finished(job).summary["final"]
    for scale, seen in straight.judged(job)["report"].items():
        assert torch.equal(seen.kernel, stopped.judged(job)["report"][scale].kernel)


@pytest.mark.weekly
def test_a_run_cut_short_before_its_first_checkpoint_or_its_samples_is_made_again(tmp_path, small):
    plan, job = plan_of(tmp_path, 1, small), Job("dino", 0)
    folder = plan.folder(job)
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("")
    experiment_runs.make(job, plan)
    final = plan.finished(job).summary["final"]
    (folder / "samples.safetensors").unlink()
    assert plan.finished(job) is None
    experiment_runs.make(job, plan)
    assert plan.finished(job).summary["final"] == final


@pytest.mark.weekly
def test_a_failing_arm_is_reported_and_the_others_go_on(tmp_path, small, monkeypatch, capsys):
    """A wrong path fails with its own words; the arm that starts from it fails for that reason; exit status 1."""
    broken = replace(ARMS["flow"], overrides={**ARMS["flow"].overrides, "data": {"references": "nowhere"}})
    monkeypatch.setitem(ARMS, "flow", broken)
    assert call("run", tmp_path, small, "--seeds", "0", names=["repair", "dino"]) == 1
    output = capsys.readouterr().out
    assert "flow, seed 0: FAILED: reference folder nowhere does not exist" in output
    assert "repair, seed 0: FAILED: it starts from flow, seed 0, which failed" in output
    results = tmp_path / "results"
    found = json.loads((results / "results.json").read_text())
    assert found.keys() == {"dino"}
    assert "**Not run:** hacked, repaired." in (results / "repair.md").read_text()
    row = "| [repair](repair.md) | repaired: retrieval is higher than with hacked | not run | – | undecided |"
    assert row in (results / "README.md").read_text()
    assert "missing: flow, seed 0: reference folder nowhere" in output


@pytest.mark.weekly
def test_a_repair_is_made_again_when_its_start_is(tmp_path, small):
    plan, hacked, repaired = plan_of(tmp_path, 1, small), Job("flow", 0), Job("repair", 0)
    with pytest.raises(UserError, match="starts from flow, seed 0, which is not finished"):
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


@pytest.mark.weekly
def test_what_is_judged_goes_on_where_it_stopped_and_follows_the_weights(tmp_path, small, monkeypatch):
    plan, job = plan_of(tmp_path, 1, small), Job("dino", 0)
    experiment_runs.make(job, plan)
    subject = plan.subject(job)
    assert missing(subject, plan.judging) == []
    kept = {file.name: file.stat().st_mtime_ns for file in subject.folder.iterdir()}
    (subject.folder / "report-guidance-3.safetensors").unlink()
    assert plan.finished(job) is None
    monkeypatch.setattr(experiment_runs, "_train", lambda *_: pytest.fail("trained again"))
    experiment_runs.make(job, plan)
    again = {file.name: file.stat().st_mtime_ns for file in subject.folder.iterdir()}
    assert again.keys() == kept.keys()
    assert {name for name in kept if again[name] != kept[name]} == {"report-guidance-3.safetensors"}
    (subject.lora / "pytorch_lora_weights.safetensors").write_bytes(b"others")
    assert len(missing(subject, plan.judging)) == len(LISTS) * len(SCALES)
    assert plan.finished(job) is None
    (tmp_path / "report.txt").write_text("a small fox on blue, left")
    assert len(missing(plan.subject(Job("base")), plan.judging)) == len(LISTS) * len(SCALES)


@pytest.mark.weekly
def test_settings_that_differ_are_not_taken_for_finished(tmp_path, small):
    plan, job = plan_of(tmp_path, 1, small), Job("dino", 0)
    experiment_runs.make(job, plan)
    assert plan_of(tmp_path, 2, small).finished(job) is None
    other = tmp_path / "other.yaml"
    other.write_text(yaml.safe_dump(yaml.safe_load(small.read_text()) | {"advantage": {"clip": 2.0}}))
    assert plan_of(tmp_path, 1, other).finished(job) is None
    with pytest.raises(UserError, match=r"advantage\.clip: 5\.0 -> 2\.0"):
        experiment_runs.make(job, plan_of(tmp_path, 1, other))
    assert plan.finished(job) is not None  # and what was there is still there


@pytest.mark.weekly
def test_side_by_side_processes_share_the_runs(tmp_path, small, monkeypatch, capfd):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "kernels")]))
    handler = signal.getsignal(signal.SIGTERM)
    assert call("run", tmp_path, small, "--seeds", "0", "1", "--jobs", "2", names=["dino"]) == 0
    assert signal.getsignal(signal.SIGTERM) is handler
    output = capfd.readouterr().out
    assert output.count("dino, seed 0: ") == output.count("dino, seed 1: ") == output.count("base: ") == 1
    assert json.loads((tmp_path / "results" / "results.json").read_text())["dino"]["seeds"] == [0, 1]


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_shards_cover_every_run_once_and_keep_starts_together(count):
    every = chains(select(["all"]), [0, 1, 2])
    parts = [take_shard(every, f"{number}/{count}") for number in range(count)]
    jobs = [job for part in parts for chain in part for job in chain]
    assert sorted(map(str, jobs)) == sorted([*(str(Job(arm, seed)) for arm in ARMS for seed in range(3)), *BASES])
    for part in parts:
        order = [job for chain in part for job in chain]
        for job in order:
            assert job.origin is None or order.index(job.origin) < order.index(job)
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1


def test_an_experiment_brings_the_arms_it_starts_from():
    assert chains(["signal"], [4])[1] == [Job("dino", 4), Job("distill", 4)]
    assert chains(["repair"], [4]) == [[Job("base-preference")], [Job("flow", 4), Job("repair", 4)]]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["run", "hack"], "experiment hack: want all, or some of dino, nft"),
        (["run", "all", "--shard", "2/2"], "--shard 2/2: want I/N"),
        (["run", "all", "--shard", "half"], "--shard half: want I/N"),
        (["report", "all", "--iterations", "0"], "--iterations 0"),
        (["report", "all", "--guidance-scales", "1", "3"], "--guidance-scales 1 3: arms train at 2"),
        (["report", "all", "--config", "absent.yaml"], "config file absent.yaml"),
    ],
)
def test_bad_input_is_named(tmp_path, arguments, complaint, capsys):
    assert experiments.main([*arguments, "--work", str(tmp_path), "--output", str(tmp_path)]) == 2
    assert complaint in capsys.readouterr().err


def test_a_report_without_runs_names_them_and_fails(tmp_path, capsys):
    assert experiments.main(["report", "dino", "--work", str(tmp_path / "w"), "--output", str(tmp_path / "r")]) == 1
    assert "missing: dino, seed 2: not made yet" in capsys.readouterr().out
    assert "**Not run:** default, eq. 7 as published." in (tmp_path / "r" / "dino.md").read_text()


def test_pages_without_numbers_are_refused(tmp_path, capsys):
    assert experiments.main(["pages", "--output", str(tmp_path)]) == 2
    assert "it has no results.json; run the experiments first" in capsys.readouterr().err


def test_arms_are_what_they_say():
    """Every arm's run could begin, is evaluated like the others, and has none of the reported prompts; every claim is
    about what its experiment has."""
    reported = set(tiny.other_prompts()[REPORT_PROMPTS].read_text().splitlines())
    looked_at = [tiny.other_prompts()[TUNING_PROMPTS], tiny.WORLDS[WORLD].held_out_prompts, tiny.WORLDS[WORLD].prompts]
    assert all(reported.isdisjoint(file.read_text().splitlines()) for file in looked_at)
    for arm in (*ARMS, *BASES):
        made = settings(Job(arm, 1), Path("/w"), 64)
        if not Job(arm).origin:  # the others' start is there only when it has been trained
            config.check(made)
        assert made.data.held_out_prompts == WORLD
        assert (made.seed, made.evaluation.every) == (1, 8)
        longer = {"flow-long": 213, "adv-preference-long": 213, "style-ink-nft": 107, "released-steps": 97}
        longer["scouts-equal"] = 35
        assert made.iterations == longer.get(arm, 64)
        assert made.evaluation.guidance_scale == GUIDANCE
        without = arm == "guidance-1" or made.objective.forward_process
        assert made.rollout.guidance_scale == (1.0 if without else GUIDANCE)
    assert not {7, 42} & set(experiments.Report().seeds)
    assert settings(Job("repair", 1), Path("/w"), 60).model.lora.start_from == "/w/flow/seed-1/lora"
    assert settings(Job("distill", 1), Path("/w"), 60).update.teacher == "/w/dino/seed-1/lora"
    default = settings(Job("dino"), Path("/w"), 60)
    for arm in LEVERS:  # each changes the default, and something that its run looks at
        assert settings(Job(arm), Path("/w"), 60).model_copy(update={"output_dir": default.output_dir}) != default
    as_released = settings(Job("released-steps"), Path("/w"), 60)
    assert as_released.iterations * as_released.update.minibatches == 182
    betas = [settings(Job(arm, 0), Path("/w"), 60).update.kl_weight for arm in EXPERIMENTS["kl"].arms]
    assert betas == sorted(set(betas))
    assert betas[0] == 0
    eq7 = settings(Job("eq7"), Path("/w"), 60).adversary
    assert (eq7.schedule, eq7.fooled_margin, eq7.warmup_iterations) == ("when_fooled", 0, 0)
    for experiment in EXPERIMENTS.values():
        assert (
            "pickscore" not in experiment.metrics
            or "pickscore" in settings(Job(experiment.base), Path("/w"), 60).evaluation.metrics
        )
        for claim in experiment.claims:
            assert {claim.arm, claim.against} - {""} <= set(experiment.arms)
            assert claim.metric in experiment.metrics
        assert experiment.against in ("", *experiment.arms)


def test_the_note_on_references_counts_them_right():
    """100 references are 34 prompts with 102, and so on, of 384 prompts with three each."""
    prompts = tiny.WORLDS[WORLD].prompts.read_text().splitlines()
    files = json.loads((tiny.WORLDS[WORLD].references / "references.json").read_text())
    assert {len(files[prompt]) for prompt in prompts} == {3}
    assert f"all ({3 * len(prompts):,})" == EXPERIMENTS["references"].arms["dino"]
    said = re.findall(r"(\d+) means (\d+)(?: prompts)? with (\d[\d,]*\d)", EXPERIMENTS["references"].note)
    whole = {count: -(-count // 3) for count in (100, 200, 500, 1000)}
    assert said == [(str(count), str(prompts), f"{3 * prompts:,}") for count, prompts in whole.items()]


def test_notes_name_the_arms_that_are_no_preset_as_it_is():
    said = []
    for name, experiment in EXPERIMENTS.items():
        if "have the settings of their presets" in experiment.note:
            changed = [label for arm, label in experiment.arms.items() if ARMS[arm].overrides]
            assert changed
            for label in changed:
                assert label.partition(", β")[0].lower() in experiment.note.lower(), (name, label)
            said.append(name)
    assert said == ["trust-region", "stochastic-steps", "signal"]


COMMITTED = json.loads((ROOT / "docs" / "results" / "results.json").read_text())


def test_a_page_says_how_many_pictures_a_curve_rests_on():
    """As kept with the runs, and of before it was kept as the curves' shares of pictures give it."""
    assert "Held-out prompts, 2 pictures each; mean" in page("sft", COMMITTED)
    fewer = "Held-out prompts, 4 pictures each before and after training but 1 in between, where points are noisier and"
    assert f"{fewer} peaks flatter; mean" in page("kl", COMMITTED)
    entry = copy.deepcopy(COMMITTED["kl"])
    for run, between in zip(runs_of(entry), (2, *[4] * 8)):
        run["held_out_images"] = {"ends": 4, "between": between}
    text = page("kl", {"kl": entry})
    assert "Held-out prompts, 4 pictures each before and after training but 2 in between" in text
    assert "peaks flatter, or, by run, 4 pictures each; mean" in text
    del runs_of(entry)[0]["held_out_images"]
    runs_of(entry)[0]["curve"][1]["retrieval"] = 0.123
    with pytest.raises(ValueError, match="results without held_out_images: no number of pictures of 48 prompts"):
        page("kl", {"kl": entry})


def _between_experiments(metric: str, arm: str, against: str, form: str) -> str:
    """An arm of over-optimisation less one of hacking, by seed at guidance 2: "mean [low, high]", Student's t."""
    names = {"over-optimisation": arm, "hacking": against}
    by_seed = [
        {
            seed: point[metric]
            for seed, run in COMMITTED[name]["arms"][each]["runs"].items()
            for point in run["front"]
            if point["guidance"] == GUIDANCE
        }
        for name, each in names.items()
    ]
    assert by_seed[0].keys() == by_seed[1].keys() == {"0", "1", "2"}
    differences = [by_seed[0][seed] - by_seed[1][seed] for seed in by_seed[0]]
    mean, half = statistics.mean(differences), 4.302653 * statistics.stdev(differences) / 3**0.5
    shown = [f"{value:{form}}".replace("0.", ".") for value in (mean, mean - half, mean + half)]
    return f"{shown[0]} [{shown[1]}, {shown[2]}]"


def test_the_note_on_over_optimisation_has_both_pages_figures():
    """While its short arms are on another page only."""
    note = EXPERIMENTS["over-optimisation"].note
    assert not any(COMMITTED["over-optimisation"]["arms"][arm]["runs"] for arm in ("flow", "adv-preference"))
    for label, metric, form in (
        ("retrieval", "retrieval", "+.3f"),
        ("preference reward", "pickscore", "+.3f"),
        ("KID × 1000", "kid", "+.0f"),
        ("saturation's distance", "saturation_distance", "+.3f"),
    ):
        assert f"{label} {_between_experiments(metric, 'flow-long', 'flow', form)}" in note
    of_adversary = _between_experiments("retrieval", "adv-preference-long", "adv-preference", "+.3f")
    assert f"Adv-GRPO, long less Adv-GRPO: retrieval {of_adversary}." in note


def test_the_committed_pages_are_what_would_be_written_today():
    """Notes, verdicts and what was not run included: they are what the numbers do not say."""
    folder = ROOT / "docs" / "results"
    for name in EXPERIMENTS:
        assert (folder / f"{name}.md").read_text() == page(name, COMMITTED), name
    assert (folder / "README.md").read_text() == index(COMMITTED)
