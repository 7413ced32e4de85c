"""Schedules and windows as tables: which step is stochastic, and the coefficients (a, b, s) of every step."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from advgrpo_kernels import ddim_coefficients, transition_coefficients

from .. import rng
from ..config import Config, RolloutSection, eligible_steps
from ..errors import UserError
from .base import Policy


@dataclass
class StepTable:
    """One trajectory's plan, on the policy's device."""

    timesteps: torch.Tensor  # [T] float32
    coefficients: torch.Tensor  # [T, 3] float32: x_next = a x + b v + s z
    window: tuple[int, ...]  # stochastic steps, ascending; empty for plain sampling
    numbers: list[torch.Tensor] = field(init=False)  # T views [1] int64: the step counter

    def __post_init__(self):
        self.numbers = list(torch.arange(len(self.timesteps), device=self.timesteps.device).split(1))

    def at(self, number: torch.Tensor) -> torch.Tensor:
        """[3] coefficients of the step that `number` [1] holds, read on the device."""
        return self.coefficients.index_select(0, number)[0]


def check_dynamics(prediction: str, dynamics: str) -> None:
    """UserError unless `rollout.dynamics` suits what the network predicts ("velocity" or "noise")."""
    if prediction == "noise" and dynamics != "ddim":
        raise UserError(
            f"rollout.dynamics = {dynamics!r} steps along a velocity, but this model predicts noise (SD1.5, SDXL): "
            "set rollout.dynamics = 'ddim'"
        )
    if prediction == "velocity" and dynamics == "ddim":
        raise UserError(
            "rollout.dynamics = 'ddim' needs a model that predicts noise (SD1.5, SDXL), but this one predicts a "
            "velocity: use flow_cps, flow_sde or dance_sde"
        )


def step_table(policy: Policy, num_steps: int, window: tuple[int, ...] = (), *, rollout: RolloutSection | None = None):
    """Deterministic steps (ODE, or DDIM with η = 0) but on `window`, where the rollout's dynamics add noise.

    Raises:
        UserError: the rollout's dynamics are not for this model.
    """
    levels, timesteps = policy.schedule(num_steps)
    if window:
        check_dynamics(policy.prediction, rollout.dynamics)
    noise = [rollout.noise_level if i in window else 0.0 for i in range(num_steps)]
    if policy.prediction == "noise":
        coefficients = ddim_coefficients(levels[:-1], levels[1:], noise)
    else:
        dynamics = rollout.dynamics if window else "ode"
        coefficients = transition_coefficients(levels.tolist(), dynamics=dynamics, noise_level=noise)
    return StepTable(timesteps.to(policy.device), coefficients.to(policy.device), window)


def window_steps(config: Config, iteration: int) -> tuple[int, ...]:
    """This iteration's stochastic steps: the fixed ones, or drawn from the noise range."""
    window = config.rollout.window
    if window.steps is not None:
        return tuple(sorted(window.steps))
    steps = eligible_steps(config)
    order = torch.randperm(len(steps), generator=rng.generator(config.seed, "window", iteration))
    return tuple(sorted(steps[i] for i in order[: window.size].tolist()))
