"""What a program of yours is told while a run runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from advgrpo.types import Flag

Stage = Literal["base", "start", "during", "final"]


class Callback:
    """Override what you need; `advgrpo.train(config, callbacks=[...])`.

    Everything is called on process 0, in the thread that trains, once the thing is done and on the disk. An exception
    ends the run as an error of the run's own would: what has been trained is saved first.
    """

    def on_iteration(self, metrics: Mapping[str, float | str | None], flags: Sequence[Flag]) -> str | None:
        """After an iteration is logged.

        Args:
            metrics: the line of metrics.jsonl, "iteration" (from 0) and an evaluation's among them.
            flags: the monitor's red flags that are up.

        Returns:
            Why the run shall end here, with a checkpoint and the files of its end so far; None or "" goes on.
        """

    def on_evaluation(self, stage: Stage, scores: Mapping[str, float], iteration: int) -> None:
        """After held-out images are scored.

        Args:
            stage: of the base model, of the LoRA that the run starts from, while it trains, or at its end.
            scores: "eval_<metric>" the mean, "eval_<metric>_ci95" half its 95 % interval over prompts.
            iteration: how many are done.
        """

    def on_checkpoint(self, folder: Path, iteration: int) -> None:
        """After a checkpoint is written; `iteration` iterations are in it."""


class Callbacks(Callback):
    """Several as one, in their order; the first reason to end counts, after all have been told."""

    def __init__(self, callbacks: Iterable[Callback] = ()):
        self.callbacks = tuple(callbacks)

    def on_iteration(self, metrics: Mapping[str, float | str | None], flags: Sequence[Flag]) -> str | None:
        reasons = [each.on_iteration(metrics, flags) for each in self.callbacks]
        return next((reason for reason in reasons if reason), None)

    def on_evaluation(self, stage: Stage, scores: Mapping[str, float], iteration: int) -> None:
        for each in self.callbacks:
            each.on_evaluation(stage, scores, iteration)

    def on_checkpoint(self, folder: Path, iteration: int) -> None:
        for each in self.callbacks:
            each.on_checkpoint(folder, iteration)
