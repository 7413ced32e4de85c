"""DanceGRPO (github.com/XueZeyue/DanceGRPO): `flux_step` of its trainers; its forks call it `dance_grpo_step`.

    python -m advgrpo_kernels.patch dance_grpo -- fastvideo/train_grpo_flux.py ...

Each trainer defines the function itself and is run as a script, so only the launcher reaches it before it is used. In a
program of yours: `dance_grpo.patch(module)`.

Until August 2025 (commit 9ac72b4) the original's log-prob lacked -log s - ½·log 2π; the policy ratio does not feel it.
The check of `patch` tells the two versions apart and takes the variant that agrees. Noise is torch.randn_like's.
Differences as in `mix_grpo`.
"""

from __future__ import annotations

from types import FunctionType, ModuleType

import torch

from . import _patching, mix_grpo
from ._transition import steps_at
from .diffusers_transformers import FLUX, QWEN

TRAINERS = ("flux", "flux_lora", "hunyuan", "qwenimage", "qwenimage_edit", "skyreels_i2v", "wan_2_1")


def _variant(name: str, likelihood: str) -> FunctionType:
    def flux_step(
        model_output: torch.Tensor,
        latents: torch.Tensor,
        eta: float,
        sigmas: torch.Tensor,
        index: int,
        prev_sample: torch.Tensor | None,
        grpo: bool,
        sde_solver: bool,
    ) -> tuple[torch.Tensor, ...]:
        """(prev_sample, pred_original_sample, log_prob [B]) with `grpo`, else (prev_sample_mean, pred_original_sample).

        Without `sde_solver` the mean is the ODE's and noise of the same standard deviation is added all the same.
        """
        if grpo and not eta > 0:
            raise ValueError(f"eta must be > 0 for a step with a log-prob, got {eta}")
        steps = steps_at(sigmas, index, "dance_sde", eta, latents.device)
        if not sde_solver:
            steps = steps._replace(coefficients=mix_grpo._without_drift(steps))
        noise = None
        if grpo and prev_sample is None:
            noise = torch.randn_like(latents, dtype=torch.promote_types(latents.dtype, model_output.dtype))
        return mix_grpo.dance_step(model_output, latents, steps, prev_sample, noise, grpo=grpo, likelihood=likelihood)

    flux_step.__name__ = flux_step.__qualname__ = name
    return flux_step


flux_step = _variant("flux_step", "gaussian")
flux_step_without_constants = _variant("flux_step_without_constants", "scaled")
_VARIANTS = (flux_step, flux_step_without_constants)

TARGETS = (
    _patching.Target(
        "flux_step",
        modules=tuple(f"train_grpo_{name}" for name in TRAINERS),
        variants=_VARIANTS,
        cases=mix_grpo.dance_cases,
    ),
    _patching.Target("dance_grpo_step", modules=(), variants=_VARIANTS, cases=mix_grpo.dance_cases),
)
BLOCKS = (*FLUX, *QWEN)  # of diffusers' transformers, what the launcher replaces besides


def patch(module: ModuleType, everywhere: bool = True) -> list[str]:
    """Replace what `module` holds of `TARGETS`; `_patching.replace` says where, and what it raises."""
    return _patching.replace(module, TARGETS, everywhere)


def unpatch(module: ModuleType) -> None:
    """Put the originals back, in every module that holds what `patch(module)` put in their place."""
    _patching.restore(module)
