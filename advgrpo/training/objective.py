"""What an objective offers: how the generator learns in an iteration. The trainer talks to this protocol only.

A new objective is a class like those in policy_gradient.py, nft.py and supervised.py, which is built of `Parts`, a line
in `build.OBJECTIVES`, and what it asks of a run in `config.OBJECTIVES`. One that learns from rewards has rewarded.py's
iteration.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch

from advgrpo.config import Config
from advgrpo.data.references import ReferenceSet
from advgrpo.monitor.image_statistics import ImageStatistics
from advgrpo.monitor.monitor import Monitor
from advgrpo.policy.base import Policy
from advgrpo.runtime.distributed import Distributed
from advgrpo.runtime.graphs import GraphBackend
from advgrpo.runtime.phases import Phases
from advgrpo.training.clean_start import CleanStart, State
from advgrpo.training.fast import FastPaths
from advgrpo.training.micro_batches import MicroBatches
from advgrpo.training.restoring import Restorable
from advgrpo.training.scoring import Scorer
from advgrpo.training.update import Updater

T = TypeVar("T")


@dataclass
class Iteration:
    """An iteration under way: its number, and what the run wants to know of it while it lasts."""

    number: int
    phases: Phases
    clean: CleanStart
    distributed: Distributed

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Around work whose time is logged as seconds_`name`."""
        return self.phases.measure(name)

    def changes(self) -> None:
        """From here on what a checkpoint holds changes; call it before anything is trained."""
        self.clean.begin()

    def stoppable(self, items: Sequence[T], what: str) -> Iterator[T]:
        """Pieces of work after `changes`: the run may end between them where the iteration's start is kept."""
        if self.clean.known or not self.distributed.is_main:
            yield from self.distributed.stoppable(items, what)
            return
        for number, item in enumerate(items, 1):
            self.distributed.progress(f"{what} {number} of {len(items)}")
            yield item


@dataclass
class Outcome:
    """What an iteration came to."""

    metrics: dict[str, float | None]  # "grad_norm" among them: the mean norm before clipping; None: nothing was trained
    images: Callable[[], ImageStatistics] | None = None  # measures the images that were drawn, if any were
    statistics: dict[str, torch.Tensor] = field(default_factory=dict)  # scalars on the device, for the monitor alone


@dataclass
class Parts:
    """What every objective can be built of."""

    config: Config
    policy: Policy
    updater: Updater
    micro_batches: MicroBatches
    monitor: Monitor
    references: ReferenceSet | None
    scorer: Callable[[], Scorer]  # builds what judges, for an objective that wants it
    distributed: Distributed
    fast: FastPaths
    graphs: GraphBackend | None


class Objective(Protocol):
    """How the generator learns. It holds the parts that it needs; generator and optimizer are the trainer's."""

    def iterate(self, iteration: Iteration) -> Outcome:
        """Train for one iteration: every process calls it, and the outcome is the same on each.

        Nothing that a checkpoint holds changes before `iteration.changes()`.

        Raises:
            StopRequested: somebody asked for the end.
            FloatingPointError: a reward, loss or gradient is not finite.
        """
        ...

    def state(self) -> State:
        """What it remembers from iteration to iteration beside generator and optimizer, as tensors and JSON."""
        ...

    def checked(self, tensors: dict[str, torch.Tensor], state: Mapping[str, Any]) -> Restorable:
        """What `load` takes over of a checkpoint; UserError for anything that is not its own. Nothing is changed."""
        ...

    def load(self, found: Restorable) -> None:
        """Continue from what `checked` returned as if never stopped."""
        ...
