"""Uncertainty of means: bootstrap over clusters, paired comparison, and the t-interval over seeds. Pure and seeded.

The images of a prompt are alike, so the prompt, not the image, is the unit that is resampled (cluster bootstrap,
Davison & Hinkley, "Bootstrap Methods and Their Application", section 3.8). Intervals are scipy's bias-corrected and
accelerated ones (BCa, Efron 1987): scores near their upper end, such as a judge's, are skewed, which percentile
intervals ignore. With fewer than about 10 clusters they are too narrow, which is why a handful of seeds gets a
t-interval instead.

Shapes: n clusters, k images of each; scores are [n] or [n, k], of any float dtype, computed in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from advgrpo.runtime import rng

_RESAMPLES_AT_ONCE = 2**22  # elements of an array of resampled clusters: 32 MB


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """A against B on the same prompts and noise."""

    difference: Interval  # mean of a - b
    win_rate: Interval  # share of pairs in which a scores higher; a tie counts half


def bootstrap_mean(
    scores: torch.Tensor | Sequence[float], *, confidence: float = 0.95, resamples: int = 4000, seed: int = 0
) -> Interval:
    """Mean of scores [n] or [n, k] with its BCa interval, whole rows being resampled with replacement.

    The same seed draws the same rows for every score matrix with n rows. Rows of equal means, or a single row, have no
    spread to estimate: low = mean = high.

    Raises:
        ValueError: no scores, a score that is not finite, or a confidence outside (0, 1).
    """
    from scipy.stats import bootstrap  # half a second, which --help need not wait for

    clusters = _clusters(scores)
    if not 0 < confidence < 1:
        raise ValueError(f"confidence = {confidence}: want a share between 0 and 1")
    mean = clusters.mean().item()
    if bool((clusters == clusters[0]).all()):
        return Interval(mean, mean, mean)
    found = bootstrap(
        (clusters.numpy(),),
        np.mean,
        n_resamples=resamples,
        batch=max(1, _RESAMPLES_AT_ONCE // len(clusters)),
        confidence_level=confidence,
        method="BCa",
        rng=np.random.default_rng(rng.derive_seed(seed, "bootstrap")),
    ).confidence_interval
    return Interval(mean, float(found.low), float(found.high))


def paired_bootstrap(
    a: torch.Tensor | Sequence[float],
    b: torch.Tensor | Sequence[float],
    *,
    confidence: float = 0.95,
    resamples: int = 4000,
    seed: int = 0,
) -> Comparison:
    """Compare two models' scores of the same images-to-be, element by element, prompts resampled in pairs.

    Args:
        a, b: [n] or [n, k], the same shape; entry (i, j) of both was drawn for the same prompt from the same noise.

    Raises:
        ValueError: different shapes, or what `bootstrap_mean` refuses.
    """
    a, b = _as_matrix(a), _as_matrix(b)
    if a.shape != b.shape:
        raise ValueError(f"scores of {list(a.shape)} cannot be paired with scores of {list(b.shape)}")
    difference = a - b
    wins = (difference > 0).double() + 0.5 * (difference == 0).double()
    settings = {"confidence": confidence, "resamples": resamples, "seed": seed}
    return Comparison(bootstrap_mean(difference, **settings), bootstrap_mean(wins, **settings))


def t_interval(values: Sequence[float], *, confidence: float = 0.95) -> Interval:
    """Mean of a few independent runs (one value per seed) with Student's t-interval, m +- t * s / sqrt(n).

    Raises:
        ValueError: fewer than two values (they have no spread), or one that is not finite.
    """
    numbers = _as_matrix(values)[:, 0]
    if len(numbers) < 2:
        raise ValueError(f"an interval over {len(numbers)} value needs at least 2")
    mean = numbers.mean().item()
    half = t_quantile(0.5 + confidence / 2, len(numbers) - 1) * numbers.std().item() / math.sqrt(len(numbers))
    return Interval(mean, mean - half, mean + half)


def t_quantile(probability: float, freedom: int) -> float:
    """Student's t quantile for a whole number of degrees of freedom.

    Raises:
        ValueError: a probability outside [0.5, 1) or fewer than 1 degree of freedom.
    """
    from scipy.special import stdtrit  # scipy.stats.t.ppf without the quarter of a second that scipy.stats takes

    if not 0.5 <= probability < 1 or freedom < 1:
        raise ValueError(f"t_quantile({probability}, {freedom}): want 0.5 <= probability < 1 and freedom >= 1")
    return float(stdtrit(freedom, probability))


def _as_matrix(scores: torch.Tensor | Sequence[float]) -> torch.Tensor:
    """[n, k] float64 on the CPU; finite."""
    matrix = torch.as_tensor(scores, dtype=torch.float64, device="cpu")
    matrix = matrix[:, None] if matrix.dim() == 1 else matrix
    if matrix.dim() != 2 or not matrix.numel():
        raise ValueError(f"scores are {list(matrix.shape)}; want a non-empty [n] or [n, k]")
    if not torch.isfinite(matrix).all():
        raise ValueError("scores hold a value that is not finite")
    return matrix


def _clusters(scores: torch.Tensor | Sequence[float]) -> torch.Tensor:
    """[n] means of equally large clusters: resampling rows of [n, k] only ever needs these."""
    return _as_matrix(scores).mean(1)
