"""Cheaper rollouts, and whether they may stand for dearer ones (docs/method.md section 10).

`ShortTail` measures whether images by fewer steps after the window are ranked as by all of them; `Scouts` draws many
images by the cheapest path and says which of them to draw exactly. Both leave likelihoods alone: those are taken on the
window's steps, which no cheaper path computes for the update.

Shapes: G images of the iteration, N of a group, K scouts for each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from advgrpo.config import RolloutSection
from advgrpo.errors import RunFailure
from advgrpo.intervals import t_interval
from advgrpo.sampling.dynamics import StepTable, step_table
from advgrpo.sampling.sampler import Sampler
from advgrpo.training.micro_batches import MicroBatches
from advgrpo.training.scoring import Scorer
from advgrpo.types import MicroBatch, MicroBatchRollout

# (sampler, table, micro-batches, iteration, what for) -> the images: RewardedObjective.draw
Draw = Callable[[Sampler, StepTable, list[MicroBatch], int, str], Iterable[MicroBatchRollout]]


class DisagreeingTail(RunFailure):
    """Rewards rank images by a shortened tail otherwise than by all steps."""


def kendall_tau_b(one: torch.Tensor, other: torch.Tensor, group_size: int) -> torch.Tensor:
    """Kendall's tau-b of two columns [G] in each group: [G / group_size] float64 in [-1, 1].

    The sum of products of signs over a group's pairs, over the root of the numbers of pairs that are not tied in the
    one column and in the other (Kendall 1945); NaN where a column has no spread.
    """
    signs = []
    for column in (one, other):
        rows = column.view(-1, group_size)
        signs.append((rows[:, :, None] - rows[:, None, :]).sign().double())
    untied = signs[0].abs().sum((1, 2)) * signs[1].abs().sum((1, 2))
    return (signs[0] * signs[1]).sum((1, 2)) / untied.sqrt()


def rank_agreement(one: torch.Tensor, other: torch.Tensor, group_size: int) -> torch.Tensor:
    """The mean of `kendall_tau_b` over groups with spread in both columns, a scalar; NaN where there are none."""
    return kendall_tau_b(one, other, group_size).nanmean()


def best_and_worst(rewards: torch.Tensor, scouts_of_group: int, kept: int) -> torch.Tensor:
    """[groups * kept] int64: the numbers, ascending, of a group's kept/2 best (one more where odd) and kept/2 worst.

    Args:
        rewards: [groups * scouts_of_group] by number; of equals the one with the lower number counts as the worse.
    """
    order = rewards.view(-1, scouts_of_group).argsort(dim=1, stable=True)
    worst = kept // 2
    chosen = torch.cat([order[:, :worst], order[:, scouts_of_group - (kept - worst) :]], dim=1).sort(dim=1).values
    first = torch.arange(len(order), device=order.device)[:, None] * scouts_of_group
    return (first + chosen).flatten()


def number(value: torch.Tensor) -> float | None:
    """A scalar, read from its device; None for NaN."""
    found = value.item()
    return None if math.isnan(found) else found


@dataclass
class ShortTail:
    """Measures what `rollout.tail_steps` does to ranks, in iterations that depend on nothing but their number.

    Args:
        settings: of the rollout.
        first: the first iteration whose generator learns: the head is no longer random by then.
    """

    settings: RolloutSection
    scorer: Scorer
    first: int

    def due(self, iteration: int) -> bool:
        """Whether this iteration measures."""
        since, every = iteration - self.first, self.settings.tail_check_every
        return self.settings.tail_steps > 0 and since >= 0 and (since % every == 0 if every else since == 0)

    def agreement(
        self, draw: Draw, sampler: Sampler, table: StepTable, micro_batches: list[MicroBatch], rewards: torch.Tensor,
        iteration: int,
    ) -> float | None:  # fmt: skip
        """Of `rewards` [G] with those of the same images by all steps; None where no group has any spread.

        Raises:
            DisagreeingTail: before the generator has learned anything, and not for want of groups: the 95 % interval
                over groups lies below `rollout.tail_agreement`.
        """
        whole = step_table(sampler.policy, self.settings.num_steps, table.window, rollout=self.settings, tail_steps=0)
        drawn = draw(sampler, whole.to_look_at(), micro_batches, iteration, "sample by all steps")
        group, least = self.settings.group_size, self.settings.tail_agreement
        taus = kendall_tau_b(rewards, self.scorer.totals(drawn, iteration, group), group).cpu()
        taus = taus[~taus.isnan()]
        if len(taus) == 0:
            return None
        tau = taus.mean().item()
        high = t_interval(taus).high if len(taus) > 1 else tau
        if iteration == self.first and high < least:
            raise DisagreeingTail(
                f"iteration {iteration}: rewards rank images by rollout.tail_steps = {self.settings.tail_steps} "
                f"otherwise than by all steps: Kendall's tau within groups is {tau:.2f}, at most {high:.2f}, below "
                f"rollout.tail_agreement = {least:g}. The generator has not learned anything yet; raise "
                "rollout.tail_steps, or set it to 0"
            )
        return tau


@dataclass
class Scouts:
    """Draws `rollout.scouts` images for each one kept, by the cheapest path, and keeps the best and the worst.

    The path is that of merged weights where the policy has any (in FP8 with `rollout.precision`), in the window as
    well, and `rollout.scout_tail_steps` after it. Noise is keyed by the number of the draw, so a scout that is kept can
    be drawn again, exactly: `MicroBatch.chosen`.

    Attributes:
        rewards: [G] float32 of the newest iteration's kept scouts, by the number of the image that each became.
        mean: of all its scouts, a scalar.
    """

    settings: RolloutSection
    scorer: Scorer
    sampler: Sampler
    micro_batches: MicroBatches

    def __post_init__(self) -> None:
        self.rewards = self.mean = torch.zeros(0)

    def choose(self, draw: Draw, table: StepTable, iteration: int) -> torch.Tensor:
        """[G] int64 on the host, by image number: which draw each image is."""
        group = self.settings.group_size * self.settings.scouts
        cheap = step_table(self.sampler.policy, self.settings.num_steps, table.window, rollout=self.settings.of_scouts)
        micro_batches = self.micro_batches.of(iteration)
        self.scorer.prefetch([prompt for each in micro_batches if each.judged for prompt in each.prompts])
        drawn = draw(self.sampler, cheap.to_look_at(), micro_batches, iteration, "scout")
        rewards = self.scorer.totals(drawn, iteration, group)
        chosen = best_and_worst(rewards, group, self.settings.group_size)
        self.rewards, self.mean = rewards[chosen], rewards.mean()
        return chosen.cpu()
