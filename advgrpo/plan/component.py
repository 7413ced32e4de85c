"""What a run keeps in memory, one entry of the plan."""

from __future__ import annotations

from dataclasses import dataclass

PHASES = ("encode", "sample", "decode", "score", "update")
AFTER_ENCODING = PHASES[1:]


@dataclass(frozen=True)
class Component:
    name: str
    bytes: int
    decided_by: str
    phases: tuple[str, ...] = PHASES  # in which it is held
