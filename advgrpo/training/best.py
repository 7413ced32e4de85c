"""The best evaluation of a run so far: which one it was, its LoRA, and how long nothing better has come.

Everything here is part of the checkpoint, so that a resumed run keeps, and ends, as one that never stopped.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from advgrpo.config import EvaluationSection, direction
from advgrpo.errors import UserError
from advgrpo.reporting.metric_names import FIRST, HELD_OUT
from advgrpo.training.restoring import count, entry, taken

FOLDER = "lora-best"
TENSORS = "best."  # how its weights are called in a checkpoint
STATE = "best"
HEADER = "advgrpo_best"  # of the LoRA's file


@dataclass(frozen=True)
class Best:
    """What evaluations have shown so far of one metric.

    Args:
        metric: of `evaluation.metrics`.
        value: its mean at the best evaluation, over the images that every evaluation has; None before the first.
        iteration: how many were done then.
        evaluated: how many were done at the last evaluation that is counted in.
        without_gain: evaluations since the best.
        weights: the averaged ones of the best, float32 by the parameters' names.
    """

    metric: str
    value: float | None = None
    iteration: int = 0
    evaluated: int = 0
    without_gain: int = 0
    weights: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def after(self, found: Mapping[str, float], iteration: int, averages: Mapping[str, torch.Tensor]) -> Best:
        """With one more evaluation, after `iteration` iterations, counted in; one that already is changes nothing.

        Args:
            found: the result of `Evaluator.run`. Where it has means over each prompt's first images, those count: the
                other evaluations have no others.
            averages: the weights that were evaluated, which are copied if they are the best.
        """
        if iteration <= self.evaluated:
            return self
        name = HELD_OUT + self.metric
        value = found.get(name + FIRST, found[name])
        better = math.isfinite(value) and (
            self.value is None or direction(self.metric) * value > direction(self.metric) * self.value
        )
        if not better:
            return replace(self, evaluated=iteration, without_gain=self.without_gain + 1)
        weights = {parameter: tensor.detach().clone() for parameter, tensor in averages.items()}
        return Best(self.metric, value, iteration, iteration, 0, weights)

    def found_at(self, iteration: int) -> bool:
        """Whether the evaluation after `iteration` iterations is the best."""
        return self.value is not None and self.iteration == iteration

    def record(self) -> dict[str, float | int | None]:
        """For metrics.jsonl and the trackers."""
        at = None if self.value is None else self.iteration
        return {"best_value": self.value, "best_iteration": at, "evaluations_without_gain": self.without_gain}

    def header(self) -> dict[str, str]:
        """What the LoRA's file says of itself."""
        return {HEADER: json.dumps({"metric": self.metric, "value": self.value, "iteration": self.iteration})}

    def state(self) -> dict[str, Any]:
        """As JSON; the weights are stored beside it, under names that begin with `TENSORS`."""
        names = ("metric", "value", "iteration", "evaluated", "without_gain")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    @classmethod
    def read(
        cls,
        metric: str,
        tensors: Mapping[str, torch.Tensor],
        state: Mapping[str, Any],
        parameters: Mapping[str, torch.Tensor],
    ) -> Best:
        """Of a checkpoint; none yet where it has none, or that of another metric, which may be changed on resuming.

        Raises:
            UserError: it is damaged, or another run's.
        """
        saved = entry(state, STATE, dict) if STATE in state else {}
        if saved.get("metric") != metric:
            return cls(metric)
        evaluated, without = count(saved, "evaluated"), count(saved, "without_gain")
        value = saved.get("value")
        if value is None:
            return cls(metric, evaluated=evaluated, without_gain=without)
        if type(value) not in (int, float):
            raise UserError(f"{STATE}.value in state.json is {value!r:.60}, want a number; it is damaged")
        own = {name: tensor for name, tensor in tensors.items() if name.startswith(TENSORS)}
        weights = taken(own, TENSORS, parameters)
        return cls(metric, float(value), count(saved, "iteration"), evaluated, without, weights)


def ended_early(state: Mapping[str, Any], evaluation: EvaluationSection) -> str:
    """Why a run with this `Best.state()` is at its end; "" where it is not."""
    saved = state if isinstance(state, Mapping) else {}
    limit, without = evaluation.stop_after, saved.get("without_gain", 0)
    if not (limit and saved.get("metric") == evaluation.keep_best and isinstance(without, int) and without >= limit):
        return ""
    plural = "s" if without > 1 else ""
    over = f" over {saved['value']:.4f} at iteration {saved['iteration']}" if saved.get("value") is not None else ""
    return (
        f"{without} evaluation{plural} without gain of {evaluation.keep_best}{over} (evaluation.stop_after = {limit})"
    )
