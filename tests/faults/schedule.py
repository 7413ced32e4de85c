"""What goes wrong in a job, drawn by a seed."""

from __future__ import annotations

import random
from dataclasses import dataclass

MACHINES, ITERATIONS = 3, 5
LONG, SHORT = 16.0, 2.0  # seconds: above and below every limit of tests/faults/machine.py

# kind: whether it hits the network. "paused" and "briefly" are shorter than the limits: nobody may notice.
KINDS = {
    "worker killed": False,
    "agent killed": False,
    "machine lost": False,
    "machine lost, back later": False,
    "worker frozen": False,
    "worker paused": False,
    "agent frozen": False,
    "agent paused": False,
    "machine frozen": False,
    "machine paused": False,
    "machine joins late": False,
    "cut off": True,
    "cut off, back later": True,
    "cut off briefly": True,
    "poor network": True,  # frames late and lost from the beginning on, and a worker killed
}
UNNOTICED = ("worker paused", "agent paused", "machine paused", "cut off briefly")  # the job goes on as if nothing were


@dataclass(frozen=True)
class Fault:
    """One blow: `kind` against a machine, `after` seconds into an iteration."""

    kind: str
    machine: int
    iteration: int
    after: float


@dataclass(frozen=True)
class Schedule:
    """A run of `ITERATIONS` iterations on `MACHINES` machines of one process, and the blows that it gets."""

    seed: int
    faults: tuple[Fault, ...]

    @classmethod
    def draw(cls, seed: int, *, network: bool = True) -> Schedule:
        """The kinds come in turn; every third schedule has a second blow, to any machine.

        Args:
            network: whether the machines' network can be cut.
        """
        kinds = [kind for kind, of_network in KINDS.items() if network or not of_network]
        chosen = random.Random(seed)
        names = [kinds[seed % len(kinds)]]
        if seed % 3 == 2:
            names.append(chosen.choice([kind for kind in kinds if kind not in ("machine joins late", "poor network")]))
        first = chosen.randrange(1, ITERATIONS - len(names) - 1)
        places = [first, *(chosen.randrange(first + 1, ITERATIONS - 1) for _ in names[1:])]
        faults = [
            Fault(name, chosen.randrange(MACHINES), place, round(chosen.uniform(0, 1), 2))
            for name, place in zip(names, places)
        ]
        return cls(seed, tuple(faults))
