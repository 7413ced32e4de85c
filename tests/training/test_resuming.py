"""From which checkpoint a run goes on: --resume auto, --resume-from, falling back, the lock, what may have changed.

Runs are copies of one that ran through, cut where they are said to have been killed; they must end as it did, to the
bit.

Bugs planted in a copy, each seen red: auto refused without a checkpoint; nothing moved aside; no fallback; fallback
from other settings; a run that is done trained again; later checkpoints left in sight; config.yaml written on a resume;
summary.json left to a run that goes on; no lock; the lock kept after a failure; each hash left out of the comparison;
the base not evaluated again; the settings taken from config.yaml.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from advgrpo import config
from advgrpo.config import Config
from advgrpo.data.sources import Sources
from advgrpo.errors import UserError
from advgrpo.reporting.evaluations import load_evaluations
from advgrpo.runtime.checkpoint import STATE, TENSORS, checkpoints
from advgrpo.runtime.distributed import Distributed
from advgrpo.runtime.folders import FolderLock
from advgrpo.train import main, parse
from advgrpo.training.resuming import Resume, Resuming, Saved, differences, made_from
from advgrpo.training.run import Run
from tests.conftest import make_unit_config
from tests.parts import some_weekly
from tests.runtime.test_checkpoint import Faults
from tests.runtime.test_hostile_checkpoints import rehash
from tests.training.test_run import command, environment, forked, metrics, wait_for_rows

AUTO = Resume("auto")
LAST = 4


def settings_in(folder: Path, pipeline: str, backbone: str) -> Config:
    settings = make_unit_config(pipeline, backbone, folder)
    settings.iterations, settings.data.held_out_prompts = LAST, ""
    settings.rollout.micro_batch = 2  # so that two processes can share the images
    settings.rollout.num_steps, settings.rollout.guidance_scale = 3, 1.0
    settings.output.checkpoint_every, settings.output.keep_checkpoints = 1, 9
    return settings


@pytest.fixture(autouse=True)
def _wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")


@pytest.fixture(scope="module")
def whole(unit_pipeline, unit_backbone, tmp_path_factory) -> Config:
    """Of a run that was never disturbed."""
    settings = settings_in(tmp_path_factory.mktemp("whole"), unit_pipeline, unit_backbone)
    Run(settings, Distributed.start("cpu"), console=Console(quiet=True)).train()
    return settings


@pytest.fixture
def cut(whole, tmp_path):
    """Makes a copy of that run, as it was when killed after so many iterations, one past its newest checkpoint."""

    def make(iterations: int) -> Config:
        settings = whole.model_copy(deep=True)
        settings.output_dir = str(tmp_path / "run")
        folder = Path(shutil.copytree(whole.output_dir, settings.output_dir))
        for path in checkpoints(folder / "checkpoints")[max(0, iterations - 1) :]:
            shutil.rmtree(path)
        rows = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
        (folder / "metrics.jsonl").write_text("".join(rows[:iterations]) + rows[0][:20])
        (folder / "summary.json").unlink()
        shutil.rmtree(folder / "lora")
        return settings

    return make


def go(settings: Config, resume: Resume | bool = AUTO) -> str:
    """Train to the end; what was said."""
    said = io.StringIO()
    Run(settings, Distributed.start("cpu"), resume=resume, console=Console(file=said, width=1000)).train()
    return said.getvalue()


def names(settings: Config) -> list[str]:
    return [path.name for path in checkpoints(Path(settings.output_dir) / "checkpoints")]


def newest(settings: Config) -> Path:
    return checkpoints(Path(settings.output_dir) / "checkpoints")[-1]


def assert_equal(settings: Config, whole: Config) -> None:
    """As if never disturbed."""
    assert metrics(settings.output_dir) == metrics(whole.output_dir)
    assert newest(settings).name == newest(whole).name == f"iteration-{LAST:06d}"
    assert (newest(settings) / TENSORS).read_bytes() == (newest(whole) / TENSORS).read_bytes()
    for name in ("summary.json", "lora/pytorch_lora_weights.safetensors"):
        assert (Path(settings.output_dir) / name).exists()


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


# --resume auto


def test_one_command_starts_continues_and_ends(whole, tmp_path, capsys):
    """What a queue repeats until its exit code is 0."""
    settings = whole.model_copy(deep=True)
    settings.output_dir, settings.iterations = str(tmp_path / "run"), 2
    file = tmp_path / "settings.yaml"
    file.write_text(config.dump(settings))
    line = ["--config", str(file), "--resume", "auto"]
    assert main(line) == 0
    assert "--resume auto: no checkpoint yet in" in capsys.readouterr().out
    assert main([*line, "--iterations", str(LAST)]) == 0
    assert f"resumed {settings.output_dir} at iteration 2" in capsys.readouterr().out
    assert_equal(settings, whole)
    before = {path: path.stat().st_mtime_ns for path in Path(settings.output_dir).rglob("*") if path.is_file()}
    for flags in (["--iterations", str(LAST)], ["--iterations", "1"]):
        assert main([*line, *flags]) == 0
        assert f"iteration {LAST} of {flags[1]} is done already" in capsys.readouterr().out
    before.pop(Path(settings.output_dir) / ".lock")
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())


def test_killed_before_the_first_checkpoint(cut, whole):
    settings = cut(1)
    assert names(settings) == []
    with pytest.raises(UserError, match=r"already holds a run; .* the same flags and --resume auto"):
        go(settings, False)
    with pytest.raises(
        UserError, match=r"no checkpoint in .* yet; start it again with --config \S+/config.yaml .*auto"
    ):
        go(settings, True)
    said = go(settings)
    assert "no checkpoint yet in" in said
    assert "starting at iteration 0. metrics.jsonl is now metrics.jsonl.old-1" in said
    assert_equal(settings, whole)


@pytest.mark.slow
@pytest.mark.weekly
def test_the_same_command_again_after_a_kill_before_the_first_checkpoint(whole, tmp_path):
    settings = whole.model_copy(deep=True)
    settings.output_dir, settings.output.checkpoint_every = str(tmp_path / "run"), 0
    line = command(settings, tmp_path, "--resume", "auto")
    process = subprocess.Popen(line, env=environment(), stdout=subprocess.PIPE)
    wait_for_rows(Path(settings.output_dir), 1, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    done = subprocess.run(line, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert_equal(settings, whole)


def empty_of_the_future(root: Path) -> None:
    (root / "iteration-999999").mkdir()


def poison(root: Path) -> None:
    folder = checkpoints(root)[-1]
    tensors = load_file(folder / TENSORS)
    next(t for name, t in tensors.items() if name.startswith("head.w1")).view(-1)[0] = torch.nan
    save_file(tensors, folder / TENSORS)
    rehash(folder)


def misfit(root: Path) -> None:
    """Found only when the models are there."""
    folder = checkpoints(root)[-1]
    tensors = load_file(folder / TENSORS)
    save_file({**tensors, "head.w1": tensors["head.w1"][:1].clone()}, folder / TENSORS)
    rehash(folder)


SKIPPED = {
    "flipped": (lambda root: flip(checkpoints(root)[-1] / TENSORS), "iteration-000003/tensors.safetensors was altered"),
    "cut": (lambda root: (checkpoints(root)[-1] / STATE).write_text(""), "iteration-000003/state.json is truncated"),
    "empty": (empty_of_the_future, "iteration-999999/manifest.json does not exist"),
    "not finite": (poison, "iteration-000003: head.w1 is not finite"),
    "misfit": (misfit, "iteration-000003: tensor head.w1 is float32 [1, 64], this run's is float32 [16, 64]"),
    "all of the newer": (
        lambda root: [flip(path / TENSORS) for path in checkpoints(root)[1:]],
        "iteration-000002/tensors.safetensors was altered",
    ),
}


@pytest.mark.parametrize("name", some_weekly(SKIPPED, {"cut", "flipped"}))
def test_what_cannot_be_continued_is_skipped_and_named(name, cut, whole):
    damage, reason = SKIPPED[name]
    settings = cut(LAST)
    damage(Path(settings.output_dir) / "checkpoints")
    said = go(settings)
    line = next(line for line in said.splitlines() if line.startswith("--resume auto: skipped "))
    assert reason in line
    assert "--resume-from" not in line
    assert_equal(settings, whole)


def test_a_newest_checkpoint_that_cannot_be_read_just_now_is_waited_for_and_never_skipped(cut, whole, monkeypatch):
    """Seen red: an older one was taken, and what the newest had was trained again."""
    settings = cut(LAST)
    faults = Faults(monkeypatch, STATE, times=4)
    with pytest.raises(UserError, match=r"--resume auto: \S+/iteration-000003 cannot be read .*no other checkpoint"):
        go(settings)
    assert len(names(settings)) == LAST - 1
    faults.left = 2
    said = go(settings)
    assert f"resumed {settings.output_dir} at iteration {LAST - 1}" in said
    assert "skipped" not in said
    assert_equal(settings, whole)


def test_what_another_process_cannot_read_ends_all_of_them_and_what_one_finds_damaged_is_skipped(tmp_path):
    job = SimpleNamespace(
        monitored=lambda *_, **__: nullcontext(), gather_json=lambda own: [own, ["", "a lost handle"]]
    )
    resuming = Resuming.__new__(Resuming)
    resuming.distributed, resuming.resume, resuming.folder = job, AUTO, tmp_path
    with pytest.raises(UserError, match="--resume auto: a lost handle"):
        resuming._open_together(tmp_path, "whole here")
    job.gather_json = lambda own: [["altered", ""], ["", "a lost handle"]]
    assert resuming._open_together(tmp_path, "whole here") == ("whole here", "altered")


def test_when_none_can_be_continued_the_run_starts_anew_and_nothing_is_lost(cut, whole):
    settings = cut(3)
    for path in checkpoints(Path(settings.output_dir) / "checkpoints"):
        flip(path / TENSORS)
    said = go(settings)
    assert "no checkpoint that can be continued in" in said
    assert "metrics.jsonl is now metrics.jsonl.old-1, checkpoints is now checkpoints.old-1" in said
    assert len(checkpoints(Path(settings.output_dir) / "checkpoints.old-1")) == 2
    assert_equal(settings, whole)


def test_auto_is_no_licence_for_other_settings(cut):
    settings = cut(3)
    settings.update.learning_rate = 0.5
    with pytest.raises(UserError, match=r"made with other settings: update.learning_rate: .* -> 0\.5"):
        go(settings)
    assert len(names(settings)) == 2


def test_blocks_in_parts_go_on_by_the_forward_that_they_began_with(cut):
    """Which keeps the adapters as one vector, or as PEFT's."""
    settings = cut(3)
    resuming, there = Resuming.__new__(Resuming), settings.model_copy(deep=True)
    resuming.resume, there.model.shard_base, settings.model.shard_base = AUTO, "blocks", "blocks"
    resuming.config, saved = settings, Saved(Path("there"), {}, {"config": there.model_dump(mode="json")})
    for before, now in ((1, 1), (2, 4), (4, 2)):
        saved.state["config"]["model"]["sequence_parallel"], settings.model.sequence_parallel = before, now
        resuming._refuse_other_settings(saved)
    for before, now in ((1, 2), (2, 1)):
        saved.state["config"]["model"]["sequence_parallel"], settings.model.sequence_parallel = before, now
        with pytest.raises(UserError, match=rf"sequence_parallel: {before} -> {now}, which changes the forward that"):
            resuming._refuse_other_settings(saved)


def test_a_folder_is_continued_from_its_newest_checkpoint_or_not_at_all(cut):
    settings = cut(3)
    flip(newest(settings) / TENSORS)
    with pytest.raises(UserError, match=r"iteration-000002/tensors.* was altered.*--resume-from \S+/iteration-000001$"):
        go(settings, True)


# --resume-from


def test_from_a_checkpoint_the_rest_is_dropped(cut, whole, capsys):
    settings = cut(4)
    root = Path(settings.output_dir) / "checkpoints"
    assert main(["--resume-from", str(root / "iteration-000001"), "--iterations", "1"]) == 0
    assert names(settings) == ["iteration-000001"]  # already, though nothing has been saved since
    assert len(metrics(settings.output_dir)) == 1
    capsys.readouterr()
    assert main(["--resume-from", str(root / "iteration-000001"), "--iterations", str(LAST)]) == 0
    assert "resumed" in capsys.readouterr().out
    assert names(settings) == [f"iteration-{number:06d}" for number in range(1, LAST + 1)]
    assert_equal(settings, whole)


def test_a_kill_before_the_next_save_does_not_bring_the_dropped_ones_back(cut, whole, monkeypatch):
    settings = cut(4)
    start = Path(settings.output_dir) / "checkpoints" / "iteration-000001"
    made = Run(settings, Distributed.start("cpu"), resume=Resume("checkpoint", start), console=Console(quiet=True))
    monkeypatch.setattr(made.trainer, "iterate", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        made.train()
    assert names(settings) == ["iteration-000001"]
    assert "resumed" in go(settings)
    assert_equal(settings, whole)


def test_a_fork_goes_into_a_folder_of_its_own(cut, whole, tmp_path, capsys):
    settings = cut(4)
    start, fork = newest(settings).with_name("iteration-000002"), tmp_path / "fork"
    before = sorted(path.name for path in start.parent.iterdir())
    assert main(["--resume-from", str(start), "--output-dir", str(fork)]) == 0
    assert sorted(path.name for path in start.parent.iterdir()) == before
    assert config.load(file=fork / "config.yaml").output_dir == str(fork)
    assert metrics(fork) == metrics(whole.output_dir)[2:]
    assert (fork / "checkpoints/iteration-000004" / TENSORS).read_bytes() == (newest(whole) / TENSORS).read_bytes()
    assert json.loads((fork / "summary.json").read_text())["iterations"] == LAST
    capsys.readouterr()
    assert main(["--resume-from", str(start), "--output-dir", str(fork)]) == 2
    assert "already holds a run" in capsys.readouterr().err


def test_what_is_no_checkpoint_is_told_apart(cut, tmp_path, capsys):
    settings = cut(4)
    assert main(["--resume-from", settings.output_dir]) == 2
    assert f"is the folder of a run; want a checkpoint in it, such as {newest(settings)}" in capsys.readouterr().err
    assert main(["--resume", str(newest(settings))]) == 2
    assert f"use --resume-from {newest(settings)}" in capsys.readouterr().err
    assert main(["--resume-from", str(tmp_path / "nowhere")]) == 2
    assert "nowhere does not exist" in capsys.readouterr().err


# config.yaml


WEEKLY = (b"", b"\xff\xfe\x00", b"model: {")  # are not read either


@pytest.mark.parametrize(
    "content", [None, b"old_setting: 1\n", *(pytest.param(c, marks=pytest.mark.weekly) for c in WEEKLY)]
)
def test_the_settings_are_the_checkpoints(content, cut, whole, capsys):
    """A kill while config.yaml was rewritten made every resume impossible."""
    settings = cut(3)
    file = Path(settings.output_dir) / "config.yaml"
    file.write_bytes(content) if content is not None else file.unlink()
    assert main(["--resume", settings.output_dir]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert content is None or "the checkpoint's settings count" in said
    assert content is None or file.read_bytes() == content
    assert_equal(settings, whole)


def test_config_yaml_stays_and_a_changed_length_is_kept_in_the_checkpoint(cut, whole, capsys):
    settings = cut(2)
    file = Path(settings.output_dir) / "config.yaml"
    before = file.read_bytes(), file.stat().st_mtime_ns
    assert main(["--resume", settings.output_dir, "--iterations", "3"]) == 0
    assert f"note: since config.yaml was written: iterations: {LAST} -> 3" in capsys.readouterr().out
    assert main(["--resume", settings.output_dir]) == 2
    assert "iteration 3 of 3 is done already" in capsys.readouterr().err
    assert (file.read_bytes(), file.stat().st_mtime_ns) == before
    assert main(["--resume", settings.output_dir, "--iterations", str(LAST)]) == 0
    assert_equal(settings, whole)


def test_a_summary_is_that_of_the_runs_end(cut, monkeypatch):
    """One that goes on has none, so that a kill in its last evaluation is not taken for its end."""
    settings = cut(2)
    go(settings)
    settings.iterations += 1
    monkeypatch.setattr(Run, "_finish", lambda self: None)
    go(settings, True)
    assert not (Path(settings.output_dir) / "summary.json").exists()
    monkeypatch.undo()
    go(settings, True)
    assert json.loads((Path(settings.output_dir) / "summary.json").read_text())["iterations"] == LAST + 1


# metrics.jsonl


@pytest.mark.parametrize("damage", [bytes(30), b"nonsense", b"\xff\xfe", b"[" * 100_000])
@pytest.mark.weekly
def test_damaged_metrics_are_put_aside(damage, cut, whole):
    settings = cut(3)
    file = Path(settings.output_dir) / "metrics.jsonl"
    rows = file.read_bytes().split(b"\n")
    file.write_bytes(b"\n".join([damage, *rows[1:]]))
    assert "line 1 is not a metrics record" in go(settings)
    assert [row["iteration"] for row in metrics(settings.output_dir)] == [1, 2, 3]
    assert file.with_name("metrics.jsonl.old-1").exists()
    assert json.loads((Path(settings.output_dir) / "summary.json").read_text())["iterations"] == LAST


def test_a_run_whose_metrics_are_gone_still_ends(cut):
    settings = cut(LAST + 1)
    (Path(settings.output_dir) / "metrics.jsonl").write_bytes(b"nonsense\n")
    go(settings)
    summary = json.loads((Path(settings.output_dir) / "summary.json").read_text())
    assert (summary["iterations"], summary["images_per_second"], summary["training_seconds"]) == (LAST, None, 0)


# The lock.


def test_two_runs_in_one_folder(cut, whole):
    settings = cut(3)
    first = Run(settings, Distributed.start("cpu"), resume=True, console=Console(quiet=True))
    with pytest.raises(UserError, match=rf"output_dir = .* is in use by process {os.getpid()} on "):
        go(settings)
    first.train()
    assert_equal(settings, whole)
    assert "is done already" in go(settings)  # not locked any more


def test_a_run_that_fails_lets_go_of_the_folder(cut, whole):
    settings = cut(3)
    other = settings.model_copy(deep=True)
    other.seed = 7
    with pytest.raises(UserError, match="other settings") as error:
        go(other)
    assert error  # and with it the frames of the run
    go(settings)
    assert_equal(settings, whole)


HOLDER = """
import sys, time
from pathlib import Path
from advgrpo.runtime.folders import FolderLock
lock = FolderLock(Path(sys.argv[1]), "output_dir")
print("held", flush=True)
time.sleep(60)
"""


def test_a_killed_process_holds_no_lock(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], env=environment(), stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=rf"in use by process {process.pid} on "):
        FolderLock(tmp_path, "output_dir")
    with pytest.raises(UserError, match="in use by"):
        FolderLock(tmp_path, "output_dir", patience=0.3)
    ending = threading.Timer(0.5, process.kill)  # as the last start of a job under torchrun, which is being ended
    ending.start()
    FolderLock(tmp_path, "output_dir", patience=20.0).release()
    process.wait()


# What the run is made from.


def change_prompt(settings: Config) -> None:
    file = Path(settings.data.prompts)
    file.write_text("\n".join(file.read_text().splitlines()[:-1]) + "\n")


def change_held_out(settings: Config) -> None:
    file = Path(settings.data.held_out_prompts)
    file.write_text("\n".join(file.read_text().splitlines()[:-1]) + "\n")


def change_reference(settings: Config) -> None:
    folder = Path(settings.data.references)
    prompt = Path(settings.data.held_out_prompts).read_text().splitlines()[0]
    file = folder / json.loads((folder / "references.json").read_text())[prompt][0]
    with Image.open(file) as image:
        image.paste((1, 2, 3), (0, 0, 9, 9))
        image.save(file)


def change_weight(settings: Config) -> None:
    file = Path(settings.model.path) / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["decoder.conv_out.bias"][0] += 0.01
    save_file(tensors, file)


CHANGES = {  # what is changed, what that is said to be; a prompt's references are part of the run's
    "prompts": (change_prompt, {"prompts": r"data.prompts = '.*prompts.txt'", "references": "data.references = '.*'"}),
    "held_out_prompts": (
        change_held_out,
        {"held_out_prompts": r"data.held_out_prompts = '.*'", "references": "data.references = '.*'"},
    ),
    "references": (change_reference, {"references": r"data.references = '.*references'"}),
    "base": (change_weight, {"base": r"model.path = '.*model'"}),
}


@pytest.fixture(scope="module")
def made(unit_pipeline, unit_backbone, tmp_path_factory) -> tuple[Config, Path, Path]:
    """A run of two iterations with data and a model of its own, the folder of all of it, and a copy of that."""
    from advgrpo import tiny

    folder = tmp_path_factory.mktemp("own") / "now"
    folder.mkdir()
    settings = make_unit_config(unit_pipeline, unit_backbone, folder)
    settings.model.path = str(shutil.copytree(unit_pipeline, folder / "model"))
    settings.data.references = str(shutil.copytree(tiny.reference_dir(), folder / "references"))
    go(settings, False)
    settings.iterations = 3
    return settings, folder, Path(shutil.copytree(folder, folder.with_name("copy")))


@pytest.fixture
def own(made) -> Config:
    """That run as it was, to be changed."""
    settings, folder, copy = made
    shutil.rmtree(folder)
    shutil.copytree(copy, folder)
    return settings.model_copy(deep=True)


@pytest.mark.parametrize("name", some_weekly(CHANGES, {"held_out_prompts", "references"}))
def test_other_content_is_named_and_taken_only_by_consent(name, own):
    change, settings = CHANGES[name]
    named = ", ".join(rf"{what} \({setting}\)" for what, setting in settings.items())
    base = json.loads((newest(own) / STATE).read_text())["base"]
    change(own)
    for resume in (Resume("folder"), AUTO, Resume("folder", accepted=tuple(set(CHANGES) - set(settings)))):
        with pytest.raises(UserError, match=rf"the content of {named} has changed.*-changed {' '.join(settings)}$"):
            go(own, resume)
    assert names(own) == ["iteration-000002"]
    said = go(own, Resume("auto", accepted=tuple(settings)))
    assert f"going on with other content of {', '.join(settings)}" in said
    assert "base model: " in said  # evaluated again: what its metrics depend on has changed, or may have
    assert re.search(
        r"note: with other content of .* \(base at 0, final at 2\) .* is now evaluations.jsonl.old-1", said
    )
    assert evaluated(own, "evaluations.jsonl.old-1") == [("base", 0), ("final", 2)]
    assert evaluated(own) == [("base", 0), ("final", 3)]
    after = json.loads((newest(own) / STATE).read_text())["base"]
    assert (after == base) == (name == "prompts")
    assert "has changed" not in go(own)  # the new checkpoint knows


def test_on_other_prompts_the_best_is_sought_anew_and_the_start_is_judged_again(own, tmp_path):
    settings = own.model_copy(deep=True)
    settings.model.lora.start_from, settings.output_dir = str(Path(own.output_dir) / "lora"), str(tmp_path / "next")
    settings.evaluation.keep_best, settings.evaluation.every, settings.iterations = "dino_similarity", 1, 2
    go(settings, False)
    change_held_out(settings)
    settings.iterations = 3
    said = go(settings, Resume("folder", accepted=("held_out_prompts", "references")))
    assert re.search(
        r"lora-best was the best with other content of held_out_prompts, references: now lora-best.old-1", said
    )
    assert evaluated(settings) == [("base", 0), ("start", 0), ("final", 3)]
    assert json.loads((Path(settings.output_dir) / "summary.json").read_text())["best"]["best_iteration"] == 3
    before, after = (
        {line.stage: line.scores["dino_similarity"] for line in load_evaluations(Path(settings.output_dir) / name)}
        for name in ("evaluations.jsonl.old-1", "evaluations.jsonl")
    )
    assert after["start"] == pytest.approx(before["start"][:-1], abs=1e-6), "the same prompts but for the last"
    assert after["start"] != pytest.approx(before["final"][:-1], abs=1e-5)
    memory = json.loads((newest(settings) / STATE).read_text())["trainer"]["monitor"]["reward_hacking"]
    assert len(find(memory, "held-out dino_similarity: before")) == len(after["start"])


def find(memory: dict, key: str) -> list[float]:
    return memory[key] if key in memory else next(find(each, key) for each in memory.values() if isinstance(each, dict))


def change_lora(folder: Path) -> None:
    file = folder / "pytorch_lora_weights.safetensors"
    with safe_open(file, "pt") as opened:
        header = opened.metadata()
    save_file({name: tensor + 0.01 for name, tensor in load_file(file).items()}, file, header)


def test_a_run_that_ended_early_goes_on_where_it_is_judged_on_other_prompts(own):
    folder, accepted = newest(own), Resume("auto", accepted=("held_out_prompts", "references"))
    own.evaluation.keep_best, own.evaluation.stop_after, own.evaluation.every = "dino_similarity", 1, 9
    state = json.loads((folder / STATE).read_text())
    state["best"] = {"metric": "dino_similarity", "evaluated": 2, "without_gain": 1}
    (folder / STATE).write_text(json.dumps(state))
    rehash(folder)
    for resume in (AUTO, accepted):
        assert "the run has ended after iteration 2: 1 evaluation without gain" in go(own, resume)
    change_held_out(own)
    assert "going on with other content of held_out_prompts" in go(own, accepted)
    assert newest(own).name == "iteration-000003"


def test_a_start_that_has_changed_is_named_and_judged_again_by_consent(own, tmp_path):
    settings = own.model_copy(deep=True)
    start = shutil.copytree(Path(own.output_dir) / "lora", tmp_path / "start")
    settings.model.lora.start_from, settings.output_dir = str(start), str(tmp_path / "next")
    settings.iterations = 1
    go(settings, False)
    file, settings.iterations = Path(settings.output_dir) / "evaluations.jsonl", 2
    before = load_evaluations(file)
    assert "evaluating " not in go(settings, True)
    change_lora(start)
    settings.iterations = 3
    where = r"start \(model\.lora\.start_from = '.*'\)"
    with pytest.raises(UserError, match=rf"the content of {where} has changed.*by --accept-changed start$"):
        go(settings, True)
    said = go(settings, Resume("folder", accepted=("start",)))
    assert f"evaluating {start}" in said
    assert "base model: " not in said
    assert evaluated(settings) == [("base", 0), ("start", 0), ("final", 1), ("final", 2), ("final", 3)]
    after = load_evaluations(file)
    assert after[0] == before[0]
    assert after[1].scores != before[1].scores
    memory = json.loads((newest(settings) / STATE).read_text())["trainer"]["monitor"]["reward_hacking"]
    assert find(memory, "held-out dino_similarity: before") == pytest.approx(after[1].scores["dino_similarity"])


def test_a_teacher_that_has_changed_is_named_and_taken_only_by_consent(unit_config, tmp_path):
    unit_config.iterations = 1
    unit_config.data.held_out_prompts = ""
    teacher = unit_config.model_copy(deep=True)
    teacher.output_dir = str(tmp_path / "teacher")
    go(teacher, False)
    lora = Path(teacher.output_dir) / "lora"
    unit_config.update.kl_to, unit_config.update.kl_weight, unit_config.update.teacher = "teacher", 0.1, str(lora)
    go(unit_config, False)
    change_lora(lora)
    unit_config.iterations = 2
    where = rf"teacher \(update\.teacher = '{lora}'\)"
    with pytest.raises(UserError, match=rf"the content of {where} has changed.*by --accept-changed teacher$"):
        go(unit_config, True)
    assert "going on with other content of teacher" in go(unit_config, Resume("folder", accepted=("teacher",)))
    assert made_from(teacher, Sources([], [], None, {}))["teacher"] == "", "none is no content"


def test_checkpoints_of_before_there_were_hashes_are_continued(own):
    """Nor do they lack the state of torch's generator, which was saved then."""
    folder = newest(own)
    state = json.loads((folder / STATE).read_text())
    state.pop("made_from")
    state["config"]["data"].pop("fit")  # a setting that the program has got since
    (folder / STATE).write_text(json.dumps(state))
    save_file({**load_file(folder / TENSORS), "rng.torch": torch.get_rng_state()}, folder / TENSORS)
    rehash(folder)
    said = go(own, True)
    assert said.count("has no hashes of prompts, held_out_prompts, references, base, so they are not compared") == 1
    assert newest(own).name == "iteration-000003"
    assert len(metrics(own.output_dir)) == 3


def test_a_base_that_lacks_a_metric_is_judged_again_and_later_evaluations_stay(own):
    """As of an older program. Seen red: all of them went, and nobody was told."""
    folder = newest(own)
    state = json.loads((folder / STATE).read_text())
    del state["base"][next(iter(state["base"]))]
    (folder / STATE).write_text(json.dumps(state))
    rehash(folder)
    before = evaluated(own)
    own.iterations = 2
    (Path(own.output_dir) / "summary.json").unlink()
    said = go(own, True)
    assert "base model: " in said
    assert "evaluations.jsonl.old" not in said
    assert evaluated(own) == before == [("base", 0), ("final", 2)]


def evaluated(settings: Config, name: str = "evaluations.jsonl") -> list[tuple[str, int]]:
    return [(line.stage, line.iteration) for line in load_evaluations(Path(settings.output_dir) / name)]


@pytest.mark.weekly
@pytest.mark.slow
def test_of_several_processes_one_decides(cut, whole, tmp_path):
    """The others follow it to the checkpoint before the damaged one."""
    settings = cut(LAST)
    flip(newest(settings) / TENSORS)
    for told in ("--resume auto: skipped", "is done already"):
        done = forked(settings, tmp_path, "--resume", "auto", processes=2)
        said, errors = done.communicate()
        assert done.returncode == 0, errors
        assert said.count(told) == 1
        assert [row["iteration"] for row in metrics(settings.output_dir)] == list(range(LAST))


def test_auto_goes_with_an_output_folder_and_a_folder_with_none():
    """Seen red: the refusal of two folders took auto for one."""
    settings, start = parse(["--output-dir", "runs/a", "--resume", "auto"])
    assert (settings.output_dir, start.resume) == ("runs/a", "auto")
    with pytest.raises(UserError, match="--resume runs/a goes on in that folder: leave out --output-dir runs/b"):
        parse(["--output-dir", "runs/b", "--resume", "runs/a"])


def test_what_a_judge_is_told_of_a_prompt_belongs_to_the_prompts(unit_config):
    """GenEval's objects: with others the same prompts are another task."""
    hashes = [made_from(unit_config, Sources(["a cat"], [], None, {"a cat": {"count": n}})) for n in (1, 2)]
    assert [name for name in hashes[0] if hashes[0][name] != hashes[1][name]] == ["prompts"]


def test_a_judge_may_move_but_what_is_rewarded_stays():
    there, here = (config.load("tiny").model_dump(mode="json") for _ in range(2))
    here["rewards"]["remote"]["url"] = "http://elsewhere/"
    assert differences(there, here) == []
    here["rewards"]["adversary"]["weight"] += 1
    assert [each.split(":")[0] for each in differences(there, here)] == ["rewards.adversary.weight"]
