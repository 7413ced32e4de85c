"""UniRL (github.com/Tencent-Hunyuan/UniRL): `StepStrategy.denoise` for its strategies "flow", "cps" and "dance".

    import unirl.sde.kernels as module
    from advgrpo_kernels.integrations import unirl as fused
    fused.patch(module)

Same values to float32 rounding, noise of the global generator (the original passes none), the next sample rounded to
the sample's dtype before its log-prob is taken, and its σ_max, 0.99 by default, where σ = 1. Strategies that define a
step, a likelihood or a rounding of their own (DPM-Solver, yours) run the original. No gradient to `sample` (raises).
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import torch

from . import _cases, _patching
from ._self_check import Case
from ._transition import steps_of, torch_noise, transition

# strategy -> dynamics, likelihood
STRATEGIES = {
    "FlowSDEStrategy": ("flow_sde", "gaussian"),
    "CPSSDEStrategy": ("flow_cps", "squared_error"),
    "DanceSDEStrategy": ("dance_sde", "gaussian"),
}
NO_NOISE = 1e-7  # an eta below has no log-prob and no rounding there


def denoise(
    self,
    noise_pred: torch.Tensor,
    sample: torch.Tensor,
    sigma: torch.Tensor,
    sigma_next: torch.Tensor,
    *,
    eta: float = 1.0,
    prev_sample: torch.Tensor | None = None,
    sigma_max: float = 0.99,
    step_index: int = 0,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """(prev_sample, log_prob [B] or None, prev_sample_mean), float32; sigma and sigma_next [] or [B]."""
    known = _strategy_of(type(self))
    if known is None:
        original = _patching.original_method(type(self), "denoise")
        if original is None:
            raise ValueError(f"{type(self).__name__} is none of {', '.join(STRATEGIES)}: patch its module first")
        levels = {"eta": eta, "prev_sample": prev_sample, "sigma_max": sigma_max, "step_index": step_index}
        return original(self, noise_pred, sample, sigma, sigma_next, **levels)
    dynamics, likelihood = known
    rows = [value.to(sample.device, torch.float32).reshape(-1).expand(sample.shape[0]) for value in (sigma, sigma_next)]
    coefficients = steps_of(*rows, dynamics, float(eta), float(sigma_max)).coefficients
    silent, storage = eta < NO_NOISE, sample.dtype
    if prev_sample is not None and not silent:
        prev_sample = prev_sample.to(storage)
    noise = None
    if prev_sample is None:
        noise = torch_noise(noise_pred.shape, None, noise_pred.device, torch.float32)
    taken = transition(
        sample,
        noise_pred,
        coefficients,
        next_latents=prev_sample,
        noise=noise,
        likelihood=None if silent else likelihood,
        storage_dtype=torch.float32 if silent else storage,
    )
    return taken.next_latents, taken.log_prob, taken.mean


def _strategy_of(cls: type) -> tuple[str, str] | None:
    """Dynamics and likelihood of a strategy class; None for one that is or does something else."""
    home = next((base.__module__ for base in reversed(cls.__mro__) if "denoise" in vars(base)), None)
    for base in cls.__mro__:
        if base.__name__ in STRATEGIES and base.__module__ == home:
            parts = ("step", "compute_log_prob", "_finalize_logp")
            is_stock = all(getattr(cls, name) is getattr(base, name) for name in parts)
            return STRATEGIES[base.__name__] if is_stock else None
    return None


def _denoise_cases(original, cls: type) -> Iterator[Case]:
    """Each strategy of the class's module, which are its subclasses, at its own and at another σ_max."""
    classes = {c.__name__: c for c in _subclasses(cls) if c.__name__ in STRATEGIES and c.__module__ == cls.__module__}
    levels = ({}, {"eta": 0.7, "sigma_max": 0.9})
    kinds = [_cases.FLOAT32_KIND, *map(_cases.stored_in, (torch.bfloat16, torch.float16))]

    def call(function, inputs: _cases.Call, strategy, **setting):
        sigma, after = _cases.SIGMAS[inputs.step : inputs.step + 2]
        if inputs.prev_sample is not None:  # one per row when training, one for all when sampling
            sigma, after = (value.expand(inputs.sample.shape[0]) for value in (sigma, after))
        setting |= {"prev_sample": inputs.prev_sample, "step_index": inputs.step}
        result = function(classes[strategy](), inputs.model_output, inputs.sample, sigma, after, **setting)
        outputs = dict(zip(("prev_sample", "log_prob", "mean"), result))
        if setting.get("eta") != 0.0:
            outputs["left_to_round"] = _cases.left_to_round(outputs["prev_sample"], inputs.sample.dtype)
        return outputs

    settings = [{"strategy": name} | level for name in classes for level in levels]
    yield from _cases.step_cases(original, call, settings, kinds=kinds, drawing="global")
    still = [{"strategy": name, "eta": 0.0} for name in classes]
    yield from _cases.step_cases(original, call, still, steps=[3], drawing="global", modes=["drawn"])


def _subclasses(cls: type) -> Iterator[type]:
    for child in cls.__subclasses__():
        yield child
        yield from _subclasses(child)


TARGETS = (
    _patching.Target("StepStrategy.denoise", modules=("unirl.sde.kernels",), variants=(denoise,), cases=_denoise_cases),
)


def patch(module: ModuleType, everywhere: bool = True) -> list[str]:
    """Replace what `module` holds of `TARGETS`; `_patching.replace` says where, and what it raises."""
    return _patching.replace(module, TARGETS, everywhere)


def unpatch(module: ModuleType) -> None:
    """Put the originals back, in every module that holds what `patch(module)` put in their place."""
    _patching.restore(module)
