"""OUT/evaluations.jsonl: what each evaluation found, prompt by prompt, from which the run can be judged afterwards.

A line is {"version": 1, "stage": "base" | "start" | "during" | "final", "iteration": how many were done, "images": per
prompt, "means": {"eval_<metric>": ..., ...}, "scores": {metric: [a mean per prompt, in the order of the prompts]},
"rewards": {trained reward: its level then}}. Scores are over the first images of each prompt, which all evaluations
have, so that two lines can be compared prompt by prompt.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from advgrpo.errors import UserError
from advgrpo.intervals import Interval, t_interval
from advgrpo.reporting.metric_names import HELD_OUT
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
    scores_of_all: Mapping[str, list[float]] = field(default_factory=dict)  # empty: `scores` are, or older programs'

    def line(self) -> str:
        """JSON has no number that is not finite: such a score is null, and such a mean is left out."""
        record = {
            "version": VERSION,
            "stage": self.stage,
            "iteration": self.iteration,
            "images": self.images,
            "means": {name: value for name, value in self.means.items() if math.isfinite(value)},
            "scores": _finite(self.scores),
            **({"scores_of_all": _finite(self.scores_of_all)} if self.scores_of_all else {}),
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
        tables = [record.get(name) for name in ("means", "scores", "rewards")] + [record.get("scores_of_all", {})]
        if not all(isinstance(table, dict) for table in tables):
            raise ValueError("no means, scores or rewards")
        means, scores, rewards, of_all = tables
        if not all(type(value) in (int, float) for table in (means, rewards) for value in table.values()):
            raise ValueError("means and rewards are numbers")
        own = (record["stage"], record["iteration"], record["images"], means)
        return cls(*own, _by_prompt(scores), rewards, _by_prompt(of_all))


def _finite(scores: Mapping[str, list[float]]) -> dict[str, list[float | None]]:
    return {
        name: [round(value, 9) if math.isfinite(value) else None for value in values] for name, values in scores.items()
    }


def _by_prompt(scores: Mapping[str, list[float | None]]) -> dict[str, list[float]]:
    return {name: [math.nan if value is None else float(value) for value in values] for name, values in scores.items()}


def gains(lines: Sequence[Evaluated]) -> dict[str, Interval]:
    """metric -> the end of a run less the base model, paired by prompt, with Student's 95 % interval over prompts.

    Both drew the same noise. Empty for a run that has not ended, or goes on after an end; without metrics that are not
    finite, and without those of a single prompt.
    """
    if not lines or max(lines, key=_place).stage != "final":
        return {}
    ends = {line.stage: line.scores_of_all or line.scores for line in lines if line.stage in ("base", "final")}
    base, final = ends.get("base", {}), ends.get("final", {})
    found = {}
    for name in final:
        pairs = list(zip(final[name], base.get(name, ())))
        differences = [after - before for after, before in pairs]
        if len(differences) == len(final[name]) > 1 and all(map(math.isfinite, differences)):
            found[name] = t_interval(differences)
    return found


def comparable(rows: Sequence[Mapping[str, Any]], lines: Sequence[Evaluated]) -> list[dict[str, Any]]:
    """Records of metrics.jsonl, without the held-out values of evaluations that were set aside.

    A file that has the base model's line has all evaluations that can be compared with it; one that has not is of an
    older program, which wrote none at first.
    """
    kept = {line.iteration for line in lines}
    if not any(line.stage == "base" for line in lines):
        return [dict(row) for row in rows]
    return [
        {key: value for key, value in row.items() if row["iteration"] + 1 in kept or not key.startswith(HELD_OUT)}
        for row in rows
    ]


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


def record_evaluation(file: Path, evaluated: Evaluated, *, done: int = -1) -> list[Evaluated]:
    """Add a line in its place; those of the same moment, and of a future that the run has left, go.

    Args:
        done: iterations that the run has done, where the line belongs before some of them: what was evaluated since
            stays.

    Returns:
        The other lines.
    """
    lines, place = load_evaluations(file), _place(evaluated)
    before = [each for each in lines if _place(each) < place]
    since = [each for each in lines if _place(each) > place and each.iteration <= done]
    write_atomically(file, "".join(each.line() for each in [*before, evaluated, *since]))
    return before + since


def _place(evaluated: Evaluated) -> tuple[int, int]:
    return evaluated.iteration, _ORDER.index(evaluated.stage)
