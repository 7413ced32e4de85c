"""Log-probability of a sampled transition, averaged over the elements of an image; differentiable in the velocities.

Formula and reduction order: `_gaussian.py` (Flow-GRPO's convention, arXiv 2505.05470). The gradient is closed:
`d log p/dμ = (x_next-μ)/(s²·N)` (gaussian) or `2(x_next-μ)/N` (squared_error), `dμ/dc = g·b`, `dμ/du = (1-g)·b`.

Shapes: B images, N = elements per image. latents, velocities, next_latents [B, ...] -> log_prob [B] float32.
"""

from __future__ import annotations

import torch

from .._ops import add_op_namespace_prefix
from .._runtime import HAS_TRITON, device_guard, pick_backend
from ._gaussian import (
    LIKELIHOOD_CODES,
    as_stored,
    check_has_density,
    check_step_inputs,
    row_log_prob,
    step_mean,
    tiling,
    velocity_gradients,
)

__all__ = ["gaussian_log_prob", "gaussian_log_prob_ref", "launch_log_prob"]

if HAS_TRITON:
    import triton
    import triton.language as tl

    from ._gaussian import (
        GAUSSIAN,
        NORMALIZED_RATIO,
        kl_of,
        load_coefficients,
        load_kl_std,
        load_step,
        log_prob_of,
        mean_of,
        mean_square_gradient,
        shift_of,
        store_velocity_gradients,
        tree_sum,
    )

    @triton.jit
    def _gaussian_log_prob_kernel(
        latents_ptr,
        velocity_ptr,
        uncond_ptr,
        next_ptr,
        reference_mean_ptr,
        old_mean_ptr,
        coefficients_ptr,
        log_prob_ptr,
        kl_ptr,
        shift_ptr,
        kl_std,
        N,
        coefficients_stride,
        kl_std_stride,
        guidance_scale,
        uncond_scale,
        GUIDED: tl.constexpr,
        HAS_REFERENCE: tl.constexpr,
        KL_STD_IN_MEMORY: tl.constexpr,
        TRUST_REGION: tl.constexpr,
        LIKELIHOOD: tl.constexpr,
        TILES: tl.constexpr,
        LANES: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64)
        a, b, s = load_coefficients(coefficients_ptr, row, coefficients_stride)
        element = tl.arange(0, LANES)
        offsets = row * N + element
        x, c, u = load_step(latents_ptr, velocity_ptr, uncond_ptr, offsets, element < N, GUIDED)
        square_sums = tl.zeros((LANES,), tl.float32)
        kl_sums = tl.zeros((LANES,), tl.float32)
        shift_sums = tl.zeros((LANES,), tl.float32)
        for _ in range(TILES):
            mask = element < N
            x_next = tl.load(next_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
            # One program per image leaves no other program on the SM to hide latency: load the next tile first.
            x_ahead, c_ahead, u_ahead = load_step(
                latents_ptr, velocity_ptr, uncond_ptr, offsets + LANES, element + LANES < N, GUIDED
            )
            mean = mean_of(x, c, u, a, b, guidance_scale, uncond_scale, GUIDED)
            difference = tl.where(mask, x_next - mean, 0.0)
            square_sums = tl.fma(difference, difference, square_sums)
            if HAS_REFERENCE:
                reference = tl.load(reference_mean_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
                drift = tl.where(mask, mean - reference, 0.0)
                kl_sums = tl.fma(drift, drift, kl_sums)
            if TRUST_REGION > 0:
                old_mean = tl.load(old_mean_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
                moved = tl.where(mask, mean - old_mean, 0.0)
                along = x_next - old_mean if TRUST_REGION == NORMALIZED_RATIO else moved
                shift_sums = tl.fma(along, moved, shift_sums)
            x, c, u = x_ahead, c_ahead, u_ahead
            element += LANES
            offsets += LANES
        tl.store(log_prob_ptr + row, log_prob_of(tree_sum(square_sums), N, s, LIKELIHOOD))
        if HAS_REFERENCE:
            if kl_std is None:
                kl = kl_of(tree_sum(kl_sums), N, s, LIKELIHOOD)
            else:
                kl = kl_of(tree_sum(kl_sums), N, load_kl_std(kl_std, row, kl_std_stride, KL_STD_IN_MEMORY), GAUSSIAN)
            tl.store(kl_ptr + row, kl)
        if TRUST_REGION > 0:
            tl.store(shift_ptr + row, shift_of(tree_sum(shift_sums), N, s, TRUST_REGION))

    @triton.jit
    def _gaussian_log_prob_bwd_kernel(
        latents_ptr,
        velocity_ptr,
        uncond_ptr,
        next_ptr,
        coefficients_ptr,
        grad_log_prob_ptr,
        velocity_grad_ptr,
        uncond_grad_ptr,
        N,
        coefficients_stride,
        guidance_scale,
        uncond_scale,
        GUIDED: tl.constexpr,
        LIKELIHOOD: tl.constexpr,
        LANES: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64)
        a, b, s = load_coefficients(coefficients_ptr, row, coefficients_stride)
        element = tl.program_id(1) * LANES + tl.arange(0, LANES)
        mask = element < N
        offsets = row * N + element
        x, c, u = load_step(latents_ptr, velocity_ptr, uncond_ptr, offsets, mask, GUIDED)
        x_next = tl.load(next_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        difference = x_next - mean_of(x, c, u, a, b, guidance_scale, uncond_scale, GUIDED)
        upstream = tl.load(grad_log_prob_ptr + row).to(tl.float32) * b
        grad = mean_square_gradient(difference, s, N, LIKELIHOOD) * upstream
        store_velocity_gradients(
            velocity_grad_ptr, uncond_grad_ptr, offsets, mask, grad, guidance_scale, uncond_scale, GUIDED
        )


def launch_log_prob(
    latents: torch.Tensor,
    velocity: torch.Tensor,
    uncond: torch.Tensor | None,
    next_latents: torch.Tensor,
    reference_mean: torch.Tensor | None,
    coefficients: torch.Tensor,
    guidance_scale: float,
    likelihood: int,
    kl_std: torch.Tensor | float | None = None,
    old_mean: torch.Tensor | None = None,
    trust_region: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(log_prob [B], KL to reference_mean [B], `row_shift` [B]) in one launch; the latter two are empty without a
    reference_mean and with trust region 0. Contiguous tensors only."""
    batch, count = latents.shape[0], latents[0].numel()
    log_prob = latents.new_empty(batch, dtype=torch.float32)
    kl = log_prob.new_empty(0 if reference_mean is None else batch)
    shift = log_prob.new_empty(batch if trust_region else 0)
    lanes, tiles, warps = tiling(count)
    with device_guard(latents):
        _gaussian_log_prob_kernel[(batch,)](
            latents,
            velocity,
            uncond,
            next_latents,
            reference_mean,
            old_mean,
            coefficients,
            log_prob,
            kl,
            shift,
            kl_std,
            count,
            3 if coefficients.dim() == 2 else 0,
            kl_std_stride(kl_std),
            guidance_scale,
            1.0 - guidance_scale,
            GUIDED=uncond is not None,
            HAS_REFERENCE=reference_mean is not None,
            KL_STD_IN_MEMORY=torch.is_tensor(kl_std),
            TRUST_REGION=trust_region,
            LIKELIHOOD=likelihood,
            TILES=tiles,
            LANES=lanes,
            num_warps=warps,
        )
    return log_prob, kl, shift


def kl_std_stride(kl_std: torch.Tensor | float | None) -> int:
    """Of the rows of a contiguous `kl_std`: 1 for [B]; 0 for one value."""
    return kl_std.dim() if torch.is_tensor(kl_std) else 0


@torch.library.custom_op(add_op_namespace_prefix("gaussian_log_prob"), mutates_args=())
def _gaussian_log_prob_op(
    latents: torch.Tensor,
    velocity: torch.Tensor,
    uncond_velocity: torch.Tensor | None,
    next_latents: torch.Tensor,
    coefficients: torch.Tensor,
    guidance_scale: float,
    likelihood: int,
) -> torch.Tensor:
    latents, velocity, next_latents = latents.contiguous(), velocity.contiguous(), next_latents.contiguous()
    uncond = None if uncond_velocity is None else uncond_velocity.contiguous()
    args = (latents, velocity, uncond, next_latents, None, coefficients.contiguous(), guidance_scale, likelihood)
    return launch_log_prob(*args)[0]


@_gaussian_log_prob_op.register_fake
def _(latents, *_):
    return latents.new_empty(latents.shape[0], dtype=torch.float32)


@torch.library.custom_op(add_op_namespace_prefix("gaussian_log_prob_backward"), mutates_args=())
def _gaussian_log_prob_backward_op(
    grad_log_prob: torch.Tensor,
    latents: torch.Tensor,
    velocity: torch.Tensor,
    uncond_velocity: torch.Tensor | None,
    next_latents: torch.Tensor,
    coefficients: torch.Tensor,
    guidance_scale: float,
    likelihood: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients by velocity and uncond_velocity (empty without guidance) in one launch."""
    velocity_grad, uncond_grad = velocity_gradients(velocity, uncond_velocity)
    batch, count = latents.shape[0], latents[0].numel()
    lanes, tiles, warps = tiling(count)
    with device_guard(latents):
        _gaussian_log_prob_bwd_kernel[(batch, tiles)](
            latents.contiguous(),
            velocity.contiguous(),
            None if uncond_velocity is None else uncond_velocity.contiguous(),
            next_latents.contiguous(),
            coefficients.contiguous(),
            grad_log_prob.contiguous(),
            velocity_grad,
            uncond_grad,
            count,
            3 if coefficients.dim() == 2 else 0,
            guidance_scale,
            1.0 - guidance_scale,
            GUIDED=uncond_velocity is not None,
            LIKELIHOOD=likelihood,
            LANES=lanes,
            num_warps=warps,
        )
    return velocity_grad, uncond_grad


@_gaussian_log_prob_backward_op.register_fake
def _(grad_log_prob, latents, velocity, uncond_velocity, *_):
    return velocity_gradients(velocity, uncond_velocity)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.guidance_scale, ctx.likelihood = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad_log_prob):
    grads = _gaussian_log_prob_backward_op(grad_log_prob, *ctx.saved_tensors, ctx.guidance_scale, ctx.likelihood)
    velocity_grad, uncond_grad = grads
    return None, velocity_grad, None if ctx.saved_tensors[2] is None else uncond_grad, None, None, None, None


_gaussian_log_prob_op.register_autograd(_backward, setup_context=_setup_context)


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
        latents: [B, ...] float32, bfloat16 or float16, x before the step as the step was given it.
        velocity: [B, ...] any float dtype; the conditional velocity c when `uncond_velocity` is given.
        next_latents: [B, ...] float32, bfloat16 or float16, the transition that was taken, exactly as the step returned
            it: rounded on the way (see `storage_dtype` there) it is another transition.
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
        latents, next_latents = as_stored(latents), as_stored(next_latents)
        settings = (guidance_scale, LIKELIHOOD_CODES[likelihood])
        return _gaussian_log_prob_op(latents, velocity, uncond_velocity, next_latents, coefficients, *settings)
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
