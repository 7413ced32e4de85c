"""The transition's log-probability and its gradient by the velocities.

Planted bugs that turned this file red: lanes added in the order of `tl.sum` instead of the tree (stayed green until
the comparison of bits); ½·log 2π left out; half the slope; the unconditional gradient not scaled; the upstream
gradient of row 0 for all rows; the same tile read again; a grid of one tile; masked elements counted.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from advgrpo_kernels import gaussian_log_prob, gaussian_log_prob_ref, gaussian_step, transition_coefficients
from advgrpo_kernels.ops.gaussian_log_prob import _gaussian_log_prob_op
from advgrpo_kernels.testing import assert_within_budget

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


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16], ids=str)
def test_stored_latents_count_with_their_own_values(storage, backend, device):
    """Value and gradient are those of the same numbers in float32: nothing is rounded a second time."""
    latents, next_latents = (torch.randn(2, 3, 50, device=device).to(storage) for _ in range(2))
    velocity = torch.randn(2, 3, 50, device=device, requires_grad=True)
    results = []
    for pair in ((latents, next_latents), (latents.float(), next_latents.float())):
        log_prob = gaussian_log_prob(pair[0], velocity, pair[1], COEFFICIENTS.to(device), backend=backend)
        results.append((log_prob, *torch.autograd.grad(log_prob.sum(), velocity)))
    assert all(torch.equal(*values) for values in zip(*results))


gpu_only = pytest.mark.skipif(not torch.cuda.is_available(), reason="the Triton interpreter truncates bf16 stores")
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=[pytest.mark.gpu, gpu_only])]
COEFFICIENTS = torch.tensor([0.97, -0.11, 0.3])


@pytest.mark.every_second("shape", "dtype", "likelihood")
@pytest.mark.parametrize("shape", [(1, 16), (3, 4, 5, 5), (2, 9001)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("likelihood", ["gaussian", "squared_error"])
def test_triton_forward_and_backward_within_error_budget(shape, dtype, likelihood, device):
    latents, next_latents = torch.randn(2, *shape, device=device)
    coefficients = (COEFFICIENTS * torch.linspace(0.8, 1.2, shape[0])[:, None]).to(device)

    def call(function, **settings):
        def of_velocities(velocity, uncond, **more):
            guidance = {"uncond_velocity": uncond, "guidance_scale": 3.3, "likelihood": likelihood}
            return function(latents, velocity, next_latents, coefficients, **guidance, **settings, **more)

        return of_velocities

    velocities = list(torch.randn(2, *shape, device=device).to(dtype))
    upstream = torch.randn(shape[0], device=device)
    assert_within_budget(call(gaussian_log_prob, backend="triton"), call(gaussian_log_prob_ref), velocities, upstream)


def test_triton_without_guidance(device):
    latents, velocity, next_latents = torch.randn(3, 2, 3, 50, device=device)
    velocity = velocity.half().requires_grad_()
    args = (latents, velocity, next_latents, COEFFICIENTS.to(device))
    results = []
    for backend in ("triton", "torch"):
        log_prob = gaussian_log_prob(*args, backend=backend)
        results.append((log_prob, *torch.autograd.grad(log_prob.sum(), velocity)))
    for got, expected in zip(*results):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("likelihood", ["gaussian", "squared_error"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_triton_log_prob_has_the_bits_of_the_step(likelihood, dtype, device):
    latents, velocity, uncond = torch.randn(3, 2, 3, 41, 43, device=device)
    velocity, uncond, coefficients = velocity.to(dtype), uncond.to(dtype), COEFFICIENTS.to(device)
    settings = {"uncond_velocity": uncond, "guidance_scale": 4.5, "likelihood": likelihood, "backend": "triton"}
    taken = gaussian_step(latents, velocity, coefficients, seed=3, **settings)
    again = gaussian_log_prob(latents, velocity, taken.next_latents, coefficients.expand(2, 3), **settings)
    assert torch.equal(taken.log_prob, again)
    settings["uncond_velocity"] = uncond[1:]
    alone = gaussian_log_prob(latents[1:], velocity[1:], taken.next_latents[1:], coefficients, **settings)
    assert torch.equal(taken.log_prob[1:], alone)


@pytest.mark.parametrize("count", [7, 4096, 9001])
def test_triton_adds_in_the_tree_of_the_reference(count, device):
    """With μ = 0 and a tile or less the squares round alike, so any other order of adding would change bits."""
    zeros, next_latents = torch.zeros(3, count, device=device), torch.randn(3, count, device=device)
    args = (zeros, zeros, next_latents, COEFFICIENTS.to(device))
    got, expected = (gaussian_log_prob(*args, likelihood="squared_error", backend=name) for name in ("triton", "torch"))
    if count <= 4096:
        assert torch.equal(got, expected)
    torch.testing.assert_close(got, expected, rtol=3e-7, atol=0)


def test_triton_row_without_density_is_nan(device):
    latents = torch.randn(2, 8, device=device)
    coefficients = torch.tensor([[1.0, -0.1, 0.0], [1.0, -0.1, 0.5]], device=device)
    log_prob = _gaussian_log_prob_op(latents, latents, None, latents - 0.1 * latents, coefficients, 1.0, 1)
    assert not torch.isfinite(log_prob[0])
    assert torch.isfinite(log_prob[1])


def test_opcheck(device):
    latents, velocity, uncond, next_latents = torch.randn(4, 2, 3, 5, device=device)
    velocities = (velocity.requires_grad_(), uncond.requires_grad_())
    torch.library.opcheck(_gaussian_log_prob_op, (latents, *velocities, next_latents, COEFFICIENTS.to(device), 2.0, 1))


def test_compiles_without_graph_break(device):
    latents, velocity, next_latents = torch.randn(3, 2, 3, 5, device=device)
    coefficients = COEFFICIENTS.to(device)

    def function(velocity):
        return gaussian_log_prob(latents, velocity, next_latents, coefficients, backend="triton").sin().sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    grads = []
    for run in (function, compiled):
        leaf = velocity.clone().requires_grad_()
        run(leaf).backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)
