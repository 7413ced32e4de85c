"""A run that ends before its time, by a signal or an error, loses the iteration under way and nothing else.

Bugs planted in a copy, each seen red: no copy of the iteration's start; the copy not taken back before the export; the
averaged weights saved for the trained ones; metrics of an iteration whose evaluation was cut short lost; no look for a
signal between micro-batches, between rewards or in an evaluation; nothing saved when scoring fails; SIGHUP not handled,
or handled although nohup ignores it; the second signal at once taken for a wish; printing to a terminal that is gone.
"""

import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from advgrpo.config import build, merge
from advgrpo.runtime.distributed import Distributed
from advgrpo.runtime.watch import StopRequested
from advgrpo.training import stopping
from advgrpo.training.clean_start import CleanStart
from advgrpo.training.ema import Ema
from advgrpo.training.objective import Iteration
from advgrpo.training.run import Run
from advgrpo.training.stopping import Keeper, signals_stop
from advgrpo.training.trainer import Trainer
from tests.conftest import make_unit_config
from tests.parts import some_weekly

ROOT = Path(__file__).parents[2]
ITERATIONS = 2


def make(settings, *, resume=False) -> Run:
    return Run(settings, Distributed.start("cpu"), resume=resume, console=Console(quiet=True))


@pytest.fixture(autouse=True)
def not_under_nohup():
    """Whoever runs the tests so has SIGHUP ignored, in this process and in its children."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture(scope="module")
def settings(unit_pipeline, unit_backbone, tmp_path_factory):
    """Two optimizer steps, discriminator updates and an evaluation in every iteration."""
    base = make_unit_config(unit_pipeline, unit_backbone, tmp_path_factory.mktemp("stopping"))
    changes = {
        "iterations": ITERATIONS,
        "rollout": {"micro_batch": 2},
        "update": {"minibatches": 2},
        "rewards": {"rule": {"weight": 0.5}},
        "evaluation": {"every": 1, "grid_prompts": 1},
        "output": {"checkpoint_every": 0},
    }
    return build(merge(base.model_dump(), changes), "test")


@pytest.fixture(scope="module")
def undisturbed(settings):
    """The folder of a run that nobody stops, with the checkpoint of every iteration."""
    own = settings.model_copy(deep=True)
    own.output_dir = str(Path(settings.output_dir).with_name("undisturbed"))
    own.output.checkpoint_every, own.output.keep_checkpoints = 1, 10
    make(own).train()
    return Path(own.output_dir)


@pytest.fixture
def own(settings, tmp_path):
    own = settings.model_copy(deep=True)
    own.output_dir = str(tmp_path / "run")
    return own


def rows(folder) -> list[dict]:
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if "second" not in k} for line in lines]


def assert_same_checkpoint(folder, other, iteration: int, *, evaluated: bool = True) -> None:
    """Where one run has not come to its evaluation, what the monitor remembers of those is left out."""
    ours, theirs = (Path(each) / "checkpoints" / f"iteration-{iteration:06d}" for each in (folder, other))
    tensors, expected = (load_file(each / "tensors.safetensors") for each in (ours, theirs))
    assert tensors.keys() == expected.keys()
    assert [k for k in expected if k != "rng.torch" and not torch.equal(tensors[k], expected[k])] == []
    state, expected = (json.loads((each / "state.json").read_text()) for each in (ours, theirs))
    for each in () if evaluated else (state, expected):
        del each["trainer"]["monitor"]
    assert state["trainer"] == expected["trainer"]
    assert state["base"] == expected["base"]


def at(monkeypatch, doing: str, iteration: int, run: Run, action) -> list[str]:
    """Do `action` once, where `doing` begins in `iteration`; returns all that has begun, which grows."""
    real, begun = run.distributed.progress, []

    def progress(what, **limits):
        here = what.startswith(doing) and run.trainer.iteration == iteration
        if here and not any(each.startswith(f"{iteration} {doing}") for each in begun):
            action()
        begun.append(f"{run.trainer.iteration} {what}")
        real(what, **limits)

    monkeypatch.setattr(run.distributed, "progress", progress)
    return begun


def within(monkeypatch, judge, iteration: int, run: Run, action) -> None:
    """Do `action` while `judge` scores in `iteration`, which must not go on after it."""
    real = judge.score

    def score(*arguments):
        if run.trainer.iteration == iteration:
            action()
            pytest.fail("not broken off")
        return real(*arguments)

    monkeypatch.setattr(judge, "score", score)


PLACES = {  # what is begun when the signal comes: (signal, in iteration, what is saved)
    "sample: micro-batch": (signal.SIGTERM, 0, 0),
    "reward adversary: micro-batch": (signal.SIGINT, 1, 1),
    "reward rule": (signal.SIGTERM, 1, 1),
    "evaluate: metric": (signal.SIGTERM, 1, 1),  # the iteration is done, its row is not written
    "draw samples": (signal.SIGHUP, 1, 1),
}


@pytest.mark.parametrize("doing", some_weekly(PLACES, ["reward rule", "draw samples"]))
@pytest.mark.in_ci(2)
def test_a_signal_ends_the_run_where_it_is_and_nothing_is_lost(doing, own, undisturbed, monkeypatch):
    number, iteration, saved = PLACES[doing]
    run = make(own)
    kill = lambda: os.kill(os.getpid(), number)  # noqa: E731
    judges = {
        "reward rule": run.trainer.objective.scorer.rewards["rule"],
        "evaluate: metric": run.evaluator.metrics["rule_accuracy"],
    }
    if doing in judges:
        within(monkeypatch, judges[doing], iteration, run, kill)
    begun = at(monkeypatch, doing, iteration, run, kill if doing not in judges else lambda: None)
    run.train()
    assert run.stopped == number.name
    after = begun[next(i for i, each in enumerate(begun) if each.startswith(f"{iteration} {doing}")) + 1 :]
    assert [each for each in after if not each.startswith(f"{iteration} {doing}")] == [
        f"{iteration} write a checkpoint",
        f"{iteration} write the report",
        f"{iteration} finish the trackers",
    ]
    assert len(after) == (4 if doing == "evaluate: metric" else 3), "other work was begun first"
    assert [each.name for each in (Path(own.output_dir) / "checkpoints").iterdir()] == [f"iteration-{saved:06d}"]
    if saved:
        assert_same_checkpoint(own.output_dir, undisturbed, saved, evaluated=doing != "evaluate: metric")
    if doing.startswith(("evaluate", "draw")):
        assert rows(own.output_dir) == []
    else:
        assert rows(own.output_dir) == rows(undisturbed)[:saved]
    if doing == "evaluate: metric":
        make(own, resume=True).train()
        assert rows(own.output_dir) == rows(undisturbed)
        assert_same_checkpoint(own.output_dir, undisturbed, ITERATIONS)


def test_a_signal_after_an_optimizer_step_goes_back_to_the_iterations_start(own, undisturbed, monkeypatch):
    """By then the head has learned, the replay buffer has grown, and weights, moments and average have moved."""
    run = make(own)
    steps = count_steps(run, monkeypatch, 3, lambda: os.kill(os.getpid(), signal.SIGHUP))
    run.train()
    assert (run.stopped, len(steps)) == ("SIGHUP", 3)
    assert run.trainer.iteration == 1
    assert_same_checkpoint(own.output_dir, undisturbed, 1)
    file = Path(own.output_dir) / "lora" / "pytorch_lora_weights.safetensors"
    exported = load_file(file)
    make(own, resume=True).export()
    fresh = load_file(file)
    assert all(torch.equal(exported[name], fresh[name]) for name in fresh), "of the abandoned iteration"


def count_steps(run: Run, monkeypatch, which: int, action) -> list:
    """Do `action` after the optimizer step number `which` of the run; returns all that were taken."""
    real, taken = run.trainer.updater.step, []

    def step(*arguments):
        taken.append(real(*arguments))
        if len(taken) == which:
            action()
        return taken[-1]

    monkeypatch.setattr(run.trainer.updater, "step", step)
    return taken


def test_a_stop_before_the_first_iteration_leaves_nothing_to_continue(own, monkeypatch, capsys):
    run = Run(own, Distributed.start("cpu"), resume=False, console=Console(width=200))
    at(monkeypatch, "evaluate: prompt", 0, run, lambda: os.kill(os.getpid(), signal.SIGTERM))
    run.train()
    assert "stopped by SIGTERM after 0 iterations; start it again" in capsys.readouterr().out
    assert not (Path(own.output_dir) / "checkpoints").exists()
    assert not (Path(own.output_dir) / "metrics.jsonl").exists()


def test_a_stop_in_the_last_evaluation_repeats_only_that(own, undisturbed, monkeypatch):
    shutil.copytree(undisturbed, own.output_dir)
    (Path(own.output_dir) / "summary.json").unlink()
    run = make(own, resume=True)
    at(monkeypatch, "evaluate: metric", ITERATIONS, run, lambda: os.kill(os.getpid(), signal.SIGTERM))
    run.train()
    assert run.stopped == "SIGTERM"
    assert not (Path(own.output_dir) / "summary.json").exists()
    again = make(own, resume=True)
    assert again.trainer.finished
    again.train()
    assert again.stopped == ""
    final = [json.loads((folder / "summary.json").read_text())["final"] for folder in (again.folder, undisturbed)]
    assert final[0] == final[1]


def fail(*_):
    raise FloatingPointError("no number")


@pytest.mark.parametrize("where", ["scoring", "update"])
def test_an_error_leaves_a_checkpoint_of_the_iterations_before_it(where, own, undisturbed, monkeypatch):
    run = make(own)
    if where == "scoring":
        at(monkeypatch, "reward rule", 1, run, fail)
    else:
        count_steps(run, monkeypatch, 3, fail)
    with pytest.raises(FloatingPointError, match="no number"):
        run.train()
    assert_same_checkpoint(own.output_dir, undisturbed, 1)


def test_an_error_counts_for_more_than_one_in_saving_after_it(own, monkeypatch, capsys):
    run = make(own)
    at(monkeypatch, "reward rule", 1, run, fail)
    monkeypatch.setattr(
        "advgrpo.training.run.checkpoints.save_checkpoint", lambda *_: (_ for _ in ()).throw(OSError("full"))
    )
    with pytest.raises(FloatingPointError, match="no number"):
        run.train()
    assert "what was trained since the last checkpoint could not be saved: full" in capsys.readouterr().err


def test_an_error_in_the_first_iteration_saves_nothing(own, monkeypatch):
    run = make(own)
    at(monkeypatch, "reward rule", 0, run, fail)
    with pytest.raises(FloatingPointError, match="no number"):
        run.train()
    assert not (Path(own.output_dir) / "checkpoints").exists()


# What the parts do, without a run.


def state_of(value: float):
    return lambda: ({"weight": torch.full((2,), value)}, {"trainer": {"iteration": 3}})


def test_the_state_is_the_copy_while_it_changes():
    live = {"weight": torch.zeros(2)}, {"iteration": [1]}
    clean = CleanStart(lambda: live, copies=True)
    clean.begin()
    live[0]["weight"].fill_(5)
    live[1]["iteration"][0] = 2
    with clean.state() as (tensors, rest):
        assert tensors["weight"].tolist() == [0, 0]
        assert rest == {"iteration": [1]}
    assert clean.known
    with pytest.raises(KeyError), clean.changed():
        raise KeyError
    with clean.state() as (tensors, _):
        assert tensors is live[0]


def test_without_a_copy_there_is_no_state_while_it_changes():
    clean = CleanStart(state_of(1.0), copies=False)
    clean.begin()
    with clean.state() as state:
        assert state is None
    assert not clean.known


def test_no_change_begins_while_somebody_saves():
    clean, began = CleanStart(state_of(1.0), copies=True), threading.Event()
    thread = threading.Thread(target=lambda: (clean.begin(), began.set()))
    with clean.state():
        thread.start()
        assert not began.wait(0.2)
    thread.join()
    assert began.is_set()


def test_without_a_copy_an_update_is_not_left(monkeypatch):
    """Full fine-tuning: the iteration is finished from there on."""
    job = Distributed.start("cpu")
    for copies in (True, False):
        part = Iteration(0, None, CleanStart(state_of(1.0), copies=copies), job)
        part.changes()
        assert list(part.stoppable([1, 2], "update: micro-batch")) == [1, 2]
    job.ask_to_stop("SIGTERM")
    assert list(part.stoppable([1, 2], "update: micro-batch")) == [1, 2]
    part.clean.end()
    with pytest.raises(StopRequested, match="SIGTERM"):
        list(part.stoppable([1, 2], "update: micro-batch"))


def test_averaged_weights_are_not_taken_for_the_trained_ones():
    model = torch.nn.Linear(2, 1)
    ema = Ema(model.named_parameters(), decay=0.5)
    with torch.no_grad():
        model.weight.fill_(7)
    part = SimpleNamespace(ema=ema, clean=CleanStart(lambda: (dict(model.named_parameters()), {}), copies=True))
    with Trainer.averaged(part):
        assert not (model.weight == 7).any()
        with part.clean.state() as (tensors, _):
            assert (tensors["weight"] == 7).all()


def test_a_checkpoint_may_take_as_long_as_a_slow_disk_needs(monkeypatch):
    job, told = Distributed.start("cpu"), []
    monkeypatch.setattr(job, "progress", lambda doing, within_seconds: told.append((doing, within_seconds)))
    job.timeout_seconds = 40.0
    trainer = SimpleNamespace(iteration=3, clean=CleanStart(state_of(1.0), copies=True))
    keeper = Keeper(lambda tensors, state: None, trainer, job, 3)
    keeper.keep()
    assert told == [], "there is a checkpoint of it"
    keeper.save()
    assert told == [("write a checkpoint", pytest.approx(40, abs=0.01))]
    keeper._save({"weight": torch.empty(10**9, dtype=torch.uint8, device="meta")}, {"trainer": {"iteration": 4}})
    assert told[-1][1] == 40 + 1e9 / 20e6


def test_a_second_signal_ends_the_process_unless_it_is_the_same_wish(monkeypatch):
    clock, job = [100.0], Distributed.start("cpu")
    monkeypatch.setattr(stopping.time, "monotonic", lambda: clock[0])
    with signals_stop(job):
        os.kill(os.getpid(), signal.SIGTERM)
        clock[0] += 1  # torchrun hands on what the scheduler has sent to everybody
        os.kill(os.getpid(), signal.SIGTERM)
        assert job.stop_reason == "SIGTERM"
        clock[0] += 2
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_waiting_for_a_judge_is_broken_off_at_once():
    job = Distributed.start("cpu")
    began = time.monotonic()
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
    with signals_stop(job), pytest.raises(StopRequested, match="SIGTERM"), job.interruptible():
        time.sleep(20)
    assert time.monotonic() - began < 10
    with signals_stop(job), pytest.raises(StopRequested), job.interruptible():
        pytest.fail("it was asked to stop before")


def test_a_signal_in_the_middle_of_a_print_does_no_harm(monkeypatch):
    """Rich imports parts of itself, and waits for its own locks, while it prints."""
    job, printing = Distributed.start("cpu"), []

    def show(*_, **__):
        assert not printing
        printing.append(True)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Console, "print", show)
    monkeypatch.setattr("builtins.print", show)
    with signals_stop(job):
        Console().print("hello")
    assert job.stop_reason == "SIGTERM"


def test_nohup_is_respected():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals_stop(Distributed.start("cpu")):
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


HUNG_UP = """
import sys, time
from rich.console import Console
from advgrpo.runtime.distributed import Distributed
from advgrpo.training.stopping import signals_stop
from advgrpo.runtime.watch import StopRequested

job, console = Distributed.start("cpu"), Console()
try:
    with signals_stop(job):
        print("ready", flush=True)
        while True:
            job.check_stop()
            time.sleep(0.05)
except StopRequested as reason:
    console.print("to nobody")
    print("to nobody", file=sys.stderr, flush=True)
    open(sys.argv[1], "w").write(str(reason))
"""


def test_a_terminal_that_is_closed_does_not_end_a_run_unsaved(tmp_path):
    """The kernel sends SIGHUP to the terminal's foreground processes, whose output then fails."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    controller, terminal = pty.openpty()
    ours = "import os, fcntl, sys, termios; os.setsid(); fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
    process = subprocess.Popen(
        [sys.executable, "-c", ours + HUNG_UP, tmp_path / "reason"],
        env=environment,
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
    )
    os.close(terminal)
    shown = b""
    while b"ready" not in shown:
        shown += os.read(controller, 1000)
    os.close(controller)
    assert process.wait(30) == 0
    assert (tmp_path / "reason").read_text() == "SIGHUP"
