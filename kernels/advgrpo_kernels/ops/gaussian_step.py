"""One sampler step of a flow model: x_next = a·x + b·v + s·z, with its log-probability.

Classifier-free guidance, mean, noise, next latents and log-prob in one pass; formulas in `_gaussian.py`, coefficients
in `coefficients.py`, the random numbers in `philox.py`.

Shapes:   B images. latents, velocity, uncond_velocity, noise [B, ...]; coefficients [3] or [B, 3]; log_prob [B].
Numerics: float32 inside; the log-prob is that of the float32 `next_latents` that is returned, not of the noise, so
          `gaussian_log_prob` on the returned latents gives the same bits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .._runtime import can_look_at, pick_backend
from ._gaussian import check_step_inputs, per_row, row_log_prob, step_mean
from .philox import philox_normal

__all__ = ["GaussianStep", "gaussian_step", "gaussian_step_ref"]


class GaussianStep(NamedTuple):
    """Result of `gaussian_step`."""

    next_latents: torch.Tensor  # [B, ...] float32
    log_prob: torch.Tensor | None  # [B] float32; None for a deterministic step or likelihood=None
    mean: torch.Tensor | None  # [B, ...] float32, with return_mean=True


def gaussian_step(
    latents: torch.Tensor,
    velocity: torch.Tensor,
    coefficients: torch.Tensor,
    *,
    uncond_velocity: torch.Tensor | None = None,
    guidance_scale: float = 1.0,
    noise: torch.Tensor | None = None,
    seed: int | torch.Tensor | None = None,
    sample_ids: torch.Tensor | None = None,
    step: int | torch.Tensor = 0,
    likelihood: str | None = "gaussian",
    return_mean: bool = False,
    backend: str = "auto",
) -> GaussianStep:
    """Take one step. Not differentiable: gradients of the likelihood come from `gaussian_log_prob`.

    Args:
        latents: [B, ...] float32.
        velocity: [B, ...] any float dtype; the conditional velocity c when `uncond_velocity` is given.
        coefficients: [3] or [B, 3] float32 (a, b, s) on latents' device; see `transition_coefficients`.
        uncond_velocity: [B, ...] u of classifier-free guidance, v = (1-g)·u + g·c.
        guidance_scale: g; other values than 1 need `uncond_velocity`.
        noise: [B, ...] float, z. Give this, or `seed`, or neither for a deterministic step.
        seed: integer or one-element int64 tensor: z is drawn by Philox, see `philox_normal`.
        sample_ids: int64 [B], the noise of a row depends only on (seed, its id, step); default 0..B-1.
        step: integer or one-element integer tensor. Tensors are read when the kernel runs, so a captured CUDA graph
            replays with new values.
        likelihood: "gaussian", "squared_error" or None for no log-prob.
        return_mean: also return μ.

    Raises:
        ValueError: names the argument that does not fit. Without noise and seed, s must be 0: other values raise on the
            CPU, and give NaN latents on a GPU, where looking would cost a synchronisation.
    """
    check_step_inputs(latents, velocity, coefficients, uncond_velocity, guidance_scale, likelihood, noise=noise)
    if noise is not None and seed is not None:
        raise ValueError("give noise or seed, not both")
    deterministic = noise is None and seed is None
    if can_look_at(coefficients):
        has_noise = bool((coefficients[..., 2] != 0).any())
        if deterministic and has_noise:
            raise ValueError("coefficients have s != 0, a stochastic step: give noise or seed")
        deterministic = not has_noise
    if deterministic:
        noise, seed, likelihood = None, None, None
    if pick_backend(backend, latents, velocity) == "triton":
        raise NotImplementedError("gaussian_step has no Triton kernel yet: use backend='torch' or 'auto'")
    with torch.no_grad():
        if seed is not None:
            ids = torch.arange(latents.shape[0], device=latents.device) if sample_ids is None else sample_ids
            noise = philox_normal(latents.shape, seed=seed, sample_ids=ids, step=step, device=latents.device)
        result = gaussian_step_ref(
            latents,
            velocity,
            coefficients,
            uncond_velocity=uncond_velocity,
            guidance_scale=guidance_scale,
            noise=noise,
            likelihood=likelihood,
        )
    return result if return_mean else result._replace(mean=None)


def gaussian_step_ref(
    latents: torch.Tensor,
    velocity: torch.Tensor,
    coefficients: torch.Tensor,
    *,
    uncond_velocity: torch.Tensor | None = None,
    guidance_scale: float = 1.0,
    noise: torch.Tensor | None = None,
    likelihood: str | None = "gaussian",
    compute_dtype: torch.dtype = torch.float32,
) -> GaussianStep:
    """Plain PyTorch with the noise given (None: s is taken as 0); results in `compute_dtype`."""
    mean = step_mean(latents, velocity, coefficients, uncond_velocity, guidance_scale, compute_dtype)
    if noise is None:
        return GaussianStep(mean, None, mean)
    _, _, s = per_row(coefficients, latents.dim(), compute_dtype)
    next_latents = mean + s * noise.to(compute_dtype)
    log_prob = None if likelihood is None else row_log_prob(next_latents - mean, coefficients, likelihood)
    return GaussianStep(next_latents, log_prob, mean)
