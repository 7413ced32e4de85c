"""Differences between models by metric, what they say of a claim, and what all claims say together.

A difference is of several seeds of one arm from the base model, or from the same seeds of another arm, on the same
prompts and noise; seeds and prompts are resampled together (evaluation/frontier.py). A claim has two one-sided
p-values: of what it expects, and of its contrary. The smaller, doubled, is its p-value; Holm's method makes the
p-values of all claims of the plan, run or not, safe to read side by side.

Shapes: S seeds, P prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from advgrpo.evaluation.frontier import Resampled, Resamples
from advgrpo.evaluation.statistics import holm
from advgrpo.experiments.judging import Judged
from advgrpo.experiments.plan import Claim

CONFIRMED, CONTRADICTED, UNDECIDED = "confirmed", "contradicted", "undecided"
LEVEL = 0.05  # of the adjusted p-values
MIN_SEEDS = 3  # two that happen to be alike look like many: evaluation/frontier.py


@dataclass(frozen=True)
class Pair:
    """Models and what they are compared with, entry by entry of one training seed.

    Raises:
        ValueError: none, or other numbers of them.
    """

    models: Sequence[Judged]
    others: Sequence[Judged]

    def __post_init__(self):
        if not self.models or len(self.models) != len(self.others):
            raise ValueError(f"{len(self.models)} models against {len(self.others)}: want as many, at least one")

    def stacked(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The models' values and the others', [S, P] each."""
        one, other = (torch.stack([each.values[name] for each in side]) for side in (self.models, self.others))
        return one, other


def difference(metric: str, pair: Pair, *, style: str = "", resamples: int, seed: int = 0) -> Resampled:
    """Of one of plan.Metric: of the diversity the relative change, of all others models less others.

    Args:
        style: the arm's, for "style_share".

    Raises:
        ValueError: an unknown metric.
    """
    prompts = len(pair.models[0].values["retrieval"])
    drawn = Resamples.draw(prompts, len(pair.models), resamples=resamples, seed=seed)
    if metric == "kid":
        kernels = [torch.stack([each.kernel for each in side]) for side in (pair.models, pair.others)]
        return drawn.distance(kernels[0] - kernels[1])
    if metric == "diversity":
        ratio = drawn.ratio(*pair.stacked("diversity"))
        return replace(ratio, estimate=ratio.estimate - 1)
    if metric == "saturation_distance":
        return _further_from_references(pair, drawn)
    name = {"retrieval": "retrieval", "pickscore": "pickscore", "style_share": f"style:{style}"}.get(metric)
    if name is None:
        raise ValueError(f"unknown metric {metric!r}")
    own, other = pair.stacked(name)
    return drawn.mean(own - other)


def level(metric: str, models: Sequence[Judged], *, style: str = "", resamples: int, seed: int = 0) -> Resampled:
    """What the models have themselves, for "reaches": only of the share in a style."""
    if metric != "style_share":
        raise ValueError(f"the level of {metric!r} is nobody's claim")
    drawn = Resamples.draw(len(models[0].values["retrieval"]), len(models), resamples=resamples, seed=seed)
    return drawn.mean(torch.stack([each.values[f"style:{style}"] for each in models]))


def _further_from_references(pair: Pair, drawn: Resamples) -> Resampled:
    """How much further each seed's mean saturation is from the references' than the other's."""
    (own, other), references = pair.stacked("saturation"), pair.models[0].values["references_saturation"]

    def statistic(prompts: torch.Tensor, seeds: torch.Tensor) -> torch.Tensor:
        share = prompts / prompts.sum(1, keepdim=True)  # [B, P]
        aim = (share @ references)[:, None]
        change = (share @ own.T - aim).abs() - (share @ other.T - aim).abs()  # [B, S]
        return (change * seeds).sum(1) / seeds.sum(1)

    return drawn.of(statistic)


@dataclass(frozen=True)
class Evidence:
    """One-sided p-values: of what a claim expects, and of its contrary."""

    confirm: float
    contradict: float

    @property
    def p(self) -> float:
        """Two-sided, for either."""
        return min(1.0, 2 * min(self.confirm, self.contradict))


def evidence(claim: Claim, found: Resampled) -> Evidence:
    """What a difference, or for "reaches" a level, says of a claim."""
    above, below, margin = found.p_above, found.p_below, claim.margin
    if claim.expected == "stays":
        outside = min(1.0, 2 * min(above(margin), below(-margin)))
        return Evidence(max(above(-margin), below(margin)), outside)
    edge = {"rises": 0.0, "falls": 0.0, "does not fall": -margin, "does not rise": margin, "reaches": margin}
    up = claim.expected in ("rises", "does not fall", "reaches")
    at = edge[claim.expected]
    return Evidence(above(at), below(at)) if up else Evidence(below(at), above(at))


@dataclass(frozen=True)
class Verdict:
    """What is said of a claim among all claims of the plan."""

    word: str  # CONFIRMED, CONTRADICTED or UNDECIDED
    p: float | None  # adjusted; None where the claim was not tested


def verdicts(claims: Sequence[Evidence | None]) -> list[Verdict]:
    """Of all claims of the plan at once; None for those that were not tested, which count as much as the others."""
    adjusted = holm([1.0 if each is None else each.p for each in claims])
    return [_verdict(each, p) for each, p in zip(claims, adjusted)]


def _verdict(found: Evidence | None, adjusted: float) -> Verdict:
    if found is None:
        return Verdict(UNDECIDED, None)
    if adjusted > LEVEL:
        return Verdict(UNDECIDED, adjusted)
    return Verdict(CONFIRMED if found.confirm < found.contradict else CONTRADICTED, adjusted)
