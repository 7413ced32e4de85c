"""The clipped policy loss of one transition and its gradient by the velocities, without an autograd graph.

With A clipped to ±adv_clip, ratio = exp(log p - log p_old), g the guidance scale (PPO's clip, arXiv 1707.06347, on the
per-image log-prob of Flow-GRPO, arXiv 2505.05470):

    loss = mean_i max(-A·ratio, -A·clip(ratio, 1±ε)) + β·mean_i KL_i
    KL_i = mean over elements of (μ-μ_ref)², divided by 2s² under the gaussian likelihood

and, with w_i = -A_i·ratio_i/B where the unclipped branch is the larger one and 0 elsewhere,

    dL/dμ = w·(x_next-μ)/(s²·N) + β/B·(μ-μ_ref)/(s²·N)       gaussian
    dL/dμ = w·2(x_next-μ)/N     + β/B·2(μ-μ_ref)/N           squared_error
    dL/dc = g·b·dL/dμ,  dL/du = (1-g)·b·dL/dμ

The forward computes the loss and this gradient; the backward scales it by the incoming scalar.

Shapes: B images, N = elements per image. latents, velocities, next_latents, reference_mean [B, ...]; the rest [B].
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .._runtime import pick_backend
from ._gaussian import check_has_density, check_rows, check_step_inputs, per_row, row_log_prob, step_mean, tree_mean

__all__ = ["PolicyLoss", "clipped_policy_loss", "clipped_policy_loss_ref"]


class PolicyLoss(NamedTuple):
    """Result of `clipped_policy_loss`; everything but `loss` is detached."""

    loss: torch.Tensor  # scalar float32, differentiable in the velocities
    log_prob: torch.Tensor  # [B] float32
    ratio: torch.Tensor  # [B] float32, exp(log_prob - old_log_prob)
    clip_fraction: torch.Tensor  # scalar float32, share of rows with |ratio - 1| > clip_range
    kl: torch.Tensor  # scalar float32, mean KL to reference_mean before kl_weight; 0 without a reference


def clipped_policy_loss(
    latents: torch.Tensor,
    velocity: torch.Tensor,
    next_latents: torch.Tensor,
    coefficients: torch.Tensor,
    old_log_prob: torch.Tensor,
    advantages: torch.Tensor,
    *,
    clip_range: float,
    adv_clip: float = 5.0,
    uncond_velocity: torch.Tensor | None = None,
    guidance_scale: float = 1.0,
    likelihood: str = "gaussian",
    reference_mean: torch.Tensor | None = None,
    kl_weight: float = 0.0,
    backend: str = "auto",
) -> PolicyLoss:
    """Clipped policy loss of one transition per image; formulas in the module docstring.

    `log_prob` is bit-identical to what `gaussian_step` returned for the same inputs on the same backend, so before the
    first optimizer step of an iteration `ratio` is exactly 1. A row with advantage 0 gets exactly zero gradient.

    Args:
        latents, next_latents: [B, ...] float32, the transition taken in the rollout.
        velocity: [B, ...] any float dtype, of the policy being trained; c when `uncond_velocity` is given.
        coefficients: [3] or [B, 3] float32 (a, b, s) on latents' device.
        old_log_prob, advantages: [B] float.
        clip_range: ε > 0; advantages are clipped to ±adv_clip first.
        uncond_velocity, guidance_scale: classifier-free guidance v = (1-g)·u + g·c.
        likelihood: "gaussian" or "squared_error".
        reference_mean: [B, ...] float, μ of the reference policy on the same latents; needed by kl_weight > 0.

    Raises:
        ValueError: names the argument that does not fit; s = 0 as in `gaussian_log_prob`.
    """
    check_step_inputs(
        latents,
        velocity,
        coefficients,
        uncond_velocity,
        guidance_scale,
        likelihood,
        next_latents=next_latents,
        reference_mean=reference_mean,
    )
    check_rows(latents.shape[0], old_log_prob=old_log_prob, advantages=advantages)
    check_has_density(coefficients, likelihood)
    _check_scalars(clip_range, adv_clip, kl_weight, reference_mean)
    if pick_backend(backend, latents, velocity) == "triton":
        raise NotImplementedError("clipped_policy_loss has no Triton kernel yet: use backend='torch' or 'auto'")
    tensors = (velocity, uncond_velocity, latents, next_latents, coefficients, old_log_prob, advantages, reference_mean)
    settings = (guidance_scale, likelihood, clip_range, adv_clip, kl_weight)
    return PolicyLoss(*_ClosedForm.apply(*tensors, *settings))


def clipped_policy_loss_ref(
    latents: torch.Tensor,
    velocity: torch.Tensor,
    next_latents: torch.Tensor,
    coefficients: torch.Tensor,
    old_log_prob: torch.Tensor,
    advantages: torch.Tensor,
    *,
    clip_range: float,
    adv_clip: float = 5.0,
    uncond_velocity: torch.Tensor | None = None,
    guidance_scale: float = 1.0,
    likelihood: str = "gaussian",
    reference_mean: torch.Tensor | None = None,
    kl_weight: float = 0.0,
    compute_dtype: torch.dtype = torch.float32,
) -> PolicyLoss:
    """The same loss with its gradient left to autograd: the oracle of the closed form; results in `compute_dtype`."""
    mean = step_mean(latents, velocity, coefficients, uncond_velocity, guidance_scale, compute_dtype)
    log_prob = row_log_prob(next_latents.to(compute_dtype) - mean, coefficients, likelihood)
    ratio, per_row_loss, _ = _clip(log_prob, old_log_prob, advantages, clip_range, adv_clip)
    kl = _kl(mean, reference_mean, coefficients, likelihood).mean()
    loss = per_row_loss.mean() + kl_weight * kl
    clip_fraction = _clip_fraction(ratio, clip_range)
    return PolicyLoss(loss, log_prob.detach(), ratio.detach(), clip_fraction, kl.detach())


class _ClosedForm(torch.autograd.Function):
    """The PyTorch path: loss and closed-form gradient in the forward, a scale in the backward."""

    @staticmethod
    def forward(
        ctx,
        velocity,
        uncond_velocity,
        latents,
        next_latents,
        coefficients,
        old_log_prob,
        advantages,
        reference_mean,
        guidance_scale,
        likelihood,
        clip_range,
        adv_clip,
        kl_weight,
    ):
        mean = step_mean(latents, velocity, coefficients, uncond_velocity, guidance_scale, torch.float32)
        difference = next_latents.float() - mean
        log_prob = row_log_prob(difference, coefficients, likelihood)
        ratio, per_row_loss, weight = _clip(log_prob, old_log_prob, advantages, clip_range, adv_clip)
        kl = _kl(mean, reference_mean, coefficients, likelihood).mean()
        loss = per_row_loss.mean() + kl_weight * kl

        _, b, s = per_row(coefficients.expand(latents.shape[0], 3), latents.dim(), torch.float32)
        curvature = 1.0 / (s * s) if likelihood == "gaussian" else 2.0
        grad = (weight / latents.shape[0]).view_as(b) * difference
        if kl_weight:
            grad = grad + (kl_weight / latents.shape[0]) * (mean - reference_mean.float())
        grad = grad * (b * curvature / latents[0].numel())
        uncond_scale = 1.0 - guidance_scale
        ctx.save_for_backward(
            (grad if uncond_velocity is None else grad * guidance_scale).to(velocity.dtype),
            None if uncond_velocity is None else (grad * uncond_scale).to(uncond_velocity.dtype),
        )
        statistics = (log_prob, ratio, _clip_fraction(ratio, clip_range), kl)
        ctx.mark_non_differentiable(*statistics)
        return loss, *statistics

    @staticmethod
    def backward(ctx, grad_loss, *_):
        scaled = [None if grad is None else grad * grad_loss.to(grad.dtype) for grad in ctx.saved_tensors]
        return *scaled, *[None] * 11


def _clip(
    log_prob: torch.Tensor,
    old_log_prob: torch.Tensor,
    advantages: torch.Tensor,
    clip_range: float,
    adv_clip: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """ratio [B], loss per row [B] and d(loss per row)/d(log_prob) [B]."""
    ratio = torch.exp(log_prob - old_log_prob.to(log_prob.dtype))
    advantages = advantages.to(log_prob.dtype).clamp(-adv_clip, adv_clip)
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1.0 - clip_range, 1.0 + clip_range)
    flows = (unclipped >= clipped) & (advantages != 0)
    return ratio, torch.maximum(unclipped, clipped), torch.where(flows, unclipped, 0.0)


def _clip_fraction(ratio: torch.Tensor, clip_range: float) -> torch.Tensor:
    return ((ratio.detach() - 1.0).abs() > clip_range).to(ratio.dtype).mean()


def _kl(
    mean: torch.Tensor, reference_mean: torch.Tensor | None, coefficients: torch.Tensor, likelihood: str
) -> torch.Tensor:
    """KL per row [B] to the reference policy, per element of the image; 0 without a reference."""
    if reference_mean is None:
        return mean.new_zeros(mean.shape[0])
    mean_square = tree_mean((mean - reference_mean.to(mean.dtype)).square().flatten(1))
    if likelihood == "squared_error":
        return mean_square
    s = coefficients.to(mean.dtype).reshape(-1, 3)[:, 2]
    return mean_square / (2.0 * s * s)


def _check_scalars(clip_range: float, adv_clip: float, kl_weight: float, reference_mean: torch.Tensor | None) -> None:
    if not clip_range > 0 or not adv_clip > 0:
        raise ValueError(f"clip_range and adv_clip must be positive, got {clip_range} and {adv_clip}")
    if kl_weight < 0 or (kl_weight > 0 and reference_mean is None):
        raise ValueError(f"kl_weight={kl_weight} must be >= 0, and > 0 needs reference_mean")
