"""The DINO adversary: golden vectors of the released code, schedules, replay, and one set of features for everything.

Bugs planted in a copy, each seen red: sign of a hinge; loss weights swapped with reward weights; L2 normalisation left
on in head training; the generator trained although the reward is fooled; the reward's patches always drawn without
replacement; replay slots not wrapped; random patches keyed by local instead of global image number; one seed for the
patches of both sides, in updates or in the evaluation; a seed without the update's or the iteration's number; the
reward's patches drawn alike for generations and references, or in every iteration.
"""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from advgrpo import config
from advgrpo.adversary.build import build_adversary
from advgrpo.adversary.feature_head import FeatureHeadAdversary
from advgrpo.adversary.trainer import (
    DiscriminatorBatch,
    DiscriminatorTrainer,
    ReplayBuffer,
    paired_accuracy,
    plan_updates,
)
from advgrpo.config import AdversarySection
from advgrpo.errors import UserError
from advgrpo.training.rewarded import RewardedObjective
from advgrpo.types import Features

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "dino_adv_grpo.npz")


def golden(name: str) -> torch.Tensor:
    return torch.from_numpy(np.asarray(GOLDEN[name]))


def make_adversary(unit_backbone: str, **changes) -> FeatureHeadAdversary:
    settings = {"backbone": unit_backbone, "image_size": 32, "dtype": "float32", "hidden_size": 16, "num_patches": 8}
    section = AdversarySection(**{**settings, **changes})
    return build_adversary(section, device=torch.device("cpu"), seed=0)


@pytest.fixture
def released(unit_backbone) -> FeatureHeadAdversary:
    """The released variant with the recorded head: L2 in the reward, none in training, loss weights 1 : 0.3."""
    adversary = make_adversary(unit_backbone, normalize="reward_only", loss_weights=(1.0, 0.3))
    head = {"w1": golden("w0_before"), "b1": golden("w1_before"), "w2": golden("w2_before"), "b2": golden("w3_before")}
    adversary.heads[0].weights = {name: torch.nn.Parameter(t.clone()) for name, t in head.items()}
    adversary.optimizer = torch.optim.Adam(adversary.head.values(), lr=1e-4, betas=(0.5, 0.999))
    return adversary


def split_tokens(tokens: torch.Tensor) -> Features:
    return Features({"cls": tokens[:, 0], "patches": tokens[:, 1:]})


def gathered(side: str, indices: str) -> Features:
    features = split_tokens(golden(side))
    index = golden(indices)[:, :, None].expand(-1, -1, features["patches"].shape[2])
    return Features({"cls": features["cls"], "patches": features["patches"].gather(1, index)})


def test_head_loss_gradients_and_adam_step_match_the_released_code(released):
    result = released.loss(gathered("real", "patch_idx_d_real"), gathered("fake", "patch_idx_d_fake"))
    assert result.loss.item() == pytest.approx(float(GOLDEN["d_loss"]), abs=1e-6)
    assert result.accuracy.item() == pytest.approx(float(GOLDEN["d_acc"]))
    result.loss.backward()
    for i, name in enumerate(("w1", "b1", "w2", "b2")):
        torch.testing.assert_close(released.head[name].grad, golden(f"w{i}_grad"), rtol=1e-4, atol=1e-7)
    released.step()
    for i, name in enumerate(("w1", "b1", "w2", "b2")):
        torch.testing.assert_close(released.head[name].detach(), golden(f"w{i}_after"), rtol=0, atol=1e-6)


def test_reward_matches_the_released_code(released, monkeypatch):
    import advgrpo.adversary.feature_head as module

    for side in ("fake", "real"):
        drawn = golden(f"patch_idx_reward_{side}")
        monkeypatch.setattr(
            module, "sample_patches", lambda *a, drawn=drawn, **k: type("Drawn", (), {"indices": drawn})
        )
        score = released.score(split_tokens(golden(side)), torch.arange(8), purpose="reward", iteration=0)
        torch.testing.assert_close(score.reward, golden(f"reward_{side}"), rtol=1e-5, atol=1e-6)


def test_released_normalisation_applies_to_the_reward_only(released):
    scaled = split_tokens(golden("fake") * 3)
    plain = released.score(split_tokens(golden("fake")), torch.arange(8), purpose="reward", iteration=0)
    torch.testing.assert_close(
        released.score(scaled, torch.arange(8), purpose="reward", iteration=0).reward, plain.reward
    )
    real, fake = gathered("real", "patch_idx_d_real"), gathered("fake", "patch_idx_d_fake")
    tripled = Features({name: tensor * 3 for name, tensor in fake.tensors.items()})
    assert abs(released.loss(real, tripled).loss - released.loss(real, fake).loss) > 1e-4


@pytest.mark.parametrize(
    ("schedule", "generated", "reference", "updates", "generator"),
    [
        ("when_fooled", 1.0, 0.0, 10, True),
        ("when_fooled", 0.0, 0.0, 0, True),
        ("when_fooled", 0.0, 1.0, 0, True),
        ("fooled_or_generator", 1.0, 0.0, 10, False),
        ("fooled_or_generator", 0.0, 0.0, 0, True),
        ("fooled_or_generator", 0.0, 1.0, 0, True),
        ("always", 0.0, 1.0, 10, True),
        ("never", 1.0, 0.0, 0, True),
        ("alternate", 0.0, 0.0, 10, False),
    ],
)
def test_schedules(schedule, generated, reference, updates, generator):
    plan = plan_updates(AdversarySection(schedule=schedule), 0, generated, reference, optimizer_steps=2)
    assert (plan.discriminator_updates, plan.generator) == (updates, generator)


@pytest.mark.parametrize("schedule", ["when_fooled", "fooled_or_generator"])
def test_within_the_margin_the_head_counts_as_fooled(schedule):
    section = AdversarySection(schedule=schedule, fooled_margin=0.5)
    plans = [plan_updates(section, 0, 0.0, lead, optimizer_steps=2) for lead in (0.4, 0.6)]
    assert [plan.discriminator_updates for plan in plans] == [10, 0]


def test_alternate_trains_the_generator_in_the_last_iteration_of_a_period():
    section = AdversarySection(schedule="alternate", alternate_period=10)
    trained = [i for i in range(30) if plan_updates(section, i, 0.0, 0.0, optimizer_steps=2).generator]
    assert trained == [9, 19, 29]


@pytest.mark.parametrize("ratio", [10.0, 0.3, 1.75])
def test_ratio_is_kept_over_iterations(ratio):
    section = AdversarySection(schedule="ratio", ratio=ratio)
    updates = [plan_updates(section, i, 0.0, 0.0, optimizer_steps=2).discriminator_updates for i in range(100)]
    assert sum(updates) == int(100 * 2 * ratio)
    assert max(updates) - min(updates) <= 1


@pytest.mark.parametrize("sampling", ["without_replacement", "with_replacement"])
def test_patches_are_drawn_as_the_setting_says_for_reward_and_head_alike(unit_backbone, sampling):
    """40 of 64 patches whose value is their number: without replacement never twice, with it almost surely."""
    adversary = make_adversary(unit_backbone, num_patches=40, patch_sampling=sampling)
    numbers = torch.arange(64.0).view(1, 64, 1).expand(6, 64, 64).contiguous()
    features, ids = Features({"cls": torch.zeros(6, 64), "patches": numbers}), torch.arange(6) + 3
    trained = adversary.training_features(features, ids, 5)["patches"][:, :, 0]
    seen = []

    def spy(cls, patches, indices, *args, **kwargs):
        seen.append(indices)
        return type("Score", (), {"reward": cls[:, 0]})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("advgrpo.adversary.feature_head.score_features", spy)
        adversary.score(features, ids, purpose="reward", iteration=0)
        adversary.score(features.rows(torch.tensor([4])), ids[4:5], purpose="reward", iteration=0)
        adversary.score(features, ids, purpose="reference", iteration=0)
        adversary.score(features, ids, purpose="reward", iteration=1)
    for drawn in (trained, seen[0]):
        distinct = [len(set(row)) for row in drawn.tolist()]
        assert all(n == 40 for n in distinct) if sampling == "without_replacement" else max(distinct) < 40
        assert len({tuple(row) for row in drawn.tolist()}) == 6  # every image its own
    assert torch.equal(seen[1][0], seen[0][4])  # whatever the batch
    for purpose_or_iteration in seen[2:]:
        assert not any(torch.equal(*pair) for pair in zip(purpose_or_iteration, seen[0]))
    assert torch.equal(
        adversary.training_features(features.rows(torch.tensor([4])), ids[4:5], 5)["patches"][0, :, 0], trained[4]
    )


def test_paired_accuracy_counts_pairs_of_a_prompt_and_no_others():
    reference, generated = torch.tensor([3.0, 1.0, 0.0, 9.0]), torch.tensor([2.0, 0.0, 5.0, 9.0])
    # prompt one: 3 > 2, 3 > 0, 1 < 2, 1 > 0; prompt two: 0 < 5, 0 < 9, 9 > 5, and a tie
    assert paired_accuracy(generated, reference, 2).item() == pytest.approx((3 + 1.5) / 8)
    levels = torch.tensor([0.0, 0.0, 100.0, 100.0])  # prompts differ more than their images do
    assert paired_accuracy(generated + levels, reference + levels, 2).item() == pytest.approx(4.5 / 8)
    assert paired_accuracy(generated, generated, 2).item() == 0.5
    assert paired_accuracy(generated, generated + 20, 4).item() == 1.0


def test_replay_is_a_ring():
    buffer = ReplayBuffer(5)
    for number in range(4):
        shapes = {"pooled": (2, 3), "tokens": (2, 4, 3)}
        buffer.add(Features({name: torch.full(shape, float(number)) for name, shape in shapes.items()}))
    assert len(buffer) == 5
    assert sorted(buffer.tensors["pooled"][:, 0].tolist()) == [1.0, 2.0, 2.0, 3.0, 3.0]
    assert torch.equal(buffer.tensors["pooled"][:, 0], buffer.tensors["tokens"][:, 0, 0])


def test_older_images_take_the_place_of_new_ones(unit_backbone):
    settings = {"batch_size": 8, "replay_share": 0.5}
    trainer = DiscriminatorTrainer(
        make_adversary(unit_backbone, **settings), reduce=lambda t: None, rank=0, world_size=1
    )
    batch, real, sides = head_batch(torch.arange(12)), trainer.adversary.loss, []
    trainer.adversary.loss = lambda *both, **kw: sides.append([len(side) for side in both]) or real(*both, **kw)
    trainer.train(batch, 0, 1)
    trainer.add_to_replay(batch, 0, lambda t: t)
    trainer.replay.rows = lambda index, rows=trainer.replay.rows: sides.append(len(index)) or rows(index)
    trainer.train(batch, 1, 1)
    assert sides == [[8, 8], 4, [8, 8]], "as many negatives as positives, half of them replayed"


def test_an_iteration_adds_an_eighth_of_the_buffer(unit_backbone):
    """So that the buffer spans several iterations however many images each has."""
    trainer = DiscriminatorTrainer(
        make_adversary(unit_backbone, replay_capacity=16), reduce=lambda t: None, rank=0, world_size=1
    )
    sizes = []
    for iteration in range(9):
        trainer.add_to_replay(head_batch(torch.arange(12)), iteration, lambda t: t)
        sizes.append(len(trainer.replay))
    assert sizes == [2, 4, 6, 8, 10, 12, 14, 16, 16]


def head_batch(ids: torch.Tensor) -> DiscriminatorBatch:
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randn(2, 12, 65, 64, generator=generator)
    return DiscriminatorBatch(ids, split_tokens(tokens[0][ids]), split_tokens(tokens[1][ids] + 0.5), total=12)


def test_both_sides_and_every_update_draw_their_own_patches(unit_backbone):
    """The same patches on both sides would let the head compare places in images that have nothing in common."""
    trainer = DiscriminatorTrainer(make_adversary(unit_backbone), reduce=lambda t: None, rank=0, world_size=1)
    batch = head_batch(torch.arange(12))
    draws = [trainer._draw(batch, *at).seeds.tolist() for at in ((0, 0), (0, 1), (1, 0))]
    seeds, real = [], trainer.adversary.training_features
    trainer.adversary.training_features = lambda features, ids, seed: seeds.append(seed) or real(features, ids, seed)
    trainer.evaluate(batch, 0)
    trainer.evaluate(batch, 1)
    every = [seed for pair in draws for seed in pair] + seeds
    assert len(seeds) == 4
    assert len(every) == len(set(every)) == 10


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"patch_sampling": "with_replacement"},
        {"reward_ema": 0.5},
        {"gradient_penalty": 0.5},
        {"heads": 3},
        {"spectral_norm": True},
    ],
)
def test_several_processes_take_the_steps_of_one(unit_backbone, changes):
    """Three shares of the batch, one of them empty, gradients summed by hand, give the same heads and losses as the
    whole batch."""
    changes = {"batch_size": 8, **changes}
    alone = DiscriminatorTrainer(make_adversary(unit_backbone, **changes), reduce=lambda t: None, rank=0, world_size=1)
    whole = head_batch(torch.arange(12))
    expected = []
    for iteration in range(3):
        expected += [*alone.evaluate(whole, iteration), *alone.train(whole, iteration, 2).tolist()]
        alone.add_to_replay(whole, iteration, lambda t: t)

    import threading

    shares = [torch.tensor([0, 2, 4, 7, 11]), torch.tensor([1, 3, 5, 6, 8, 9, 10]), torch.tensor([], dtype=torch.int64)]
    barrier, shared, results = threading.Barrier(len(shares)), {}, {}
    adversaries = [make_adversary(unit_backbone, **changes) for _ in shares]

    def run(rank: int, ids: torch.Tensor) -> None:
        def exchange(value):
            shared[rank] = value
            barrier.wait()
            everybodys = [shared[place] for place in range(len(shares))]
            barrier.wait()
            return everybodys

        def reduce(tensors):
            copies = exchange([t.clone() for t in tensors])
            for tensor, *parts in zip(tensors, *copies):
                tensor.copy_(sum(parts))

        trainer = DiscriminatorTrainer(adversaries[rank], reduce=reduce, rank=rank, world_size=len(shares))
        batch, losses = head_batch(ids), []
        for iteration in range(3):
            losses += [*trainer.evaluate(batch, iteration), *trainer.train(batch, iteration, 2).tolist()]
            trainer.add_to_replay(batch, iteration, lambda t: torch.cat(exchange(t)))
        results[rank] = (losses, trainer.adversary.state_dict(), trainer.replay.tensors)

    threads = [threading.Thread(target=run, args=(r, ids)) for r, ids in enumerate(shares)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(results) == len(shares)
    for losses, head, replay in results.values():
        assert losses == pytest.approx(expected, abs=1e-6)
        torch.testing.assert_close(replay, alone.replay.tensors)
        for name, value in alone.adversary.state_dict().items():
            torch.testing.assert_close(head[name], value, rtol=0, atol=1e-5)


def test_head_learns_to_tell_references_from_generations(unit_backbone):
    trainer = DiscriminatorTrainer(
        make_adversary(unit_backbone, learning_rate=1e-2), reduce=lambda t: None, rank=0, world_size=1
    )
    batch = head_batch(torch.arange(12))
    before = trainer.evaluate(batch, 0)
    trainer.train(batch, 0, 200)
    after = trainer.evaluate(batch, 0)
    assert after[0] < 0.5 * before[0]
    assert after[1] == 1.0


def test_the_head_is_judged_before_it_learns_from_the_same_images(unit_backbone):
    settings = {"schedule": "always", "warmup_iterations": 0, "updates_per_iteration": 20, "learning_rate": 1e-2}
    trainer = DiscriminatorTrainer(
        make_adversary(unit_backbone, **settings), reduce=lambda t: None, rank=0, world_size=1
    )
    batch, scores = head_batch(torch.arange(12)), (torch.zeros(12), torch.zeros(12))
    before = trainer.evaluate(batch, 0)
    _, metrics = trainer.learn(
        batch, scores, torch.tensor(0.5), 0, optimizer_steps=1, agree=lambda numbers: numbers, gather=lambda t: t
    )
    assert (metrics["discriminator_loss"], metrics["discriminator_accuracy"]) == before
    assert trainer.evaluate(batch, 0)[0] < before[0]
    assert len(trainer.replay) == 12, "what was generated is remembered"


def test_the_first_process_decides_for_all_of_them(unit_backbone):
    """By its own numbers this process would train nothing, and be missing in the collectives of the others' updates."""
    firsts = {"generated": 1.0, "reference": 0.0, "paired accuracy": 0.25}
    settings = {"schedule": "when_fooled", "warmup_iterations": 0, "updates_per_iteration": 2}
    adversary = make_adversary(unit_backbone, **settings)
    trainer = DiscriminatorTrainer(adversary, reduce=lambda t: None, rank=1, world_size=2)
    batch = head_batch(torch.arange(12))
    objective = SimpleNamespace(
        discriminator_trainer=trainer,
        settings=SimpleNamespace(images=12, group_size=6),
        micro_batches=SimpleNamespace(minibatches=1),
        distributed=SimpleNamespace(gather_json=lambda own: [[*firsts.values()], own], all_gather=lambda t: t),
    )
    scored = SimpleNamespace(
        generated=batch.generated,
        reference=batch.reference,
        components={"adversary": torch.zeros(12)},
        reference_rewards=torch.ones(12),
    )
    rollout = SimpleNamespace(image_ids=batch.image_ids)
    plan, metrics = RewardedObjective.train_discriminator(objective, rollout, scored, 0)
    assert plan.discriminator_updates == metrics["discriminator_updates"] == 2
    assert metrics["discriminator_paired_accuracy"] == 0.25


def test_features_do_not_depend_on_the_rest_of_the_batch(unit_backbone):
    adversary = make_adversary(unit_backbone)
    images = torch.rand(6, 3, 48, 48)
    whole = adversary.features(images, [""] * 6)
    torch.testing.assert_close(adversary.features(images[2:3], [""])["cls"], whole["cls"][2:3], rtol=1e-5, atol=1e-5)
    assert whole["patches"].shape == (6, 64, 64)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"backbone": "no/such/model"}, "adversary.backbone = 'no/such/model' cannot be loaded"),
        ({"image_size": 30}, "adversary.image_size = 30 is not a multiple of the backbone's patch size 4"),
        ({"num_patches": 65}, "adversary.num_patches = 65 exceeds the backbone's 64"),
    ],
)
def test_bad_settings_are_named(unit_backbone, changes, expected):
    with pytest.raises(UserError) as error:
        make_adversary(unit_backbone, **changes)
    assert expected in str(error.value)


def test_reference_features_are_cached_and_equal_fresh_ones(unit_backbone, tmp_path):
    from advgrpo.adversary.reference_features import ReferenceFeatures
    from advgrpo.data.references import ReferenceSet
    from advgrpo.data.sources import shipped_path

    prompts = Path(shipped_path("prompts", config.load("tiny").data.prompts)).read_text().splitlines()[:2]
    references = ReferenceSet.load(shipped_path("references", config.load("tiny").data.references), prompts)
    adversary = make_adversary(unit_backbone, cached_patches=16)
    first = ReferenceFeatures(references, adversary, tmp_path).prompt(prompts[0])
    calls, real = [], adversary.features
    adversary.features = lambda images, prompts: calls.append(images) or real(images, prompts)
    again = ReferenceFeatures(references, adversary, tmp_path)
    cached = again.prompt(prompts[0])
    again.prompt(prompts[0])
    assert len(calls) == 1  # the proof that the cache is of this network
    assert torch.equal(first["cls"], cached["cls"])
    assert torch.equal(first["patches"], cached["patches"])
    assert first["patches"].shape == (3, 16, 64)
    images = references.load_images(references.files(prompts[0]))
    assert torch.equal(make_adversary(unit_backbone).features(images, prompts[:1] * 3)["cls"], cached["cls"])
