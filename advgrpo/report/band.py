"""Bands: what recorded runs of a preset's own settings gave, and whether a run is outside of all of them.

`advgrpo/presets/curves/PRESET.json` is {"preset", "version", "settings": {name: value}, "runs": [{"seed", "iterations",
"metrics": {metric: [[iterations done, mean over the images that all evaluations have], ...]}}]}; `python -m
advgrpo.report band` writes it. A run is compared where it has every recorded setting, which are all but those of
`FREE_OF_CURVES` (config/nearest.py): after a preset was changed its band is for nobody, and a test asks for a new one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from advgrpo import config as configuration
from advgrpo.config import Config
from advgrpo.config.nearest import FREE_OF_CURVES, changes, compared
from advgrpo.errors import UserError
from advgrpo.report.run_files import RunFiles
from advgrpo.runtime.atomic import write_atomically

VERSION = 1
LEAST_RUNS = 2
Curve = list[tuple[int, float]]  # (iterations done, mean)


@dataclass(frozen=True)
class Outside:
    """A run's value that lies beyond those of every recorded run."""

    metric: str
    iteration: int
    value: float
    low: float
    high: float
    runs: int

    def __str__(self) -> str:
        where = "below" if self.value < self.low else "above"
        digits = _digits(self.value, self.low if where == "below" else self.high)
        shown = [f"{number:.{digits}f}" for number in (self.value, self.low, self.high)]
        return (
            f"at iteration {self.iteration} {self.metric} {shown[0]} is {where} every one of {self.runs} recorded runs "
            f"({shown[1]} to {shown[2]})"
        )


@dataclass(frozen=True)
class Band:
    """Recorded runs of a preset."""

    preset: str
    curves: Sequence[Mapping[str, Curve]]  # of each run, by metric
    settings: Mapping[str, Any] = field(default_factory=dict)  # that they had, by name

    def is_of(self, config: Config) -> bool:
        """Whether a run has these settings, one at least; those that it does not know do not count."""
        own = compared(config, FREE_OF_CURVES)
        known = self.settings.keys() & own.keys()
        return bool(known) and all(own[name] == self.settings[name] for name in known)

    @property
    def runs(self) -> int:
        return len(self.curves)

    def at(self, metric: str, iteration: int) -> tuple[float, float, int] | None:
        """(lowest, highest, how many) of the runs that were evaluated then; None for fewer than LEAST_RUNS."""
        values = [
            dict(curves[metric])[iteration] for curves in self.curves if iteration in dict(curves.get(metric, []))
        ]
        return (min(values), max(values), len(values)) if len(values) >= LEAST_RUNS else None

    def shape(self, metric: str) -> tuple[list[int], list[float], list[float]] | None:
        """(iterations, lowest, highest) to be drawn."""
        places = sorted({place for curves in self.curves for place, _ in curves.get(metric, [])})
        found = [(place, *bounds[:2]) for place in places if (bounds := self.at(metric, place)) is not None]
        return ([p for p, _, _ in found], [a for _, a, _ in found], [b for _, _, b in found]) if found else None

    def outside(self, held_out: Mapping[str, Sequence[tuple[int, float]]]) -> list[Outside]:
        """For each metric the first place where the run is beyond all of the recorded ones, after the start."""
        found = []
        for metric, points in held_out.items():
            for iteration, value in sorted(points):
                bounds = self.at(metric, iteration) if iteration else None
                if bounds is not None and not bounds[0] <= _recorded(value) <= bounds[1]:
                    found.append(Outside(metric, iteration, value, *bounds))
                    break
        return found


def band_of(config: Config) -> Band | None:
    """Of the runs whose settings the run has, if there are.

    Raises:
        UserError: a shipped file is damaged.
    """
    bands = (shipped_band(name) for name in recorded_presets())
    return next((band for band in bands if band.is_of(config)), None)


def shipped_band(preset: str) -> Band:
    """UserError as `read_band`."""
    return read_band(Path(str(_folder() / f"{preset}.json")))


def recorded_presets() -> list[str]:
    """Presets that have a band."""
    folder = _folder()
    found = [each.name.removesuffix(".json") for each in folder.iterdir()] if folder.is_dir() else []
    return sorted(name for name in found if name in configuration.preset_names())


def read_band(file: Path) -> Band:
    """UserError naming the file for anything that `write_band` does not write."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["version"] != VERSION:
            raise ValueError(f"version {content['version']!r}, want {VERSION}")
        if not content["settings"]:
            raise ValueError("no settings")
        curves = [{name: _curve(points) for name, points in run["metrics"].items()} for run in content["runs"]]
        return Band(str(content["preset"]), curves, dict(content["settings"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is no band ({type(error).__name__}: {error}); record it again") from None


def write_band(runs: Sequence[Path], preset: str, file: Path) -> Band:
    """Record the held-out curves of runs of a preset.

    Raises:
        UserError: a preset or run that does not exist, fewer than LEAST_RUNS, settings other than the preset's, a run
            that has not ended or was not evaluated, or two of one seed.
    """
    if len(runs) < LEAST_RUNS:
        raise UserError(f"RUN names {len(runs)} of the {LEAST_RUNS} runs that a band needs at least")
    configuration.read_preset(preset)
    recorded: dict[int, dict[str, Any]] = {}
    for folder in runs:
        run = RunFiles.read(folder)
        different = changes(run.config, preset, ignoring=FREE_OF_CURVES)
        if different:
            named = ", ".join(f"{each.name} = {each.here!r} instead of {each.there!r}" for each in different[:5])
            raise UserError(f"RUN = {str(folder)!r} is not of the preset {preset!r}: {named}")
        if not run.summary:
            raise UserError(f"RUN = {str(folder)!r} has not ended: it has no summary.json")
        if not run.evaluations or not run.held_out():
            raise UserError(f"RUN = {str(folder)!r} has no evaluations.jsonl; train it again with this version")
        if run.config.seed in recorded:
            raise UserError(f"RUN = {str(folder)!r} has the seed {run.config.seed} of another one; name each once")
        recorded[run.config.seed] = {
            "seed": run.config.seed,
            "iterations": run.done,
            "metrics": {
                name: [[point.iteration, _recorded(point.value)] for point in points]
                for name, points in run.held_out().items()
            },
        }
    settings = compared(configuration.load(preset=preset), FREE_OF_CURVES)
    content = {"preset": preset, "version": VERSION, "settings": settings}
    content["runs"] = [recorded[seed] for seed in sorted(recorded)]
    write_atomically(file, json.dumps(content, indent=1) + "\n")
    return read_band(file)


def _folder():
    return resources.files("advgrpo") / "presets" / "curves"


def _curve(points: Any) -> Curve:
    found = [(int(iteration), float(value)) for iteration, value in points]
    if len(dict(found)) != len(found):
        raise ValueError("an iteration stands twice")
    return found


def _recorded(value: float) -> float:
    """With the digits that a band keeps: a run that repeats a recorded one is not outside of it."""
    return float(f"{value:.6g}")


def _digits(value: float, bound: float) -> int:
    """So many decimal places that the two are told apart, two at least."""
    return next((n for n in range(2, 9) if round(value, n) != round(bound, n)), 9)
