"""verl-omni, UniRL and miles_diffusion: `patch` compares every case with stand-ins; here, what the cases do not reach.

Planted bugs that turned this file red: std_dev_t of dance_sde per unit of time, the normaliser always included, the
scheduler's own step ignored, sigma_max ignored, no rounding to the sample's dtype, a strategy of one's own taken for
stock, a step without noise rounded, recorded
latents not rounded, miles' function without its own variant.
"""

import pytest
import torch

from advgrpo_kernels.integrations import miles_diffusion, unirl, verl_omni
from tests.kernels import stand_ins
from tests.kernels.peers import batch, close, cps_mean, flow_mean, gaussian_log_prob, recording, sd3_scheduler


@pytest.mark.parametrize("dynamics", unirl.STRATEGIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.in_ci(2)
def test_unirl_takes_the_step_of_the_formula(dynamics, dtype):
    """At σ = 1 with the default σ_max of 0.99, not with the schedule's σ_1."""
    module = stand_ins.module(stand_ins.UNIRL)
    assert unirl.patch(module) == ["StepStrategy.denoise"]
    strategy, (x, v) = getattr(module, dynamics)(), (tensor.to(dtype) for tensor in batch())
    torch.manual_seed(4)
    taken, log_prob, mean = strategy.denoise(v, x, torch.tensor(1.0), torch.tensor(0.8), eta=0.6)
    torch.manual_seed(4)
    noise = torch.randn(x.shape).double()
    if dynamics == "CPSSDEStrategy":
        std = 0.8 * torch.sin(torch.tensor(0.3 * torch.pi)).double()
        expected = cps_mean(x, v, 1.0, 0.8, std)
    else:
        diffusion = 0.6 * (10 if dynamics == "FlowSDEStrategy" else 1)
        std, expected = diffusion * 0.2**0.5, flow_mean(x, v, 1.0, 0.8, diffusion)
    close(mean, expected, rtol=2e-5, atol=2e-5)
    stored = (expected + std * noise).to(dtype)
    close(taken, stored, rtol=2e-5 if dtype == torch.float32 else 2**-7)
    assert torch.equal(taken.to(dtype).float(), taken)
    again = strategy.denoise(
        v, x, torch.tensor([1.0] * 3), torch.tensor([0.8] * 3), eta=0.6, prev_sample=taken.to(dtype)
    )
    assert torch.equal(again[1], log_prob)
    if dtype != torch.float32:  # what is given unrounded is scored as it would have been stored
        given = strategy.denoise(v, x, torch.tensor(1.0), torch.tensor(0.8), eta=0.6, prev_sample=taken * (1 + 1e-4))
        assert torch.equal(given[0], taken)
        assert torch.equal(given[1], log_prob)
    if dynamics != "CPSSDEStrategy":
        close(log_prob, gaussian_log_prob(taken, expected, float(std)), rtol=1e-4, atol=1e-4)


def test_unirl_runs_the_original_for_strategies_with_a_step_of_their_own():
    module = stand_ins.module(stand_ins.UNIRL)
    own = type("Own", (module.FlowSDEStrategy,), {"compute_log_prob": lambda self, d, s: d.flatten(1).sum(1)})
    namesake = type("FlowSDEStrategy", (module.Euler,), {"__module__": "elsewhere"})
    x, v = batch()
    calls = [(cls(), v, x, torch.tensor(0.7), torch.tensor(0.5)) for cls in (own, namesake, module.Euler)]
    expected = []
    for strategy, *call in calls:
        torch.manual_seed(1)
        expected.append(strategy.denoise(*call, eta=0.5, step_index=2))
    unirl.patch(module)
    for (strategy, *call), want in zip(calls, expected):
        torch.manual_seed(1)
        for got, value in zip(strategy.denoise(*call, eta=0.5, step_index=2), want):
            assert got is value is None or torch.equal(got, value)
    unirl.unpatch(module)
    with pytest.raises(ValueError, match=r"Own is none of FlowSDEStrategy, .*: patch its module first"):
        unirl.denoise(calls[0][0], *calls[0][1:])


def test_unirl_steps_without_noise_have_no_log_prob_and_are_not_rounded():
    module = stand_ins.module(stand_ins.UNIRL)
    unirl.patch(module)
    x, v = (tensor.bfloat16() for tensor in batch())
    taken, log_prob, _ = module.FlowSDEStrategy().denoise(v, x, torch.tensor(0.7), torch.tensor(0.5), eta=0.0)
    assert log_prob is None
    close(taken, x.double() - 0.2 * v.double(), atol=1e-6)


@pytest.fixture
def verl_scheduler():
    pytest.importorskip("diffusers")
    module = stand_ins.module(stand_ins.VERL_OMNI)
    assert verl_omni.patch(module) == ["FlowMatchSDEDiscreteScheduler.sample_previous_step"]
    scheduler = module.FlowMatchSDEDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    return scheduler


@pytest.mark.parametrize(("sde_type", "name"), [("sde", "flow_sde_flow_grpo"), ("cps", "flow_cps_adv_grpo")])
@pytest.mark.parametrize("t", range(9))
def test_verl_omni_gives_the_recorded_values(verl_scheduler, sde_type, name, t):
    """The recordings are Flow-GRPO's and Adv-GRPO's of the same dynamics and schedule."""
    step = recording(f"{name}.npz", t)
    settings = {"noise_level": step.noise_level, "prev_sample": step.next_latents, "sde_type": sde_type}
    timestep = verl_scheduler.timesteps[t].expand(3)
    got = verl_scheduler.sample_previous_step(step.latents, step.velocity, timestep, return_sqrt_dt=True, **settings)
    close(got[1], step.log_prob, rtol=1e-5, atol=2e-6)
    close(got[2], step.mean)
    close(got[3], step.std_dev_t.view(3, 1, 1, 1), rtol=1e-5, atol=0)
    close(got[4], (step.sigma - step.sigma_next).sqrt().expand(3), rtol=1e-5)


def test_verl_omni_takes_the_scheduler_s_own_step_and_any_level_per_row(verl_scheduler):
    x, v = batch()
    verl_scheduler.set_begin_index(4)
    verl_scheduler._init_step_index(verl_scheduler.timesteps[4])
    own = verl_scheduler.sample_previous_step(x, v, prev_sample=x, sde_type="dance_sde", return_sqrt_dt=True)
    rows = verl_scheduler.timesteps[4].expand(3)
    given = verl_scheduler.sample_previous_step(x, v, rows, prev_sample=x, sde_type="dance_sde", return_sqrt_dt=True)
    assert torch.equal(own[1], given[1])
    assert (own[3].shape, given[3].shape, own[4].shape) == ((), (3, 1, 1, 1), (3,))
    levels = torch.tensor([0.2, 0.5, 0.9])
    together = verl_scheduler.sample_previous_step(x, v, rows, noise_level=levels.view(3, 1, 1, 1), prev_sample=x)
    for i, level in enumerate(levels.tolist()):
        part = slice(i, i + 1)
        alone = verl_scheduler.sample_previous_step(
            x[part], v[part], rows[part], noise_level=level, prev_sample=x[part]
        )
        close(together[1][part], alone[1])


def test_verl_omni_refuses_what_the_original_refuses(verl_scheduler):
    x, v = batch()
    with pytest.raises(ValueError, match="sde_type must be one of"):
        verl_scheduler.sample_previous_step(x, v, verl_scheduler.timesteps[:1], sde_type="ode")
    with pytest.raises(ValueError, match=r"model_output must be float32, got torch.bfloat16"):
        verl_scheduler.sample_previous_step(x, v.bfloat16(), verl_scheduler.timesteps[:1])
    with pytest.raises(NotImplementedError, match="per_token_timesteps"):
        verl_scheduler.sample_previous_step(x, v, verl_scheduler.timesteps[:1], per_token_timesteps=x)


def test_miles_has_a_function_of_its_own_beside_flow_grpos():
    sources = {
        "miles": "__path__ = []",
        "miles__utils": "__path__ = []",
        "miles__utils__sde_log_prob": stand_ins.MILES,
        "actor": "from miles.utils.sde_log_prob import sde_step_with_logprob",
        "vendored": stand_ins.FLOW_GRPO,
    }
    step = recording("flow_sde_flow_grpo.npz", 2)
    with stand_ins.imported(**sources) as (*_, home, actor, vendored):
        assert miles_diffusion.patch(home) == miles_diffusion.patch(vendored) == ["sde_step_with_logprob"]
        scheduler = sd3_scheduler()
        rows = scheduler.timesteps[2].expand(3)
        got = actor.sde_step_with_logprob(scheduler, step.velocity, rows, step.latents, step.next_latents, 0.7)
        close(got[1], step.log_prob, rtol=1e-5, atol=2e-6)
        with pytest.raises(ValueError, match="prev_sample must be the recorded next latents"):
            actor.sde_step_with_logprob(scheduler, step.velocity, rows, step.latents, None)
        assert vendored.sde_step_with_logprob(scheduler, step.velocity, rows, step.latents)[1].shape == (3,)
