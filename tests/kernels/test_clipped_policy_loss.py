"""The clipped policy loss: closed-form gradient against autograd, recordings of the public implementation, edges."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from advgrpo_kernels import clipped_policy_loss, clipped_policy_loss_ref, gaussian_step

GOLDEN = Path(__file__).parents[1] / "golden"
COEFFICIENTS = torch.tensor([0.97, -0.11, 0.3])


def problem(batch=6, shape=(3, 5, 7), dtype=torch.float32, spread=2e-4):
    """A rollout's transition, a policy moved a little from it, and rewards on both sides of the clip."""
    latents, velocity, uncond, reference = torch.randn(4, batch, *shape).unbind()
    velocity, uncond = velocity.to(dtype), uncond.to(dtype)
    taken = gaussian_step(latents, velocity, COEFFICIENTS, uncond_velocity=uncond, guidance_scale=2.5, seed=1)
    old = taken.log_prob + spread * torch.linspace(-1, 1, batch)
    advantages = torch.tensor([1.5, -0.7, 0.3, -7.0, 6.0, 0.0])[:batch]
    inputs = (latents, velocity, taken.next_latents, COEFFICIENTS, old, advantages)
    return inputs, uncond, reference


def gradients(function, inputs, uncond, **settings):
    velocity, uncond = inputs[1].detach().requires_grad_(), uncond.detach().requires_grad_()
    result = function(inputs[0], velocity, *inputs[2:], uncond_velocity=uncond, **settings)
    return result, torch.autograd.grad(3.0 * result.loss, (velocity, uncond))


@pytest.mark.parametrize("likelihood", ["gaussian", "squared_error"])
@pytest.mark.parametrize("kl_weight", [0.0, 0.04])
@pytest.mark.parametrize("clip_range", [1e-4, 1e-1])
def test_closed_form_gradient_is_autograd_s(likelihood, kl_weight, clip_range):
    inputs, uncond, reference = problem()
    if likelihood == "squared_error":
        inputs = (*inputs[:4], inputs[4] * 0 - 0.09, inputs[5])
    settings = {"clip_range": clip_range, "guidance_scale": 2.5, "likelihood": likelihood}
    settings |= {"reference_mean": reference, "kl_weight": kl_weight}
    got, got_grads = gradients(clipped_policy_loss, inputs, uncond, **settings)
    want, want_grads = gradients(clipped_policy_loss_ref, inputs, uncond, **settings)
    for name, value, expected in zip(got._fields[:5], got, want):
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}")
    for value, expected in zip(got_grads, want_grads):
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6 * expected.abs().max().item())


def test_loss_of_the_public_implementation():
    """Rows of one element, a = b = 1, s chosen so that log p = offset - d²/(2s²) can reach the recorded values."""
    golden = {key: torch.from_numpy(np.asarray(value)) for key, value in np.load(GOLDEN / "policy_loss.npz").items()}
    s = math.exp(-0.5 * math.log(2 * math.pi) - 0.05)  # log p = 0.05 - d²/(2s²)
    next_latents = (s * torch.sqrt(2 * (0.05 - golden["log_prob"].double()))).float()[:, None]
    velocity = torch.zeros_like(next_latents, requires_grad=True)
    result = clipped_policy_loss(
        torch.zeros_like(next_latents),
        velocity,
        next_latents,
        torch.tensor([1.0, 1.0, s]),
        golden["old_log_prob"],
        golden["advantages"],
        clip_range=float(golden["clip_range"]),
        adv_clip=float(golden["adv_clip_max"]),
    )
    torch.testing.assert_close(result.log_prob, golden["log_prob"], rtol=0, atol=1e-7)
    torch.testing.assert_close(result.ratio, golden["ratio"], rtol=0, atol=2e-7)
    torch.testing.assert_close(result.loss.detach(), golden["loss"], rtol=0, atol=1e-6)
    (grad,) = torch.autograd.grad(result.loss, velocity)
    grad_log_prob = grad[:, 0] * s**2 / next_latents[:, 0]  # d log p/dv = d/s²
    torch.testing.assert_close(grad_log_prob, golden["grad_log_prob"], rtol=1e-5, atol=1e-7)


def test_before_the_first_update_the_ratio_is_exactly_one():
    inputs, uncond, _ = problem(spread=0.0, dtype=torch.bfloat16)
    result = clipped_policy_loss(*inputs, uncond_velocity=uncond, guidance_scale=2.5, clip_range=1e-5)
    assert torch.equal(result.ratio, torch.ones(6))
    assert result.clip_fraction == 0


def test_zero_advantage_gives_exactly_zero_gradient():
    inputs, uncond, _ = problem()
    inputs = (*inputs[:4], inputs[4] - 200.0, inputs[5] * 0)  # the ratio overflows: 0 · inf must not appear
    _, grads = gradients(clipped_policy_loss, inputs, uncond, clip_range=1e-4, guidance_scale=2.5)
    assert all(torch.count_nonzero(grad) == 0 for grad in grads)


def test_velocity_dtype_is_kept_and_only_needed_gradients_are_made():
    inputs, uncond, _ = problem(dtype=torch.float16)
    result, grads = gradients(clipped_policy_loss, inputs, uncond, clip_range=1e-1, guidance_scale=2.5)
    assert [grad.dtype for grad in grads] == [torch.float16] * 2
    assert not any(value.requires_grad for value in result[1:5])
    assert not clipped_policy_loss(*inputs, clip_range=1e-1).loss.requires_grad


def test_a_row_does_not_depend_on_the_batch():
    inputs, uncond, _ = problem()
    settings = {"guidance_scale": 2.5, "clip_range": 1e-4}
    whole, whole_grads = gradients(clipped_policy_loss, inputs, uncond, **settings)
    part = (inputs[0][2:3], inputs[1][2:3], inputs[2][2:3], inputs[3], inputs[4][2:3], inputs[5][2:3])
    one, one_grads = gradients(clipped_policy_loss, part, uncond[2:3], **settings)
    assert torch.equal(whole.log_prob[2:3], one.log_prob)
    torch.testing.assert_close(6 * whole_grads[0][2:3], one_grads[0])


def test_bad_arguments_raise():
    inputs, _, _ = problem()
    with pytest.raises(ValueError, match=r"advantages must be floating point \[6\]"):
        clipped_policy_loss(*inputs[:5], inputs[5][:3], clip_range=1e-4)
    with pytest.raises(ValueError, match="clip_range and adv_clip must be positive"):
        clipped_policy_loss(*inputs, clip_range=0.0)
    with pytest.raises(ValueError, match="needs reference_mean"):
        clipped_policy_loss(*inputs, clip_range=1e-4, kl_weight=0.1)
