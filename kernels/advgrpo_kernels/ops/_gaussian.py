"""What the affine Gaussian step, its log-probability and the policy loss share: checks, guidance, mean, reduction.

    v = (1-g)·u + g·c        μ = a·x + b·v        d = x_next - μ
    gaussian:       log p = -mean(d²)/(2s²) - log s - ½·log 2π      (Flow-GRPO averages over the elements of an image)
    squared_error:  log p = -mean(d²)                               (Flow-CPS and the released Adv-GRPO)

Latents are float32, or bfloat16 or float16 where a trajectory is stored so. d is always that of the stored x_next: the
step rounds it first, and every use upcasts it to float32, so the ratio of a policy with itself stays exactly 1.

The mean over elements is a fixed tree: element e is added to lane e % LANES in order of e, then neighbouring lanes are
added pairwise. It depends on nothing but the number of elements, so a log-prob is the same to the bit whatever else
is in the batch, and the three ops agree with each other to the bit.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from .._runtime import HAS_TRITON, can_look_at, check_tensors

LIKELIHOODS = ("gaussian", "squared_error")
HALF_LOG_TWO_PI = 0.5 * math.log(2.0 * math.pi)
LIKELIHOOD_CODES = {None: 0, "gaussian": 1, "squared_error": 2}  # LIKELIHOOD in the kernels
LANES = 4096
STORAGE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of a trajectory's latents
TRUST_REGIONS = ("ratio", "normalized_ratio", "divergence")  # see clipped_policy_loss.py
TRUST_REGION_CODES = {name: code for code, name in enumerate(TRUST_REGIONS)}  # TRUST_REGION in the kernels

if HAS_TRITON:
    import triton
    import triton.language as tl

    GAUSSIAN: tl.constexpr = tl.constexpr(LIKELIHOOD_CODES["gaussian"])
    NORMALIZED_RATIO: tl.constexpr = tl.constexpr(TRUST_REGION_CODES["normalized_ratio"])
    DIVERGENCE: tl.constexpr = tl.constexpr(TRUST_REGION_CODES["divergence"])

    @triton.jit
    def load_coefficients(coefficients_ptr, row, coefficients_stride):
        """(a, b, s) of a row; stride 0 for one triple shared by the batch."""
        base = coefficients_ptr + row * coefficients_stride
        a = tl.load(base).to(tl.float32)
        b = tl.load(base + 1).to(tl.float32)
        s = tl.load(base + 2).to(tl.float32)
        return a, b, s

    @triton.jit
    def load_step(latents_ptr, velocity_ptr, uncond_ptr, offsets, mask, GUIDED: tl.constexpr):
        """x, c and u as stored (u is c without guidance); 0 where masked."""
        x = tl.load(latents_ptr + offsets, mask=mask, other=0.0)
        c = tl.load(velocity_ptr + offsets, mask=mask, other=0.0)
        u = tl.load(uncond_ptr + offsets, mask=mask, other=0.0) if GUIDED else c
        return x, c, u

    @triton.jit
    def mean_of(x, c, u, a, b, guidance_scale, uncond_scale, GUIDED: tl.constexpr):
        """μ = a·x + b·((1-g)·u + g·c); explicit fma, so every kernel rounds alike whatever the compiler fuses."""
        v = c.to(tl.float32)
        if GUIDED:
            v = tl.fma(v, guidance_scale, u.to(tl.float32) * uncond_scale)
        return tl.fma(x.to(tl.float32), a, v * b)

    @triton.jit
    def tree_sum(lanes):
        """Sum of [LANES] by adding neighbours: adds of two values, so no register layout can change the result."""
        for _ in tl.static_range(12):
            if lanes.shape[0] > 1:
                lanes = tl.sum(tl.reshape(lanes, (lanes.shape[0] // 2, 2)), axis=1)
        return tl.sum(lanes, axis=0)

    @triton.jit
    def log_prob_of(square_sum, count, s, LIKELIHOOD: tl.constexpr):
        mean_square = tl.div_rn(square_sum, count.to(tl.float32))
        log_prob = -mean_square
        if LIKELIHOOD == GAUSSIAN:
            log_normalizer = tl.log(s) + 0.9189385332046727
            log_prob = tl.fma(-mean_square, tl.div_rn(0.5, s * s), -log_normalizer)
        return log_prob

    @triton.jit
    def kl_of(square_sum, count, s, LIKELIHOOD: tl.constexpr):
        kl = tl.div_rn(square_sum, count.to(tl.float32))
        if LIKELIHOOD == GAUSSIAN:
            kl = kl * tl.div_rn(0.5, s * s)
        return kl

    @triton.jit
    def shift_of(product_sum, count, s, TRUST_REGION: tl.constexpr):
        """The row's shift from its sum of (x_next-μ_old)·(μ-μ_old) or of (μ-μ_old)²; see `row_shift`."""
        shift = tl.div_rn(product_sum, count.to(tl.float32))
        if TRUST_REGION == NORMALIZED_RATIO:
            shift = tl.div_rn(shift, s)
        else:
            shift = shift * tl.div_rn(0.5, s * s)
        return shift

    @triton.jit
    def load_kl_std(kl_std, row, kl_std_stride, IN_MEMORY: tl.constexpr):
        """The standard deviation of a row's KL: a number, or in memory with stride 0 for one shared by the batch."""
        if IN_MEMORY:
            std = tl.load(kl_std + row * kl_std_stride).to(tl.float32)
        else:
            std = tl.full((), kl_std, tl.float32)
        return std

    @triton.jit
    def mean_square_gradient(difference, s, N, LIKELIHOOD: tl.constexpr):
        """d log p/dμ = d/(s²·N) (gaussian) or 2d/N (squared_error); the same slope serves the KL, with -d."""
        slope = 2.0
        if LIKELIHOOD == GAUSSIAN:
            slope = tl.div_rn(1.0, s * s)
        return difference * tl.div_rn(slope, N.to(tl.float32))

    @triton.jit
    def store_velocity_gradients(
        velocity_grad_ptr, uncond_grad_ptr, offsets, mask, grad, guidance_scale, uncond_scale, GUIDED: tl.constexpr
    ):
        """Split dL/dv into dL/dc = g·dL/dv and dL/du = (1-g)·dL/dv and store both in their dtypes."""
        if GUIDED:
            uncond_grad = (grad * uncond_scale).to(uncond_grad_ptr.dtype.element_ty)
            tl.store(uncond_grad_ptr + offsets, uncond_grad, mask=mask)
            grad = grad * guidance_scale
        tl.store(velocity_grad_ptr + offsets, grad.to(velocity_grad_ptr.dtype.element_ty), mask=mask)


class Tiling(NamedTuple):
    """How the N elements of an image are cut: `tiles` tiles of `lanes` elements, `warps` warps per program."""

    lanes: int
    tiles: int
    warps: int


def tiling(count: int) -> Tiling:
    """Eight elements per thread: one 128-bit load of bf16, two of float32."""
    lanes = min(LANES, max(16, 1 << (count - 1).bit_length()))
    return Tiling(lanes, -(-count // lanes), max(1, lanes // 256))


def velocity_gradients(
    velocity: torch.Tensor, uncond_velocity: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Uninitialised gradients of both velocities; the second is empty without guidance (custom ops return no None)."""
    contiguous = torch.contiguous_format
    velocity_grad = torch.empty_like(velocity, memory_format=contiguous)
    if uncond_velocity is None:
        return velocity_grad, velocity.new_empty(0)
    return velocity_grad, torch.empty_like(uncond_velocity, memory_format=contiguous)


def check_step_inputs(
    latents: torch.Tensor,
    velocity: torch.Tensor,
    coefficients: torch.Tensor,
    uncond_velocity: torch.Tensor | None,
    guidance_scale: float,
    likelihood: str | None,
    **same_shape: torch.Tensor | None,
) -> None:
    """Raise unless the arguments of a step fit together; `same_shape` are further [B, ...] float tensors."""
    tensors = {"latents": latents, "velocity": velocity, "coefficients": coefficients}
    check_tensors(**tensors, uncond_velocity=uncond_velocity, **same_shape)
    if latents.dim() < 2 or latents.numel() == 0:
        raise ValueError(f"latents must be a non-empty [B, ...] tensor, got shape {tuple(latents.shape)}")
    for name, tensor in {"velocity": velocity, "uncond_velocity": uncond_velocity, **same_shape}.items():
        if tensor is not None and (tensor.shape != latents.shape or not tensor.is_floating_point()):
            raise ValueError(
                f"{name} must be floating point of latents' shape {tuple(latents.shape)}, "
                f"got {tensor.dtype} {tuple(tensor.shape)}"
            )
    if latents.dtype not in (*STORAGE_DTYPES, torch.float64):
        raise ValueError(f"latents must be float32, or bfloat16 or float16 as they were stored, got {latents.dtype}")
    batch = latents.shape[0]
    if coefficients.shape not in ((3,), (batch, 3)) or coefficients.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"coefficients must be float32 [3] or [{batch}, 3] (a, b, s), "
            f"got {coefficients.dtype} {tuple(coefficients.shape)}"
        )
    if coefficients.device != latents.device:
        raise ValueError(f"coefficients are on {coefficients.device}, latents on {latents.device}: move the table once")
    if uncond_velocity is None and guidance_scale != 1.0:
        raise ValueError(f"guidance_scale={guidance_scale} needs uncond_velocity")
    if likelihood not in (*LIKELIHOODS, None):
        raise ValueError(f"likelihood must be one of {LIKELIHOODS} or None, got {likelihood!r}")


def storage_of(latents: torch.Tensor, storage_dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of a step's `next_latents`.

    Raises:
        ValueError: not one of `STORAGE_DTYPES`, or left open although `latents` are half precision: float32 results
            would be rounded by whoever stores them beside the latents, after their log-prob was taken.
    """
    if storage_dtype is None:
        if latents.dtype in (torch.bfloat16, torch.float16):
            raise ValueError(
                f"latents are {latents.dtype}: pass storage_dtype={latents.dtype} so that next_latents are rounded "
                "before their log-prob is taken, or storage_dtype=torch.float32 if they will be kept in float32"
            )
        return torch.float32
    if storage_dtype not in STORAGE_DTYPES:
        raise ValueError(f"storage_dtype must be one of {STORAGE_DTYPES} or None, got {storage_dtype}")
    return storage_dtype


def as_stored(latents: torch.Tensor) -> torch.Tensor:
    """What the kernels load and upcast themselves; float64 is rounded to float32 first."""
    return latents.float() if latents.dtype == torch.float64 else latents


def check_rows(batch: int, **rows: torch.Tensor) -> None:
    """Raise unless every argument is a floating point tensor [B]."""
    check_tensors(**rows)
    for name, tensor in rows.items():
        if tensor.shape != (batch,) or not tensor.is_floating_point():
            raise ValueError(f"{name} must be floating point [{batch}], got {tensor.dtype} {tuple(tensor.shape)}")


def check_has_density(coefficients: torch.Tensor, likelihood: str) -> None:
    """A gaussian log-prob needs s > 0. Checked where it costs no device sync; on a GPU such a row comes out NaN."""
    if likelihood == "gaussian" and can_look_at(coefficients) and bool((coefficients[..., 2] == 0).any()):
        raise ValueError("coefficients have s = 0 (an ODE step), which has no gaussian log-prob: leave that step out")


def per_row(coefficients: torch.Tensor, ndim: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Columns (a, b, s) shaped to broadcast over a [B, ...] tensor of `ndim` dimensions."""
    columns = coefficients.to(dtype).reshape(-1, 3).unbind(1)
    return tuple(column.view(-1, *[1] * (ndim - 1)) for column in columns)


def guided_velocity(
    velocity: torch.Tensor, uncond_velocity: torch.Tensor | None, guidance_scale: float, dtype: torch.dtype
) -> torch.Tensor:
    """Classifier-free guidance in `dtype`: (1-g)·u + g·c, or c alone without an unconditional velocity."""
    if uncond_velocity is None:
        return velocity.to(dtype)
    return (1.0 - guidance_scale) * uncond_velocity.to(dtype) + guidance_scale * velocity.to(dtype)


def step_mean(
    latents: torch.Tensor,
    velocity: torch.Tensor,
    coefficients: torch.Tensor,
    uncond_velocity: torch.Tensor | None,
    guidance_scale: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    """μ = a·x + b·v in `dtype`, of latents' shape."""
    a, b, _ = per_row(coefficients, latents.dim(), dtype)
    return a * latents.to(dtype) + b * guided_velocity(velocity, uncond_velocity, guidance_scale, dtype)


def row_log_prob(difference: torch.Tensor, coefficients: torch.Tensor, likelihood: str) -> torch.Tensor:
    """Log-prob per element [B] of difference = x_next - μ; NaN in gaussian rows with s = 0."""
    mean_square = tree_mean(difference.square().flatten(1))
    if likelihood == "squared_error":
        return -mean_square
    s = coefficients.double().reshape(-1, 3)[:, 2]  # float64: vectorised and scalar float32 logs differ in the last bit
    log_normalizer = (torch.log(s) + HALF_LOG_TWO_PI).to(mean_square.dtype)
    return -mean_square * (0.5 / (s * s)).to(mean_square.dtype) - log_normalizer


def row_shift(
    mean: torch.Tensor,
    next_latents: torch.Tensor,
    old_mean: torch.Tensor,
    coefficients: torch.Tensor,
    trust_region: str,
) -> torch.Tensor:
    """How far a row's step has moved from the rollout's [B], exactly 0 where μ = μ_old.

    normalized_ratio: mean((x_next-μ_old)·(μ-μ_old))/s, the log of its ratio; divergence: mean((μ-μ_old)²)/(2s²).
    """
    moved = mean - old_mean.to(mean.dtype)
    s = coefficients.to(mean.dtype).reshape(-1, 3)[:, 2]
    if trust_region == "normalized_ratio":
        taken = next_latents.to(mean.dtype) - old_mean.to(mean.dtype)
        return tree_mean((taken * moved).flatten(1)) / s
    return tree_mean(moved.square().flatten(1)) * (0.5 / (s * s))


def tree_mean(values: torch.Tensor) -> torch.Tensor:
    """Mean over dim 1 of [B, N] by the fixed tree of the module docstring; written with elementwise adds only."""
    count = values.shape[1]
    lanes = min(LANES, 1 << (count - 1).bit_length())
    rows = -(-count // lanes)
    lane_sums, *rest = torch.nn.functional.pad(values, (0, rows * lanes - count)).unflatten(1, (rows, lanes)).unbind(1)
    for row in rest:
        lane_sums = lane_sums + row
    while lane_sums.shape[1] > 1:
        left, right = lane_sums.unflatten(1, (-1, 2)).unbind(2)
        lane_sums = left + right
    return lane_sums[:, 0] / count
