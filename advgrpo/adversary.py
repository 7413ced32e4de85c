"""Training the discriminator: when it is due, on which pictures, and what it remembers.

Every draw is keyed by (seed, purpose, iteration, update) over global picture numbers, and gradients are summed over
processes, so the head's losses do not depend on how many processes share the work.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from . import rng
from .config import AdversarySection
from .rewards.base import Adversary
from .types import Features

_SIDES = ("reference", "generated")  # fields of HeadBatch


@dataclass
class Due:
    """What this iteration trains."""

    head_updates: int
    generator: bool


def due(config: AdversarySection, iteration: int, generated: float, reference: float, optimizer_steps: int) -> Due:
    """The schedule (METHOD section 6): `generated` and `reference` are mean rewards before any head update."""
    updates = config.updates_per_iteration
    if iteration < config.warmup_iterations:
        return Due(config.warmup_updates, False)
    if config.schedule == "never":
        return Due(0, True)
    if config.schedule == "always":
        return Due(updates, True)
    if config.schedule == "when_fooled":
        return Due(updates if generated > reference - config.fooled_margin else 0, True)
    if config.schedule == "ratio":
        per_iteration = config.ratio * optimizer_steps
        return Due(math.floor((iteration + 1) * per_iteration) - math.floor(iteration * per_iteration), True)
    if config.schedule == "alternate":
        trains_generator = iteration % config.alternate_period == config.alternate_period - 1
        return Due(0 if trains_generator else updates, trains_generator)
    raise ValueError(f"adversary.schedule: unknown {config.schedule!r}")


class ReplayBuffer:
    """A ring of older generations' features, the same on every process.

    An iteration adds at most an eighth of the capacity, so the buffer always spans several iterations.
    """

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.size = 0  # filled slots
        self.cursor = 0  # next slot to write
        self.tensors: dict[str, torch.Tensor] = {}  # each [capacity, ...], as the features' names; empty until filled

    def __len__(self) -> int:
        return self.size

    @property
    def per_iteration(self) -> int:
        return math.ceil(self.capacity / 8)

    def add(self, features: Features) -> None:
        if self.capacity == 0:
            return
        if not self.tensors:
            self.tensors = {
                name: tensor.new_zeros(self.capacity, *tensor.shape[1:]) for name, tensor in features.tensors.items()
            }
        slots = (self.cursor + torch.arange(len(features), device=features.device)) % self.capacity
        for name, tensor in self.tensors.items():
            tensor[slots] = features[name]
        self.cursor = (self.cursor + len(features)) % self.capacity
        self.size = min(self.capacity, self.size + len(features))

    def rows(self, index: torch.Tensor) -> Features:
        return Features(self.tensors).rows(index)

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
        """Tensors and counters for a checkpoint."""
        return dict(self.tensors), {"size": self.size, "cursor": self.cursor}

    def load(self, tensors: dict[str, torch.Tensor], counters: dict[str, int], device: torch.device) -> None:
        self.size, self.cursor = counters["size"], counters["cursor"]
        self.tensors = {name: tensor.to(device) for name, tensor in tensors.items()}


@dataclass
class HeadBatch:
    """This process's pictures of one iteration, as the head's training sees them."""

    image_ids: torch.Tensor  # [B] int64, global
    generated: Features  # of those pictures
    reference: Features  # the reference paired with each of them
    total: int  # pictures of the iteration over all processes


class HeadTrainer:
    """Runs the head updates of an iteration.

    `reduce` sums a list of tensors over processes in place; `rank` and `world_size` split replayed negatives.
    """

    def __init__(
        self, adversary: Adversary, *, reduce: Callable[[list[torch.Tensor]], None], rank: int, world_size: int
    ):
        self.adversary, self.config, self.seed = adversary, adversary.config, adversary.seed
        self.reduce, self.rank, self.world_size = reduce, rank, world_size
        self.replay = ReplayBuffer(self.config.replay_capacity)

    def train(self, batch: HeadBatch, iteration: int, updates: int) -> list[float]:
        """Run head updates; returns the loss before each of them."""
        losses = [self._update(batch, iteration, number) for number in range(updates)]
        return torch.stack(losses).tolist() if losses else []

    @torch.no_grad()
    def evaluate(self, batch: HeadBatch, iteration: int) -> tuple[float, float]:
        """Head loss and accuracy on this iteration's pictures, before any update of the iteration."""
        every = torch.arange(len(batch.image_ids))
        reference, generated = (self._choose(batch, side, every, "evaluate", iteration, 0) for side in _SIDES)
        result = self.adversary.loss(reference, generated, total=batch.total)
        values = torch.stack([result.loss, result.accuracy])
        self.reduce([values])
        loss, accuracy = values.tolist()
        return loss, accuracy

    def remember(self, generated: Features, iteration: int, gather: Callable[[torch.Tensor], torch.Tensor],
                 image_ids: torch.Tensor, total: int) -> None:  # fmt: skip
        """Add some of this iteration's generations to the replay buffer, the same ones on every process.

        `gather` concatenates tensors over processes; `image_ids` are this process's.
        """
        if self.config.replay_capacity == 0:
            return
        draw = torch.randperm(total, generator=rng.generator(self.seed, "replay_add", iteration))
        picked = draw[: min(total, self.replay.per_iteration)]
        local = torch.isin(image_ids.cpu(), picked).nonzero().flatten().to(generated.device)
        seed = rng.derive_seed(self.seed, "replay_patches", iteration)
        part = self.adversary.trained_part(generated.rows(local), image_ids[local], seed)
        order = gather(image_ids[local]).argsort()
        self.replay.add(Features({name: gather(tensor)[order] for name, tensor in part.tensors.items()}))

    def _update(self, batch: HeadBatch, iteration: int, number: int) -> torch.Tensor:
        generator = rng.generator(self.seed, "head_batch", iteration, number)
        count = min(self.config.batch_size, batch.total)
        replayed = min(int(self.config.replay_share * count), count - 1) if len(self.replay) else 0
        order = torch.randperm(batch.total, generator=generator)[:count]
        slots = torch.randint(max(len(self.replay), 1), (replayed,), generator=generator)

        ids = batch.image_ids.cpu()
        drawn, fresh = (torch.isin(ids, picked).nonzero().flatten() for picked in (order, order[replayed:]))
        reference = self._choose(batch, "reference", drawn, "head", iteration, number)
        generated = self._choose(batch, "generated", fresh, "head", iteration, number)
        if replayed:
            mine = slots[self.rank :: self.world_size].to(generated.device)
            generated = Features.cat([generated, self.replay.rows(mine)])

        self.adversary.optimizer.zero_grad(set_to_none=False)
        loss = self.adversary.loss(reference, generated, total=count).loss
        loss.backward()
        gradients = [p.grad for p in self.adversary.parameters()]
        loss = loss.detach().clone().reshape(1)
        self.reduce([*gradients, loss])
        self.adversary.step()
        return loss[0]

    def _choose(self, batch: HeadBatch, side: str, rows: torch.Tensor, purpose: str, *indices: int) -> Features:
        """What the head trains on of one side's local rows; draws are keyed by global picture number."""
        rows = rows.to(batch.generated.device)
        seed = rng.derive_seed(self.seed, f"{purpose}_{side}_patches", *indices)
        return self.adversary.trained_part(getattr(batch, side).rows(rows), batch.image_ids[rows], seed)
