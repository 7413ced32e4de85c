"""Schedules and windows as tables: which step is stochastic, and the coefficients (a, b, s) of every step."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from advgrpo.config import OBJECTIVES, RolloutSection, eligible_steps, noisy_steps
from advgrpo.errors import UserError
from advgrpo.policy.base import Generator
from advgrpo.runtime import rng
from advgrpo.runtime.transfer import to_device
from advgrpo.sampling.multistep import corrections
from advgrpo_kernels import ddim_coefficients, step_coefficients, transition_coefficients


@dataclass(frozen=True)
class SecondOrder:
    """Steps that look back at the image which the step before has seen (multistep.py), on the policy's device."""

    steps: tuple[int, ...]  # ascending
    corrections: torch.Tensor  # [T] float32: c, 0 of all others
    to_image: torch.Tensor  # [T, 3] float32: coefficients of one step to the image, which it is seen by


@dataclass
class StepTable:
    """One trajectory's plan, on the policy's device.

    Where groups branch at steps of their own (`rollout.window.branching`), this one has all those steps for a window,
    which is what the update looks rows up in; what is drawn is one of `branches`.
    """

    timesteps: torch.Tensor  # [T] float32
    coefficients: torch.Tensor  # [T, 3] float32: x_next = a x + b v + s z
    window: tuple[int, ...]  # stochastic steps, ascending; empty for plain sampling
    trained: tuple[int, ...]  # those of them that the update trains on: the first ones
    lengths: tuple[float, ...]  # T: variance of a step's noise over that per unit of time; 1 where there is no such
    taken: tuple[int, ...] = ()  # the steps that are run, ascending; empty: all. Rows of the others are not looked at
    second_order: SecondOrder | None = None  # of the steps after the window; None: all are of first order
    branches: tuple[StepTable, ...] = ()  # one for each of the window's steps, where groups branch apart
    numbers: list[torch.Tensor] = field(init=False)  # T views [1] int64: the step counter

    def __post_init__(self):
        self.taken = self.taken or tuple(range(len(self.timesteps)))
        self.numbers = list(torch.arange(len(self.timesteps), device=self.timesteps.device).split(1))

    @property
    def trained_per_image(self) -> int:
        """How many steps of an image the update trains on."""
        return 1 if self.branches else len(self.trained)

    def of(self, branch: int | None) -> StepTable:
        """What the images of a micro-batch are drawn by; `branch` is the micro-batch's."""
        return self if branch is None else self.branches[branch]

    def to_look_at(self) -> StepTable:
        """The same images, of which nothing is learned: no step is kept."""
        return replace(self, trained=(), branches=tuple(each.to_look_at() for each in self.branches))

    def at(self, number: torch.Tensor) -> torch.Tensor:
        """[3] coefficients of the step that `number` [1] holds, read on the device."""
        return self.coefficients.index_select(0, number)[0]


def check_dynamics(prediction_type: str, dynamics: str) -> None:
    """UserError unless `rollout.dynamics` suits what the network predicts ("flow_prediction" or "epsilon")."""
    if prediction_type == "epsilon" and dynamics != "ddim":
        raise UserError(
            f"rollout.dynamics = {dynamics!r} steps along a velocity, but this model predicts noise (SD1.5, SDXL): "
            "set rollout.dynamics = 'ddim'"
        )
    if prediction_type == "flow_prediction" and dynamics == "ddim":
        raise UserError(
            "rollout.dynamics = 'ddim' needs a model that predicts noise (SD1.5, SDXL), but this one predicts a "
            "velocity: use flow_cps, flow_sde or dance_sde"
        )


def check_objective(prediction_type: str, objective: str) -> None:
    """UserError unless the loss of `update.objective` exists for what the network predicts."""
    if OBJECTIVES[objective].fits_velocity and prediction_type != "flow_prediction":
        raise UserError(
            f"update.objective = {objective} fits a rectified flow's velocity, but this model predicts noise: use an "
            "SD3 model"
        )


def step_table(
    policy: Generator,
    num_steps: int,
    window: tuple[int, ...] = (),
    *,
    rollout: RolloutSection | None = None,
    tail_steps: int | None = None,
) -> StepTable:
    """Deterministic steps (ODE, or DDIM with η = 0) but on `window`, where the rollout's dynamics add noise.

    With `rollout.window.branching` every step of the window is the whole window of one of `branches`, which is the
    rollout of TempFlow-GRPO (arXiv 2508.04324; Shredded-Pork/TempFlow-GRPO at e66824e, pipeline_with_logprob_perstep).

    A shortened tail keeps the numbers, timesteps and coefficients of all steps up to the window's last, so what they
    compute keeps its bits, and a captured step its shapes: only the coefficients of the longer steps are others.

    Args:
        tail_steps: deterministic steps after the window; 0 takes all, None `rollout.tail_steps`.

    Raises:
        UserError: the rollout's dynamics are not for this model.
    """
    levels, timesteps = policy.schedule(num_steps)
    if window:
        check_dynamics(policy.prediction_type, rollout.dynamics)
    noise = [rollout.eta if i in window else 0.0 for i in range(num_steps)]
    coefficients = _coefficients(policy, levels, rollout.dynamics if window else "ode", noise)
    taken, second_order = tuple(range(num_steps)), None
    if window:
        taken = taken_steps(num_steps, window, rollout.tail_steps if tail_steps is None else tail_steps)
        tail = [i for i in taken if i > window[-1]]
        if len(taken) < num_steps:
            ends = levels[[*tail, num_steps]]
            coefficients[tail] = _coefficients(policy, ends, rollout.dynamics, [0.0] * len(tail))
            if rollout.tail_solver == "dpm2" and len(tail) > 1:
                second_order = _second_order(policy, levels, [window[-1], *tail, num_steps])
    trained = window[: rollout.window.trained_of(len(window))] if window else ()
    timed = bool(window) and rollout.dynamics in ("flow_sde", "dance_sde")  # s² = std²·(σ - σ')
    lengths = tuple((levels[:-1] - levels[1:]).tolist()) if timed else (1.0,) * num_steps
    on_device = (to_device(t, policy.device) for t in (timesteps, coefficients))
    branches = ()
    if window and rollout.window.branching:
        alone = rollout.model_copy(update={"window": rollout.window.model_copy(update={"branching": False})})
        branches = tuple(step_table(policy, num_steps, (i,), rollout=alone, tail_steps=tail_steps) for i in window)
    return StepTable(*on_device, window, trained, lengths, taken, second_order, branches)


def _second_order(policy: Generator, levels: torch.Tensor, path: list[int]) -> SecondOrder:
    """Of the steps between the levels of `path`, numbers into `levels` [T+1]: the window's last step, the tail's, T."""
    steps, here = tuple(path[1:-2]), levels[path]
    if policy.prediction_type == "epsilon":
        signal, noise = here.sqrt(), (1 - here).sqrt()
        to_image = ddim_coefficients(levels[:-1], torch.ones_like(levels[:-1]), 0.0)
    else:
        signal, noise = 1 - here, here
        to_image = step_coefficients(levels[:-1], 0.0, dynamics="ode", noise_level=0.0)
    column = torch.zeros(len(levels) - 1)
    column[list(steps)] = corrections(signal, noise).float()
    return SecondOrder(steps, to_device(column, policy.device), to_device(to_image, policy.device))


def taken_steps(num_steps: int, window: tuple[int, ...], tail_steps: int) -> tuple[int, ...]:
    """The steps that are run, ascending: all up to the window's last, then `tail_steps` of the others.

    Those are spread evenly over the numbers of the schedule, which for a rectified flow's shifted schedule keeps the
    steps' lengths in proportion; the last always ends at the image. 0, or as many as there are, takes all.
    """
    first = window[-1] + 1
    left = num_steps - first
    count = min(tail_steps or left, left)
    return (*range(first), *(first + left * number // count for number in range(count)))


def _coefficients(policy: Generator, levels: torch.Tensor, dynamics: str, noise: list[float]) -> torch.Tensor:
    """[T, 3] float32 of a schedule's levels [T+1]; `dynamics` are a flow's, of noise strength `noise` [T]."""
    if policy.prediction_type == "epsilon":
        return ddim_coefficients(levels[:-1], levels[1:], noise)
    return transition_coefficients(levels.tolist(), dynamics=dynamics, noise_level=noise)


def step_weights(policy: Generator, rollout: RolloutSection, which: str) -> tuple[float, ...]:
    """Of each step's policy loss, T: `update.step_weights`.

    "inverse_length" is 1/(σ - σ'), the division by -dt of GRPO-Guard (arXiv 2510.22319) as in verl-omni at a1139ba.
    "noise" is TempFlow-GRPO's noise-aware weight (arXiv 2508.04324; Shredded-Pork/TempFlow-GRPO at e66824e multiplies
    by 2.25 s instead): the standard deviation s of the step's noise, σ_t·sqrt(-dt) in Flow-GRPO's terms, over its mean
    over all steps that can have any.
    """
    levels, _ = policy.schedule(rollout.num_steps)
    if which == "inverse_length":
        return tuple((1.0 / (levels[:-1] - levels[1:])).tolist())
    if which == "noise":
        noisy = noisy_steps(rollout)
        noise = [rollout.eta] * noisy + [0.0] * (rollout.num_steps - noisy)
        std = _coefficients(policy, levels, rollout.dynamics, noise)[:, 2].double()
        return tuple((std / std[:noisy].mean()).tolist())
    return (1.0,) * rollout.num_steps


def window_steps(rollout: RolloutSection, seed: int, iteration: int) -> tuple[int, ...]:
    """This iteration's stochastic steps, ascending: a function of (seed, iteration) alone, in window.order.

    A sliding window is MixGRPO's (arXiv 2507.21802; Tencent-Hunyuan/MixGRPO at e5cdd6a, `GRPOTrainingStates`): it
    starts at the noisiest step and moves by the stride after every shift interval. Its code lets the window shrink at
    the end of the range; here it starts over before that, so that every iteration trains on as many steps.
    """
    window = rollout.window
    if window.chosen_order == "fixed":
        return tuple(sorted(window.steps))
    steps = eligible_steps(rollout)
    starts = len(steps) - window.size + 1
    draw = rng.generator(seed, "window", iteration)
    if window.chosen_order == "random":
        return tuple(sorted(steps[i] for i in torch.randperm(len(steps), generator=draw)[: window.size].tolist()))
    if window.chosen_order == "contiguous":
        first = int(torch.randint(starts, (), generator=draw))
    else:
        places = range(0, starts, window.slide_by)
        first = places[iteration // window.slide_every % len(places)]
    return tuple(steps[first : first + window.size])


def rows(table: StepTable, *, prompts: int, images: int, shared: bool) -> int:
    """How many rows the network computes to draw the images of some prompts by a table, without those of guidance.

    Args:
        shared: a prompt's images are one trajectory up to the window's first step (`Sampler.share_prefix`).
    """
    alone = table.window[0] if table.window else len(table.numbers)
    return sum(prompts if shared and i <= alone else images for i in table.taken)
