"""Flow-GRPO (github.com/yifan123/flow_grpo): `sde_step_with_logprob` and `PerPromptStatTracker.update`.

    import flow_grpo.diffusers_patch.sd3_sde_with_logprob as module
    from advgrpo_kernels.integrations import flow_grpo as fused
    fused.patch(module)        # and modules that have imported the function

Same values as the original to float32 rounding, the same noise from the same generator (also where it is scaled by 0),
NaN log-probs where the noise level is 0. Differences: no host synchronisation per step (a timestep that the schedule
lacks gives NaN on a GPU instead of an IndexError), no gradient to `sample` (raises), latents of rank 2 or more.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import torch

from . import _cases, _patching, _statistics
from ._self_check import Case
from ._transition import broadcast, step_indices, steps_at, torch_noise, transition
from .diffusers_transformers import FLUX, QWEN, SD3

DYNAMICS = {"sde": ("flow_sde", "gaussian"), "cps": ("flow_cps", "squared_error")}


def sde_step_with_logprob(
    self,
    model_output: torch.Tensor,
    timestep: torch.Tensor,
    sample: torch.Tensor,
    noise_level: float = 0.7,
    prev_sample: torch.Tensor | None = None,
    generator: torch.Generator | list[torch.Generator] | None = None,
    sde_type: str | None = "sde",
    return_sqrt_dt: bool | None = False,
) -> tuple[torch.Tensor, ...]:
    """One step and its log-prob; `self` is the scheduler, timestep [B] or [1].

    Returns:
        (prev_sample [B, ...], log_prob [B], prev_sample_mean [B, ...], std_dev_t [B or 1, 1, ...]), and sqrt(-dt) of
        std_dev_t's shape with return_sqrt_dt; float32.
    """
    if sde_type not in DYNAMICS:
        raise ValueError(f"sde_type must be one of {tuple(DYNAMICS)}, got {sde_type!r}")
    dynamics, likelihood = DYNAMICS[sde_type]
    return step(
        self, model_output, timestep, sample, noise_level, prev_sample, generator, dynamics, likelihood, return_sqrt_dt
    )


def step(
    scheduler,
    model_output: torch.Tensor,
    timestep: torch.Tensor,
    sample: torch.Tensor,
    noise_level: float,
    prev_sample: torch.Tensor | None,
    generator: torch.Generator | list[torch.Generator] | None,
    dynamics: str,
    likelihood: str,
    return_sqrt_dt: bool | None = False,
) -> tuple[torch.Tensor, ...]:
    """`sde_step_with_logprob` of any dynamics on a diffusers flow-matching scheduler."""
    index = step_indices(scheduler.timesteps, timestep, sample.device)
    steps = steps_at(scheduler.sigmas, index, dynamics, noise_level, sample.device)
    noise = None
    if prev_sample is None:
        noise = torch_noise(model_output.shape, generator, model_output.device, torch.float32)
    taken = transition(
        sample,
        model_output,
        steps.coefficients.squeeze(0),
        next_latents=prev_sample,
        noise=noise,
        likelihood=likelihood,
    )
    result = taken.next_latents, taken.required_log_prob, taken.mean, broadcast(steps.std, sample)
    return (*result, broadcast(torch.sqrt(-steps.dt), sample)) if return_sqrt_dt else result


def step_cases(original, cls: type | None = None) -> Iterator[Case]:
    """Every sde_type the original has, as its pipelines and trainers call it; a step without noise has no density."""
    settings = [{}]
    if "sde_type" in _cases.parameters(original):
        settings = [{"sde_type": name, "return_sqrt_dt": True} for name in DYNAMICS]
    yield from _cases.step_cases(original, _call, settings)
    yield from _cases.step_cases(original, _call, [{"noise_level": 0.0}], modes=["drawn"], steps=[3])


def _call(function, call: _cases.Call, **setting):
    scheduler = _cases.Scheduler()
    timestep = scheduler.timesteps[call.step : call.step + 1]
    if call.prev_sample is not None:  # one per row when training, one for all when sampling
        timestep = timestep.expand(call.sample.shape[0])
    setting |= {"prev_sample": call.prev_sample, "generator": call.generator}
    result = function(scheduler, call.model_output, timestep, call.sample, **setting)
    return dict(zip(("prev_sample", "log_prob", "mean", "std_dev_t", "sqrt_dt"), result))


TARGETS = (
    _patching.Target(
        "sde_step_with_logprob",
        modules=("flow_grpo.diffusers_patch.sd3_sde_with_logprob",),
        variants=(sde_step_with_logprob,),
        cases=step_cases,
    ),
    _statistics.tracker("flow_grpo.stat_tracking"),
)
BLOCKS = (*SD3, *FLUX, *QWEN)  # of diffusers' transformers, what the launcher replaces besides


def patch(module: ModuleType, everywhere: bool = True) -> list[str]:
    """Replace what `module` holds of `TARGETS`; `_patching.replace` says where, and what it raises."""
    return _patching.replace(module, TARGETS, everywhere)


def unpatch(module: ModuleType) -> None:
    """Put the originals back, in every module that holds what `patch(module)` put in their place."""
    _patching.restore(module)
