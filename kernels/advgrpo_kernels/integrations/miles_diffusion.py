"""miles_diffusion (github.com/radixark/miles_diffusion): `sde_step_with_logprob` of its trainer, and what `flow_grpo`
replaces in the copy of Flow-GRPO that it ships.

    import miles.utils.sde_log_prob as module
    from advgrpo_kernels.integrations import miles_diffusion as fused
    fused.patch(module)         # and modules that have imported the function

What holds and what differs is as in `flow_grpo`.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import torch

from . import _cases, _patching, flow_grpo
from ._self_check import Case


def sde_step_with_logprob(
    scheduler,
    model_output: torch.Tensor,
    timestep: torch.Tensor,
    sample: torch.Tensor,
    prev_sample: torch.Tensor,
    noise_level: float = 0.7,
) -> tuple[torch.Tensor, ...]:
    """Log-prob of a recorded Flow-SDE step: (prev_sample, log_prob [B], prev_sample_mean, std_dev_t), float32."""
    if prev_sample is None:
        raise ValueError("prev_sample must be the recorded next latents: this function draws none")
    settings = (noise_level, prev_sample, None, "flow_sde", "gaussian")
    return flow_grpo.step(scheduler, model_output, timestep, sample, *settings)


def _scored_cases(original, cls: type | None = None) -> Iterator[Case]:
    """A recorded step per row, also in bfloat16."""

    def call(function, inputs: _cases.Call, **setting):
        scheduler, latents = _cases.Scheduler(), inputs.sample
        timestep = scheduler.timesteps[inputs.step].expand(latents.shape[0])
        recorded = latents + 0.1 * inputs.model_output if inputs.prev_sample is None else inputs.prev_sample
        result = function(scheduler, inputs.model_output, timestep, latents, prev_sample=recorded, **setting)
        return dict(zip(("prev_sample", "log_prob", "mean", "std_dev_t"), result))

    return _cases.step_cases(original, call, [{}, {"noise_level": 0.3}])


TARGETS = (
    _patching.Target(
        "sde_step_with_logprob",
        modules=("miles.utils.sde_log_prob",),
        variants=(sde_step_with_logprob,),
        cases=_scored_cases,
    ),
    *flow_grpo.TARGETS,
)
BLOCKS = flow_grpo.BLOCKS


def patch(module: ModuleType, everywhere: bool = True) -> list[str]:
    """Replace what `module` holds of `TARGETS`; `_patching.replace` says where, and what it raises."""
    return _patching.replace(module, TARGETS, everywhere)


def unpatch(module: ModuleType) -> None:
    """Put the originals back, in every module that holds what `patch(module)` put in their place."""
    _patching.restore(module)
