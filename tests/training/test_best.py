"""`evaluation.keep_best` and `stop_after`: which LoRA is kept, when a run ends, and that stopping in between changes
neither."""

import io
import json
import subprocess
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file

from advgrpo import config
from advgrpo.errors import UserError
from advgrpo.evaluation.evaluator import Evaluator
from advgrpo.policy.lora_file import read_lora
from advgrpo.runtime.distributed import Distributed
from advgrpo.training.best import Best
from advgrpo.training.resuming import Resume
from advgrpo.training.run import Run
from tests.training.test_run import command, environment, metrics

NAME = "dino_similarity"
LORA = "pytorch_lora_weights.safetensors"
RISE_AND_FALL = [0.3, 0.5, 0.9, 0.8, 0.85, 0.7, 0.95]  # after iterations 1, 2, ...


@pytest.fixture
def settings(unit_config):
    unit_config.iterations, unit_config.evaluation.every, unit_config.evaluation.keep_best = 6, 1, NAME
    unit_config.evaluation.metrics, unit_config.evaluation.images_per_prompt = (NAME,), 2
    return unit_config


@pytest.fixture
def judged(monkeypatch):
    """Evaluations have the values of RISE_AND_FALL, whatever the images; the base model is better than all."""

    def judge(made, values=RISE_AND_FALL):
        def scores(self, images_per_prompt):
            value = 0.99 if self.of_base else values[made.trainer.iteration - 1]
            images = value + 0.1 * torch.arange(images_per_prompt, dtype=torch.float64)
            return {NAME: images.expand(len(self.prompts), -1)}

        monkeypatch.setattr(Evaluator, "scores", scores)

    return judge


def make(settings, judge=None, *, resume=False, values=RISE_AND_FALL, said=None):
    made = Run(
        settings, Distributed.start("cpu"), resume=resume, console=Console(file=said or io.StringIO(), width=200)
    )
    if judge is not None:
        judge(made, values)
    made.train()
    return made


def header(folder: Path) -> dict:
    with safe_open(folder / "lora-best" / LORA, "pt") as file:
        found = json.loads(file.metadata()["advgrpo_best"])
    return {**found, "value": round(found["value"], 9)}


def other(settings, tmp_path, name):
    again = settings.model_copy(deep=True)
    again.output_dir = str(tmp_path / name)
    return again


def test_the_best_is_kept_beside_the_last_and_the_run_ends_after_evaluations_without_gain(settings, judged):
    settings.evaluation.stop_after = 2
    said = io.StringIO()
    made = make(settings, judged, said=said)
    folder = Path(settings.output_dir)
    assert made.trainer.iteration == 5  # the best after 3, then 0.8 and 0.85
    assert made.stopped == ""
    assert header(folder) == {"metric": NAME, "value": 0.9, "iteration": 3}
    rows = metrics(folder)
    assert [row["evaluations_without_gain"] for row in rows] == [0, 0, 0, 1, 2]
    assert [row["best_iteration"] for row in rows] == [1, 2, 3, 3, 3]
    summary = json.loads((folder / "summary.json").read_text())
    best = {"metric": NAME, "best_value": pytest.approx(0.9), "best_iteration": 3, "evaluations_without_gain": 2}
    assert summary["best"] == best
    why = "2 evaluations without gain of dino_similarity over 0.9000 at iteration 3 (evaluation.stop_after = 2)"
    assert summary["ended_early"] == why
    assert f"ended after iteration 5: {why}" in said.getvalue()
    assert f"iteration 3: {NAME} 0.9000 is the best so far, 0.5000 at iteration 2 before; kept in" in said.getvalue()
    for name in ("curves.png", "samples/final.png", f"lora/{LORA}", "lora/README.md", "checkpoints/iteration-000005"):
        assert (folder / name).exists(), name
    assert not torch.equal(_weights(folder / "lora"), _weights(folder / "lora-best"))


def test_what_is_kept_is_what_a_run_of_that_length_exports(settings, judged, tmp_path):
    make(settings, judged)
    short = other(settings, tmp_path, "short")
    short.iterations, short.evaluation.keep_best = 3, ""
    make(short, judged)
    kept, exported = (read_lora(Path(run.output_dir) / name, "").modules
                      for run, name in ((settings, "lora-best"), (short, "lora")))  # fmt: skip
    assert kept.keys() == exported.keys()
    assert all(torch.equal(ours, theirs) for name in kept for ours, theirs in zip(kept[name], exported[name]))
    assert not (Path(short.output_dir) / "lora-best").exists()


@pytest.mark.weekly
def test_the_last_evaluation_counts_by_the_images_that_the_others_have(settings, judged):
    """The final evaluation has more images, whose mean is 0.05 higher here: it must not win by that."""
    settings.iterations = 4
    make(settings, judged)
    assert header(Path(settings.output_dir))["iteration"] == 3
    settings.iterations = 7
    make(settings, judged, resume=True)
    assert header(Path(settings.output_dir)) == {"metric": NAME, "value": 0.95, "iteration": 7}


@pytest.mark.parametrize("stopped_at", [pytest.param(2, marks=pytest.mark.weekly), 4])
def test_a_resumed_run_keeps_and_ends_as_one_that_never_stopped(settings, judged, tmp_path, stopped_at):
    settings.evaluation.stop_after, settings.output.checkpoint_every = 2, 1
    whole = other(settings, tmp_path, "whole")
    make(whole, judged)
    made = Run(settings, Distributed.start("cpu"), resume=False, console=Console(quiet=True))
    judged(made)
    real = made._draw_samples

    def fails(name, scores):  # in the middle of an evaluation that is counted in, but not logged yet
        real(name, scores)
        if made.trainer.iteration == stopped_at:
            raise OSError("disk")

    made._draw_samples = fails
    with pytest.raises(OSError, match="disk"):
        made.train()
    resumed = make(settings, judged, resume=True)
    assert resumed.trainer.iteration == 5
    ours, theirs = Path(settings.output_dir), Path(whole.output_dir)
    assert metrics(ours) == metrics(theirs)
    assert _bytes(ours / "lora-best") == _bytes(theirs / "lora-best")
    assert _bytes(ours / "lora") == _bytes(theirs / "lora")
    last = "checkpoints/iteration-000005/tensors.safetensors"
    assert (ours / last).read_bytes() == (theirs / last).read_bytes()


@pytest.mark.weekly
def test_the_file_of_a_future_that_does_not_come_is_replaced(settings, judged, tmp_path):
    settings.output.checkpoint_every = 1
    settings.output.keep_checkpoints = 9
    make(settings, judged)
    folder = Path(settings.output_dir)
    fork = other(settings, tmp_path, "fork")
    fork.iterations = 3
    falling = [0.3, 0.5, 0.4]
    resume = Resume("checkpoint", folder / "checkpoints" / "iteration-000002")
    make(fork, judged, resume=resume, values=falling)
    assert header(Path(fork.output_dir)) == {"metric": NAME, "value": 0.5, "iteration": 2}
    settings.iterations = 3
    make(settings, judged, resume=resume, values=falling)  # in its own folder, where the best is of iteration 3
    assert header(folder) == {"metric": NAME, "value": 0.5, "iteration": 2}
    assert _bytes(folder / "lora-best") == _bytes(Path(fork.output_dir) / "lora-best")


@pytest.mark.weekly
def test_a_run_that_has_ended_goes_on_once_it_may_wait_longer(settings, judged):
    settings.evaluation.stop_after = 2
    make(settings, judged)
    with pytest.raises(
        UserError, match=r"ended after iteration 5: 2 evaluations without gain .*raise it, or set it to 0"
    ):
        Run(settings, Distributed.start("cpu"), resume=True, console=Console(quiet=True))
    done = Run(settings, Distributed.start("cpu"), resume="auto", console=Console(quiet=True))
    assert "without gain" in done.nothing_left
    done.close()
    settings.evaluation.stop_after, settings.iterations = 3, 7
    assert make(settings, judged, resume=True).trainer.iteration == 6


@pytest.mark.slow
@pytest.mark.weekly
def test_two_processes_keep_and_end_as_one(settings, tmp_path):
    """With real evaluations: both processes must see the same end, and one of them writes."""
    settings.iterations, settings.rollout.micro_batch = 4, 2
    settings.evaluation.stop_after, settings.output.checkpoint_every = 1, 1
    two = other(settings, tmp_path, "two")
    done = subprocess.run(
        command(two, tmp_path, processes=2), env=environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    make(settings)
    ours, theirs = Path(settings.output_dir), Path(two.output_dir)
    assert len(metrics(theirs)) == len(metrics(ours))
    best, alone = header(theirs), header(ours)
    assert best["iteration"] == alone["iteration"]
    assert best["value"] == pytest.approx(alone["value"], rel=1e-4)
    both, one = _weights(theirs / "lora-best"), _weights(ours / "lora-best")
    assert (both - one).norm() < 0.05 * one.norm()  # Adam makes a step of the sign of what rounding leaves of zero


def test_less_is_better_where_it_is(monkeypatch):
    monkeypatch.setattr(config.judge_checks, "LOWER_IS_BETTER", frozenset({"distance"}))
    best = Best("distance")
    for iteration, value in enumerate((3.0, 2.0, 2.5), 1):
        best = best.after({"eval_distance": value}, iteration, {})
    assert (best.value, best.iteration, best.without_gain) == (2.0, 2, 1)


def test_what_is_no_number_and_an_equal_value_are_no_gain():
    best = Best(NAME).after({f"eval_{NAME}": float("nan")}, 1, {})
    assert (best.value, best.without_gain) == (None, 1)
    best = best.after({f"eval_{NAME}": 0.5}, 2, {}).after({f"eval_{NAME}": 0.5}, 3, {})
    assert (best.iteration, best.without_gain) == (2, 1)
    assert best.after({f"eval_{NAME}": 0.9}, 3, {}) is best  # counted in already: a run resumed in between


def _weights(folder: Path) -> torch.Tensor:
    return torch.cat([tensor.flatten() for _, tensor in sorted(load_file(folder / LORA).items())])


def _bytes(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}
