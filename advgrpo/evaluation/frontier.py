"""Models compared at several guidance scales: a judge's accuracy, distance to the references, and diversity.

A guidance scale moves a model along a front of quality against diversity, so one point of each says little: what is
reported is the difference at equal guidance, and each at its own best.

Intervals are percentiles of a two-way bootstrap (Owen, "The pigeonhole bootstrap", 2007): training seeds and prompts
are both drawn with replacement, so they hold the chance of either. It errs towards wide intervals.

Shapes: S seeds, P prompts, K images of each, R references of each, D features, B resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from advgrpo.evaluation.statistics import Interval
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
    generator = rng.generator(seed, "frontier")
    prompts = _counts(resamples, counts.pop(), generator)
    seeds = _counts(resamples, len(models), generator)
    accuracy = torch.stack([point.accuracy - base.accuracy for point in models])
    own = torch.stack([point.diversity for point in models])
    kernels = torch.stack([point.kernel for point in models]) - base.kernel
    once = torch.ones(1, prompts.shape[1]), torch.ones(1, len(models))

    def interval(statistic: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Interval:
        spread = statistic(prompts, seeds)
        # a resample of one prompt alone has no pairs of prompts, so no distance
        low, high = torch.nanquantile(spread, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        return Interval(statistic(*once).item(), low, high)

    return Difference(
        guidance,
        interval(lambda p, s: _mean(accuracy, p, s)),
        interval(lambda p, s: (kid(kernels, p).T * s).sum(1) / s.sum(1)),
        interval(lambda p, s: _mean(own, p, s) / _mean(base.diversity[None], p, torch.ones(len(p), 1))),
    )


def _counts(resamples: int, count: int, generator: torch.Generator) -> torch.Tensor:
    """[B, n] float64: how often each of n is drawn in n draws with replacement."""
    drawn = torch.randint(count, (resamples, count), generator=generator)
    return torch.zeros(resamples, count, dtype=torch.float64).scatter_add_(
        1, drawn, torch.ones(drawn.shape, dtype=torch.float64)
    )


def _mean(values: torch.Tensor, prompts: torch.Tensor, seeds: torch.Tensor) -> torch.Tensor:
    """[B] means of values [S, P] weighted by prompts [B, P] and seeds [B, S]."""
    total = torch.einsum("bs,sp,bp->b", seeds.double(), values, prompts.double())
    return total / (seeds.sum(1) * prompts.sum(1))
