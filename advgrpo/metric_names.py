"""What the reward metrics of an iteration are called, for those who show them (scoring.py makes them)."""

from __future__ import annotations

from collections.abc import Iterable

OF_REFERENCES = "_of_references"  # reward_<name>_of_references: what the same prompts' references get
_OTHERS = ("reward_generated", "reward_reference", "reward_std", "reward_adversary")


def fixed_rewards(names: Iterable[str]) -> list[str]:
    """Those of `names` that are a fixed reward's mean over the generated pictures, sorted."""
    rewards = (n for n in names if n.startswith("reward_") and not n.endswith(OF_REFERENCES))
    return sorted(name for name in rewards if name not in _OTHERS)
