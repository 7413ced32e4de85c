"""What the finished runs of an experiment say, as numbers.

A change is paired: of one arm from the base model, or between two arms trained with the same seed, on the same noise
and prompts. Its interval is Student's t over seeds (statistics.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property

from advgrpo.config import Config
from advgrpo.data.references import ReferenceSet
from advgrpo.data.sources import Sources
from advgrpo.evaluation.statistics import Interval, t_interval
from advgrpo.experiments.plan import ARMS, DISTANCES, EXPERIMENTS, REFERENCE_METRICS, Claim, Job
from advgrpo.experiments.runs import Finished, Plan
from advgrpo.monitor.image_statistics import image_statistics
from advgrpo.reporting.metric_names import held_out_means, held_out_metrics
from advgrpo.reporting.tracking import METRICS_FILE, load_metrics

Values = dict[str, float]  # metric -> value
Points = list[tuple[int, Values]]  # (iteration, held-out metrics)


@dataclass(frozen=True)
class Change:
    """A mean over seeds, with its interval where there are at least two."""

    values: list[float]  # one per seed

    @cached_property
    def interval(self) -> Interval | None:
        return t_interval(self.values) if len(self.values) > 1 else None

    @property
    def mean(self) -> float:
        return sum(self.values) / len(self.values)

    @property
    def direction(self) -> str:
        """What the interval shows."""
        if self.interval is None:
            return "one seed, no interval"
        if self.interval.low > 0:
            return "rises"
        return "falls" if self.interval.high < 0 else "interval includes 0"

    def __str__(self) -> str:
        interval = self.interval
        return f"{self.mean:+.3f}" + (f" [{interval.low:+.3f}, {interval.high:+.3f}]" if interval else "")

    def verdict(self, claim: Claim) -> str:
        """ "as expected", "contradicts", or "undecided", of a claim on this change."""
        if self.interval is None:
            return "undecided"
        low, high, margin = self.interval.low, self.interval.high, claim.margin
        holds, fails = {
            "rises": (low > 0, high < 0),
            "falls": (high < 0, low > 0),
            "does not fall": (low > -margin, high < -margin),
            "does not rise": (high < margin, low > margin),
            "stays": (low > -margin and high < margin, high < -margin or low > margin),
        }[claim.expected]
        return "as expected" if holds else "contradicts" if fails else "undecided"


class Results:
    """One experiment's finished runs."""

    def __init__(self, name: str, plan: Plan, seeds: Sequence[int]):
        self.name, self.experiment, self.plan = name, EXPERIMENTS[name], plan
        jobs = [Job(arm, seed) for arm in self.experiment.arms for seed in dict.fromkeys(seeds)]
        found = {job: plan.finished(job) for job in jobs}
        self.runs: dict[Job, Finished] = {job: run for job, run in found.items() if run is not None}
        self.missing = {job: plan.failure(job) for job, run in found.items() if run is None}
        self._of_references: dict[Job, Values] = {}

    def seeds(self, *arms: str) -> list[int]:
        """Seeds with which all these arms are finished."""
        return [
            job.seed for job in self.runs if job.arm == arms[0] and all(Job(a, job.seed) in self.runs for a in arms)
        ]

    @property
    def arms(self) -> list[str]:
        """Those with a finished run."""
        return [arm for arm in self.experiment.arms if self.seeds(arm)]

    def values(self, job: Job, stage: str) -> Values:
        """Metrics on the held-out prompts, `stage` being "base" or "final"."""
        return self._with_distances(job, self.runs[job].summary[stage])

    def references(self, job: Job) -> ReferenceSet:
        return Sources.read(self.runs[job].config).references

    def of_references(self, job: Job) -> Values:
        """Mean image statistics of the held-out prompts' references, every different image once."""
        same = next((known for known in self._of_references if self._same_data(known, job)), None)
        if same is None:
            config, same = self.runs[job].config, job
            self._of_references[job] = _reference_statistics(config)
        return self._of_references[same]

    def _same_data(self, one: Job, other: Job) -> bool:
        first, second = (self.runs[job].config.data for job in (one, other))
        names = ("held_out_prompts", "references", "style")
        return all(getattr(first, name) == getattr(second, name) for name in names)

    def _with_distances(self, job: Job, values: Values) -> Values:
        own = self.of_references(job)
        distances = {name: abs(values[of] - own[of]) for name, of in DISTANCES.items() if of in values}
        return {**values, **distances}

    def curve(self, job: Job) -> Points:
        """Held-out metrics over the iterations; an arm that starts from another begins with that one's end."""
        origin = job.origin
        start = self.values(origin, "final") if origin in self.runs else self.values(job, "base")
        rows = load_metrics(self.plan.folder(job) / METRICS_FILE)
        during = [(row["iteration"] + 1, held_out_means(row)) for row in rows if held_out_metrics(row)]
        middle = [(iteration, self._with_distances(job, values)) for iteration, values in during]
        return [(0, start), *middle, (self.runs[job].summary["iterations"], self.values(job, "final"))]

    def change(self, arm: str, metric: str, against: str = "") -> Change | None:
        """Final minus base of an arm, or final minus the other arm's final; None without a common seed."""
        seeds = self.seeds(arm, against) if against else self.seeds(arm)
        if not seeds:
            return None
        start = (against, "final") if against else (arm, "base")
        return Change(
            [self.values(Job(arm, s), "final")[metric] - self.values(Job(start[0], s), start[1])[metric] for s in seeds]
        )

    def mean(self, arm: str, metric: str, stage: str) -> float:
        seeds = self.seeds(arm)
        return sum(self.values(Job(arm, s), stage)[metric] for s in seeds) / len(seeds)


def _reference_statistics(config: Config) -> Values:
    sources = Sources.read(config)
    files = dict.fromkeys(file for prompt in sources.held_out for file in sources.references.files(prompt))
    size = (config.model.resolution,) * 2
    statistics = image_statistics(sources.references.load_images(list(files), size=size))
    return {name: statistics[name].mean().item() for name in REFERENCE_METRICS}


def numbers(results: Results) -> dict:
    """Everything the page rests on, as JSON."""
    experiment = results.experiment
    claims = []
    for claim in experiment.claims:
        change = results.change(claim.arm, claim.metric, claim.against)
        found = (
            {} if change is None else _as_json(change) | {"found": change.direction, "verdict": change.verdict(claim)}
        )
        claims.append(asdict(claim) | (found or {"found": "no runs", "verdict": "undecided"}))
    arms = {
        arm: {
            "label": experiment.arms[arm],
            "preset": ARMS[arm].preset,
            "overrides": ARMS[arm].overrides,
            "start_from": ARMS[arm].start_from,
            "runs": {str(seed): _run_numbers(results, Job(arm, seed)) for seed in results.seeds(arm)},
            "change": {metric: _as_json(results.change(arm, metric)) for metric in experiment.metrics},
        }
        for arm in results.arms
    }
    return {
        "title": experiment.title,
        "iterations": results.plan.iterations,
        "seeds": sorted({job.seed for job in results.runs}),
        "arms": arms,
        "claims": claims,
        "missing": {str(job): reason for job, reason in results.missing.items()},
    }


def _run_numbers(results: Results, job: Job) -> dict:
    summary = results.runs[job].summary
    kept = {name: summary[name] for name in ("training_seconds", "finished", "machine", "versions")}
    stages = {stage: results.values(job, stage) for stage in ("base", "final")}
    return {**stages, "references": results.of_references(job), **kept}


def _as_json(change: Change) -> dict:
    interval = asdict(change.interval) if change.interval else None
    return {"per_seed": change.values, "mean": change.mean, "interval": interval}
