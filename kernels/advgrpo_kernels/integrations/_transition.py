"""What the integrations share: the step of a schedule looked up without a host sync, torch's noise, one transition."""

from __future__ import annotations

import functools
import weakref
from typing import NamedTuple

import torch

from .._runtime import can_look_at
from ..ops._gaussian import per_row, step_mean
from ..ops.coefficients import _step_coefficients, transition_coefficients
from ..ops.gaussian_log_prob import gaussian_log_prob
from ..ops.gaussian_step import gaussian_step

CACHED_SCHEDULES = 64


class Steps(NamedTuple):
    """Constants of some steps of a sampler, one or n of each, float32."""

    coefficients: torch.Tensor  # [3] or [n, 3] (a, b, s)
    std: torch.Tensor  # [] or [n] the diffusion coefficient: s/sqrt(-dt) for flow_sde and dance_sde, s for flow_cps
    dt: torch.Tensor  # σ' - σ < 0
    sigma: torch.Tensor


_tables: dict[tuple, tuple[weakref.ref, int, torch.Tensor]] = {}


def schedule_table(sigmas: torch.Tensor, dynamics: str, noise_level: float, device: torch.device) -> torch.Tensor:
    """Constants of the T steps of `sigmas` [T+1] as a table [T+1, 6] for `steps_at`, its last row NaN.

    The values are read on the host once per tensor, not once per step.
    """
    key = (id(sigmas), dynamics, float(noise_level), device)
    version = 0 if sigmas.is_inference() else sigmas._version
    known = _tables.get(key)
    if known is not None and known[0]() is sigmas and known[1] == version:
        return known[2]
    sigma = sigmas.detach().to("cpu", torch.float64)
    coefficients = transition_coefficients(sigma, dynamics=dynamics, noise_level=noise_level).double()
    dt = sigma[1:] - sigma[:-1]
    std = coefficients[:, 2] / (1.0 if dynamics == "flow_cps" else torch.sqrt(-dt))
    table = torch.cat([coefficients, torch.stack([std, dt, sigma[:-1]], dim=1)], dim=1)
    table = torch.cat([table, torch.full_like(table[:1], float("nan"))]).to(device, torch.float32)
    if len(_tables) >= CACHED_SCHEDULES:
        _tables.clear()
    _tables[key] = (weakref.ref(sigmas), version, table)
    return table


def steps_at(table: torch.Tensor, index: int | torch.Tensor) -> Steps:
    """The rows of `table` at `index`, an integer or int64 [n]."""
    rows = table.index_select(0, index) if torch.is_tensor(index) else table[index]
    return Steps(rows[..., :3], *rows[..., 3:].unbind(-1))


@functools.lru_cache(maxsize=4096)
def single_step(now: float, after: float, dynamics: str, noise_level: float, sigma_max: float) -> tuple[float, ...]:
    """(a, b, s) of one step from σ = now to σ' = after; sigma_max stands in for σ where 1 - σ = 0."""
    # The formula's σ_1 is the second entry of its schedule, so the step itself is put behind it.
    return _step_coefficients([1.0, sigma_max, now, after], 2, dynamics, noise_level)


def step_indices(timesteps: torch.Tensor, timestep, device: torch.device) -> torch.Tensor:
    """Positions of each timestep in the schedule's `timesteps` [T], int64 [len(timestep)], found on `device`.

    A timestep that the schedule lacks raises IndexError on the CPU, as the scheduler's own look-up does. On a GPU,
    where looking would cost a synchronisation, its index is T, which is the NaN row of `schedule_table`.
    """
    if not torch.is_tensor(timestep):
        timestep = torch.stack([torch.as_tensor(t) for t in timestep])
    matches = timesteps.to(device)[None, :] == timestep.to(device)[:, None]
    count = timesteps.shape[0]
    index = count - (matches * torch.arange(count, 0, -1, device=device)).amax(1)
    if can_look_at(index) and bool((index == count).any()):
        raise IndexError(f"timestep {timestep.tolist()} is not among the scheduler's {timesteps.tolist()}")
    return index


def broadcast(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """[n] -> [n, 1, ...] of like's rank."""
    return values.view(-1, *[1] * (like.dim() - 1))


def torch_noise(shape: torch.Size, generator, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """The numbers `diffusers.utils.torch_utils.randn_tensor` draws: on the generator's device, a list draws per row."""
    generators = generator if isinstance(generator, list) else [generator]
    if len(generators) not in (1, shape[0]):
        raise ValueError(f"generator must be one or a list of {shape[0]}, one per image, got {len(generators)}")
    kinds = {device.type if g is None else g.device.type for g in generators}
    if kinds - {"cpu", device.type}:
        raise ValueError(f"cannot draw noise for {device} from a generator on {', '.join(sorted(kinds))}")
    row_shape = shape if len(generators) == 1 else (1, *shape[1:])
    rows = []
    for g in generators:
        at = device if g is None else g.device
        rows.append(torch.randn(row_shape, generator=g, device=at, dtype=dtype))
    return (rows[0] if len(rows) == 1 else torch.cat(rows)).to(device)


class Transition(NamedTuple):
    """next_latents, mean [B, ...] float32; log_prob [B] float32. The last two are differentiable in the velocity."""

    next_latents: torch.Tensor
    log_prob: torch.Tensor | None
    mean: torch.Tensor


def transition(
    latents: torch.Tensor,
    velocity: torch.Tensor,
    coefficients: torch.Tensor,
    *,
    next_latents: torch.Tensor | None,
    noise: torch.Tensor | None,
    likelihood: str | None,
) -> Transition:
    """Take a step with `noise` (None: s must be 0), or evaluate the one to `next_latents`; NaN where s = 0.

    Without a gradient to the velocity a step is one launch; with one, the mean is PyTorch and the log-prob an op.
    """
    latents = latents.float()
    if torch.is_grad_enabled() and latents.requires_grad:
        raise ValueError("sample requires grad, but these steps are differentiable in the model output only: detach it")
    if next_latents is None and not (torch.is_grad_enabled() and velocity.requires_grad):
        step = gaussian_step(latents, velocity, coefficients, noise=noise, likelihood=likelihood, return_mean=True)
        if likelihood is None or step.log_prob is not None:
            return Transition(*step)
        return Transition(
            step.next_latents, density(latents, velocity, step.next_latents, coefficients, likelihood), step.mean
        )
    mean = step_mean(latents, velocity, coefficients, None, 1.0, torch.float32)
    if next_latents is None:
        s = per_row(coefficients, latents.dim(), torch.float32)[2]
        next_latents = mean if noise is None else mean + s * noise.float()
    next_latents = next_latents.float()
    log_prob = None
    if likelihood is not None:
        log_prob = density(latents, velocity, next_latents.detach(), coefficients, likelihood)
    return Transition(next_latents, log_prob, mean)


def density(
    latents: torch.Tensor,
    velocity: torch.Tensor,
    next_latents: torch.Tensor,
    coefficients: torch.Tensor,
    likelihood: str,
) -> torch.Tensor:
    """Log-prob [B]; the peers give NaN for a gaussian row with s = 0, where `gaussian_log_prob` raises on the CPU."""
    flat = coefficients[..., 2] == 0 if likelihood == "gaussian" and can_look_at(coefficients) else None
    if flat is None or not bool(flat.any()):
        return gaussian_log_prob(latents, velocity, next_latents, coefficients, likelihood=likelihood)
    coefficients = torch.cat([coefficients[..., :2], (coefficients[..., 2] + flat.float())[..., None]], dim=-1)
    log_prob = gaussian_log_prob(latents, velocity, next_latents, coefficients, likelihood=likelihood)
    return torch.where(flat, float("nan"), log_prob)
