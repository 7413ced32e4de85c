"""What a typed caller sees, read by `make types` and never run: each line fails the checker if a declared type is lost.

A public function that returns `Any` would pass every use of it; `assert_type` is what notices.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from typing_extensions import assert_type  # noqa: UP035  # the kernels are checked as Python 3.10

import advgrpo_kernels as k
from advgrpo_kernels import layers
from advgrpo_kernels.integrations import diffusers_transformers
from advgrpo_kernels.ops.ada_layer_norm import Modulated
from advgrpo_kernels.ops.gated_residual import Residual


def coefficients(sigmas: list[float]) -> None:
    assert_type(k.transition_coefficients(sigmas, dynamics="flow_cps", noise_level=0.8), Tensor)
    assert_type(k.step_coefficients(1.0, 0.5, dynamics="flow_sde", noise_level=0.7), Tensor)
    assert_type(k.step_std(1.0, 0.5, dynamics="flow_sde", noise_level=0.7), Tensor)
    assert_type(k.ddim_coefficients(0.5, 0.6, 1.0), Tensor)


def sampling(x: Tensor, v: Tensor, row: Tensor) -> None:
    step = k.gaussian_step(x, v, row, seed=1)
    assert_type(step, k.GaussianStep)
    assert_type(step.next_latents, Tensor)
    assert_type(step.log_prob, Tensor | None)
    assert_type(step.mean, Tensor | None)
    assert_type(k.gaussian_step_ref(x, v, row, noise=x), k.GaussianStep)
    assert_type(k.gaussian_log_prob(x, v, step.next_latents, row), Tensor)
    assert_type(k.gaussian_log_prob_ref(x, v, step.next_latents, row), Tensor)
    assert_type(k.philox_normal(x.shape, seed=1, sample_ids=row, step=0), Tensor)


def training(x: Tensor, v: Tensor, row: Tensor, rewards: Tensor) -> None:
    advantages = k.group_advantages(rewards, rewards.long())
    assert_type(advantages, k.Advantages)
    assert_type(advantages.advantages, Tensor)
    loss = k.clipped_policy_loss(x, v, x, row, rewards, rewards, clip_range=1e-4)
    assert_type(loss, k.PolicyLoss)
    assert_type(loss.loss, Tensor)
    assert_type(loss.velocity_grad, Tensor | None)
    assert_type(k.multi_tensor_adamw([x], [x], [x], [x], row, lr=1e-4), Tensor)


def adversary(cls: Tensor, patches: Tensor, head: dict[str, Tensor]) -> None:
    taken = k.sample_patches(patches, 8, seed=1)
    assert_type(taken, k.PatchSample)
    assert_type(k.score_features(cls, taken.patches, None, head), k.FeatureScore)


def layer_ops(x: Tensor, row: Tensor, flag: bool) -> None:
    assert_type(k.linear(x, x, row), Tensor)
    assert_type(k.matrix_product(x, x, out=x), Tensor)
    assert_type(k.gelu(x), Tensor)
    assert_type(k.gelu(x, row, quantize=flag), Tensor | k.Fp8Tensor)
    assert_type(k.swiglu(x), Tensor)
    assert_type(k.swiglu(x, quantize=flag), Tensor | k.Fp8Tensor)
    assert_type(k.ada_layer_norm(x, row, row), Tensor)
    assert_type(k.ada_layer_norm(x, row, row, row, row), tuple[Tensor, Tensor])
    assert_type(k.ada_layer_norm(x, row, row, quantize=flag), Modulated)
    assert_type(k.gated_residual(x, x, row), Tensor)
    assert_type(k.gated_residual(x, x, row, x, row, shift=row, scale=row), tuple[Tensor, Tensor])
    both = k.gated_residual(x, x, row, shift=row, scale=row, shift2=row, scale2=row)
    assert_type(both, tuple[Tensor, Tensor, Tensor])
    assert_type(k.gated_residual(x, x, row, shift=row, scale=row, quantize=flag), Residual)
    inputs = k.qk_rms_norm(x, (row, row))
    assert_type(inputs, k.AttentionInputs)
    assert_type(k.qk_rms_norm(x, (row, row), rotary=(x, x), rotary_pairs="half"), k.AttentionInputs)
    assert_type(inputs.query, Tensor)
    assert_type(k.fp8_quantize(x), k.Fp8Tensor)
    assert_type(k.fp8_linear(x, k.fp8_quantize(x)), Tensor)


def modules(x: Tensor, emb: Tensor, model: nn.Module) -> None:
    assert_type(layers.GeluTanh().forward(x), Tensor)
    assert_type(layers.Flux2SwiGLU().forward(x), Tensor)
    assert_type(layers.AdaLayerNormContinuous().forward(x, emb), Tensor)
    assert_type(diffusers_transformers.accelerate(model), list[str])
    assert_type(diffusers_transformers.restore(model), list[str])


def refused(x: Tensor, row: Tensor, many: Sequence[Tensor]) -> None:
    """What the checker must not let through; an ignore that is not needed is an error itself."""
    k.gelu(many)  # ty: ignore[invalid-argument-type]
    k.gaussian_step(x, row)  # ty: ignore[missing-argument]
    k.fp8_linear(x, x)  # ty: ignore[invalid-argument-type]
    k.qk_rms_norm(x, (row, row), rotary=(x, x), rotary_pairs="halves")  # ty: ignore[invalid-argument-type]
    k.transition_coefficients([1.0, 0.0], dynamics=torch.float32, noise_level=0.8)  # ty: ignore[invalid-argument-type]
