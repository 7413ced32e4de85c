"""The trust regions of the policy loss that compare means: against verl-omni's losses and autograd, exact on-policy.

Planted bugs that turned this file red: the normalised ratio's gradient at μ instead of μ_old; the mask on rows that
come back; padding lanes in the shift.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from advgrpo_kernels import clipped_policy_loss, clipped_policy_loss_ref, gaussian_step
from advgrpo_kernels.ops.clipped_policy_loss import _clipped_policy_loss_op
from advgrpo_kernels.testing import assert_error_within_budget

GOLDEN = Path(__file__).parents[1] / "golden"
COEFFICIENTS = torch.tensor([0.97, -0.11, 0.3])
REGIONS = {"normalized_ratio": 5e-3, "divergence": 2e-2}  # with a bound that some rows are beyond
BACKENDS = ["torch", "triton"]


def problem(batch=6, shape=(3, 5, 7), drift=1.5):
    """A step that a policy took, and another policy further from it row by row: the first has not moved at all."""
    latents, old, away, reference = torch.randn(4, batch, *shape).unbind()
    uncond = torch.randn(batch, *shape)
    guidance = {"uncond_velocity": uncond, "guidance_scale": 2.5}
    taken = gaussian_step(latents, old, COEFFICIENTS, seed=1, return_mean=True, **guidance)
    velocity = old + drift * torch.linspace(0, 1, batch).view(-1, *[1] * len(shape)) * away
    advantages = torch.tensor([1.5, -0.7, 0.3, -7.0, 6.0, 0.0])[:batch]
    inputs = (latents, velocity, taken.next_latents, COEFFICIENTS, taken.log_prob, advantages)
    return inputs, uncond, taken.mean, reference


def on(device, *tensors):
    return [tensor.to(device) for tensor in tensors]


def gradients(function, inputs, uncond, **settings):
    velocity, uncond = inputs[1].detach().requires_grad_(), uncond.detach().requires_grad_()
    result = function(inputs[0], velocity, *inputs[2:], uncond_velocity=uncond, guidance_scale=2.5, **settings)
    return result, torch.autograd.grad(2.0 * result.loss, (velocity, uncond))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("region", "file", "bounds"),
    [
        ("normalized_ratio", "grpo_guard_verl_omni.npz", ("clip_ratio", "adv_clip_max")),
        ("divergence", "flow_dppo_verl_omni.npz", ("kl_mask_threshold", None)),
    ],
)
def test_losses_of_verl_omni(region, file, bounds, backend, device):
    """The velocity is the mean (a = 0, b = 1). Theirs divides GRPO-Guard's loss by the step's length as well, which is
    `update.step_weights` here, and does not clip Flow-DPPO's advantages."""
    golden = {name: torch.from_numpy(np.asarray(value)) for name, value in np.load(GOLDEN / file).items()}
    for step in range(3):
        own = {name[2:]: value.to(device) for name, value in golden.items() if name.startswith(f"{step}_")}
        s = (own["std_dev_t"] * own["sqrt_dt"]).item()
        velocity = own["mean"].requires_grad_()
        coefficients = torch.tensor([0.0, 1.0, s], device=device)
        zeros = torch.zeros_like(own["mean"])
        (old,) = on(device, gaussian_step(zeros, own["old_mean"], coefficients, noise=zeros).log_prob)
        old = old - ((own["next_latents"] - own["old_mean"]) ** 2).flatten(1).mean(1) / (2 * s * s)
        result = clipped_policy_loss(
            *(zeros, velocity, own["next_latents"], coefficients, old, own["advantages"]),
            clip_range=golden[bounds[0]].item(),
            adv_clip=golden[bounds[1]].item() if bounds[1] else 1e9,
            trust_region=region,
            old_mean=own["old_mean"],
            backend=backend,
        )
        scale = own["sqrt_dt"].square() if region == "normalized_ratio" else 1.0
        torch.testing.assert_close(result.loss.detach(), own["loss"] * scale, rtol=2e-5, atol=2e-6)
        torch.testing.assert_close(result.clip_fraction, own["clip_fraction"])
        (grad,) = torch.autograd.grad(result.loss, velocity)
        expected = own["grad_mean"] * scale
        torch.testing.assert_close(grad, expected, rtol=2e-4, atol=2e-5 * expected.abs().max().item())
        if region == "divergence":
            torch.testing.assert_close(result.divergence.mean(), own["divergence_mean"], rtol=1e-5, atol=0)
            assert 0 < own["clip_fraction"] < 1


@pytest.mark.every_second("backend", "region", "kl_weight", "likelihood")
@pytest.mark.parametrize("likelihood", ["gaussian", "squared_error"])
@pytest.mark.parametrize("kl_weight", [0.0, 0.04])
@pytest.mark.parametrize("region", REGIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_closed_form_gradient_is_autograd_s(backend, region, kl_weight, likelihood, device):
    inputs, uncond, old_mean, reference = problem()
    if likelihood == "squared_error":
        inputs = (*inputs[:4], -((inputs[2] - old_mean) ** 2).flatten(1).mean(1), inputs[5])
    *inputs, uncond, old_mean, reference = on(device, *inputs, uncond, old_mean, reference)
    settings = {"clip_range": REGIONS[region], "likelihood": likelihood, "trust_region": region, "old_mean": old_mean}
    settings |= {"reference_mean": reference, "kl_weight": kl_weight}
    got, got_grads = gradients(clipped_policy_loss, inputs, uncond, backend=backend, **settings)
    want, want_grads = gradients(clipped_policy_loss_ref, inputs, uncond, **settings)
    assert 0 < want.clip_fraction < 1
    for name in (*got._fields[:5], "divergence"):
        value, expected = getattr(got, name), getattr(want, name)
        if expected is not None:
            torch.testing.assert_close(value, expected, rtol=2e-6, atol=1e-7)
    for value, expected in zip(got_grads, want_grads):
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6 * expected.abs().max().item())
        assert torch.equal(value.flatten(1).any(1), expected.flatten(1).any(1))


@pytest.mark.parametrize("likelihood", ["gaussian", "squared_error"])
def test_the_normalised_ratio_is_the_papers_formula_and_the_likelihood_plays_no_part(likelihood):
    """exp(s·(log p - log p_old + mean((μ-μ_old)²)/(2s²))) of the gaussian log-probabilities, in float64."""
    inputs, uncond, old_mean, _ = (
        tuple(t.double() for t in p) if isinstance(p, tuple) else p.double() for p in problem()
    )
    latents, velocity, x_next, _, _, advantages = inputs
    s = 0.3
    mean = 0.97 * latents - 0.11 * (2.5 * velocity - 1.5 * uncond)
    gap = ((x_next - old_mean).square() - (x_next - mean).square() + (mean - old_mean).square()).flatten(1).mean(1)
    expected = (s * gap / (2 * s * s)).exp()
    got = clipped_policy_loss_ref(
        *(latents, velocity, x_next, COEFFICIENTS.double(), advantages * 0, advantages),
        clip_range=0.1,
        uncond_velocity=uncond,
        guidance_scale=2.5,
        likelihood=likelihood,
        trust_region="normalized_ratio",
        old_mean=old_mean,
        compute_dtype=torch.float64,
    )
    torch.testing.assert_close(got.ratio, expected, rtol=1e-7, atol=0)
    assert (got.ratio[1:] - 1).abs().min() > 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_are_masked_where_they_are_far_and_move_on(backend, device):
    """Ratios above and below 1 at both signs of the advantage, near and far from the rollout's mean."""
    x = torch.zeros(8, 1, device=device)
    coefficients = torch.tensor([0.0, 1.0, 1.0], device=device)
    x_next = torch.ones(8, 1, device=device)  # of a step from μ_old = 0: towards it the ratio rises
    mean = torch.tensor([0.1, -0.1, 0.1, -0.1, 0.5, -0.5, 0.5, -0.5], device=device)[:, None]
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0] * 2, device=device)
    old = clipped_policy_loss(*(x, x, x_next, coefficients, x[:, 0], advantages), clip_range=1.0).log_prob
    got = clipped_policy_loss(
        *(x, mean, x_next, coefficients, old, advantages),
        clip_range=0.1,
        trust_region="divergence",
        old_mean=x,
        backend=backend,
    )
    torch.testing.assert_close(got.divergence, mean[:, 0].square() / 2)
    assert got.clip_fraction == 0.5
    moves = (got.velocity_grad != 0).flatten().tolist()
    assert moves == [True] * 4 + [False, True, True, False], "far and onwards: A > 0 above 1, A < 0 below it"
    kept = torch.tensor(moves, device=device)
    torch.testing.assert_close(got.loss, (-advantages * got.ratio)[kept].sum() / 8)


@pytest.mark.parametrize("region", REGIONS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_before_the_first_update_nothing_has_moved(backend, region, dtype, device):
    """More elements than a tile has lanes: the rest of the last tile must not count."""
    latents, velocity, uncond = torch.randn(3, 3, 4500, device=device)
    velocity, uncond, coefficients = velocity.to(dtype), uncond.to(dtype), COEFFICIENTS.to(device)
    guidance = {"uncond_velocity": uncond, "guidance_scale": 4.5, "backend": backend}
    taken = gaussian_step(latents, velocity, coefficients, seed=5, return_mean=True, **guidance)
    advantages = torch.tensor([1.0, -1.0, 0.0], device=device)
    result = clipped_policy_loss(
        *(latents, velocity, taken.next_latents, coefficients, taken.log_prob, advantages),
        clip_range=1e-9,
        trust_region=region,
        old_mean=taken.mean,
        **guidance,
    )
    assert torch.equal(result.ratio, torch.ones(3, device=device))
    assert result.clip_fraction == 0
    assert result.divergence is None or torch.equal(result.divergence, torch.zeros(3, device=device))
    assert torch.count_nonzero(result.velocity_grad[2]) == 0
    assert torch.count_nonzero(result.velocity_grad[0]) > 0


@pytest.mark.parametrize("shape", [(3, 5, 7), (4500,)], ids=str)
@pytest.mark.parametrize("region", REGIONS)
def test_triton_within_error_budget(region, shape, device):
    """A bound that no row is near: the loss is smooth in the velocities."""
    inputs, uncond, old_mean, _ = problem(batch=4, shape=shape)
    *inputs, uncond, old_mean = on(device, *inputs, uncond, old_mean)
    settings = {"clip_range": 10.0, "trust_region": region}
    got, got_grads = gradients(clipped_policy_loss, inputs, uncond, backend="triton", old_mean=old_mean, **settings)
    eager, eager_grads = gradients(clipped_policy_loss_ref, inputs, uncond, old_mean=old_mean, **settings)
    double = [tensor.double() for tensor in inputs]
    settings |= {"old_mean": old_mean.double(), "compute_dtype": torch.float64}
    true, true_grads = gradients(clipped_policy_loss_ref, double, uncond.double(), **settings)
    for name in ("loss", "ratio", *(["divergence"] if region == "divergence" else [])):
        assert_error_within_budget(*(getattr(result, name).detach() for result in (got, eager, true)), name=name)
    for name, *values in zip(("velocity", "uncond_velocity"), got_grads, eager_grads, true_grads):
        assert_error_within_budget(*values, name=f"grad of {name}")


@pytest.mark.parametrize("region", REGIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_does_not_depend_on_the_batch(backend, region, device):
    inputs, uncond, old_mean, _ = problem()
    *inputs, uncond, old_mean = on(device, *inputs, uncond, old_mean)
    settings = {"clip_range": REGIONS[region], "trust_region": region, "backend": backend}
    whole, whole_grads = gradients(clipped_policy_loss, inputs, uncond, old_mean=old_mean, **settings)
    rows = slice(3, 5)
    part = (*(tensor[rows] for tensor in inputs[:3]), inputs[3], *(tensor[rows] for tensor in inputs[4:]))
    few, few_grads = gradients(clipped_policy_loss, part, uncond[rows], old_mean=old_mean[rows], **settings)
    assert torch.equal(whole.ratio[rows], few.ratio)
    torch.testing.assert_close(3 * whole_grads[0][rows], few_grads[0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("use_triton", [True, False])
@pytest.mark.parametrize("region", REGIONS)
def test_opcheck(region, use_triton, device):
    inputs, uncond, old_mean, _ = problem(batch=2)
    latents, velocity, next_latents, coefficients, old, advantages = on(device, *inputs)
    args = (latents, velocity.requires_grad_(), uncond.to(device).requires_grad_(), next_latents, coefficients)
    rest = (old, advantages, None, None, old_mean.to(device), 2.5, "gaussian", 1e-1, 1e-1, 5.0, 0.0, region, None)
    torch.library.opcheck(_clipped_policy_loss_op, (*args, *rest, use_triton))


def test_bad_arguments_raise():
    inputs, _, old_mean, _ = problem()
    settings = {"clip_range": 1e-4, "old_mean": old_mean}
    with pytest.raises(ValueError, match=r"trust_region must be one of \('ratio', .*, got 'trust'"):
        clipped_policy_loss(*inputs, trust_region="trust", **settings)
    with pytest.raises(ValueError, match="old_mean belongs to the other trust regions"):
        clipped_policy_loss(*inputs, **settings)
    with pytest.raises(ValueError, match="old_mean belongs to the other trust regions, which need it"):
        clipped_policy_loss(*inputs, clip_range=1e-4, trust_region="divergence")
    with pytest.raises(ValueError, match="old_mean must be floating point of latents' shape"):
        clipped_policy_loss(*inputs, clip_range=1e-4, trust_region="divergence", old_mean=old_mean[:2])
    with pytest.raises(ValueError, match="has one bound, give a number"):
        clipped_policy_loss(*inputs, trust_region="divergence", old_mean=old_mean, clip_range=(1e-4, 1e-4))
    still = (*inputs[:3], torch.tensor([1.0, -0.1, 0.0]), *inputs[4:])
    with pytest.raises(ValueError, match="s = 0"):
        clipped_policy_loss(*still, likelihood="squared_error", trust_region="divergence", **settings)
