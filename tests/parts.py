"""The trainer's parts from a test's settings, as `training.build` makes them."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image

from advgrpo.config import Config
from advgrpo.evaluation.evaluator import Evaluator
from advgrpo.generate import main as generate
from advgrpo.policy.base import Policy
from advgrpo.rewards.base import Reward
from advgrpo.runtime.distributed import Distributed
from advgrpo.runtime.graphs import GraphBackend
from advgrpo.sampling.dynamics import window_steps
from advgrpo.training.update import Updater
from tests.conftest import is_second


def some_weekly(values: Iterable[str], weekly: Collection[str]) -> list:
    """For parametrize: all of the values, of which `make test` runs those of `weekly` and CI does not."""
    return [pytest.param(value, marks=[pytest.mark.weekly] * (value in weekly)) for value in values]


def every_second(*choices: Sequence) -> list:
    """For parametrize: all combinations, of which CI runs every second one. Of three arguments and more any two values
    meet there, of two each value has its turn; `make test` runs the others as well."""
    found = []
    for places in itertools.product(*(range(len(values)) for values in choices)):
        values = [of[place] for of, place in zip(choices, places, strict=True)]
        found.append(pytest.param(*values, marks=[pytest.mark.weekly] * is_second(places)))
    return found


def updater_of(policy: Policy, settings: Config, graphs: GraphBackend | None = None) -> Updater:
    """The fused one, alone."""
    sections = settings.update, settings.rollout, settings.advantage
    return Updater(policy, *sections, reduce=lambda tensors: None, fused=True, graphs=graphs)


def evaluator_of(
    policy: Policy | None, settings: Config, prompts: list[str], metrics: Mapping[str, Reward] | None = None
) -> Evaluator:
    """Without references."""
    sections = settings.evaluation, settings.rollout.micro_batch, settings.seed
    return Evaluator(policy, metrics, None, prompts, *sections, Distributed.start("cpu"))


def steps_of(settings: Config, iteration: int) -> tuple[int, ...]:
    """The iteration's stochastic steps."""
    return window_steps(settings.rollout, settings.seed, iteration)


def train_adapters(policy: Policy) -> None:
    """Give every adapter a non-zero product, as training would."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for _, parameter in policy.trainable_parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def assert_generate_draws(policy: Policy, prompt: str, settings: Config, folder: Path, capsys) -> None:
    """`advgrpo.generate` leaves a grid of the base model and of the policy's LoRA, in a few steps of 32 pixels."""
    policy.export(folder / "lora")
    images = ["--lora", str(folder / "lora"), "--base", "--output", str(folder / "g.png")]
    flags = ["--model", settings.model.path, "--resolution", "32", "--num-steps", "2", "--images-per-prompt", "2"]
    assert generate(["--prompt", prompt, *images, *flags]) == 0, capsys.readouterr().err
    assert min(Image.open(folder / "g.png").size) > 60
