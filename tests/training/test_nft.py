"""Negative-aware fine-tuning: the loss of the released code, its gradient, who draws, resume, processes, settings.

`nft_loss.npz` was recorded by running NVlabs/DiffusionNFT 24af5554898d85e93efa492f42b5e9cdf4156e9b,
scripts/train_nft_sd3.py: the lines of its training loop from `t_expanded` to the total loss, and `return_decay`.
"""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from advgrpo import config
from advgrpo.errors import UserError
from advgrpo.runtime import rng
from advgrpo.runtime.watch import StopRequested
from advgrpo.training.model_card import _rewards
from advgrpo.training.nft import nft_loss, optimality
from advgrpo_kernels import philox_normal
from tests import golden_runs
from tests.parts import every_second
from tests.sampling.test_rollout import rollout_of
from tests.training.test_supervised import build, change, rows

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture
def settings(unit_config):
    return change(
        unit_config,
        update={"objective": "nft", "minibatches": 2, "learning_rate": 1e-2},
        nft={"old_decay_rate": 0.1},
        rollout={"initial_noise": "per_image", "prompts_per_iteration": 3, "micro_batch": 2, "guidance_scale": 1.0},
        adversary={"schedule": "always"},
        data={"held_out_prompts": ""},
    )


def parameters_of(trainer) -> list[torch.Tensor]:
    return [p for _, p in trainer.policy.trainable_parameters()]


def moved(trainer, size=0.05) -> None:
    """Adapters that do something, and that are not the old policy's."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in parameters_of(trainer):
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("number", [0, 1])
def test_the_loss_and_its_gradient_are_the_released_codes(number):
    recorded = np.load(GOLDEN / "nft_loss.npz")
    golden = {key: torch.from_numpy(np.asarray(value)) for key, value in recorded.items()}
    clip, kl_weight, beta = float(golden["adv_clip_max"]), float(golden["kl_weight"]), float(golden["betas"][number])
    rates = optimality(golden["advantages"], clip)
    torch.testing.assert_close(rates, golden["optimality"], rtol=0, atol=1e-7)
    sigma = golden["sigma"].view(-1, 1, 1, 1)
    noisy = torch.lerp(golden["x0"], golden["noise"], sigma)
    torch.testing.assert_close(noisy, golden["noisy"], rtol=0, atol=1e-6)
    velocity = golden["velocity"].clone().requires_grad_(True)
    losses = nft_loss(
        velocity,
        golden["old_velocity"],
        golden["noise"] - golden["x0"],
        golden["sigma"],
        rates,
        beta=beta,
        scale=clip,
    )
    # The last row is below the smallest weight: theirs is what rounding leaves of x_t - t v - x0 there.
    torch.testing.assert_close(losses[:-1].double(), golden[f"losses_{number}"][:-1], rtol=2e-6, atol=0)
    assert losses[-1] < 1e-6
    total = losses.mean() + kl_weight * (velocity - golden["ref_velocity"]).square().mean()
    assert total.item() == pytest.approx(golden[f"total_{number}"].item(), rel=1e-6)
    (gradient,) = torch.autograd.grad(total, velocity)
    expected = golden[f"grad_velocity_{number}"]
    torch.testing.assert_close(gradient[:-1], expected[:-1], rtol=2e-5, atol=1e-5 * float(expected.abs().max()))
    assert float(gradient[-1].abs().max()) < 10 * float(expected[-1].abs().max())


def test_the_old_policys_share_is_the_released_codes():
    recorded = np.load(GOLDEN / "nft_loss.npz")
    kinds = {
        0: {"old_decay_rate": 0.0},
        1: {"old_decay_rate": 0.001, "old_decay_max": 0.5},
        2: {"old_decay_start": 75, "old_decay_rate": 0.0075, "old_decay_max": 0.999},
    }
    for kind, values in kinds.items():
        section = config.NftSection(**values)
        found = [section.old_decay(step) for step in recorded["decay_steps"].tolist()]
        assert found == pytest.approx(recorded[f"decay_type_{kind}"].tolist(), abs=1e-12), kind
    assert config.NftSection() == config.NftSection(**kinds[1]), "sd3_pickscore's"


def literal_loss(velocity, old, clean, noise, sigma, advantage, *, beta, clip):
    """Of one image, in the words of the article: errors of predicted clean latents, each over its own mean size."""
    noisy = (1 - sigma) * clean + sigma * noise
    losses = []
    for sign in (1, -1):
        predicted = noisy - sigma * ((1 - sign * beta) * old + sign * beta * velocity)
        weight = max(float((predicted.detach() - clean).abs().mean()), 1e-5)
        losses.append(((predicted - clean) ** 2).mean() / weight)
    r = min(max(advantage / clip, -1), 1) / 2 + 0.5
    return clip * (r * losses[0] + (1 - r) * losses[1]) / beta


@pytest.mark.parametrize("beta", [1.0, 0.1, 3.0])
def test_the_gradient_is_that_of_float64(beta):
    generator = torch.Generator().manual_seed(1)
    clean, noise, apart, far = (torch.randn(6, 3, 5, 7, generator=generator, dtype=torch.float64) for _ in range(4))
    sigma = torch.linspace(0.05, 1, 6, dtype=torch.float64)
    old = noise - clean + 0.4 * far
    velocity = (old + 0.02 * apart).requires_grad_(True)
    advantages = torch.tensor([-7.0, -0.4, 0.0, 0.3, 2.0, 9.0], dtype=torch.float64)
    exact = torch.stack(
        [literal_loss(v, o, c, e, float(s), float(a), beta=beta, clip=5.0)
         for v, o, c, e, s, a in zip(velocity, old, clean, noise, sigma, advantages)]
    )  # fmt: skip
    (wanted,) = torch.autograd.grad(exact.sum(), velocity)
    single = [t.detach().float() for t in (velocity, old, noise - clean, sigma)]
    single[0].requires_grad_(True)
    losses = nft_loss(*single, optimality(advantages.float(), 5.0), beta=beta, scale=5.0)
    (found,) = torch.autograd.grad(losses.sum(), single[0])
    torch.testing.assert_close(losses.double(), exact, rtol=1e-5, atol=0)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


def test_where_nothing_has_moved_images_are_weighted_by_their_advantage():
    """The gradient is that of A · mean(e²) / mean|e|, so β has no say in it, and a mean image teaches nothing."""
    torch.manual_seed(2)
    flow, old, sigma = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4), torch.tensor([0.3, 0.6, 0.9])
    advantages = torch.tensor([2.0, 0.0, -1.0])
    for beta in (1.0, 0.2):
        velocity = old.clone().requires_grad_(True)
        losses = nft_loss(velocity, old, flow, sigma, optimality(advantages, 5.0), beta=beta, scale=5.0)
        (found,) = torch.autograd.grad(losses.sum(), velocity)
        error = sigma.view(-1, 1, 1, 1) * (flow - old)
        size = error.abs().mean((1, 2, 3), keepdim=True)
        expected = -2 * (advantages * sigma).view(-1, 1, 1, 1) * error / size / error[0].numel()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)


def written_out(trainer, rollout, advantages, iteration: int, minibatch: int) -> torch.Tensor:
    """The mean loss of one minibatch, image by image and level by level, in a forward each."""
    objective, policy = trainer.objective, trainer.policy
    total, steps = trainer.length.images, objective.settings.num_steps
    levels, timesteps = policy.schedule(steps)
    seed = objective.seed
    draws = torch.rand(total, steps, generator=rng.generator(seed, "nft_levels", iteration))
    part, pairs, losses = total // objective.micro_batches.minibatches, [], []
    clean = torch.cat([each.clean for each in rollout.micro_batches])
    for image in range(minibatch * part, (minibatch + 1) * part):
        x0 = clean[image : image + 1]
        for k, step in enumerate(draws[image].argsort()[: int(steps * 0.99)].tolist()):
            noise_seed = rng.derive_seed(seed, "nft_noise", iteration, k)
            eps = philox_normal(tuple(x0.shape), seed=noise_seed, sample_ids=torch.tensor([image]))
            prepared = policy.prepare(policy.encode([rollout.prompts[image]]), timesteps[step].view(1), guidance=1.0)
            pairs.append((image, x0, eps, float(levels[step]), prepared))

    def velocities():
        noisy = [((1 - sigma) * x0 + sigma * eps, prepared) for _, x0, eps, sigma, prepared in pairs]
        return [policy.predict(x, torch.tensor([0]), prepared)[0] for x, prepared in noisy]

    with torch.no_grad(), objective.old.swap():
        olds = velocities()
    with torch.no_grad(), policy.disable_adapter():
        bases = velocities()
    for (image, x0, eps, sigma, _), old, base, velocity in zip(pairs, olds, bases, velocities()):
        loss = literal_loss(velocity, old, x0, eps, sigma, float(advantages[image]),
                            beta=objective.section.beta, clip=objective.advantage.clip)  # fmt: skip
        losses.append(loss + objective.kl_weight * ((velocity - base) ** 2).mean())
    return torch.stack(losses).mean()


# A group in two micro-batches, and three groups in one.
@pytest.mark.parametrize(("fast", "micro_batch"), every_second([True, False], [12, 2]))
@pytest.mark.in_ci(1)
def test_gradients_are_those_of_the_loss_as_it_is_written(settings, fast, micro_batch):
    minibatches = 1 if micro_batch == 12 else 2
    made = change(
        settings,
        fast=fast,
        rollout={"micro_batch": micro_batch},
        update={"minibatches": minibatches, "kl_weight": 0.05},
        nft={"beta": 0.7},
    )
    trainer = build(made).trainer
    moved(trainer)
    objective, parameters = trainer.objective, parameters_of(trainer)
    rollout = rollout_of(trainer, 1)
    advantages = torch.linspace(-6, 6, trainer.length.images)
    for minibatch in range(minibatches):
        total = trainer.length.images // minibatches
        own = [each for each in rollout.micro_batches if each.micro_batch.minibatch == minibatch]
        rates = optimality(advantages, objective.advantage.clip)
        sums = objective.accumulate(own, rates, objective.table(1), 1, total=total, watch_kl=False)
        got = [p.grad.clone() for p in parameters]
        loss = written_out(trainer, rollout, advantages, 1, minibatch)
        expected = torch.autograd.grad(loss, parameters)
        assert sums[3].item() == total * 3
        assert sums[0].item() / (total * 3) == pytest.approx(loss.item(), rel=1e-5)
        scale = max(float(g.abs().max()) for g in expected)
        assert scale > 1e-4
        for mine, theirs in zip(got, expected):
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=2e-5 * scale)


@pytest.mark.parametrize("fast", [True, False])
def test_rows_may_be_at_steps_of_their_own(settings, fast):
    policy = build(change(settings, fast=fast)).trainer.policy
    _, timesteps = policy.schedule(4)
    prompts = policy.prepare(policy.encode(["a drawing", "another"]), timesteps, guidance=1.0)
    row, steps = torch.tensor([0, 1, 1]), torch.tensor([2, 0, 3])
    latents = torch.randn(3, *policy.latent_shape())
    together, _ = policy.predict(latents, steps, prompts.rows(row))
    for i in range(3):
        alone, _ = policy.predict(latents[i : i + 1], steps[i : i + 1], prompts.rows(row[i : i + 1]))
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-5)
    direct, _ = policy.predict(latents[:2], steps[:2], prompts)
    torch.testing.assert_close(direct[1:], together[1:2], rtol=1e-4, atol=1e-5)


def test_the_old_policy_draws_and_the_trained_one_is_left_as_it_was(settings):
    trainer = build(settings).trainer
    before = rollout_of(trainer)  # nothing has moved yet
    moved(trainer)
    mine = [p.detach().clone() for p in parameters_of(trainer)]
    with trainer.objective.behaviour(trainer.begin(0)):
        again = rollout_of(trainer)
        with trainer.clean.state() as state:
            saved = [state[0][f"policy.{name}"].clone() for name, _ in trainer.policy.trainable_parameters()]
    other = rollout_of(trainer)
    for old, new, now in zip(before.micro_batches, again.micro_batches, other.micro_batches):
        assert torch.equal(old.clean, new.clean)
        assert not torch.allclose(old.clean, now.clean, atol=1e-3)
        assert not old.steps
        torch.testing.assert_close(trainer.policy.decode(old.clean), old.images)
    for kept, copied, parameter in zip(mine, saved, parameters_of(trainer)):
        assert torch.equal(kept, parameter)
        assert torch.equal(kept, copied), "who saves in the meantime saves the trained weights"


def test_an_iteration_draws_by_the_old_policy_and_then_lets_it_follow(settings, monkeypatch):
    trainer = build(settings).trainer
    objective, seen = trainer.objective, []
    real = objective.sampler.run
    start = [p.detach().clone() for p in parameters_of(trainer)]
    monkeypatch.setattr(
        objective.sampler,
        "run",
        lambda *a, **k: seen.append([p.detach().clone() for p in parameters_of(trainer)]) or real(*a, **k),
    )
    first = trainer.iterate()
    assert all(torch.equal(a, b) for drawn in seen for a, b in zip(drawn, start))
    assert first["old_policy_decay"] == pytest.approx(0.2)  # 0.1 for each of two optimizer steps
    after = parameters_of(trainer)
    followed = [0.2 * old + 0.8 * new.detach() for old, new in zip(start, after)]
    for old, wanted in zip(objective.old.state_dict().values(), followed):
        torch.testing.assert_close(old, wanted)
    seen.clear()
    second = trainer.iterate()
    assert seen
    assert all(torch.allclose(a, b) for drawn in seen for a, b in zip(drawn, followed))
    assert first["kl"] == 0
    assert second["kl"] > 0
    assert min(first["old_policy_distance"], second["old_policy_distance"]) > 0


def test_the_first_minibatch_of_a_run_is_on_policy(settings):
    trainer = build(change(settings, update={"minibatches": 1})).trainer
    assert trainer.iterate()["old_policy_distance"] == 0
    assert trainer.iterate()["old_policy_distance"] > 0


@pytest.mark.weekly
def test_rewards_pull_their_way(settings, tmp_path):
    """Images are worth their mean brightness, or its opposite: the same prompts and noise after six iterations."""
    (tmp_path / "worth.py").write_text(
        "def bright(images, prompts):\n    return images.mean((1, 2, 3))\n\n\n"
        "def dark(images, prompts):\n    return -images.mean((1, 2, 3))\n"
    )
    ends, start = {}, None
    for sign, name in ((1, "bright"), (-1, "dark")):
        reward = {"name": name, "import": f"{tmp_path / 'worth.py'}:{name}", "weight": 1.0}
        made = change(settings, adversary={"kind": "none"}, rewards={"custom": [reward]},
                      update={"learning_rate": 3e-3}, evaluation={"metrics": []})  # fmt: skip
        trainer = build(made).trainer
        if start is None:  # of both
            start = torch.cat([each.images for each in rollout_of(trainer, 50).micro_batches]).mean((1, 2, 3))
        for _ in range(6):
            trainer.iterate()
        ends[sign] = torch.cat([each.images for each in rollout_of(trainer, 50).micro_batches]).mean((1, 2, 3))
        assert sign * (ends[sign] - start).mean() > 0
    assert (ends[1] - ends[-1]).min() > 0, "of every image"


def test_levels_differ_within_an_image_and_between_images(settings):
    trainer = build(change(settings, rollout={"num_steps": 10})).trainer
    first, second = (trainer.objective.level_numbers(i) for i in (0, 1))
    assert first.shape == (12, 9)
    assert all(len(set(numbers)) == 9 and set(numbers) <= set(range(10)) for numbers in first.tolist())
    assert len({tuple(numbers) for numbers in first.tolist()}) > 6
    assert not torch.equal(first, second)
    rollout = rollout_of(trainer)
    one, other = trainer.objective.noised(rollout.micro_batches[0], 0)[:2]
    clean = rollout.micro_batches[0].clean
    torch.testing.assert_close(one.noisy, (1 - one.sigma.view(-1, 1, 1, 1)) * clean
                               + one.sigma.view(-1, 1, 1, 1) * (one.flow + clean))  # fmt: skip
    assert not torch.allclose(one.flow, other.flow), "another noise at each level"
    again = trainer.objective.noised(rollout.micro_batches[0], 1)[0]
    assert not torch.allclose(one.flow, again.flow), "and in each iteration"
    sigmas, _ = trainer.policy.schedule(10)
    torch.testing.assert_close(one.sigma, sigmas.float()[one.step])


def test_micro_batches_of_another_size_learn_the_same(settings):
    """What is drawn is keyed by image, so the tiling, and with it the processes, only changes rounding."""
    found = []
    for micro_batch in (1, 12):
        tiled = change(settings, rollout={"micro_batch": micro_batch}, update={"minibatches": 1})
        trainer = build(tiled).trainer
        moved(trainer)
        metrics = trainer.iterate()
        found.append([metrics[name] for name in ("nft_loss", "grad_norm", "old_policy_distance")])
    assert found[1] == pytest.approx(found[0], rel=1e-4)


def test_an_image_learns_the_same_in_whatever_process_it_is(settings):
    """Gradients of two halves, each in a process of its own, are those of the whole."""
    whole = build(change(settings, update={"minibatches": 1})).trainer
    moved(whole)
    rates = torch.linspace(0, 1, 12)
    rollout, table = rollout_of(whole), whole.objective.table(0)
    whole.objective.accumulate(rollout.micro_batches, rates, table, 0, total=12, watch_kl=False)
    together = [p.grad.clone() for p in parameters_of(whole)]
    summed = [torch.zeros_like(p) for p in together]
    for half in (rollout.micro_batches[:3], rollout.micro_batches[3:]):
        whole.objective.accumulate(half, rates, table, 0, total=12, watch_kl=False)
        for part, parameter in zip(summed, parameters_of(whole)):
            part += parameter.grad
    for one, both in zip(together, summed):
        torch.testing.assert_close(both, one, rtol=1e-4, atol=1e-7)


def test_a_run_resumes_as_if_never_stopped(settings, tmp_path):
    """Old policy, its steps, the head and its memory: all of it, to the last bit."""
    whole = change(settings, iterations=4, output_dir=str(tmp_path / "whole"))
    made = build(whole)
    made.train()
    part = change(settings, iterations=2)
    build(part).train()
    resumed = build(change(part, iterations=4), resume=True)
    assert resumed.trainer.objective.steps == 4
    resumed.train()
    assert rows(part) == rows(whole)
    assert [row["old_policy_decay"] for row in rows(whole)] == pytest.approx([0.2, 0.4, 0.5, 0.5])
    ours, theirs = resumed.trainer.state(), made.trainer.state()
    assert ours[0].keys() == theirs[0].keys()
    assert {name.split(".")[0] for name in ours[0]} >= {"policy", "ema", "old_policy", "head", "replay"}
    assert all(torch.equal(ours[0][name], theirs[0][name]) for name in ours[0])
    assert ours[1] == theirs[1]
    assert any(
        not torch.equal(tensor, theirs[0][name.replace("old_policy.", "policy.")])
        for name, tensor in theirs[0].items()
        if name.startswith("old_policy.")
    )


def test_a_checkpoint_without_its_old_policy_is_refused(settings):
    trainer = build(settings).trainer
    tensors, state = trainer.state()
    (name, *_) = [name for name in tensors if name.startswith("old_policy.")]
    with pytest.raises(UserError, match=r"tensor old_policy\.\S+ is missing"):
        trainer.load({k: v for k, v in tensors.items() if k != name}, state)
    with pytest.raises(UserError, match=r"nft_steps in state\.json is -1"):
        trainer.load(tensors, {"trainer": {**state["trainer"], "nft_steps": -1}})
    with pytest.raises(UserError, match=r"old_policy.* is not finite"):
        trainer.load({**tensors, name: torch.full_like(tensors[name], math.nan)}, state)


def test_who_stops_while_images_are_drawn_leaves_the_trained_weights(settings, monkeypatch):
    trainer = build(settings).trainer
    moved(trainer)
    before = [p.detach().clone() for p in parameters_of(trainer)]

    def stop(*arguments, **options):
        raise StopRequested("SIGTERM")

    monkeypatch.setattr(trainer.objective.sampler, "run", stop)
    with pytest.raises(StopRequested):
        trainer.iterate()
    assert trainer.clean.known
    assert all(torch.equal(a, p) for a, p in zip(before, parameters_of(trainer)))


def test_a_stop_in_the_update_takes_the_old_policy_back(settings, monkeypatch):
    trainer = build(settings).trainer
    trainer.iterate()
    objective, real = trainer.objective, trainer.objective.old.average
    old = {name: tensor.clone() for name, tensor in objective.old.state_dict().items()}

    def stop(kept):
        real(kept)
        raise StopRequested("SIGTERM")

    monkeypatch.setattr(objective.old, "average", stop)
    with pytest.raises(StopRequested):
        trainer.iterate()
    assert objective.steps == 4
    trainer.abandon()
    assert objective.steps == 2
    assert all(torch.equal(old[name], tensor) for name, tensor in objective.old.state_dict().items())


def test_an_iteration_of_the_head_alone_leaves_both_policies(settings):
    trainer = build(change(settings, adversary={"warmup_iterations": 1, "warmup_updates": 1})).trainer
    moved(trainer)
    tensors = {name: tensor.clone() for name, tensor in trainer.state()[0].items()}
    metrics = trainer.iterate()
    assert metrics["nft_loss"] is metrics["grad_norm"] is metrics["old_policy_decay"] is None
    after = trainer.state()[0]
    assert all(torch.equal(tensors[n], after[n]) for n in tensors if n.startswith(("policy.", "old_policy.")))
    assert trainer.objective.steps == 0
    assert trainer.iterate()["nft_loss"] > 0


def test_a_loss_that_is_not_finite_stops_before_the_step(settings, monkeypatch):
    trainer = build(settings).trainer
    before = [p.detach().clone() for p in parameters_of(trainer)]
    monkeypatch.setattr(
        "advgrpo.training.forward_process.philox_normal", lambda shape, **_: torch.full(shape, math.nan)
    )
    with pytest.raises(FloatingPointError, match="gradient norm is nan"):
        trainer.iterate()
    assert all(torch.equal(a, p) for a, p in zip(before, parameters_of(trainer)))
    assert trainer.objective.steps == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rollout": {"initial_noise": "shared"}}, r"rollout\.initial_noise = 'shared': update\.objective = nft adds"),
        ({"nft": {"step_share": 0.2}}, r"nft\.step_share = 0\.2 of rollout\.num_steps = 4 trains at no noise level"),
        ({"rollout": {"window_forward": "merged"}}, r"rollout\.window_forward = 'merged' is of the policy gradient's"),
        ({"update": {"old_log_prob": "recompute"}}, r"update\.old_log_prob = 'recompute' is the policy gradient's"),
        ({"adversary": {"kind": "none"}}, r"adversary\.kind = none and no fixed reward"),
    ],
)
def test_settings_that_it_cannot_follow_are_named(settings, changes, message):
    with pytest.raises(UserError, match=message):
        config.check(change(settings, **changes))


def test_all_weights_can_be_trained_so(settings):
    trainer = build(change(settings, model={"train": "full"}, update={"kl_weight": 0.1, "learning_rate": 1e-4})).trainer
    before = [p.detach().clone() for p in parameters_of(trainer)]
    metrics = trainer.iterate()
    assert metrics["grad_norm"] > 0
    assert metrics["kl"] > 0, "of the second minibatch"
    assert any(not torch.equal(a, p) for a, p in zip(before, parameters_of(trainer)))


def test_the_model_card_names_the_method(settings):
    assert "reinforcement learning (DiffusionNFT) on the adversary (dino)" in _rewards(settings)


def test_a_window_is_not_asked_for(settings):
    config.check(change(settings, rollout={"num_steps": 1}, nft={"step_share": 1.0}))


@pytest.mark.parametrize("name", ["nft", "nft-adv"])
def test_the_tiny_presets_train(name):
    """By what their runs have left, which tests/repository/test_golden_runs.py repeats."""
    preset, _ = golden_runs.RUNS[name]
    assert preset == f"tiny-{name}"
    found = json.loads((golden_runs.FOLDER / f"{name}.json").read_text())["iterations"]
    assert len(found) == 3
    trained = [row for row in found if row["nft_loss"] is not None]
    assert len(trained) == (3 if name == "nft" else 2)  # one warms the head up
    assert all(row["nft_loss"] > 0 and row["grad_norm"] > 0 and row["zero_std_fraction"] < 1 for row in trained)
    assert ("discriminator_updates" in found[0]) == (name == "nft-adv")
    assert all("policy_loss" not in row and "log_prob_mismatch_max" not in row for row in found)
