"""Make a run's evaluations a recorded series: `python -m tests.monitor.record OUT NAME --over-optimised`.

It becomes tests/monitor/recorded/NAME.json, which test_held_out.py plays to the monitor, with what the run logged of
rewards and images. Whether the run was over-optimised is for a person to say, by the images or by a judge that the run
did not see. `--missed` is for a run that was and that the flag does not see: a finding (docs/troubleshooting.md), which
the test keeps true.

Of runs that were made before evaluations were kept prompt by prompt only means are known. `python -m
tests.monitor.record reconstruct` makes series of these: the means that were published, straight lines between them, and
48 prompts around them that differ by 0.3 and move by 0.065 from evaluation to evaluation: 80 iterations of a rerun of
one of them showed 0.09 for a judge's verdict on two images, which is 0.065 on four. Such files say "reconstructed".
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Mapping
from pathlib import Path

from advgrpo import config
from advgrpo.config.nearest import nearest_preset
from advgrpo.monitor.held_out import independent
from advgrpo.reporting.evaluations import EVALUATIONS_FILE, load_evaluations
from advgrpo.reporting.tracking import METRICS_FILE, load_metrics

_OF_THE_FLAG = ("adversary", "rewards", "evaluation", "update", "advantage", "rollout")
_NOT_READ = ("monitor_merge_error", "monitor_gradient_rms", "reward_std")
FOLDER = Path(__file__).parent / "recorded"


def record(out: Path, name: str, *, over_optimised: bool, why: str, missed: bool = False) -> Path:
    settings = config.load(file=out / "config.yaml")
    metrics = independent(settings.evaluation.metrics, settings.rewards)
    lines = load_evaluations(out / EVALUATIONS_FILE)
    evaluations = [
        {
            "iteration": line.iteration,
            "scores": {metric: [round(value, 6) for value in line.scores[metric]] for metric in metrics},
            "rewards": {reward: round(level, 6) for reward, level in line.rewards.items()},
        }
        for line in lines
        if line.stage != "final"  # of the same images; the monitor has no say any more
    ]
    preset, changed = nearest_preset(settings)
    known = [change for change in changed if change.name.startswith(_OF_THE_FLAG)]
    more = {"missed": True} if missed else {}
    more |= {"preset": preset, "changes": {change.name: change.here for change in known}, "rows": rows(out)}
    return write(name, over_optimised, why, settings.iterations, evaluations, **more)


def rows(out: Path) -> list[dict]:
    """What `reward_hacking` reads of every iteration."""
    return [
        {
            name: round(value, 5)
            for name, value in row.items()
            if name.startswith(("iteration", "reward_", "monitor_")) or name in ("grad_norm", "dino_similarity")
            if value is not None and name not in _NOT_READ
        }
        for row in load_metrics(out / METRICS_FILE)
    ]


def write(name: str, over_optimised: bool, why: str, iterations: int, evaluations: list[dict], **more) -> Path:
    content = {"name": name, "over_optimised": over_optimised, "why": why, "iterations": iterations, **more}
    FOLDER.mkdir(exist_ok=True)
    file = FOLDER / f"{name}.json"
    file.write_text(
        json.dumps({**content, "evaluations": evaluations}).replace('{"iteration"', '\n{"iteration"') + "\n"
    )
    return file


def reconstruct(name: str, means: Mapping[int, float], *, over_optimised: bool, why: str) -> Path:
    """A series of published means {iteration: mean}, as the head of this file says."""
    draw, places = random.Random(name), sorted(means)
    prompts = [draw.gauss(0, 0.3) for _ in range(48)]
    evaluations = []
    for iteration in range(0, places[-1] + 1, 10):
        left = max(place for place in places if place <= iteration)
        right = min(place for place in places if place >= iteration)
        share = (iteration - left) / (right - left) if right > left else 0.0
        mean = means[left] + share * (means[right] - means[left])
        values = [round(mean + prompt + draw.gauss(0, 0.065), 6) for prompt in prompts]
        rewards = {"reward": iteration / 100} if iteration else {}
        evaluations.append({"iteration": iteration, "scores": {"judge": values}, "rewards": rewards})
    return write(name, over_optimised, why, places[-1], evaluations[:-1], reconstructed=True)


def reconstruct_all() -> None:
    before, of_shapes = 0.6197916666666666, {"flow-pickscore": (0.5234375, True), "dino": (0.7890625, False)}
    for arm, (after, hacked) in of_shapes.items():  # a world of shapes that the project had
        why = f"docs/results, {arm}, seed 0: the judge's mean before and after; the reward rose"
        reconstruct(f"results-{arm}", {0: before, 120: after}, over_optimised=hacked, why=why)
    why = "the shapes, margin 0, no warm-up: a judge's mean before, at its best and at the end; the reward rose"
    reconstruct("margin-0", {0: 0.599, 50: 0.734, 150: 0.682}, over_optimised=True, why=why)


if __name__ == "__main__":
    if sys.argv[1:] == ["reconstruct"]:
        reconstruct_all()
        sys.exit()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("name")
    parser.add_argument("--over-optimised", action="store_true")
    parser.add_argument("--missed", action="store_true")
    parser.add_argument("--why", required=True)
    given = parser.parse_args()
    if given.missed and not given.over_optimised:
        parser.error("--missed: only a run that was over-optimised can be missed; add --over-optimised")
    how = {"over_optimised": given.over_optimised, "missed": given.missed}
    print(record(given.out, given.name, why=given.why, **how))
