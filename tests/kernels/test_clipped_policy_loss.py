"""The clipped policy loss: closed-form gradient against autograd, recordings of the public implementation, edges.

Planted bugs that turned this file red: gradient through the clipped branch, in the kernel and in PyTorch; advantages
not clipped; the smaller of the two branches as loss (stayed green until the loss was compared outside the clip); KL
pulling the other way; KL missing from the loss; gradient not divided by B; no gradient for the unconditional
velocity; kl_std in the KL but not in its gradient, and the other way round; a row's kl_std taken for all rows; the
slope of the KL halved; the pair's bounds exchanged, in the kernel and in PyTorch; one bound of it for clip_fraction.
"""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from advgrpo_kernels import (
    clipped_policy_loss,
    clipped_policy_loss_ref,
    gaussian_log_prob,
    gaussian_step,
    step_coefficients,
    step_std,
)
from advgrpo_kernels.ops.clipped_policy_loss import _clipped_policy_loss_op
from advgrpo_kernels.testing import assert_error_within_budget

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


def to_device(inputs, device):
    return tuple(tensor.to(device) for tensor in inputs)


def gradients(function, inputs, uncond, **settings):
    velocity, uncond = inputs[1].detach().requires_grad_(), uncond.detach().requires_grad_()
    result = function(inputs[0], velocity, *inputs[2:], uncond_velocity=uncond, **settings)
    return result, torch.autograd.grad(2.0 * result.loss, (velocity, uncond))


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


KL_STDS = {"number": 0.7, "shared": torch.tensor(0.7), "per_row": torch.linspace(0.2, 1.2, 6)}


@pytest.mark.every_second("likelihood", "kl_std", "backend")
@pytest.mark.parametrize("likelihood", ["gaussian", "squared_error"])
@pytest.mark.parametrize("kl_std", KL_STDS.values(), ids=KL_STDS)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_kl_of_another_std_has_the_gradient_of_autograd(likelihood, kl_std, backend, device):
    """A clip of 1e-6 and rows far outside it: most of the gradient is the KL's."""
    inputs, uncond, reference = problem(spread=1.0)
    *inputs, uncond, reference = to_device((*inputs, uncond, reference), device)
    kl_std = kl_std.to(device) if torch.is_tensor(kl_std) else kl_std
    settings = {"clip_range": 1e-6, "guidance_scale": 2.5, "likelihood": likelihood, "kl_weight": 0.3}
    settings |= {"reference_mean": reference, "kl_std": kl_std}
    got, got_grads = gradients(clipped_policy_loss, inputs, uncond, backend=backend, **settings)
    want, want_grads = gradients(clipped_policy_loss_ref, inputs, uncond, **settings)
    torch.testing.assert_close(got.kl, want.kl, rtol=1e-6, atol=0)
    torch.testing.assert_close(got.loss, want.loss, rtol=1e-6, atol=1e-6)
    for value, expected in zip(got_grads, want_grads):
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6 * expected.abs().max().item())


@pytest.mark.parametrize("dynamics", ["flow_sde", "flow_cps"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_kl_of_flow_grpo(dynamics, backend, device):
    """Written out as the original does: squared distance of the means, averaged over elements, over 2·std_dev_t²."""
    sigma, after = torch.tensor([0.9, 0.6, 0.35]), torch.tensor([0.8, 0.45, 0.15])
    step = {"dynamics": dynamics, "noise_level": 0.7}
    coefficients = step_coefficients(sigma, after, **step).to(device)
    x, v, x_next, reference = torch.randn(4, 3, 4, 5, 5, device=device).unbind()
    v.requires_grad_()
    likelihood = "squared_error" if dynamics == "flow_cps" else "gaussian"
    settings = {"clip_range": 1e-4, "likelihood": likelihood, "kl_weight": 0.04, "reference_mean": reference}
    rows = torch.zeros(3, device=device)  # no advantage: nothing but the KL
    got = clipped_policy_loss(
        *(x, v, x_next, coefficients, rows, rows),
        **settings,
        kl_std=step_std(sigma, after, **step).to(device),
        backend=backend,
    )

    sigma, after = (t.double().to(device).view(3, 1, 1, 1) for t in (sigma, after))
    dt = after - sigma
    if dynamics == "flow_sde":
        std_dev_t = 0.7 * torch.sqrt(sigma / (1 - sigma))
        mean = x * (1 + std_dev_t**2 / (2 * sigma) * dt) + v * (1 + std_dev_t**2 * (1 - sigma) / (2 * sigma)) * dt
    else:
        std_dev_t = after * math.sin(0.7 * math.pi / 2)
        clean, noise = x - sigma * v, x + (1 - sigma) * v
        mean = clean * (1 - after) + noise * torch.sqrt(after**2 - std_dev_t**2)
    kl = (((mean - reference) ** 2).mean(dim=(1, 2, 3), keepdim=True) / (2 * std_dev_t**2)).mean()
    assert got.kl.item() == pytest.approx(kl.item(), rel=1e-5)
    assert got.loss.item() == pytest.approx(0.04 * kl.item(), rel=1e-5)
    (expected,) = torch.autograd.grad(0.04 * kl, v)
    (grad,) = torch.autograd.grad(got.loss, v)
    torch.testing.assert_close(grad.double(), expected.double(), rtol=1e-5, atol=1e-6 * expected.abs().max().item())


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_pair_of_clip_bounds_by_hand(backend, device):
    """Ratios below, inside and above [0.9, 1.3], each with both signs of the advantage."""
    x = torch.zeros(6, 1, device=device)
    coefficients = torch.tensor([1.0, 1.0, 1.0], device=device)
    ratios = torch.tensor([0.8, 0.8, 1.2, 1.2, 1.4, 1.4], device=device)
    old = gaussian_log_prob(x, x, x, coefficients) - ratios.log()
    advantages = torch.tensor([1.0, -1.0] * 3, device=device)
    got = clipped_policy_loss(
        *(x, x, x + 1, coefficients, old - 0.5, advantages), clip_range=(0.1, 0.3), backend=backend
    )
    torch.testing.assert_close(got.ratio, ratios, rtol=1e-6, atol=0)
    per_row = torch.tensor([-0.8, 0.9, -1.2, 1.2, -1.3, 1.4])
    assert got.loss.item() == pytest.approx(per_row.mean().item(), rel=1e-5)
    assert got.clip_fraction.item() == pytest.approx(4 / 6)
    assert (got.velocity_grad != 0).flatten().tolist() == [True, False, True, True, False, True]


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_equal_clip_bounds_are_one_number_to_the_bit(backend, device):
    inputs, uncond, _ = problem()
    *inputs, uncond = to_device((*inputs, uncond), device)
    settings = {"guidance_scale": 2.5, "backend": backend}
    one, one_grads = gradients(clipped_policy_loss, inputs, uncond, clip_range=1e-4, **settings)
    pair, pair_grads = gradients(clipped_policy_loss, inputs, uncond, clip_range=(1e-4, 1e-4), **settings)
    assert 0 < one.clip_fraction < 1
    assert all(torch.equal(*values) for values in zip((*one[:5], *one_grads), (*pair[:5], *pair_grads)))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_loss_of_the_public_implementation(backend, device):
    """Rows of one element, a = b = 1, s chosen so that log p = offset - d²/(2s²) can reach the recorded values."""
    recorded = np.load(GOLDEN / "policy_loss.npz")
    golden = {key: torch.from_numpy(np.asarray(value)).to(device) for key, value in recorded.items()}
    s = math.exp(-0.5 * math.log(2 * math.pi) - 0.05)  # log p = 0.05 - d²/(2s²)
    next_latents = (s * torch.sqrt(2 * (0.05 - golden["log_prob"].double()))).float()[:, None]
    velocity = torch.zeros_like(next_latents, requires_grad=True)
    result = clipped_policy_loss(
        torch.zeros_like(next_latents),
        velocity,
        next_latents,
        torch.tensor([1.0, 1.0, s], device=device),
        golden["old_log_prob"],
        golden["advantages"],
        clip_range=float(golden["clip_range"]),
        adv_clip=float(golden["adv_clip_max"]),
        backend=backend,
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
    with pytest.raises(ValueError, match=r"pair \(low, high\) for \[1-low, 1\+high\], got \(-0.1, 0.1\)"):
        clipped_policy_loss(*inputs, clip_range=(-0.1, 0.1))
    with pytest.raises(ValueError, match="clip_range a number or a pair"):
        clipped_policy_loss(*inputs, clip_range=(0.1, 0.1, 0.1))
    with pytest.raises(ValueError, match="needs reference_mean"):
        clipped_policy_loss(*inputs, clip_range=1e-4, kl_weight=0.1)
    with pytest.raises(ValueError, match="kl_std needs reference_mean"):
        clipped_policy_loss(*inputs, clip_range=1e-4, kl_std=0.1)
    settings = {"clip_range": 1e-4, "kl_weight": 0.1, "reference_mean": inputs[0]}
    for bad in (0.0, torch.zeros(6)):
        with pytest.raises(ValueError, match="kl_std must be positive"):
            clipped_policy_loss(*inputs, kl_std=bad, **settings)
    for bad in (torch.ones(3), torch.ones(6, dtype=torch.int64), torch.ones(6, 1, 1, 1)):
        with pytest.raises(ValueError, match=r"kl_std must be a number or floating point \[\] or \[6\] on cpu"):
            clipped_policy_loss(*inputs, kl_std=bad, **settings)


gpu_only = pytest.mark.skipif(not torch.cuda.is_available(), reason="the Triton interpreter truncates bf16 stores")
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=[pytest.mark.gpu, gpu_only])]


@pytest.mark.every_second("shape", "dtype", "likelihood")
@pytest.mark.parametrize("shape", [(3, 5, 7), (4500,)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("likelihood", "kl_weight"), [("gaussian", 0.04), ("squared_error", 0.04), ("gaussian", 0.0)])
def test_triton_loss_and_gradients_within_error_budget(shape, dtype, likelihood, kl_weight, device):
    """clip_range 0.1 keeps the branch taken away from rounding: inside it the loss is smooth in the velocities."""
    inputs, uncond, reference = problem(batch=4, shape=shape, dtype=dtype)
    if likelihood == "squared_error":
        inputs = (*inputs[:4], inputs[4] * 0 - 0.09, inputs[5])
    *inputs, uncond, reference = to_device((*inputs, uncond, reference), device)
    settings = {"clip_range": 1e-1, "guidance_scale": 2.5, "likelihood": likelihood}
    settings |= {"reference_mean": reference if kl_weight else None, "kl_weight": kl_weight}
    got, got_grads = gradients(clipped_policy_loss, inputs, uncond, backend="triton", **settings)
    eager, eager_grads = gradients(clipped_policy_loss_ref, inputs, uncond, **settings)
    double = [tensor.double() for tensor in inputs]
    true, true_grads = gradients(
        clipped_policy_loss_ref, double, uncond.double(), compute_dtype=torch.float64, **settings
    )
    for name in ("loss", "log_prob", "ratio", "clip_fraction", "kl"):
        values = (getattr(result, name).detach() for result in (got, eager, true))
        assert_error_within_budget(*values, name=name)
    for name, *values in zip(("velocity", "uncond_velocity"), got_grads, eager_grads, true_grads):
        assert_error_within_budget(*values, name=f"grad of {name}")
    assert torch.equal(2.0 * got.velocity_grad, got_grads[0])


@pytest.mark.parametrize("clip_range", [1e-4, 1e-5])
def test_triton_takes_the_branches_of_the_reference(clip_range, device):
    """Offsets of old log-probs on both sides of the clip, none within rounding of it."""
    inputs, uncond, _ = problem()
    *inputs, uncond = to_device((*inputs, uncond), device)
    guidance = {"uncond_velocity": uncond, "guidance_scale": 2.5}
    old = gaussian_log_prob(*inputs[:4], **guidance) + 3 * clip_range * torch.linspace(-1, 1, 6, device=device)
    settings = {"clip_range": clip_range, "guidance_scale": 2.5}
    got, got_grads = gradients(clipped_policy_loss, (*inputs[:4], old, inputs[5]), uncond, backend="triton", **settings)
    want, want_grads = gradients(
        clipped_policy_loss, (*inputs[:4], old, inputs[5]), uncond, backend="torch", **settings
    )
    assert torch.equal(got.clip_fraction, want.clip_fraction)
    torch.testing.assert_close(got.loss, want.loss, rtol=0, atol=0.05 * clip_range)
    assert 0 < want.clip_fraction < 1
    for value, expected in zip(got_grads, want_grads):
        assert torch.equal(value.flatten(1).any(1), expected.flatten(1).any(1))
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6 * expected.abs().max().item())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_triton_ratio_is_exactly_one_before_the_first_update(dtype, device):
    latents, velocity, uncond = torch.randn(3, 3, 2, 37, 29, device=device)
    velocity, uncond, coefficients = velocity.to(dtype), uncond.to(dtype), COEFFICIENTS.to(device)
    guidance = {"uncond_velocity": uncond, "guidance_scale": 4.5, "backend": "triton"}
    taken = gaussian_step(latents, velocity, coefficients, seed=5, **guidance)
    advantages = torch.tensor([1.0, -1.0, 0.0], device=device)
    args = (latents, velocity, taken.next_latents, coefficients, taken.log_prob, advantages)
    result = clipped_policy_loss(*args, clip_range=1e-5, **guidance)
    assert torch.equal(result.log_prob, taken.log_prob)
    assert torch.equal(result.ratio, torch.ones(3, device=device))
    assert result.clip_fraction == 0
    assert torch.count_nonzero(result.velocity_grad[2]) == 0
    assert torch.count_nonzero(result.velocity_grad[0]) > 0


def test_triton_rows_do_not_depend_on_the_batch(device):
    inputs, uncond, _ = problem()
    *inputs, uncond = to_device((*inputs, uncond), device)
    settings = {"guidance_scale": 2.5, "clip_range": 1e-1, "backend": "triton"}
    whole, whole_grads = gradients(clipped_policy_loss, inputs, uncond, **settings)
    rows = slice(1, 3)  # 6 and 2 rows: gradients differ by the exact factor 3 up to one rounding
    part = (*(tensor[rows] for tensor in inputs[:3]), inputs[3], *(tensor[rows] for tensor in inputs[4:]))
    few, few_grads = gradients(clipped_policy_loss, part, uncond[rows], **settings)
    assert torch.equal(whole.log_prob[rows], few.log_prob)
    assert torch.equal(whole.ratio[rows], few.ratio)
    torch.testing.assert_close(3 * whole_grads[0][rows], few_grads[0], rtol=1e-6, atol=0)


def test_triton_zero_advantage_gives_exactly_zero_gradient(device):
    inputs, uncond, _ = problem()
    *inputs, uncond = to_device((*inputs[:4], inputs[4] - 200.0, inputs[5] * 0, uncond), device)
    result, grads = gradients(
        clipped_policy_loss, inputs, uncond, clip_range=1e-4, guidance_scale=2.5, backend="triton"
    )
    assert result.loss == 0
    assert all(torch.count_nonzero(grad) == 0 for grad in grads)


@pytest.mark.parametrize("use_triton", [True, pytest.param(False, marks=pytest.mark.weekly)])
def test_opcheck(use_triton, device):
    inputs, uncond, reference = problem(batch=2)
    latents, velocity, next_latents, coefficients, old, advantages = to_device(inputs, device)
    args = (latents, velocity.requires_grad_(), uncond.to(device).requires_grad_(), next_latents, coefficients)
    settings = (None, 2.5, "gaussian", 1e-1, 1e-1, 5.0, 0.1, "ratio")
    rest = (old, advantages, reference.to(device))
    torch.library.opcheck(_clipped_policy_loss_op, (*args, *rest, None, *settings, None, use_triton))
    torch.library.opcheck(_clipped_policy_loss_op, (*args, *rest, old.abs(), *settings, None, use_triton))


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_compiles_without_graph_break(backend, device):
    inputs, _, _ = problem(batch=2)
    latents, velocity, *rest = to_device(inputs, device)

    def function(velocity):
        return clipped_policy_loss(latents, velocity, *rest, clip_range=1e-1, backend=backend).loss * 2

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    grads = []
    for run in (function, compiled):
        leaf = velocity.clone().requires_grad_()
        run(leaf).backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)


@pytest.mark.gpu
def test_real_size_on_policy_exactness_and_gradients():
    """SD3.5-medium at 512 px, bf16 velocities, as the trainer calls it."""
    latents, noise = torch.randn(2, 8, 16, 64, 64, device="cuda")
    velocity, uncond = torch.randn(2, 8, 16, 64, 64, device="cuda").bfloat16()
    coefficients, advantages = COEFFICIENTS.cuda(), torch.linspace(-2, 2, 8, device="cuda")
    guidance = {"uncond_velocity": uncond, "guidance_scale": 4.5}
    taken = gaussian_step(latents, velocity, coefficients, noise=noise, **guidance)
    inputs = (latents, velocity, taken.next_latents, coefficients, taken.log_prob, advantages)
    settings = {"clip_range": 1e-5, "guidance_scale": 4.5}
    got, got_grads = gradients(clipped_policy_loss, inputs, uncond, **settings)
    assert torch.equal(got.ratio, torch.ones(8, device="cuda"))
    _, eager_grads = gradients(clipped_policy_loss_ref, inputs, uncond, **settings | {"clip_range": 1e-2})
    double = [tensor.double() for tensor in inputs]
    settings |= {"clip_range": 1e-2, "compute_dtype": torch.float64}
    _, true_grads = gradients(clipped_policy_loss_ref, double, uncond.double(), **settings)
    for name, *values in zip(("velocity", "uncond_velocity"), got_grads, eager_grads, true_grads):
        assert_error_within_budget(*values, name=f"grad of {name}")
