"""The moving average follows its formula, when it averages follows its rule, and the parameters keep no trace of it.

Planted in a copy, each seen red: iterations that train the reward not counted; the global step missing from the
checkpoint; looks before a step made after it; one look for five; no bound on the first decays.
"""

import copy
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from advgrpo.adversary.trainer import plan_updates
from advgrpo.config import AdversarySection
from advgrpo.errors import UserError
from advgrpo.runtime.distributed import Distributed
from advgrpo.training import ema as module
from advgrpo.training.ema import Ema
from advgrpo.training.run import Run


@pytest.fixture
def model():
    return torch.nn.Linear(3, 2)


def move(model, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))


def test_formula(model):
    expected = model.weight.detach().double()
    ema = Ema(model.named_parameters(), decay=0.9)
    for seed in range(5):
        move(model, seed)
        ema.step()
        expected = 0.9 * expected + 0.1 * model.weight.detach().double()
    torch.testing.assert_close(ema.state_dict()["weight"].double(), expected, rtol=1e-5, atol=1e-6)


def test_decay_zero_follows_the_parameters(model):
    ema = Ema(model.named_parameters(), decay=0.0)
    move(model, 1)
    ema.step()
    assert torch.equal(ema.state_dict()["weight"], model.weight)


def test_swap_shows_the_average_and_restores_every_bit(model):
    ema = Ema(model.named_parameters(), decay=0.5)
    move(model, 1)
    ema.step()
    with torch.no_grad():
        model.bias[0] = -0.0
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pointers = [parameter.data_ptr() for parameter in model.parameters()]
    with ema.swap():
        assert all(torch.equal(model.state_dict()[name], value) for name, value in ema.state_dict().items())
        assert not torch.equal(model.weight, before["weight"])
        assert [parameter.data_ptr() for parameter in model.parameters()] == pointers
    after = model.state_dict()
    assert all(torch.equal(after[name].view(torch.int32), before[name].view(torch.int32)) for name in before)
    assert not torch.equal(ema.state_dict()["weight"], model.weight)


def test_swap_restores_after_an_error(model):
    ema = Ema(model.named_parameters(), decay=0.5)
    move(model, 1)
    before = model.weight.detach().clone()
    with pytest.raises(KeyError), ema.swap():
        raise KeyError
    assert torch.equal(model.weight, before)
    ema.step()


def test_no_step_and_no_second_swap_while_swapped(model):
    ema = Ema(model.named_parameters(), decay=0.5)
    with ema.swap():
        with pytest.raises(RuntimeError, match="leave swap"):
            ema.step()
        with pytest.raises(RuntimeError, match="leave swap"):
            ema.swap().__enter__()


def test_state_round_trip_continues_bit_for_bit(model):
    ema = Ema(model.named_parameters(), decay=0.9)
    move(model, 1)
    ema.step()
    other = Ema(model.named_parameters(), decay=0.9)
    other.load_state_dict({name: value.clone() for name, value in ema.state_dict().items()})
    move(model, 2)
    ema.step()
    other.step()
    assert torch.equal(ema.state_dict()["weight"], other.state_dict()["weight"])


def test_a_foreign_state_is_refused(model):
    ema = Ema(model.named_parameters(), decay=0.9)
    with pytest.raises(UserError, match="'bias' is only in one"):
        ema.load_state_dict({"weight": model.weight})
    with pytest.raises(UserError, match=r"EMA of 'weight' is torch\.float32 \[3, 3\]"):
        ema.load_state_dict({"weight": torch.zeros(3, 3), "bias": model.bias})


def test_bad_arguments(model):
    with pytest.raises(ValueError, match=r"decay=1\.0"):
        Ema(model.named_parameters(), decay=1.0)
    with pytest.raises(ValueError, match="different names"):
        Ema([], decay=0.9)
    with pytest.raises(ValueError, match=r"parameter weight is torch\.bfloat16"):
        Ema(model.bfloat16().named_parameters(), decay=0.9)


def looks(path, *, mini_batches, trains_generator, until, minibatches=2, interval=8, decay=0.9):
    """Flow-GRPO's rule on one number, mini-batch by mini-batch: `path` [optimizer steps] are the weights.

    `trains_generator(iteration)`; an iteration that does not counts one global step. Returns the average after every
    iteration, how often it averaged, and how many optimizer steps were taken by `until` global steps.
    """
    average = weight = 0.0
    step = averaged = taken = 0
    history = []
    while step < until:
        if not trains_generator(len(history)):
            step += 1
        else:
            for number in range(minibatches * mini_batches):
                if number % mini_batches == mini_batches - 1:
                    weight, taken, step = path[taken], taken + 1, step + 1
                if (step + 1) % interval == 0:
                    average += (1 - min(decay, (1 + step) / (10 + step))) * (weight - average)
                    averaged += 1
        history.append(average)
    return history, averaged, taken


def test_the_released_runs_137_averages_in_182_optimizer_steps_of_910_iterations():
    """8 GPUs, 12 mini-batches of 8 images each, two optimizer steps in every tenth iteration, 1000 global steps."""
    path = torch.randn(200, dtype=torch.float64).cumsum(0).tolist()
    section = AdversarySection(schedule="alternate", alternate_period=10)

    def trains_generator(iteration):
        return plan_updates(section, iteration, 0.0, 0.0, optimizer_steps=2).generator

    expected, averaged, taken = looks(path, mini_batches=6, trains_generator=trains_generator, until=1000)
    assert (averaged, taken, len(expected)) == (137, 182, 910)
    weight = torch.zeros(1)
    ema, steps = Ema([("w", weight)], 0.9, mini_batches=6), iter(path)
    for iteration, average in enumerate(expected):
        if not trains_generator(iteration):
            ema.global_step += 1
        else:
            for _ in range(2):
                ema.before_step()
                weight.fill_(next(steps))
                ema.step()
        assert ema.state_dict()["w"].item() == pytest.approx(average, rel=1e-5, abs=1e-5)
    assert ema.global_step == 1001


@pytest.mark.parametrize("fast", [True, pytest.param(False, marks=pytest.mark.weekly)])
def test_a_run_averages_by_mini_batches_and_resumes_in_step(unit_config, monkeypatch, fast):
    """Every second iteration trains the reward alone; an interval of two, so that every kind of look is due."""
    monkeypatch.setattr(module, "INTERVAL", 2)
    unit_config.fast, unit_config.data.held_out_prompts = fast, ""
    unit_config.adversary.schedule, unit_config.adversary.alternate_period = "alternate", 2
    unit_config.update.learning_rate = 1e-2
    unit_config.update.ema_rule, unit_config.update.ema_mini_batches = "mini_batch", 3
    build = lambda: Run(unit_config, Distributed.start("cpu"), resume=False, console=Console(quiet=True)).trainer  # noqa: E731
    trainer, path = build(), []
    name, parameter = max(trainer.policy.trainable_parameters(), key=lambda pair: pair[1].numel())
    index = parameter.numel() // 2
    first, real = parameter.flatten()[index].item(), trainer.updater.stepper.step

    def step():
        norm = real()
        path.append(parameter.flatten()[index].item() - first)
        return norm

    monkeypatch.setattr(trainer.updater.stepper, "step", step)
    found = []
    for iteration in range(6):
        if iteration == 3:
            tensors, state = copy.deepcopy(trainer.state())
        trainer.iterate()
        found.append(trainer.ema.state_dict()[name].flatten()[index].item() - first)
    settings = {"mini_batches": 3, "interval": 2, "decay": unit_config.update.ema_decay}
    expected, averaged, _ = looks(path, trains_generator=lambda i: i % 2 == 1, until=9, **settings)
    assert (len(path), averaged) == (6, 9)
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-7)
    resumed = build()
    resumed.load(tensors, state)
    for _ in range(3):
        resumed.iterate()
    assert resumed.ema.global_step == trainer.ema.global_step == 9
    for key, average in trainer.ema.state_dict().items():
        assert torch.equal(resumed.ema.state_dict()[key], average)


def test_a_run_ends_at_its_global_steps(unit_config):
    """Reward (1), generator (3), reward (4): three iterations of ten, with all that the end of a run leaves."""
    unit_config.iterations, unit_config.global_steps, unit_config.data.held_out_prompts = 10, 4, ""
    unit_config.adversary.schedule, unit_config.adversary.alternate_period = "alternate", 2

    def run(resume):
        made = Run(unit_config, Distributed.start("cpu"), resume=resume, console=Console(quiet=True))
        made.train()

    run(resume=False)
    folder = Path(unit_config.output_dir)
    assert json.loads((folder / "summary.json").read_text())["iterations"] == 3
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["iteration-000003"]
    with pytest.raises(UserError, match="raise --global-steps to go on"):
        run(resume=True)
    unit_config.global_steps = 6
    run(resume=True)
    assert json.loads((folder / "summary.json").read_text())["iterations"] == 4
