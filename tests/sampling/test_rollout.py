"""Initial noise and windows of the rollout: per image or per prompt, in every order, exact, resumed, split anyhow.

Bugs planted in a copy, each seen red: the noise of a prompt for every image with per_image; noise keyed by the row in
the micro-batch; the prefix shared although every image has its own noise; a contiguous window drawn past the range's
end; a sliding window that never starts over; an untrained step in the loss's mean; the KL divided by the length; one
kernel per norm claimed without triton; ADVGRPO_KERNELS_BACKEND not looked at; the ops called off with --no-fast.
"""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from advgrpo import config
from advgrpo.config.sections import WindowSection
from advgrpo.errors import UserError
from advgrpo.runtime.distributed import SLOW_SECONDS, Distributed
from advgrpo.runtime.mesh import Mesh
from advgrpo.sampling.dynamics import step_table
from advgrpo.sampling.sampler import Sampler
from advgrpo.training.fast import FastPaths
from advgrpo.training.run import Run
from advgrpo_kernels import gaussian_step
from tests.parts import some_weekly, steps_of

GOLDEN = Path(__file__).parents[1] / "golden"
NOISE = ("per_image", "shared")
WINDOWS = {
    "random": {"order": "random"},
    "contiguous": {"order": "contiguous"},
    "sliding": {"order": "sliding", "slide_every": 1},
    "fixed": {"order": "fixed", "steps": [0, 1]},
}


def changed(settings, **rollout):
    return config.build(config.merge(settings.model_dump(mode="json"), {"rollout": rollout}), "test")


def build(settings) -> Run:
    settings.data.held_out_prompts = ""
    return Run(settings, Distributed.start("cpu"), resume=False, console=Console(quiet=True))


def without_times(metrics: dict) -> dict:
    return {name: value for name, value in metrics.items() if "second" not in name}


def rollout_of(trainer, iteration=0):
    table = trainer.objective.table(iteration)
    return trainer.objective.rollout(table, iteration)


def by_image(*rollouts) -> dict[int, list[torch.Tensor]]:
    """Image number -> its image, and what the window's steps hold of it."""
    found = {}
    for micro_batch in (micro_batch for rollout in rollouts for micro_batch in rollout.micro_batches):
        for place, number in enumerate(micro_batch.micro_batch.image_ids.tolist()):
            rows = [micro_batch.micro_batch.row[place] if step.shared else place for step in micro_batch.steps]
            latents = [step.latents[row] for step, row in zip(micro_batch.steps, rows)]
            found[number] = [micro_batch.images[place], *latents, *(step.log_prob[place] for step in micro_batch.steps)]
    return found


@pytest.mark.parametrize("fast", [True, False])
def test_images_of_a_prompt_start_from_their_own_noise_or_from_one(unit_config, fast):
    """A window at step 0 records the initial noise itself."""
    first = {}
    for noise in NOISE:
        settings = changed(unit_config, initial_noise=noise, window=WINDOWS["fixed"])
        settings.fast = fast
        found = by_image(rollout_of(build(settings).trainer))
        first[noise] = [found[number][1] for number in range(8)]
    for group in (range(4), range(4, 8)):
        for one in group:
            for other in group:
                assert torch.equal(first["shared"][one], first["shared"][other])
                assert torch.equal(first["per_image"][one], first["per_image"][other]) == (one == other)
    assert not torch.equal(first["shared"][0], first["shared"][4])
    every = torch.stack(first["per_image"])
    assert abs(every.mean().item()) < 0.02
    assert every.std().item() == pytest.approx(1, abs=0.02)


def test_the_start_and_the_steps_of_every_iteration_draw_from_seeds_of_their_own(unit_config):
    """One seed for both would repeat the start's noise in a window's first step."""
    trainer, seeds = build(unit_config).trainer, set()
    sampler = trainer.objective.sampler
    initial, run = sampler.initial_latents, sampler.run
    sampler.initial_latents = lambda seed, ids: seeds.add(seed) or initial(seed, ids)
    sampler.run = lambda *parts, noise_seed, **ids: seeds.add(noise_seed) or run(*parts, noise_seed=noise_seed, **ids)
    for iteration in range(3):
        rollout_of(trainer, iteration)
    assert len(seeds) == 6


def test_every_step_of_a_window_draws_its_own_noise(unit_config, monkeypatch):
    """The kernels key noise by the step's number: with one number the steps would add up along one direction."""
    trainer, steps = build(changed(unit_config, window=WINDOWS["fixed"])).trainer, []

    def spy(*tensors, step, seed=None, **settings):
        steps.append(None if seed is None else int(step))
        return gaussian_step(*tensors, step=step, seed=seed, **settings)

    monkeypatch.setattr("advgrpo.sampling.sampler.gaussian_step", spy)
    rollout_of(trainer)
    assert set(steps) == {0, 1, None}, "the window's two, and those without noise"


@pytest.mark.parametrize("noise", some_weekly(NOISE, ["per_image"]))
def test_every_order_is_on_policy_and_resumes_bit_for_bit(unit_config, noise):
    unit_config.update.learning_rate = 1e-2  # weights that matter after a step
    settings = changed(unit_config, initial_noise=noise)
    going, resumed = build(settings).trainer, build(settings).trainer
    for window in WINDOWS.values():
        going.objective.settings.window = resumed.objective.settings.window = WindowSection(**window)
        tensors, state = copy.deepcopy(going.state())
        metrics = [going.iterate(), going.iterate()]
        for row in metrics:
            assert row["log_prob_mismatch_max"] == 0
            assert row["pre_update_clip_fraction"] == 0
            assert row["grad_norm"] > 0
        resumed.load(tensors, state)
        again = [resumed.iterate(), resumed.iterate()]
        assert list(map(without_times, again)) == list(map(without_times, metrics))
        weights = [[p for _, p in trainer.policy.trainable_parameters()] for trainer in (going, resumed)]
        assert all(torch.equal(*pair) for pair in zip(*weights, strict=True))


@pytest.mark.parametrize(
    ("noise", "shares"), [("per_image", [4, 4]), ("shared", [4, 2, 2]), ("shared", [2, 2, 2, 2, 0])]
)
def test_several_processes_sample_what_one_does(unit_config, noise, shares):
    settings = changed(unit_config, initial_noise=noise, micro_batch=2, window=WINDOWS["contiguous"])
    trainer = build(settings).trainer
    alone = by_image(rollout_of(trainer))
    parts = []
    for rank in range(len(shares)):
        trainer.objective.micro_batches.mesh = Mesh(rank, len(shares))
        parts.append(rollout_of(trainer))
    assert [len(part.image_ids) for part in parts] == shares
    together = by_image(*parts)
    assert together.keys() == alone.keys() == set(range(8))
    for number in alone:
        assert all(torch.equal(*pair) for pair in zip(alone[number], together[number], strict=True))


def test_who_draws_with_others_may_wait_for_what_they_judge(unit_config, monkeypatch):
    """Those of a sequence group take turns in decoding and judging; who does not waits in the next exchange."""
    objective, told = build(changed(unit_config, micro_batch=4)).trainer.objective, []
    progress = lambda what, *, within_seconds=None: told.append((what, within_seconds))  # noqa: E731
    monkeypatch.setattr(objective.distributed, "progress", progress)
    for mesh, seconds in ((Mesh(), None), (Mesh(0, 2, 2), SLOW_SECONDS), (Mesh(1, 2, 2), SLOW_SECONDS)):
        told.clear()
        objective.micro_batches.mesh = mesh
        found = objective.rollout(objective.table(0), 0).micro_batches
        assert told == [(f"sample: micro-batch {number} of 2", seconds) for number in (1, 2)]
        turns = [mesh.world_size == 1 or place == mesh.rank for place in range(2)]
        assert [len(each.images) > 0 for each in found] == [each.micro_batch.judged for each in found] == turns


def test_other_micro_batches_sample_the_same_images(unit_config):
    found = []
    for micro in (2, 8):
        settings = changed(unit_config, initial_noise="per_image", micro_batch=micro, window=WINDOWS["fixed"])
        settings.update.minibatches = 1
        found.append(by_image(rollout_of(build(settings).trainer)))
    for number in range(8):
        (image, noise, *_), (other_image, other_noise, *_) = (images[number] for images in found)
        assert torch.equal(noise, other_noise)
        torch.testing.assert_close(image, other_image, rtol=1e-4, atol=1e-4)


def test_the_prefix_is_shared_with_shared_noise_only_and_the_table_says_so(unit_config):
    cpu = torch.device("cpu")
    for noise in NOISE:
        fast = FastPaths.choose(changed(unit_config, initial_noise=noise), cpu)
        row = next(row for row in fast.table if row.name == "shared prefix")
        assert fast.share_prefix == row.on == (noise == "shared")
        assert row.on or "rollout.initial_noise = per_image" in row.why
    with pytest.raises(ValueError, match="share_prefix needs shared_noise"):
        Sampler(None, 1.0, "gaussian", share_prefix=True, merged=False, shared_noise=False)


def ten_steps(settings, **window):
    return changed(settings, num_steps=10, window={"noise_range": [0.5, 1.0], **window})


def test_contiguous_windows_are_consecutive_and_reach_both_ends_of_the_range(unit_config):
    settings = ten_steps(unit_config, order="contiguous", size=2)
    windows = [steps_of(settings, i) for i in range(60)]
    assert windows == [steps_of(settings, i) for i in range(60)]  # of seed and iteration alone
    assert set(windows) == {(0, 1), (1, 2), (2, 3), (3, 4)}
    settings.seed += 1
    assert windows != [steps_of(settings, i) for i in range(60)]
    whole = ten_steps(unit_config, order="contiguous", size=5)
    assert {steps_of(whole, i) for i in range(9)} == {(0, 1, 2, 3, 4)}


@pytest.mark.parametrize(
    ("name", "window"),
    [
        ("sliding", {"slide_every": 3, "slide_by": 1}),
        ("strided", {"slide_every": 2, "slide_by": 2}),
        ("apart", {"slide_every": 2, "slide_by": 4}),
    ],
)
def test_sliding_windows_are_mix_grpos_but_for_those_that_its_range_cuts_short(unit_config, name, window):
    golden = np.load(GOLDEN / "windows_mix_grpo.npz")[name].tolist()
    theirs = [tuple(range(first, last + 1)) for first, last in golden if last - first == 3]
    window = {"order": "sliding", "size": 4, "noise_range": [0.0, 1.0], **window}
    settings = changed(unit_config, num_steps=10, dynamics="flow_sde", likelihood="gaussian", window=window)
    assert [steps_of(settings, iteration) for iteration in range(len(theirs))] == theirs
    assert len(set(theirs)) >= 2


def test_contiguous_windows_are_those_that_mix_grpo_draws(unit_config):
    theirs = {tuple(range(first, last + 1)) for first, last in np.load(GOLDEN / "windows_mix_grpo.npz")["random"]}
    window = {"order": "contiguous", "size": 4, "noise_range": [0.0, 1.0]}
    settings = changed(unit_config, num_steps=10, dynamics="flow_sde", likelihood="gaussian", window=window)
    assert {steps_of(settings, iteration) for iteration in range(200)} == theirs


def test_a_sliding_window_goes_from_noise_to_image_and_starts_over(unit_config):
    settings = ten_steps(unit_config, order="sliding", size=2, slide_every=3, slide_by=1)
    expected = [(0, 1), (1, 2), (2, 3), (3, 4), (0, 1)]
    assert [steps_of(settings, i) for i in range(15)] == [window for window in expected for _ in range(3)]
    strides = ten_steps(unit_config, order="sliding", size=2, slide_every=1, slide_by=2)
    assert [steps_of(strides, i) for i in range(4)] == [(0, 1), (2, 3), (0, 1), (2, 3)]


def test_an_order_of_yore_means_what_it_meant(unit_config):
    """Unset, `order` is random, or fixed where steps are given."""
    plain, named = ten_steps(unit_config), ten_steps(unit_config, order="random")
    assert [steps_of(plain, i) for i in range(30)] == [steps_of(named, i) for i in range(30)]
    assert any(second > first + 1 for first, second in (steps_of(plain, i) for i in range(30)))
    assert steps_of(ten_steps(unit_config, steps=[3, 1]), 7) == (1, 3)


@pytest.mark.parametrize(
    ("window", "expected"),
    [
        ({"order": "fixed"}, "rollout.window.steps = None: want distinct steps within 0..8"),
        ({"order": "sliding", "steps": [0, 1]}, "rollout.window.steps = [0, 1] would not be looked at"),
        ({"order": "contiguous", "size": 6}, "fewer than size = 6; widen noise_range"),
        ({"order": "fixed", "steps": [0], "train_share": 0.5}, "rollout.window.train_share = 0.5 of a window of 1"),
    ],
)
def test_a_window_that_cannot_be_is_named(unit_config, window, expected):
    with pytest.raises(UserError) as error:
        config.check(ten_steps(unit_config, **window))
    assert expected in str(error.value)


def test_steps_beyond_the_trained_share_are_noisy_but_not_in_the_loss(unit_config):
    """Flow-GRPO's timestep_fraction: the loss is the mean over the trained steps."""
    advantages, images, gradients = torch.linspace(-1, 1, 8), [], []
    for share in (1.0, 0.7):
        window = {"order": "fixed", "steps": [0, 1, 2], "train_share": share}
        settings = changed(unit_config, dynamics="flow_sde", likelihood="gaussian", eta=0.7, window=window)
        trainer = build(settings).trainer
        table = step_table(trainer.policy, 4, (0, 1, 2), rollout=settings.rollout)
        micro_batch = trainer.objective.rollout(table, 0).micro_batches[0]
        images.append(micro_batch.images)
        assert [step.step for step in micro_batch.steps] == [0, 1, 2][: len(table.trained)]
        micro_batch.steps = micro_batch.steps[:2]
        stats = trainer.updater.accumulate([micro_batch], advantages, table, total=4, watch_kl=False)
        assert stats.max_mismatch() == 0
        gradients.append(torch.cat([p.grad.flatten() for _, p in trainer.policy.trainable_parameters()]))
    assert torch.equal(*images)
    assert len(table.trained) == 2
    torch.testing.assert_close(gradients[1], gradients[0] * 3 / 2)


@pytest.mark.parametrize(
    ("triton", "backend", "why"),
    [
        (True, "auto", ""),
        (True, "triton", ""),
        (False, "auto", "triton is not installed"),
        (True, "torch", "ADVGRPO_KERNELS_BACKEND = torch"),
    ],
)
def test_the_table_does_not_claim_what_a_gpu_machine_lacks(unit_config, monkeypatch, triton, backend, why):
    monkeypatch.setattr("advgrpo.training.fast.HAS_TRITON", triton)
    monkeypatch.setattr("advgrpo.training.fast.DEFAULT_BACKEND", backend)
    monkeypatch.setattr("advgrpo.training.fast.library", lambda: None)
    monkeypatch.setattr("advgrpo.training.fast.choose_attention", lambda *_, **__: None)  # tries it out on the device
    monkeypatch.setattr("advgrpo.training.fast.memory_gb", lambda device: 141.0)
    rows = {row.name: row for row in FastPaths.choose(unit_config, torch.device("cuda")).table}
    assert not rows["fused AdamW"].on
    assert "csrc/ is not built" in rows["fused AdamW"].why
    assert rows["Triton kernels"].on == (why == "")
    assert why in rows["Triton kernels"].why
    assert rows["fused transformer"].on
    assert ("one kernel per norm" in rows["fused transformer"].why) == (why == "")
    unit_config.fast = False  # by which the ops do not choose
    plain = {row.name: row for row in FastPaths.choose(unit_config, torch.device("cuda")).table}
    assert plain["Triton kernels"].on == (why == "")
    assert not plain["fused transformer"].on


@pytest.mark.parametrize("variance", ["step", "unit_time"])
def test_the_kl_divides_by_the_steps_variance_or_as_flow_grpos_code(unit_config, variance):
    """With advantages of 0 the loss is beta·mean((mu - mu_base)²)/(2·variance); Flow-GRPO's is std_dev_t²."""
    window = {"order": "fixed", "steps": [0, 2]}
    settings = changed(unit_config, dynamics="flow_sde", likelihood="gaussian", eta=0.7, window=window)
    settings.update.kl_weight, settings.update.kl_variance = 0.3, variance
    config.check(settings)
    trainer = build(settings).trainer
    policy, guidance = trainer.policy, settings.rollout.guidance_scale
    with torch.no_grad():
        for _, parameter in policy.trainable_parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)))
    table = step_table(policy, 4, (0, 2), rollout=settings.rollout)
    micro_batch = trainer.objective.rollout(table, 0).micro_batches[0]
    levels, steps = policy.schedule(4)[0], micro_batch.steps
    prompts = policy.prepare(policy.encode(micro_batch.micro_batch.prompts), table.timesteps, guidance=2.0).rows(
        micro_batch.micro_batch.row
    )
    for step in steps:
        micro_batch.steps = [step]
        loss, *_, pairs, _ = (
            trainer.updater.accumulate([micro_batch], torch.zeros(8), table, total=4, watch_kl=False).sums().tolist()
        )
        latents = step.latents[micro_batch.micro_batch.row] if step.shared else step.latents
        with torch.no_grad():
            own = policy.predict(latents, table.numbers[step.step], prompts)
            with policy.disable_adapter():
                base = policy.predict(latents, table.numbers[step.step], prompts)
        difference = [(1 - guidance) * v[1] + guidance * v[0] for v in (own, base)]
        sigma, after = levels[step.step].item(), levels[step.step + 1].item()
        std = 0.7 * (sigma / (1 - (levels[1].item() if sigma == 1 else sigma))) ** 0.5
        gap = table.coefficients[step.step, 1] * (difference[0] - difference[1])
        divisor = 2 * std**2 * (1 if variance == "unit_time" else sigma - after)
        expected = 0.3 * gap.square().mean().item() / divisor
        assert loss / pairs == pytest.approx(expected, rel=1e-3)
        assert expected > 0


def test_a_kl_per_unit_of_time_needs_the_gaussian_likelihood(unit_config):
    unit_config.update.kl_variance = "unit_time"
    with pytest.raises(UserError, match=r"update\.kl_variance = 'unit_time' divides"):
        config.check(unit_config)
