"""reward_hacking by evaluations: it fires in time on runs that were over-optimised, stays silent on healthy ones, and
is wrong as rarely as its setting says.

Runs are recorded/*.json (record.py makes them): {name, over_optimised, iterations, evaluations: [{iteration, scores:
{metric: [per prompt]}, rewards: {name: level}}]}. Recorded ones are whole, with their settings and `rows`, what they
logged. Three are reconstructed and say so ("reconstructed": true): of these runs only published means are left, and
what lies between means and around them is drawn at random, with a spread that was measured elsewhere. One was
over-optimised and is "missed". Any file that is dropped there is played. Simulated runs have a known truth.

Planted bugs that turn it red (tests/mutants/monitor-held-out-*): prompts not paired; the reward not looked at; pairs
that share an evaluation; no correction for looking again. And of the files and pages: another iteration in README.md, a
reconstruction that does not say so, a missed run that no page names, a drift at which it is found.
"""

from __future__ import annotations

import functools
import json
import random
import statistics
from pathlib import Path

import pytest

from advgrpo import config
from advgrpo.monitor.held_out import HeldOutFalls, independent
from advgrpo.monitor.monitor import Knobs, Monitor
from tests.monitor.test_monitor import feed, images, make, series, settings

RECORDED = sorted((Path(__file__).parent / "recorded").glob("*.json"))
DOCS = Path(__file__).parents[2] / "docs"
IN_TIME = 0.8  # of the run
PROMPTS = 48
LEVEL = settings().monitor.hacking_level


def play(run: dict, level: float = LEVEL) -> list[int]:
    """The iterations after whose evaluation the flag is up."""
    metrics = list(run["evaluations"][0]["scores"])
    falls, up = HeldOutFalls({}, metrics, level), []
    for each in run["evaluations"]:
        falls.evaluated(each["iteration"], each["scores"], each["rewards"])
        worst = falls.worst()
        if worst is not None and worst.certain:
            up.append(each["iteration"])
    return up


def play_all(run: dict) -> list[int]:
    """The iterations after which the monitor has the flag up, by what the run logged of rewards and images, and by its
    evaluations."""
    changes: dict = {}
    for name, value in run["changes"].items():
        changes = config.merge(
            changes, functools.reduce(lambda inner, part: {part: inner}, name.split(".")[::-1], value)
        )
    built = config.build(config.merge(config.read_preset(run["preset"]), changes), run["name"])
    monitor, evaluations, up = Monitor(built.monitor, Knobs.of(built)), list(run["evaluations"]), []
    for row in run["rows"]:
        while evaluations and evaluations[0]["iteration"] == row["iteration"]:  # of a run from a LoRA two at the start
            monitor.evaluated(row["iteration"], evaluations.pop(0)["scores"])
        flags = monitor.check(row, images(row))
        if any(flag.name == "reward_hacking" for flag in flags):
            up.append(row["iteration"] + 1)
    return up


@pytest.mark.parametrize("file", RECORDED, ids=lambda file: file.stem)
def test_recorded_runs(file):
    """Of reconstructed runs, which have no images, only evaluations have a say."""
    run = json.loads(file.read_text())
    assert run["name"] == file.stem
    assert run.get("reconstructed", False) == ("rows" not in run)
    up = play_all(run) if "rows" in run else play(run)
    if run.get("missed"):
        assert run["over_optimised"]
        assert not up, "found at last: take `missed` out of the file and the run out of docs/troubleshooting.md"
    elif run["over_optimised"]:
        assert up, "silent"
        assert up[0] <= IN_TIME * run["iterations"], "too late"
    else:
        assert not up


def test_there_are_recorded_runs_of_both_kinds():
    kinds = [run["over_optimised"] for file in RECORDED if "rows" in (run := json.loads(file.read_text()))]
    assert True in kinds
    assert False in kinds


def test_the_pages_say_what_the_recorded_runs_show():
    runs = {file.stem: json.loads(file.read_text()) for file in RECORDED}
    hacked = [runs[name] for name in ("flow-grpo-200", "flow-grpo-200-seed-1", "flow-grpo-200-seed-2")]
    first = [str(play_all(run)[0]) for run in hacked]
    alone = [play(run) for run in hacked]
    readme, advice = (" ".join((DOCS / page).read_text().split()) for page in ("../README.md", "troubleshooting.md"))
    assert f"is up at iteration {', '.join(first[:2])} and {first[2]} of the hacked runs" in readme
    assert f"the first was up at {', '.join(first[:2])} and {first[2]}" in advice
    late = f"the second was up only at {alone[0][0]} in one of them and {alone[1][0]} in another"
    assert late in advice
    assert alone[2] == []
    for name, run in runs.items():
        assert (f"`{name}`" in advice) or not run.get("missed")


def simulated(seed, truth, *, noise=0.2, drift=0.03, metrics=1, reward=lambda t: float(t)) -> dict:
    """Evaluations whose mean is `truth`: prompts differ (0.3), each evaluation adds noise to every prompt, and prompts
    wander apart, as those of a model that changes do."""
    draw = random.Random(seed)
    places = {f"m{k}": [draw.gauss(0, 0.3) for _ in range(PROMPTS)] for k in range(metrics)}
    evaluations = []
    for t, mean in enumerate(truth):
        for place in places.values():
            place[:] = [value + draw.gauss(0, drift) for value in place]
        scores = {name: [mean + value + draw.gauss(0, noise) for value in place] for name, place in places.items()}
        evaluations.append({"iteration": 10 * t, "scores": scores, "rewards": {"reward_x": reward(t)} if t else {}})
    return {"iterations": 10 * len(truth), "evaluations": evaluations}


def share(count, make_run) -> float:
    return statistics.mean(bool(play(make_run(seed))) for seed in range(count))


FLAT = [0.6] * 16
SATURATES = [0.6 + 0.1 * (1 - 0.7**t) for t in range(16)]
# As recorded/margin-0.json: a judge from .60 to .734 in a third of the run, then down; here to where it began.
OVER_OPTIMISED = [0.6 + 0.134 * t / 5 for t in range(6)] + [0.734 - 0.0134 * t for t in range(1, 11)]


def test_false_alarms_are_as_rare_as_the_level_says():
    """Of runs that stand still for 16 evaluations, the worst case: peak and fall are chance. More are flagged than the
    level says, as there are more comparisons than it is divided by; of those that improve hardly one is."""
    assert share(200, lambda seed: simulated(seed, FLAT)) <= 0.05
    assert share(100, lambda seed: simulated(seed, FLAT, metrics=3)) <= 0.05
    assert share(100, lambda seed: simulated(seed, SATURATES)) <= 0.02


def test_an_over_optimised_run_is_found_in_time():
    runs = [play(simulated(seed, OVER_OPTIMISED, noise=0.12)) for seed in range(50)]
    assert statistics.mean(bool(up) for up in runs) >= 0.95
    assert statistics.mean(bool(up) and up[0] <= IN_TIME * 160 for up in runs) >= 0.75
    assert not any(up and up[0] <= 50 for up in runs), "before the peak"


def test_pairing_by_prompt_is_what_finds_it():
    """The same values with the prompts of every evaluation shuffled: what prompts differ by is noise then."""

    def shuffled(seed):
        run, draw = simulated(seed, OVER_OPTIMISED, noise=0.05), random.Random(seed)
        for each in run["evaluations"]:
            draw.shuffle(each["scores"]["m0"])
        return run

    assert share(20, lambda seed: simulated(seed, OVER_OPTIMISED, noise=0.05)) == 1
    assert share(20, shuffled) <= 0.8


def test_a_fall_beside_a_falling_reward_is_no_hacking():
    """Training that diverges loses both; so does a run that is repaired too far."""
    assert share(20, lambda seed: simulated(seed, OVER_OPTIMISED, noise=0.05, reward=lambda t: -float(t))) == 0
    turned = share(20, lambda seed: simulated(seed, OVER_OPTIMISED, noise=0.05, reward=lambda t: float(min(t, 12) - t)))
    assert turned == 0


def test_one_odd_evaluation_raises_nothing():
    odd = [0.6 + 0.01 * t - 0.1 * (t == 8) for t in range(16)]
    assert share(20, lambda seed: simulated(seed, odd, noise=0.05)) == 0


def test_an_evaluation_that_is_repeated_counts_once():
    run = simulated(0, OVER_OPTIMISED, noise=0.1)
    twice = {**run, "evaluations": [each for each in run["evaluations"] for _ in range(2)]}
    assert sorted(set(play(twice))) == play(run)


def test_other_prompts_start_anew():
    """A run that goes on with other held-out prompts evaluates the base model again."""
    run, memory = simulated(0, OVER_OPTIMISED, noise=0.05), {"others": [1.0]}
    falls = HeldOutFalls(memory, ["m0"], LEVEL)
    for each in run["evaluations"]:
        falls.evaluated(each["iteration"], each["scores"], each["rewards"])
    assert falls.worst().certain
    falls.evaluated(0, {"m0": [0.5] * 7}, {})
    assert falls.worst() is None
    falls.evaluated(200, {"m0": [0.6] * 7}, {"reward_x": 1.0})
    assert memory["others"] == [1.0]


def test_metrics_that_are_trained_on_are_no_witnesses():
    built = settings(rewards={"rule": {"weight": 1.0}, "dino_similarity": {"gate": 0.5}})
    metrics = ("rule_accuracy", "rule", "dino_similarity", "pickscore", "saturation")
    assert independent(metrics, built.rewards) == ["pickscore"]
    assert independent(metrics, settings().rewards) == ["rule_accuracy", "rule", "dino_similarity", "pickscore"]


def test_the_monitor_says_it_with_numbers_clears_it_and_remembers_it_across_a_checkpoint():
    changes = {"evaluation": {"metrics": ["pickscore"]}, "monitor": {"stop": ["reward_hacking"]}}
    monitor = make(**changes)
    run = simulated(1, [*OVER_OPTIMISED, *[0.9] * 3], noise=0.05)
    rows = series(190, lambda i, row, n: {"reward_generated": row["reward_generated"] + 0.03 * i})
    said: dict[int, list] = {}
    for t, each in enumerate(run["evaluations"]):
        feed(monitor, rows[10 * (t - 1) : 10 * t] if t else [])
        said[10 * t] = monitor.evaluated(10 * t, {"pickscore": each["scores"]["m0"]})
        again = make(**changes)
        again.load(again.checked(json.loads(json.dumps(monitor.state()))))
        assert again.state() == monitor.state()
        assert again.active() == monitor.active()
        monitor = again
    up = [iteration for iteration, flags in said.items() if flags]
    assert up == list(range(up[0], up[-1] + 1, 10))
    assert up[0] <= IN_TIME * 160
    assert not said[180]  # it has recovered
    (flag,) = said[up[0]]
    assert (flag.name, flag.stop) == ("reward_hacking", True)
    assert "held-out pickscore fell from" in flag.message
    assert "while reward_generated rose by" in flag.message
    assert "evaluation.keep_best (now unset)" in flag.advice
    assert flag.value > flag.threshold > 0
    assert not make(evaluation=changes["evaluation"], monitor={"every": 0}).evaluated(0, {"pickscore": [0.1, 0.2]})


def test_evaluations_and_images_do_not_disturb_each_other():
    """The start that images are compared with is not that of the evaluations, which come first."""
    monitor, plain = make(), make()
    monitor.evaluated(0, {"dino_similarity": [0.1, 0.2, 0.4]})
    rows = series(60)
    for row in rows:
        assert monitor.check(row, images(row)) == plain.check(row, images(row))
    seen, alone = (m._hacking.last for m in (monitor, plain))
    assert seen == alone
    assert monitor._hacking.baseline == plain._hacking.baseline
