"""MixGRPO (github.com/Tencent-Hunyuan/MixGRPO): `flow_grpo_step` and `dance_grpo_step` of its sampling utilities.

    import fastvideo.utils.sampling_utils as module
    from advgrpo_kernels.integrations import mix_grpo as fused
    fused.patch(module)            # and modules that have imported the functions

Same values to float32 rounding, the same noise from the same generator (drawn in model_output's dtype, as there).
Differences: a bfloat16 model output is used in float32 where the original rounds b·v to bfloat16 first; no gradient to
`latents` (raises); `sigmas` is read on the host once, not at every step.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import torch

from . import _cases, _patching
from ._self_check import FLOAT32, Case, Tolerance
from ._transition import Steps, steps_at, torch_noise, transition
from .diffusers_transformers import FLUX

DEFAULT_CPS_LEVEL = 0.8


def flow_grpo_step(
    model_output: torch.Tensor,
    latents: torch.Tensor,
    eta: float,
    sigmas: torch.Tensor,
    index: int,
    prev_sample: torch.Tensor | None,
    generator: torch.Generator | list[torch.Generator] | None = None,
    determistic: bool = False,
    sde_type: str = "sde",
    noise_level: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(prev_sample, pred_original_sample, log_prob [B], prev_sample_mean, standard deviation of the step []).

    With `determistic` the step taken is the ODE's, and its log-prob is that under the stochastic step.
    """
    if prev_sample is not None and generator is not None:
        raise ValueError("give generator or prev_sample, not both")
    dynamics, likelihood, level = _kind(sde_type, "flow_sde", eta, noise_level)
    steps = steps_at(sigmas, index, dynamics, level, latents.device)
    noise = None
    if prev_sample is None:  # drawn for a deterministic step too: the generator moves on as it does there
        noise = torch_noise(model_output.shape, generator, model_output.device, model_output.dtype)
    if determistic:
        prev_sample = _ode_mean(model_output, latents, steps)
    taken = transition(
        latents, model_output, steps.coefficients, next_latents=prev_sample, noise=noise, likelihood=likelihood
    )
    predicted = _clean(model_output, latents, steps)
    return taken.next_latents, predicted, taken.required_log_prob, taken.mean, steps.coefficients[2]


def dance_grpo_step(
    model_output: torch.Tensor,
    latents: torch.Tensor,
    eta: float,
    sigmas: torch.Tensor,
    index: int,
    prev_sample: torch.Tensor | None,
    grpo: bool,
    sde_solver: bool,
    sde_type: str = "sde",
    noise_level: float | None = None,
) -> tuple[torch.Tensor, ...]:
    """(prev_sample, pred_original_sample, log_prob [B]) with `grpo`, else (prev_sample_mean, pred_original_sample).

    The log-prob of "sde" leaves out the constants -log s - ½·log 2π, as the original does.
    """
    dynamics, _, level = _kind(sde_type, "dance_sde", eta, noise_level)
    steps = steps_at(sigmas, index, dynamics, level, latents.device)
    if dynamics == "dance_sde" and not sde_solver:
        steps = steps._replace(coefficients=_without_drift(steps))
    noise = None
    if grpo and prev_sample is None and sde_solver:
        noise = torch.randn_like(latents, dtype=torch.promote_types(latents.dtype, model_output.dtype))
    kind = "scaled" if dynamics == "dance_sde" else "squared_error"
    return dance_step(model_output, latents, steps, prev_sample, noise, grpo=grpo, likelihood=kind)


def dance_step(
    model_output: torch.Tensor,
    latents: torch.Tensor,
    steps: Steps,
    prev_sample: torch.Tensor | None,
    noise: torch.Tensor | None,
    *,
    grpo: bool,
    likelihood: str,
) -> tuple[torch.Tensor, ...]:
    """A step and its log-prob, `likelihood` as in `transition`; without noise the mean itself."""
    predicted = _clean(model_output, latents, steps)
    a, b, _ = steps.coefficients.unbind()
    if noise is None and prev_sample is None:
        mean = a * latents.float() + b * model_output.float()
        if not grpo:
            return mean, predicted
        prev_sample = mean
    taken = transition(
        latents, model_output, steps.coefficients, next_latents=prev_sample, noise=noise, likelihood=likelihood
    )
    return (taken.next_latents, predicted, taken.required_log_prob) if grpo else (taken.mean, predicted)


def _kind(sde_type: str, sde: str, eta: float, noise_level: float | None) -> tuple[str, str, float]:
    """(dynamics, likelihood, noise level)."""
    if sde_type == "sde":
        return sde, "gaussian", eta if noise_level is None else noise_level
    if sde_type == "cps":
        return "flow_cps", "squared_error", DEFAULT_CPS_LEVEL if noise_level is None else noise_level
    raise ValueError(f"sde_type must be 'sde' or 'cps', got {sde_type!r}")


def _clean(model_output: torch.Tensor, latents: torch.Tensor, steps: Steps) -> torch.Tensor:
    """The image the velocity points to, x - σ·v."""
    return latents.float() - steps.sigma * model_output.float()


def _ode_mean(model_output: torch.Tensor, latents: torch.Tensor, steps: Steps) -> torch.Tensor:
    return latents.float() + steps.dt * model_output.float()


def _without_drift(steps: Steps) -> torch.Tensor:
    """(1, dt, s): the ODE's mean with the SDE's standard deviation."""
    return torch.stack([torch.ones_like(steps.dt), steps.dt, steps.coefficients[2]])


_ROUNDED = "the original rounds products with a bfloat16 velocity to bfloat16"
BFLOAT16_VELOCITY = _cases.Kind(
    torch.bfloat16,
    torch.float32,
    {
        **dict.fromkeys(("prev_sample", "mean", "predicted"), Tolerance(0.0, 2**-7, _ROUNDED)),
        "log_prob": Tolerance(2e-2, 2e-2, _ROUNDED),
        "gradient of mean": Tolerance(0.0, 2**-6, _ROUNDED),
        "gradient of log_prob": Tolerance(2e-3, 0.1, _ROUNDED),
        "standard deviation": FLOAT32,
    },
)
KINDS = (_cases.FLOAT32_KIND, BFLOAT16_VELOCITY)


def _flow_cases(original, cls: type | None = None) -> Iterator[Case]:
    settings = [{"determistic": determistic} for determistic in (False, True)]
    return _cases.step_cases(original, _call_flow, _with_types(original, settings), kinds=KINDS)


def _call_flow(function, call: _cases.Call, **setting):
    output, latents, step, prev_sample, generator = call
    result = function(output, latents, 0.7, _cases.SIGMAS, step, prev_sample, generator, **setting)
    return dict(zip(("prev_sample", "predicted", "log_prob", "mean", "standard deviation"), result))


def dance_cases(original, cls: type | None = None) -> Iterator[Case]:
    """With and without the SDE's drift, and the mean alone."""
    settings = [{"sde_solver": solver} for solver in (True, False)]
    settings = _with_types(original, settings)
    yield from _cases.step_cases(original, _call_dance, settings, kinds=KINDS, drawing="global")
    means = [setting | {"grpo": False} for setting in settings]
    yield from _cases.step_cases(original, _call_dance, means, kinds=KINDS, drawing="global", modes=["drawn"])


def _call_dance(function, call: _cases.Call, grpo: bool = True, **setting):
    output, latents, step, prev_sample, _ = call
    result = function(output, latents, 0.3, _cases.SIGMAS, step, prev_sample, grpo, **setting)
    return dict(zip(("prev_sample", "predicted", "log_prob") if grpo else ("mean", "predicted"), result))


def _with_types(original, settings: list[dict]) -> list[dict]:
    if "sde_type" not in _cases.parameters(original):
        return settings
    return [setting | {"sde_type": name} for setting in settings for name in ("sde", "cps")]


_MODULE = "fastvideo.utils.sampling_utils"
TARGETS = (
    _patching.Target("flow_grpo_step", modules=(_MODULE,), variants=(flow_grpo_step,), cases=_flow_cases),
    _patching.Target("dance_grpo_step", modules=(_MODULE,), variants=(dance_grpo_step,), cases=dance_cases),
)
BLOCKS = FLUX  # of diffusers' transformers, what the launcher replaces besides


def patch(module: ModuleType, everywhere: bool = True) -> list[str]:
    """Replace what `module` holds of `TARGETS`; `_patching.replace` says where, and what it raises."""
    return _patching.replace(module, TARGETS, everywhere)


def unpatch(module: ModuleType) -> None:
    """Put the originals back, in every module that holds what `patch(module)` put in their place."""
    _patching.restore(module)
