"""The policy gradient (docs/method.md section 7): a window of stochastic steps, and the clipped update on them.

The iteration around it, readable top to bottom, is rewarded.py's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from advgrpo.config import UpdateSection
from advgrpo.sampling.dynamics import StepTable, step_table, window_steps
from advgrpo.training.cheaper import Scouts, ShortTail, number, rank_agreement
from advgrpo.training.informative import most_informative, without_dead
from advgrpo.training.micro_batches import MicroBatches
from advgrpo.training.objective import Iteration, Parts
from advgrpo.training.rewarded import RewardedObjective, build_sampler
from advgrpo.training.scoring import Scored, Scorer
from advgrpo.types import MicroBatchRollout, Rollout


@dataclass
class PolicyGradient(RewardedObjective):
    """`objective.Objective`: what was drawn is made likelier or rarer.

    Args:
        section: settings of the update.
        short_tail: measures what shortened tails do to ranks.
        scouts: draws many images for the few that are learned from; None: all that are drawn are.
    """

    update_metrics: ClassVar[tuple[str, ...]] = (
        "zero_std_fraction",
        "policy_loss",
        "kl",
        "ratio_mean",
        "clip_fraction",
        "pre_update_clip_fraction",
        "log_prob_mismatch_max",
        "grad_norm",
    )

    section: UpdateSection
    short_tail: ShortTail
    scouts: Scouts | None

    @classmethod
    def own_settings(cls, parts: Parts, scorer: Scorer) -> dict[str, Any]:
        config = parts.config
        first = config.adversary.warmup_iterations if config.learns_adversary else 0
        return {
            "section": config.update,
            "short_tail": ShortTail(config.rollout, scorer, first),
            "scouts": _scouts(parts, scorer) if config.rollout.scouts > 1 else None,
        }

    def table(self, iteration: int) -> StepTable:
        """This iteration's steps, the stochastic ones among them."""
        window = window_steps(self.settings, self.seed, iteration)
        return step_table(self.policy, self.settings.num_steps, window, rollout=self.settings)

    def choose(self, table: StepTable, iteration: Iteration) -> torch.Tensor | None:
        """Which scouts to draw exactly."""
        if self.scouts is None:
            return None
        with iteration.phase("scout"):
            self.policy.merge()
            return self.scouts.choose(self.draw, table, iteration.number)

    def compared(self, rollout: Rollout, scored: Scored, table: StepTable, iteration: int) -> dict[str, float | None]:
        """Rank agreement of scouts with what they became, and of shortened tails with whole ones where it is due."""
        found: dict[str, float | None] = {}
        if self.scouts is not None:
            agreement = rank_agreement(self.scouts.rewards, scored.rewards, self.settings.group_size)
            found |= {"scout_agreement": number(agreement), "scout_reward": number(self.scouts.mean)}
        if self.settings.tail_steps:
            found["tail_agreement"] = None
            if self.short_tail.due(iteration):
                micro_batches = [each.micro_batch for each in rollout.micro_batches]
                inputs = self.draw, self.sampler, table, micro_batches, scored.rewards, iteration
                found["tail_agreement"] = self.short_tail.agreement(*inputs)
        return found

    def update(
        self, rollout: Rollout, scored: Scored, table: StepTable, iteration: Iteration
    ) -> dict[str, float | None]:
        """Advantages, then one optimizer step and one EMA step per minibatch."""
        result = self.advantages(scored)
        leaves_out = self.section.informative_share < 1 or self.section.skip_dead_groups
        values = result.advantages.cpu() if leaves_out else None
        learned = rollout.micro_batches if values is None else self._learned(rollout.micro_batches, values)
        watching = self._watching(rollout.micro_batches, values)
        reports, reweighs = [], self.section.old_log_prob != "rollout"
        if reweighs:
            pieces = iteration.stoppable(learned, "reweigh: micro-batch")
            reweighed = self.updater.reweigh(pieces, table)
        total = self.micro_batches.images_per_minibatch
        for minibatch in range(self.micro_batches.minibatches):
            own = [t for t in learned if t.micro_batch.minibatch == minibatch]
            pieces = iteration.stoppable(own, "update: micro-batch")
            part = self.updater.accumulate(
                pieces,
                result.advantages,
                table,
                total=total,
                watch_kl=minibatch == watching,
                join_kl=self.together and minibatch == 0,  # where no micro-batch is left out, it is watched in this one
            )
            mismatch = part.max_mismatch()
            norm = self.updater.step(mismatch if minibatch == 0 else None)
            reports.append(torch.cat([part.sums(), torch.stack([mismatch, norm]).double()]))
        return {
            "zero_std_fraction": float(result.zero_std_fraction),
            **self._update_metrics(torch.stack(reports), iteration.number),
            **(self._reweighed_metrics(reweighed) if reweighs else {}),
        }

    def _learned(self, micro_batches: list[MicroBatchRollout], advantages: torch.Tensor) -> list[MicroBatchRollout]:
        """What of this process's images the update is computed of; `advantages` are [G], on the host, by number."""
        section = self.section
        if section.informative_share < 1:  # before any are left out: it wants whole groups
            group = self.settings.group_size
            micro_batches = most_informative(micro_batches, advantages, group, round(group * section.informative_share))
        return without_dead(micro_batches, advantages) if section.skip_dead_groups else micro_batches

    def _watching(self, rollouts: list[MicroBatchRollout], advantages: torch.Tensor | None) -> int | None:
        """The minibatch in whose first micro-batch this process measures the KL; None: another process does.

        That is where the first image is that the update is computed of, of all processes, so the metric is the same on
        any number of them.

        Args:
            rollouts: all of this process's.
            advantages: [G] on the host, by image number; None where no image is left out.
        """
        first = 0
        if advantages is not None and self.section.skip_dead_groups:
            alive = advantages.nonzero().flatten().tolist()
            first = alive[0] if alive else 0
        own = (each.micro_batch for each in rollouts)
        return next((each.minibatch for each in own if bool((each.image_ids == first).any())), None)

    def _update_metrics(self, reports: torch.Tensor, iteration: int) -> dict[str, float | None]:
        """Metrics of [minibatches, 9] local reports: the one place where the update waits for the device.

        Means are over the pairs of image and step that were trained on, and None where there were none.

        Raises:
            LogProbMismatchError, FloatingPointError: see `Updater.check`; nothing was stepped.
        """
        everywhere = self.distributed.all_gather(reports[None]).cpu()  # [processes, minibatches, 9]
        sums = self.micro_batches.mesh.one_of_each(everywhere)[..., :7].sum(0)
        mismatch, norms = everywhere[:, 0, 7].max().item(), everywhere[0, :, 8]
        self.updater.check(mismatch, norms.tolist(), iteration)
        loss, ratio, clipped, kl, divergence, pairs, kl_pairs = sums.sum(0).tolist()
        compared = self.updater.config.update.trust_region == "divergence"
        return {
            "log_prob_mismatch_max": mismatch,
            "grad_norm": norms.mean().item(),
            "policy_loss": _mean(loss, pairs),
            "kl": _mean(kl, kl_pairs),
            "ratio_mean": _mean(ratio, pairs),
            "clip_fraction": _mean(clipped, pairs),
            "pre_update_clip_fraction": _mean(sums[0, 2].item(), sums[0, 5].item()),
            **({"policy_divergence": _mean(divergence, pairs)} if compared else {}),
        }

    def _reweighed_metrics(self, sums: torch.Tensor) -> dict[str, float | None]:
        """How far the rollout's policy was from the trainer's (update.old_log_prob)."""
        everywhere = self.micro_batches.mesh.one_of_each(self.distributed.all_gather(sums[None]))
        gap, weight, capped, pairs = everywhere.sum(0).tolist()
        return {
            "log_prob_mismatch_mean": _mean(gap, pairs),
            "importance_weight_mean": _mean(weight, pairs),
            "importance_capped_fraction": _mean(capped, pairs),
        }


def _scouts(parts: Parts, scorer: Scorer) -> Scouts:
    """On micro-batches of their own, by merged weights wherever there are any."""
    config = parts.config
    micro_batches = MicroBatches(
        parts.micro_batches.prompts,
        config.rollout.of_scouts,
        config.update.minibatches,
        seed=config.seed,
        mesh=parts.micro_batches.mesh,
    )
    return Scouts(config.rollout, scorer, build_sampler(parts, window_merged=parts.policy.has_merged), micro_batches)


def _mean(total: float, count: float) -> float | None:
    """None where nothing was counted."""
    return total / count if count else None
