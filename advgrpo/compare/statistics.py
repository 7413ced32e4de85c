"""Win rates, strengths and agreement of votes, with what they leave open. Pure and seeded.

Shapes: n votes, R raters, P prompts, K sides. A vote is 1 for a win, 0 for a loss, 0.5 for a tie.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from advgrpo.runtime.rng import derive_seed

_AT_ONCE = 2**22  # numbers of an array of resamples: 32 MB
_PRIOR = 0.01  # 1 / variance of the normal prior of a strength
_STEPS = 100  # of Newton's method, which needs about six


@dataclass(frozen=True)
class Estimate:
    """A number with its interval; None where nothing could be resampled."""

    value: float
    low: float | None = None
    high: float | None = None


def resamples_of(raters: np.ndarray, prompts: np.ndarray, *, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Weights [b, n] of the votes in resamples of raters and of prompts, both with replacement; b in chunks.

    The two-way ("pigeonhole") bootstrap of Owen, "The pigeonhole bootstrap", Annals of Applied Statistics 2007: a vote
    weighs how often its rater was drawn times how often its prompt was. What has one value only, such as a single
    rater, is not resampled. Votes of one rater, and on one prompt, count as alike; it is mildly conservative.

    Args:
        raters, prompts: [n] of any hashable kind.
    """
    random = np.random.default_rng(derive_seed(seed, "two_way_bootstrap"))
    ways = [np.unique(each, return_inverse=True)[1] for each in (raters, prompts)]
    chunk = max(1, _AT_ONCE // max(1, len(raters)))
    for start in range(0, resamples, chunk):
        size = min(chunk, resamples - start)
        weights = np.ones((size, len(raters)))
        for way in ways:
            count = int(way.max()) + 1
            if count > 1:
                weights *= random.multinomial(count, np.full(count, 1 / count), size=size)[:, way]
        yield weights


def interval(
    statistic: Callable[[np.ndarray], np.ndarray],
    raters: np.ndarray,
    prompts: np.ndarray,
    *,
    confidence: float,
    resamples: int,
    seed: int,
) -> list[Estimate]:
    """Estimates of what `statistic` gives, with percentile intervals of `resamples_of`.

    Args:
        statistic: weights [b, n] -> values [b, m]; a row that is not finite (nothing was drawn) is left out.
    """
    values = statistic(np.ones((1, len(raters))))[0]
    if len(np.unique(raters)) < 2 and len(np.unique(prompts)) < 2:
        return [Estimate(float(value)) for value in values]
    drawn = np.concatenate(
        [statistic(weights) for weights in resamples_of(raters, prompts, resamples=resamples, seed=seed)]
    )
    drawn = drawn[np.isfinite(drawn).all(1)]
    tail = 50 * (1 - confidence)
    low, high = np.percentile(drawn, [tail, 100 - tail], axis=0)
    return [Estimate(float(v), float(a), float(b)) for v, a, b in zip(values, low, high)]


def weighted_mean(values: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """A `statistic` of `interval`: weights [b, n] -> means [b, 1] of values [n]."""

    def mean(weights: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore"):
            return ((weights @ values) / weights.sum(1))[:, None]

    return mean


def strengths(first: np.ndarray, second: np.ndarray, outcome: np.ndarray, count: int) -> Callable[..., np.ndarray]:
    """A `statistic` of `interval`: weights [b, n] -> Bradley-Terry strengths [b, K].

    Args:
        first, second: [n] sides that met, of 0 ... count - 1.
        outcome: [n] 1 where the first won, 0.5 for a tie.
    """
    cells = np.zeros((len(first), count * count))
    rows = np.arange(len(first))
    cells[rows, first * count + second] = outcome
    cells[rows, second * count + first] = 1 - outcome

    def fitted(weights: np.ndarray) -> np.ndarray:
        return bradley_terry((weights @ cells).reshape(-1, count, count))

    return fitted


def bradley_terry(wins: np.ndarray) -> np.ndarray:
    """Strengths theta [..., K] with sum 0, where i beats j with probability 1 / (1 + exp(theta_j - theta_i)).

    Bradley & Terry, Biometrika 1952, a tie being half a win for each. The maximum of the likelihood times a normal
    prior of standard deviation 10, which moves the 1.099 between three wins and one by 0.007, and keeps a side that
    has won everything finite; by Newton's method, whose matrix it makes negative definite.

    Args:
        wins: [..., K, K]; entry (i, j) counts what i has won against j.
    """
    wins = np.asarray(wins, dtype=np.float64)
    wins = wins * (1 - np.eye(wins.shape[-1]))
    games = wins + np.swapaxes(wins, -1, -2)
    theta, unit = np.zeros(wins.shape[:-1]), np.eye(wins.shape[-1])
    for _ in range(_STEPS):
        expected = games / (1 + np.exp(theta[..., None, :] - theta[..., :, None]))
        gradient = (wins - expected).sum(-1) - _PRIOR * theta
        spread = np.divide(expected * np.swapaxes(expected, -1, -2), games, out=np.zeros_like(games), where=games > 0)
        curvature = spread.sum(-1)[..., None] * unit - spread + _PRIOR * unit
        step = np.linalg.solve(curvature, gradient[..., None])[..., 0]
        theta = theta + np.clip(step, -1, 1)  # far from the maximum the likelihood is flat, and Newton overshoots
        if np.abs(step).max() < 1e-10:
            break
    return theta - theta.mean(-1, keepdims=True)


def krippendorff_alpha(ratings: np.ndarray) -> float | None:
    """Krippendorff's alpha: 1 for raters who agree, 0 for what chance gives, less for less; None where it is undefined.

    1 - D_o / D_e with squared differences (the interval metric: win and loss are twice as far apart as either from a
    tie), of Krippendorff, "Computing Krippendorff's Alpha-Reliability", 2011. Undefined without a unit of two ratings,
    and where all ratings are equal.

    Args:
        ratings: [units, raters], NaN where a rater did not rate.
    """
    ratings = np.asarray(ratings, dtype=np.float64)
    rated = ~np.isnan(ratings)
    paired = ratings[rated.sum(1) >= 2]
    values = paired[~np.isnan(paired)]
    if not len(values):
        return None
    count = len(values)
    # The mean squared difference of two of n values, over ordered pairs, is 2 n / (n - 1) times their variance.
    within = sum(2 * len(unit) * len(unit) / (len(unit) - 1) * unit.var() for unit in map(_given, paired))
    observed = within / count
    expected = 2 * count / (count - 1) * values.var()
    return None if expected == 0 else float(1 - observed / expected)


def _given(unit: np.ndarray) -> np.ndarray:
    return unit[~np.isnan(unit)]
