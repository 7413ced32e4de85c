"""Small seeded inputs for `_self_check`: every step function is called as its samplers and its trainers call it.

One case is a setting (dynamics, flags), a step of an 8-step schedule (the first, where σ = 1, one in between, the last,
where σ' = 0), a dtype and a mode: "drawn" takes the step with noise, "scored" evaluates what the original drew and adds
the gradient of log-prob and mean with respect to the model output.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from ._self_check import EXACT, Case, Outputs, Tolerance

SHIFT, COUNT = 3.0, 8
_LINEAR = torch.linspace(1, 0, COUNT + 1, dtype=torch.float64)
SIGMAS = (SHIFT * _LINEAR / (1 + (SHIFT - 1) * _LINEAR)).float()
STEPS = (0, 3, COUNT - 1)
SHAPE = (2, 4, 4, 3)


class Scheduler:
    """What the step functions read of a diffusers flow-matching scheduler."""

    def __init__(self):
        self.sigmas, self.timesteps = SIGMAS.clone(), SIGMAS[:-1] * 1000

    def index_for_timestep(self, timestep) -> int:
        return int((self.timesteps == timestep).nonzero()[0])


def scheduler_of(cls: type):
    """A scheduler of a peer's class, which is one of diffusers' flow matching, with the schedule SIGMAS."""
    scheduler = cls(shift=SHIFT)
    scheduler.set_timesteps(COUNT, sigmas=_LINEAR[:-1].tolist())
    return scheduler


class Call(NamedTuple):
    """What a case hands to the function; `prev_sample` None: the step is to be drawn."""

    model_output: torch.Tensor
    sample: torch.Tensor
    step: int
    prev_sample: torch.Tensor | None
    generator: torch.Generator | None


# Calls the function (first argument) and names its outputs: "prev_sample", and "log_prob" and "mean" where it has them.
Caller = Callable[..., dict[str, "torch.Tensor | None"]]


class Kind(NamedTuple):
    """The dtypes of one kind of call and what may differ in it, by output; `drawn` holds for drawn steps alone."""

    model_output: torch.dtype
    sample: torch.dtype
    tolerances: Mapping[str, Tolerance] = {}
    drawn: Mapping[str, Tolerance] = {}

    @property
    def name(self) -> str:
        names = [str(dtype).removeprefix("torch.") for dtype in (self.model_output, self.sample)]
        return names[0] if names[0] == names[1] else f"{names[0]} velocity on {names[1]}"


def _one_place(dtype: torch.dtype, why: str) -> Tolerance:
    return Tolerance(torch.finfo(dtype).smallest_normal, torch.finfo(dtype).eps, f"one place of {why}")


def half(dtype: torch.dtype) -> Kind:
    """Velocity and latents in a half-precision dtype, which is also that of the gradients."""
    place = _one_place(dtype, "the velocity's dtype")
    return Kind(dtype, dtype, {"gradient of log_prob": place, "gradient of mean": place})


FLOAT32_KIND = Kind(torch.float32, torch.float32)
BFLOAT16_KIND = half(torch.bfloat16)


def stored_in(dtype: torch.dtype) -> Kind:
    """Latents kept in a half-precision dtype, to which a drawn step is rounded before its log-prob is taken.

    A value within float32's error of the boundary between two of that dtype may fall to either side, so a drawn step
    may be off by one place; that it is rounded at all is compared exactly (`left_to_round`).
    """
    place = _one_place(dtype, "the dtype that latents are stored in")
    drawn = {"prev_sample": place, "log_prob": Tolerance(5e-3, 5e-3, place.why), "left_to_round": EXACT}
    return half(dtype)._replace(drawn=drawn)


def left_to_round(latents: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What storing float32 `latents` in `dtype` would take off: 0 where they are rounded already."""
    return latents - latents.to(dtype).float()


def step_cases(
    original: Callable,
    call: Caller,
    settings: Sequence[Mapping[str, Any]],
    *,
    kinds: Sequence[Kind] = (FLOAT32_KIND, BFLOAT16_KIND),
    drawing: str = "generator",
    modes: Sequence[str] = ("drawn", "scored"),
    steps: Sequence[int] = STEPS,
) -> Iterator[Case]:
    """Cases of a step function for all `settings`, which are keyword arguments of `call`.

    Args:
        original: draws the next latents that the scored cases evaluate.
        drawing: where its noise comes from: "generator", or "global" for functions that take none.
    """
    for index, (setting, step, kind) in enumerate(itertools.product(settings, steps, kinds)):
        words = [f"{key}={value!r}" for key, value in setting.items()]
        name = ", ".join([*words, f"step {step} of {COUNT}", kind.name])
        for mode in modes:
            run = _Run(original, call, dict(setting), step, kind, index, mode, drawing)
            tolerances = {**kind.tolerances, **kind.drawn} if mode == "drawn" else kind.tolerances
            yield Case(f"{name}, {mode}", run, tolerances)


class _Run(NamedTuple):
    """`Case.run` of a step function."""

    original: Callable
    call: Caller
    setting: dict[str, Any]
    step: int
    kind: Kind
    seed: int
    mode: str
    drawing: str
    recorded: torch.Tensor | None = None  # next latents to score instead of drawing them

    def __call__(self, function: Callable) -> Outputs:
        numbers = torch.Generator().manual_seed(self.seed)
        velocity = torch.randn(SHAPE, generator=numbers).to(self.kind.model_output)
        sample = torch.randn(SHAPE, generator=numbers).to(self.kind.sample)
        if self.mode == "drawn":
            return self._draw(function, velocity, sample)
        drawn = self.recorded
        if drawn is None:
            drawn = self._draw(self.original, velocity, sample)["prev_sample"]
        if drawn is None:
            raise ValueError("a step that draws gave no prev_sample")
        drawn = drawn.to(self.kind.sample)
        velocity.requires_grad_()
        outputs = self.call(function, Call(velocity, sample, self.step, drawn, None), **self.setting)
        for name in ("log_prob", "mean"):
            value = outputs.get(name)
            if value is not None and value.requires_grad:
                (gradient,) = torch.autograd.grad(value.sum(), velocity, retain_graph=True)
                outputs[f"gradient of {name}"] = gradient
        return outputs

    def _draw(self, function: Callable, velocity: torch.Tensor, sample: torch.Tensor) -> dict[str, torch.Tensor | None]:
        torch.default_generator.manual_seed(self.seed)
        generator = torch.Generator().manual_seed(self.seed) if self.drawing == "generator" else None
        with torch.no_grad():
            outputs = self.call(function, Call(velocity, sample, self.step, None, generator), **self.setting)
        after = torch.randn(2, generator=generator)
        return outputs | {"random numbers drawn next": after}


def parameters(function: Callable) -> set[str]:
    """Names of the function's parameters."""
    return set(inspect.signature(function).parameters)
