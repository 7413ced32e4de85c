"""Models compared at several guidance scales: a judge's accuracy, distance to the references, and diversity.

A guidance scale moves a model along a front of quality against diversity, so one point of each says little: what is
reported is the difference at equal guidance, and each at its own best.

Intervals and p-values are Student's. The standard error is that of a two-way bootstrap (Owen, "The pigeonhole
bootstrap", 2007): training seeds and prompts are both drawn with replacement, so it holds the chance of either. Of S
seeds S - 1 are drawn, because means of S out of S vary too little by (S - 1) / S (Rao and Wu, "Resampling inference
with complex survey data", 1988). The degrees of freedom are Satterthwaite's, between those of seeds and of prompts:
where three seeds alone differ, the interval is as wide as one over three numbers. What they miss is more than 5 % where
both differ, because seeds that lie close together by chance look like many: simulated, at most 13 % with two seeds, 9 %
with three, 6 % with five. Percentiles of the resamples miss half, a quarter and a fifth where seeds alone differ.

Shapes: S seeds, P prompts, K images of each, R references of each, D features, B resamples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from advgrpo.intervals import Interval, t_quantile, t_share_below
from advgrpo.runtime import rng


def kernel_matrix(images: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    """What `kid` averages, by pairs of prompts: [P, P] float64 from features [P, K, D] and [P, R, D].

    The kernel is KID's, (x.y / D + 1)^3 (arXiv 1801.01401), averaged over the images of two prompts:
    k(x_i, x_j) + k(y_i, y_j) - k(x_i, y_j) - k(y_i, x_j).
    """
    x, y = images.double(), references.double()
    return _kernel(x, x) + _kernel(y, y) - _kernel(x, y) - _kernel(y, x)


def _kernel(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """[P, P]: the kernel's mean over every image of one prompt with every image of another."""
    products = (a.flatten(0, 1) @ b.flatten(0, 1).T / a.shape[-1] + 1) ** 3
    return products.view(a.shape[0], a.shape[1], b.shape[0], b.shape[1]).mean((1, 3))


def kid(matrix: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    """1000 x the kernel distance [..., B] between images and references: the mean over pairs of different prompts.

    Pairs within a prompt are left out, also between images and references, so prompts are the independent units and the
    estimate is unbiased (a U-statistic) like KID's own.

    Args:
        matrix: [..., P, P] of `kernel_matrix`.
        weights: [B, P], how often every prompt counts; None: once ([1, P]).
    """
    count = matrix.shape[-1]
    weights = torch.ones(1, count) if weights is None else weights
    weights = weights.double()
    off = matrix - torch.diag_embed(matrix.diagonal(dim1=-2, dim2=-1))
    total = torch.einsum("bp,...pq,bq->...b", weights, off, weights)
    return 1000 * total / (weights.sum(1).square() - weights.square().sum(1))


def diversity(features: torch.Tensor) -> torch.Tensor:
    """[P] mean cosine distance between the images of a prompt, features [P, K, D] less their mean over all.

    Raises:
        ValueError: fewer than two images of a prompt.
    """
    if features.shape[1] < 2:
        raise ValueError(f"diversity needs at least 2 images of a prompt, got {features.shape[1]}")
    own = F.normalize(features.double() - features.double().mean((0, 1)), dim=-1)
    nearness = own @ own.transpose(1, 2)
    count = features.shape[1]
    return 1 - (nearness.sum((1, 2)) - nearness.diagonal(dim1=1, dim2=2).sum(1)) / (count * (count - 1))


@dataclass(frozen=True)
class Point:
    """One model at one guidance scale, by prompt."""

    accuracy: torch.Tensor  # [P] mean of the judge's verdicts
    kernel: torch.Tensor  # [P, P] of `kernel_matrix`
    diversity: torch.Tensor  # [P]

    @classmethod
    def of(cls, verdicts: torch.Tensor, features: torch.Tensor, references: torch.Tensor) -> Point:
        """From verdicts [P, K], features [P, K, D] and those of the references [P, R, D]."""
        return cls(verdicts.double().mean(1), kernel_matrix(features, references), diversity(features))


Front = Mapping[float, Point]  # guidance scale -> point


@dataclass(frozen=True)
class Difference:
    """A model less the base, over seeds and prompts; of the diversity the ratio."""

    guidance: tuple[float, float]  # of the model (the commonest of its seeds), of the base
    accuracy: Interval
    kid: Interval
    diversity_ratio: Interval


def best_guidance(front: Front) -> float:
    """Where the judge's accuracy is highest; of equals the lowest. Choose on other prompts than are reported."""
    return max(sorted(front), key=lambda scale: front[scale].accuracy.mean().item())


@dataclass(frozen=True)
class Resampled:
    """A statistic of the data, and how far it is from that of all seeds and prompts."""

    estimate: float
    error: float  # standard error
    freedom: float  # degrees of freedom
    resamples: int

    @property
    def interval(self) -> Interval:
        """95 %."""
        half = t_quantile(0.975, self.freedom) * self.error if self.error else 0.0
        return Interval(self.estimate, self.estimate - half, self.estimate + half)

    def p_above(self, level: float) -> float:
        """One-sided p-value of "the statistic is above `level`", not below what so many resamples can tell."""
        if not (math.isfinite(self.estimate) and math.isfinite(self.error)):
            return 1.0
        least = 1 / (1 + self.resamples)
        if not self.error:
            return least if self.estimate > level else 1.0
        return max(least, t_share_below((level - self.estimate) / self.error, self.freedom))

    def p_below(self, level: float) -> float:
        """One-sided p-value of "the statistic is below `level`"."""
        return replace(self, estimate=-self.estimate).p_above(-level)


@dataclass(frozen=True)
class Resamples:
    """How often every prompt [B, P] and every seed [B, S] counts in B resamples; float64.

    Whatever is compared is resampled together: entry s of two lists of models must be of one training seed.
    """

    prompts: torch.Tensor
    seeds: torch.Tensor

    @classmethod
    def draw(cls, prompts: int, seeds: int, *, resamples: int, seed: int) -> Resamples:
        """The same for the same numbers, so that statistics of one comparison are of the same resamples."""
        generator = rng.generator(seed, "frontier")
        drawn_seeds = max(1, seeds - 1)
        return cls(_counts(resamples, prompts, prompts, generator), _counts(resamples, seeds, drawn_seeds, generator))

    def of(self, statistic: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Resampled:
        """`statistic` is [B] of prompts [B or 1, P] and seeds [B, S]."""
        (resamples, prompts), seeds = self.prompts.shape, self.seeds.shape[1]
        every = torch.ones(1, prompts).double(), torch.ones(1, seeds).double()
        both = _variance(statistic(self.prompts, self.seeds))
        of_seeds = min(both, _variance(statistic(every[0], self.seeds)))
        freedom = _freedom([(of_seeds, seeds), (both - of_seeds, prompts)])
        return Resampled(statistic(*every).item(), math.sqrt(both), freedom, resamples)

    def mean(self, values: torch.Tensor) -> Resampled:
        """Of values [S, P]."""
        return self.of(lambda p, s: _mean(values, p, s))

    def ratio(self, values: torch.Tensor, others: torch.Tensor) -> Resampled:
        """The mean of values [S, P] in units of that of others [S, P]."""
        return self.of(lambda p, s: _mean(values, p, s) / _mean(others, p, s))

    def distance(self, kernels: torch.Tensor) -> Resampled:
        """`kid` of kernel matrices [S, P, P], or of the differences of two."""
        return self.of(lambda p, s: (kid(kernels, p).T * s).sum(1) / s.sum(1))


def compare(
    models: Sequence[Point], base: Point, guidance: tuple[float, float], *, resamples: int = 4000, seed: int = 0
) -> Difference:
    """Several seeds of one recipe against the base on the same prompts.

    Raises:
        ValueError: no models, or other numbers of prompts.
    """
    counts = {len(point.accuracy) for point in (*models, base)}
    if not models or len(counts) != 1:
        raise ValueError(f"want at least one model, all on the same prompts; got {len(models)} on {sorted(counts)}")
    drawn = Resamples.draw(counts.pop(), len(models), resamples=resamples, seed=seed)
    own = torch.stack([point.diversity for point in models])
    return Difference(
        guidance,
        drawn.mean(torch.stack([point.accuracy - base.accuracy for point in models])).interval,
        drawn.distance(torch.stack([point.kernel for point in models]) - base.kernel).interval,
        drawn.ratio(own, base.diversity.expand_as(own)).interval,
    )


def _counts(resamples: int, count: int, draws: int, generator: torch.Generator) -> torch.Tensor:
    """[B, n] float64: how often each of n is drawn in so many draws with replacement."""
    drawn = torch.randint(count, (resamples, draws), generator=generator)
    return torch.zeros(resamples, count, dtype=torch.float64).scatter_add_(
        1, drawn, torch.ones(drawn.shape, dtype=torch.float64)
    )


def _variance(draws: torch.Tensor) -> float:
    """Of draws [B], but those of one prompt alone, where the statistic needs pairs: NaN."""
    known = draws[~draws.isnan()]
    return known.var(correction=0).item() if len(known) else 0.0


def _freedom(parts: Sequence[tuple[float, int]]) -> float:
    """Degrees of freedom of a sum of variances, each of the mean of so many (Satterthwaite, Biometrics 2, 1946)."""
    below = sum(variance**2 / (count - 1) for variance, count in parts if variance > 0 and count > 1)
    return sum(variance for variance, _ in parts) ** 2 / below if below else math.inf


def _mean(values: torch.Tensor, prompts: torch.Tensor, seeds: torch.Tensor) -> torch.Tensor:
    """[B] means of values [S, P] weighted by prompts [B, P] and seeds [B, S]."""
    total = torch.einsum("bs,sp,bp->b", seeds.double(), values.double(), prompts.double())
    return total / (seeds.sum(1) * prompts.sum(1))
