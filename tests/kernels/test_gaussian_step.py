"""The Gaussian step against the public implementations and itself."""

from pathlib import Path

import numpy as np
import pytest
import torch

from advgrpo_kernels import gaussian_log_prob, gaussian_step, philox_normal, transition_coefficients

GOLDEN = Path(__file__).parents[1] / "golden"
RECORDINGS = {
    "flow_sde": ("flow_sde_flow_grpo.npz", "gaussian"),
    "flow_cps": ("flow_cps_adv_grpo.npz", "squared_error"),
    "dance_sde": ("dance_sde_flow_factory.npz", "gaussian"),
}
STOCHASTIC = torch.tensor([0.97, -0.11, 0.3])
ODE = torch.tensor([1.0, -0.1, 0.0])
LIKELIHOODS = ["gaussian", "squared_error"]


def transition(batch=3, shape=(4, 6, 6), dtype=torch.float32):
    return torch.randn(batch, *shape), torch.randn(batch, *shape).to(dtype), torch.randn(batch, *shape).to(dtype)


@pytest.mark.parametrize("dynamics", RECORDINGS)
@pytest.mark.parametrize("t", range(10))
def test_step_of_the_public_implementations(dynamics, t):
    """With the recording's own noise, (next - μ)/s, the step returns its next latents, mean and log-prob.

    The last flow_cps step is an ODE step (σ' = 0): no log-prob here, where the recording holds -mean(d²) of its own
    rounding errors (7e-9).
    """
    name, likelihood = RECORDINGS[dynamics]
    golden = np.load(GOLDEN / name)
    latents, velocity, next_latents, mean = (
        torch.from_numpy(golden[f"{t}_{key}"]) for key in ("latents", "velocity", "next_latents", "mean")
    )
    table = transition_coefficients(golden["sigmas"], dynamics=dynamics, noise_level=float(golden["noise_level"]))
    s = table[t, 2]
    noise = (next_latents - mean) / s if s > 0 else None
    got = gaussian_step(latents, velocity, table[t], noise=noise, likelihood=likelihood, return_mean=True)
    torch.testing.assert_close(got.mean, mean, rtol=1e-5, atol=2e-6)
    if s == 0:
        assert got.log_prob is None
        torch.testing.assert_close(got.next_latents, mean, rtol=1e-5, atol=2e-6)
    else:
        torch.testing.assert_close(got.next_latents, next_latents, rtol=1e-5, atol=4e-6)
        torch.testing.assert_close(got.log_prob, torch.from_numpy(golden[f"{t}_log_prob"]), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("per_row", [False, True])
def test_log_prob_has_the_bits_of_gaussian_log_prob(likelihood, per_row):
    latents, velocity, uncond = transition(dtype=torch.bfloat16)
    coefficients = STOCHASTIC * torch.tensor([[1.0], [0.9], [0.7]]) if per_row else STOCHASTIC
    guidance = {"uncond_velocity": uncond, "guidance_scale": 4.5, "likelihood": likelihood}
    taken = gaussian_step(latents, velocity, coefficients, seed=3, **guidance)
    again = gaussian_log_prob(latents, velocity, taken.next_latents, coefficients, **guidance)
    assert torch.equal(taken.log_prob, again)


@pytest.mark.parametrize("shape", [(4, 6, 6), (5,), (3, 37, 41)])
def test_a_row_does_not_depend_on_the_batch(shape):
    latents, velocity, uncond = transition(4, shape)
    sample_ids = torch.tensor([70, 3, 12, 5])
    settings = {"guidance_scale": 2.0, "seed": 8, "step": 1}
    whole = gaussian_step(latents, velocity, STOCHASTIC, uncond_velocity=uncond, sample_ids=sample_ids, **settings)
    for part in (slice(0, 1), slice(1, 4)):
        split = gaussian_step(
            latents[part],
            velocity[part],
            STOCHASTIC.expand(4, 3)[part],
            uncond_velocity=uncond[part],
            sample_ids=sample_ids[part],
            **settings,
        )
        assert torch.equal(whole.next_latents[part], split.next_latents)
        assert torch.equal(whole.log_prob[part], split.log_prob)


def test_seeded_noise_is_philox_normal():
    latents, velocity, _ = transition()
    ids = torch.tensor([4, 9, 2])
    seeded = gaussian_step(latents, velocity, STOCHASTIC, seed=5, sample_ids=ids, step=7)
    noise = philox_normal(latents.shape, seed=5, sample_ids=ids, step=7)
    assert torch.equal(seeded.next_latents, gaussian_step(latents, velocity, STOCHASTIC, noise=noise).next_latents)
    default = gaussian_step(latents, velocity, STOCHASTIC, seed=5)
    first = gaussian_step(latents, velocity, STOCHASTIC, seed=5, sample_ids=torch.arange(3), step=0)
    assert torch.equal(default.next_latents, first.next_latents)


def test_fields_that_were_not_asked_for_are_none():
    latents, velocity, _ = transition()
    assert gaussian_step(latents, velocity, STOCHASTIC, seed=1, likelihood=None).log_prob is None
    assert gaussian_step(latents, velocity, STOCHASTIC, seed=1).mean is None
    deterministic = gaussian_step(latents, velocity, ODE)
    assert deterministic.log_prob is None
    assert torch.equal(deterministic.next_latents, gaussian_step(latents, velocity, ODE, seed=1).next_latents)


def test_bad_arguments_raise():
    latents, velocity, uncond = transition()
    with pytest.raises(ValueError, match="velocity must be floating point of latents' shape"):
        gaussian_step(latents, velocity[:2], STOCHASTIC, seed=0)
    with pytest.raises(ValueError, match="latents must be float32"):
        gaussian_step(latents.bfloat16(), velocity, STOCHASTIC, seed=0)
    with pytest.raises(ValueError, match=r"coefficients must be float32 \[3\] or \[3, 3\]"):
        gaussian_step(latents, velocity, STOCHASTIC.expand(2, 3), seed=0)
    with pytest.raises(ValueError, match="needs uncond_velocity"):
        gaussian_step(latents, velocity, STOCHASTIC, seed=0, guidance_scale=4.5)
    with pytest.raises(ValueError, match="not both"):
        gaussian_step(latents, velocity, STOCHASTIC, seed=0, noise=uncond)
    with pytest.raises(ValueError, match="give noise or seed"):
        gaussian_step(latents, velocity, STOCHASTIC)
    with pytest.raises(ValueError, match="likelihood must be one of"):
        gaussian_step(latents, velocity, STOCHASTIC, seed=0, likelihood="laplace")
