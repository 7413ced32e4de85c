"""The clipped policy loss of one transition and its gradient by the velocities, without an autograd graph.

With A clipped to ±adv_clip, ratio = exp(log p - log p_old), g the guidance scale (PPO's clip, arXiv 1707.06347, on the
per-image log-prob of Flow-GRPO, arXiv 2505.05470):

    loss = mean_i max(-A·ratio, -A·clip(ratio, 1-ε_low, 1+ε_high)) + β·mean_i KL_i
    KL_i = mean over elements of (μ-μ_ref)², divided by 2·kl_std² if `kl_std` is given, else by 2s² under the gaussian
           likelihood

s is the standard deviation of the whole step: with it KL_i is that of the two gaussians. Flow-GRPO divides by the one
per unit of time instead (`std_dev_t`; in the SDEs s = std_dev_t·sqrt(-dt)), a KL smaller by the factor -dt for the same
β: pass `kl_std=step_std(...)` for that.

and, with w_i = -A_i·ratio_i/B where the unclipped branch is the larger one and 0 elsewhere,

    dL/dμ = w·(x_next-μ)/(s²·N) + β/B·(μ-μ_ref)/(s²·N)       gaussian        with kl_std its square in place of s²,
    dL/dμ = w·2(x_next-μ)/N     + β/B·2(μ-μ_ref)/N           squared_error   and 1/kl_std² in place of the second 2
    dL/dc = g·b·dL/dμ,  dL/du = (1-g)·b·dL/dμ

What keeps the update near the policy of the rollout is its `trust_region`. "ratio" is the clip above. The other two
compare μ with the mean μ_old that the rollout's step had, and need the step's s > 0 whatever the likelihood:

    normalized_ratio   ratio = exp(mean((x_next-μ_old)·(μ-μ_old))/s), clipped as above (GRPO-Guard, arXiv 2510.22319,
                       verl-project/verl-omni at a1139ba, GRPOGuardLoss, whose exp(s·(log p - log p_old +
                       mean((μ-μ_old)²)/(2s²))) this is without the cancellation); dL/dμ = w·(x_next-μ_old)/(s·N)
    divergence         the ratio is not clipped; a row whose D = mean((μ-μ_old)²)/(2s²) is at least the threshold, and
                       whose ratio has moved the way its advantage pushes, has neither loss nor gradient (Flow-DPPO,
                       arXiv 2606.11025, verl-omni at a1139ba, FlowDPPOLoss)

The forward computes the loss and this gradient, in two launches on a GPU; the backward scales it by the incoming
scalar, after the gradient was rounded to the velocity's dtype: exact for powers of two, one more rounding otherwise.
`torch.autograd.backward(velocity, result.velocity_grad)` spares even that.

Shapes: B images, N = elements per image. latents, velocities, next_latents, reference_mean, old_mean [B, ...]; the
rest [B].
"""

from __future__ import annotations

import numbers
from typing import NamedTuple

import torch

from .._ops import add_op_namespace_prefix
from .._runtime import HAS_TRITON, can_look_at, check_tensors, device_guard, pick_backend
from ._gaussian import (
    LIKELIHOOD_CODES,
    TRUST_REGION_CODES,
    TRUST_REGIONS,
    as_stored,
    check_has_density,
    check_rows,
    check_step_inputs,
    per_row,
    row_log_prob,
    row_shift,
    step_mean,
    tiling,
    tree_mean,
    velocity_gradients,
)
from .gaussian_log_prob import kl_std_stride, launch_log_prob

__all__ = ["PolicyLoss", "clipped_policy_loss", "clipped_policy_loss_ref"]

if HAS_TRITON:
    import triton
    import triton.language as tl

    from ._gaussian import (
        DIVERGENCE,
        GAUSSIAN,
        NORMALIZED_RATIO,
        load_coefficients,
        load_kl_std,
        load_step,
        mean_of,
        mean_square_gradient,
        store_velocity_gradients,
        tree_sum,
    )

    @triton.jit
    def _clip_rows(
        log_prob, old_log_prob, shift, advantages, clip_low, clip_high, adv_clip, TRUST_REGION: tl.constexpr
    ):
        """ratio, loss per row and its derivative by the log of the ratio."""
        log_ratio = log_prob - old_log_prob
        if TRUST_REGION == NORMALIZED_RATIO:
            log_ratio = shift
        ratio = tl.exp(log_ratio)
        advantages = tl.minimum(tl.maximum(advantages, -adv_clip), adv_clip)
        unclipped = -advantages * ratio
        if TRUST_REGION == DIVERGENCE:
            onwards = ((ratio > 1.0) & (advantages > 0.0)) | ((ratio < 1.0) & (advantages < 0.0))
            flows = (advantages != 0.0) & ~((shift >= clip_high) & onwards)
            loss = tl.where(flows, unclipped, 0.0)
        else:
            clipped = -advantages * tl.minimum(tl.maximum(ratio, 1.0 - clip_low), 1.0 + clip_high)
            flows = (unclipped >= clipped) & (advantages != 0.0)
            loss = tl.where(advantages == 0.0, 0.0, tl.maximum(unclipped, clipped))
        return ratio, loss, tl.where(flows, unclipped, 0.0)

    @triton.jit
    def _load_shift(shift_ptr, i, mask, TRUST_REGION: tl.constexpr):
        """`row_shift` of rows, or nothing that is looked at."""
        shift = 0.0
        if TRUST_REGION > 0:
            shift = tl.load(shift_ptr + i, mask=mask, other=0.0)
        return shift

    @triton.jit
    def _kl_pull(kl_weight, s, kl_std, row, kl_std_stride, IN_MEMORY: tl.constexpr, LIKELIHOOD: tl.constexpr):
        """β in units of the slope that `mean_square_gradient` applies: 1/s² or 2, where the KL's is 1/kl_std²."""
        if kl_std is not None:
            std = load_kl_std(kl_std, row, kl_std_stride, IN_MEMORY)
            if LIKELIHOOD == GAUSSIAN:
                kl_weight = tl.div_rn(kl_weight * s * s, std * std)
            else:
                kl_weight = tl.div_rn(kl_weight * 0.5, std * std)
        return kl_weight

    @triton.jit
    def _normalized_slope(s, LIKELIHOOD: tl.constexpr):
        """1/s in units of the slope that `mean_square_gradient` applies: 1/s² or 2."""
        if LIKELIHOOD == GAUSSIAN:
            slope = s
        else:
            slope = tl.div_rn(0.5, s)
        return slope

    @triton.jit
    def _store_statistics(
        log_prob_ptr,
        kl_rows_ptr,
        shift_ptr,
        old_log_prob_ptr,
        advantages_ptr,
        loss_ptr,
        clip_fraction_ptr,
        kl_ptr,
        B,
        clip_low,
        clip_high,
        adv_clip,
        kl_weight,
        HAS_REFERENCE: tl.constexpr,
        TRUST_REGION: tl.constexpr,
        ROWS: tl.constexpr,
    ):
        i = tl.arange(0, ROWS)
        valid = i < B
        log_prob = tl.load(log_prob_ptr + i, mask=valid, other=0.0)
        old = tl.load(old_log_prob_ptr + i, mask=valid, other=0.0).to(tl.float32)
        advantages = tl.load(advantages_ptr + i, mask=valid, other=0.0).to(tl.float32)
        shift = _load_shift(shift_ptr, i, valid, TRUST_REGION)
        ratio, losses, _ = _clip_rows(log_prob, old, shift, advantages, clip_low, clip_high, adv_clip, TRUST_REGION)
        batch = B.to(tl.float32)
        kl = 0.0
        if HAS_REFERENCE:
            kl = tl.div_rn(tree_sum(tl.load(kl_rows_ptr + i, mask=valid, other=0.0)), batch)
        loss = tl.div_rn(tree_sum(tl.where(valid, losses, 0.0)), batch)
        if TRUST_REGION == DIVERGENCE:
            outside = valid & (shift >= clip_high)
        else:
            outside = valid & ((ratio - 1.0 > clip_high) | (1.0 - ratio > clip_low))
        tl.store(loss_ptr, tl.fma(kl, kl_weight, loss))
        tl.store(clip_fraction_ptr, tl.div_rn(tree_sum(outside.to(tl.float32)), batch))
        tl.store(kl_ptr, kl)

    @triton.jit
    def _clipped_policy_loss_kernel(
        latents_ptr,
        velocity_ptr,
        uncond_ptr,
        next_ptr,
        reference_mean_ptr,
        old_mean_ptr,
        coefficients_ptr,
        kl_std,
        log_prob_ptr,
        kl_rows_ptr,
        shift_ptr,
        old_log_prob_ptr,
        advantages_ptr,
        velocity_grad_ptr,
        uncond_grad_ptr,
        ratio_ptr,
        loss_ptr,
        clip_fraction_ptr,
        kl_ptr,
        B,
        N,
        coefficients_stride,
        kl_std_stride,
        guidance_scale,
        uncond_scale,
        clip_low,
        clip_high,
        adv_clip,
        kl_weight,
        GUIDED: tl.constexpr,
        HAS_REFERENCE: tl.constexpr,
        KL_STD_IN_MEMORY: tl.constexpr,
        TRUST_REGION: tl.constexpr,
        LIKELIHOOD: tl.constexpr,
        ROWS: tl.constexpr,
        LANES: tl.constexpr,
    ):
        row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
        a, b, s = load_coefficients(coefficients_ptr, row, coefficients_stride)
        element = tile * LANES + tl.arange(0, LANES)
        mask = element < N
        offsets = row * N + element
        x, c, u = load_step(latents_ptr, velocity_ptr, uncond_ptr, offsets, mask, GUIDED)
        mean = mean_of(x, c, u, a, b, guidance_scale, uncond_scale, GUIDED)
        log_prob, old = tl.load(log_prob_ptr + row), tl.load(old_log_prob_ptr + row).to(tl.float32)
        advantage = tl.load(advantages_ptr + row).to(tl.float32)
        shift = _load_shift(shift_ptr, row, row >= 0, TRUST_REGION)
        ratio, _, weight = _clip_rows(log_prob, old, shift, advantage, clip_low, clip_high, adv_clip, TRUST_REGION)
        x_next = tl.load(next_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        if TRUST_REGION == NORMALIZED_RATIO:
            old_mean = tl.load(old_mean_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
            pull = weight * _normalized_slope(s, LIKELIHOOD) * (x_next - old_mean)
        else:
            pull = weight * (x_next - mean)
        if HAS_REFERENCE:
            reference = tl.load(reference_mean_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
            kl_pull = _kl_pull(kl_weight, s, kl_std, row, kl_std_stride, KL_STD_IN_MEMORY, LIKELIHOOD)
            pull = tl.fma(mean - reference, kl_pull, pull)
        grad = mean_square_gradient(pull, s, N, LIKELIHOOD) * tl.div_rn(b, B.to(tl.float32))
        store_velocity_gradients(
            velocity_grad_ptr, uncond_grad_ptr, offsets, mask, grad, guidance_scale, uncond_scale, GUIDED
        )
        if tile == 0:
            tl.store(ratio_ptr + row, ratio)
            if row == 0:
                _store_statistics(
                    log_prob_ptr,
                    kl_rows_ptr,
                    shift_ptr,
                    old_log_prob_ptr,
                    advantages_ptr,
                    loss_ptr,
                    clip_fraction_ptr,
                    kl_ptr,
                    B,
                    clip_low,
                    clip_high,
                    adv_clip,
                    kl_weight,
                    HAS_REFERENCE,
                    TRUST_REGION,
                    ROWS,
                )


_Fields = tuple[  # loss, log_prob, ratio, clip_fraction, kl, shift, gradients of both velocities
    torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor
]


class _Settings(NamedTuple):
    """The numbers of a call, in the order in which the custom op takes them."""

    guidance_scale: float
    likelihood: str
    clip_low: float
    clip_high: float
    adv_clip: float
    kl_weight: float
    trust_region: str


@torch.library.custom_op(add_op_namespace_prefix("clipped_policy_loss"), mutates_args=())
def _clipped_policy_loss_op(
    latents: torch.Tensor,
    velocity: torch.Tensor,
    uncond_velocity: torch.Tensor | None,
    next_latents: torch.Tensor,
    coefficients: torch.Tensor,
    old_log_prob: torch.Tensor,
    advantages: torch.Tensor,
    reference_mean: torch.Tensor | None,
    kl_std: torch.Tensor | None,
    old_mean: torch.Tensor | None,
    guidance_scale: float,
    likelihood: str,
    clip_low: float,
    clip_high: float,
    adv_clip: float,
    kl_weight: float,
    trust_region: str,
    kl_std_value: float | None,
    use_triton: bool,
) -> tuple[
    torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor
]:
    """`_Fields`; shift is empty without old_mean, the last without guidance. KL: kl_std, else kl_std_value, else s."""
    step = (latents, velocity, uncond_velocity, next_latents, reference_mean, coefficients)
    step = tuple(None if tensor is None else tensor.contiguous() for tensor in step)
    compute = _launch if use_triton else _closed_form
    rows = (old_log_prob.contiguous(), advantages.contiguous())
    std = kl_std_value if kl_std is None else kl_std.contiguous()
    settings = _Settings(guidance_scale, likelihood, clip_low, clip_high, adv_clip, kl_weight, trust_region)
    return compute(step, rows, std, None if old_mean is None else old_mean.contiguous(), settings)


def _launch(
    step, rows, kl_std: torch.Tensor | float | None, old_mean: torch.Tensor | None, settings: _Settings
) -> _Fields:
    latents, velocity, uncond, _, reference, coefficients = step
    guidance_scale, likelihood, *bounds_and_weight, trust_region = settings
    code, region = LIKELIHOOD_CODES[likelihood], TRUST_REGION_CODES[trust_region]
    log_prob, kl_rows, shift = launch_log_prob(*step, guidance_scale, code, kl_std, old_mean, region)
    grads = velocity_gradients(velocity, uncond)
    ratio, (loss, clip_fraction, kl) = torch.empty_like(log_prob), (log_prob.new_empty(()) for _ in range(3))
    batch, count = latents.shape[0], latents[0].numel()
    lanes, tiles, warps = tiling(count)
    sizes = (batch, count, 3 if coefficients.dim() == 2 else 0, kl_std_stride(kl_std))
    with device_guard(latents):
        _clipped_policy_loss_kernel[(batch, tiles)](
            *(*step[:5], old_mean, coefficients, kl_std, log_prob, kl_rows, shift, *rows),
            *(*grads, ratio, loss, clip_fraction, kl),
            *(*sizes, guidance_scale, 1.0 - guidance_scale, *bounds_and_weight),
            GUIDED=uncond is not None,
            HAS_REFERENCE=reference is not None,
            KL_STD_IN_MEMORY=torch.is_tensor(kl_std),
            TRUST_REGION=region,
            LIKELIHOOD=code,
            ROWS=max(2, triton.next_power_of_2(batch)),
            LANES=lanes,
            num_warps=warps,
        )
    return loss, log_prob, ratio, clip_fraction, kl, shift, *grads


def _closed_form(
    step, rows, kl_std: torch.Tensor | float | None, old_mean: torch.Tensor | None, settings: _Settings
) -> _Fields:
    """The same in PyTorch operations."""
    latents, velocity, uncond, next_latents, reference, coefficients = step
    guidance_scale, likelihood, *bounds, kl_weight, trust_region = settings
    mean = step_mean(latents, velocity, coefficients, uncond, guidance_scale, torch.float32)
    difference = next_latents.float() - mean
    log_prob = row_log_prob(difference, coefficients, likelihood)
    shift = _shift(mean, next_latents, old_mean, coefficients, trust_region)
    ratio, per_row_loss, weight = _clip(log_prob, *rows, *bounds, shift=shift, trust_region=trust_region)
    kl = _kl(mean, reference, coefficients, likelihood, kl_std).mean()
    _, b, s = per_row(coefficients.expand(latents.shape[0], 3), latents.dim(), torch.float32)
    slope = 1.0 / (s * s) if likelihood == "gaussian" else 2.0
    if old_mean is not None and trust_region == "normalized_ratio":  # its slope is 1/s in place of the likelihood's
        pull = weight.view_as(b) * (1.0 / (s * slope)) * (next_latents.float() - old_mean.float())
    else:
        pull = weight.view_as(b) * difference
    if kl_weight:
        kl_pull = kl_weight
        if kl_std is not None:  # the KL's slope is 1/kl_std², and the other one multiplies the whole pull
            std = kl_std.float().expand(len(b)).view_as(b) if torch.is_tensor(kl_std) else kl_std
            kl_pull = kl_weight / (std * std * slope)
        pull = pull + kl_pull * (mean - reference.float())
    grad = pull * (b * slope / latents.numel())
    loss = per_row_loss.mean() + kl_weight * kl
    if uncond is None:
        grads = grad.to(velocity.dtype), velocity.new_empty(0)
    else:
        grads = (grad * guidance_scale).to(velocity.dtype), (grad * (1.0 - guidance_scale)).to(uncond.dtype)
    return loss, log_prob, ratio, _clip_fraction(ratio, shift, trust_region, *bounds[:2]), kl, shift, *grads


@_clipped_policy_loss_op.register_fake
def _(latents, velocity, uncond_velocity, *rest):
    log_prob = latents.new_empty(latents.shape[0], dtype=torch.float32)
    loss, clip_fraction, kl = (log_prob.new_empty(()) for _ in range(3))
    shift = log_prob.new_empty(0 if rest[-3] == "ratio" else len(log_prob))
    grads = velocity_gradients(velocity, uncond_velocity)
    return loss, log_prob, torch.empty_like(log_prob), clip_fraction, kl, shift, *grads


def _setup_context(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # six launches of zeros for outputs nobody differentiates
    ctx.guided = inputs[2] is not None
    ctx.save_for_backward(*output[-2:])


def _backward(ctx, grad_loss, *_):
    velocity_grad, uncond_grad = ctx.saved_tensors
    return None, velocity_grad * grad_loss, uncond_grad * grad_loss if ctx.guided else None, *[None] * 16


_clipped_policy_loss_op.register_autograd(_backward, setup_context=_setup_context)


class PolicyLoss(NamedTuple):
    """Result of `clipped_policy_loss`; everything but `loss` is detached."""

    loss: torch.Tensor  # scalar float32, differentiable in the velocities
    log_prob: torch.Tensor  # [B] float32
    ratio: torch.Tensor  # [B] float32, exp(log_prob - old_log_prob), or the normalised one
    clip_fraction: torch.Tensor  # scalar float32, share of rows outside the clip or at or above the divergence allowed
    kl: torch.Tensor  # scalar float32, mean KL to reference_mean before kl_weight; 0 without a reference
    velocity_grad: torch.Tensor | None  # dloss/dvelocity in its shape and dtype, for callers without autograd
    uncond_velocity_grad: torch.Tensor | None  # likewise; None without uncond_velocity
    divergence: torch.Tensor | None = None  # [B] float32, D of the module docstring, of that trust region


def clipped_policy_loss(
    latents: torch.Tensor,
    velocity: torch.Tensor,
    next_latents: torch.Tensor,
    coefficients: torch.Tensor,
    old_log_prob: torch.Tensor,
    advantages: torch.Tensor,
    *,
    clip_range: float | tuple[float, float],
    adv_clip: float = 5.0,
    uncond_velocity: torch.Tensor | None = None,
    guidance_scale: float = 1.0,
    likelihood: str = "gaussian",
    reference_mean: torch.Tensor | None = None,
    kl_weight: float = 0.0,
    kl_std: torch.Tensor | float | None = None,
    trust_region: str = "ratio",
    old_mean: torch.Tensor | None = None,
    backend: str = "auto",
) -> PolicyLoss:
    """Clipped policy loss of one transition per image; formulas in the module docstring.

    `log_prob` is bit-identical to what `gaussian_step` returned for the same inputs on the same backend, so before the
    first optimizer step of an iteration `ratio` is exactly 1. A row with advantage 0 gets exactly zero gradient.

    Args:
        latents, next_latents: [B, ...] float32, bfloat16 or float16, the transition exactly as the rollout took it (see
            `storage_dtype` of `gaussian_step`).
        velocity: [B, ...] any float dtype, of the policy being trained; c when `uncond_velocity` is given.
        coefficients: [3] or [B, 3] float32 (a, b, s) on latents' device.
        old_log_prob, advantages: [B] float.
        clip_range: ε > 0, or a pair (low, high) of positive numbers: the ratio is clipped to [1-low, 1+high].
            Advantages are clipped to ±adv_clip first. Under "divergence" it is the largest D, one number.
        uncond_velocity, guidance_scale: classifier-free guidance v = (1-g)·u + g·c.
        likelihood: "gaussian" or "squared_error".
        reference_mean: [B, ...] float, μ of the reference policy on the same latents; needed by kl_weight > 0.
        kl_std: the standard deviation that the KL is divided by, a positive number or float [] or [B] on latents'
            device; None takes s under "gaussian" and divides by nothing under "squared_error". `step_std` gives
            Flow-GRPO's. See the module docstring.
        trust_region: "ratio", "normalized_ratio" or "divergence".
        old_mean: [B, ...] float, the μ of the rollout's step (`return_mean` of `gaussian_step`); the trust regions
            other than "ratio" need it.

    Raises:
        ValueError: names the argument that does not fit; s = 0 as in `gaussian_log_prob`.
    """
    check_step_inputs(
        *(latents, velocity, coefficients, uncond_velocity, guidance_scale, likelihood),
        next_latents=next_latents,
        reference_mean=reference_mean,
        old_mean=old_mean,
    )
    check_rows(latents.shape[0], old_log_prob=old_log_prob, advantages=advantages)
    _check_trust_region(trust_region, old_mean, clip_range)
    check_has_density(coefficients, likelihood if trust_region == "ratio" else "gaussian")
    bounds = _clip_bounds(clip_range, adv_clip)
    _check_kl(kl_weight, kl_std, reference_mean, latents)
    in_memory = torch.is_tensor(kl_std)
    use_triton = pick_backend(backend, latents, velocity) == "triton"
    loss, *details, shift, velocity_grad, uncond_grad = _clipped_policy_loss_op(
        *(as_stored(latents), velocity, uncond_velocity, as_stored(next_latents), coefficients),
        *(old_log_prob.detach(), advantages, reference_mean, kl_std.detach() if in_memory else None, old_mean),
        *(guidance_scale, likelihood, *bounds, kl_weight, trust_region, None if in_memory else kl_std, use_triton),
    )
    grads = velocity_grad.detach(), None if uncond_velocity is None else uncond_grad.detach()
    divergence = shift.detach() if trust_region == "divergence" else None
    return PolicyLoss(loss, *(value.detach() for value in details), *grads, divergence)


def clipped_policy_loss_ref(
    latents: torch.Tensor,
    velocity: torch.Tensor,
    next_latents: torch.Tensor,
    coefficients: torch.Tensor,
    old_log_prob: torch.Tensor,
    advantages: torch.Tensor,
    *,
    clip_range: float | tuple[float, float],
    adv_clip: float = 5.0,
    uncond_velocity: torch.Tensor | None = None,
    guidance_scale: float = 1.0,
    likelihood: str = "gaussian",
    reference_mean: torch.Tensor | None = None,
    kl_weight: float = 0.0,
    kl_std: torch.Tensor | float | None = None,
    trust_region: str = "ratio",
    old_mean: torch.Tensor | None = None,
    compute_dtype: torch.dtype = torch.float32,
) -> PolicyLoss:
    """The same loss with its gradient left to autograd: the oracle of the closed form; results in `compute_dtype`."""
    mean = step_mean(latents, velocity, coefficients, uncond_velocity, guidance_scale, compute_dtype)
    log_prob = row_log_prob(next_latents.to(compute_dtype) - mean, coefficients, likelihood)
    bounds = _clip_bounds(clip_range, adv_clip)
    shift = _shift(mean, next_latents, old_mean, coefficients, trust_region)
    ratio, per_row_loss, _ = _clip(log_prob, old_log_prob, advantages, *bounds, shift=shift, trust_region=trust_region)
    kl = _kl(mean, reference_mean, coefficients, likelihood, kl_std).mean()
    loss = per_row_loss.mean() + kl_weight * kl
    clip_fraction = _clip_fraction(ratio, shift, trust_region, *bounds[:2])
    divergence = shift.detach() if trust_region == "divergence" else None
    return PolicyLoss(loss, log_prob.detach(), ratio.detach(), clip_fraction, kl.detach(), None, None, divergence)


def _shift(
    mean: torch.Tensor,
    next_latents: torch.Tensor,
    old_mean: torch.Tensor | None,
    coefficients: torch.Tensor,
    trust_region: str,
) -> torch.Tensor:
    """`row_shift` [B] of the trust region; empty where it looks at none."""
    if old_mean is None or trust_region == "ratio":
        return mean.new_empty(0)
    return row_shift(mean, next_latents, old_mean, coefficients, trust_region)


def _clip(
    log_prob: torch.Tensor,
    old_log_prob: torch.Tensor,
    advantages: torch.Tensor,
    clip_low: float,
    clip_high: float,
    adv_clip: float,
    *,
    shift: torch.Tensor,
    trust_region: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """ratio [B], loss per row [B] and d(loss per row)/d(log ratio) [B]."""
    ratio = torch.exp(shift if trust_region == "normalized_ratio" else log_prob - old_log_prob.to(log_prob.dtype))
    advantages = advantages.to(log_prob.dtype).clamp(-adv_clip, adv_clip)
    unclipped = -advantages * ratio
    if trust_region == "divergence":
        onwards = ((ratio > 1) & (advantages > 0)) | ((ratio < 1) & (advantages < 0))
        loss = torch.where((advantages != 0) & ~((shift >= clip_high) & onwards), unclipped, 0.0)
        return ratio, loss, loss
    clipped = -advantages * ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    flows = (unclipped >= clipped) & (advantages != 0)
    loss = torch.where(advantages == 0, 0.0, torch.maximum(unclipped, clipped))  # a ratio of inf must not give 0·inf
    return ratio, loss, torch.where(flows, unclipped, 0.0)


def _clip_fraction(
    ratio: torch.Tensor, shift: torch.Tensor, trust_region: str, clip_low: float, clip_high: float
) -> torch.Tensor:
    if trust_region == "divergence":
        return (shift.detach() >= clip_high).to(ratio.dtype).mean()
    excess = ratio.detach() - 1.0
    return ((excess > clip_high) | (-excess > clip_low)).to(ratio.dtype).mean()


def _kl(
    mean: torch.Tensor,
    reference_mean: torch.Tensor | None,
    coefficients: torch.Tensor,
    likelihood: str,
    kl_std: torch.Tensor | float | None,
) -> torch.Tensor:
    """KL per row [B] to the reference policy, per element of the image; 0 without a reference."""
    if reference_mean is None:
        return mean.new_zeros(mean.shape[0])
    mean_square = tree_mean((mean - reference_mean.to(mean.dtype)).square().flatten(1))
    if kl_std is None and likelihood == "squared_error":
        return mean_square
    std = coefficients.reshape(-1, 3)[:, 2] if kl_std is None else kl_std
    std = std.to(mean.dtype) if torch.is_tensor(std) else std
    return mean_square / (2.0 * std * std)


def _clip_bounds(clip_range: float | tuple[float, float], adv_clip: float) -> tuple[float, float, float]:
    """(low, high, adv_clip), all positive."""
    pair = tuple(clip_range) if isinstance(clip_range, (tuple, list)) else (clip_range, clip_range)
    if len(pair) != 2 or not all(bound > 0 for bound in (*pair, adv_clip)):
        raise ValueError(
            "clip_range and adv_clip must be positive, clip_range a number or a pair (low, high) for [1-low, 1+high], "
            f"got {clip_range} and {adv_clip}"
        )
    return float(pair[0]), float(pair[1]), float(adv_clip)


def _check_trust_region(
    trust_region: str, old_mean: torch.Tensor | None, clip_range: float | tuple[float, float]
) -> None:
    if trust_region not in TRUST_REGIONS:
        raise ValueError(f"trust_region must be one of {TRUST_REGIONS}, got {trust_region!r}")
    if (trust_region == "ratio") != (old_mean is None):
        raise ValueError(f"trust_region={trust_region!r}: old_mean belongs to the other trust regions, which need it")
    if trust_region == "divergence" and isinstance(clip_range, (tuple, list)):
        raise ValueError(f"clip_range={clip_range}: the trust region of the divergence has one bound, give a number")


def _check_kl(
    kl_weight: float,
    kl_std: torch.Tensor | float | None,
    reference_mean: torch.Tensor | None,
    latents: torch.Tensor,
) -> None:
    if kl_weight < 0 or (kl_weight > 0 and reference_mean is None):
        raise ValueError(f"kl_weight={kl_weight} must be >= 0, and > 0 needs reference_mean")
    if kl_std is None:
        return
    if reference_mean is None:
        raise ValueError("kl_std needs reference_mean: without one there is no KL")
    if not torch.is_tensor(kl_std):
        if not isinstance(kl_std, numbers.Real):
            check_tensors(kl_std=kl_std)
        if not kl_std > 0:
            raise ValueError(f"kl_std must be positive, got {kl_std}")
        return
    batch = latents.shape[0]
    if kl_std.shape not in ((), (batch,)) or not kl_std.is_floating_point() or kl_std.device != latents.device:
        raise ValueError(
            f"kl_std must be a number or floating point [] or [{batch}] on {latents.device}, "
            f"got {kl_std.dtype} {tuple(kl_std.shape)} on {kl_std.device}"
        )
    if can_look_at(kl_std) and not bool((kl_std > 0).all()):
        raise ValueError(f"kl_std must be positive, got {kl_std.tolist()}: leave steps without noise out")
