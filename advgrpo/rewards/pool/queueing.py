"""Batches that wait for workers. Each worker has a thread, which takes the next batch, and a new worker where its own
has ended: that batch is scored again, and after `ATTEMPTS` workers have ended over it, it is an error.

The threads know nothing of whoever uses the pool: where he is forgotten, the workers end.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from advgrpo.errors import RunFailure
from advgrpo.rewards.pool.recipe import Recipe
from advgrpo.rewards.pool.workers import Worker, WorkerDied

ATTEMPTS = 3  # workers that may end over one batch; what ends every worker is in the batch or in the reward
_POLL_SECONDS = 0.2
_log = logging.getLogger(__name__)


@dataclass
class _Waiting:
    """A question for whichever worker is free."""

    method: str
    argument: Callable[[], Any]  # made when it is asked: images are waited for then
    prompts: list[str]
    answer: Future = field(default_factory=Future)


class Workers:
    """Several workers with one reward each.

    Args:
        start: starts a worker.
        recipe: of the reward.
        count: how many.
        room: how many questions may wait for a worker; `ask` waits for room.
        within_seconds: how long an answer may take; whoever takes longer is ended and replaced.
        starting_seconds: how long a worker may take to start and to build its reward.
    """

    def __init__(
        self,
        start: Callable[[], Worker],
        recipe: Recipe,
        *,
        count: int,
        room: int,
        within_seconds: float,
        starting_seconds: float,
    ) -> None:
        self.recipe, self.within_seconds, self.starting_seconds = recipe, within_seconds, starting_seconds
        self.replaced = 0  # workers, over the pool's life
        self._start = start
        self._waiting: queue.Queue[_Waiting] = queue.Queue(room)
        self._ended = threading.Event()
        self.started: list[Future] = [Future() for _ in range(count)]  # each: what its `Host` says of the reward
        self.workers: list[Worker | None] = [None] * count
        for number in range(count):
            name = f"advgrpo-pool-{recipe.name}-{number}"
            threading.Thread(target=self._serve, args=[number], name=name, daemon=True).start()

    def ask(self, method: str, argument: Callable[[], Any], prompts: list[str], patience: Callable[[], None]) -> Future:
        """The answer to come of `Host`'s `method`.

        Args:
            argument: makes the method's, in the worker's thread.
            prompts: what it is about, for errors; at least one.
            patience: called about once a second while there is no room; what it raises ends the wait.
        """
        waiting = _Waiting(method, argument, prompts)
        while True:
            try:
                self._waiting.put(waiting, timeout=1.0)
            except queue.Full:
                patience()
            else:
                return waiting.answer

    def end(self) -> None:
        """End all workers; what waits, or is being scored, is never answered. Takes no lock: it may be called anywhere,
        by the garbage collector as well."""
        self._ended.set()
        for worker in self.workers:
            if worker is not None:
                worker.end()

    def _serve(self, number: int) -> None:
        try:
            self.workers[number], said = self._built()
            self.started[number].set_result(said)
            while (waiting := self._next()) is not None:
                self._answer(number, waiting)
        except Exception as error:  # of the first one to be built: whoever asked for the pool is told
            self.started[number].set_exception(error)
        finally:
            if (worker := self.workers[number]) is not None:
                worker.end()

    def _built(self) -> tuple[Worker, Any]:
        """A new worker and what it says of its reward; errors as the reward raises them."""
        worker = self._start()
        try:
            return worker, worker.ask("build", self.recipe, within_seconds=self.starting_seconds)
        except BaseException as error:
            worker.end()
            if isinstance(error, WorkerDied):
                raise RunFailure(f"reward {self.recipe.name}: its worker {error} while it started") from None
            raise

    def _next(self) -> _Waiting | None:
        """What waits longest; None once the pool has ended."""
        while not self._ended.is_set():
            with suppress(queue.Empty):
                return self._waiting.get(timeout=_POLL_SECONDS)
        return None

    def _answer(self, number: int, waiting: _Waiting) -> None:
        """Have it answered by worker `number`, or by those that take its place."""
        try:
            waiting.answer.set_result(self._asked(number, waiting))
        except Exception as error:
            waiting.answer.set_exception(error)

    def _asked(self, number: int, waiting: _Waiting) -> Any:
        argument, last = waiting.argument(), None
        for _ in range(ATTEMPTS):
            if self._ended.is_set():
                raise RunFailure(f"reward {self.recipe.name}: its workers have been ended")
            worker = self.workers[number]
            if worker is None:
                worker = self.workers[number] = self._built()[0]
            try:
                return worker.ask(waiting.method, argument, within_seconds=self.within_seconds)
            except WorkerDied as death:
                self.workers[number], last = None, death
                if self._ended.is_set():
                    continue
                self.replaced += 1
                _log.warning("reward %s: its worker %s; another takes its place", self.recipe.name, death)
        raise RunFailure(
            f"reward {self.recipe.name}: {ATTEMPTS} workers have ended over one batch, of the last its worker {last}; "
            f"its first prompt is {waiting.prompts[0]!r}"
        )
