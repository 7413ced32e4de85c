"""What a run has left in its folder, as its report reads it; runs of older programs lack some of it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from advgrpo import config as configuration
from advgrpo.config import Config
from advgrpo.errors import UserError, one_line
from advgrpo.reporting.evaluations import EVALUATIONS_FILE, Evaluated, load_evaluations
from advgrpo.reporting.metric_names import CI95, FIRST, HELD_OUT, held_out_metrics
from advgrpo.reporting.tracking import METRICS_FILE, load_metrics

CONFIG_FILE, SUMMARY_FILE = "config.yaml", "summary.json"


@dataclass(frozen=True)
class Point:
    """A mean of an evaluation, over the images that all evaluations of the run have."""

    iteration: int  # how many were done
    value: float
    half: float | None  # half its 95 % interval over prompts; None where it is not known


@dataclass(frozen=True)
class RunFiles:
    """A run as it lies on the disk."""

    folder: Path
    config: Config
    rows: Sequence[Mapping[str, Any]] = ()  # of metrics.jsonl
    evaluations: Sequence[Evaluated] = ()
    summary: Mapping[str, Any] = field(default_factory=dict)  # empty until the run has ended

    @classmethod
    def read(cls, folder: Path) -> RunFiles:
        """UserError where the folder is none of a run, or a file in it is damaged."""
        if not (folder / CONFIG_FILE).is_file():
            raise UserError(f"OUT = {str(folder)!r} has no {CONFIG_FILE}: want the output folder of a run")
        metrics = folder / METRICS_FILE
        return cls(
            folder,
            configuration.load(file=folder / CONFIG_FILE),
            load_metrics(metrics) if metrics.exists() else [],
            load_evaluations(folder / EVALUATIONS_FILE),
            read_summary(folder / SUMMARY_FILE),
        )

    @property
    def done(self) -> int:
        """Iterations that are logged."""
        return max((row["iteration"] + 1 for row in self.rows), default=0)

    def held_out(self) -> dict[str, list[Point]]:
        """metric -> its evaluations in order, from the base model's or that of the LoRA that the run starts from."""
        found: dict[str, dict[int, Point]] = {}
        for iteration, values in self._means():
            for name in held_out_metrics(values):
                key = HELD_OUT + name
                key += FIRST if key + FIRST in values else ""
                half = values.get(key + CI95)
                found.setdefault(name, {})[iteration] = Point(iteration, values[key], half)
        return {name: [points[i] for i in sorted(points)] for name, points in sorted(found.items())}

    def _means(self) -> list[tuple[int, Mapping[str, Any]]]:
        """(iterations done, "eval_..." values), a final evaluation first, so that one while training counts instead."""
        if self.evaluations:
            starts = {each.stage for each in self.evaluations}
            skipped = "base" if "start" in starts else ""
            lines = [each for each in self.evaluations if each.stage != skipped]
            return [(e.iteration, e.means) for e in sorted(lines, key=lambda e: e.stage != "final")]
        ends = [(0, self._of_summary("base")), (self.summary.get("iterations", self.done), self._of_summary("final"))]
        during = [(row["iteration"] + 1, row) for row in self.rows if held_out_metrics(row)]
        return [*((at, values) for at, values in ends if values), *during]

    def _of_summary(self, stage: str) -> dict[str, Any]:
        """As an evaluation has it; means of more images than those in between, which older runs alone know."""
        halves = (self.summary.get("ci95") or {}).get(stage) or {}
        values = {HELD_OUT + name: value for name, value in (self.summary.get(stage) or {}).items()}
        return values | {HELD_OUT + name + CI95: half for name, half in halves.items()}

    def grids(self) -> list[tuple[str, int, Path]]:
        """(caption, iterations done, file) of the sample grids, in the order of training."""
        folder, found = self.folder / "samples", []
        if (folder / "base.png").is_file():
            found.append(("base model", 0, folder / "base.png"))
        for file in sorted(folder.glob("iteration-*.png")):
            if (number := re.fullmatch(r"iteration-(\d+)", file.stem)) and int(number[1]) <= self.done:
                found.append((f"iteration {int(number[1])}", int(number[1]), file))
        if (folder / "final.png").is_file() and self.summary:
            found.append((f"iteration {self.done}, the end", self.done, folder / "final.png"))
        return found


def read_summary(file: Path) -> dict[str, Any]:
    """What a run's summary.json holds, {} where there is none; UserError where it is damaged."""
    try:
        summary = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(summary, dict):
            raise ValueError("no object")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} cannot be read ({one_line(str(error), 100)}); repair or remove it") from None
    return summary
