"""What restrains the head of a discriminator on frozen features; every setting is off by default and changes nothing.

Bugs planted: tests/mutants has them (adversary-average-*, penalty-*, crop-*, reset-*, heads-*, layers-*, spectral-*).
"""

import json

import pytest
import torch

from advgrpo.adversary.build import build_adversary
from advgrpo.adversary.feature_head import FeatureHeadAdversary
from advgrpo.adversary.gradient_penalty import r1_penalty
from advgrpo.adversary.head import Head, SpectralNorm, WeightAverage
from advgrpo.adversary.trainer import DiscriminatorBatch, DiscriminatorTrainer, restart_due
from advgrpo.config import AdversarySection
from advgrpo.errors import UserError
from advgrpo.training.restoring import check_head
from advgrpo.types import Features
from advgrpo.vision.dino import DinoBackbone
from advgrpo_kernels import hinge_head_loss, score_features

CPU = torch.device("cpu")
WIDTH, PATCHES, TOTAL = 12, 9, 10


class Backbone:
    """Nothing is looked at here: features are given."""

    device, width, num_patches, cache_key = CPU, WIDTH, PATCHES, "none"

    def features(self, images: torch.Tensor) -> Features:
        rows = images.mean((2, 3)).repeat(1, WIDTH // 3)
        return Features({"cls": rows, "patches": rows[:, None].expand(-1, PATCHES, -1).contiguous()})


def test_features_of_several_layers_are_joined_behind_the_final_norm(unit_backbone):
    """Layer by layer, by a walk through the model's own blocks."""
    settings = {"image_size": 32, "dtype": "float32", "device": CPU}
    joined, plain = (DinoBackbone(unit_backbone, layers=layers, **settings) for layers in ((1, 2), ()))
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    model, found = plain.model, joined.features(images)
    hidden, expected = model.embeddings(plain.preprocess(images)), []
    for block in model.encoder.layer:
        hidden = block(hidden)
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        expected.append(model.layernorm(hidden))
    expected = torch.cat(expected, dim=-1).detach()
    assert joined.width == expected.shape[-1] == 2 * plain.width
    torch.testing.assert_close(found["cls"], expected[:, 0])
    torch.testing.assert_close(found["patches"], expected[:, 1:])
    last = joined.of_last_layer()
    assert torch.equal(last.features(images)["cls"], plain.features(images)["cls"])
    assert (last.width, last.cache_key) == (plain.width, plain.cache_key)
    assert joined.cache_key != plain.cache_key
    with pytest.raises(UserError, match=r"adversary\.feature_layers = \[1, 3\].* has 2 layers"):
        DinoBackbone(unit_backbone, layers=(1, 3), **settings)
    section = AdversarySection(
        backbone=unit_backbone, image_size=32, dtype="float32", num_patches=8, feature_layers=(1, 2)
    )
    judge = build_adversary(section, device=CPU, seed=0)
    assert judge.head["w1"].shape[1] == joined.width
    judge.score(judge.features(images, [""] * 3), torch.arange(3), purpose="reward", iteration=0)


def adversary(**changes) -> FeatureHeadAdversary:
    settings = {"hidden_size": 7, "num_patches": 4, "batch_size": 6, "replay_capacity": 16, "learning_rate": 1e-2}
    return FeatureHeadAdversary(AdversarySection(**{**settings, **changes}), Backbone(), seed=3)


def trainer(**changes) -> DiscriminatorTrainer:
    return DiscriminatorTrainer(adversary(**changes), reduce=lambda tensors: None, rank=0, world_size=1)


def batch(iteration: int) -> DiscriminatorBatch:
    tokens = torch.randn(2, TOTAL, PATCHES + 1, WIDTH, generator=torch.Generator().manual_seed(iteration))
    sides = [Features({"cls": side[:, 0], "patches": side[:, 1:]}) for side in (tokens[0], tokens[1] + 0.3)]
    return DiscriminatorBatch(torch.arange(TOTAL), *sides, total=TOTAL)


def learn(trained: DiscriminatorTrainer, iterations: range) -> list[float]:
    """Losses of the updates, and the rewards after each iteration."""
    found = []
    for iteration in iterations:
        images, scores = batch(iteration), (torch.zeros(TOTAL), torch.zeros(TOTAL))
        trained.learn(
            images,
            scores,
            torch.tensor(0.5),
            iteration,
            optimizer_steps=1,
            agree=lambda numbers: numbers,
            gather=lambda tensor: tensor,
        )
        found += [*trained.train(images, iteration, 2).tolist(), *rewards(trained.adversary, iteration).tolist()]
    return found


def rewards(judge: FeatureHeadAdversary, iteration: int) -> torch.Tensor:
    return judge.score(batch(iteration).generated, torch.arange(TOTAL), purpose="reward", iteration=iteration).reward


def resumed(old: DiscriminatorTrainer, **changes) -> DiscriminatorTrainer:
    """A new trainer at the state of `old`, by way of a checkpoint's content."""
    new, (tensors, state) = trainer(**changes), old.state()
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    check_head(new, tensors, json.loads(json.dumps(state))).apply(new)
    return new


LEVERS = [
    {"reward_ema": 0.6},
    {"gradient_penalty": 0.5},
    {"reset_every": 2},
    {"heads": 3},
    {"heads": 2, "reset_every": 2, "reward_ema": 0.6},
    {"spectral_norm": True},
    {"spectral_norm": True, "reward_ema": 0.6, "reset_every": 2},
]


def named(changes: dict) -> str:
    return ",".join(f"{name}={value}" for name, value in changes.items())


@pytest.mark.parametrize("changes", LEVERS, ids=named)
def test_a_resumed_head_goes_on_as_if_never_stopped(changes):
    changes = {"schedule": "always", "updates_per_iteration": 2, "warmup_updates": 3, **changes}
    straight, stopped = trainer(**changes), trainer(**changes)
    expected = learn(straight, range(6))
    first = learn(stopped, range(3))
    assert first + learn(resumed(stopped, **changes), range(3, 6)) == expected


@pytest.mark.parametrize("changes", LEVERS, ids=named)
def test_each_setting_changes_what_is_learned_or_rewarded(changes):
    plain = {"schedule": "always", "updates_per_iteration": 2, "warmup_updates": 3}
    assert learn(trainer(**plain, **changes), range(4)) != learn(trainer(**plain), range(4))


def test_without_settings_the_head_is_four_tensors_that_give_the_reward():
    judge = adversary()
    assert list(judge.state_dict()) == ["w1", "b1", "w2", "b2"]
    assert judge.heads[0].rewarding() is judge.head


def test_the_average_is_the_mean_of_the_updates_until_it_fades():
    """decay 0.75: up to four updates their mean, then 0.75 of the old and 0.25 of the new."""
    weights = {"w1": torch.full((2, 2), 99.0)}
    average, seen, expected = WeightAverage(weights, 0.75), [], 0.0
    assert torch.equal(average.weights["w1"], weights["w1"]), "before an update it is the head itself"
    for number in range(1, 9):
        seen.append(float(number**2))
        weights["w1"].fill_(seen[-1])
        average.update(weights)
        expected = sum(seen) / number if number <= 4 else 0.75 * expected + 0.25 * seen[-1]
        torch.testing.assert_close(average.weights["w1"], torch.full((2, 2), expected))


def test_the_average_gives_the_reward_and_the_head_itself_learns():
    averaged, plain = trainer(reward_ema=0.9), trainer()
    images, mean = batch(0), {name: torch.zeros_like(p) for name, p in plain.adversary.head.items()}
    for number in range(5):
        losses = [each.train(images, number, 1) for each in (averaged, plain)]
        assert torch.equal(*losses), "what is learned is the same"
        mean = {name: total + plain.adversary.head[name].detach() / 5 for name, total in mean.items()}
    for name, weight in plain.adversary.head.items():
        assert torch.equal(averaged.adversary.head[name], weight)
    by_mean = adversary()
    by_mean.load_state_dict(mean)
    torch.testing.assert_close(rewards(averaged.adversary, 0), rewards(by_mean, 0))
    assert not torch.allclose(rewards(averaged.adversary, 0), rewards(plain.adversary, 0), atol=1e-4)


def penalty_by_autograd(side: Features, head: dict, gamma: float, weights: tuple[float, float], normalize: bool):
    """The penalty through the slope that autograd gives of the one forward pass there is, row by row, in float64."""
    inputs = torch.cat([side["cls"][:, None], side["patches"]], dim=1)
    inputs = torch.nn.functional.normalize(inputs, dim=-1) if normalize else inputs
    inputs = inputs.detach().requires_grad_(True)
    hidden = torch.nn.functional.gelu(inputs @ head["w1"].T + head["b1"])
    scores = (hidden @ head["w2"].T + head["b2"]).squeeze(-1)
    (slopes,) = torch.autograd.grad(scores.sum(), inputs, create_graph=True)
    squared = slopes.square().sum(-1)
    return gamma / 2 * (weights[0] * squared[:, 0].mean() + weights[1] * squared[:, 1:].mean())


@pytest.mark.parametrize("normalize", [False, True])
def test_the_penalty_and_its_gradients_are_those_of_double_backward_in_float64(normalize):
    generator = torch.Generator().manual_seed(1)
    side = Features({"cls": torch.randn(5, WIDTH, generator=generator), "patches": torch.randn(5, 4, WIDTH)})
    side = Features({name: tensor.double() * 2 for name, tensor in side.tensors.items()})
    made = Head(WIDTH, 7, seed=1, device=CPU).weights
    head = {name: tensor.detach().double().requires_grad_(True) for name, tensor in made.items()}
    settings = {"gamma": 3.0, "weights": (0.7, 0.3), "normalize": normalize}
    ours, theirs = r1_penalty(side, head, **settings), penalty_by_autograd(side, head, **settings)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    trained = [head["w1"], head["b1"], head["w2"]]
    pairs = zip(torch.autograd.grad(ours, trained), torch.autograd.grad(theirs, trained))
    for found, expected in pairs:
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)
    parts = [r1_penalty(side.rows(torch.tensor(rows)), head, total=5, **settings) for rows in ([0, 3], [1, 2, 4])]
    torch.testing.assert_close(sum(parts), theirs, rtol=1e-12, atol=0)
    nobody = side.rows(torch.tensor([], dtype=torch.long))
    assert r1_penalty(nobody, head, total=5, **settings).item() == 0.0


def test_the_penalty_is_of_the_references_and_comes_on_top_of_the_hinge():
    judge, images = adversary(gradient_penalty=2.0, loss_weights=(0.5, 1.5)), batch(0)
    ids = torch.arange(TOTAL)
    reference, generated = (judge.training_features(side, ids, 1) for side in (images.reference, images.generated))
    sides = (reference["cls"], reference["patches"], generated["cls"], generated["patches"])
    hinge = hinge_head_loss(*sides, judge.head, weights=(0.5, 1.5))
    expected = penalty_by_autograd(reference, judge.head, 2.0, (0.5, 1.5), False)
    found = judge.loss(reference, generated)
    torch.testing.assert_close(found.loss, hinge.loss + expected)
    assert torch.equal(found.accuracy, hinge.accuracy)


def test_a_penalised_head_is_less_steep_at_the_references():
    slopes = []
    for gamma in (0.0, 1.0):
        trained = trainer(gradient_penalty=gamma)
        for iteration in range(40):
            trained.train(batch(0), iteration, 2)
        features = batch(0).reference["cls"].requires_grad_(True)
        weights = {name: p.detach() for name, p in trained.adversary.head.items()}
        hidden = torch.nn.functional.gelu(features @ weights["w1"].T + weights["b1"]) @ weights["w2"].T
        slopes.append(torch.autograd.grad(hidden.sum(), features)[0].norm(dim=1).mean())
    assert slopes[1] < 0.6 * slopes[0]


def test_restarts_are_counted_from_the_end_of_the_warm_up():
    section = AdversarySection(warmup_iterations=5, reset_every=3)
    assert [restart_due(section, iteration) for iteration in range(15)] == [0] * 8 + [1, 0, 0, 2, 0, 0, 3]
    assert not any(restart_due(AdversarySection(warmup_iterations=5), iteration) for iteration in range(99))


def test_a_restarted_head_is_that_of_a_new_run_and_retrains_at_once():
    """Other initial weights every time, moments of 0, and `warmup_updates` updates although the schedule wants none."""
    changes = {
        "schedule": "when_fooled",
        "reset_every": 2,
        "warmup_updates": 3,
        "replay_capacity": 0,
        "reward_ema": 0.9,
    }
    trained, initial, updates = trainer(**changes), [], []
    real = trained.train
    before = {name: p.detach().clone() for name, p in trained.adversary.head.items()}

    def spy(images, iteration, count):
        initial.append({name: tensor.clone() for name, tensor in trained.adversary.state_dict().items()})
        updates.append(count)
        return real(images, iteration, count)

    trained.train = spy
    ahead = (torch.zeros(TOTAL), torch.ones(TOTAL))  # references lead: nobody is fooled
    agreed = {"optimizer_steps": 1, "agree": lambda numbers: numbers, "gather": lambda tensor: tensor}
    real(batch(0), 0, 2)
    for iteration in range(5):
        plan, _ = trained.learn(batch(iteration), ahead, torch.tensor(0.5), iteration, **agreed)
        assert plan.generator
    assert updates == [0, 0, 3, 0, 3]
    for number in (2, 4):
        assert initial[number]["average.updates"] == 0
        assert torch.equal(initial[number]["average.w1"], initial[number]["w1"])
        assert not torch.equal(initial[number]["w1"], before["w1"])
    assert not torch.equal(initial[2]["w1"], initial[4]["w1"])
    fresh = trainer(**changes)
    fresh.adversary.load_state_dict(initial[4])
    fresh.train(batch(4), 4, 3)
    for name, tensor in fresh.adversary.state_dict().items():
        assert torch.equal(tensor, trained.adversary.state_dict()[name]), name
    assert next(iter(trained.adversary.optimizer.state.values()))["step"] == 3


def with_first(judge: FeatureHeadAdversary, number: int) -> FeatureHeadAdversary:
    """An adversary of one head, which is head `number` of these."""
    one, prefix = adversary(), f"{number}." if number else ""
    one.load_state_dict({name: judge.state_dict()[f"{prefix}{name}"] for name in one.state_dict()})
    return one


def test_heads_score_and_learn_each_for_itself_and_the_reward_is_their_mean():
    judge, ids = adversary(heads=3, reward_weights=(1.0, 0.0), loss_weights=(1.0, 0.0)), torch.arange(TOTAL)
    images, singles = batch(0), [with_first(judge, number) for number in range(3)]
    assert torch.equal(singles[0].head["w1"], adversary().head["w1"]), "the first is that of a run with one"
    cls, first = images.generated["cls"], judge.heads[0].weights["w1"]
    own = [
        score_features(cls, images.generated["patches"], None, each.head, weights=(1.0, 0.0)).reward for each in singles
    ]
    assert not torch.allclose(own[0], own[1])
    torch.testing.assert_close(rewards(judge, 0), sum(own) / 3)
    sides = [judge.training_features(side, ids, 5) for side in (images.reference, images.generated)]
    loss = judge.loss(*sides).loss
    losses = [hinge_head_loss(*each(sides, 0), one.head, weights=(1.0, 0.0)).loss for one in singles]
    torch.testing.assert_close(loss, sum(losses) / 3)
    loss.backward()
    losses[0].backward()
    torch.testing.assert_close(first.grad, singles[0].head["w1"].grad / 3)


def each(sides: list[Features], number: int) -> tuple[torch.Tensor, ...]:
    own = slice(4 * number, 4 * number + 4)
    return sides[0]["cls"], sides[0]["patches"][:, own], sides[1]["cls"], sides[1]["patches"][:, own]


def test_every_head_draws_patches_of_its_own():
    """Patches carry their numbers."""
    judge, ids = adversary(heads=2), torch.arange(TOTAL)
    numbers = torch.arange(float(PATCHES)).view(1, PATCHES, 1).expand(TOTAL, PATCHES, WIDTH).contiguous()
    features = Features({"cls": torch.zeros(TOTAL, WIDTH), "patches": numbers})
    drawn = judge.training_features(features, ids, 5)["patches"][:, :, 0]
    assert drawn.shape == (TOTAL, 8)
    assert torch.equal(drawn[:, :4], adversary().training_features(features, ids, 5)["patches"][:, :, 0])
    assert (drawn[:, :4].sort(1).values != drawn[:, 4:].sort(1).values).any(1).sum() > TOTAL // 2
    assert judge.training_features(features.rows(ids[:0]), ids[:0], 5)["patches"].shape == (0, 8, WIDTH)
    sides = [Features({"cls": torch.zeros(2, WIDTH), "patches": torch.randn(2, 8, WIDTH)}) for _ in range(2)]
    losses = [hinge_head_loss(*each(sides, number), judge.heads[number].weights).loss for number in range(2)]
    torch.testing.assert_close(judge.loss(*sides).loss, sum(losses) / 2)


def test_spectral_norm_divides_by_the_largest_singular_values_and_its_gradient_is_theirs():
    """Against torch's singular value decomposition, in float64."""
    made = Head(WIDTH, 7, seed=1, device=CPU).weights
    weights = {name: (3 * tensor.detach()).double().requires_grad_(True) for name, tensor in made.items()}
    norm = SpectralNorm(weights["w1"].detach(), 1)
    for _ in range(2000):
        norm.iterate(weights["w1"])
    found = norm.normalised(weights)
    for name in ("w1", "w2"):
        expected = weights[name] / torch.linalg.matrix_norm(weights[name], ord=2)
        torch.testing.assert_close(found[name], expected)
        towards = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        pair = [torch.autograd.grad((towards * each).sum(), weights[name])[0] for each in (found[name], expected)]
        torch.testing.assert_close(*pair, rtol=1e-6, atol=1e-9)
    assert found["b1"] is weights["b1"]


def test_what_is_normalised_is_what_learns_and_what_gives_the_reward():
    trained = trainer(spectral_norm=True)
    for number in range(60):
        trained.train(batch(0), number, 1)
    seen = trained.adversary.heads[0].learning()
    for name in ("w1", "w2"):
        assert torch.linalg.matrix_norm(seen[name], ord=2).item() == pytest.approx(1, abs=0.1), (
            "3 if u and v stood still"
        )
    plain = adversary()
    plain.load_state_dict({name: tensor.detach() for name, tensor in seen.items()})
    torch.testing.assert_close(rewards(trained.adversary, 0), rewards(plain, 0))
    ids = torch.arange(TOTAL)
    sides = [trained.adversary.training_features(side, ids, 1) for side in (batch(0).reference, batch(0).generated)]
    torch.testing.assert_close(trained.adversary.loss(*sides).loss, plain.loss(*sides).loss)
