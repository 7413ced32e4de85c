"""What the finished runs of an experiment say, as numbers: everything that pages and figures show.

A change is paired: of one arm from the base model, or between two arms trained with the same seed, on the same noise
and prompts (comparing.py). A model's own best guidance is where it is found best on the tuning prompts; what is
reported there are the report prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property

import torch

from advgrpo.config import read_yaml
from advgrpo.data.references import ReferenceSet
from advgrpo.data.sources import Sources
from advgrpo.evaluation.frontier import Resampled, best_guidance, kid
from advgrpo.experiments.comparing import MIN_SEEDS, Pair, difference, evidence, level
from advgrpo.experiments.judging import Judged
from advgrpo.experiments.plan import ARMS, EXPERIMENTS, GUIDANCE, Claim, Job, length
from advgrpo.experiments.runs import Finished, Plan
from advgrpo.reporting.metric_names import held_out_means, held_out_metrics
from advgrpo.reporting.tracking import METRICS_FILE, load_metrics

RESAMPLES = 10_000  # a p-value is at least 1 / 10,001: among 200 claims still below .05
_WHERE = ("equal", "best")


class Results:
    """One experiment's finished runs."""

    def __init__(self, name: str, plan: Plan, seeds: Sequence[int], resamples: int = RESAMPLES):
        self.name, self.experiment, self.plan, self.resamples = name, EXPERIMENTS[name], plan, resamples
        jobs = [Job(arm, seed) for arm in self.experiment.arms for seed in dict.fromkeys(seeds)]
        self.base = Job(self.experiment.base)
        found = {job: plan.finished(job) for job in (self.base, *jobs)}
        self.missing = {job: plan.failure(job) for job, run in found.items() if run is None}
        self.runs: dict[Job, Finished] = {
            job: run for job, run in found.items() if run is not None and job != self.base
        }
        self.judged = {job: plan.judged(job) for job, run in found.items() if run is not None}

    def seeds(self, *arms: str) -> list[int]:
        """Seeds with which all these arms are finished."""
        return [
            job.seed for job in self.runs if job.arm == arms[0] and all(Job(a, job.seed) in self.runs for a in arms)
        ]

    @property
    def arms(self) -> list[str]:
        """Those with a finished run."""
        return [arm for arm in self.experiment.arms if self.seeds(arm)]

    def references(self, job: Job) -> ReferenceSet:
        return Sources.read(self.runs[job].config).references

    def at(self, job: Job, where: str) -> tuple[float, Judged]:
        """Guidance and the report prompts there; `where`: as in plan.Claim."""
        fronts = self.judged[job]
        scale = GUIDANCE if where == "equal" else best_guidance({g: j.as_point for g, j in fronts["tuning"].items()})
        return scale, fronts["report"][scale]

    def change(self, metric: str, arm: str, against: str = "", *, where: str = "equal") -> Resampled | None:
        """Of an arm from the base model, or from another arm; None without a common seed or without the base."""
        pair = self._pair(arm, against, lambda job: self.at(job, where)[1])
        return pair and difference(metric, pair, style=ARMS[arm].style, resamples=self.resamples)

    def change_at(self, metric: str, arm: str, scale: float, against: str = "") -> Resampled | None:
        """The same at one guidance scale."""
        pair = self._pair(arm, against, lambda job: self.judged[job]["report"][scale])
        return pair and difference(metric, pair, style=ARMS[arm].style, resamples=self.resamples)

    def _pair(self, arm: str, against: str, of) -> Pair | None:
        seeds = self.seeds(arm, against) if against else self.seeds(arm)
        if not seeds or (not against and self.base not in self.judged):
            return None
        others = [Job(against, seed) if against else self.base for seed in seeds]
        return Pair([of(Job(arm, seed)) for seed in seeds], [of(job) for job in others])

    def tested(self, claim: Claim) -> Resampled | None:
        """What a claim is about; None where there is nothing."""
        if claim.expected != "reaches":
            return self.change(claim.metric, claim.arm, claim.against, where=claim.where)
        models = [self.at(Job(claim.arm, seed), claim.where)[1] for seed in self.seeds(claim.arm)]
        return level(claim.metric, models, style=ARMS[claim.arm].style, resamples=self.resamples) if models else None

    @cached_property
    def costs(self) -> dict[Job, dict[str, float]]:
        return {job: cost(run, self._rows(job)) for job, run in self.runs.items()}

    def _rows(self, job: Job) -> list[dict]:
        return load_metrics(self.plan.folder(job) / METRICS_FILE)

    def curve(self, job: Job) -> list[dict[str, float]]:
        """Held-out metrics over iterations and CPU seconds; an arm that starts from another begins at its end."""
        summary, rows = self.runs[job].summary, self._rows(job)
        points, spent = [{"iteration": 0, "cpu_seconds": 0.0, **summary.get("start", summary["base"])}], 0.0
        for row in rows:
            spent += row["cpu_seconds"]
            if held_out_metrics(row):
                points.append({"iteration": row["iteration"] + 1, "cpu_seconds": spent, **held_out_means(row)})
        return [*points, {"iteration": summary["iterations"], "cpu_seconds": spent, **summary["final"]}]


def cost(run: Finished, rows: Sequence[dict]) -> dict[str, float]:
    """What a training took: images drawn, scouts too, references that it fitted or showed to its adversary, seconds."""
    config, rollout = run.config, run.config.rollout
    images = config.images_per_iteration * len(rows)
    scouts = rollout.of_scouts.images * len(rows) if rollout.scouts > 1 else 0  # the kept ones are drawn again
    updates = sum(row.get("discriminator_updates") or 0 for row in rows)
    shown = images if config.objective.learns_from_references else 0
    return {
        "images_drawn": images + scouts if config.objective.samples_images else 0,
        "references_shown": shown + updates * min(config.adversary.batch_size, config.images_per_iteration),
        "cpu_seconds": sum(row["cpu_seconds"] for row in rows),
    }


def numbers(results: Results) -> dict:
    """Everything the page rests on, as JSON."""
    plan, experiment = results.plan, results.experiment
    return {
        "title": experiment.title,
        "iterations": plan.iterations,
        "seeds": sorted({job.seed for job in results.runs}),
        "guidance_scales": list(plan.judging.guidance_scales),
        "images_per_prompt": plan.judging.images_per_prompt,
        "prompts": dict(plan.judging.prompts),
        "laid_over": plan.file.name if plan.file else "",
        "laid_over_settings": read_yaml(plan.file) if plan.file else {},
        "sample_seed": sample_seed(results),
        "base": _base_numbers(results),
        "arms": {arm: _arm_numbers(results, arm) for arm in experiment.arms},
        "differences": _differences(results),
        "claims": [_claim_numbers(results, claim) for claim in experiment.claims],
        "missing": {str(job): reason for job, reason in results.missing.items()},
    }


def _base_numbers(results: Results) -> dict | None:
    if results.base not in results.judged:
        return None
    own_best, _ = results.at(results.base, "best")
    return {"front": _front(results.judged[results.base]["report"], ""), "own_best": own_best}


def sample_seed(results: Results) -> int | None:
    """The first seed that all finished arms have; None where they have none in common."""
    return min(results.seeds(*results.arms), default=None) if results.arms else None


def _arm_numbers(results: Results, arm: str) -> dict:
    made = ARMS[arm]
    return {
        "label": results.experiment.arms[arm],
        "preset": made.preset,
        "overrides": made.overrides,
        "start_from": made.start_from,
        "teacher": made.teacher,
        "iterations": length(arm, results.plan.iterations),
        "style": made.style,
        "runs": {str(seed): _run_numbers(results, Job(arm, seed)) for seed in results.seeds(arm)},
        "changes": _changes(results, arm),
    }


def _differences(results: Results) -> list[dict]:
    """Between the arms that claims compare, and those that the experiment compares with one."""
    experiment = results.experiment
    claimed = [(claim.arm, claim.against) for claim in experiment.claims if claim.against]
    others = [(arm, experiment.against) for arm in experiment.arms if experiment.against not in ("", arm)]
    pairs = dict.fromkeys([*claimed, *others])
    return [{"arm": arm, "against": against, "changes": _changes(results, arm, against)} for arm, against in pairs]


def _changes(results: Results, arm: str, against: str = "") -> dict[str, dict[str, dict]]:
    """From the base model or another arm, by metric, then guidance scale and "best"; none of what was not run."""
    found = {metric: _change(results, metric, arm, against) for metric in results.experiment.metrics}
    return {metric: changes for metric, changes in found.items() if changes}


def _change(results: Results, metric: str, arm: str, against: str) -> dict[str, dict]:
    scales = results.plan.judging.guidance_scales
    found = {f"{scale:g}": results.change_at(metric, arm, scale, against) for scale in scales}
    found["best"] = results.change(metric, arm, against, where="best")
    return {name: asdict(each.interval) for name, each in found.items() if each is not None}


def _run_numbers(results: Results, job: Job) -> dict:
    summary, evaluation = results.runs[job].summary, results.runs[job].config.evaluation
    return {
        "front": _front(results.judged[job]["report"], ARMS[job.arm].style),
        "own_best": results.at(job, "best")[0],
        "curve": results.curve(job),
        "held_out_images": {
            "ends": evaluation.images_per_prompt,
            "between": evaluation.during_images_per_prompt,
        },
        **results.costs[job],
        **{name: summary[name] for name in ("training_seconds", "finished", "machine", "versions")},
    }


def _front(front: dict[float, Judged], style: str) -> list[dict[str, float]]:
    return [{"guidance": scale, **_point(judged, style)} for scale, judged in front.items()]


def _point(judged: Judged, style: str) -> dict[str, float]:
    """One model at one guidance scale, as means over prompts."""
    means = {name: values.mean().item() for name, values in judged.values.items()}
    distance = abs(means["saturation"] - means["references_saturation"])
    shares = {name: means[name] for name in means if name.startswith("style:")}
    own = {"style_share": shares[f"style:{style}"]} if style else {}
    kept = {name: means[name] for name in ("retrieval", "diversity", "saturation", "pickscore") if name in means}
    return {**kept, "kid": kid(judged.kernel).item(), "saturation_distance": distance, **own, **shares}


def _claim_numbers(results: Results, claim: Claim) -> dict:
    """A claim with its difference and one-sided p-values; without them where it was not run."""
    seeds = results.seeds(*filter(None, (claim.arm, claim.against)))
    entry = {**asdict(claim), "seeds": seeds}
    found = results.tested(claim)
    if found is None:
        return entry
    entry |= {"found": asdict(found.interval), "compute": _compute(results, claim, seeds)}
    if len(seeds) >= MIN_SEEDS:
        entry |= {"evidence": asdict(evidence(claim, found))}
    return entry


def _compute(results: Results, claim: Claim, seeds: Sequence[int]) -> dict[str, list[float]]:
    """Both arms' mean costs per run; empty against the base model."""
    if not claim.against:
        return {}
    jobs = [[Job(arm, seed) for seed in seeds] for arm in (claim.arm, claim.against)]
    names = ("cpu_seconds", "images_drawn", "references_shown")
    return {name: [_mean([results.costs[job][name] for job in side]) for side in jobs] for name in names}


def _mean(values: Sequence[float]) -> float:
    return torch.tensor(values, dtype=torch.float64).mean().item()
