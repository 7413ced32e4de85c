"""Cheaper rollouts: shorter tails, scouts, and the share of the images that the update is computed of.

What is learned from keeps its bits: the window's latents and log-probabilities with a shorter tail, the kept rows of
scouts beside a run that draws all of them exactly, the gradient without dead groups.

Bugs planted in a copy, each seen red: the tail's steps as short as before; noise of a kept scout keyed by its new
number; the two best kept; ties by their place; a row's log-probability of another row after the cut; the loss's mean
over the images left.
"""

import copy
from functools import partial

import pytest
import torch

from advgrpo.config import build as configured
from advgrpo.config import check, merge
from advgrpo.errors import UserError
from advgrpo.runtime.mesh import Mesh
from advgrpo.sampling.dynamics import rows, step_table, taken_steps
from advgrpo.training.cheaper import DisagreeingTail, ShortTail, best_and_worst, rank_agreement
from advgrpo.training.informative import most_informative, without_dead
from bench.counters import flops
from tests import flux_models
from tests.parts import every_second
from tests.sampling.test_rollout import build, by_image, changed, rollout_of, without_times

FIRST_TWO = {"order": "fixed", "steps": [0, 1]}
NOISE = ("per_image", "shared")
weekly = pytest.mark.weekly


def gradients(trainer) -> list[torch.Tensor]:
    return [parameter.grad.clone() for _, parameter in trainer.policy.trainable_parameters()]


def accumulated(trainer, rollouts, advantages, table):
    stats = trainer.updater.accumulate(rollouts, advantages, table, total=len(advantages), watch_kl=False)
    return stats, gradients(trainer)


def moved(trainer):
    """The same run after some training, so that the adapters say something."""
    with torch.no_grad():
        for number, (_, parameter) in enumerate(trainer.policy.trainable_parameters()):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
            parameter.add_(0.05 * noise)
    return trainer


def counted_rows(trainer, draw) -> tuple[int, int]:
    """(rows, calls) of the network while `draw` runs."""
    policy, seen = trainer.policy, []
    for name in ("predict", "predict_merged"):
        real = getattr(policy, name)

        def counting(latents, *rest, _real=real):
            seen.append(len(latents))
            return _real(latents, *rest)

        setattr(policy, name, counting)
    try:
        draw()
    finally:
        del policy.predict, policy.predict_merged
    return sum(seen), len(seen)


# Shorter tails


@pytest.mark.parametrize(
    ("window", "tail", "taken"),
    [
        ((0, 1), 0, tuple(range(10))),
        ((0, 1), 4, (0, 1, 2, 4, 6, 8)),
        ((0, 1), 3, (0, 1, 2, 4, 7)),
        ((0, 1), 1, (0, 1, 2)),
        ((1, 4), 2, (0, 1, 2, 3, 4, 5, 7)),
        ((5, 8), 4, tuple(range(10))),
        ((8, 9), 2, tuple(range(10))),
    ],
)
def test_which_steps_are_taken(window, tail, taken):
    assert taken_steps(10, window, tail) == taken


def test_a_shorter_tail_ends_at_the_image_and_changes_no_step_before(unit_config):
    policy = build(unit_config).trainer.policy
    for window in [(0, 1), (1, 3), (2,)]:
        whole = step_table(policy, 9, window, rollout=unit_config.rollout)
        short = step_table(policy, 9, window, rollout=unit_config.rollout, tail_steps=2)
        kept, after = window[-1] + 1, [i for i in short.taken if i > window[-1]]
        assert len(after) == 2
        for name in ("timesteps", "coefficients"):
            assert torch.equal(getattr(short, name)[:kept], getattr(whole, name)[:kept])
        assert torch.equal(short.timesteps, whole.timesteps)
        assert short.coefficients[after, 1].sum().item() == pytest.approx(
            whole.coefficients[kept:, 1].sum().item(), rel=1e-6
        )
        assert (short.coefficients[after, 0] - 1).abs().max() < 1e-6
        assert (short.coefficients[after, 2] == 0).all()


def test_along_a_straight_flow_any_tail_ends_at_the_same_image(unit_config, monkeypatch):
    trainer = build(changed(unit_config, num_steps=8, guidance_scale=1.0, window=FIRST_TWO)).trainer
    velocity = torch.randn(1, *trainer.policy.latent_shape())
    for name in ("predict", "predict_merged"):
        straight = lambda latents, *_: (velocity.expand_as(latents).contiguous(), None)  # noqa: E731
        monkeypatch.setattr(trainer.policy, name, straight)
    images = []
    for tail in (0, 4, 1):
        trainer.objective.settings.tail_steps = tail
        images.append(torch.cat([each.images for each in rollout_of(trainer).micro_batches]))
    for other in images[1:]:
        torch.testing.assert_close(other, images[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("fast", "noise"), every_second([True, False], NOISE))
def test_what_is_learned_from_keeps_its_bits_with_a_shorter_tail(unit_config, noise, fast):
    unit_config.fast = fast
    settings = changed(unit_config, num_steps=8, initial_noise=noise, window={"order": "fixed", "steps": [1, 2]})
    trainer = moved(build(settings).trainer)
    whole = by_image(rollout_of(trainer))
    trainer.objective.settings.tail_steps = 2
    short = by_image(rollout_of(trainer))
    for number, (image, *learned) in whole.items():
        other_image, *others = short[number]
        assert all(torch.equal(*pair) for pair in zip(learned, others, strict=True))
        assert not torch.equal(image, other_image)


@pytest.mark.parametrize("noise", ["shared", pytest.param("per_image", marks=weekly)])
def test_rows_calls_and_flops_of_a_shorter_tail(unit_config, noise):
    """Two prompts in two micro-batches: a row each where their images are one trajectory."""
    settings = changed(unit_config, num_steps=8, initial_noise=noise, window=FIRST_TWO)
    trainer, found, work = build(settings).trainer, {}, {}
    shared = trainer.objective.sampler.share_prefix
    for tail in (0, 2):
        trainer.objective.settings.tail_steps = tail
        found[tail] = counted_rows(trainer, partial(rollout_of, trainer))
        table = trainer.objective.table(0)
        assert found[tail][0] == rows(table, prompts=2, images=8, shared=shared)
        assert found[tail][1] == 2 * len(table.taken)
        latents = torch.zeros(4, *trainer.policy.latent_shape())
        decoding = 2 * flops(partial(trainer.policy.decode, latents))
        work[tail] = flops(partial(rollout_of, trainer)) - decoding
    assert found[0] == ((58, 16) if shared else (64, 16))
    assert found[2] == ((26, 8) if shared else (32, 8))
    assert work[2] / work[0] == pytest.approx(found[2][0] / found[0][0], rel=0.1)


# Whether it may be shorter


def test_rank_agreement_is_kendalls_tau_b_of_each_group():
    one = torch.tensor([1.0, 2, 3, 4, 1, 2, 3, 4])
    assert rank_agreement(one, one, 4) == 1
    assert rank_agreement(one, -one, 4) == -1
    other = torch.tensor([1.0, 2, 4, 3, 1, 2, 3, 4])  # a swap: 5 of 6 pairs agree, 1 does not
    assert rank_agreement(one, other, 4).item() == pytest.approx((4 / 6 + 1) / 2)
    tied = torch.tensor([1.0, 1, 3, 4, 0, 0, 0, 0])  # 5 untied pairs agree; the second group says nothing
    assert rank_agreement(one, tied, 4).item() == pytest.approx(5 / (6 * 5) ** 0.5)
    assert rank_agreement(one, torch.zeros(8), 4).isnan()
    shifted = torch.cat([one[:4], one[4:] + 100])  # levels of groups do not count
    assert rank_agreement(shifted, one, 4) == 1


def test_a_run_measures_its_own_pictures_and_goes_on_where_they_agree(unit_config):
    settings = changed(unit_config, num_steps=8, window=FIRST_TWO, tail_steps=3, tail_agreement=0.0, tail_check_every=2)
    trainer = moved(build(settings).trainer)
    short, scorer = rollout_of(trainer), trainer.objective.scorer
    rewards = [scorer.score(short, 0).rewards]
    trainer.objective.settings.tail_steps = 0
    rewards.append(scorer.score(rollout_of(trainer), 0).rewards)
    trainer.objective.settings.tail_steps = 3
    rows_of = [[trainer.iterate()["tail_agreement"] for _ in range(3)]]
    assert rows_of[0][0] == pytest.approx(rank_agreement(*rewards, 4).item())
    assert rows_of[0][1] is None
    assert rows_of[0][2] is not None


def ranked_otherwise(trainer, monkeypatch):
    """Images by all steps get the opposite rewards of those by fewer."""
    scorer, seen = trainer.objective.scorer, []
    real = scorer.score
    monkeypatch.setattr(scorer, "score", lambda *which: seen.append(real(*which)) or seen[-1])
    monkeypatch.setattr(scorer, "totals", lambda *_: -seen[-1].rewards)
    return trainer


def test_a_run_whose_tail_ranks_otherwise_ends_before_anything_is_learned(unit_config, monkeypatch):
    settings = changed(unit_config, num_steps=8, window=FIRST_TWO, tail_steps=1, tail_agreement=0.0)
    trainer = ranked_otherwise(moved(build(settings).trainer), monkeypatch)
    before = copy.deepcopy(trainer.state()[0])
    with pytest.raises(
        DisagreeingTail,
        match=r"rollout.tail_steps = 1 .* at most -\d\.\d+, below rollout.tail_agreement = 0\. .* raise",
    ):
        trainer.iterate()
    assert all(torch.equal(before[name], tensor) for name, tensor in trainer.state()[0].items())


def test_a_run_is_not_ended_for_want_of_groups(unit_config, monkeypatch):
    """Two groups that disagree on how much they disagree say little; the flag appears."""
    settings = changed(unit_config, num_steps=8, window=FIRST_TWO, tail_steps=1)
    trainer = build(settings).trainer
    scorer, real = trainer.objective.scorer, trainer.objective.scorer.score

    def score(*which):
        scored = real(*which)
        scored.rewards = torch.tensor([1.0, 2, 3, 4, 1, 2, 3, 4])
        return scored

    monkeypatch.setattr(scorer, "score", score)
    monkeypatch.setattr(scorer, "totals", lambda drawn, *_: list(drawn) and torch.tensor([1.0, 2, 3, 4, 1, 3, 4, 2]))
    assert trainer.iterate()["tail_agreement"] == pytest.approx((1 + 1 / 3) / 2)
    assert "shortened_tail" in [flag.name for flag in trainer.flags]


def test_later_disagreement_is_flagged_not_fatal(unit_config, monkeypatch):
    settings = changed(unit_config, num_steps=8, window=FIRST_TWO, tail_steps=1, tail_check_every=1)
    trainer = ranked_otherwise(moved(build(settings).trainer), monkeypatch)
    trainer.objective.short_tail.first = -1
    assert trainer.iterate()["tail_agreement"] < 0
    assert "shortened_tail" in [flag.name for flag in trainer.flags]


@pytest.mark.parametrize(("every", "due"), [(3, [2, 5, 8]), (0, [2])])
def test_when_it_is_measured(unit_config, every, due):
    settings = changed(unit_config, tail_steps=1, tail_check_every=every).rollout
    tail = ShortTail(settings, None, first=2)
    assert [i for i in range(9) if tail.due(i)] == due
    settings.tail_steps = 0
    assert not any(tail.due(i) for i in range(9))


# Scouts


def test_the_best_and_the_worst_are_kept_in_order():
    rewards = torch.tensor([5.0, 1, 3, 2, 0, 4, 7, 7, 7, 7, 7, 7])
    assert best_and_worst(rewards, 6, 4).tolist() == [0, 1, 4, 5, 6, 7, 10, 11]
    assert best_and_worst(rewards, 6, 3).tolist() == [0, 4, 5, 6, 10, 11]
    assert best_and_worst(rewards, 12, 12).tolist() == list(range(12))


@pytest.mark.parametrize("noise", NOISE)
@pytest.mark.parametrize("fast", [True, pytest.param(False, marks=weekly)])
def test_kept_scouts_have_the_bits_of_a_run_that_draws_all_exactly(unit_config, noise, fast):
    """Latents, log-probabilities and images; the scouts themselves came by another path."""
    unit_config.fast = fast
    window = {"order": "fixed", "steps": [1, 2]}
    assert_kept_scouts_are_exact(changed(unit_config, num_steps=8, initial_noise=noise, window=window))


@weekly
def test_kept_scouts_are_exact_where_scouts_are_drawn_in_fp8(unit_config, tmp_path):
    """ODE steps of the kept ones are in FP8 as well; the window's are not, and scouts have those in FP8, too."""
    unit_config.fast, unit_config.rollout.precision = True, "fp8"
    unit_config.model.path = str(flux_models.save_pipeline(tmp_path / "flux"))
    unit_config.model.max_sequence_length = 16
    window = {"order": "fixed", "steps": [1, 2]}
    trainer = assert_kept_scouts_are_exact(changed(unit_config, num_steps=8, window=window))
    assert sum(layer.merged_fp8 is not None for layer in trainer.policy.network.transformer.linears()) > 4


def assert_kept_scouts_are_exact(base):
    everything = by_image(rollout_of(moved(build(changed(base, group_size=12)).trainer)))
    trainer = moved(build(changed(base, scouts=3, scout_tail_steps=2)).trainer)
    objective = trainer.objective
    chosen = objective.choose(objective.table(0), trainer.begin(0))
    assert len(chosen) == len(chosen.unique()) == 8
    assert ((chosen // 12) == torch.arange(8) // 4).all()
    kept = by_image(objective.rollout(objective.table(0), 0, chosen))
    for number, draw in enumerate(chosen.tolist()):
        assert all(torch.equal(*pair) for pair in zip(kept[number], everything[draw], strict=True))
    ranks = objective.scouts.rewards.view(-1, 4)
    exact = objective.scorer.score(objective.rollout(objective.table(0), 0, chosen), 0).rewards
    assert not torch.equal(ranks.flatten(), exact)
    assert rank_agreement(ranks.flatten(), exact, 4) > 0.3
    return trainer


def test_scouts_on_the_exact_path_are_worth_what_they_become(unit_config):
    """Rewards too are keyed by the draw: the patches that the head looks at, and the crop that it sees."""
    settings = changed(unit_config, scouts=2, window=FIRST_TWO)
    settings.fast, settings.adversary.augment = False, "crop_flip"
    trainer = build(settings).trainer
    objective = trainer.objective
    chosen = objective.choose(objective.table(0), trainer.begin(0))
    exact = objective.scorer.score(objective.rollout(objective.table(0), 0, chosen), 0).rewards
    torch.testing.assert_close(objective.scouts.rewards, exact, rtol=1e-4, atol=1e-5)


def test_rows_of_scouts(unit_config):
    settings = changed(unit_config, num_steps=8, initial_noise="shared", window=FIRST_TWO, scouts=3, scout_tail_steps=2)
    trainer = build(settings).trainer
    objective, table = trainer.objective, trainer.objective.table(0)
    found, _ = counted_rows(trainer, lambda: objective.choose(table, trainer.begin(0)))
    # 24 images in micro-batches of 4 that begin at one row each, then one window step and two after it
    cheap = step_table(trainer.policy, 8, (0, 1), rollout=settings.rollout.of_scouts)
    assert found == rows(cheap, prompts=6, images=24, shared=True) == 6 + 3 * 24


@pytest.mark.parametrize("noise", ["shared", pytest.param("per_image", marks=weekly)])
def test_all_of_it_together_is_on_policy_and_resumes_bit_for_bit(unit_config, noise):
    unit_config.update.learning_rate = 1e-2
    settings = changed(
        unit_config,
        **{"num_steps": 6, "initial_noise": noise, "micro_batch": 2, "scouts": 2, "scout_tail_steps": 1},
        **{"tail_steps": 2, "tail_agreement": 0.0, "tail_check_every": 2, "window": {"order": "contiguous"}},
    )
    settings.update.informative_share, settings.update.skip_dead_groups = 0.5, True
    check(settings, with_data=False)
    going, resumed = build(settings).trainer, build(settings).trainer
    going.iterate()
    tensors, state = copy.deepcopy(going.state())
    metrics = [going.iterate(), going.iterate()]
    resumed.load(tensors, state)
    again = [resumed.iterate(), resumed.iterate()]
    assert list(map(without_times, again)) == list(map(without_times, metrics))
    for row in metrics:
        assert row["log_prob_mismatch_max"] == row["pre_update_clip_fraction"] == 0
        assert row["grad_norm"] > 0
        assert -1 <= row["scout_agreement"] <= 1
    weights = [[p for _, p in trainer.policy.trainable_parameters()] for trainer in (going, resumed)]
    assert all(torch.equal(*pair) for pair in zip(*weights, strict=True))


# The informative share


@pytest.mark.parametrize("noise", NOISE)
def test_the_gradient_without_dead_groups_has_the_same_bits(unit_config, noise):
    trainer = moved(build(changed(unit_config, initial_noise=noise, micro_batch=2, window=FIRST_TWO)).trainer)
    rollout, table = rollout_of(trainer), trainer.objective.table(0)
    advantages = torch.tensor([0.0, 0, 0, 0, 1.5, -0.5, -1, 0])
    _, whole = accumulated(trainer, rollout.micro_batches, advantages, table)
    alive = without_dead(rollout.micro_batches, advantages)
    assert [each.micro_batch.image_ids.tolist() for each in alive] == [[4, 5], [6, 7]]
    _, part = accumulated(trainer, alive, advantages, table)
    assert any(gradient.any() for gradient in whole)
    assert all(torch.equal(*pair) for pair in zip(whole, part, strict=True))


@pytest.mark.parametrize(("trust_region", "noise"), every_second(["ratio", "divergence"], NOISE))
def test_the_gradient_of_the_most_informative_is_the_whole_one_without_the_others(unit_config, noise, trust_region):
    """In micro-batches of the rollout's shape, so that log-probabilities keep their bits."""
    settings = changed(unit_config, initial_noise=noise, micro_batch=2, window=FIRST_TWO)
    settings.update.trust_region, settings.update.max_divergence = trust_region, 1.0
    trainer = moved(build(settings).trainer)
    rollout, table = rollout_of(trainer), trainer.objective.table(0)
    advantages = torch.tensor([0.1, -1.5, 0.2, 1.2, 0.5, 0.5, -1, 0.5])
    kept = most_informative(rollout.micro_batches, advantages, group_size=4, kept=2)
    assert [each.micro_batch.image_ids.tolist() for each in kept] == [[1, 3], [4, 6]]
    stats, part = accumulated(trainer, kept, advantages, table)
    assert stats.max_mismatch() == 0
    assert stats.pairs == 2 * len(table.trained) * 2
    without = torch.zeros(8).index_copy(0, torch.tensor([1, 3, 4, 6]), advantages[[1, 3, 4, 6]])
    _, whole = accumulated(trainer, rollout.micro_batches, without, table)
    for one, other in zip(part, whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6 * other.abs().max().item())
    _, of_all = accumulated(trainer, rollout.micro_batches, advantages, table)
    assert not all(torch.allclose(one, other, rtol=1e-2) for one, other in zip(of_all, whole))


def test_what_is_dead_is_left_out_of_what_is_informative(unit_config):
    """The first two images of a group without a say, the others with one: its micro-batches are no whole group then."""
    settings = changed(unit_config, micro_batch=2, window=FIRST_TWO)
    settings.update.informative_share, settings.update.skip_dead_groups = 0.5, True
    objective = build(settings).trainer.objective
    rollout = objective.rollout(objective.table(0), 0)
    learned = objective._learned(rollout.micro_batches, torch.tensor([0.0, 0, 1, -1, 0, 0, 0, 0]))
    assert [each.micro_batch.image_ids.tolist() for each in learned] == [[2, 3]]


@pytest.mark.parametrize("share", [pytest.param(1.0, marks=weekly), 0.5])
def test_the_kl_is_measured_by_whoever_has_the_first_group_with_a_say(unit_config, share):
    """Two processes with a group in either minibatch: one measures, in the micro-batch that a lone process takes."""
    settings = changed(unit_config, micro_batch=2, prompts_per_iteration=4, window=FIRST_TWO)
    settings.update.skip_dead_groups, settings.update.informative_share = True, share
    objective = build(settings).trainer.objective
    mine, updater, table = objective.micro_batches, objective.updater, objective.table(0)
    cases = {0: (0, 0), 2: (0, 0), 4: (1, 0), 8: (0, 1), 14: (1, 1)}  # first image with a say -> (process, minibatch)
    for image, (process, minibatch) in cases.items():
        advantages = torch.zeros(16)
        advantages[image], advantages[15] = -1.0, 1.0
        measured = {}
        for mine.mesh in (Mesh(0, 1), Mesh(0, 2), Mesh(1, 2)):
            rollout = objective.rollout(table, 0)
            watching = objective._watching(rollout.micro_batches, advantages)
            learned = objective._learned(rollout.micro_batches, advantages)
            own = [each for each in learned if each.micro_batch.minibatch == watching]
            stats = updater.accumulate(own, advantages, table, total=8, watch_kl=watching is not None)
            measured[mine.mesh.rank, mine.mesh.world_size] = watching, stats.kl_pairs, float(stats.sums()[3])
        alone = measured[0, 1]
        assert alone[:2] == (minibatch, 2)
        assert measured[process, 2] == alone
        assert measured[1 - process, 2] == (None, 0, 0.0)


def test_an_iteration_of_dead_groups_alone_trains_nothing_and_says_so(unit_config, monkeypatch):
    settings = changed(unit_config, window=FIRST_TWO)
    settings.update.skip_dead_groups = True
    trainer = build(settings).trainer
    real = trainer.objective.advantages

    def dead(scored):
        return real(scored)._replace(advantages=torch.zeros(8))

    monkeypatch.setattr(trainer.objective, "advantages", dead)
    seen, _ = counted_rows(trainer, trainer.iterate)
    row = trainer.iterate()
    assert seen == 2 * (1 + 3 * 4) if settings.rollout.initial_noise == "shared" else seen == 4 * 8
    assert row["grad_norm"] == 0
    assert row["policy_loss"] is row["ratio_mean"] is row["kl"] is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rollout": {"tail_steps": 9}}, "rollout.tail_steps = 9 shortens nothing: at most"),
        ({"rollout": {"scout_tail_steps": 1}}, "would not be looked at: rollout.scouts = 1 draws none"),
        (
            {"rollout": {"num_steps": 8, "window": FIRST_TWO, "scouts": 2, "tail_steps": 1, "scout_tail_steps": 2}},
            "scouts would cost more",
        ),
        ({"update": {"informative_share": 0.5}}, "set update.informative_share to one of|to a divisor of both"),
        (
            {"update": {"informative_share": 0.5, "minibatches": 2}, "rollout": {"micro_batch": 2, "group_size": 4}},
            None,
        ),
        ({"update": {"skip_dead_groups": True, "kl_weight": 0.1}}, "would leave images out of the KL"),
        (
            {
                "update": {"objective": "nft", "skip_dead_groups": True},
                "rollout": {"initial_noise": "per_image"},
            },
            "update.skip_dead_groups = True is the policy gradient's",
        ),
        (
            {"update": {"objective": "nft"}, "rollout": {"scouts": 2, "initial_noise": "per_image"}},
            "rollout.scouts = 2 is of the policy gradient's window",
        ),
    ],
)
def test_settings_that_ask_for_nothing_or_too_much(unit_config, changes, message):
    settings = configured(merge(unit_config.model_dump(mode="json"), changes), "test")
    if message is None:
        check(settings)
        with pytest.raises(UserError, match=r"whole groups in every minibatch: set .* a multiple of .*minibatches = 2"):
            check(settings.model_copy(update={"rollout": settings.rollout.model_copy(update={"prompts_per_iteration": 3,
                                              "group_size": 4, "micro_batch": 2})}))  # fmt: skip
    else:
        with pytest.raises(UserError, match=message):
            check(settings)
