"""A fixed reward whose workers score while the next images are drawn (docs/rewards.md, "A slow judge")."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from advgrpo.rewards.base import Reward
from advgrpo.rewards.checks import check_batch
from advgrpo.rewards.pool.queueing import Workers
from advgrpo.rewards.pool.recipe import Recipe, Task
from advgrpo.rewards.pool.workers import starter
from advgrpo.runtime import rng
from advgrpo.runtime.transfer import to_host

if TYPE_CHECKING:
    from advgrpo.config import PoolSection
    from advgrpo.data.references import ReferenceSet

_TELL_EVERY = 1.0  # seconds between two signs of life while the trainer waits
_START_SECONDS = 900.0  # for a worker to start and to load its model


@dataclass(frozen=True)
class Begun:
    """Images that are being scored: part by part, in their order."""

    parts: list[Future]


class PooledReward(Reward):
    """The `Reward` that a recipe makes, in workers.

    A score is a function of an image, its prompt and the images beside it in a batch of `pool.batch_size`: it depends
    neither on how many workers there are nor on which of them made it. It has no references.

    Args:
        recipe: of the reward.
        pool: its settings.
        tell: as `Distributed.step`; called while workers start and whenever the trainer waits for them.

    Raises:
        UserError, RunFailure: a worker does not start, or its reward cannot be built.
    """

    def __init__(self, recipe: Recipe, pool: PoolSection, tell: Callable[..., None]) -> None:
        self.name, self.pool, self.progress = recipe.name, pool, tell
        self._workers = Workers(
            starter(pool.kind, pool.gpus),
            recipe,
            count=pool.workers,
            room=pool.workers * pool.queue,
            within_seconds=pool.timeout,
            starting_seconds=_START_SECONDS,
        )
        self._batches = (-1, 0)  # seed of torch's generator, batches since it was seeded
        weakref.finalize(self, self._workers.end)
        said = [self._awaited(each, _START_SECONDS) for each in self._workers.started]  # by each of them
        self.scores_references: bool = said[0]

    @property
    def replaced(self) -> int:
        """Workers that had ended and were replaced."""
        return self._workers.replaced

    def check_prompts(self, prompts: list[str]) -> None:
        """The reward's own check, in a worker."""
        self._awaited(self._workers.ask("check_prompts", lambda: prompts, prompts, self._patience), self.pool.timeout)

    def begin(self, images: torch.Tensor, prompts: list[str]) -> Begun:
        """Hand images to the workers and return; where `pool.queue` batches wait for each of them, wait for room.

        Args:
            images: [B, 3, H, W] float32 in [0, 1], on any device: a GPU is not waited for.
            prompts: B.
        """
        check_batch(images, prompts)
        parts, size = [], self.pool.batch_size
        starts = range(0, len(prompts), size)
        for start, seed in zip(starts, [self._next_seed() for _ in starts], strict=True):
            part = slice(start, start + size)
            task = _task(to_host(images[part].detach().float()), prompts[part], seed)
            parts.append(self._workers.ask("score", task, prompts[part], self._patience))
        return Begun(parts)

    def _next_seed(self) -> int:
        """Of the batch: which one it is since torch's generator was seeded, as every iteration does (trainer.py);
        nothing is drawn from that one, which other rewards may use."""
        seeded = torch.initial_seed()
        self._batches = (seeded, self._batches[1] + 1 if seeded == self._batches[0] else 0)
        return rng.derive_seed(seeded, f"pool:{self.name}", self._batches[1])

    def finish(self, begun: Sequence[Begun], device: torch.device) -> torch.Tensor:
        """[B] float32 on `device`, of all of `begun`; errors as `score`."""
        scores = [self._awaited(part, self.pool.timeout) for each in begun for part in each.parts]
        return torch.tensor([score for part in scores for score in part], dtype=torch.float32, device=device)

    def score(self, images: torch.Tensor, prompts: list[str], references: ReferenceSet | None = None) -> torch.Tensor:
        """[B] float32 on the images' device.

        Raises:
            RunFailure: workers have ended over a batch again and again, or took longer than `pool.timeout`.
            UserError, FloatingPointError, ValueError: the reward's own.
        """
        return self.finish([self.begin(images, prompts)], images.device)

    def _patience(self) -> None:
        self.progress(f"reward {self.name}: waits for a free worker", within_seconds=2 * self.pool.timeout)

    def _awaited(self, answer: Future, within_seconds: float) -> Any:
        while not wait([answer], timeout=_TELL_EVERY).done:
            self.progress(f"reward {self.name}: waits for its workers", within_seconds=2 * within_seconds)
        return answer.result()


def _task(arrived: Callable[[], torch.Tensor], prompts: list[str], seed: int) -> Callable[[], Task]:
    return lambda: Task(arrived().numpy(), prompts, seed)
