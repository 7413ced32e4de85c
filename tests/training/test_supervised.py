"""Supervised fine-tuning: latents, levels and gradients against the plainly written loss, resume, settings.

Bugs planted in a copy, each seen red: the velocity's sign; a micro-batch's mean instead of its share of the minibatch;
gradients kept from the minibatch before; one level for all groups of a micro-batch; noise and levels numbered within
the micro-batch; no shift; the VAE's shift after its scale; references encoded every time; all micro-batches in every
minibatch; a gradient that is not finite left unreported; rewards or an adversary loaded for nothing; the same noise in
every iteration.
"""

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from advgrpo import config
from advgrpo.errors import UserError
from advgrpo.rewards.dino_similarity import DinoSimilarity
from advgrpo.runtime import rng
from advgrpo.runtime.distributed import Distributed
from advgrpo.training.run import Run
from advgrpo_kernels import philox_normal
from tests.parts import every_second


def build(settings, *, resume=False) -> Run:
    return Run(settings, Distributed.start("cpu"), resume=resume, console=Console(quiet=True))


def change(base, **changes):
    return config.build(config.merge(base.model_dump(), changes), "test")


@pytest.fixture
def settings(unit_config):
    return change(
        unit_config,
        update={"objective": "sft", "minibatches": 2},
        rollout={"prompts_per_iteration": 3, "micro_batch": 2, "group_size": 4},
        evaluation={"metrics": ["rule_accuracy"]},
    )


def rows(settings) -> list[dict]:
    lines = (Path(settings.output_dir) / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if "second" not in k} for line in lines]


def test_encoding_is_the_inverse_of_decoding(settings):
    """By the VAE's own scaling and shift, which this pipeline has."""
    policy = build(settings).trainer.policy
    images = torch.rand(2, 3, 32, 32)
    latents = policy.encode_images(images)
    assert latents.shape == (2, *policy.latent_shape())
    assert latents.dtype == torch.float32
    assert torch.equal(policy.encode_images(images), latents)  # the mean, no draw
    mean = policy.vae.encode(images * 2 - 1).latent_dist.mean
    scale, shift = policy.vae.config.scaling_factor, policy.vae.config.shift_factor
    assert (scale, shift) == (1.3, 0.1)
    torch.testing.assert_close(latents, (mean - shift) * scale)
    torch.testing.assert_close(policy.decode(latents), (policy.vae.decode(mean).sample / 2 + 0.5).clamp(0, 1),
                               rtol=1e-4, atol=1e-5)  # fmt: skip


def test_noise_levels_are_the_schedulers_own(settings):
    """Evenly spaced quantiles give the sigmas and timesteps that diffusers' scheduler steps through."""
    policy = build(settings).trainer.policy
    levels, timesteps = policy.schedule(10)
    assert policy._scheduler.config.shift == 3
    plain = levels[:-1].float() / (3 - 2 * levels[:-1].float())  # without the shift
    sigmas, found = policy.training_sigmas(plain)
    torch.testing.assert_close(sigmas, levels[:-1].float())
    torch.testing.assert_close(found, timesteps)


def written_out(trainer, iteration: int, minibatch: int) -> torch.Tensor:
    """The mean loss of one minibatch, image by image, from the formula."""
    objective, policy = trainer.objective, trainer.policy
    references, run_seed = objective.references, objective.seed
    count, size = trainer.length.images, objective.settings.group_size
    prompts = objective.micro_batches.prompts_of(iteration)
    choice = torch.rand(count, generator=rng.generator(run_seed, "sft_reference", iteration))
    z = torch.randn(len(prompts), generator=rng.generator(run_seed, "sft_level", iteration))
    part = count // objective.micro_batches.minibatches
    losses = []
    for image in range(minibatch * part, (minibatch + 1) * part):
        prompt = prompts[image // size]
        files = references.files(prompt)
        pixels = references.load_images([files[int(choice[image] * len(files))]], size=(32, 32))
        mean = policy.vae.encode(pixels * 2 - 1).latent_dist.mean
        x0 = (mean - policy.vae.config.shift_factor) * policy.vae.config.scaling_factor
        q = torch.sigmoid(z[image // size])
        sigma = 3 * q / (1 + 2 * q)
        seed = rng.derive_seed(run_seed, "sft_noise", iteration)
        eps = philox_normal(tuple(x0.shape), seed=seed, sample_ids=torch.tensor([image]))
        prepared = policy.prepare(policy.encode([prompt]), (1000 * sigma).view(1), guidance=1.0)
        velocity, _ = policy.predict((1 - sigma) * x0 + sigma * eps, torch.tensor([0]), prepared)
        losses.append(((velocity - (eps - x0)) ** 2).mean())
    return torch.stack(losses).mean()


# A group in two micro-batches, and three groups in one.
@pytest.mark.parametrize(("fast", "micro_batch"), every_second([True, False], [12, 2]))
def test_gradients_are_those_of_the_loss_as_it_is_written(settings, fast, micro_batch):
    minibatches = 1 if micro_batch == 12 else 2
    trainer = build(
        change(settings, fast=fast, rollout={"micro_batch": micro_batch}, update={"minibatches": minibatches})
    ).trainer
    with torch.no_grad():  # adapters that do something, so that A has a gradient as well
        for _, parameter in trainer.policy.trainable_parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    parameters = [p for _, p in trainer.policy.trainable_parameters()]
    for minibatch in range(minibatches):
        total = trainer.length.images // minibatches
        micro_batches = [
            micro_batch for micro_batch in trainer.objective.micro_batches.of(1) if micro_batch.minibatch == minibatch
        ]
        summed = trainer.objective.accumulate(micro_batches, 1, total=total)
        got = [p.grad.clone() for p in parameters]
        loss = written_out(trainer, 1, minibatch)
        expected = torch.autograd.grad(loss, parameters)
        assert summed.item() / total == pytest.approx(loss.item(), rel=1e-5)
        scale = max(float(g.abs().max()) for g in expected)
        assert scale > 1e-4
        for mine, theirs in zip(got, expected):
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=2e-5 * scale)


def test_latents_are_encoded_once_and_draws_change_with_the_iteration(settings, monkeypatch):
    trainer = build(settings).trainer
    supervised, encoded = trainer.objective, []
    real = trainer.policy.encode_images
    monkeypatch.setattr(trainer.policy, "encode_images", lambda images: encoded.append(len(images)) or real(images))
    micro_batch = trainer.objective.micro_batches.of(0)[0]
    first, again = supervised.clean_latents(micro_batch, 0), supervised.clean_latents(micro_batch, 0)
    assert torch.equal(first, again)
    assert len(encoded) <= len(micro_batch.image_ids)
    assert set(encoded) == {1}
    assert not torch.equal(supervised.noise(micro_batch, 0), supervised.noise(micro_batch, 1))
    assert not torch.equal(supervised.levels(micro_batch, 0)[0], supervised.levels(micro_batch, 1)[0])
    picks = {tuple(supervised.clean_latents(micro_batch, i).flatten(1).sum(1).tolist()) for i in range(8)}
    assert len(picks) > 2  # of the four that two images have with two references


def test_micro_batches_of_another_size_learn_the_same(settings):
    """What is drawn is keyed by image and group, so the tiling, and with it the processes, only changes rounding."""
    found = []
    for micro_batch in (1, 12):
        tiled = change(settings, rollout={"micro_batch": micro_batch}, update={"minibatches": 1})
        metrics = build(tiled).trainer.iterate()
        found.append((metrics["sft_loss"], metrics["grad_norm"]))
    assert found[1] == pytest.approx(found[0], rel=1e-5)


def test_each_minibatch_is_a_step_and_a_run_resumes_as_if_never_stopped(settings, tmp_path):
    settings = change(settings, data={"held_out_prompts": ""})
    whole = change(settings, iterations=3, output_dir=str(tmp_path / "whole"))
    made = build(whole)
    learned, real = [], made.trainer.objective.accumulate

    def accumulate(micro_batches, iteration, *, total):
        micro_batches = list(micro_batches)
        learned.append((iteration, [i for micro_batch in micro_batches for i in micro_batch.image_ids.tolist()]))
        return real(micro_batches, iteration, total=total)

    made.trainer.objective.accumulate = accumulate
    steps, step = [], made.trainer.updater.step
    made.trainer.updater.step = lambda *a: steps.append(len(learned)) or step(*a)
    made.train()
    assert learned == [(i, list(half)) for i in range(3) for half in (range(6), range(6, 12))]
    assert steps == [1, 2, 3, 4, 5, 6]
    part = change(settings, iterations=2)
    build(part).train()
    resumed = build(change(part, iterations=3), resume=True)
    resumed.train()
    assert rows(part) == rows(whole)
    assert all(row["sft_loss"] > 0 and row["grad_norm"] > 0 and "reward_generated" not in row for row in rows(whole))
    ours, theirs = resumed.trainer.state()[0], made.trainer.state()[0]
    assert ours.keys() == theirs.keys()
    assert not any(name.startswith(("head", "replay")) for name in ours)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours if name != "rng.torch")


def test_nothing_is_loaded_that_nothing_needs(settings, unit_backbone, monkeypatch):
    with pytest.raises(UserError, match=r"rewards\.rule\.weight = 1 would not be looked at"):
        build(change(settings, rewards={"rule": {"weight": 1.0}}))
    made = build(settings)
    assert not hasattr(made.trainer.objective, "scorer")
    assert not hasattr(made.trainer.objective, "discriminator_trainer")
    assert list(made.evaluator.metrics) == ["rule_accuracy"]
    made.close()
    loaded = []
    monkeypatch.setattr("advgrpo.training.run.build_adversary", lambda *_, **options: loaded.append("adversary"))
    monkeypatch.setattr("advgrpo.training.run.build_scorer", lambda *_: loaded.append("scorer"))
    asked = build(change(settings, evaluation={"metrics": ["dino_similarity"]}))
    assert isinstance(asked.evaluator.metrics["dino_similarity"], DinoSimilarity)
    assert not loaded


def test_the_loss_falls_on_the_tiny_pipeline(tmp_path):
    """The shipped pipeline on one batch: the same draws before and after each of eight steps on it."""
    tiny = config.load("tiny-sft")
    settings = change(
        tiny,
        output_dir=str(tmp_path / "run"),
        data={"cache_dir": str(tmp_path / "cache"), "held_out_prompts": ""},
        rollout={"prompts_per_iteration": 2, "group_size": 4, "micro_batch": 8},
        update={"minibatches": 1, "learning_rate": 1e-3},
    )
    trainer = build(settings).trainer
    losses = []
    for _ in range(9):
        trainer.iteration = 0
        losses.append(trainer.iterate()["sft_loss"])
    assert losses[-1] < 0.97 * losses[0]
    assert losses[-1] < losses[4] < losses[0]


def test_a_loss_that_is_not_finite_stops_before_the_step(settings, monkeypatch):
    trainer = build(settings).trainer
    before = [p.detach().clone() for _, p in trainer.policy.trainable_parameters()]
    shape = (1, *trainer.policy.latent_shape())
    monkeypatch.setattr(trainer.policy, "encode_images", lambda images: torch.full(shape, float("nan")))
    with pytest.raises(FloatingPointError, match="gradient norm is nan"):
        trainer.iterate()
    assert all(torch.equal(a, p) for a, (_, p) in zip(before, trainer.policy.trainable_parameters()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"update": {"kl_weight": 0.1}}, r"update\.kl_weight = 0\.1 is the policy gradient's"),
        ({"update": {"old_log_prob": "recompute"}}, r"update\.old_log_prob = 'recompute' is the policy gradient's"),
        ({"data": {"references": ""}}, r"data\.references is empty, but update\.objective = sft needs references"),
    ],
)
def test_settings_that_it_cannot_follow_are_named(settings, changes, message):
    with pytest.raises(UserError, match=message):
        config.check(change(settings, **changes))


def test_rewards_may_be_anything_when_nothing_is_rewarded(settings):
    config.check(change(settings, adversary={"kind": "none"}))
    config.check(change(settings, rewards={"adversary": {"weight": 0.0}}))


def test_a_model_that_predicts_noise_is_refused(settings, tmp_path):
    from advgrpo.data.sources import Sources
    from advgrpo.training.build import build_policy

    folder = tmp_path / "unet"
    folder.mkdir()
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    sources = Sources.read(settings)
    other = change(settings, model={"path": str(folder)}, rollout={"dynamics": "ddim"})
    with pytest.raises(UserError, match=r"update\.objective = sft fits a rectified flow's velocity"):
        build_policy(other, sources, Distributed.start("cpu"), None, Console(quiet=True))
