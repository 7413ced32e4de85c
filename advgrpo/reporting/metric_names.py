"""What an iteration's and an evaluation's metrics are called, for those who show them, and what they were called.

scoring.py makes the rewards', evaluation.py the held-out ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

VERSION_KEY = "metrics_version"  # in every line of metrics.jsonl; lines without it are of version 1
VERSION = 2
_RENAMED_IN_2 = {
    "adversary_accuracy": "discriminator_accuracy",
    "adversary_loss": "discriminator_loss",
    "adversary_paired_accuracy": "discriminator_paired_accuracy",
    "adversary_updates": "discriminator_updates",
    "log_prob_drift_max": "log_prob_mismatch_max",
    "rollout_log_prob_gap": "log_prob_mismatch_mean",
    "seconds_adversary": "seconds_discriminator",
}
OF_REFERENCES = "_of_references"  # reward_<name>_of_references: what the same prompts' references get
HELD_OUT = "eval_"  # eval_<metric>: the mean over the held-out pictures
CI95 = "_ci95"  # eval_<metric>_ci95: half the width of its 95 % interval over prompts
FIRST = "_first"  # eval_<metric>_first: the same over a prompt's first pictures only, as evaluated during training
OTHER_REWARDS = ("reward_generated", "reward_reference", "reward_std", "reward_adversary")


def current_names(record: Mapping[str, Any]) -> dict[str, Any]:
    """A line of metrics.jsonl of any version, in today's names and without its version.

    Raises:
        ValueError: a version that is newer than this code, or none.
    """
    version = record.get(VERSION_KEY, 1)
    if version not in (1, VERSION):
        raise ValueError(f"{VERSION_KEY} {version!r}: this code reads up to {VERSION}")
    renamed = _RENAMED_IN_2 if version == 1 else {}
    return {renamed.get(name, name): value for name, value in record.items() if name != VERSION_KEY}


def fixed_rewards(names: Iterable[str]) -> list[str]:
    """Those of `names` that are a fixed reward's mean over the generated pictures, sorted."""
    rewards = (n for n in names if n.startswith("reward_") and not n.endswith(OF_REFERENCES))
    return sorted(name for name in rewards if name not in OTHER_REWARDS)


def held_out_metrics(names: Iterable[str]) -> list[str]:
    """Those of `names` that are a held-out metric's mean, without "eval_", sorted."""
    own = (n.removeprefix(HELD_OUT) for n in names if n.startswith(HELD_OUT))
    return sorted(name for name in own if not name.endswith((CI95, FIRST)))


def held_out_means(values: Mapping[str, float], *, first: bool = False) -> dict[str, float]:
    """metric -> mean, of an evaluation's values; `first`: over every prompt's first pictures only."""
    return {name: values[HELD_OUT + name + (FIRST if first else "")] for name in held_out_metrics(values)}


def half_widths(values: Mapping[str, float]) -> dict[str, float]:
    """metric -> half the width of its 95 % interval, of an evaluation's values; none over a single prompt."""
    names = held_out_metrics(values)
    return {name: values[HELD_OUT + name + CI95] for name in names if HELD_OUT + name + CI95 in values}


def with_interval(summary: Mapping[str, Any], stage: str, name: str) -> str:
    """A held-out mean of summary.json at "base", "start" or "final", with half its interval where there is one."""
    half = (summary.get("ci95") or {}).get(stage, {}).get(name)
    return f"{summary[stage][name]:.4f}" + (f" ± {half:.4f}" if isinstance(half, (int, float)) else "")
