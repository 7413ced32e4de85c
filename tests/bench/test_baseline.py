"""B0 and B1 compute what the trainer computes on the same weights: latents, log-probabilities, rewards and gradients.

Planted bugs that turned this file red: guidance the wrong way round; adapters at half strength; noise scaled twice;
CPS noise without the half pi; likelihood summed; clipping with the other sign; advantages unscaled; reward weights
swapped; one hinge half doubled; schedule shifted once; average and weight swapped; one minibatch left out; nothing
remembered; KL to itself; adapters merged at another strength; kept features of another prompt; averages moved the
wrong way; a decoder without the shift.
"""

import copy
from pathlib import Path

import pytest
import torch

from advgrpo.adversary.build import build_adversary
from advgrpo.policy.sd3 import SD3Policy
from advgrpo.sampling.dynamics import step_table
from advgrpo.sampling.sampler import Sampler
from advgrpo.types import Features as TrainerFeatures
from advgrpo.types import MicroBatch, MicroBatchRollout
from advgrpo_kernels import group_advantages, philox_normal, transition_coefficients
from bench import baseline
from bench.baseline import B0, B1, Features, FlowScheduler, log_likelihood
from bench.pair import baseline_of, compile_blocks, stock_config, stock_transformer, vae_decoder
from bench.stock_model import StockConfig, StockTransformer, add_lora
from tests.parts import updater_of

PROMPTS = ["a small red star on the left of a blue background", "a large green ring at the top of a white background"]
ROW = torch.tensor([0, 0, 1, 1])
CPU = torch.device("cpu")


def references(prompt: str) -> torch.Tensor:
    return torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(PROMPTS.index(prompt)))


def both(settings, recipe=B0):
    """(our policy, our adversary, the other) with the same weights and adapters that do something."""
    policy = SD3Policy(
        settings.model, device=CPU, cache_dir=Path(settings.data.cache_dir), seed=0, fused=True, precision="model"
    )
    lora = policy.network.lora
    with torch.no_grad():
        lora.master.add_(0.1 * torch.randn(lora.master.shape, generator=torch.Generator().manual_seed(5)))
    adversary = build_adversary(settings.adversary, device=CPU, seed=0)
    stock = stock_transformer(
        stock_config(policy.transformer.config),
        policy.transformer.state_dict(),
        lora.state_dict(),
        rank=settings.model.lora.rank,
        alpha=settings.model.lora.alpha,
    )
    theirs = baseline_of(
        settings,
        transformer=stock,
        policy=policy,
        decode=policy.decode,
        adversary=adversary,
        references=references,
        prompts=PROMPTS,
        recipe=recipe,
    )
    return policy, adversary, theirs


def sample(policy, theirs, settings, window):
    """The same micro-batch by our sampler and by the other, from the same initial noise and the same draws."""
    rollout = settings.rollout
    sampler = Sampler(policy, rollout.guidance_scale, rollout.likelihood, share_prefix=True, merged=True)
    table = step_table(policy, rollout.num_steps, window, rollout=rollout)
    policy.merge()
    initial, ids = sampler.initial_latents(7, torch.arange(2)), torch.arange(4)
    text = policy.encode(PROMPTS)
    latents, steps = sampler.run(table, text, initial, ROW, noise_seed=3, image_ids=ids)
    micro_batch = MicroBatchRollout(
        MicroBatch(ids, PROMPTS, torch.arange(2), ROW, 0), text, steps, policy.decode(latents)
    )
    noise = {i: philox_normal((4, *policy.latent_shape()), seed=3, sample_ids=ids, step=i) for i in window}
    captions = [PROMPTS[i] for i in ROW.tolist()]
    theirs.merge()
    return (latents, micro_batch, table), theirs.sampler(captions, initial[ROW], window, noise)


@pytest.mark.parametrize("guidance", [1.0, 4.5])
@pytest.mark.parametrize(
    ("dynamics", "likelihood"), [("flow_cps", "squared_error"), ("flow_sde", "gaussian"), ("dance_sde", "gaussian")]
)
@pytest.mark.in_ci(3)
def test_sampler_and_update_equal_the_trainers(unit_config, dynamics, likelihood, guidance):
    compare_sampler_and_update(unit_config, dynamics, likelihood, guidance, B0)


def test_so_do_b1s(unit_config):
    unit_config.rollout.initial_noise = "shared"  # a prefix of one step
    compare_sampler_and_update(unit_config, "flow_cps", "squared_error", 4.5, B1)


@pytest.mark.weekly
def test_compiled_blocks_compute_the_same_and_each_kind_is_compiled_once():
    """By the compiler's front end alone, which is what may refuse; with adapters, and merged."""
    config = StockConfig(3, 2, 8, 16, 32, 32, sample_size=8, dual_attention_layers=(0, 1), qk_norm="rms_norm")
    model = StockTransformer(config)
    adapters = add_lora(model, rank=2)
    with torch.no_grad():
        for adapter in adapters:
            adapter.lora_B["default"].weight.normal_()
            adapter.merge()
    given = (torch.randn(2, 16, 8, 8), torch.randn(2, 5, 32), torch.randn(2, 32), torch.tensor([500.0, 500.0]))

    @torch.no_grad()
    def both_ways():
        adapted = model(*given)
        for adapter in adapters:
            adapter.merged = True
        merged = model(*given)
        for adapter in adapters:
            adapter.merged = False
        return adapted, merged

    expected = both_ways()
    compile_blocks(model, "eager")
    torch._dynamo.utils.counters.clear()
    torch.testing.assert_close(both_ways(), expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2 * 2  # two dual blocks are alike, the last is not


def compare_sampler_and_update(settings, dynamics, likelihood, guidance, recipe):
    rollout = settings.rollout
    rollout.dynamics, rollout.likelihood, rollout.guidance_scale, window = dynamics, likelihood, guidance, (1, 2)
    policy, _, theirs = both(settings, recipe)
    (latents, micro_batch, table), b0 = sample(policy, theirs, settings, window)
    assert len(b0.steps) == 2
    torch.testing.assert_close(b0.latents, latents, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(b0.images, micro_batch.images, rtol=1e-4, atol=1e-4)
    for ours, other in zip(micro_batch.steps, b0.steps):
        torch.testing.assert_close(other.next_latents, ours.next_latents, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(other.log_prob, ours.log_prob, rtol=1e-4, atol=1e-4)

    advantages = torch.tensor([1.0, -1.0, 0.5, -2.0])
    settings.update.clip_range = 1.0  # float32 differences between the two forwards must not decide what is clipped
    updater = updater_of(policy, settings)
    updater.accumulate([micro_batch], advantages, table, total=4, watch_kl=False)
    lora = policy.network.lora
    theirs.accumulate([b0], [advantages])
    found = {n.replace(".default.", "."): p.grad for n, p in theirs.transformer.named_parameters() if p.requires_grad}
    expected = lora.state_dict(lora.master.grad)
    error = sum(
        (found[name] - gradient).square().sum() for name, gradient in expected.items() if found[name] is not None
    )
    norm = sum(gradient.square().sum() for gradient in expected.values())
    assert norm > 0
    assert (error / norm).sqrt() <= 1e-4


def test_the_schedule_is_the_pipelines(unit_config):
    policy, _, _ = both(unit_config)
    for count in (4, 10, 40):
        sigmas, timesteps = policy.schedule(count)
        scheduler = FlowScheduler(CPU)
        scheduler.set_timesteps(count)
        torch.testing.assert_close(scheduler.sigmas.double(), sigmas, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(scheduler.timesteps, timesteps, rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("dynamics", ["flow_cps", "flow_sde", "dance_sde"])
def test_transitions_are_the_affine_steps_of_the_method(dynamics):
    scheduler = FlowScheduler(CPU)
    scheduler.set_timesteps(10)
    table = transition_coefficients(scheduler.sigmas.tolist(), dynamics=dynamics, noise_level=0.7)
    latents, velocity = torch.randn(2, 3), torch.randn(2, 3)
    for timestep, (a, b, s) in zip(scheduler.timesteps[:9], table):
        mean, std = scheduler.transition(velocity, timestep, latents, dynamics, 0.7)
        torch.testing.assert_close(mean, a * latents + b * velocity, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(std, s, rtol=1e-4, atol=1e-5)


def test_the_gaussian_likelihood_is_a_density():
    value, mean, std = torch.randn(2, 3), torch.randn(2, 3), torch.tensor(0.3)
    expected = torch.distributions.Normal(mean, std).log_prob(value).mean(dim=1)
    torch.testing.assert_close(log_likelihood(value, mean, std, "gaussian"), expected)


@pytest.mark.parametrize("normalize", ["never", "always", "reward_only"])
def test_rewards_and_head_updates_equal_the_adversarys(unit_config, normalize):
    unit_config.adversary.normalize = normalize
    _, adversary, theirs = both(unit_config)
    images = torch.rand(4, 3, 24, 24)  # another size than the backbone's
    features = theirs.features(images)
    ours = adversary.features(images, PROMPTS * 2)
    torch.testing.assert_close(features.cls, ours["cls"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(features.patches, ours["patches"], rtol=1e-5, atol=1e-5)

    unit_config.adversary.num_patches = features.patches.shape[1]  # all patches: nothing is drawn
    expected = adversary.score(ours, torch.arange(4), purpose="reward", iteration=0).reward
    torch.testing.assert_close(theirs.rewards(features), expected, rtol=1e-4, atol=1e-5)

    reference = TrainerFeatures({name: t + 0.3 * torch.randn_like(t) for name, t in ours.tensors.items()})
    other = Features(reference["cls"], reference["patches"])
    torch.testing.assert_close(theirs.head_loss(other, features), adversary.loss(reference, ours).loss)
    adversary.loss(reference, ours).loss.backward()
    adversary.step()
    theirs.adversary(features, other, 1)  # its batch is all four, in another order
    torch.testing.assert_close(theirs.head[0].weight, adversary.head["w1"], rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("std", ["group", "global", "none"])
def test_advantages_equal_ours(unit_config, std):
    unit_config.advantage.std, unit_config.advantage.clip = std, 1.2
    rewards = torch.randn(8)
    theirs = baseline.Baseline.advantages(_Settings(unit_config), rewards)
    expected = group_advantages(rewards, torch.arange(8) // 4, std=std, eps=unit_config.advantage.eps, clip=1.2)
    torch.testing.assert_close(theirs, expected.advantages)


class _Settings:
    def __init__(self, config):
        self.config = config


def test_kl_pulls_towards_the_base(unit_config):
    unit_config.update.kl_weight = 10.0
    policy, _, theirs = both(unit_config)
    _, b0 = sample(policy, theirs, unit_config, (1, 2))
    with_kl = theirs.loss(b0, b0.steps[0], torch.zeros(4))
    assert with_kl > 0
    with theirs.base():
        assert theirs.loss(b0, b0.steps[0], torch.zeros(4)) == 0


def test_merging_leaves_the_weights_and_follows_the_adapters(unit_config):
    _, _, theirs = both(unit_config, B1)
    adapter, x = theirs.adapters[0], torch.randn(2, 3, theirs.adapters[0].base_layer.in_features)
    before = adapter.base_layer.weight.clone()
    for _ in range(2):
        theirs.merge()
        expected = adapter(x)
        with theirs.merged():
            torch.testing.assert_close(adapter(x), expected, rtol=1e-5, atol=1e-5)
        assert not torch.equal(adapter(x), adapter.base_layer(x))
        with torch.no_grad():
            adapter.lora_B["default"].weight.mul_(2)
    assert torch.equal(adapter.base_layer.weight, before)


def test_kept_features_are_those_of_the_references_that_are_drawn(unit_config):
    captions, seen = [PROMPTS[1], PROMPTS[0], PROMPTS[1], PROMPTS[1]], []
    found = {}
    for recipe in (B0, B1):
        _, _, theirs = both(unit_config, recipe)
        features = theirs.features
        theirs.features = lambda images, own=features: seen.append(len(images)) or own(images)
        for _ in range(2):
            torch.manual_seed(4)
            found[recipe] = theirs.drawn_references(captions)
    assert sorted(seen) == [3, 3, 4, 4]  # B0: four images in each call; B1: three references of two prompts, once
    torch.testing.assert_close(found[B0].cls, found[B1].cls, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[B0].patches, found[B1].patches, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fast", [False, True])
def test_the_stock_vae_decodes_as_ours_does(unit_config, fast):
    policy, _, _ = both(unit_config)
    latents = torch.randn(3, *policy.latent_shape())
    images = vae_decoder(policy.vae, fast=fast)(latents)
    assert images.is_contiguous()
    torch.testing.assert_close(images, policy.decode(latents), rtol=1e-4, atol=1e-5)
    assert policy.vae.decoder.conv_in.weight.is_contiguous()  # the fast one is a copy


@pytest.mark.parametrize("recipe", [B0, B1], ids=["B0", "B1"])
def test_an_iteration_trains_generator_average_and_head(unit_config, recipe):
    unit_config.adversary.schedule = "always"
    _, _, theirs = both(unit_config, recipe)
    before = [p.detach().clone() for p in theirs.trained]
    head = copy.deepcopy(theirs.head.state_dict())
    steps = []
    theirs.optimizer.register_step_post_hook(lambda *_: steps.append([p.detach().clone() for p in theirs.trained]))
    for _ in range(2):
        metrics = theirs.iteration(PROMPTS, (1, 2))
    assert set(metrics) == {"reward_generated", "reward_reference"}
    assert len(steps) == 2 * unit_config.update.minibatches
    decay, average = unit_config.update.ema_decay, before
    for after in steps:
        average = [decay * a + (1 - decay) * p for a, p in zip(average, after)]
    for got, expected in zip(theirs.averages, average):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)
    assert any((p != b).any() for p, b in zip(theirs.trained, before))
    assert not torch.equal(head["0.weight"], theirs.head[0].weight)
    assert len(theirs.replay.kept.cls) == 2 * min(8, -(-unit_config.adversary.replay_capacity // 8))


@pytest.mark.parametrize(
    ("section", "field", "value"), [("adversary", "schedule", "ratio"), ("model", "train", "full")]
)
def test_settings_it_does_not_run_are_refused(unit_config, section, field, value):
    setattr(getattr(unit_config, section), field, value)
    with pytest.raises(ValueError, match=f"B0 and B1 have no {section}.{field} = '{value}'"):
        baseline.check_settings(unit_config)
