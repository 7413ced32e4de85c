"""Flow-Factory (github.com/X-GenGroup/Flow-Factory): `FlowMatchEulerDiscreteSDEScheduler.step`, all four dynamics.

    import flow_factory.scheduler.flow_match_euler_discrete as module
    from advgrpo_kernels.integrations import flow_factory as fused
    fused.patch(module)

Same values to float32 rounding and the same noise from the same generators, rounded to the latents' dtype before the
log-prob is taken, so the first ratio is exactly 1 also for bfloat16 and float16 storage; NaN log-probs where the noise
level of a gaussian row is 0, zeros for ODE dynamics. The coefficients are computed where (σ, σ', noise level) of the
call are: nothing waits for a GPU when both timesteps are given, else only the scheduler's own look-up. No gradient to
`latents` (raises).
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType

import torch

from . import _cases, _patching
from ._self_check import Case
from ._transition import Steps, broadcast, steps_of, torch_noise, transition
from .diffusers_transformers import FLUX, QWEN, SD3

logger = logging.getLogger("advgrpo_kernels.integrations")

# name there -> (name here, likelihood)
DYNAMICS = {
    "Flow-SDE": ("flow_sde", "gaussian"),
    "Dance-SDE": ("dance_sde", "gaussian"),
    "CPS": ("flow_cps", "squared_error"),
    "ODE": ("ode", None),
}


@dataclass
class StepOutput:
    """The fields of the scheduler's own output class, for schedulers whose module has none."""

    next_latents: torch.Tensor | None = None
    next_latents_mean: torch.Tensor | None = None
    std_dev_t: torch.Tensor | None = None
    dt: torch.Tensor | None = None
    log_prob: torch.Tensor | None = None
    noise_pred: torch.Tensor | None = None


RETURNED = ("next_latents", "next_latents_mean", "noise_pred", "log_prob", "std_dev_t", "dt")  # without return_dict


def step(
    self,
    noise_pred: torch.Tensor,
    timestep: float | torch.Tensor,
    latents: torch.Tensor,
    next_latents: torch.Tensor | None = None,
    timestep_next: float | torch.Tensor | None = None,
    generator: torch.Generator | list[torch.Generator] | None = None,
    noise_level: int | float | torch.Tensor | None = None,
    compute_log_prob: bool = True,
    return_dict: bool = True,
    return_kwargs: Sequence[str] = ["next_latents", "next_latents_mean", "std_dev_t", "dt", "log_prob", "noise_pred"],
    dynamics_type: str | None = None,
    sigma_max: float | None = None,
):
    """One step of the scheduler `self`.

    Returns:
        The scheduler's output class with the fields of `return_kwargs`, or without `return_dict` the tuple
        (next_latents, next_latents_mean, noise_pred, log_prob, std_dev_t, dt); std_dev_t and dt [B, 1, ...].
    """
    dynamics_type = dynamics_type or self.dynamics_type
    if dynamics_type not in DYNAMICS:
        raise ValueError(f"dynamics_type must be one of {tuple(DYNAMICS)}, got {dynamics_type!r}")
    dynamics, likelihood = DYNAMICS[dynamics_type]
    sigma, sigma_next = _sigmas(self, timestep, timestep_next)
    if self.is_eval or dynamics == "ode":
        noise_level = 0.0
    elif noise_level is None:
        noise_level = self.get_noise_level_for_sigma(sigma)
    steps = _steps(latents, dynamics, sigma, sigma_next, noise_level, sigma_max or self.sigmas[1])
    noise = None
    if next_latents is None and dynamics != "ode":
        noise = torch_noise(noise_pred.shape, generator, noise_pred.device, torch.float32)
    taken = transition(
        latents,
        noise_pred,
        steps.coefficients,
        next_latents=next_latents,
        noise=noise,
        likelihood=likelihood if compute_log_prob else None,
        storage_dtype=torch.float32 if dynamics == "ode" else latents.dtype,
    )
    log_prob = taken.log_prob
    if compute_log_prob and dynamics == "ode":
        logger.warning("an ODE step has no log-prob: returning zeros; pass compute_log_prob=False")
        log_prob = latents.new_zeros(latents.shape[0], dtype=torch.float32)
    columns = (broadcast(steps.std, latents), broadcast(steps.dt, latents))
    result = (taken.next_latents, taken.mean, noise_pred.float(), log_prob, *columns)
    return _output(self, dict(zip(RETURNED, result)), return_kwargs) if return_dict else result


def _sigmas(scheduler, timestep, timestep_next) -> tuple[float | torch.Tensor, float | torch.Tensor]:
    """σ and σ' of a call: from both timesteps, or from the schedule at the position of `timestep`."""
    if timestep_next is not None:
        return timestep / 1000, timestep_next / 1000
    if isinstance(timestep, int) or (torch.is_tensor(timestep) and timestep.dtype in (torch.int32, torch.int64)):
        logger.warning("an integer timestep is taken as the position in the schedule; pass one of scheduler.timesteps")
        positions = [int(timestep)]
    elif isinstance(timestep, float) or (torch.is_tensor(timestep) and timestep.dim() == 0):
        positions = [scheduler.index_for_timestep(timestep)]
    elif torch.is_tensor(timestep) and timestep.dim() == 1:
        positions = [scheduler.index_for_timestep(t) for t in timestep]
    elif torch.is_tensor(timestep):
        raise ValueError(f"timestep must be a scalar or [B], got shape {tuple(timestep.shape)}")
    else:
        raise TypeError(f"timestep must be a float or a tensor, got {type(timestep).__name__}")
    return scheduler.sigmas[positions], scheduler.sigmas[[position + 1 for position in positions]]


def _steps(latents: torch.Tensor, dynamics: str, *settings: float | torch.Tensor) -> Steps:
    """One step per row of `latents` from σ, σ', noise level, sigma_max: numbers or [B], taken in float32 as there."""
    batch, device = latents.shape[0], latents.device
    columns = [torch.as_tensor(value, dtype=torch.float32).reshape(-1).expand(batch) for value in settings]
    if any(column.is_cuda for column in columns):  # computed where a value is, so that nothing waits for the GPU
        columns = [column.to(device) for column in columns]
    sigma, sigma_next, noise_level, sigma_max = columns
    steps = steps_of(sigma, sigma_next, dynamics, noise_level, sigma_max)
    return Steps(*(value.to(device) for value in steps))


def _output(scheduler, values: dict[str, torch.Tensor | None], names: Sequence[str]):
    """The fields `names` in `SDESchedulerOutput` as the module of the scheduler's class (or of a base) knows it."""
    unknown = [name for name in names if name not in values]
    if unknown:
        logger.warning("a step has no %s; it has %s", ", ".join(unknown), ", ".join(values))
    modules = (sys.modules.get(cls.__module__) for cls in type(scheduler).__mro__)
    output = next((m.SDESchedulerOutput for m in modules if hasattr(m, "SDESchedulerOutput")), StepOutput)
    return output(**{name: values[name] for name in names if name in values})


def _step_cases(original, cls: type) -> Iterator[Case]:
    """All dynamics on a scheduler of the class itself: sampling from one timestep, training with both given per row."""
    settings = [{"dynamics_type": name, "noise_level": 0.7} for name in DYNAMICS]
    kinds = [_cases.FLOAT32_KIND, *map(_cases.stored_in, (torch.bfloat16, torch.float16))]

    def call(function, inputs: _cases.Call, **setting):
        scheduler, latents = _cases.scheduler_of(cls), inputs.sample
        times = torch.cat([scheduler.timesteps, torch.zeros(1)])[inputs.step : inputs.step + 2]
        setting["generator"], time = inputs.generator, times[0]
        if inputs.prev_sample is not None:
            time, after = times[:, None].expand(2, latents.shape[0])
            setting |= {"next_latents": inputs.prev_sample, "timestep_next": after}
        result = function(scheduler, inputs.model_output, time, latents, **setting)
        names = {"prev_sample": "next_latents", "mean": "next_latents_mean"}
        outputs = {name: getattr(result, names.get(name, name)) for name in ("prev_sample", "mean", *RETURNED[2:])}
        if setting.get("dynamics_type") != "ODE":
            outputs["left_to_round"] = _cases.left_to_round(outputs["prev_sample"], latents.dtype)
        return outputs

    yield from _cases.step_cases(original, call, settings, kinds=kinds)
    yield from _cases.step_cases(original, call, [{}, {"compute_log_prob": False}], steps=[3])


TARGETS = (
    _patching.Target(
        "FlowMatchEulerDiscreteSDEScheduler.step",
        modules=("flow_factory.scheduler.flow_match_euler_discrete",),
        variants=(step,),
        cases=_step_cases,
    ),
)
BLOCKS = (*SD3, *FLUX, *QWEN)  # of diffusers' transformers, what the launcher replaces besides


def patch(module: ModuleType, everywhere: bool = True) -> list[str]:
    """Replace what `module` holds of `TARGETS`; `_patching.replace` says where, and what it raises."""
    return _patching.replace(module, TARGETS, everywhere)


def unpatch(module: ModuleType) -> None:
    """Put the originals back, in every module that holds what `patch(module)` put in their place."""
    _patching.restore(module)
