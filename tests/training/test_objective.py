"""An objective is one class, one line of build's registry, and what it asks of a run: nothing else knows it.

Bugs planted in a copy, each seen red: an objective's state left out of the checkpoint, or not loaded; the monitor
asked for images that nobody drew; tensors of an objective taken for nobody's; an objective's name asked for in
the plan; a trait missing from the registry of traits.
"""

import json
import re
from pathlib import Path
from typing import get_args

import pytest
import torch
from rich.console import Console

from advgrpo import config
from advgrpo.config import OBJECTIVES, ObjectiveTraits, UpdateSection
from advgrpo.errors import UserError
from advgrpo.runtime.distributed import Distributed
from advgrpo.training import build, restoring
from advgrpo.training.objective import Outcome
from advgrpo.training.run import Run

PACKAGE = Path(build.__file__).parents[1]


class Shrink:
    """Draws the weights to zero, and counts: what it remembers is a tensor and a number."""

    def __init__(self, parts):
        self.updater, self.distributed = parts.updater, parts.distributed
        self.seen, self.total = 0, torch.zeros(2)

    def iterate(self, iteration) -> Outcome:
        iteration.changes()
        with iteration.phase("update"):
            self.updater.zero_gradients()
            loss = sum(p.square().sum() for _, p in self.updater.named)
            loss.backward()
            norm = self.updater.step()
        self.updater.check(0.0, [norm.item()], iteration.number)
        self.seen, self.total = self.seen + 1, self.total + torch.tensor([1.0, iteration.number])
        return Outcome({"shrink_loss": loss.item(), "grad_norm": norm.item()})

    def state(self):
        return {"shrink.total": self.total.clone()}, {"seen": self.seen}

    def checked(self, tensors, state):
        found = restoring.taken(tensors, "shrink.", {"total": self.total})
        return Remembered(restoring.count(state, "seen"), found["total"])

    def load(self, found):
        self.seen, self.total = found.seen, found.total.clone()


class Remembered(restoring.Restorable):
    def __init__(self, seen, total):
        self.seen, self.total = seen, total

    @property
    def prefixes(self):
        return ["shrink."]


@pytest.fixture
def settings(unit_config, monkeypatch):
    """Of a run that shrinks; `update.objective` is set behind the validation's back, which knows the shipped ones."""
    traits = ObjectiveTraits(loss="shrink_loss", uses_rewards=False, samples_images=False, compares_groups=False)
    monkeypatch.setitem(OBJECTIVES, "shrink", traits)
    monkeypatch.setitem(build.OBJECTIVES, "shrink", Shrink)
    made = config.merge(unit_config.model_dump(), {"data": {"held_out_prompts": ""}, "iterations": 3})
    chosen = config.build(made, "test")
    chosen.update.__dict__["objective"] = "shrink"
    monkeypatch.setattr(Run, "export", lambda self: None)
    return chosen


def run(settings, **options) -> Run:
    return Run(settings, Distributed.start("cpu"), console=Console(quiet=True), **options)


def test_an_objective_that_nobody_knows_trains_is_watched_and_goes_on_where_it_stopped(settings):
    made = run(settings)
    with torch.no_grad():  # adapters that do something
        for _, parameter in made.trainer.policy.trainable_parameters():
            parameter.add_(0.1)
    assert made.trainer.objective.seen == 0
    rows = [made.trainer.iterate() for _ in range(2)]
    assert rows[0]["shrink_loss"] > rows[1]["shrink_loss"] > 0
    assert rows[0]["monitor_gradient_rms"] > 0
    assert not [name for name in rows[0] if "reward" in name or "discriminator" in name]
    assert made.trainer.flags == []  # slow_convergence is about groups that are compared
    tensors, state = made.trainer.state()
    state = json.loads(json.dumps(state))
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    made.close()
    other = run(settings)
    other.trainer.load(tensors, state)
    assert (other.trainer.iteration, other.trainer.objective.seen) == (2, 2)
    assert other.trainer.objective.total.tolist() == [2.0, 1.0]
    with pytest.raises(UserError, match=r"tensor shrink\.total is missing"):
        other.trainer.load({name: t for name, t in tensors.items() if name != "shrink.total"}, state)
    with pytest.raises(UserError, match=r"tensor head\.w1 is none of this run's"):
        other.trainer.load({**tensors, "head.w1": torch.zeros(1)}, state)


def test_an_iteration_that_is_abandoned_takes_the_objectives_memory_back(settings):
    trainer = run(settings).trainer
    trainer.iterate()
    real = trainer.updater.check
    trainer.updater.check = lambda *a: (real(*a), trainer.objective.total.fill_(7))[0]
    trainer.clean.end = lambda: None  # as where the error comes before the iteration's end
    trainer.iterate()
    trainer.abandon()
    assert (trainer.iteration, trainer.objective.seen, trainer.objective.total.tolist()) == (1, 1, [1.0, 0.0])


def test_names_traits_and_classes_go_together():
    names = set(get_args(UpdateSection.model_fields["objective"].annotation))
    assert names == OBJECTIVES.keys() == build.OBJECTIVES.keys()


def asked(pattern: str, besides: tuple[str, ...]) -> list[str]:
    """Lines of the package that match, outside some files and folders."""
    return [
        f"{path.relative_to(PACKAGE)}:{number}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if not str(path.relative_to(PACKAGE)).startswith(besides)
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if re.search(pattern, line)
    ]


def test_nobody_asks_for_an_objective_by_name():
    registries = ("config/objectives.py", "config/sections.py", "training/build.py", "experiments/")
    assert not asked(r"""["']sft["']|update\.objective (==|!=|in) """, registries)


def test_nobody_asks_for_a_kind_of_adversary():
    """But who builds one, checks its settings, or counts its bytes."""
    who_may = ("config/", "adversary/build.py", "training/preflight.py", "plan/judges.py", "plan/remedies.py")
    assert not asked(r"""adversary\.kind (==|!=|in) |\bkind (==|!=) ["'](dino|siglip|pickscore|none)["']""", who_may)
