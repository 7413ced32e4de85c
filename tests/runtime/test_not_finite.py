"""What is not finite is neither saved nor exported, and the checkpoint from before is kept, also the only one.

Bugs planted in a copy, each seen red: no check in `save`; none in `export`; the head's gradients left as they are; its
losses not read; the check of the state's numbers left out; the check after `save_checkpoint`.
"""

import math
from pathlib import Path

import pytest
import torch
from rich.console import Console

from advgrpo import config
from advgrpo.errors import RunFailure
from advgrpo.runtime.checkpoint import checkpoints, load_checkpoint, not_finite
from advgrpo.runtime.distributed import Distributed
from advgrpo.train import main
from advgrpo.training.run import Run
from advgrpo.training.trainer import Trainer
from tests.parts import some_weekly


@pytest.fixture
def settings(unit_config):
    unit_config.data.held_out_prompts = ""
    unit_config.output.checkpoint_every = unit_config.output.keep_checkpoints = 1
    return unit_config


def make(settings, *, resume=False) -> Run:
    return Run(settings, Distributed.start("cpu"), resume=resume, console=Console(quiet=True))


def spoil(tensor: torch.Tensor) -> None:
    tensor.view(-1)[tensor.numel() // 2] = math.nan


def first_slot(optimizer: torch.optim.Optimizer) -> torch.Tensor:
    return optimizer.state[optimizer.param_groups[0]["params"][0]]["exp_avg"]


SPOILED = {
    "policy": (lambda t: spoil(next(t.policy.trainable_parameters())[1].data), "policy."),
    "average": (lambda t: spoil(next(iter(t.ema.state_dict().values()))), "ema."),
    "moments": (lambda t: spoil(first_slot(t.updater.optimizer)), "optimizer.state"),
    "head": (lambda t: spoil(t.objective.scorer.adversary.head["w1"].data), "head.w1"),
    "head's moments": (lambda t: spoil(first_slot(t.objective.scorer.adversary.optimizer)), "head_optimizer.state"),
    "replay": (lambda t: spoil(t.objective.discriminator_trainer.replay.tensors["patches"]), "replay.patches"),
    "monitor": (lambda t: t.monitor.red_flags[0].baseline.update(peak=math.inf), "trainer.monitor.reward_collapse"),
}
WEEKLY = {"head's moments", "replay", "monitor"}  # of the parts of a checkpoint, as many as show that all are asked


def whole(settings, iteration: int) -> bool:
    """Whether that is the only checkpoint, with nothing in it that is not finite."""
    found = checkpoints(Path(settings.output_dir) / "checkpoints")
    assert [path.name for path in found] == [f"iteration-{iteration:06d}"]
    return not_finite(*load_checkpoint(found[0])) is None


@pytest.mark.parametrize("what", some_weekly(SPOILED, WEEKLY))
@pytest.mark.in_ci(2)
def test_it_is_named_and_the_checkpoint_from_before_can_be_continued(what, settings, monkeypatch):
    """In the last iteration, where the run would end with exit code 0."""
    plant, name = SPOILED[what]
    real = Trainer.iterate

    def iterate(self):
        metrics = real(self)
        if self.iteration == 2:
            plant(self)
        return metrics

    monkeypatch.setattr(Trainer, "iterate", iterate)
    with pytest.raises(RunFailure, match=rf"after 2 iterations {name}.* is not finite.*iteration-000001 is as it was"):
        make(settings).train()
    assert whole(settings, 1)
    assert not (Path(settings.output_dir) / "lora").exists()
    monkeypatch.undo()
    make(settings, resume=True).train()
    assert whole(settings, 2)


def test_the_command_says_it_in_one_line(settings, tmp_path, monkeypatch, capsys):
    real = Trainer.iterate
    monkeypatch.setattr(Trainer, "iterate", lambda self: (real(self), SPOILED["average"][0](self))[0])
    (tmp_path / "settings.yaml").write_text(config.dump(settings))
    assert main(["--config", str(tmp_path / "settings.yaml")]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: after 1 iterations ema.")
    assert said.endswith("Start again with a lower update.learning_rate\n")
    assert said.count("\n") == 1


def test_no_lora_is_exported(settings):
    made = make(settings)
    made.trainer.iterate()
    made.export()
    file = Path(settings.output_dir) / "lora" / "pytorch_lora_weights.safetensors"
    before = file.read_bytes()
    spoil(list(made.trainer.ema.state_dict().values())[-1])
    with pytest.raises(RunFailure, match=r"ema\..* is not finite, so nothing was exported"):
        made.export()
    assert file.read_bytes() == before
    assert not_finite(dict(made.trainer.policy.trainable_parameters())) is None  # its own weights are back


@pytest.mark.parametrize("where", ["gradient", "loss"])
def test_a_head_update_that_is_not_finite_is_left_out_and_ends_the_iteration(where, settings):
    trainer = make(settings).trainer
    trainer.iterate()
    before = {name: t.clone() for name, t in trainer.state()[0].items()}
    calls = []

    def reduce(tensors):
        calls.append(len(tensors))
        if calls.count(5) == 2 and len(tensors) == 5:  # the second update: four gradients and the loss
            tensors[0 if where == "gradient" else 4].view(-1)[-1] = math.inf

    trainer.objective.discriminator_trainer.reduce = reduce
    with pytest.raises(
        FloatingPointError, match=r"iteration 1: the adversary's loss or gradient .* discriminator update 2 of 2"
    ):
        trainer.iterate()
    after = trainer.state()[0]
    assert not_finite(after) is None
    changed = {name.partition(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed <= {"head", "head_optimizer"}  # the generator was not trained on


def test_a_learning_rate_beyond_reason_ends_the_run(settings):
    settings.adversary.learning_rate = 1e30
    settings.iterations = 4
    with pytest.raises((FloatingPointError, RunFailure)):
        make(settings).train()
    for path in checkpoints(Path(settings.output_dir) / "checkpoints"):
        assert not_finite(*load_checkpoint(path)) is None
    assert not (Path(settings.output_dir) / "lora").exists()


def test_numbers_are_found_however_deep():
    assert not_finite({"a": torch.ones(2), "b": torch.tensor([1, 2])}, {"x": [1.0, {"y": "nan"}]}) is None
    assert not_finite({"a": torch.ones(2), "b": torch.tensor([1.0, math.inf]).bfloat16()}) == "b"
    assert not_finite({}, {"x": [1.0, {"y": math.nan}]}) == "x.1.y"
    assert not_finite({"empty": torch.zeros(0)}) is None
