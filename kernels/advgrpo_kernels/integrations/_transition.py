"""What the integrations share: the step of a schedule looked up without a host sync, torch's noise, one transition."""

from __future__ import annotations

import weakref
from typing import NamedTuple

import torch

from .._runtime import can_look_at
from ..ops._gaussian import per_row, step_mean
from ..ops._layers import given
from ..ops.coefficients import Scalars, step_terms
from ..ops.gaussian_log_prob import gaussian_log_prob
from ..ops.gaussian_step import gaussian_step

CACHED_SCHEDULES = 64


class Steps(NamedTuple):
    """Constants of some steps of a sampler, one or n of each, float32."""

    coefficients: torch.Tensor  # [3] or [n, 3] (a, b, s)
    std: torch.Tensor  # [] or [n] as `step_std` gives it: s/sqrt(-dt) for flow_sde and dance_sde, s for flow_cps
    dt: torch.Tensor  # σ' - σ < 0
    sigma: torch.Tensor


def steps_of(
    sigma: Scalars, sigma_next: Scalars, dynamics: str, noise_level: Scalars, sigma_max: Scalars | None = None
) -> Steps:
    """The steps σ -> σ', computed on the device of the arguments; see `step_coefficients`."""
    a, b, s, std = step_terms(sigma, sigma_next, dynamics, noise_level, sigma_max)
    now, after = (torch.as_tensor(value, dtype=torch.float64, device=a.device) for value in (sigma, sigma_next))
    rest = (std, (after - now).expand_as(a), now.expand_as(a))
    return Steps(torch.stack([a, b, s], dim=-1).float(), *(value.float() for value in rest))


def steps_at(
    sigmas: torch.Tensor,
    index: int | torch.Tensor,
    dynamics: str,
    noise_level: float | torch.Tensor,
    device: torch.device,
) -> Steps:
    """Steps `index` (an integer or int64 [n]) of the schedule `sigmas` [T+1], whatever its other steps are like.

    A noise level is a number, or a tensor of one value or of shape [n, 1, ...]. With a number the schedule's values are
    read on the host once, not once per step; with a tensor on a GPU the constants are computed there.

    Raises:
        IndexError: an integer index without a step.
        ValueError: a noise level of another shape, which the originals would broadcast over pixels.
    """
    count = len(sigmas) - 1
    if not torch.is_tensor(index) and not 0 <= index < count:
        raise IndexError(f"step {index} of a schedule of {count} steps")
    if torch.is_tensor(noise_level) and noise_level.numel() == 1 and can_look_at(noise_level):
        noise_level = noise_level.item()
    if not torch.is_tensor(noise_level):
        table = _schedule_table(sigmas, dynamics, noise_level, device)
        rows = table.index_select(0, index) if torch.is_tensor(index) else table[index]
        return Steps(rows[..., :3], *rows[..., 3:].unbind(-1))
    if noise_level.numel() > 1 and (noise_level.dim() < 2 or noise_level.shape[0] != noise_level.numel()):
        raise ValueError(
            f"noise_level must be a number or one per row, [B, 1, ...], got shape {tuple(noise_level.shape)}"
        )
    padded = _with_nan(sigmas.to(device, torch.float64))
    level = noise_level.to(device).reshape(-1 if noise_level.numel() > 1 else ())
    return steps_of(padded[index], padded[index + 1], dynamics, level, padded[1])


_tables: dict[tuple, tuple[weakref.ref, int, torch.Tensor]] = {}


def _schedule_table(sigmas: torch.Tensor, dynamics: str, noise_level: float, device: torch.device) -> torch.Tensor:
    """Constants of the T steps of `sigmas` [T+1] as [T+1, 6] float32 in the order of `Steps`, the last row NaN."""
    key = (id(sigmas), dynamics, float(noise_level), device)
    version = 0 if sigmas.is_inference() else sigmas._version
    known = _tables.get(key)
    if known is not None and known[0]() is sigmas and known[1] == version:
        return known[2]
    sigma = sigmas.detach().to("cpu", torch.float64)
    coefficients, *rest = steps_of(sigma[:-1], sigma[1:], dynamics, noise_level, sigma[1])
    table = _with_nan(torch.cat([coefficients, torch.stack(rest, dim=1)], dim=1)).to(device)
    if len(_tables) >= CACHED_SCHEDULES:
        _tables.clear()
    _tables[key] = (weakref.ref(sigmas), version, table)
    return table


def _with_nan(rows: torch.Tensor) -> torch.Tensor:
    """`rows` and one of NaN: what a timestep that the schedule lacks selects."""
    return torch.cat([rows, torch.full_like(rows[:1], float("nan"))])


def step_indices(timesteps: torch.Tensor, timestep, device: torch.device) -> torch.Tensor:
    """Positions of each timestep in the schedule's `timesteps` [T], int64 [len(timestep)], found on `device`.

    A timestep that the schedule lacks raises IndexError on the CPU, as the scheduler's own look-up does. On a GPU,
    where looking would cost a synchronisation, its index is T, which selects NaN in `steps_at`.
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

    @property
    def required_log_prob(self) -> torch.Tensor:
        """`log_prob` of a step that was taken with a likelihood."""
        return given("likelihood", self.log_prob)


def transition(
    latents: torch.Tensor,
    velocity: torch.Tensor,
    coefficients: torch.Tensor,
    *,
    next_latents: torch.Tensor | None,
    noise: torch.Tensor | None,
    likelihood: str | None,
    storage_dtype: torch.dtype = torch.float32,
) -> Transition:
    """Take a step with `noise` (None: s must be 0), or evaluate the one to `next_latents`; NaN where s = 0.

    A new step is rounded to `storage_dtype` before its log-prob is taken, and returned in float32 all the same.
    `likelihood` is one of `gaussian_step`'s, or "scaled": the squared error over 2s², a gaussian without its constants.
    Without a gradient to the velocity it is one launch; with one, the mean is PyTorch and the log-prob an op.
    """
    if likelihood == "scaled":
        taken = transition(
            *(latents, velocity, coefficients),
            next_latents=next_latents,
            noise=noise,
            likelihood="squared_error",
            storage_dtype=storage_dtype,
        )
        return taken._replace(log_prob=taken.required_log_prob / (2 * coefficients[..., 2].square()))
    latents = latents.float()
    if torch.is_grad_enabled() and latents.requires_grad:
        raise ValueError("sample requires grad, but these steps are differentiable in the model output only: detach it")
    if next_latents is None and not (torch.is_grad_enabled() and velocity.requires_grad):
        step = gaussian_step(
            *(latents, velocity, coefficients),
            noise=noise,
            likelihood=likelihood,
            storage_dtype=storage_dtype,
            return_mean=True,
        )
        next_latents, log_prob = step.next_latents.float(), step.log_prob
        if likelihood is not None and log_prob is None:
            log_prob = density(latents, velocity, next_latents, coefficients, likelihood)
        return Transition(next_latents, log_prob, given("return_mean", step.mean))
    mean = step_mean(latents, velocity, coefficients, None, 1.0, torch.float32)
    if next_latents is None:
        s = per_row(coefficients, latents.dim(), torch.float32)[2]
        next_latents = mean if noise is None else (mean + s * noise.float()).to(storage_dtype)
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
    """Log-prob [B], NaN with a gradient of NaN for a gaussian row with s = 0, where `gaussian_log_prob` raises.

    The peers give NaN with an infinite gradient there: both stop a training that would use such a step.
    """
    flat = coefficients[..., 2] == 0 if likelihood == "gaussian" and can_look_at(coefficients) else None
    if flat is None or not bool(flat.any()):
        return gaussian_log_prob(latents, velocity, next_latents, coefficients, likelihood=likelihood)
    coefficients = torch.cat([coefficients[..., :2], (coefficients[..., 2] + flat.float())[..., None]], dim=-1)
    log_prob = gaussian_log_prob(latents, velocity, next_latents, coefficients, likelihood=likelihood)
    return log_prob * torch.where(flat, float("nan"), 1.0)
