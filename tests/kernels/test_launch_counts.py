"""How many kernels each call launches, counted by a stub in place of every launch; no GPU needed.

Counted are Triton launches and every ATen operator that computes or copies: views and allocations launch nothing.
The limits are those of the kernel library's goals (P10): policy loss with gradient 2, reward pass 3, head step 6.

Planted bugs that turned this file red: gradients filled in for outputs nobody differentiates (six launches of zeros);
a device seed made from the host's.
"""

import pytest
import torch
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode

from advgrpo_kernels import (
    clipped_policy_loss,
    gaussian_log_prob,
    gaussian_step,
    group_advantages,
    hinge_head_loss,
    sample_patches,
    score_features,
)

FREE = {
    "empty",
    "new_empty",
    "empty_like",
    "empty_strided",
    "new_empty_strided",
    "detach",
    "fill_",
}  # fill_: the poison
COEFFICIENTS = torch.tensor([0.9, -0.1, 0.3])
GUIDANCE = {"guidance_scale": 4.5, "backend": "triton"}


class Launches(TorchDispatchMode):
    """Names of the launches made inside the `with` block."""

    def __init__(self, triton_launches: list[str]) -> None:
        super().__init__()
        self.names = triton_launches

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        if func.namespace == "advgrpo_kernels":
            with self:  # look inside the op as well
                return OPDEFS[func._schema.name]._init_fn(*args, **kwargs)
        if name not in FREE and not func.is_view:
            self.names.append(name)
        return func(*args, **kwargs)


@pytest.fixture
def launches(interpreted):
    return Launches(interpreted)


def latents_and_velocities():
    return torch.zeros(2, 3, 4), torch.zeros(2, 3, 4, requires_grad=True), torch.zeros(2, 3, 4, requires_grad=True)


def test_gaussian_step_is_one_launch(launches):
    latents, velocity, uncond = latents_and_velocities()
    seed, step, ids = torch.tensor(1), torch.tensor(0), torch.arange(2)
    with launches:
        gaussian_step(
            latents, velocity, COEFFICIENTS, uncond_velocity=uncond, seed=seed, sample_ids=ids, step=step, **GUIDANCE
        )
    assert device_work(launches) == ["_gaussian_step_kernel"]


def test_gaussian_step_with_host_integers_is_one_launch(launches):
    latents, velocity, _ = latents_and_velocities()
    ode = torch.tensor([1.0, -0.1, 0.0])
    with launches:
        gaussian_step(latents, velocity, COEFFICIENTS, seed=1, step=3, likelihood=None, backend="triton")
        gaussian_step(latents, velocity, ode, backend="triton")
    assert device_work(launches) == ["_gaussian_step_kernel"] * 2


def test_log_prob_is_one_launch_each_way(launches):
    latents, velocity, uncond = latents_and_velocities()
    upstream = torch.ones(2)
    with launches:
        log_prob = gaussian_log_prob(latents, velocity, latents, COEFFICIENTS, uncond_velocity=uncond, **GUIDANCE)
        torch.autograd.grad(log_prob, (velocity, uncond), upstream)
    assert device_work(launches) == ["_gaussian_log_prob_kernel", "_gaussian_log_prob_bwd_kernel"]


@pytest.mark.parametrize("kl_std", [None, 0.3, torch.tensor(0.3), torch.full((2,), 0.3)], ids=str)
def test_policy_loss_with_its_gradient_is_two_launches(launches, kl_std):
    latents, velocity, uncond = latents_and_velocities()
    rows = torch.zeros(2)
    with launches:
        result = clipped_policy_loss(
            *(latents, velocity, latents, COEFFICIENTS, rows, rows),
            clip_range=1e-4,
            uncond_velocity=uncond,
            reference_mean=latents,
            kl_weight=0.1,
            kl_std=kl_std,
            **GUIDANCE,
        )
    assert result.velocity_grad.shape == velocity.shape
    assert device_work(launches) == ["_gaussian_log_prob_kernel", "_clipped_policy_loss_kernel"]


@pytest.mark.parametrize("trust_region", ["normalized_ratio", "divergence"])
def test_another_trust_region_costs_no_launch(launches, trust_region):
    latents, velocity, uncond = latents_and_velocities()
    rows = torch.zeros(2)
    with launches:
        result = clipped_policy_loss(
            *(latents, velocity, latents, COEFFICIENTS, rows, rows),
            clip_range=1e-4,
            uncond_velocity=uncond,
            trust_region=trust_region,
            old_mean=latents,
            **GUIDANCE,
        )
    assert result.velocity_grad.shape == velocity.shape
    assert device_work(launches) == ["_gaussian_log_prob_kernel", "_clipped_policy_loss_kernel"]


def test_policy_loss_backward_only_scales(launches):
    latents, velocity, uncond = latents_and_velocities()
    rows = torch.zeros(2)
    args = (latents, velocity, latents, COEFFICIENTS, rows, rows)
    loss = clipped_policy_loss(*args, clip_range=1e-4, uncond_velocity=uncond, **GUIDANCE).loss
    launches.names.clear()
    upstream = torch.ones(())
    with launches:
        torch.autograd.grad(loss, (velocity, uncond), upstream)
    assert launches.names == ["mul", "mul"]


def test_group_advantages_is_one_launch(launches):
    rewards, ids = torch.zeros(6), torch.arange(6)
    with launches:
        group_advantages(rewards, ids, backend="triton")
    assert launches.names == ["_group_advantages_kernel"]


def make_head():
    shapes = {"w1": (8, 6), "b1": (8,), "w2": (1, 8), "b2": (1,)}
    return {name: torch.zeros(shape, requires_grad=True) for name, shape in shapes.items()}


def test_reward_pass_is_three_launches(launches):
    cls, patches, head = torch.zeros(2, 6), torch.zeros(2, 9, 6), make_head()
    with launches, torch.no_grad():
        indices = torch.zeros(2, 4, dtype=torch.int64)
        launches.names.clear()
        sample_patches(patches, 4, seed=torch.tensor(1), backend="triton")
        score_features(cls, patches, indices, head, normalize=True, backend="triton")
    assert [name for name in device_work(launches) if name != "lift_fresh"] == [
        "_sample_patches_kernel",
        "_head_rows_kernel",
        "_mix_kernel",
    ]


def test_head_training_step_is_six_launches(launches):
    """Gather on both sides, scores, hinge, gradients; the sixth is Adam(fused=True) over the four tensors."""
    cls, patches, head = torch.zeros(2, 6), torch.zeros(2, 9, 6), make_head()
    upstream = torch.ones(())
    with launches:
        reference = sample_patches(patches, 4, seed=1, backend="triton").patches
        generated = sample_patches(patches, 4, seed=2, backend="triton").patches
        loss = hinge_head_loss(cls, reference, cls, generated, head, backend="triton").loss
        torch.autograd.grad(loss, list(head.values()), upstream)
    assert device_work(launches) == [
        "_sample_patches_kernel",
        "_sample_patches_kernel",
        "_head_rows_kernel",
        "_hinge_kernel",
        "_head_bwd_kernel",
    ]


def device_work(launches: Launches) -> list[str]:
    """Without the checks of values that the public functions make on CPU tensors only (`can_look_at`)."""
    host_checks = ("eq", "ne", "ge", "lt", "gt", "bitwise_and", "any", "all", "_local_scalar_dense", "is_nonzero")
    return [name for name in launches.names if name not in host_checks]
