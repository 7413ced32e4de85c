"""The trainer's parts from a test's settings, as `training.build` makes them."""

from __future__ import annotations

from collections.abc import Mapping

from advgrpo.config import Config
from advgrpo.evaluation.evaluator import Evaluator
from advgrpo.policy.base import Policy
from advgrpo.rewards.base import Reward
from advgrpo.runtime.distributed import Distributed
from advgrpo.runtime.graphs import GraphBackend
from advgrpo.sampling.dynamics import window_steps
from advgrpo.training.update import Updater


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
