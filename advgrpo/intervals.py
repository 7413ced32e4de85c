"""Student's t: a mean of a few independent values with its interval; evaluation/statistics.py has what resamples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval."""

    mean: float
    low: float
    high: float

    def text(self, form: str = ".4f") -> str:
        """As "mean [low, high]", each number in the format `form`."""
        return f"{self.mean:{form}} [{self.low:{form}}, {self.high:{form}}]"


def t_interval(values: torch.Tensor | Sequence[float], *, confidence: float = 0.95) -> Interval:
    """Mean of a few independent runs (one value per seed) with Student's t-interval, m +- t * s / sqrt(n).

    Raises:
        ValueError: fewer than two values (they have no spread), or one that is not finite.
    """
    numbers = as_matrix(values)[:, 0]
    if len(numbers) < 2:
        raise ValueError(f"an interval over {len(numbers)} value needs at least 2")
    mean = numbers.mean().item()
    half = t_quantile(0.5 + confidence / 2, len(numbers) - 1) * numbers.std().item() / math.sqrt(len(numbers))
    return Interval(mean, mean - half, mean + half)


def t_quantile(probability: float, freedom: float) -> float:
    """Student's t quantile for degrees of freedom, which need not be whole; for infinitely many the normal one.

    Raises:
        ValueError: a probability outside [0.5, 1) or fewer than 1 degree of freedom.
    """
    from scipy.special import ndtri, stdtrit  # scipy.stats.t.ppf without the quarter of a second that scipy.stats takes

    if not 0.5 <= probability < 1 or freedom < 1:
        raise ValueError(f"t_quantile({probability}, {freedom}): want 0.5 <= probability < 1 and freedom >= 1")
    return float(ndtri(probability) if math.isinf(freedom) else stdtrit(freedom, probability))


def t_share_below(value: float, freedom: float) -> float:
    """The probability that Student's t is at most `value`."""
    from scipy.special import ndtr, stdtr

    return float(ndtr(value) if math.isinf(freedom) else stdtr(freedom, value))


def as_matrix(scores: torch.Tensor | Sequence[float]) -> torch.Tensor:
    """Scores [n] or [n, k] as [n, k] float64 on the CPU; ValueError where they are empty or not finite."""
    matrix = torch.as_tensor(scores, dtype=torch.float64, device="cpu")
    matrix = matrix[:, None] if matrix.dim() == 1 else matrix
    if matrix.dim() != 2 or not matrix.numel():
        raise ValueError(f"scores are {list(matrix.shape)}; want a non-empty [n] or [n, k]")
    if not torch.isfinite(matrix).all():
        raise ValueError("scores hold a value that is not finite")
    return matrix
