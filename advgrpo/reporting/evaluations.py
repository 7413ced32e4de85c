"""OUT/evaluations.jsonl: what each evaluation found, prompt by prompt, from which the run can be judged afterwards.

A line is {"version": 1, "stage": "base" | "start" | "during" | "final", "iteration": how many were done, "images": per
prompt, "means": {"eval_<metric>": ..., ...}, "scores": {metric: [a mean per prompt, in the order of the prompts]},
"rewards": {trained reward: its level then}}. Scores are over the first images of each prompt, which all evaluations
have, so that two lines can be compared prompt by prompt.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from advgrpo.errors import UserError
from advgrpo.runtime.atomic import write_atomically

EVALUATIONS_FILE = "evaluations.jsonl"
VERSION = 1
_ORDER = ("base", "start", "during", "final")


@dataclass(frozen=True)
class Evaluated:
    """A line of the file."""

    stage: str
    iteration: int
    images: int
    means: Mapping[str, float]
    scores: Mapping[str, list[float]]
    rewards: Mapping[str, float]

    def line(self) -> str:
        """JSON has no number that is not finite: such a score is null, and such a mean is left out."""
        record = {
            "version": VERSION,
            "stage": self.stage,
            "iteration": self.iteration,
            "images": self.images,
            "means": {name: value for name, value in self.means.items() if math.isfinite(value)},
            "scores": {
                name: [round(value, 9) if math.isfinite(value) else None for value in values]
                for name, values in self.scores.items()
            },
            "rewards": dict(self.rewards),
        }
        return json.dumps(record, allow_nan=False) + "\n"

    @classmethod
    def read(cls, record: Any) -> Evaluated:
        """ValueError for anything else than `line` writes."""
        if not isinstance(record, dict) or record.get("version") != VERSION or record.get("stage") not in _ORDER:
            raise ValueError("no evaluation")
        if any(type(record.get(name)) is not int for name in ("iteration", "images")):
            raise ValueError("no iteration, or no images")
        tables = [record.get(name) for name in ("means", "scores", "rewards")]
        if not all(isinstance(table, dict) for table in tables):
            raise ValueError("no means, scores or rewards")
        means, scores, rewards = tables
        if not all(type(value) in (int, float) for table in (means, rewards) for value in table.values()):
            raise ValueError("means and rewards are numbers")
        by_prompt = {
            name: [math.nan if value is None else float(value) for value in values] for name, values in scores.items()
        }
        return cls(record["stage"], record["iteration"], record["images"], means, by_prompt, rewards)


def load_evaluations(file: Path) -> list[Evaluated]:
    """The lines in order; none where there is no file, as in runs of older programs.

    Raises:
        UserError: a line that is none, by its number.
    """
    if not file.exists():
        return []
    found = []
    for number, line in enumerate(file.read_bytes().split(b"\n"), start=1):
        try:
            if line:
                found.append(Evaluated.read(json.loads(line)))
        except (ValueError, TypeError, RecursionError) as error:
            raise UserError(f"{file}, line {number} is no evaluation ({error}); repair or remove it") from None
    return found


def record_evaluation(file: Path, evaluated: Evaluated) -> list[Evaluated]:
    """Add a line; those of the same moment, and of a future that the run has left, go. Returns those before it."""
    before = [each for each in load_evaluations(file) if _place(each) < _place(evaluated)]
    write_atomically(file, "".join(each.line() for each in [*before, evaluated]))
    return before


def _place(evaluated: Evaluated) -> tuple[int, int]:
    return evaluated.iteration, _ORDER.index(evaluated.stage)
