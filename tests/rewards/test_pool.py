"""Rewards with workers: the same scores wherever they are made, and nothing lost with a worker."""

from __future__ import annotations

import gc
import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console

from advgrpo import config
from advgrpo.config import PoolSection
from advgrpo.data.sources import Sources
from advgrpo.errors import RunFailure, UserError
from advgrpo.rewards.pool import queueing
from advgrpo.rewards.pool.queueing import Workers
from advgrpo.rewards.pool.recipe import RAISED, Host, Recipe, Task
from advgrpo.rewards.pool.reward import PooledReward
from advgrpo.rewards.pool.workers import WorkerDied
from advgrpo.runtime.distributed import Distributed
from advgrpo.runtime.watch import StopRequested
from advgrpo.training.build import build_early_rewards
from advgrpo.training.rewarded import RewardedObjective
from advgrpo.training.run import Run

JUDGES = '''
import os, random, sys, time
import numpy as np
import torch

def brightness(images, prompts):
    return images.mean(dim=(1, 2, 3))

def asleep(images, prompts):
    time.sleep(600)

def late(images, prompts):
    """What is drawn first not before something else is; a trial at once."""
    until = time.monotonic() + 30
    while sum(name.startswith("drawn") for name in os.listdir(os.path.dirname(__file__))) == 1:
        if time.monotonic() > until:
            raise TimeoutError("nothing else was drawn")
        time.sleep(0.01)
    return brightness(images, prompts)

def drawn(images, prompts):
    return torch.rand(len(prompts)) + torch.tensor(np.random.rand(len(prompts))) + random.random()

class Compares:
    def score(self, images, prompts, references):
        return brightness(images, prompts)

class Moody:
    """Ends its process, or falls asleep, the first times that it sees the prompt "dark"."""

    def __init__(self, marks, way, times=1):
        self.marks, self.way, self.times = marks, way, times

    def __call__(self, images, prompts):
        seen = len(os.listdir(self.marks))
        if "dark" in prompts and seen < self.times:
            open(os.path.join(self.marks, str(seen)), "w").close()
            if self.way == "dies":
                if os.fork() == 0:
                    time.sleep(60)  # holds the socket
                os._exit(7)
            time.sleep(600)
        if "slow" in prompts:
            time.sleep(60)
        return brightness(images, prompts)

class Wrong:
    def __init__(self, error="", late=""):
        self.late = late
        if error:
            raise ValueError(error)

    def __call__(self, images, prompts):
        if self.late:
            raise KeyError(self.late)
        return [float("nan")] * len(prompts)
'''
IMAGES = torch.rand(11, 3, 4, 4, generator=torch.Generator().manual_seed(0))
PROMPTS = [f"prompt {number}" for number in range(11)]
BRIGHTNESS = IMAGES.mean(dim=(1, 2, 3))


@pytest.fixture
def judges(tmp_path: Path) -> Path:
    file = tmp_path / "judges.py"
    file.write_text(JUDGES)
    return file


def recipe(judges: Path, judge: str, **options) -> Recipe:
    return Recipe("custom", "mine", "rewards.custom[0]", "cpu", "float32", options, f"{judges}:{judge}")


def silent(doing: str, *, within_seconds: float | None = None) -> None:
    pass


class Thread:
    """A worker without a process: what `Host` says, at once; one at a time, each with its own state of the generator
    that threads share."""

    lock = threading.Lock()

    def __init__(self) -> None:
        self.host, self.state = Host(), torch.get_rng_state()

    def ask(self, method: str, argument=None, *, within_seconds: float = 0.0):
        with self.lock:
            others = torch.get_rng_state()
            torch.set_rng_state(self.state)
            kind, value = self.host.answer(method, argument)
            self.state = torch.get_rng_state()
            torch.set_rng_state(others)
        if kind != "ok":
            raise RAISED[kind](value)
        return value

    def end(self) -> None:
        pass


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers are threads; what a process adds is tested by those that do not ask for this."""
    monkeypatch.setattr("advgrpo.rewards.pool.reward.starter", lambda kind, gpus: Thread)


def pooled(made: Recipe, tell=silent, **settings) -> PooledReward:
    return PooledReward(made, PoolSection(reward="mine", **settings), tell)


@pytest.mark.parametrize("workers", [1, 3])
def test_scores_are_those_of_the_reward_in_the_order_of_the_images(judges, threads, workers):
    reward = pooled(recipe(judges, "brightness"), workers=workers, batch_size=2)
    torch.testing.assert_close(reward.score(IMAGES, PROMPTS), BRIGHTNESS, rtol=0, atol=0)
    begun = [reward.begin(IMAGES[:5], PROMPTS[:5]), reward.begin(IMAGES[5:], PROMPTS[5:])]
    torch.testing.assert_close(reward.finish(begun, IMAGES.device), BRIGHTNESS, rtol=0, atol=0)


def test_what_a_reward_draws_does_not_depend_on_the_workers(judges, threads):
    found, left = [], []
    for workers in (1, 3):
        reward = pooled(recipe(judges, "drawn"), workers=workers, batch_size=2)
        torch.manual_seed(5)
        found.append(torch.cat([reward.score(IMAGES, PROMPTS), reward.score(IMAGES, PROMPTS)]))
        left.append(torch.rand(1))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)
    assert len(found[0].unique()) == 2 * len(IMAGES)
    torch.manual_seed(5)
    assert left == [torch.rand(1)] * 2, "nothing is drawn from the generator that other rewards draw from"


def test_a_process_that_ends_is_replaced_and_its_images_are_scored_again(judges, tmp_path):
    marks = tmp_path / "marks"
    marks.mkdir()
    reward = pooled(recipe(judges, "Moody", marks=str(marks), way="dies"), batch_size=4)
    prompts = [*PROMPTS[:6], "dark", *PROMPTS[7:]]
    torch.testing.assert_close(reward.score(IMAGES, prompts), BRIGHTNESS, rtol=0, atol=0)
    assert reward.replaced == 1
    os.kill(reward._workers.workers[0]._process.pid, signal.SIGKILL)  # between two batches
    torch.testing.assert_close(reward.score(IMAGES[:2], prompts[:2]), BRIGHTNESS[:2], rtol=0, atol=0)
    assert reward.replaced == 2
    process = reward._workers.workers[0]._process
    begun = reward.begin(IMAGES, ["slow", *PROMPTS[1:]])
    time.sleep(0.5)
    del reward
    gc.collect()
    assert process.wait(5) is not None  # workers end with whoever used them, in the middle of a score as well
    assert not begun.parts[-1].done()


@pytest.mark.weekly
def test_a_worker_ends_with_a_trainer_that_was_killed(judges):
    program = (
        "import sys, time; from advgrpo.rewards.pool.workers import ProcessWorker; "
        "from advgrpo.rewards.pool.recipe import Recipe; "
        f"r = Recipe('custom', 'mine', 'r', 'cpu', 'float32', {{}}, {str(judges) + ':asleep'!r}); "
        "w = ProcessWorker(); w.ask('build', r, within_seconds=60); print(w._process.pid, flush=True); "
        "import numpy as np; from advgrpo.rewards.pool.recipe import Task; "
        "w.ask('score', Task(np.zeros((1, 3, 4, 4), 'float32'), ['a'], 0), within_seconds=600)"
    )
    trainer = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    worker = int(trainer.stdout.readline())
    time.sleep(0.5)
    trainer.kill()
    trainer.wait()
    deadline = time.monotonic() + 20
    while Path(f"/proc/{worker}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.weekly
def test_a_worker_that_hangs_is_ended_and_replaced(judges, tmp_path):
    marks = tmp_path / "marks"
    marks.mkdir()
    reward = pooled(recipe(judges, "Moody", marks=str(marks), way="sleeps"), timeout=2.0)
    torch.testing.assert_close(reward.score(IMAGES[:1], ["dark"]), BRIGHTNESS[:1], rtol=0, atol=0)
    assert reward.replaced == 1


def test_a_batch_that_ends_every_worker_is_an_error(judges, threads, monkeypatch):
    class Fragile(Thread):
        def ask(self, method, argument=None, *, within_seconds=0.0):
            if method == "score" and "dark" in argument.prompts:
                raise WorkerDied("ended with signal 9")
            return super().ask(method, argument)

    monkeypatch.setattr("advgrpo.rewards.pool.reward.starter", lambda kind, gpus: Fragile)
    reward = pooled(recipe(judges, "brightness"), batch_size=1)
    with pytest.raises(RunFailure, match=r"3 workers have ended over one batch.*signal 9; its first prompt is 'dark'"):
        reward.score(IMAGES[:2], ["dark", "light"])
    assert reward.replaced == queueing.ATTEMPTS
    torch.testing.assert_close(reward.score(IMAGES[:1], ["light"]), BRIGHTNESS[:1], rtol=0, atol=0)  # the pool lives on


@pytest.mark.parametrize(
    ("judge", "options", "error", "words"),
    [
        ("Wrong", {"error": "no weights"}, UserError, r"rewards\.custom\[0\]\.import = .*no weights"),
        ("missing", {}, UserError, r"rewards\.custom\[0\]\.import"),
    ],
)
def test_a_reward_that_cannot_be_built_is_the_users_error_before_anything_is_scored(
    judges, threads, judge, options, error, words
):
    with pytest.raises(error, match=words):
        pooled(recipe(judges, judge, **options))


def test_a_class_that_takes_the_references_has_no_workers(unit_config, judges, threads):
    entry = {"name": "mine", "import": f"{judges}:Compares", "weight": 1.0}
    change = {"adversary": {"kind": "none"}, "rewards": {"custom": [entry], "pools": [{"reward": "mine"}]}}
    change["evaluation"] = {"metrics": []}
    settings = config.build(config.merge(unit_config.model_dump(mode="json"), change), "test")
    with pytest.raises(UserError, match=r"reward = 'mine', but rewards.custom\[0\].import = .* takes the references"):
        build_early_rewards(settings, Sources.read(settings), Distributed.start("cpu"))


def test_an_error_of_another_package_names_the_reward(threads, monkeypatch):
    def no_gpu(*arguments, **options):
        raise RuntimeError("CUDA error: invalid device ordinal")

    monkeypatch.setattr("advgrpo.rewards.pool.recipe.build_reward", no_gpu)
    made = Recipe("pickscore", "pickscore", "rewards.pickscore", "cuda:9", "float32", {})
    with pytest.raises(RunFailure, match=r"^reward pickscore: RuntimeError: CUDA error"):
        PooledReward(made, PoolSection(reward="pickscore"), silent)


def test_what_a_reward_raises_is_raised_here(judges, threads):
    with pytest.raises(FloatingPointError, match=r"reward mine.*nan"):
        pooled(recipe(judges, "Wrong")).score(IMAGES, PROMPTS)
    with pytest.raises(RunFailure, match=r"KeyError.*too late"):
        pooled(recipe(judges, "Wrong", late="too late")).score(IMAGES, PROMPTS)


def test_drawing_waits_where_too_many_batches_wait_and_can_be_stopped(judges, monkeypatch):
    free, scored = threading.Event(), []

    class Slow(Thread):
        def ask(self, method, argument=None, *, within_seconds=0.0):
            if method == "score":
                free.wait(60)
                scored.append(argument.prompts)
            return super().ask(method, argument)

    told: list[str] = []

    def tell(doing: str, *, within_seconds: float | None = None) -> None:
        told.append(doing)
        if len(told) > 1:
            raise StopRequested("a signal")

    monkeypatch.setattr("advgrpo.rewards.pool.reward.starter", lambda kind, gpus: Slow)
    reward = pooled(recipe(judges, "brightness"), tell, batch_size=1, queue=2)
    told.clear()
    began = time.monotonic()
    with pytest.raises(StopRequested):  # one is being scored, two wait, the fourth has no room
        reward.begin(IMAGES[:4], PROMPTS[:4])
    assert told == ["reward mine: waits for a free worker"] * 2
    assert time.monotonic() - began > 1
    free.set()


def test_a_full_queue_does_not_keep_workers_alive(judges):
    scoring = threading.Event()

    class Slow(Thread):
        def ask(self, method, argument=None, *, within_seconds=0.0):
            if method == "score":
                scoring.set()
                time.sleep(0.5)
            return super().ask(method, argument)

    before = set(threading.enumerate())
    workers = Workers(Slow, recipe(judges, "brightness"), count=1, room=1, within_seconds=1, starting_seconds=9)
    (thread,) = set(threading.enumerate()) - before
    task = Task(IMAGES[:1].numpy(), PROMPTS[:1], seed=0)
    workers.ask("score", lambda: task, PROMPTS[:1], lambda: None)
    assert scoring.wait(20)
    left = workers.ask("score", lambda: task, PROMPTS[:1], lambda: None)  # fills the queue
    workers.end()
    thread.join(20)
    assert not thread.is_alive()
    assert not left.done()


def test_a_run_with_workers_has_the_numbers_of_one_without_and_scores_while_it_draws(
    unit_config, judges, threads, monkeypatch
):
    order: list[str] = []
    monkeypatch.setattr(PooledReward, "begin", noted(order, "begin", PooledReward.begin))
    monkeypatch.setattr(RewardedObjective, "_sample", noted(order, "sample", RewardedObjective._sample))
    entry = {"name": "mine", "import": f"{judges}:brightness", "weight": 1.0}
    change = {"adversary": {"kind": "none"}, "rewards": {"custom": [entry]}, "evaluation": {"metrics": ["mine"]}}
    change["rollout"] = {"micro_batch": unit_config.rollout.group_size}
    rows = {}
    for pools in ((), ({"reward": "mine", "workers": 2, "batch_size": 1},)):
        change["rewards"]["pools"] = pools
        settings = config.build(config.merge(unit_config.model_dump(mode="json"), change), "test")
        trainer = Run(settings, Distributed.start("cpu"), resume=False, console=Console(quiet=True)).trainer
        order.clear()
        rows[bool(pools)] = [trainer.iterate() for _ in range(2)]
    timed = {name for name in rows[True][0] if "second" in name}
    assert [{k: v for k, v in row.items() if k not in timed} for row in rows[True]] == [
        {k: v for k, v in row.items() if k not in timed} for row in rows[False]
    ]
    assert order[:4] == ["sample", "begin", "sample", "begin"]  # and not after the last


def test_images_are_scored_while_the_next_ones_are_drawn(unit_config, judges, threads, monkeypatch):
    """The judge gives no score of the first micro-batch before the second is begun."""
    sample, drawn = RewardedObjective._sample, []

    def noticed(*arguments, **named):
        drawn.append(1)
        judges.with_name(f"drawn-{len(drawn)}").touch()
        return sample(*arguments, **named)

    monkeypatch.setattr(RewardedObjective, "_sample", noticed)
    entry = {"name": "mine", "import": f"{judges}:late", "weight": 1.0}
    change = {"adversary": {"kind": "none"}, "evaluation": {"metrics": ["mine"]}}
    change["rewards"] = {"custom": [entry], "pools": [{"reward": "mine", "workers": 1, "batch_size": 4}]}
    change["rollout"] = {"micro_batch": unit_config.rollout.group_size}
    settings = config.build(config.merge(unit_config.model_dump(mode="json"), change), "test")
    trainer = Run(settings, Distributed.start("cpu"), resume=False, console=Console(quiet=True)).trainer
    trainer.iterate()
    assert len(drawn) == 2


def noted(order: list[str], what: str, function):
    def wrapper(*arguments, **named):
        order.append(what)
        return function(*arguments, **named)

    return wrapper


@pytest.mark.weekly
@pytest.mark.skipif(
    importlib.util.find_spec("ray") is None and os.environ.get("ADVGRPO_RAY") != "required",
    reason="the extra ray is not installed: make ray",
)
def test_ray_actors_score_are_replaced_and_end(judges, tmp_path):
    import ray

    marks = tmp_path / "marks"
    marks.mkdir()
    ray.init(num_cpus=8, include_dashboard=False, log_to_driver=False, logging_level="error")
    try:
        made = recipe(judges, "Moody", marks=str(marks), way="dies")
        reward = pooled(made, kind="ray", workers=2, batch_size=4)
        prompts = [*PROMPTS[:6], "dark", *PROMPTS[7:]]
        torch.testing.assert_close(reward.score(IMAGES, prompts), BRIGHTNESS, rtol=0, atol=0)
        assert reward.replaced == 1
        with pytest.raises(UserError, match=r"rewards\.custom\[0\]\.import"):
            pooled(recipe(judges, "missing"), kind="ray")
        with pytest.raises(FloatingPointError, match=r"reward mine.*nan"):
            pooled(recipe(judges, "Wrong"), kind="ray").score(IMAGES, PROMPTS)
    finally:
        ray.shutdown()
