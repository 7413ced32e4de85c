"""Adv-GRPO's CPS step and advantage tracker as its trainer calls them, against recordings and plain formulas.

Planted bugs that turned this file red: CPS wired to the SDE's coefficients, eps 1e-8, group and global std swapped,
the first reward column used for all, history not kept, the gradient of a sampled step lost.
"""

import numpy as np
import pytest
import torch

from advgrpo_kernels.integrations import _statistics, adv_grpo, flow_grpo
from tests.kernels import stand_ins
from tests.kernels.peers import GOLDEN, batch, close, cps_mean, module_with, recording, sd3_scheduler


@pytest.fixture
def tracker_class():
    module = stand_ins.module(stand_ins.EARLY_TRACKER)
    assert adv_grpo.patch(module) == ["PerPromptStatTracker.update"]
    return module.PerPromptStatTracker


@pytest.mark.parametrize("t", range(10))
def test_cps_training_call_gives_the_recorded_values(t):
    """The last step has s = 0: its log-prob, the original's rounding errors (7e-9), is kept as -mean(d²) too."""
    scheduler, step = sd3_scheduler(), recording("flow_cps_adv_grpo.npz", t)
    velocity = step.velocity.clone().requires_grad_()
    got = adv_grpo.sde_step_with_logprob_new(
        scheduler,
        velocity,
        scheduler.timesteps[t].expand(3),
        step.latents,
        noise_level=step.noise_level,
        prev_sample=step.next_latents,
    )
    close(got[1].detach(), step.log_prob, rtol=1e-5, atol=1e-7)
    close(got[2].detach(), step.mean)
    close(got[3], step.std_dev_t.view(3, 1, 1, 1), rtol=1e-5, atol=1e-7)
    (grad,) = torch.autograd.grad(got[1].sum(), velocity)
    close(grad, step.grad_velocity, rtol=1e-4, atol=2e-4 * step.grad_velocity.abs().max().item() + 1e-9)


@pytest.mark.parametrize("t", range(10))
def test_cps_sampling_call_takes_the_step_of_the_formula(t):
    scheduler, (x, v) = sd3_scheduler(), batch()
    with torch.no_grad():
        got = adv_grpo.sde_step_with_logprob_new(
            scheduler, v, scheduler.timesteps[t : t + 1], x, 0.8, generator=torch.Generator().manual_seed(3)
        )
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(3)).double()
    now, after = scheduler.sigmas[t : t + 2].double().tolist()
    std = after * np.sin(0.8 * np.pi / 2)
    mean = cps_mean(x, v, now, after, std)
    close(got[0], mean + std * noise)
    close(got[1], -(std * noise).square().flatten(1).mean(1), rtol=1e-4, atol=1e-6)
    close(got[2], mean)


def test_flow_sde_step_is_flow_grpos():
    scheduler, step = sd3_scheduler(), recording("flow_sde_flow_grpo.npz", 2)
    call = (scheduler, step.velocity, scheduler.timesteps[2:3], step.latents, 0.7, step.next_latents)
    for ours, theirs in zip(adv_grpo.sde_step_with_logprob(*call), flow_grpo.sde_step_with_logprob(*call)):
        assert torch.equal(ours, theirs)


def test_gradient_through_a_sampled_step_reaches_the_velocity():
    """The originals return prev_sample with its graph; a caller that samples with gradients keeps them."""
    scheduler, (x, v) = sd3_scheduler(), batch()
    call = (scheduler, v.requires_grad_(), scheduler.timesteps[1:2], x, 0.8)
    got = adv_grpo.sde_step_with_logprob_new(*call, generator=torch.Generator().manual_seed(3))
    (grad,) = torch.autograd.grad(got[0].sum(), v)
    now, after = scheduler.sigmas[1:3].double().tolist()
    r = after * np.cos(0.8 * np.pi / 2)
    close(grad, torch.full_like(grad, -now * (1 - after) + (1 - now) * r), rtol=1e-5)
    with torch.no_grad():
        same = adv_grpo.sde_step_with_logprob_new(*call, generator=torch.Generator().manual_seed(3))
    close(got[0].detach(), same[0], atol=1e-6)


@pytest.mark.parametrize("global_std", [False, True])
def test_advantages_of_the_recording(tracker_class, global_std):
    golden = np.load(GOLDEN / "advantages_adv_grpo.npz")
    tracker = tracker_class(global_std)
    prompts = [f"prompt {i}" for i in golden["prompt_index"]]
    got = tracker.update(prompts, golden["rewards"])
    assert got.dtype == np.float64
    expected = golden["advantages_global_std" if global_std else "advantages_group_std"]
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)
    groups = len(set(prompts))
    assert tracker.get_stats() == (len(prompts) / groups, groups)
    assert len(tracker.history_prompts & {hash(prompt) for prompt in prompts}) == groups
    np.testing.assert_array_equal(tracker.stats["prompt 0"], golden["rewards"][golden["prompt_index"] == 0])


def test_rewards_repeated_over_timesteps_keep_their_shape(tracker_class):
    """The trainers hand in [B, T] rewards; statistics are those of a column."""
    rewards = np.random.default_rng(0).normal(size=(6, 2))
    got = tracker_class().update(["a", "b", "a", "b", "a", "b"], rewards)
    assert got.shape == (6, 2)
    for column in range(2):
        of_a = rewards[::2, column]
        np.testing.assert_allclose(got[::2, column], (of_a - of_a.mean()) / (of_a.std() + 1e-4), rtol=1e-6)


def test_equal_rewards_give_exactly_zero(tracker_class):
    assert not tracker_class().update(["a"] * 3, [0.1] * 3).any()


def test_other_types_run_the_original_and_unpatch_restores_it():
    module = stand_ins.module(stand_ins.EARLY_TRACKER)
    original, tracker = module.PerPromptStatTracker.update, module.PerPromptStatTracker()
    with pytest.raises(ValueError, match="type must be 'grpo' unless"):
        _statistics.update(tracker, ["a"], [1.0], type="dpo")
    adv_grpo.patch(module)
    assert tracker.update(["a"], [1.0], type="dpo") == "original dpo"
    assert isinstance(tracker.update(["a"], [1.0]), np.ndarray)
    adv_grpo.unpatch(module)
    assert module.PerPromptStatTracker.update is original


def test_a_class_imported_by_two_modules_is_patched_once(caplog):
    """The importing module has nothing to undo, and says whose it is."""
    defining = stand_ins.module(stand_ins.EARLY_TRACKER, "defining")
    original = defining.PerPromptStatTracker.update
    importing = module_with(PerPromptStatTracker=defining.PerPromptStatTracker)
    adv_grpo.patch(defining)
    with caplog.at_level("INFO", "advgrpo_kernels.integrations"):
        assert adv_grpo.patch(importing) == []
    assert "replaced already through another module" in caplog.text
    with pytest.raises(RuntimeError, match="replaced through defining: unpatch that"):
        adv_grpo.unpatch(importing)
    adv_grpo.unpatch(defining)
    assert defining.PerPromptStatTracker.update is original


def test_bad_rewards_raise(tracker_class):
    tracker = tracker_class()
    with pytest.raises(ValueError, match=r"rewards must be \[2\]"):
        tracker.update(["a", "b"], [1.0])
    tracker.update(["a", "b"], [1.0, 2.0])
    with pytest.raises(ValueError, match=r"call clear\(\)"):
        tracker.update(["b", "c"], [1.0, 2.0])
    tracker.clear()
    tracker.update(["b", "c"], [1.0, 2.0])


def test_flow_grpos_tracker_takes_dists():
    module = stand_ins.module(stand_ins.DISTS_TRACKER)
    flow_grpo.patch(module)
    tracker = module.PerPromptStatTracker()
    assert tracker.update(["a"], [1.0], 7, type="gardo") == "original gardo 7"
    np.testing.assert_allclose(tracker.update(["a", "a"], [1.0, 3.0]), [-1, 1], rtol=1e-3)
