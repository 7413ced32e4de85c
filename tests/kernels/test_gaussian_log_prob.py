"""The transition's log-probability and its gradient by the velocities."""

from pathlib import Path

import numpy as np
import pytest
import torch

from advgrpo_kernels import gaussian_log_prob, gaussian_log_prob_ref, transition_coefficients

GOLDEN = Path(__file__).parents[1] / "golden"
RECORDINGS = {
    "flow_sde": ("flow_sde_flow_grpo.npz", "gaussian"),
    "flow_cps": ("flow_cps_adv_grpo.npz", "squared_error"),
    "dance_sde": ("dance_sde_flow_factory.npz", "gaussian"),
}


@pytest.mark.parametrize("dynamics", RECORDINGS)
@pytest.mark.parametrize("t", range(10))
def test_value_and_gradient_of_the_public_implementations(dynamics, t):
    """The recordings hold the gradient of `log_prob.sum()` by the velocity.

    The last flow_cps step has s = 0; squared_error is defined there, and both sides are rounding errors of 1e-8.
    """
    name, likelihood = RECORDINGS[dynamics]
    golden = np.load(GOLDEN / name)
    latents, velocity, next_latents = (
        torch.from_numpy(golden[f"{t}_{key}"]) for key in ("latents", "velocity", "next_latents")
    )
    table = transition_coefficients(golden["sigmas"], dynamics=dynamics, noise_level=float(golden["noise_level"]))
    velocity.requires_grad_()
    log_prob = gaussian_log_prob(latents, velocity, next_latents, table[t], likelihood=likelihood)
    (grad,) = torch.autograd.grad(log_prob.sum(), velocity)
    torch.testing.assert_close(log_prob.detach(), torch.from_numpy(golden[f"{t}_log_prob"]), rtol=1e-5, atol=2e-6)
    expected = torch.from_numpy(golden[f"{t}_grad_velocity"])
    # The recordings compute μ in float32 from float32 schedules; d = x_next - μ cancels, which leaves ~1e-6/s of noise.
    torch.testing.assert_close(grad, expected, rtol=1e-4, atol=2e-4 * expected.abs().max().item() + 1e-9)


@pytest.mark.parametrize("likelihood", ["gaussian", "squared_error"])
def test_gradient_by_both_velocities(likelihood):
    latents, velocity, uncond, next_latents = torch.randn(4, 2, 3, 5, 5).double().unbind()
    coefficients = torch.tensor([0.9, -0.2, 0.4], dtype=torch.float64)

    def function(c, u):
        return gaussian_log_prob_ref(
            latents,
            c,
            next_latents,
            coefficients,
            uncond_velocity=u,
            guidance_scale=3.0,
            likelihood=likelihood,
            compute_dtype=torch.float64,
        )

    assert torch.autograd.gradcheck(function, (velocity.requires_grad_(), uncond.requires_grad_()))


def test_reduction_error_is_small_at_full_size():
    latents, velocity, noise = torch.randn(3, 1, 16, 64, 64).unbind()
    coefficients = torch.tensor([0.97, -0.1, 0.5])
    next_latents = coefficients[0] * latents + coefficients[1] * velocity + coefficients[2] * noise
    single = gaussian_log_prob(latents, velocity, next_latents, coefficients)
    double = gaussian_log_prob_ref(latents, velocity, next_latents, coefficients, compute_dtype=torch.float64)
    torch.testing.assert_close(single.double(), double, rtol=0, atol=2e-7)


def test_a_step_without_density_raises():
    latents = torch.randn(2, 8)
    with pytest.raises(ValueError, match="ODE step"):
        gaussian_log_prob(latents, latents, latents, torch.tensor([1.0, -0.1, 0.0]))
    with pytest.raises(ValueError, match="next_latents must be floating point of latents' shape"):
        gaussian_log_prob(latents, latents, latents[:1], torch.tensor([1.0, -0.1, 0.1]))
