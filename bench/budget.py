"""Time that runs out, and results that survive it: what a command that is cut off has not written is lost."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path


class OutOfTime(RuntimeError):
    """What is left does not suffice for even the fewest repetitions."""


class Budget:
    """Seconds that are left of a run, or of one part's share of it; None never runs out."""

    def __init__(self, seconds: float | None, run: Budget | None = None) -> None:
        self.end = None if seconds is None else time.monotonic() + seconds
        self.run = run or self  # what it is a share of: beyond its share a part may still end within the run

    @property
    def left(self) -> float:
        """Seconds, infinite without a limit, never negative."""
        return float("inf") if self.end is None else max(0.0, self.end - time.monotonic())

    def share(self, part: float) -> Budget:
        """`part` (0 to 1) of what is left, from now on."""
        return Budget(None if self.end is None else part * self.left, self.run)


class Report(dict):
    """Figures that are on disk as soon as they are known: `save` rewrites the file, whole or not at all."""

    def __init__(self, file: Path | None, **known: object) -> None:
        super().__init__(known)
        self.file = file
        if file:
            file.parent.mkdir(parents=True, exist_ok=True)

    def put(self, name: str, value: object) -> None:
        self[name] = value
        self.save()

    def save(self) -> None:
        if self.file:
            temporary = self.file.with_name(f"{self.file.name}.new")
            temporary.write_text(json.dumps(self, indent=1) + "\n")
            os.replace(temporary, self.file)
