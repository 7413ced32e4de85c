"""Red flags: each trips on the series it is defined by and no other does, and in a run built to trip it; healthy runs
raise none; resume is exact.

`golden/healthy_tiny_run.json` holds the metrics of a run that improved both held-out metrics, of an earlier world; its
`_source` says how it was made. A run of today's default is in recorded/ (test_held_out.py).

Bugs planted in a copy, each seen red: no median over the window; a flag that never clears; the reward's rise without
the references'; drift towards the references counted; the baseline lost on resume; no trend, or no fall, needed for a
collapse; warm-up judged; no floor for diversity; Adam's share upside down; sleeping and overpowered mixed up; edges
found at the border; n x n instead of n (n - 1) pairs; reference statistics without resizing; gradient RMS before
clipping; monitor.stop ignored; the monitor left out of the checkpoint; a fixed reward's lead over the references left
out; the DINO distance left out; a recorded run without a metric that a flag judges.
"""

import io
import json
import random
from functools import partial
from pathlib import Path

import pytest
import torch
from rich.console import Console

from advgrpo import config
from advgrpo.config.judge_checks import IMAGE_STATISTICS
from advgrpo.monitor.image_statistics import (
    ImageStatistics,
    group_diversity,
    image_statistics,
    reference_statistics,
)
from advgrpo.monitor.monitor import RED_FLAGS, Knobs, Monitor, kendall_tau, noise
from advgrpo.runtime.distributed import Distributed
from advgrpo.training.run import Run

HEALTHY = json.loads((Path(__file__).parents[1] / "golden" / "healthy_tiny_run.json").read_text())["rows"]


# of the runs whose metrics are recorded here
AS_RECORDED = {
    "iterations": 150,
    "adversary": {"schedule": "when_fooled", "fooled_margin": 2.0, "warmup_iterations": 6},
    "evaluation": {"metrics": ["dino_similarity", "rule_accuracy"]},
}


def settings(**changes):
    base = config.merge(config.read_preset("tiny"), AS_RECORDED)
    return config.build(config.merge(base, changes), "test")


def healthy_row(i, noise):
    """An iteration of a run in good order, with the noise of a real one."""
    return {
        "iteration": i,
        "reward_generated": -1.5 + 0.5 * noise(),
        "reward_reference": 1.0 + 0.5 * noise(),
        "reward_std": 0.7 + 0.1 * noise(),
        "zero_std_fraction": 0.0,
        "discriminator_accuracy": min(1.0, 0.8 + 0.08 * noise()),
        "discriminator_paired_accuracy": min(1.0, 1.0 + 0.01 * noise()),
        "log_prob_mismatch_max": 0.0,
        "pre_update_clip_fraction": 0.0,
        "grad_norm": 3e-3,
        "monitor_gradient_rms": 5e-6,
        "monitor_group_diversity": 0.06 * (1 + 0.3 * noise()),
        **{f"monitor_{name}": 0.5 + 0.02 * noise() for name in IMAGE_STATISTICS},
        **{f"monitor_reference_{name}": 0.5 + 0.02 * noise() for name in IMAGE_STATISTICS},
    }


def series(count, change=lambda i, row, noise: {}, seed=0):
    draw = random.Random(seed)
    rows = []
    for i in range(count):
        row = healthy_row(i, lambda: draw.gauss(0, 1))
        rows.append({**row, **change(i, row, lambda: draw.gauss(0, 1))})
    return rows


def images(row):
    return ImageStatistics(
        {name: row[f"monitor_{name}"] for name in IMAGE_STATISTICS},
        {name: row[f"monitor_reference_{name}"] for name in IMAGE_STATISTICS},
        row["monitor_group_diversity"],
    )


def feed(monitor, rows):
    """The names of the active flags after each iteration."""
    return [[flag.name for flag in monitor.check(row, images(row))] for row in rows]


def make(**changes):
    built = settings(**changes)
    return Monitor(built.monitor, Knobs.of(built))


def ramp(i, start, length):
    return min(max((i - start) / length, 0.0), 1.0)


# name -> (settings, what goes wrong from iteration 30 on)
TRIPS = {
    "reward_collapse": ({}, lambda i, row, n: {"reward_reference": 3 - 6 * ramp(i, 20, 70) + 0.5 * n()}),
    "mode_collapse": ({}, lambda i, row, n: {"monitor_group_diversity": 0.06 * 0.9 ** max(0, i - 30)}),
    "reward_hacking": (
        {"adversary": {"schedule": "never"}},
        lambda i, row, n: {
            "reward_generated": row["reward_generated"] + 4 * ramp(i, 30, 30),
            "monitor_saturation": row["monitor_saturation"] + 0.15 * ramp(i, 30, 30),
        },
    ),
    "dead_groups": ({}, lambda i, row, n: {"zero_std_fraction": 0.5 * ramp(i, 30, 20)}),
    "slow_convergence": ({"rollout": {"group_size": 4}}, lambda i, row, n: {}),
    "off_policy": (
        {"update": {"max_log_prob_mismatch": 1.0}},
        lambda i, row, n: {"log_prob_mismatch_max": 1e-5 if i >= 30 else 0.0},
    ),
    "adam_eps": ({}, lambda i, row, n: {"monitor_gradient_rms": 5e-6 * 10 ** (-3 * ramp(i, 30, 20))}),
    "overpowered_adversary": ({}, lambda i, row, n: {"discriminator_accuracy": 0.8 + 0.2 * ramp(i, 30, 10)}),
    "sleeping_adversary": (
        {},
        lambda i, row, n: {"discriminator_paired_accuracy": 0.5 + 0.03 * n()} if i >= 30 else {},
    ),
    "shortened_tail": (
        {"rollout": {"tail_steps": 2}},
        lambda i, row, n: {"tail_agreement": 0.8 if i > 30 else 0.9} if i % 5 == 0 else {},
    ),
}


def test_every_flag_has_a_series_that_trips_it():
    names = [kind.name for kind in RED_FLAGS]
    assert sorted(TRIPS) == sorted(names) == sorted(config.FlagName.__args__)


@pytest.mark.parametrize("name", TRIPS)
def test_a_flag_trips_on_its_own_series_alone(name):
    changes, change = TRIPS[name]
    for seed in range(3):
        active = feed(make(**changes), series(100, change, seed))
        assert {flag for names in active for flag in names} == {name}
        if name != "slow_convergence":
            assert not any(active[:31])
        assert active[-1] == [name] or name == "reward_collapse"  # which clears once the fall has ended


@pytest.mark.parametrize("name", TRIPS)
def test_messages_and_advice_name_existing_fields_with_their_values(name):
    changes, change = TRIPS[name]
    monitor = make(**config.merge(changes, {"monitor": {"stop": [name]}}))
    seen = [flag for row in series(100, change) for flag in monitor.check(row, images(row))]
    flag = seen[0]
    assert flag.stop and flag.name in str(flag) and flag.advice in str(flag)  # noqa: PT018
    fields = [word.strip("(),.;") for word in flag.advice.split() if "." in word.strip("(),.;")]
    fields = [f for f in fields if f.partition(".")[0] in config.Config.model_fields]
    for field in fields or pytest.fail("no field is named"):
        if field == "data.prompts":  # a path, of which nobody needs to be told
            continue
        section, _, leaf = field.partition(".")
        value = getattr(getattr(monitor.knobs, section), leaf)
        shown = f"{value:g}" if isinstance(value, float) else str(value)
        assert f"{field} (now {shown})" in flag.advice


def test_healthy_runs_raise_nothing():
    monitor = make()
    assert not any(feed(monitor, HEALTHY))
    unread = {red_flag.name for red_flag in monitor.red_flags if red_flag.last is None}
    assert unread == {"shortened_tail"}, "no other for want of a metric; a run without rollout.tail_steps has none"
    for seed in range(5):
        assert not any(feed(make(), series(150, seed=seed)))


def test_one_odd_iteration_raises_nothing_and_one_good_one_clears_nothing():
    odd = {
        "reward_reference": -50.0,
        "zero_std_fraction": 1.0,
        "log_prob_mismatch_max": 1.0,
        "monitor_gradient_rms": 1e-12,
        "discriminator_accuracy": 1.0,
        "discriminator_paired_accuracy": 0.5,
        "monitor_group_diversity": 0.0,
        "monitor_saturation": 1.0,
    }
    assert not any(feed(make(), series(80, lambda i, row, n: odd if i == 40 else {})))
    assert not any(feed(make(), series(80, lambda i, row, n: odd if i in (40, 50) else {})))
    active = feed(make(), series(80, lambda i, row, n: {"zero_std_fraction": 0.6 * (i != 60)}))
    assert all(names == ["dead_groups"] for names in active[30:])


def test_bad_readings_must_follow_each_other():
    """off_policy looks at each iteration by itself, so two of three here are bad, and no three in a row."""
    assert not any(feed(make(), series(80, lambda i, row, n: {"log_prob_mismatch_max": float(i % 3 > 0)})))
    active = feed(make(), series(80, lambda i, row, n: {"log_prob_mismatch_max": float(i >= 40)}))
    assert [i for i, names in enumerate(active) if names] == list(range(42, 80))


def test_a_flag_clears_when_the_cause_is_gone():
    active = feed(make(), series(100, lambda i, row, n: {"zero_std_fraction": 0.6 if 20 <= i < 50 else 0.0}))
    held = [i for i, names in enumerate(active) if names == ["dead_groups"]]
    # the median of 10 turns with the fifth or sixth value, and three readings must agree
    assert held == list(range(held[0], held[-1] + 1))
    assert 20 + 5 <= held[0] <= 20 + 9
    assert 50 + 5 <= held[-1] <= 50 + 9


def test_an_adversary_that_ranks_a_prompts_pairs_is_awake_whatever_its_threshold_says():
    """PickScore's scores share a level and a converged game keeps a head's threshold at one half."""
    assert not any(feed(make(), series(60, lambda i, row, n: {"discriminator_accuracy": 0.5 + 0.02 * n()})))
    for schedule, advice in (("never", "(now never)"), ("always", "Raise adversary"), ("when_fooled", "margin")):
        monitor = make(adversary={"schedule": schedule})
        feed(monitor, series(60, lambda i, row, n: {"discriminator_paired_accuracy": 0.5}))
        (flag,) = monitor.active()
        assert (flag.name, advice in flag.advice) == ("sleeping_adversary", True)


def test_hacking_needs_both_the_reward_and_the_drift():
    def drift(sign, gain):
        def change(i, row, noise):
            return {
                "reward_generated": row["reward_generated"] + gain * ramp(i, 20, 30),
                "monitor_dark_share": row["monitor_dark_share"] + sign * 0.2 * ramp(i, 20, 30),
            }

        return change

    assert feed(make(), series(80, drift(+1, 4.0)))[-1] == ["reward_hacking"]
    assert feed(make(), series(80, drift(-1, 4.0)))[-1] == ["reward_hacking"]
    assert not any(feed(make(), series(80, drift(+1, 0.0))))
    assert not any(feed(make(), series(80, drift(0, 4.0))))

    def approach(i, row, noise):  # starts 0.2 away from the references and comes closer: that is progress
        return {**drift(+1, 4.0)(i, row, noise), "monitor_reference_dark_share": row["monitor_dark_share"] + 0.2}

    assert not any(feed(make(), series(80, approach)))


def test_a_fall_that_ends_is_no_collapse():
    """The references' reward of a fooled head sinks by about three spreads and stays there."""

    def settle(i, row, noise):
        return {"reward_reference": 2.5 - 2 * ramp(i, 10, 20) + 0.5 * noise()}

    assert not any(feed(make(), series(120, settle)))
    deep = series(120, lambda i, row, n: {"reward_reference": 2.5 - 6 * ramp(i, 10, 30) + 0.5 * n()})
    assert feed(make(), deep)[-1] == []  # however deep: what counts is that it goes on

    def noisy_level(i, row, noise):  # large noise around a level is no fall either
        return {"reward_reference": 5 * noise()}

    for seed in range(3):
        assert not any(feed(make(), series(120, noisy_level, seed)))


def test_an_overall_shift_of_the_head_is_no_gain():
    def shift(i, row, noise):
        lift = 5 * ramp(i, 20, 30)
        return {
            "reward_generated": row["reward_generated"] + lift,
            "reward_reference": row["reward_reference"] + lift,
            "monitor_saturation": row["monitor_saturation"] + 0.2 * ramp(i, 20, 30),
        }

    assert not any(feed(make(), series(80, shift)))


def test_every_trained_reward_is_watched_for_hacking_by_itself():
    """Normalised by group, the composed reward has a mean of zero whatever its parts do."""
    rewards = {"adversary": {"normalize": "group"}, "pickscore": {"weight": 1.0, "normalize": "group"}}

    def composed(gain):
        def change(i, row, noise):
            return {
                "reward_generated": 0.0,
                "reward_adversary": row["reward_generated"] + 5 * ramp(i, 20, 30),  # a shift of the whole head
                "reward_reference": row["reward_reference"] + 5 * ramp(i, 20, 30),
                "reward_pickscore": 0.8 + 0.01 * (noise() + 6 * gain * ramp(i, 20, 30)),
                "monitor_saturation": row["monitor_saturation"] + 0.15 * ramp(i, 20, 30),
            }

        return change

    hacked = make(rewards=rewards)
    assert feed(hacked, series(80, composed(1.0)))[-1] == ["reward_hacking"]
    assert "reward_pickscore rose by" in hacked.active()[0].message
    only_logged = {**rewards, "pickscore": {"weight": 0.0}}
    for seed in range(5):
        assert not any(feed(make(rewards=rewards), series(80, composed(0.0), seed)))
        assert not any(feed(make(rewards=only_logged), series(80, composed(1.0), seed)))


def test_a_small_rise_is_seen_beside_what_the_same_prompts_references_get():
    """Prompts move the reward by three times what training does; the references' scores move with it."""
    rewards = {"pickscore": {"weight": 1.0, "path": "tiny"}}

    def preference(controlled, lost):
        def change(i, row, noise):
            level = 0.3 * noise()  # the iteration's prompts
            given = {"reward_pickscore": 0.5 + level + 0.01 * noise() + 0.1 * ramp(i, 20, 30), "reward_reference": None}
            given |= {"reward_pickscore_of_references": 0.5 + level} if controlled else {}
            return {**given, "dino_similarity": 0.84 + 0.01 * noise() - lost * ramp(i, 20, 30)}

        return change

    def active(controlled, lost, seed):
        monitor = make(rewards=rewards, adversary={"kind": "none"})
        return feed(monitor, series(80, preference(controlled, lost), seed))[-1], monitor

    for seed in range(5):
        names, monitor = active(True, 0.1, seed)
        assert names == ["reward_hacking"]
        assert "DINO distance went from +0.1" in monitor.active()[0].message
        assert active(False, 0.1, seed)[0] == []  # drowned
        assert active(True, 0.0, seed)[0] == []  # a rise alone is progress


def test_without_references_images_are_compared_with_the_start():
    def change(step):
        return lambda i, row, noise: {
            "reward_reference": None,
            "reward_generated": row["reward_generated"] + 4 * ramp(i, 20, 30),
            "monitor_saturation": row["monitor_saturation"] + step * ramp(i, 20, 30),
        }

    for step, expected in ((0.2, ["reward_hacking"]), (-0.2, ["reward_hacking"]), (0.0, [])):
        monitor = make(adversary={"kind": "none"})
        for row in series(80, change(step)):
            own = ImageStatistics({name: row[f"monitor_{name}"] for name in IMAGE_STATISTICS}, {}, None)
            active = monitor.check(row, own)
        assert [flag.name for flag in active] == expected
        assert not active or "set adversary.kind (now none)" in active[0].advice


def test_a_run_that_starts_collapsed_is_caught_by_the_floor():
    assert feed(make(), series(40, lambda i, row, n: {"monitor_group_diversity": 0.0}))[-1] == ["mode_collapse"]


def test_warm_up_and_iterations_without_a_generator_update_are_not_judged():
    untrained = {"discriminator_paired_accuracy": 0.5, "monitor_group_diversity": 0.0}
    active = feed(make(adversary={"warmup_iterations": 20}), series(20, lambda i, row, n: untrained))
    assert not any(active)
    none = dict.fromkeys(("zero_std_fraction", "log_prob_mismatch_max", "pre_update_clip_fraction", "grad_norm",
                          "monitor_gradient_rms"))  # fmt: skip
    alternate = series(200, lambda i, row, n: {} if i % 10 == 9 else none)
    assert not any(feed(make(adversary={"schedule": "alternate"}), alternate))


@pytest.mark.parametrize("name", TRIPS)
def test_resuming_at_any_iteration_equals_never_stopping(name):
    changes, change = TRIPS[name]
    rows = series(90, change)
    whole = make(**changes)
    expected = feed(whole, rows)
    parts, active = make(**changes), []
    for start in range(0, 90, 7):
        resumed = make(**changes)
        resumed.load(resumed.checked(json.loads(json.dumps(parts.state()))))
        assert resumed.active() == parts.active()
        active += feed(resumed, rows[start : start + 7])
        parts = resumed
    assert active == expected
    assert parts.state() == whole.state()
    assert len(json.dumps(parts.state())) < 20_000


def test_every_n_iterations_and_switched_off():
    assert [[i for i in range(7) if make(monitor={"every": n}).due(i)] for n in (3, 0)] == [[0, 3, 6], []]


def test_noise_is_the_standard_deviation_without_the_trend():
    draw = random.Random(0)
    flat = [draw.gauss(0, 2) for _ in range(4000)]
    assert noise(flat) == pytest.approx(2, rel=0.05)
    assert noise([value + 0.1 * i for i, value in enumerate(flat)]) == pytest.approx(2, rel=0.05)
    assert noise([1.0, 1.0, 1.0]) == 1e-12


def test_kendalls_tau_on_known_answers():
    assert kendall_tau([1, 2, 3, 4]) == 1
    assert kendall_tau([4, 3, 2, 1]) == -1
    assert kendall_tau([1, 3, 2, 4]) == pytest.approx(4 / 6)
    assert kendall_tau([5, 5, 5]) == 0


def test_image_statistics_on_known_images():
    size = 16
    red = torch.tensor([1.0, 0.0, 0.0]).view(3, 1, 1).expand(3, size, size)
    pale = torch.tensor([1.0, 0.5, 0.5]).view(3, 1, 1).expand(3, size, size)
    grey, black = torch.full((3, size, size), 0.5), torch.zeros(3, size, size)
    halves = torch.zeros(3, size, size)
    halves[:, :, size // 2 :] = 1.0
    faint = 0.5 + 0.05 * halves  # a step of 0.05: too weak for an edge
    found = image_statistics(torch.stack([red, pale, grey, black, halves, halves.transpose(1, 2), faint]))
    assert found["saturation"].tolist() == pytest.approx([1, 0.5, 0, 0, 0, 0, 0])
    assert found["dark_share"].tolist() == pytest.approx([0, 0, 0, 1, 0.5, 0.5, 0])
    assert found["edge_density"].tolist() == pytest.approx([0, 0, 0, 0, 2 / size, 2 / size, 0])
    with pytest.raises(ValueError, match=r"want images \[B, 3, H, W\]"):
        image_statistics(red)


def test_group_diversity_is_the_mean_distance_of_pairs():
    features = torch.randn(12, 5)
    expected = []
    for group in torch.nn.functional.normalize(features, dim=1).view(3, 4, 5):
        expected += [1 - group[i] @ group[j] for i in range(4) for j in range(4) if i != j]
    assert group_diversity(features, 4).item() == pytest.approx(torch.stack(expected).mean().item(), rel=1e-5)
    alike = torch.randn(3, 5).repeat_interleave(4, 0) * torch.rand(12, 1)  # length does not count
    assert group_diversity(alike, 4).item() == pytest.approx(0, abs=1e-6)
    assert group_diversity(alike, 12).item() > 0.1
    for size in (5, 1):
        with pytest.raises(ValueError, match="cannot be cut into groups"):
            group_diversity(features, size)


def test_reference_statistics_are_taken_at_the_images_size_and_once(tmp_path):
    from PIL import Image

    from advgrpo.data.references import ReferenceSet

    for name, colour in (("red", (255, 0, 0)), ("grey", (9, 9, 9))):
        image = Image.new("RGB", (64, 64), colour)
        image.paste((255, 255, 255), (32, 0, 64, 64))
        image.save(tmp_path / f"{name}.png")
    (tmp_path / "references.json").write_text(json.dumps({"a": ["red.png", "grey.png"]}))
    references = ReferenceSet.load(tmp_path, ["a"])
    statistics = partial(reference_statistics().of_prompt, references)
    found = dict(zip(IMAGE_STATISTICS, statistics("a", (16, 16)).tolist()))
    assert found["saturation"] == pytest.approx(0.25, abs=0.05)  # half of one image, none of the other
    assert found["dark_share"] == pytest.approx(0.25, abs=0.05)
    assert found["edge_density"] > 2 / 16 * 0.9  # two columns of 16; it would be 2 / 64 at the files' own size
    (tmp_path / "red.png").unlink()
    assert statistics("a", (16, 16)) is statistics("a", (16, 16))


def watched(unit_config, **monitor) -> Run:
    """A run whose monitor judges quickly: 2 checks make a level, 5 a trend."""
    for name, value in {"window": 2, "trend_window": 5, "persistence": 1, **monitor}.items():
        setattr(unit_config.monitor, name, value)
    return Run(unit_config, Distributed.start("cpu"), resume=False, console=Console(quiet=True))


def flags_of(run, iterations) -> set[str]:
    """Every flag seen."""
    seen = set()
    for _ in range(iterations):
        metrics = run.trainer.iterate()
        seen |= {flag.name for flag in run.trainer.flags}
    assert {f"monitor_{name}" for name in (*IMAGE_STATISTICS, "group_diversity", "gradient_rms")} <= metrics.keys()
    return seen


def test_a_run_with_small_groups_large_eps_a_frozen_head_and_foreign_likelihoods(unit_config, monkeypatch):
    """slow_convergence, adam_eps, sleeping_adversary and off_policy."""
    unit_config.update.eps = 0.1
    unit_config.update.max_log_prob_mismatch = 1.0
    unit_config.adversary.learning_rate = 1e-12
    run = watched(unit_config)
    for parameter in run.trainer.objective.scorer.adversary.parameters():
        parameter.data.zero_()
    real = run.trainer.objective.rollout

    def drifting(*which):
        rollout = real(*which)
        for micro_batch in rollout.micro_batches:
            for step in micro_batch.steps:
                step.log_prob = step.log_prob + 1e-4
        return rollout

    monkeypatch.setattr(run.trainer.objective, "rollout", drifting)
    assert flags_of(run, 3) >= {"slow_convergence", "adam_eps", "sleeping_adversary", "off_policy"}


def test_a_run_whose_images_are_constant(unit_config, monkeypatch):
    """mode_collapse, dead_groups, and overpowered_adversary: grey squares are easily told from drawings."""
    unit_config.adversary.reward_weights = (1.0, 0.0)  # the local reward draws patches anew for every image
    unit_config.adversary.learning_rate, unit_config.adversary.updates_per_iteration = 0.03, 10
    unit_config.adversary.schedule = "always"
    run = watched(unit_config)
    monkeypatch.setattr(run.trainer.policy, "decode", lambda latents: torch.full((len(latents), 3, 32, 32), 0.5))
    assert flags_of(run, 8) >= {"mode_collapse", "dead_groups", "overpowered_adversary"}


@pytest.mark.weekly
def test_a_run_whose_head_learns_the_wrong_way_round(unit_config, monkeypatch):
    """reward_collapse: references and generations are swapped in the head's training."""
    unit_config.adversary.learning_rate = 0.005
    unit_config.adversary.schedule = "always"
    run = watched(unit_config, trend_window=8, collapse_drop=3.0)
    real = run.trainer.objective.discriminator_trainer.train

    def swapped(batch, iteration, updates):
        batch.reference, batch.generated = batch.generated, batch.reference
        return real(batch, iteration, updates)

    monkeypatch.setattr(run.trainer.objective.discriminator_trainer, "train", swapped)
    assert "reward_collapse" in flags_of(run, 18)


def test_a_run_whose_fixed_reward_is_saturation(unit_config, monkeypatch):
    """reward_hacking: the reward pays for colour, and the images get more of it every iteration."""
    unit_config.adversary.learning_rate = 1e-12
    run = watched(unit_config)
    trainer = run.trainer
    real_rollout, real_score = trainer.objective.rollout, trainer.objective.scorer.score

    def coloured(table, iteration, chosen):
        rollout = real_rollout(table, iteration, chosen)
        for micro_batch in rollout.micro_batches:
            grey = micro_batch.images.mean(1, keepdim=True)
            micro_batch.images = (grey + (0.2 + 0.15 * iteration) * (micro_batch.images - grey)).clamp(0, 1)
        return rollout

    def saturation_pays(rollout, iteration):
        scored = real_score(rollout, iteration)
        scored.rewards = image_statistics(torch.cat([micro_batch.images for micro_batch in rollout.micro_batches]))[
            "saturation"
        ]
        scored.reference_rewards = torch.full_like(scored.rewards, 0.5)
        return scored

    monkeypatch.setattr(trainer.objective, "rollout", coloured)
    monkeypatch.setattr(trainer.objective.scorer, "score", saturation_pays)
    assert "reward_hacking" in flags_of(run, 8)


def test_the_gradient_is_measured_as_adam_sees_it(unit_config):
    unit_config.update.max_grad_norm = 1e-9
    run = watched(unit_config)
    metrics = run.trainer.iterate()
    elements = sum(p.numel() for _, p in run.trainer.policy.trainable_parameters())
    assert metrics["grad_norm"] > 1e-6
    assert metrics["monitor_gradient_rms"] == pytest.approx(1e-9 / elements**0.5)


def test_a_named_flag_ends_the_run_with_a_checkpoint_and_the_rest_can_follow(unit_config):
    unit_config.monitor.stop = ("slow_convergence",)
    unit_config.iterations, unit_config.data.held_out_prompts = 3, ""
    shown = io.StringIO()

    def run(resume):
        made = Run(unit_config, Distributed.start("cpu"), resume=resume, console=Console(file=shown, width=400))
        made.train()
        rows = (Path(unit_config.output_dir) / "metrics.jsonl").read_text().splitlines()
        return made, [json.loads(row) for row in rows]

    _, rows = run(resume=False)
    assert [row["flags"] for row in rows] == [["slow_convergence"]]
    assert (Path(unit_config.output_dir) / "checkpoints" / "iteration-000001").exists()
    assert "iteration 1: red flag slow_convergence: groups of 4 images learn slowly. Raise rollout" in shown.getvalue()
    assert "stopped by the monitor (monitor.stop names slow_convergence; leave it out to go on)" in shown.getvalue()
    unit_config.monitor.stop = ()
    resumed, rows = run(resume=True)
    assert [row["flags"] for row in rows] == [["slow_convergence"]] * 3
    assert resumed.trainer.iteration == 3
    assert all(len(values) == 3 for flag in resumed.trainer.monitor.red_flags for values in flag.series.values())


def test_switched_off_it_measures_nothing(unit_config, monkeypatch):
    monkeypatch.setattr("advgrpo.training.rewarded.measure", lambda *_: pytest.fail("images were measured"))
    run = watched(unit_config, every=0)
    assert not any(name.startswith("monitor_") for name in run.trainer.iterate())
    assert run.trainer.flags == []
