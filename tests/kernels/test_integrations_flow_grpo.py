"""Flow-GRPO's step as its pipeline and its trainer call it, against recordings, plain formulas and torch's noise.

Planted bugs that turned this file red: s returned for std_dev_t, no noise drawn at level 0, a list of generators
reduced to its first, a cache blind to in-place changes, a detached mean, one row's coefficients for the batch, a
missing timestep taken for the last, an unpatch that leaves its mark.
"""

import inspect

import numpy as np
import pytest
import torch

from advgrpo_kernels.integrations import (
    _statistics,
    _transition,
    adv_grpo,
    dance_grpo,
    flow_factory,
    flow_grpo,
    miles_diffusion,
    mix_grpo,
    unirl,
    verl_omni,
)
from tests.kernels import stand_ins
from tests.kernels.peers import (
    batch,
    close,
    cps_mean,
    flow_mean,
    gaussian_log_prob,
    module_with,
    recording,
    sd3_scheduler,
)


@pytest.mark.parametrize("t", range(10))
def test_training_call_gives_the_recorded_values(t):
    """Trainer: the recorded transition is evaluated, log_prob and mean carry gradients to the velocity."""
    scheduler, step = sd3_scheduler(), recording("flow_sde_flow_grpo.npz", t)
    velocity = step.velocity.clone().requires_grad_()
    timestep = scheduler.timesteps[t].expand(3)
    got = flow_grpo.sde_step_with_logprob(
        scheduler, velocity, timestep, step.latents, noise_level=step.noise_level, prev_sample=step.next_latents
    )
    assert got[0] is step.next_latents
    close(got[1].detach(), step.log_prob, rtol=1e-5, atol=2e-6)
    close(got[2].detach(), step.mean)
    close(got[3], step.std_dev_t.view(3, 1, 1, 1), rtol=1e-5, atol=0)
    (grad,) = torch.autograd.grad(got[1].sum(), velocity, retain_graph=True)
    close(grad, step.grad_velocity, rtol=1e-4, atol=2e-4 * step.grad_velocity.abs().max().item())
    (grad,) = torch.autograd.grad(got[2].sum(), velocity)
    now, after, g = (x.item() for x in (step.sigma, step.sigma_next, step.std_dev_t[0]))
    close(grad, torch.full_like(grad, (after - now) * (1 + g**2 * (1 - now) / (2 * now))), rtol=1e-5, atol=0)


@pytest.mark.parametrize("sde_type", ["sde", "cps"])
@pytest.mark.parametrize("t", range(10))
def test_sampling_call_takes_the_step_of_the_formula_with_torchs_noise(sde_type, t):
    """Pipeline: one timestep for the batch, a generator, no gradient."""
    scheduler, (x, v) = sd3_scheduler(), batch()
    with torch.no_grad():
        got = flow_grpo.sde_step_with_logprob(
            scheduler,
            v.bfloat16(),
            scheduler.timesteps[t].unsqueeze(0),
            x,
            noise_level=0.8,
            generator=torch.Generator().manual_seed(5),
            sde_type=sde_type,
            return_sqrt_dt=True,
        )
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(5)).double()
    sigmas = scheduler.sigmas.double().tolist()
    now, after = sigmas[t], sigmas[t + 1]
    if sde_type == "sde":
        diffusion = 0.8 * np.sqrt(now / (1 - (sigmas[1] if now == 1 else now)))
        mean, std = flow_mean(x, v.bfloat16(), now, after, diffusion), diffusion * np.sqrt(now - after)
        log_prob = gaussian_log_prob(mean + std * noise, mean, std)
    else:
        diffusion = std = after * np.sin(0.8 * np.pi / 2)
        mean = cps_mean(x, v.bfloat16(), now, after, std)
        log_prob = -(std * noise).square().flatten(1).mean(1)
    close(got[0], mean + std * noise)
    close(got[1], log_prob, rtol=1e-4, atol=1e-6)
    close(got[2], mean)
    assert got[3].shape == got[4].shape == (1, 1, 1, 1)
    assert got[3].item() == pytest.approx(diffusion, rel=1e-5)
    assert got[4].item() == pytest.approx(np.sqrt(now - after), rel=1e-5)


def test_sampled_and_trained_log_prob_are_the_same_bits():
    scheduler, (x, v) = sd3_scheduler(), batch()
    with torch.no_grad():
        taken = flow_grpo.sde_step_with_logprob(scheduler, v, scheduler.timesteps[1:2], x)
    again = flow_grpo.sde_step_with_logprob(
        scheduler, v.requires_grad_(), scheduler.timesteps[1].expand(3), x, prev_sample=taken[0]
    )
    assert torch.equal(taken[1], again[1])
    assert torch.equal(taken[2], again[2])


def test_rows_may_be_at_different_steps():
    scheduler, (x, v) = sd3_scheduler(), batch()
    together = flow_grpo.sde_step_with_logprob(scheduler, v, scheduler.timesteps[[4, 0, 9]], x, prev_sample=v)
    for i, t in enumerate((4, 0, 9)):
        row = (v[i : i + 1], scheduler.timesteps[t : t + 1], x[i : i + 1])
        alone = flow_grpo.sde_step_with_logprob(scheduler, *row, prev_sample=v[i : i + 1])
        assert torch.equal(together[1][i : i + 1], alone[1])
        assert torch.equal(together[3][i : i + 1], alone[3])


def test_noise_level_zero_is_the_ode_step_and_still_draws():
    """Flow-GRPO-Fast's steps outside the window: no density (NaN, as in the original), the generator moves on."""
    scheduler, (x, v) = sd3_scheduler(), batch()
    generator = torch.Generator().manual_seed(2)
    got = flow_grpo.sde_step_with_logprob(scheduler, v, scheduler.timesteps[3:4], x, 0.0, None, generator)
    dt = scheduler.sigmas[4] - scheduler.sigmas[3]
    close(got[0], x + dt * v)
    assert got[1].isnan().all()
    reference = torch.Generator().manual_seed(2)
    torch.randn(x.shape, generator=reference)
    assert torch.equal(torch.randn(4, generator=generator), torch.randn(4, generator=reference))


def test_a_step_without_noise_stops_a_training_that_would_use_it():
    """The original has an infinite gradient there; a gradient of 0 would pass unseen."""
    scheduler, (x, v) = sd3_scheduler(), batch()
    call = (scheduler, v.requires_grad_(), scheduler.timesteps[3:4], x, 0.0, x)
    (grad,) = torch.autograd.grad(flow_grpo.sde_step_with_logprob(*call)[1].sum(), v)
    assert not grad.isfinite().any()


@pytest.mark.parametrize("sde_type", ["sde", "cps"])
def test_noise_levels_may_be_tensors(sde_type):
    scheduler, (x, v) = sd3_scheduler(), batch()

    def step(rows, level):
        timestep = scheduler.timesteps[[1, 4, 7]][rows]
        return flow_grpo.sde_step_with_logprob(scheduler, v[rows], timestep, x[rows], level, x[rows], None, sde_type)

    everything = slice(0, 3)
    for got, want in zip(step(everything, torch.tensor(0.5)), step(everything, 0.5)):
        assert torch.equal(got, want)
    levels = torch.tensor([0.2, 0.5, 1.3])  # above 1 flow_cps has a value too
    together = step(everything, levels.view(3, 1, 1, 1))
    for i, level in enumerate(levels.tolist()):
        for got, want in zip(together, step(slice(i, i + 1), level)):
            close(got[i : i + 1], want, rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match=r"noise_level must be a number or one per row, \[B, 1, ...\]"):
        step(everything, levels)


@pytest.mark.parametrize("kind", ["none", "one", "list", "list of one"])
def test_noise_is_diffusers_randn_tensor(kind):
    randn_tensor = pytest.importorskip("diffusers.utils.torch_utils").randn_tensor

    def generators():
        made = [torch.Generator().manual_seed(seed) for seed in (7, 8, 9)]
        return {"none": None, "one": made[0], "list": made, "list of one": made[:1]}[kind]

    torch.manual_seed(1)
    expected = randn_tensor((3, 2, 5), generator=generators(), device=torch.device("cpu"), dtype=torch.float32)
    torch.manual_seed(1)
    got = _transition.torch_noise((3, 2, 5), generators(), torch.device("cpu"), torch.float32)
    assert torch.equal(got, expected)


def test_schedule_changes_are_seen():
    scheduler, (x, v) = sd3_scheduler(), batch()
    first = flow_grpo.sde_step_with_logprob(scheduler, v, scheduler.timesteps[2:3], x, prev_sample=v)
    scheduler.set_timesteps(4)
    second = flow_grpo.sde_step_with_logprob(scheduler, v, scheduler.timesteps[2:3], x, prev_sample=v)
    scheduler.sigmas[2] *= 1.01
    third = flow_grpo.sde_step_with_logprob(scheduler, v, scheduler.timesteps[2:3], x, prev_sample=v)
    assert len({step[3].item() for step in (first, second, third)}) == 3


def test_bad_arguments_raise():
    scheduler, (x, v) = sd3_scheduler(), batch()
    with pytest.raises(IndexError, match="is not among the scheduler's"):
        flow_grpo.sde_step_with_logprob(scheduler, v, torch.tensor([123.0]), x)
    with pytest.raises(ValueError, match="differentiable in the model output only"):
        flow_grpo.sde_step_with_logprob(scheduler, v, scheduler.timesteps[:1], x.clone().requires_grad_())
    with pytest.raises(ValueError, match="sde_type must be"):
        flow_grpo.sde_step_with_logprob(scheduler, v, scheduler.timesteps[:1], x, sde_type="ode")
    with pytest.raises(ValueError, match="a list of 3, one per image"):
        flow_grpo.sde_step_with_logprob(scheduler, v, scheduler.timesteps[:1], x, generator=[torch.Generator()] * 2)


STEP = "self model_output timestep sample noise_level=0.7 prev_sample=None generator=None"
FLUX = "model_output latents eta sigmas index prev_sample"


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (flow_grpo.sde_step_with_logprob, f"{STEP} sde_type='sde' return_sqrt_dt=False"),
        (_statistics.update_with_dists, "self prompts rewards dists=None type='grpo'"),
        (_statistics.update, "self prompts rewards type='grpo'"),
        (adv_grpo.sde_step_with_logprob, STEP),
        (adv_grpo.sde_step_with_logprob_new, STEP),
        (dance_grpo.flux_step, f"{FLUX} grpo sde_solver"),
        (mix_grpo.dance_grpo_step, f"{FLUX} grpo sde_solver sde_type='sde' noise_level=None"),
        (
            miles_diffusion.sde_step_with_logprob,
            "scheduler model_output timestep sample prev_sample noise_level=0.7",
        ),
        (
            verl_omni.sample_previous_step,
            "self sample model_output timestep=None generator=None per_token_timesteps=None noise_level=0.7 "
            "prev_sample=None sde_type='sde' return_logprobs=True return_sqrt_dt=False include_logprob_normalizer=True",
        ),
        (
            unirl.denoise,
            "self noise_pred sample sigma sigma_next eta=1.0 prev_sample=None sigma_max=0.99 step_index=0",
        ),
        (
            mix_grpo.flow_grpo_step,
            f"{FLUX} generator=None determistic=False sde_type='sde' noise_level=None",
        ),
        (
            flow_factory.step,
            "self noise_pred timestep latents next_latents=None timestep_next=None generator=None noise_level=None "
            "compute_log_prob=True return_dict=True return_kwargs=['next_latents', 'next_latents_mean', 'std_dev_t', "
            "'dt', 'log_prob', 'noise_pred'] dynamics_type=None sigma_max=None",
        ),
    ],
)
def test_signatures_are_the_public_ones(ours, theirs):
    """Names, order and defaults as in the public repositories, late 2026."""
    parameters = inspect.signature(ours).parameters.values()
    names = [p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in parameters]
    assert " ".join(names) == theirs


@pytest.mark.parametrize("source", [stand_ins.FLOW_GRPO, stand_ins.EARLY_FLOW_GRPO], ids=["2026", "2025"])
def test_patch_replaces_logs_and_is_reversible(source, caplog):
    module = stand_ins.module(source)
    original, helper = module.sde_step_with_logprob, module.rows
    with caplog.at_level("INFO", "advgrpo_kernels.integrations"):
        assert flow_grpo.patch(module) == ["sde_step_with_logprob"]
    assert "peer.sde_step_with_logprob -> advgrpo_kernels.integrations.flow_grpo.sde_step_with_logprob (" in caplog.text
    assert module.sde_step_with_logprob.__code__ is flow_grpo.sde_step_with_logprob.__code__
    with pytest.raises(RuntimeError, match="patched already"):
        flow_grpo.patch(module)
    flow_grpo.unpatch(module)
    assert module.sde_step_with_logprob is original
    assert module.rows is helper
    assert not [name for name in vars(module) if "advgrpo" in name]
    with pytest.raises(RuntimeError, match="is not patched"):
        flow_grpo.unpatch(module)


def test_unpatch_refuses_what_was_replaced_again():
    module = stand_ins.module(stand_ins.FLOW_GRPO)
    original = module.sde_step_with_logprob
    flow_grpo.patch(module)
    module.sde_step_with_logprob = original
    with pytest.raises(RuntimeError, match="replaced again"):
        flow_grpo.unpatch(module)


@pytest.mark.gpu
def test_a_step_does_not_synchronise():
    scheduler = module_with(sigmas=torch.tensor([1.0, 0.7, 0.4, 0.0], device="cuda"))
    scheduler.timesteps = scheduler.sigmas[:-1] * 1000
    x, v = (tensor.cuda() for tensor in batch())
    call = (scheduler, v, scheduler.timesteps[1:2], x)
    first = flow_grpo.sde_step_with_logprob(*call)  # reads the schedule once
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = flow_grpo.sde_step_with_logprob(*call, prev_sample=first[0])
        flow_grpo.sde_step_with_logprob(*call, generator=torch.Generator("cuda"))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(first[1], again[1])
    missing = flow_grpo.sde_step_with_logprob(scheduler, v, scheduler.timesteps[1:2] + 1, x)
    assert missing[1].isnan().all()
