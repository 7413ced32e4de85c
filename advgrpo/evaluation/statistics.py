"""Uncertainty of means: bootstrap over clusters, paired comparison, and the t-interval over seeds. Pure and seeded.

The images of a prompt are alike, so the prompt, not the image, is the unit that is resampled (cluster bootstrap,
Davison & Hinkley, "Bootstrap Methods and Their Application", section 3.8). Intervals are scipy's bias-corrected and
accelerated ones (BCa, Efron 1987): scores near their upper end, such as a judge's, are skewed, which percentile
intervals ignore. With fewer than about 10 clusters they are too narrow, which is why a handful of seeds gets a
t-interval instead.

Shapes: n clusters, k images of each; scores are [n] or [n, k], of any float dtype, computed in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from advgrpo.intervals import Interval, as_matrix, t_interval, t_quantile
from advgrpo.runtime import rng

__all__ = ["Comparison", "Interval", "bootstrap_mean", "holm", "paired_bootstrap", "t_interval", "t_quantile"]

_RESAMPLES_AT_ONCE = 2**22  # elements of an array of resampled clusters: 32 MB


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
    a, b = as_matrix(a), as_matrix(b)
    if a.shape != b.shape:
        raise ValueError(f"scores of {list(a.shape)} cannot be paired with scores of {list(b.shape)}")
    difference = a - b
    wins = (difference > 0).double() + 0.5 * (difference == 0).double()
    settings = {"confidence": confidence, "resamples": resamples, "seed": seed}
    return Comparison(bootstrap_mean(difference, **settings), bootstrap_mean(wins, **settings))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for being several (Holm, "A simple sequentially rejective multiple test procedure", 1979).

    The k-th smallest of m is multiplied by m - k + 1, and none is below a smaller one's. Rejecting those of at most
    alpha errs anywhere among the m with a probability of at most alpha, whatever the tests have to do with each other.

    Raises:
        ValueError: a p-value outside [0, 1].
    """
    if not all(0 <= p <= 1 for p in p_values):
        raise ValueError(f"p-values {[p for p in p_values if not 0 <= p <= 1]}: want numbers from 0 to 1")
    adjusted, least = [0.0] * len(p_values), 0.0
    for rank, number in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[number]))
        adjusted[number] = least
    return adjusted


def _clusters(scores: torch.Tensor | Sequence[float]) -> torch.Tensor:
    """[n] means of equally large clusters: resampling rows of [n, k] only ever needs these."""
    return as_matrix(scores).mean(1)
