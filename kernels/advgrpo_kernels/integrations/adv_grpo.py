"""Adv-GRPO (github.com/showlab/Adv-GRPO): `sde_step_with_logprob`, `sde_step_with_logprob_new` (Flow-CPS) and
`PerPromptStatTracker.update`; what holds and what differs is as in `flow_grpo`.

    import adv_grpo.diffusers_patch.sd3_sde_with_logprob as module
    from advgrpo_kernels.integrations import adv_grpo as fused
    fused.patch(module)         # and modules that have imported the functions, under whatever name
"""

from __future__ import annotations

from types import ModuleType

import torch

from . import _patching, _statistics, flow_grpo
from .diffusers_transformers import SD3


def sde_step_with_logprob(
    self,
    model_output: torch.Tensor,
    timestep: torch.Tensor,
    sample: torch.Tensor,
    noise_level: float = 0.7,
    prev_sample: torch.Tensor | None = None,
    generator: torch.Generator | list[torch.Generator] | None = None,
) -> tuple[torch.Tensor, ...]:
    """Flow-SDE step: (prev_sample, log_prob, prev_sample_mean, std_dev_t)."""
    settings = (noise_level, prev_sample, generator, "flow_sde", "gaussian")
    return flow_grpo.step(self, model_output, timestep, sample, *settings)


def sde_step_with_logprob_new(
    self,
    model_output: torch.Tensor,
    timestep: torch.Tensor,
    sample: torch.Tensor,
    noise_level: float = 0.7,
    prev_sample: torch.Tensor | None = None,
    generator: torch.Generator | list[torch.Generator] | None = None,
) -> tuple[torch.Tensor, ...]:
    """Flow-CPS step with the squared-error likelihood: (prev_sample, log_prob, prev_sample_mean, std_dev_t)."""
    settings = (noise_level, prev_sample, generator, "flow_cps", "squared_error")
    return flow_grpo.step(self, model_output, timestep, sample, *settings)


_MODULE = "adv_grpo.diffusers_patch.sd3_sde_with_logprob"
TARGETS = (
    *(
        _patching.Target(function.__name__, modules=(_MODULE,), variants=(function,), cases=flow_grpo.step_cases)
        for function in (sde_step_with_logprob, sde_step_with_logprob_new)
    ),
    _statistics.tracker("adv_grpo.stat_tracking"),
)
BLOCKS = SD3  # of diffusers' transformers, what the launcher replaces besides


def patch(module: ModuleType, everywhere: bool = True) -> list[str]:
    """Replace what `module` holds of `TARGETS`; `_patching.replace` says where, and what it raises."""
    return _patching.replace(module, TARGETS, everywhere)


def unpatch(module: ModuleType) -> None:
    """Put the originals back, in every module that holds what `patch(module)` put in their place."""
    _patching.restore(module)
