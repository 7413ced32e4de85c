"""One sampler step of a flow model: x_next = a·x + b·v + s·z, with its log-probability.

Classifier-free guidance, mean, noise, next latents and log-prob in one pass; formulas in `_gaussian.py`, coefficients
in `coefficients.py`, the random numbers in `philox.py`.

Shapes:   B images. latents, velocity, uncond_velocity, noise [B, ...]; coefficients [3] or [B, 3]; log_prob [B].
Numerics: float32 inside; the log-prob is that of the `next_latents` that are returned, rounded to their dtype, not of
          the noise, so `gaussian_log_prob` on the returned latents gives the same bits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .._ops import add_op_namespace_prefix
from .._runtime import HAS_TRITON, can_look_at, check_tensors, device_guard, pick_backend
from ._gaussian import (
    LIKELIHOOD_CODES,
    as_stored,
    check_step_inputs,
    per_row,
    row_log_prob,
    step_mean,
    storage_of,
    tiling,
)
from .philox import philox_normal, split_integer

if HAS_TRITON:
    from ._gaussian import load_coefficients, load_step, log_prob_of, mean_of, tree_sum
    from .philox import normal_block

__all__ = ["GaussianStep", "gaussian_step", "gaussian_step_ref"]


if HAS_TRITON:
    import triton
    import triton.language as tl

    # Codes of NOISE; without noise the kernel has no random numbers at all.
    ABSENT: tl.constexpr = tl.constexpr(0)
    GIVEN: tl.constexpr = tl.constexpr(1)
    DRAWN: tl.constexpr = tl.constexpr(2)

    @triton.jit(do_not_specialize=["seed", "step"])
    def _gaussian_step_kernel(
        latents_ptr,
        velocity_ptr,
        uncond_ptr,
        noise_ptr,
        coefficients_ptr,
        sample_ids_ptr,
        seed,
        step,
        next_ptr,
        mean_ptr,
        log_prob_ptr,
        N,
        coefficients_stride,
        guidance_scale,
        uncond_scale,
        GUIDED: tl.constexpr,
        NOISE: tl.constexpr,
        LIKELIHOOD: tl.constexpr,
        STORE_MEAN: tl.constexpr,
        SEED_IN_MEMORY: tl.constexpr,
        STEP_IN_MEMORY: tl.constexpr,
        TILES: tl.constexpr,
        LANES: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64)
        a, b, s = load_coefficients(coefficients_ptr, row, coefficients_stride)
        if NOISE == DRAWN:
            seed_ = tl.load(seed) if SEED_IN_MEMORY else tl.full((), seed, tl.int64)
            step_ = tl.load(step) if STEP_IN_MEMORY else tl.full((), step, tl.int64)
            sample_id = row if sample_ids_ptr is None else tl.load(sample_ids_ptr + row)
        square_sums = tl.zeros((LANES,), tl.float32)
        first = tl.program_id(1) * TILES * LANES
        element = first + tl.arange(0, LANES)
        offsets = row * N + element
        x, c, u = load_step(latents_ptr, velocity_ptr, uncond_ptr, offsets, element < N, GUIDED)
        for _ in range(TILES):
            mask = element < N
            x_ahead, c_ahead, u_ahead = x, c, u
            if TILES > 1:  # one program per image leaves no other on the SM to hide latency: load the next tile first
                x_ahead, c_ahead, u_ahead = load_step(
                    latents_ptr, velocity_ptr, uncond_ptr, offsets + LANES, element + LANES < N, GUIDED
                )
            mean = mean_of(x, c, u, a, b, guidance_scale, uncond_scale, GUIDED)
            if NOISE == GIVEN:
                z = tl.load(noise_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
                x_next = tl.fma(z, s, mean)
            elif NOISE == DRAWN:
                x_next = tl.fma(normal_block(seed_, step_, sample_id, first, LANES), s, mean)
            else:
                x_next = mean + tl.where(s == 0.0, 0.0, float("nan"))
            stored = x_next.to(next_ptr.dtype.element_ty)
            tl.store(next_ptr + offsets, stored, mask=mask)
            if STORE_MEAN:
                tl.store(mean_ptr + offsets, mean, mask=mask)
            if LIKELIHOOD > 0:
                difference = tl.where(mask, stored.to(tl.float32) - mean, 0.0)
                square_sums = tl.fma(difference, difference, square_sums)
            x, c, u = x_ahead, c_ahead, u_ahead
            first += LANES
            element += LANES
            offsets += LANES
        if LIKELIHOOD > 0:
            tl.store(log_prob_ptr + row, log_prob_of(tree_sum(square_sums), N, s, LIKELIHOOD))


@torch.library.custom_op(add_op_namespace_prefix("gaussian_step"), mutates_args=())
def _gaussian_step_op(
    latents: torch.Tensor,
    velocity: torch.Tensor,
    coefficients: torch.Tensor,
    uncond_velocity: torch.Tensor | None,
    noise: torch.Tensor | None,
    sample_ids: torch.Tensor | None,
    seed: torch.Tensor | None,
    step: torch.Tensor | None,
    seed_value: int,
    step_value: int,
    draw: bool,
    guidance_scale: float,
    likelihood: int,
    return_mean: bool,
    storage_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(next_latents, log_prob, mean); what was not asked for comes back empty. Seed and step: tensor, else value."""
    latents, velocity, coefficients = latents.contiguous(), velocity.contiguous(), coefficients.contiguous()
    uncond, noise, ids = (None if t is None else t.contiguous() for t in (uncond_velocity, noise, sample_ids))
    next_latents, log_prob, mean = _outputs(latents, likelihood, return_mean, storage_dtype)
    batch, count = latents.shape[0], latents[0].numel()
    lanes, tiles, warps = tiling(count)
    # A log-prob is reduced by one program per image; without one every tile is its own program.
    grid, tiles_per_program = ((batch, 1), tiles) if likelihood else ((batch, tiles), 1)
    with device_guard(latents):
        _gaussian_step_kernel[grid](
            latents,
            velocity,
            uncond,
            noise,
            coefficients,
            ids,
            seed_value if seed is None else seed,
            step_value if step is None else step,
            next_latents,
            mean,
            log_prob,
            count,
            3 if coefficients.dim() == 2 else 0,
            guidance_scale,
            1.0 - guidance_scale,
            GUIDED=uncond is not None,
            NOISE=2 if draw else int(noise is not None),
            LIKELIHOOD=likelihood,
            STORE_MEAN=return_mean,
            SEED_IN_MEMORY=seed is not None,
            STEP_IN_MEMORY=step is not None,
            TILES=tiles_per_program,
            LANES=lanes,
            num_warps=warps,
        )
    return next_latents, log_prob, mean


@_gaussian_step_op.register_fake
def _(latents, velocity, coefficients, uncond_velocity, noise, sample_ids, seed, step, *settings):
    return _outputs(latents, *settings[-3:])


def _outputs(
    latents: torch.Tensor, likelihood: int, return_mean: bool, storage_dtype: torch.dtype
) -> tuple[torch.Tensor, ...]:
    next_latents = torch.empty_like(latents, dtype=storage_dtype, memory_format=torch.contiguous_format)
    log_prob = latents.new_empty(latents.shape[0] if likelihood else 0, dtype=torch.float32)
    mean = torch.empty_like(next_latents, dtype=torch.float32) if return_mean else log_prob.new_empty(0)
    return next_latents, log_prob, mean


class GaussianStep(NamedTuple):
    """Result of `gaussian_step`."""

    next_latents: torch.Tensor  # [B, ...] float32, or the storage_dtype asked for
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
    storage_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> GaussianStep:
    """Take one step. Not differentiable: gradients of the likelihood come from `gaussian_log_prob`.

    Args:
        latents: [B, ...] float32, or bfloat16 or float16 as stored, which needs `storage_dtype`.
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
        storage_dtype: what `next_latents` are rounded to, before their log-prob is taken, and returned in:
            torch.bfloat16 or torch.float16 for a trajectory that is kept so until the update. Default float32; latents
            in half precision must say which. The log-prob and μ are float32 always.

    Raises:
        ValueError: names the argument that does not fit. Without noise and seed, s must be 0: other values raise on the
            CPU, and give NaN latents on a GPU, where looking would cost a synchronisation.
    """
    check_step_inputs(latents, velocity, coefficients, uncond_velocity, guidance_scale, likelihood, noise=noise)
    check_tensors(sample_ids=sample_ids)
    storage_dtype = storage_of(latents, storage_dtype)
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
    with torch.no_grad():
        if pick_backend(backend, latents, velocity) == "triton":
            seed_tensor, seed_value = split_integer(seed)
            step_tensor, step_value = split_integer(step)
            next_latents, log_prob, mean = _gaussian_step_op(
                as_stored(latents),
                velocity,
                coefficients,
                uncond_velocity,
                noise,
                sample_ids,
                seed_tensor,
                step_tensor,
                seed_value,
                step_value,
                seed is not None,
                guidance_scale,
                LIKELIHOOD_CODES[likelihood],
                return_mean,
                storage_dtype,
            )
            return GaussianStep(next_latents, log_prob if likelihood else None, mean if return_mean else None)
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
            storage_dtype=storage_dtype,
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
    storage_dtype: torch.dtype | None = None,
    compute_dtype: torch.dtype = torch.float32,
) -> GaussianStep:
    """Plain PyTorch with the noise given (None: s is taken as 0); results in `compute_dtype`, next_latents in
    `storage_dtype` if it is given."""
    mean = step_mean(latents, velocity, coefficients, uncond_velocity, guidance_scale, compute_dtype)
    storage_dtype = storage_dtype or compute_dtype
    if noise is None:
        return GaussianStep(mean.to(storage_dtype), None, mean)
    _, _, s = per_row(coefficients, latents.dim(), compute_dtype)
    next_latents = (mean + s * noise.to(compute_dtype)).to(storage_dtype)
    log_prob = None
    if likelihood is not None:
        log_prob = row_log_prob(next_latents.to(compute_dtype) - mean, coefficients, likelihood)
    return GaussianStep(next_latents, log_prob, mean)
