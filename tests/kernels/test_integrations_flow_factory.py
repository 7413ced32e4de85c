"""Flow-Factory's scheduler step, all four dynamics, as its samplers and trainers call it.

Planted bugs that turned this file red: s returned for std_dev_t, eval mode ignored, sigma_max ignored, σ' read
at the position of σ, mean and next latents swapped in the tuple, a log-prob of latents that are rounded afterwards.
"""

import math
import sys
from dataclasses import dataclass

import pytest
import torch

from advgrpo_kernels.integrations import flow_factory
from tests.kernels import stand_ins
from tests.kernels.peers import (
    batch,
    close,
    cps_mean,
    flow_mean,
    gaussian_log_prob,
    recording,
    sd3_scheduler,
)

LEVEL = 0.6
TUPLE = ("next_latents", "next_latents_mean", "noise_pred", "log_prob", "std_dev_t", "dt")


@dataclass
class SDESchedulerOutput:
    """The peer's output class as its module knows it."""

    next_latents: torch.Tensor | None = None
    next_latents_mean: torch.Tensor | None = None
    std_dev_t: torch.Tensor | None = None
    dt: torch.Tensor | None = None
    log_prob: torch.Tensor | None = None
    noise_pred: torch.Tensor | None = None


class FlowMatchEulerDiscreteSDEScheduler:
    """The attributes and methods of the peer's scheduler that `step` uses; noise on steps 0-4 only."""

    def __init__(self, dynamics_type="Flow-SDE"):
        self.stock, self.dynamics_type, self.is_eval = sd3_scheduler(), dynamics_type, False
        self.sigmas, self.timesteps = self.stock.sigmas, self.stock.timesteps

    def index_for_timestep(self, timestep):
        return self.stock.index_for_timestep(timestep)

    def get_noise_level_for_sigma(self, sigma):
        return torch.where(torch.isin(sigma, self.sigmas[:5]), LEVEL, 0.0)

    def step(self, noise_pred, timestep, latents):
        raise AssertionError("not patched")


def formula(dynamics_type, now, after, x, v, level=LEVEL):
    """(mean, standard deviation of the step, std_dev_t) in float64."""
    if dynamics_type == "CPS":
        std = after * math.sin(level * math.pi / 2)
        return cps_mean(x, v, now, after, std), std, std
    if dynamics_type == "ODE":
        return x.double() + (after - now) * v.double(), 0.0, 0.0
    if dynamics_type == "Dance-SDE":
        std = level * math.sqrt(now - after)
        return flow_mean(x, v, now, after, level), std, level
    diffusion = level * math.sqrt(now / (1 - (sd3_scheduler().sigmas[1].item() if now == 1 else now)))
    return flow_mean(x, v, now, after, diffusion), diffusion * math.sqrt(now - after), diffusion


@pytest.mark.parametrize("t", range(10))
def test_recorded_dance_step(t):
    step = recording("dance_sde_flow_factory.npz", t)
    scheduler = FlowMatchEulerDiscreteSDEScheduler()
    velocity = step.velocity.clone().requires_grad_()
    got = flow_factory.step(
        scheduler,
        velocity,
        scheduler.timesteps[t],
        step.latents,
        next_latents=step.next_latents,
        noise_level=step.noise_level,
        dynamics_type="Dance-SDE",
    )
    close(got.log_prob.detach(), step.log_prob, rtol=1e-5, atol=4e-6)
    close(got.next_latents_mean.detach(), step.mean)
    (grad,) = torch.autograd.grad(got.log_prob.sum(), velocity)
    close(grad, step.grad_velocity, rtol=1e-4, atol=2e-4 * step.grad_velocity.abs().max().item())


@pytest.mark.parametrize(("name", "dynamics"), [("flow_sde_flow_grpo", "Flow-SDE"), ("flow_cps_adv_grpo", "CPS")])
@pytest.mark.parametrize("t", range(9))
def test_recorded_steps_of_the_other_dynamics(name, dynamics, t):
    """The trainer's call with both timesteps given: σ comes from them, not from the schedule."""
    step, scheduler = recording(f"{name}.npz", t), FlowMatchEulerDiscreteSDEScheduler(dynamics)
    times = [scheduler.timesteps[i].expand(3) for i in (t, t + 1)]
    got = flow_factory.step(
        scheduler, step.velocity, times[0], step.latents, step.next_latents, times[1], noise_level=step.noise_level
    )
    # timestep/1000 is σ to one float32 ulp, which the last CPS steps' -mean(d²) of 1e-5 feels.
    close(got.log_prob, step.log_prob, rtol=1e-4, atol=4e-6)
    close(got.next_latents_mean, step.mean)
    close(got.std_dev_t, step.std_dev_t.view(3, 1, 1, 1), rtol=1e-4, atol=0)


@pytest.mark.parametrize("dynamics", flow_factory.DYNAMICS)
@pytest.mark.parametrize("t", range(5))
def test_sampling_call(dynamics, t):
    scheduler, (x, v) = FlowMatchEulerDiscreteSDEScheduler(dynamics), batch()
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2, 3)]
    got = flow_factory.step(scheduler, v, scheduler.timesteps[t], x, generator=generators, return_dict=False)
    got = dict(zip(TUPLE, got))
    now, after = scheduler.sigmas[t : t + 2].double().tolist()
    noise = torch.cat([torch.randn((1, *x.shape[1:]), generator=torch.Generator().manual_seed(s)) for s in (1, 2, 3)])
    mean, std, std_dev_t = formula(dynamics, now, after, x, v)
    close(got["next_latents"], mean + std * noise.double())
    close(got["next_latents_mean"], mean)
    close(got["dt"], torch.full((3, 1, 1, 1), after - now))
    close(got["std_dev_t"], torch.full((3, 1, 1, 1), std_dev_t), rtol=1e-5)
    assert torch.equal(got["noise_pred"], v)
    if dynamics == "ODE":
        assert got["log_prob"].tolist() == [0.0] * 3
    elif dynamics == "CPS":
        close(got["log_prob"], -(std * noise.double()).square().flatten(1).mean(1), rtol=1e-4)
    else:
        close(got["log_prob"], gaussian_log_prob(mean + std * noise, mean, std), rtol=1e-4)


@pytest.mark.parametrize("dynamics", ["Flow-SDE", "Dance-SDE", "CPS"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_first_ratio_is_exactly_one_in_the_dtype_latents_are_kept_in(dynamics, dtype):
    """Rollout stores next_latents in the dtype of latents, training scores what was stored."""
    scheduler, (x, v) = FlowMatchEulerDiscreteSDEScheduler(dynamics), batch()
    x, v = x.to(dtype), v.to(dtype)
    with torch.no_grad():
        taken = flow_factory.step(scheduler, v, scheduler.timesteps[1], x)
    stored = taken.next_latents.to(dtype)
    assert torch.equal(stored.float(), taken.next_latents)
    trained = flow_factory.step(scheduler, v.requires_grad_(), scheduler.timesteps[1], x, next_latents=stored)
    assert torch.equal(trained.log_prob, taken.log_prob)
    with_gradient = flow_factory.step(scheduler, v, scheduler.timesteps[1], x)
    assert torch.equal(with_gradient.next_latents, with_gradient.next_latents.to(dtype).float())


def test_a_step_back_has_no_density_and_does_not_raise():
    scheduler, (x, v) = FlowMatchEulerDiscreteSDEScheduler(), batch()
    got = flow_factory.step(
        scheduler, v, scheduler.timesteps[3], x, x, timestep_next=scheduler.timesteps[2], noise_level=0.5
    )
    assert got.log_prob.isnan().all()
    assert got.next_latents_mean.isfinite().all()


@pytest.mark.parametrize("dynamics", flow_factory.DYNAMICS)
def test_steps_without_noise_are_the_ode(dynamics):
    """Step 7 is outside the scheduler's window; eval mode has no noise anywhere."""
    scheduler, (x, v) = FlowMatchEulerDiscreteSDEScheduler(dynamics), batch()
    for t, is_eval in ((7, False), (2, True)):
        scheduler.is_eval = is_eval
        got = flow_factory.step(scheduler, v, scheduler.timesteps[t].item(), x)
        close(got.next_latents, x + (scheduler.sigmas[t + 1] - scheduler.sigmas[t]) * v)
        assert not got.std_dev_t.any()
        expected = math.nan if dynamics in ("Flow-SDE", "Dance-SDE") else 0.0
        close(got.log_prob, torch.full((3,), expected), equal_nan=True)


def test_rows_have_their_own_step_and_noise_level():
    scheduler, (x, v) = FlowMatchEulerDiscreteSDEScheduler(), batch()
    levels, steps = torch.tensor([0.2, 0.0, 0.9]), [0, 4, 8]
    got = flow_factory.step(scheduler, v, scheduler.timesteps[steps], x, next_latents=x, noise_level=levels)
    for i, t in enumerate(steps):
        now, after = scheduler.sigmas[t : t + 2].double().tolist()
        mean, std, _ = formula("Flow-SDE", now, after, x[i : i + 1], v[i : i + 1], levels[i].item())
        close(got.next_latents_mean[i : i + 1], mean)
        if std:
            close(got.log_prob[i : i + 1], gaussian_log_prob(x[i : i + 1], mean, std), rtol=1e-4)
    assert got.log_prob.isnan().tolist() == [False, True, False]


def test_return_values_are_those_asked_for(caplog):
    scheduler, (x, v) = FlowMatchEulerDiscreteSDEScheduler(), batch()
    kept = ["next_latents", "log_prob", "pred_x0"]
    with caplog.at_level("WARNING", "advgrpo_kernels.integrations"):
        got = flow_factory.step(scheduler, v, 3, x, compute_log_prob=False, return_kwargs=kept)
    assert type(got) is SDESchedulerOutput
    assert got.log_prob is None
    assert got.dt is None
    assert "a step has no pred_x0" in caplog.text
    assert "taken as the position" in caplog.text
    by_time = flow_factory.step(scheduler, v, scheduler.timesteps[3], x, next_latents=got.next_latents)
    assert by_time.next_latents is got.next_latents


def test_sigma_max_stands_in_for_the_first_sigma():
    scheduler, (x, v) = FlowMatchEulerDiscreteSDEScheduler(), batch()
    got = flow_factory.step(scheduler, v, scheduler.timesteps[0], x, noise_level=0.5, sigma_max=0.98)
    assert got.std_dev_t[0].item() == pytest.approx(0.5 * math.sqrt(1 / 0.02), rel=1e-5)


def test_bad_arguments_raise():
    scheduler, (x, v) = FlowMatchEulerDiscreteSDEScheduler(), batch()
    with pytest.raises(ValueError, match="dynamics_type must be one of"):
        flow_factory.step(scheduler, v, scheduler.timesteps[0], x, dynamics_type="SDE")
    with pytest.raises(ValueError, match=r"timestep must be a scalar or \[B\]"):
        flow_factory.step(scheduler, v, scheduler.timesteps[:1, None], x)
    with pytest.raises(TypeError, match="timestep must be a float or a tensor"):
        flow_factory.step(scheduler, v, "now", x)


def test_patch_replaces_the_method_for_subclasses_and_is_reversible():
    module = stand_ins.module(stand_ins.FLOW_FACTORY)
    sys.modules[module.__name__] = module  # where `step` finds the peer's output class
    scheduler_class = module.FlowMatchEulerDiscreteSDEScheduler
    original = scheduler_class.step
    child = type("Child", (scheduler_class,), {"__module__": sys.__name__})
    try:
        assert flow_factory.patch(module) == ["FlowMatchEulerDiscreteSDEScheduler.step"]
        assert scheduler_class.step.__code__ is flow_factory.step.__code__
        x, v = batch()
        scheduler = child("CPS")
        assert type(scheduler.step(v, scheduler.timesteps[0], x)) is module.SDESchedulerOutput
        with pytest.raises(RuntimeError, match="patched already"):
            flow_factory.patch(module)
        flow_factory.unpatch(module)
    finally:
        del sys.modules[module.__name__]
    assert scheduler_class.step is original
