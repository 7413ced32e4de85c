"""Over-optimisation as evaluations see it: the trained reward is above where it was, an independent metric below.

Goodhart's law has a shape (Gao, Schulman and Hilton, arXiv 2210.10760, figure 1): what is optimised rises on, what was
meant rises with it, peaks, and falls. A level cannot tell the last part from noise; a comparison of the same prompts
and the same noise, image by image, can.

Everything is kept as lists of numbers by name, so that a red flag can put it into a checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from advgrpo.config import EvaluationSection, RewardsSection, direction
from advgrpo.intervals import Interval, t_interval

PREFIX = "held-out "
Memory = dict[str, list[float]]
_SAME_JUDGE = {"rule_accuracy": "rule"}  # a metric that is a reward's verdict under another name


@dataclass(frozen=True)
class Fall:
    """One metric's latest two evaluations against its peak."""

    metric: str
    both: bool  # of the latest two are below the peak
    peak: float  # the metric's means over each pair
    now: float
    since: int  # iterations done at the peak
    loss: Interval  # how much worse it is now, over prompts, paired; `low` at the flag's level
    rise: float  # of the trained reward that has risen most since the peak
    reward: str  # its name

    @property
    def certain(self) -> bool:
        """Whether it has fallen by more than its noise while a trained reward has risen."""
        return self.both and self.loss.low > 0 and self.rise > 0

    @property
    def message(self) -> str:
        return (
            f"held-out {self.metric} fell from {self.peak:.3g} after iteration {self.since} to {self.now:.3g}, by at "
            f"least {self.loss.low:.2g} on the same prompts, while {self.reward} rose by {self.rise:.3g}"
        )


def independent(metrics: Iterable[str], rewards: RewardsSection) -> list[str]:
    """Those of the evaluation's metrics that say which image is better and that nothing is trained on."""
    trained = {name for name, section in rewards.sections().items() if section.used}
    return [name for name in metrics if direction(name) and _SAME_JUDGE.get(name, name) not in trained]


class HeldOutFalls:
    """Compares each evaluation with the best one before it.

    Definition, for a metric of P prompts: evaluations are taken in pairs that follow each other, whose mean has half
    the variance. d_p is the prompt's mean over the best pair so far less that over the latest one, with no evaluation
    in common. The metric has fallen where both of the latest pair are below the best pair's mean, so that no single odd
    evaluation counts, and the lower end of Student's interval of d over prompts is above 0, at a one-sided level of
    `level` / (evaluations so far x metrics): the peak is the best of many, and every evaluation looks again
    (Bonferroni). tests/monitor/test_held_out.py measures how often that is wrong.

    Args:
        memory: where it remembers; others' entries are left alone.
        metrics: names, from `independent`.
        level: `monitor.hacking_level`.
    """

    def __init__(self, memory: Memory, metrics: Sequence[str], level: float):
        self.memory, self.metrics, self.level = memory, metrics, level

    @classmethod
    def of(cls, memory: Memory, evaluation: EvaluationSection, rewards: RewardsSection, level: float) -> HeldOutFalls:
        return cls(memory, independent(evaluation.metrics, rewards), level)

    def evaluated(self, iteration: int, scores: Mapping[str, Sequence[float]], rewards: Mapping[str, float]) -> None:
        """Count in an evaluation.

        Args:
            iteration: how many are done; one that is counted in already changes nothing. With 0 everything starts anew:
                the base model is evaluated again where prompts or judges have changed since a checkpoint.
            scores: metric -> a value per prompt, in the order of the prompts, of the same noise every time.
            rewards: the trained ones' levels now, by name; empty before there are any.
        """
        if iteration == 0:
            for name in [name for name in self.memory if name.startswith(PREFIX)]:
                del self.memory[name]
        for metric in self.metrics:
            values = [direction(metric) * value for value in scores.get(metric, ())]
            if len(values) > 1 and all(map(math.isfinite, values)):
                self._count_in(metric, iteration, values, rewards)

    def _count_in(self, metric: str, iteration: int, values: list[float], rewards: Mapping[str, float]) -> None:
        count, last, at_peak, since, _ = self._of(metric, "counted") or [0.0, -1.0, 0.0, 0.0, 0.0]
        if iteration <= last:
            return
        count, before, peak = count + 1, self._of(metric, "before"), self._of(metric, "peak")
        pair = [(a + b) / 2 for a, b in zip(before, values, strict=True)] if before else []
        better = max(_mean(before), _mean(values)) if before else 0.0
        if pair and (not peak or _mean(pair) >= _mean(peak)):
            at_peak, since, peak = count, float(iteration), pair
            self._forget_rewards(metric)
        for part, kept in (("before", values), ("latest", pair), ("peak", peak)):
            self._set(metric, part, kept)
        self._set(metric, "counted", [count, float(iteration), at_peak, since, better])
        for name, level in rewards.items():  # at the peak; those of a peak before training are the first there are
            self.memory.setdefault(f"{PREFIX}{metric}: {name} at the peak", [level])
            self.memory[f"{PREFIX}{metric}: {name} now"] = [level]

    def worst(self) -> Fall | None:
        """The metric that has fallen most certainly; None while none has two evaluations after its peak."""
        falls = [fall for metric in self.metrics if (fall := self._fall(metric)) is not None]
        return max(falls, key=lambda fall: (fall.certain, fall.loss.low), default=None)

    def _fall(self, metric: str) -> Fall | None:
        peak, latest, rises = self._of(metric, "peak"), self._of(metric, "latest"), self._rises(metric)
        count, _, at_peak, since, better = self._of(metric, "counted") or [0.0] * 5
        if not peak or not rises or count - at_peak < 2:  # two pairs with an evaluation in common say little
            return None
        losses = [high - low for high, low in zip(peak, latest)]
        reward = max(rises, key=lambda name: rises[name])
        sign = direction(metric)
        return Fall(
            metric,
            both=better < _mean(peak),
            peak=sign * _mean(peak),
            now=sign * _mean(latest),
            since=int(since),
            loss=t_interval(losses, confidence=1 - 2 * self.level / (count * len(self.metrics))),
            rise=rises[reward],
            reward=reward,
        )

    def _rises(self, metric: str) -> dict[str, float]:
        """Reward -> how far it is above its level at the metric's peak."""
        start, end = f"{PREFIX}{metric}: ", " at the peak"
        names = [key[len(start) : -len(end)] for key in self.memory if key.startswith(start) and key.endswith(end)]
        return {name: self.memory[f"{start}{name} now"][0] - self.memory[f"{start}{name}{end}"][0] for name in names}

    def _forget_rewards(self, metric: str) -> None:
        for name in self._rises(metric):
            del self.memory[f"{PREFIX}{metric}: {name} at the peak"]

    def _of(self, metric: str, part: str) -> list[float]:
        return self.memory.get(f"{PREFIX}{metric}: {part}", [])

    def _set(self, metric: str, part: str, values: Sequence[float]) -> None:
        self.memory[f"{PREFIX}{metric}: {part}"] = list(values)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
