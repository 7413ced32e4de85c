"""Training the discriminator: when it is due, on which images, and what it remembers.

Every draw is keyed by (seed, purpose, iteration, update) over global image numbers, and gradients are summed over
processes, so the head's losses do not depend on how many processes share the work.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch

from advgrpo.adversary.base import WEIGHT, Adversary, Restarts, features_of_black
from advgrpo.config import AdversarySection
from advgrpo.errors import UserError
from advgrpo.runtime import rng
from advgrpo.runtime.checkpoint import pack_optimizer
from advgrpo.runtime.graphs import CapturedFunction, GraphBackend, StaticBuffers
from advgrpo.runtime.shares import usual_rows
from advgrpo.runtime.transfer import to_device
from advgrpo.types import Features

_SIDES = ("reference", "generated")  # fields of DiscriminatorBatch


@dataclass
class UpdatePlan:
    """What this iteration trains."""

    discriminator_updates: int
    generator: bool


def plan_updates(
    config: AdversarySection, iteration: int, generated: float, reference: float, optimizer_steps: int
) -> UpdatePlan:
    """The schedule (docs/method.md section 6): `generated` and `reference` are mean rewards before any discriminator
    update."""
    updates = config.updates_per_iteration
    if iteration < config.warmup_iterations:
        return UpdatePlan(config.warmup_updates, False)
    if config.schedule == "never":
        return UpdatePlan(0, True)
    if config.schedule == "always":
        return UpdatePlan(updates, True)
    fooled = generated > reference - config.fooled_margin
    if config.schedule == "when_fooled":
        return UpdatePlan(updates if fooled else 0, True)
    if config.schedule == "fooled_or_generator":
        return UpdatePlan(updates, False) if fooled else UpdatePlan(0, True)
    if config.schedule == "ratio":
        per_iteration = config.ratio * optimizer_steps
        return UpdatePlan(math.floor((iteration + 1) * per_iteration) - math.floor(iteration * per_iteration), True)
    if config.schedule == "alternate":
        trains_generator = iteration % config.alternate_period == config.alternate_period - 1
        return UpdatePlan(0 if trains_generator else updates, trains_generator)
    raise ValueError(f"adversary.schedule: unknown {config.schedule!r}")


def restart_due(config: AdversarySection, iteration: int) -> int:
    """Number of the restart, from 1, that an iteration brings the head; 0: none. They are counted from the end of the
    warm-up."""
    since = iteration - config.warmup_iterations
    return since // config.reset_every if config.reset_every and since > 0 and since % config.reset_every == 0 else 0


def paired_accuracy(generated: torch.Tensor, reference: torch.Tensor, group_size: int) -> torch.Tensor:
    """Share of (reference, generation) pairs of one prompt in which the reference scores higher; ties count half.

    This is what the generator feels: advantages compare within a prompt, so neither the scores' level nor the levels of
    different prompts matter, which a threshold on pooled scores mistakes for ability or hides it behind.

    Args:
        generated, reference: [G] rewards by image number, groups next to each other, of each image and of the
            reference drawn for it.

    Returns:
        Scalar float32 over all group_size² pairs of every group: the mean of the groups' areas under the ROC curve.
    """
    of_generated, of_reference = (scores.float().view(-1, group_size) for scores in (generated, reference))
    lead = of_reference[:, :, None] - of_generated[:, None, :]
    return ((lead > 0).float() + 0.5 * (lead == 0).float()).mean()


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
class DiscriminatorBatch:
    """This process's images of one iteration, as the head's training sees them; it may have none."""

    image_ids: torch.Tensor  # [B] int64, global, on the host
    generated: Features  # of those images
    reference: Features  # the reference paired with each of them
    total: int  # images of the iteration over all processes


@dataclass
class _Draw:
    """Which rows one discriminator update looks at; int64 on the host."""

    references: torch.Tensor  # local rows
    generations: torch.Tensor  # local rows
    slots: torch.Tensor  # of the replay buffer
    seeds: torch.Tensor  # [2] of the patches drawn from references and generations
    counted: torch.Tensor  # what each row of the three counts: 1, or 0 where it only fills up; empty where all do count

    @property
    def counts(self) -> tuple[int, int, int]:
        return len(self.references), len(self.generations), len(self.slots)

    def flat(self) -> torch.Tensor:
        return torch.cat([self.references, self.generations, self.slots, self.seeds, self.counted])

    def filled_up(self, images: int, total: int, count: int, replayed: int, processes: int) -> _Draw:
        """The same with rows of weight 0, so that its sizes are those of every update on this process.

        Args:
            images: of this process, of `total` over all.
            count, replayed: images per side, and how many of the generations are from the replay buffer, over all
                processes.
            processes: how many share the replayed ones.
        """
        share = images / total
        sizes = [
            _room(len(self.references), min(count, images), count * share),
            _room(len(self.generations), min(count - replayed, images), (count - replayed) * share),
            -(-replayed // processes),
        ]
        rows = self.references, self.generations, self.slots
        counted = [torch.arange(size) < len(own) for own, size in zip(rows, sizes)]
        filled = [torch.cat([own, own.new_zeros(size - len(own))]) for own, size in zip(rows, sizes)]
        return _Draw(*filled, self.seeds, torch.cat(counted).long())


def _room(drawn: int, most: int, mean: float) -> int:
    """`usual_rows`, or where a draw exceeds them as many as it can have."""
    usual = usual_rows(most, mean)
    return usual if drawn <= usual else most


class DiscriminatorTrainer:
    """Runs the discriminator updates of an iteration.

    An update first gathers the drawn rows and patches, then learns from them. With `graphs` the second part is one
    replay of a captured graph, whose inputs are those few rows; the iteration's features are never copied. On several
    processes it is two, since the sum over processes between backward and step watches for failed ones on the host.
    How many of the drawn images a process holds differs from update to update: it fills up with rows of weight 0, so
    that every update has the shapes, kernels and graphs of the first.

    Args:
        adversary: what learns.
        reduce: sums a list of tensors over processes in place.
        rank, world_size: split replayed negatives.
        graphs: captures the update; None runs it eagerly.
    """

    def __init__(
        self,
        adversary: Adversary,
        *,
        reduce: Callable[[list[torch.Tensor]], None],
        rank: int,
        world_size: int,
        graphs: GraphBackend | None = None,
    ):
        self.adversary, self.config, self.seed = adversary, adversary.config, adversary.seed
        self.reduce, self.rank, self.world_size = reduce, rank, world_size
        self.replay = ReplayBuffer(self.config.replay_capacity)
        alone = graphs if world_size == 1 else None
        self.captured_update = CapturedFunction(self._update, name="discriminator update", backend=alone)
        halves = {"discriminator gradients": self._gradients, "discriminator step": self._step}
        self._halves = [CapturedFunction(function, name=name, backend=graphs) for name, function in halves.items()]
        self._inputs = {side: StaticBuffers(adversary.device, static=graphs is not None) for side in _SIDES}
        self._loss = torch.zeros(1, device=adversary.device)  # before the current update, over all processes at last
        self._total = 0  # images per side of the current update, over all processes

    def learn(
        self,
        batch: DiscriminatorBatch,
        rewards: tuple[torch.Tensor, torch.Tensor],
        paired: torch.Tensor,
        iteration: int,
        *,
        optimizer_steps: int,
        agree: Callable[[list[float]], list[float]],
        gather: Callable[[torch.Tensor], torch.Tensor],
    ) -> tuple[UpdatePlan, dict[str, float]]:
        """One iteration: discriminator updates when the schedule says so or the head begins anew; generations are
        remembered either way.

        Args:
            rewards: [G] float32 of the generations, and of the reference drawn for each, under the head as it stands.
            paired: scalar float32, `paired_accuracy` of them.
            optimizer_steps: those of the generator in an iteration, for schedule "ratio".
            agree: the first process's numbers: one decides how many updates all of them run.
            gather: concatenates tensors over processes.

        Returns:
            What was due, and the metrics.

        Raises:
            FloatingPointError: see `check`.
        """
        *means, share = agree(torch.stack([*(each.mean() for each in rewards), paired]).tolist())
        self.adversary.centre(*means)
        loss, accuracy = self.evaluate(batch, iteration)
        plan = plan_updates(self.config, iteration, *means, optimizer_steps)
        number = restart_due(self.config, iteration)
        if number:
            self._restart(number)
            plan = UpdatePlan(self.config.warmup_updates, plan.generator)
        losses = self.train(batch, iteration, plan.discriminator_updates)
        if plan.discriminator_updates:
            self.check(losses, iteration)
        self.add_to_replay(batch, iteration, gather)
        return plan, {
            "discriminator_loss": loss,
            "discriminator_accuracy": share if accuracy is None else accuracy,
            "discriminator_paired_accuracy": share,
            "discriminator_updates": plan.discriminator_updates,
        }

    def _restart(self, number: int) -> None:
        if not isinstance(self.adversary, Restarts):
            raise UserError(
                f"adversary.reset_every = {self.config.reset_every}: a {type(self.adversary).__name__} cannot begin "
                "anew; set it to 0"
            )
        self.adversary.restart(number)

    def train(self, batch: DiscriminatorBatch, iteration: int, updates: int) -> torch.Tensor:
        """Run discriminator updates; returns the loss before each of them, [updates] float32 on the adversary's device.

        NaN stands for an update whose loss or gradient is not finite, which learned nothing; see `check`.
        """
        if updates == 0:
            return torch.zeros(0, device=self.adversary.device)
        draws = [self._draw(batch, iteration, number) for number in range(updates)]
        self._total = min(self.config.batch_size, batch.total)
        ids = to_device(batch.image_ids, self.adversary.device)
        flat = [draw.flat() for draw in draws]
        moved = to_device(torch.cat(flat), self.adversary.device).split([len(f) for f in flat])  # one transfer
        losses = []
        for draw, values in zip(draws, moved):
            for side, features in self._drawn(batch, ids, draw.counts, values).items():
                for name, tensor in features.tensors.items():
                    self._inputs[side].fill(name, tensor)
            key = (tuple(buffers.key() for buffers in self._inputs.values()), self._total)
            losses.append(self._run(key).clone())
        return torch.cat(losses)

    @property
    def captures(self) -> int:
        """CUDA graphs held."""
        return sum(part.captures for part in (self.captured_update, *self._halves))

    def _run(self, key: Hashable) -> torch.Tensor:
        """An update on the rows in the buffers; the loss before it, [1], which the next one overwrites."""
        if self.world_size == 1:
            self.captured_update(key)
        else:
            gradients, step = self._halves
            gradients(key)
            self._reduce()
            step()
        return self._loss

    def check(self, losses: torch.Tensor, iteration: int) -> None:
        """FloatingPointError for losses of `train` that are not all finite; reads them on the host."""
        wrong = [number for number, loss in enumerate(losses.tolist(), 1) if not math.isfinite(loss)]
        if wrong:
            raise FloatingPointError(
                f"iteration {iteration}: the adversary's loss or gradient is not finite at discriminator update "
                f"{wrong[0]} of {len(losses)}, which was left out. Start again with a lower adversary.learning_rate "
                f"(now {self.config.learning_rate:g})"
            )

    @torch.no_grad()
    def evaluate(self, batch: DiscriminatorBatch, iteration: int) -> tuple[float, float | None]:
        """Head loss and accuracy on this iteration's images, before any update of the iteration.

        The accuracy is by the head's own threshold; None where it has none (see `DiscriminatorLoss`).
        """
        ids = to_device(batch.image_ids, self.adversary.device)
        reference, generated = (
            self.adversary.training_features(
                getattr(batch, side), ids, self._patch_seed("evaluate", side, iteration, 0)
            )
            for side in _SIDES
        )
        result = self.adversary.loss(reference, generated, total=batch.total)
        values = torch.stack([value for value in (result.loss, result.accuracy) if value is not None])
        self.reduce([values])
        loss, *accuracy = values.tolist()
        return loss, accuracy[0] if accuracy else None

    def add_to_replay(
        self, batch: DiscriminatorBatch, iteration: int, gather: Callable[[torch.Tensor], torch.Tensor]
    ) -> None:
        """Add some of this iteration's generations to the replay buffer, the same ones on every process.

        `gather` concatenates tensors over processes.
        """
        if self.config.replay_capacity == 0:
            return
        draw = torch.randperm(batch.total, generator=rng.generator(self.seed, "replay_add", iteration))
        local = _positions(batch.image_ids, draw[: min(batch.total, self.replay.per_iteration)])
        ids = batch.image_ids[local]
        local, ids_there = (to_device(index, self.adversary.device) for index in (local, ids))
        seed = rng.derive_seed(self.seed, "replay_patches", iteration)
        part = self.adversary.training_features(batch.generated.rows(local), ids_there, seed)
        order = to_device(gather(ids).argsort(), self.adversary.device)
        self.replay.add(Features({name: gather(tensor)[order] for name, tensor in part.tensors.items()}))

    @torch.no_grad()
    def row_of_replay(self) -> Features:
        """What the replay buffer holds of one image, [1, ...] each: of a black one, for names, shapes and dtypes."""
        ids = torch.zeros(1, dtype=torch.int64, device=self.adversary.device)
        return self.adversary.training_features(features_of_black(self.adversary), ids, 0)

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Head, optimizer and replay buffer as tensors and JSON for a checkpoint; `restoring.check_head` reads them."""
        optimizer_tensors, optimizer = pack_optimizer(self.adversary.optimizer, "head_optimizer")
        replay_tensors, counters = self.replay.state()
        tensors = {
            **{f"head.{name}": tensor for name, tensor in self.adversary.state_dict().items()},
            **{f"replay.{name}": tensor for name, tensor in replay_tensors.items()},
            **optimizer_tensors,
        }
        return tensors, {"head_optimizer": optimizer, "replay": counters}

    def load(self, tensors: dict[str, torch.Tensor], counters: dict[str, int]) -> None:
        """Continue from the replay buffer's `state`; call it after head and optimizer are loaded."""
        self.replay.load(tensors, counters, self.adversary.device)
        for part in (self.captured_update, *self._halves):
            part.clear()  # the graphs hold the optimizer's storage of before

    def _draw(self, batch: DiscriminatorBatch, iteration: int, number: int) -> _Draw:
        generator = rng.generator(self.seed, "head_batch", iteration, number)
        count = min(self.config.batch_size, batch.total)
        replayed = min(int(self.config.replay_share * count), count - 1) if len(self.replay) else 0
        order = torch.randperm(batch.total, generator=generator)[:count]
        slots = torch.randint(max(len(self.replay), 1), (replayed,), generator=generator)
        draw = _Draw(
            _positions(batch.image_ids, order),
            _positions(batch.image_ids, order[replayed:]),
            slots[self.rank :: self.world_size],
            torch.tensor([self._patch_seed("head", side, iteration, number) for side in _SIDES]),
            torch.zeros(0, dtype=torch.int64),
        )
        if self.world_size == 1:
            return draw
        return draw.filled_up(len(batch.image_ids), batch.total, count, replayed, self.world_size)

    def _patch_seed(self, purpose: str, side: str, *indices: int) -> int:
        return rng.derive_seed(self.seed, f"{purpose}_{side}_patches", *indices)

    @torch.no_grad()
    def _drawn(self, batch: DiscriminatorBatch, ids: torch.Tensor, counts: tuple[int, int, int], draw: torch.Tensor):
        """What one update learns from, by side; `draw` is a `_Draw.flat` on the device, `ids` the batch's images."""
        chosen, counted = draw[: sum(counts) + len(_SIDES)], draw[sum(counts) + len(_SIDES) :]
        *rows, slots, seeds = chosen.split([*counts, len(_SIDES)])
        found = {
            side: self.adversary.training_features(getattr(batch, side).rows(index), ids.index_select(0, index), seed)
            for side, index, seed in zip(_SIDES, rows, seeds.split(1))
        }
        if len(slots):
            found["generated"] = Features.cat([found["generated"], self.replay.rows(slots)])
        if len(counted):
            for side, weight in zip(_SIDES, counted.float().split([counts[0], counts[1] + counts[2]])):
                found[side] = Features({**found[side].tensors, WEIGHT: weight})
        return found

    def _update(self) -> None:
        """One update on the rows in the buffers; leaves the loss before it. Obeys the rules of `graphs`."""
        self._gradients()
        self._reduce()
        self._step()

    def _gradients(self) -> None:
        """Of this process's rows, and its part of the loss."""
        reference, generated = (Features(dict(self._inputs[side].tensors)) for side in _SIDES)
        self.adversary.optimizer.zero_grad(set_to_none=False)
        loss = self.adversary.loss(reference, generated, total=self._total).loss
        loss.backward()
        self._loss.copy_(loss.detach().reshape(1))

    def _reduce(self) -> None:
        """Gradients and loss summed over processes."""
        self.reduce([*(p.grad for p in self.adversary.parameters()), self._loss])

    def _step(self) -> None:
        """On the summed gradients, if they are finite."""
        _leave_out_if_not_finite([p.grad for p in self.adversary.parameters()], self._loss)
        self.adversary.step()


@torch.no_grad()
def _leave_out_if_not_finite(gradients: list[torch.Tensor], loss: torch.Tensor) -> None:
    """Where the loss [1] or a gradient is not finite: zero gradients, so that weights and moments stay finite, and a
    loss of NaN, which tells. Decided on the device, for captured graphs."""
    largest = torch.stack([*torch._foreach_norm(gradients, math.inf), loss.abs().squeeze()]).max()  # NaN if any is
    wrong = ~largest.isfinite()
    for tensor, value in [*((gradient, 0.0) for gradient in gradients), (loss, math.nan)]:
        tensor.masked_fill_(wrong, value)


def _positions(ids: torch.Tensor, picked: torch.Tensor) -> torch.Tensor:
    """Where the picked ids are in `ids`, in the order of `ids`; both on the host."""
    return torch.isin(ids, picked).nonzero().flatten()
