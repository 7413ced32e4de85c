"""Coefficients (a, b, s) of the affine Gaussian step `x_next = a·x + b·v + s·z`, z ~ N(0, I).

Every stochastic sampler of a rectified flow used here is such a step; only the three scalars differ. With σ the
current and σ' the next noise level, dt = σ' - σ < 0 and η the sampler's `noise_level`:

    ode        a = 1                      b = dt                              s = 0
    flow_sde   a = 1 + std²·dt/(2σ)       b = dt·(1 + std²·(1-σ)/(2σ))        s = std·sqrt(-dt)
               std = η·sqrt(σ/(1-σ*)), σ* = σ_1 where σ = 1 (there 1-σ = 0), else σ   (Flow-GRPO, arXiv 2505.05470)
    dance_sde  as flow_sde with std = η                                               (DanceGRPO, arXiv 2505.07818)
    flow_cps   a = (1-σ') + r             b = -σ·(1-σ') + (1-σ)·r             s = σ'·sin(ηπ/2)
               r = sqrt(σ'² - s²)                                                     (Flow-CPS, arXiv 2509.05952)
    ddim       a = sqrt(ᾱ'/ᾱ)             b = sqrt(1-ᾱ'-s²) - sqrt(ᾱ'(1-ᾱ)/ᾱ)
               s = η·sqrt((1-ᾱ')/(1-ᾱ))·sqrt(1-ᾱ/ᾱ')        (DDIM, arXiv 2010.02502; v is then the predicted noise ε)

Everything is computed in float64 and rounded to float32 at the end: a table on the host, once per schedule, single
steps on the device of their arguments.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

__all__ = ["DYNAMICS", "ddim_coefficients", "step_coefficients", "step_std", "transition_coefficients"]

DYNAMICS = ("ode", "flow_sde", "dance_sde", "flow_cps")

Scalars = float | Sequence[float] | torch.Tensor


def transition_coefficients(
    sigmas: Sequence[float] | torch.Tensor, *, dynamics: str, noise_level: float | Sequence[float]
) -> torch.Tensor:
    """Coefficient table [T, 3] float32 on the CPU, columns (a, b, s), for a schedule of T steps.

    Args:
        sigmas: T+1 noise levels, strictly decreasing from at most 1 to exactly 0.
        dynamics: one of `DYNAMICS`; formulas in the module docstring.
        noise_level: η, one float for all steps or T floats. 0 makes that step an exact ODE step (a=1, b=dt, s=0).
            `flow_cps` needs η <= 1, where sin(ηπ/2) reaches its maximum.

    Raises:
        ValueError: names the argument, its value and what was expected.
    """
    sigma = [float(value) for value in sigmas]
    _check_sigmas(sigma)
    levels = _noise_levels(noise_level, len(sigma) - 1, dynamics)
    return step_coefficients(sigma[:-1], sigma[1:], dynamics=dynamics, noise_level=levels)


def step_coefficients(
    sigma: Scalars,
    sigma_next: Scalars,
    *,
    dynamics: str,
    noise_level: Scalars,
    sigma_max: Scalars | None = None,
) -> torch.Tensor:
    """Coefficients (a, b, s) of single steps σ -> σ', without a schedule: any steps, in any order, one per row.

    Values are not looked at, so nothing waits for a GPU: where `transition_coefficients` raises, σ' > σ gives s = NaN
    here, two equal σ give s = 0, and σ = 0 gives NaN.

    Args:
        sigma, sigma_next, noise_level: floats, sequences or tensors that broadcast together.
        dynamics: one of `DYNAMICS`.
        sigma_max: σ* of flow_sde where σ = 1 and 1-σ = 0; the default is σ', as in a schedule that starts at 1.

    Returns:
        float32 of the broadcast shape plus a last dimension of 3, on the tensors' device.
    """
    terms = step_terms(sigma, sigma_next, dynamics, noise_level, sigma_max)
    return torch.stack(terms[:3], dim=-1).to(torch.float32)


def step_std(
    sigma: Scalars,
    sigma_next: Scalars,
    *,
    dynamics: str,
    noise_level: Scalars,
    sigma_max: Scalars | None = None,
) -> torch.Tensor:
    """Standard deviation of the noise as Flow-GRPO reports it (`std_dev_t`), float32 of the arguments' broadcast shape.

    Per unit of time for flow_sde and dance_sde, where a step's own is s = std·sqrt(-dt); s itself for flow_cps; 0 for
    ode. Arguments as in `step_coefficients`. For `clipped_policy_loss(kl_std=...)`.
    """
    return step_terms(sigma, sigma_next, dynamics, noise_level, sigma_max).std.to(torch.float32)


def ddim_coefficients(
    alphas_cumprod_t: float | Sequence[float] | torch.Tensor,
    alphas_cumprod_next: float | Sequence[float] | torch.Tensor,
    noise_level: float | Sequence[float] | torch.Tensor,
) -> torch.Tensor:
    """Coefficients of DDIM with noise η for models that predict ε (SD1.5, SDXL).

    Args:
        alphas_cumprod_t: ᾱ at the current timestep, a float or T floats in (0, 1).
        alphas_cumprod_next: ᾱ' at the next, less noisy timestep, ᾱ <= ᾱ' <= 1, same shape.
        noise_level: η in [0, 1], a float or T floats; 0 is deterministic DDIM.

    Returns:
        float32 of the arguments' common shape plus a last dimension (a, b, s): [3] for floats, [T, 3] for lists.
    """
    now, after, eta = (
        torch.as_tensor(value, dtype=torch.float64, device="cpu")
        for value in (alphas_cumprod_t, alphas_cumprod_next, noise_level)
    )
    if not bool(((now > 0) & (now < 1) & (after >= now) & (after <= 1)).all()):
        raise ValueError(
            "alphas_cumprod must satisfy 0 < alphas_cumprod_t < 1 and alphas_cumprod_t <= alphas_cumprod_next <= 1 "
            f"(towards less noise), got {now.tolist()} and {after.tolist()}"
        )
    if not bool(((eta >= 0) & (eta <= 1)).all()):
        raise ValueError(f"noise_level must lie in [0, 1] for ddim, got {eta.tolist()}")
    s = eta * torch.sqrt((1 - after) / (1 - now)) * torch.sqrt(1 - now / after)
    a = torch.sqrt(after / now)
    b = torch.sqrt((1 - after - s**2).clamp_min(0)) - torch.sqrt(after * (1 - now) / now)
    return torch.stack(torch.broadcast_tensors(a, b, s), dim=-1).to(torch.float32)


class StepTerms(NamedTuple):
    """Float64 tensors of one shape."""

    a: torch.Tensor
    b: torch.Tensor
    s: torch.Tensor
    std: torch.Tensor  # see `step_std`


def step_terms(
    sigma: Scalars, sigma_next: Scalars, dynamics: str, noise_level: Scalars, sigma_max: Scalars | None = None
) -> StepTerms:
    """The formulas of the module docstring in float64; arguments as in `step_coefficients`."""
    if dynamics not in DYNAMICS:
        raise ValueError(f"dynamics must be one of {DYNAMICS}, got {dynamics!r}")
    arguments = [sigma, sigma_next, noise_level, sigma_next if sigma_max is None else sigma_max]
    devices = [value.device for value in arguments if torch.is_tensor(value)]
    device = next((device for device in devices if device.type != "cpu"), torch.device("cpu"))
    columns = [torch.as_tensor(value, dtype=torch.float64, device=device) for value in arguments]
    now, after, level, first = torch.broadcast_tensors(*columns)
    dt = after - now
    if dynamics == "ode":
        return StepTerms(torch.ones_like(dt), dt, torch.zeros_like(dt), torch.zeros_like(dt))
    if dynamics == "flow_cps":
        s = std = after * torch.sin(level * (math.pi / 2))
        r = torch.sqrt((after**2 - s**2).clamp_min(0))
        a, b = (1 - after) + r, -now * (1 - after) + (1 - now) * r
    else:
        std = level
        if dynamics == "flow_sde":
            std = level * torch.sqrt(now / (1 - torch.where(now == 1, first, now)))
        drift = std**2 * dt / (2 * now)
        a, b, s = 1 + drift, dt + drift * (1 - now), std * torch.sqrt(-dt)
    still = level == 0  # the ODE's step to the last bit
    return StepTerms(torch.where(still, 1.0, a), torch.where(still, dt, b), s, std)


def _check_sigmas(sigma: list[float]) -> None:
    falling = all(later < earlier for earlier, later in itertools.pairwise(sigma))
    if len(sigma) < 2 or not falling or sigma[-1] != 0.0 or sigma[0] > 1.0:
        raise ValueError(f"sigmas must be at least 2 floats, strictly decreasing from <= 1 to exactly 0, got {sigma}")


def _noise_levels(noise_level: float | Sequence[float], steps: int, dynamics: str) -> list[float]:
    is_scalar = isinstance(noise_level, (int, float))
    levels = [float(noise_level)] * steps if is_scalar else [float(value) for value in noise_level]
    if len(levels) != steps:
        raise ValueError(f"noise_level must be a float or one float per step ({steps}), got {len(levels)} values")
    highest = 1.0 if dynamics == "flow_cps" else math.inf
    if not all(0.0 <= level <= highest for level in levels):
        raise ValueError(f"noise_level must lie in [0, {highest:g}] for dynamics={dynamics!r}, got {noise_level}")
    return levels
