"""verl-omni (github.com/verl-project/verl-omni): `FlowMatchSDEDiscreteScheduler.sample_previous_step`, which its `step`
and its training adapters call; "sde", "cps" and "dance_sde".

    import verl_omni.pipelines.schedulers.flow_match_sde as module
    from advgrpo_kernels.integrations import verl_omni as fused
    fused.patch(module)

Same values to float32 rounding and the same noise from the same generator; float32 tensors only, as there. Differences
as in `flow_grpo`: nothing waits for the GPU per step, an unknown timestep is NaN on a GPU, no gradient to `sample`
(raises).
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import torch

from . import _cases, _patching
from ._self_check import Case
from ._transition import broadcast, step_indices, steps_at, torch_noise, transition
from .diffusers_transformers import QWEN, SD3

# sde_type -> dynamics here, likelihood with and without its normaliser
DYNAMICS = {
    "sde": ("flow_sde", "gaussian", "scaled"),
    "cps": ("flow_cps", "squared_error", "squared_error"),
    "dance_sde": ("dance_sde", "gaussian", "scaled"),
}


def sample_previous_step(
    self,
    sample: torch.Tensor,
    model_output: torch.Tensor,
    timestep: torch.Tensor | None = None,
    generator: torch.Generator | list[torch.Generator] | None = None,
    per_token_timesteps: torch.Tensor | None = None,
    noise_level: float | torch.Tensor = 0.7,
    prev_sample: torch.Tensor | None = None,
    sde_type: str = "sde",
    return_logprobs: bool = True,
    return_sqrt_dt: bool = False,
    include_logprob_normalizer: bool = True,
) -> tuple[torch.Tensor | None, ...]:
    """One step of the scheduler `self`, at `timestep` [B] or [1], or at its own `step_index`.

    Returns:
        (prev_sample [B, ...], log_prob [B] or None, prev_sample_mean [B, ...], std_dev_t [B or 1, 1, ...] or [] at the
        scheduler's own step), and sqrt(-dt) [B] with return_sqrt_dt.
    """
    if sde_type not in DYNAMICS:
        raise ValueError(f"sde_type must be one of {tuple(DYNAMICS)}, got {sde_type!r}")
    if per_token_timesteps is not None:
        raise NotImplementedError("per_token_timesteps: the original does not support it either")
    for name, tensor in (("sample", sample), ("model_output", model_output), ("prev_sample", prev_sample)):
        if tensor is not None and tensor.dtype != torch.float32:
            raise ValueError(f"{name} must be float32, got {tensor.dtype}")
    dynamics, *likelihoods = DYNAMICS[sde_type]
    index = self.step_index if timestep is None else step_indices(self.timesteps, timestep, sample.device)
    steps = steps_at(self.sigmas, index, dynamics, noise_level, sample.device)
    noise = None
    if prev_sample is None:
        noise = torch_noise(model_output.shape, generator, model_output.device, torch.float32)
    taken = transition(
        sample,
        model_output,
        steps.coefficients if timestep is None else steps.coefficients.squeeze(0),
        next_latents=prev_sample,
        noise=noise,
        likelihood=likelihoods[not include_logprob_normalizer] if return_logprobs else None,
    )
    std = steps.coefficients[..., 2] if dynamics == "dance_sde" else steps.std
    sqrt_dt = torch.sqrt(-steps.dt)
    if timestep is None:
        sqrt_dt = sqrt_dt.expand(sample.shape[0]).clone()
    else:
        std = broadcast(std, sample)
    result = taken.next_latents, taken.log_prob, taken.mean, std
    return (*result, sqrt_dt) if return_sqrt_dt else result


def _step_cases(original, cls: type) -> Iterator[Case]:
    """All dynamics at the scheduler's own step and per row, with and without normaliser, and without a log-prob."""
    settings = [{"sde_type": name, "include_logprob_normalizer": full} for name in DYNAMICS for full in (True, False)]

    def call(function, inputs: _cases.Call, **setting):
        scheduler = _cases.scheduler_of(cls)
        scheduler.set_begin_index(inputs.step)
        scheduler._init_step_index(scheduler.timesteps[inputs.step])
        if inputs.prev_sample is not None:  # training
            rows = scheduler.timesteps[inputs.step].expand(inputs.sample.shape[0])
            setting |= {"timestep": rows, "prev_sample": inputs.prev_sample, "return_sqrt_dt": True}
        result = function(scheduler, inputs.sample, inputs.model_output, generator=inputs.generator, **setting)
        return dict(zip(("prev_sample", "log_prob", "mean", "std_dev_t", "sqrt_dt"), result))

    yield from _cases.step_cases(original, call, settings, kinds=[_cases.FLOAT32_KIND])
    silent = [{"return_logprobs": False, "return_sqrt_dt": True}]
    yield from _cases.step_cases(original, call, silent, kinds=[_cases.FLOAT32_KIND], modes=["drawn"])


TARGETS = (
    _patching.Target(
        "FlowMatchSDEDiscreteScheduler.sample_previous_step",
        modules=("verl_omni.pipelines.schedulers.flow_match_sde",),
        variants=(sample_previous_step,),
        cases=_step_cases,
    ),
)
BLOCKS = (*SD3, *QWEN)  # of diffusers' transformers, what the launcher replaces besides


def patch(module: ModuleType, everywhere: bool = True) -> list[str]:
    """Replace what `module` holds of `TARGETS`; `_patching.replace` says where, and what it raises."""
    return _patching.replace(module, TARGETS, everywhere)


def unpatch(module: ModuleType) -> None:
    """Put the originals back, in every module that holds what `patch(module)` put in their place."""
    _patching.restore(module)
