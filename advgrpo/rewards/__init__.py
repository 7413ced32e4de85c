"""Rewards by name. One reward per file; importing this package imports none of them.

A learned reward (an adversary) offers what `trainer.py` calls: `features(images)`, `score(features, ...)`,
`update(...)`, `state_dict()` and `load_state_dict()`.
"""

from __future__ import annotations

from importlib import import_module

ADVERSARIES = {"dino": "DinoAdversary"}


def adversary_class(kind: str) -> type:
    """The adversary registered under `kind`."""
    return getattr(import_module(f".{kind}", __name__), ADVERSARIES[kind])
