"""DanceGRPO (github.com/XueZeyue/DanceGRPO): `flux_step` of its FLUX trainer; its forks call it `dance_grpo_step`.

    import fastvideo.train_grpo_flux as module
    from advgrpo_kernels.integrations import dance_grpo as fused
    fused.patch(module)

The original's log-prob lacks -log s - ½·log 2π (the line that should subtract them stands on its own), and so does
this one's: the policy ratio is the same. Noise is torch.randn_like's. Differences as in `mix_grpo`.
"""

from __future__ import annotations

from types import ModuleType

import torch

from . import _patching, mix_grpo
from ._transition import steps_at


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
    return mix_grpo.unscaled_step(model_output, latents, steps, prev_sample, noise, grpo=grpo, scaled=True)


def dance_grpo_step(
    model_output: torch.Tensor,
    latents: torch.Tensor,
    eta: float,
    sigmas: torch.Tensor,
    index: int,
    prev_sample: torch.Tensor | None,
    grpo: bool,
    sde_solver: bool,
) -> tuple[torch.Tensor, ...]:
    """`flux_step` under the name it has in the codebases built on DanceGRPO."""
    return flux_step(model_output, latents, eta, sigmas, index, prev_sample, grpo, sde_solver)


REPLACEMENTS = {"flux_step": flux_step, "dance_grpo_step": dance_grpo_step}


def patch(module: ModuleType) -> list[str]:
    """Replace what `module` has of `REPLACEMENTS`; see `_patching.replace` for what it raises."""
    return _patching.replace(module, REPLACEMENTS)


def unpatch(module: ModuleType) -> None:
    """Put the originals back."""
    _patching.restore(module)
