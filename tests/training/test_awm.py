"""Advantage-weighted matching: the loss of the public code, its gradient, whom a step is compared with, settings.

`awm_flow_factory.npz` was recorded by running X-GenGroup/Flow-Factory a0b2bc5a2b4fbf9125429b3fb70c0c5d7631047c,
src/flow_factory/trainers/awm.py: `AWMTrainer.optimize` as it stands (tests/peers/record_objectives.py).

Bugs planted in a copy, each seen red: tests/mutants/training-awm-*.patch.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from advgrpo import config
from advgrpo.errors import UserError
from advgrpo.runtime import rng
from advgrpo.training.awm import awm_loss, matching_log_prob
from advgrpo.training.model_card import _rewards
from advgrpo_kernels import philox_normal
from tests.sampling.test_rollout import rollout_of
from tests.training.test_nft import moved, parameters_of
from tests.training.test_supervised import build, change, rows

GOLDEN = Path(__file__).parents[1] / "golden" / "awm_flow_factory.npz"


@pytest.fixture
def settings(unit_config):
    return change(
        unit_config,
        update={"objective": "awm", "minibatches": 2, "clip_range": 0.5},
        advantage={"clip": 1.0},
        awm={"step_share": 0.5},
        rollout={"initial_noise": "per_image", "prompts_per_iteration": 3, "micro_batch": 2, "guidance_scale": 1.0},
        adversary={"schedule": "always"},
        data={"held_out_prompts": ""},
    )


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(np.asarray(value)) for name, value in np.load(GOLDEN).items()}


@pytest.mark.parametrize("kind", ["uniform", "sigma", "sigma_squared", "huber", "generalized_huber", "with_kl"])
def test_the_loss_and_its_gradient_are_the_public_codes(kind, golden):
    clip, kappa = golden["adv_clip"].item(), golden["clip_range"].item()
    weighting = {"weighting": "generalized_huber" if kind == "with_kl" else kind, "power": golden["huber_power"].item()}
    beyond = []
    for level in range(2):
        velocity, sigma = golden["velocity"][level].clone().requires_grad_(), golden["timesteps"][level] / 1000
        flow = golden["noise"][level] - golden["clean"]
        log_prob, before = (
            matching_log_prob(each, flow, sigma, **weighting) for each in (velocity, golden["old"][level])
        )
        losses, ratio = awm_loss(log_prob, before, golden["advantages"].clamp(-clip, clip), clip_range=kappa)
        beyond += ((ratio - 1).abs() > kappa).tolist()
        if kind == "with_kl":
            for name, beta in (("reference", "kl_beta"), ("average", "ema_kl_beta")):
                losses = losses + golden[beta] * (velocity - golden[name][level]).square().mean((1, 2, 3))
        assert losses.mean().item() == pytest.approx(golden[f"loss_{kind}"][level].item(), rel=1e-6)
        (gradient,) = torch.autograd.grad(losses.mean(), velocity)
        expected = golden[f"grad_{kind}"][level]
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))
    assert 0 < sum(beyond) < len(beyond), "on both sides of the clip"


def literal(velocity, clean, noise, sigma, before, advantage, *, clip: float) -> torch.Tensor:
    """Of one image at one level, with the generalised Huber weighting, in float64."""
    error = ((velocity.double() - (noise - clean).double()) ** 2).mean()
    log_prob = -sigma * ((error + 1e-10) ** 0.25 - 1e-10**0.25) / 0.25
    ratio = (log_prob - (log_prob.detach() if before is None else before)).exp()
    now = float(ratio.detach())
    limited = min(max(now, 1 - clip), 1 + clip)
    outside = -advantage * limited > -advantage * now
    return -advantage * (limited if outside else ratio)


@pytest.mark.parametrize(("kl_to", "fast"), [("base", True), ("ema", False)])
@pytest.mark.in_ci(1)
def test_gradients_are_those_of_the_loss_as_it_is_written(settings, kl_to, fast):
    """Image by image and level by level; log p_old of every second micro-batch is another policy's."""
    made = change(settings, fast=fast, update={"kl_weight": 0.05, "kl_to": kl_to, "minibatches": 1, "clip_range": 1e-4})
    trainer = build(made).trainer
    objective, policy, parameters = trainer.objective, trainer.policy, parameters_of(trainer)
    rollout, table = rollout_of(trainer, 1), objective.table(1)
    old = [objective.log_probs(each, table, 1) for each in rollout.micro_batches]
    moved(trainer)
    generator = torch.Generator().manual_seed(7)
    for average in trainer.updater.ema.averages_for_update().values():  # neither the policy's nor the base's
        average.add_(0.05 * torch.randn(average.shape, generator=generator))
    advantages = torch.linspace(-1, 1, 12)
    given = [(each, old[i] if i % 2 else None) for i, each in enumerate(rollout.micro_batches)]
    sums = objective.accumulate(given, advantages, table, 1, total=12, watch_kl=False)
    got = [p.grad.clone() for p in parameters]

    levels, timesteps = policy.schedule(4)
    draws = torch.rand(12, 4, generator=rng.generator(objective.seed, "awm_levels", 1)).argsort(1)[:, :2]
    losses, ratios = [], 0
    for i, each in enumerate(rollout.micro_batches):
        for place, image in enumerate(each.micro_batch.image_ids.tolist()):
            x0 = each.clean[place : place + 1]
            for k, step in enumerate(draws[image].tolist()):
                seed, sigma = rng.derive_seed(objective.seed, "awm_noise", 1, k), float(levels[step])
                eps = philox_normal(tuple(x0.shape), seed=seed, sample_ids=torch.tensor([image]))
                prompt = policy.encode([rollout.prompts[image]])
                prepared = policy.prepare(prompt, timesteps[step].view(1), guidance=1.0)
                noisy, at = (1 - sigma) * x0 + sigma * eps, torch.tensor([0])
                velocity = policy.predict(noisy, at, prepared)[0]
                with torch.no_grad(), trainer.updater.kl_target():
                    target = policy.predict(noisy, at, prepared)[0]
                before = float(old[i][k][place]) if i % 2 else None
                loss = literal(velocity, x0, eps, sigma, before, float(advantages[image]), clip=1e-4)
                losses.append(loss + 0.05 * ((velocity - target) ** 2).mean())
                ratios += before is not None
    loss = torch.stack(losses).mean()
    expected = torch.autograd.grad(loss, parameters)
    assert sums[4].item() == 24 == 2 * ratios
    assert sums[0].item() / 24 == pytest.approx(loss.item(), rel=1e-4, abs=1e-6)
    assert sums[3] > 0
    assert 0 < sums[2] <= 12
    scale = max(float(g.abs().max()) for g in expected)
    assert scale > 1e-4
    for mine, theirs in zip(got, expected):
        torch.testing.assert_close(mine, theirs.float(), rtol=1e-3, atol=2e-5 * scale)


def test_a_step_is_compared_with_the_weights_that_drew_the_images(settings, monkeypatch):
    """The first minibatch with itself, the second with what the policy was before the first step."""
    trainer = build(change(settings, update={"learning_rate": 1e-2})).trainer
    objective, given = trainer.objective, []
    real = objective.accumulate

    def accumulate(pieces, *arguments, **how):
        pieces = list(pieces)
        given.extend(old for _, old in pieces)
        return real(pieces, *arguments, **how)

    monkeypatch.setattr(objective, "accumulate", accumulate)
    fresh = build(settings).trainer
    rollout, table = rollout_of(fresh), fresh.objective.table(0)
    metrics = trainer.iterate()
    assert [old is None for old in given] == [True] * 3 + [False] * 3
    for each, old in zip(rollout.micro_batches[3:], given[3:]):
        for mine, theirs in zip(old, fresh.objective.log_probs(each, table, 0)):
            torch.testing.assert_close(mine, theirs)
    assert abs(metrics["ratio_mean"] - 1) > 1e-6
    assert metrics["kl"] == 0  # of the base, where it is watched: before the first step
    one = build(change(settings, update={"minibatches": 1})).trainer.iterate()
    assert (one["ratio_mean"], one["clip_fraction"]) == (1, 0)
    assert one["grad_norm"] > 0


@pytest.mark.weekly
def test_micro_batches_of_another_size_learn_the_same_and_a_resumed_run_goes_on(settings, tmp_path):
    made = change(settings, update={"kl_to": "ema", "kl_weight": 1.0, "minibatches": 1}, output={"checkpoint_every": 1})
    whole = build(made)
    whole.train()
    tiled = change(made, output_dir=str(tmp_path / "tiled"), rollout={"micro_batch": 12}, iterations=1)
    build(tiled).train()
    names = ("awm_loss", "grad_norm", "kl")
    first, other = rows(made)[0], rows(tiled)[0]
    assert [other[name] for name in names] == pytest.approx([first[name] for name in names], rel=1e-4, abs=1e-6)
    part = change(made, output_dir=str(tmp_path / "part"), iterations=1)
    build(part).train()
    build(change(part, iterations=2), resume=True).train()
    assert rows(part) == rows(made)
    assert rows(made)[1]["kl"] > 0, "the average follows, a step behind"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rollout": {"initial_noise": "shared"}}, r"rollout\.initial_noise = 'shared': update\.objective = awm adds"),
        ({"awm": {"step_share": 0.2}}, r"awm\.step_share = 0\.2 of rollout\.num_steps = 4 trains at no noise level"),
        ({"update": {"kl_space": "velocity"}}, r"update\.kl_space = 'velocity'"),
        ({"update": {"trust_region": "divergence"}}, r"update\.trust_region = 'divergence'"),
    ],
)
def test_settings_that_it_cannot_follow_are_named(settings, changes, message):
    with pytest.raises(UserError, match=message):
        config.check(change(settings, **changes))


def test_the_model_card_names_the_method(settings):
    assert "reinforcement learning (AWM) on the adversary (dino)" in _rewards(settings)
