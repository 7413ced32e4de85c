"""MixGRPO's `flow_grpo_step`/`dance_grpo_step` and DanceGRPO's `flux_step` as their trainers call them.

Planted bugs that turned this file red: noise drawn in float32, no draw in deterministic steps, a log-prob scaled
by 1/s², the ODE keeping the SDE's drift, x0 with the wrong sign.
"""

import math

import pytest
import torch

from advgrpo_kernels.integrations import dance_grpo, mix_grpo
from tests.kernels import stand_ins
from tests.kernels.peers import batch, close, cps_mean, flow_mean, gaussian_log_prob, recording

SIGMAS = torch.linspace(1, 0, 9) * 3 / (1 + 2 * torch.linspace(1, 0, 9))
ETA = 0.3


def std_of_flow_sde(index, level):
    sigma = SIGMAS.double()
    now = sigma[index].item()
    return level * math.sqrt(now / (1 - (sigma[1].item() if now == 1 else now)))


def kind_of_step(sde_type, dance, index, x, v):
    """(mean, standard deviation) in float64 of the step a call takes at its defaults."""
    now, after = SIGMAS[index : index + 2].double().tolist()
    if sde_type == "cps":
        std = after * math.sin(0.8 * math.pi / 2)
        return cps_mean(x, v, now, after, std), std
    diffusion = ETA if dance else std_of_flow_sde(index, ETA)
    return flow_mean(x, v, now, after, diffusion), diffusion * math.sqrt(now - after)


@pytest.mark.parametrize("sde_type", ["sde", "cps"])
@pytest.mark.parametrize("index", range(8))
def test_flow_grpo_step(sde_type, index):
    x, v = batch((2, 12, 8))
    mean, std = kind_of_step(sde_type, False, index, x, v)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(4)).double()
    call = {"model_output": v, "latents": x, "eta": ETA, "sigmas": SIGMAS, "index": index, "sde_type": sde_type}
    got = mix_grpo.flow_grpo_step(**call, prev_sample=None, generator=torch.Generator().manual_seed(4))
    close(got[0], mean + std * noise)
    close(got[1], x - SIGMAS[index] * v)
    close(got[3], mean)
    assert got[4].shape == ()
    assert got[4].item() == pytest.approx(std, rel=1e-5)
    trained = mix_grpo.flow_grpo_step(**call | {"model_output": v.requires_grad_()}, prev_sample=got[0])
    assert torch.equal(trained[2], got[2])
    if sde_type == "sde":
        close(got[2], gaussian_log_prob(mean + std * noise, mean, std), rtol=1e-4)
    else:
        close(got[2], -(std * noise).square().flatten(1).mean(1), rtol=1e-4)
    if std > 0:
        assert torch.autograd.grad(trained[2].sum(), v)[0].abs().max() > 0


@pytest.mark.parametrize("sde_type", ["sde", "cps"])
def test_deterministic_flow_step_is_the_ode_under_the_stochastic_density(sde_type):
    x, v = batch()
    generator = torch.Generator().manual_seed(4)
    call = {"eta": ETA, "sigmas": SIGMAS, "index": 3, "sde_type": sde_type}
    got = mix_grpo.flow_grpo_step(v, x, **call, prev_sample=None, generator=generator, determistic=True)
    ode = x + (SIGMAS[4] - SIGMAS[3]) * v
    close(got[0], ode)
    mean, std = kind_of_step(sde_type, False, 3, x, v)
    expected = gaussian_log_prob(ode, mean, std) if sde_type == "sde" else -(ode - mean).square().flatten(1).mean(1)
    close(got[2], expected, rtol=1e-4)
    reference = torch.Generator().manual_seed(4)
    torch.randn(x.shape, generator=reference)
    assert torch.equal(torch.randn(3, generator=generator), torch.randn(3, generator=reference))


def test_low_precision_output_draws_its_noise_in_its_dtype():
    x, v = batch()
    v = v.bfloat16()
    call = {"eta": ETA, "sigmas": SIGMAS, "index": 3, "prev_sample": None}
    got = mix_grpo.flow_grpo_step(v, x, **call, generator=torch.Generator().manual_seed(4))
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(4), dtype=torch.bfloat16)
    mean, std = kind_of_step("sde", False, 3, x, v)
    close(got[0], mean + std * noise.double())


@pytest.mark.parametrize("kind", ["truncated", "repeated", "inverted"])
def test_only_the_step_that_is_taken_needs_to_be_one(kind):
    """MixGRPO-Flash compresses the steps behind the window: its schedule may end above 0 or repeat a level."""
    orders = {"truncated": [0, 1, 2, 3, 4], "repeated": [0, 1, 2, 3, 4, 4, 8], "inverted": [0, 1, 2, 3, 4, 2]}
    sigmas = {name: SIGMAS[order] for name, order in orders.items()}
    x, v = batch()
    call = {"eta": ETA, "index": 2, "prev_sample": x}
    expected = mix_grpo.flow_grpo_step(v, x, sigmas=SIGMAS, **call)
    for got, want in zip(mix_grpo.flow_grpo_step(v, x, sigmas=sigmas[kind], **call), expected):
        assert torch.equal(got, want)
    if kind != "truncated":  # a step that is none has no density
        call |= {"index": 4}
        assert mix_grpo.flow_grpo_step(v, x, sigmas=sigmas[kind], **call)[2].isnan().all()
    with pytest.raises(IndexError, match=f"step {len(sigmas[kind]) - 1} of a schedule of"):
        mix_grpo.flow_grpo_step(v, x, sigmas=sigmas[kind], **call | {"index": len(sigmas[kind]) - 1})


@pytest.mark.parametrize("sde_type", ["sde", "cps"])
@pytest.mark.parametrize("sde_solver", [True, False])
@pytest.mark.parametrize("index", [0, 3, 6])
def test_dance_grpo_step(sde_type, sde_solver, index):
    x, v = batch()
    mean, std = kind_of_step(sde_type, True, index, x, v)
    if sde_type == "sde" and not sde_solver:
        mean = x.double() + (SIGMAS[index + 1] - SIGMAS[index]).double() * v
    torch.manual_seed(6)
    noise = torch.randn_like(x).double() if sde_solver else torch.zeros_like(x).double()
    call = {"sde_solver": sde_solver, "sde_type": sde_type}
    torch.manual_seed(6)
    got = mix_grpo.dance_grpo_step(v, x, ETA, SIGMAS, index, None, grpo=True, **call)
    close(got[0], mean + std * noise)
    close(got[1], x - SIGMAS[index] * v)
    scale = 2 * std**2 if sde_type == "sde" else 1.0
    close(got[2], -(std * noise).square().flatten(1).mean(1) / scale, rtol=1e-4, atol=1e-6)
    trained = mix_grpo.dance_grpo_step(v.requires_grad_(), x, ETA, SIGMAS, index, got[0], grpo=True, **call)
    assert torch.equal(trained[2], got[2])
    assert trained[2].requires_grad
    mean_only = mix_grpo.dance_grpo_step(v, x, ETA, SIGMAS, index, None, grpo=False, **call)
    assert len(mean_only) == 2
    close(mean_only[0].detach(), mean)


@pytest.mark.parametrize("t", range(10))
def test_flux_step_gives_the_recorded_log_prob(t):
    """The recording is Flow-Factory's of the same dynamics."""
    step = recording("dance_sde_flow_factory.npz", t)
    schedule = torch.stack([step.sigma, step.sigma_next, *([torch.tensor(0.0)] if step.sigma_next > 0 else [])])
    velocity = step.velocity.clone().requires_grad_()
    call = (velocity, step.latents, step.noise_level, schedule, 0, step.next_latents, True, True)
    got = dance_grpo.flux_step(*call)
    close(got[2].detach(), step.log_prob, rtol=1e-5, atol=4e-6)
    (grad,) = torch.autograd.grad(got[2].sum(), velocity)
    close(grad, step.grad_velocity, rtol=1e-4, atol=2e-4 * step.grad_velocity.abs().max().item())
    mean, _ = dance_grpo.flux_step(*call[:5], None, False, True)
    close(mean.detach(), step.mean)
    std = step.noise_level * math.sqrt(step.sigma.item() - step.sigma_next.item())
    without = dance_grpo.flux_step_without_constants(*call)[2].detach()  # the original's until August 2025
    close(without - math.log(std) - 0.5 * math.log(2 * math.pi), step.log_prob, rtol=1e-5, atol=4e-6)


@pytest.mark.parametrize("sde_solver", [True, False])
def test_flux_step_adds_noise_with_either_solver(sde_solver):
    x, v = batch()
    now, after = SIGMAS[2:4].double().tolist()
    mean = flow_mean(x, v, now, after, ETA) if sde_solver else x.double() + (after - now) * v
    torch.manual_seed(6)
    noise = torch.randn_like(x).double()
    torch.manual_seed(6)
    got = dance_grpo.flux_step(v, x, ETA, sigmas=SIGMAS, index=2, prev_sample=None, grpo=True, sde_solver=sde_solver)
    close(got[0], mean + ETA * math.sqrt(now - after) * noise)
    close(got[2], gaussian_log_prob(got[0], mean, ETA * math.sqrt(now - after)), rtol=1e-4)
    with pytest.raises(ValueError, match="eta must be > 0"):
        dance_grpo.flux_step(v, x, 0.0, SIGMAS, 2, None, True, sde_solver)


def test_bad_arguments_raise():
    x, v = batch()
    with pytest.raises(ValueError, match="sde_type must be"):
        mix_grpo.flow_grpo_step(v, x, ETA, SIGMAS, 0, None, sde_type="ode")
    with pytest.raises(ValueError, match="generator or prev_sample, not both"):
        mix_grpo.flow_grpo_step(v, x, ETA, SIGMAS, 0, v, generator=torch.Generator())


@pytest.mark.parametrize(
    ("peer", "name", "source"),
    [(mix_grpo, "flow_grpo_step", stand_ins.MIX), (dance_grpo, "flux_step", stand_ins.dance())],
)
def test_patch_and_unpatch(peer, name, source):
    module = stand_ins.module(source)
    original = getattr(module, name)
    assert peer.patch(module) == [name]
    assert getattr(module, name).__code__ is getattr(peer, name).__code__
    peer.unpatch(module)
    assert getattr(module, name) is original
