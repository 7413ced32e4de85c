"""Rewards by name. One reward per file; importing this package imports none of them.

What a reward and a learned reward (an adversary) offer is in `base.py`.
"""

from __future__ import annotations

from importlib import import_module

ADVERSARIES = {"dino": "DinoAdversary"}


def adversary_class(kind: str) -> type:
    """The adversary registered under `kind`."""
    return getattr(import_module(f".{kind}", __name__), ADVERSARIES[kind])
