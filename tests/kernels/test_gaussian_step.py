"""The Gaussian step against the public implementations, float64 and itself.

Planted bugs that turned this file red: words interleaved in another order; the high half of the sample id shifted by
one bit; sine replaced by cosine; noise repeated in every tile of a program (stayed green until the three-tile test);
log-prob not masked; forgotten noise taken as zero; default sample ids all 0; one coefficient triple for all rows;
(1-g) left out of the guidance; a grid of one tile; the tree adding a lane twice; the log-prob taken before rounding to
the storage dtype, in the kernel and in PyTorch; float32 results whatever storage was asked for.
"""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from advgrpo_kernels import (
    _runtime,
    clipped_policy_loss,
    gaussian_log_prob,
    gaussian_step,
    philox_normal,
    transition_coefficients,
)
from advgrpo_kernels.ops.gaussian_step import _gaussian_step_op, gaussian_step_ref
from advgrpo_kernels.testing import assert_error_within_budget

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


HALVES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("storage", HALVES, ids=str)
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_a_trajectory_in_half_precision_has_a_first_ratio_of_exactly_one(storage, likelihood, backend, device):
    """The log-prob is of what is stored: the update, reading the stored tensors, finds the same bits in both ops."""
    shape = (2, 3, 41, 43)  # two tiles, the second ragged
    latents, velocity, uncond = on_device(device, *transition(2, shape[1:], storage))
    latents, coefficients = latents.to(storage), STOCHASTIC.to(device)
    guidance = {"uncond_velocity": uncond, "guidance_scale": 4.5, "likelihood": likelihood, "backend": backend}
    taken = gaussian_step(latents, velocity, coefficients, seed=3, storage_dtype=storage, return_mean=True, **guidance)
    assert (taken.next_latents.dtype, taken.log_prob.dtype, taken.mean.dtype) == (storage, torch.float32, torch.float32)
    transition_taken = (latents, velocity, taken.next_latents, coefficients)
    assert torch.equal(gaussian_log_prob(*transition_taken, **guidance), taken.log_prob)
    advantages = torch.ones(2, device=device)
    loss = clipped_policy_loss(*transition_taken, taken.log_prob, advantages, clip_range=1e-5, **guidance)
    assert torch.equal(loss.ratio, torch.ones(2, device=device))
    # And it matters: the float32 step's log-prob is another one, beyond a clip range of 1e-5.
    exact = gaussian_step(latents, velocity, coefficients, seed=3, storage_dtype=torch.float32, **guidance)
    assert (exact.log_prob - taken.log_prob).abs().max() > 1e-6


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("deterministic", [True, False])
def test_stored_latents_are_the_float32_ones_rounded_once(deterministic, backend, device):
    latents, velocity, _ = on_device(device, *transition())
    coefficients = (ODE if deterministic else STOCHASTIC).to(device)
    settings = {"seed": None if deterministic else 2, "backend": backend, "return_mean": True}
    full = gaussian_step(latents, velocity, coefficients, **settings)
    stored = gaussian_step(latents, velocity, coefficients, storage_dtype=torch.float16, **settings)
    assert torch.equal(stored.next_latents, full.next_latents.half())
    assert torch.equal(stored.mean, full.mean)


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
    with pytest.raises(ValueError, match="latents must be float32, or bfloat16"):
        gaussian_step(latents.to(torch.float8_e5m2), velocity, STOCHASTIC, seed=0)
    with pytest.raises(ValueError, match=r"pass storage_dtype=torch.bfloat16 .* or storage_dtype=torch.float32"):
        gaussian_step(latents.bfloat16(), velocity, STOCHASTIC, seed=0)
    with pytest.raises(ValueError, match="storage_dtype must be one of"):
        gaussian_step(latents, velocity, STOCHASTIC, seed=0, storage_dtype=torch.float64)
    with pytest.raises(ValueError, match=r"latents must be a non-empty \[B, ...\]"):
        gaussian_step(latents[:0], velocity[:0], STOCHASTIC, seed=0)
    with pytest.raises(ValueError, match=r"latents must be a non-empty \[B, ...\]"):
        gaussian_step(latents[:, 0, 0, 0], velocity[:, 0, 0, 0], STOCHASTIC, seed=0)
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


gpu_only = pytest.mark.skipif(not torch.cuda.is_available(), reason="the Triton interpreter truncates bf16 stores")
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=[pytest.mark.gpu, gpu_only])]
SHAPES = [(1, 16), (3, 4, 5, 5), (2, 3, 7), (2, 9001)]  # one tile, odd, tiny, several tiles with a ragged last one


def on_device(device, *tensors):
    return [tensor.to(device) for tensor in tensors]


@pytest.mark.every_second("shape", "dtype", "likelihood")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_triton_within_error_budget(shape, dtype, likelihood, device):
    """Next latents and mean against float64; the log-prob against float64 on the float32 latents that were returned."""
    velocity, uncond = torch.randn(2, *shape, device=device).to(dtype)
    latents, noise = torch.randn(2, *shape, device=device)
    coefficients = (STOCHASTIC * torch.linspace(0.8, 1.2, shape[0])[:, None]).to(device)
    guidance = {"uncond_velocity": uncond, "guidance_scale": 3.3, "likelihood": likelihood}
    args = (latents, velocity, coefficients)
    got = gaussian_step(*args, noise=noise, return_mean=True, backend="triton", **guidance)
    eager = gaussian_step_ref(*args, noise=noise, **guidance)
    true = gaussian_step_ref(*args, noise=noise, compute_dtype=torch.float64, **guidance)
    assert_error_within_budget(got.next_latents, eager.next_latents, true.next_latents, name="next_latents")
    assert_error_within_budget(got.mean, eager.mean, true.mean, name="mean")
    assert_error_within_budget(got.log_prob, eager.log_prob, true.log_prob, name="log_prob")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_triton_without_guidance_and_with_mixed_dtypes(dtype, device):
    latents, velocity, uncond = on_device(device, *transition())
    coefficients = STOCHASTIC.to(device)
    noise = torch.randn_like(latents).to(dtype)
    plain = gaussian_step(latents, velocity.to(dtype), coefficients, noise=noise, backend="triton")
    expected = gaussian_step(latents, velocity.to(dtype), coefficients, noise=noise, backend="torch")
    torch.testing.assert_close(plain.next_latents, expected.next_latents, rtol=1e-6, atol=1e-6)
    guidance = {"uncond_velocity": uncond, "guidance_scale": 2.0, "noise": noise}
    mixed = gaussian_step(latents, velocity.to(dtype), coefficients, backend="triton", **guidance)
    expected = gaussian_step(latents, velocity.to(dtype), coefficients, backend="torch", **guidance)
    torch.testing.assert_close(mixed.next_latents, expected.next_latents, rtol=1e-6, atol=1e-6)


def test_triton_draws_the_documented_noise(device):
    """a = b = 0, s = 1 returns the noise itself; seed and step as integers or as tensors."""
    zeros = torch.zeros(2, 4101, device=device)
    ids = torch.tensor([3, -(2**40)], device=device)
    unit = torch.tensor([0.0, 0.0, 1.0], device=device)
    expected = philox_normal(zeros.shape, seed=-9, sample_ids=ids, step=5)
    settings = {"sample_ids": ids, "likelihood": None, "backend": "triton"}
    as_integers = gaussian_step(zeros, zeros, unit, seed=2**64 - 9, step=5, **settings).next_latents
    seed, step = torch.tensor(-9, device=device), torch.tensor([5], device=device)
    as_tensors = gaussian_step(zeros, zeros, unit, seed=seed, step=step, **settings).next_latents
    torch.testing.assert_close(as_integers, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(as_integers, as_tensors)
    default = gaussian_step(zeros, zeros, unit, seed=-9, likelihood=None, backend="triton").next_latents
    expected = philox_normal(zeros.shape, seed=-9, sample_ids=torch.arange(2, device=device))
    torch.testing.assert_close(default, expected, rtol=1e-5, atol=1e-5)


def test_triton_draws_the_documented_noise_in_every_tile_of_a_program(device):
    """With a log-prob one program walks through all tiles of an image, here three."""
    zeros, unit = torch.zeros(1, 9001, device=device), torch.tensor([0.0, 0.0, 1.0], device=device)
    noise = gaussian_step(zeros, zeros, unit, seed=4, likelihood="squared_error", backend="triton").next_latents
    expected = philox_normal(zeros.shape, seed=4, sample_ids=torch.arange(1, device=device))
    torch.testing.assert_close(noise, expected, rtol=1e-5, atol=1e-5)


def test_triton_noise_is_normal(device):
    zeros, unit = torch.zeros(1, 2**17, device=device), torch.tensor([0.0, 0.0, 1.0], device=device)
    noise = gaussian_step(zeros, zeros, unit, seed=1, likelihood=None, backend="triton").next_latents.double().cpu()[0]
    n = noise.numel()
    for power, moment, variance in [(1, 0.0, 1.0), (2, 1.0, 2.0), (3, 0.0, 15.0), (4, 3.0, 96.0)]:
        assert abs(noise.pow(power).mean().item() - moment) < 4 * math.sqrt(variance / n), f"moment {power}"
    cdf = 0.5 * (1 + torch.erf(noise.sort().values / math.sqrt(2)))
    gap = (torch.arange(n) + 0.5) / n - cdf
    assert (gap.abs().max() + 0.5 / n).item() * math.sqrt(n) < 1.95  # Kolmogorov-Smirnov at 1e-3
    for lag in (1, 2, 3, 4):
        assert abs((noise * noise.roll(lag)).mean().item()) * math.sqrt(n) < 4, f"lag {lag}"


@pytest.mark.parametrize("shape", [(4, 6, 6), (3, 37, 41)])
def test_triton_row_does_not_depend_on_the_batch(shape, device):
    latents, velocity, uncond = on_device(device, *transition(3, shape))
    sample_ids, coefficients = torch.tensor([70, 3, 12], device=device), STOCHASTIC.to(device)
    settings = {"guidance_scale": 2.0, "seed": 8, "step": 1, "backend": "triton"}
    whole = gaussian_step(latents, velocity, coefficients, uncond_velocity=uncond, sample_ids=sample_ids, **settings)
    for part in (slice(0, 1), slice(1, 3)):
        tensors = (latents[part], velocity[part], coefficients.expand(3, 3)[part])
        rows = {"uncond_velocity": uncond[part], "sample_ids": sample_ids[part]}
        split = gaussian_step(*tensors, **rows, **settings)
        assert torch.equal(whole.next_latents[part], split.next_latents)
        assert torch.equal(whole.log_prob[part], split.log_prob)


def test_triton_deterministic_step_and_forgotten_noise(device):
    """An ODE step has no random numbers; on a GPU a stochastic step without noise comes out NaN, never noiseless."""
    latents, velocity, _ = on_device(device, *transition())
    got = gaussian_step(latents, velocity, ODE.to(device), backend="triton")
    torch.testing.assert_close(got.next_latents, latents - 0.1 * velocity, rtol=1e-6, atol=1e-6)
    rest = (None, None, None, None, None, 0, 0, False, 1.0, 0, False, torch.float32)
    forgotten, _, _ = _gaussian_step_op(latents, velocity, STOCHASTIC.to(device), *rest)
    assert torch.isnan(forgotten).all()


def test_triton_views(device):
    latents, velocity, uncond = on_device(device, *transition())
    views = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in (latents, velocity, uncond)]
    table = torch.stack([STOCHASTIC, ODE], dim=1).to(device)[:, 0]  # a strided triple
    settings = {"guidance_scale": 2.0, "seed": 1, "backend": "triton"}
    got = gaussian_step(views[0], views[1], table, uncond_velocity=views[2], **settings)
    expected = gaussian_step(latents, velocity, STOCHASTIC.to(device), uncond_velocity=uncond, **settings)
    assert torch.equal(got.next_latents, expected.next_latents)


def test_opcheck(device):
    latents, velocity, uncond = on_device(device, *transition(2, (3, 5)))
    args = (latents, velocity, STOCHASTIC.to(device), uncond, None, None, torch.tensor(3, device=device), None)
    for storage in (torch.float32, torch.float16):
        torch.library.opcheck(_gaussian_step_op, (*args, 0, 7, True, 2.0, 1, True, storage))


def test_compiles_without_graph_break(device):
    latents, velocity, uncond = on_device(device, *transition(2, (3, 5)))

    def function(latents, velocity, uncond, coefficients, seed):
        guidance = {"uncond_velocity": uncond, "guidance_scale": 2.0}
        taken = gaussian_step(latents, velocity, coefficients, seed=seed, backend="triton", **guidance)
        return taken.next_latents.sin(), taken.log_prob

    args = (latents, velocity, uncond, STOCHASTIC.to(device), torch.tensor(3, device=device))
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(*args), function(*args)):
        assert torch.equal(got, expected)


def test_explicit_backend_never_falls_back(monkeypatch):
    monkeypatch.setattr(_runtime, "INTERPRET", False)
    latents, velocity, _ = transition()
    with pytest.raises(RuntimeError, match="needs triton and CUDA tensors"):
        gaussian_step(latents, velocity, ODE, backend="triton")
    with pytest.raises(ValueError, match="backend must be one of"):
        gaussian_step(latents, velocity, ODE, backend="cuda")


def test_auto_takes_the_reference_on_the_cpu(monkeypatch):
    monkeypatch.setattr("advgrpo_kernels.ops.gaussian_step._gaussian_step_op", None)
    latents, velocity, _ = transition()
    gaussian_step(latents, velocity, ODE)


@pytest.mark.gpu
def test_captured_graph_replays_with_new_values():
    latents, velocity = torch.randn(2, 4, 16, 64, 64, device="cuda")
    coefficients, seed, step = STOCHASTIC.cuda(), torch.tensor(1, device="cuda"), torch.tensor(0, device="cuda")
    ids = torch.arange(4, device="cuda")

    def take():
        return gaussian_step(latents, velocity.bfloat16(), coefficients, seed=seed, sample_ids=ids, step=step)

    take()  # compile outside the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = take()
    for value in (1, 2):
        seed.fill_(value), step.fill_(value), ids.add_(value), coefficients.mul_(0.9)
        graph.replay()
        expected = take()
        assert torch.equal(captured.next_latents, expected.next_latents)
        assert torch.equal(captured.log_prob, expected.log_prob)
