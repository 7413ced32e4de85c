"""Log-probability of a sampled transition, averaged over the elements of an image; differentiable in the velocities.

Formula and reduction order: `_gaussian.py` (METHOD: Flow-GRPO's convention, arXiv 2505.05470). The gradient is closed:
`d log p/dμ = (x_next-μ)/(s²·N)` (gaussian) or `2(x_next-μ)/N` (squared_error), `dμ/dc = g·b`, `dμ/du = (1-g)·b`.

Shapes: B images, N = elements per image. latents, velocities, next_latents [B, ...] -> log_prob [B] float32.
"""

from __future__ import annotations

import torch

from .._runtime import pick_backend
from ._gaussian import check_has_density, check_step_inputs, row_log_prob, step_mean

__all__ = ["gaussian_log_prob", "gaussian_log_prob_ref"]


def gaussian_log_prob(
    latents: torch.Tensor,
    velocity: torch.Tensor,
    next_latents: torch.Tensor,
    coefficients: torch.Tensor,
    *,
    uncond_velocity: torch.Tensor | None = None,
    guidance_scale: float = 1.0,
    likelihood: str = "gaussian",
    backend: str = "auto",
) -> torch.Tensor:
    """Log-prob [B] float32 of `next_latents` given `latents` and the velocity, per element of the image.

    Bit-identical to `gaussian_step(...).log_prob` on the same inputs and backend.

    Args:
        latents: [B, ...] float32, x before the step.
        velocity: [B, ...] any float dtype; the conditional velocity c when `uncond_velocity` is given.
        next_latents: [B, ...] float32, the transition that was taken.
        coefficients: [3] or [B, 3] float32 (a, b, s) on latents' device; see `transition_coefficients`.
        uncond_velocity: [B, ...] u of classifier-free guidance, v = (1-g)·u + g·c.
        guidance_scale: g; other values than 1 need `uncond_velocity`.
        likelihood: "gaussian" or "squared_error".

    Raises:
        ValueError: names the argument that does not fit. s = 0 has no gaussian density: raises on the CPU, and gives
            NaN for that row on a GPU, where looking would cost a synchronisation.
    """
    check_step_inputs(
        latents, velocity, coefficients, uncond_velocity, guidance_scale, likelihood, next_latents=next_latents
    )
    check_has_density(coefficients, likelihood)
    if pick_backend(backend, latents, velocity) == "triton":
        raise NotImplementedError("gaussian_log_prob has no Triton kernel yet: use backend='torch' or 'auto'")
    return gaussian_log_prob_ref(
        latents,
        velocity,
        next_latents,
        coefficients,
        uncond_velocity=uncond_velocity,
        guidance_scale=guidance_scale,
        likelihood=likelihood,
    )


def gaussian_log_prob_ref(
    latents: torch.Tensor,
    velocity: torch.Tensor,
    next_latents: torch.Tensor,
    coefficients: torch.Tensor,
    *,
    uncond_velocity: torch.Tensor | None = None,
    guidance_scale: float = 1.0,
    likelihood: str = "gaussian",
    compute_dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Plain PyTorch, differentiable by autograd; the result is in `compute_dtype`."""
    mean = step_mean(latents, velocity, coefficients, uncond_velocity, guidance_scale, compute_dtype)
    return row_log_prob(next_latents.to(compute_dtype) - mean, coefficients, likelihood)
