"""The policy gradient (docs/method.md section 7): a window of stochastic steps, and the clipped update on them.

The iteration around it, readable top to bottom, is rewarded.py's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from advgrpo.config import Config
from advgrpo.sampling.dynamics import StepTable, step_table, window_steps
from advgrpo.training.objective import Iteration
from advgrpo.training.rewarded import RewardedObjective
from advgrpo.training.scoring import Scored
from advgrpo.types import Rollout


@dataclass
class PolicyGradient(RewardedObjective):
    """`objective.Objective`: what was drawn is made likelier or rarer.

    Args:
        old_log_prob: `update.old_log_prob`.
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

    old_log_prob: str

    @classmethod
    def own_settings(cls, config: Config) -> dict[str, Any]:
        return {"old_log_prob": config.update.old_log_prob}

    def table(self, iteration: int) -> StepTable:
        """This iteration's steps, the stochastic ones among them."""
        window = window_steps(self.settings, self.seed, iteration)
        return step_table(self.policy, self.settings.num_steps, window, rollout=self.settings)

    def update(self, rollout: Rollout, scored: Scored, table: StepTable, iteration: Iteration) -> dict[str, float]:
        """Advantages, then one optimizer step and one EMA step per minibatch."""
        result = self.advantages(scored)
        reports, reweighs = [], self.old_log_prob != "rollout"
        if reweighs:
            pieces = iteration.stoppable(rollout.micro_batches, "reweigh: micro-batch")
            reweighed = self.updater.reweigh(pieces, table)
        total = self.micro_batches.images_per_minibatch
        for minibatch in range(self.micro_batches.minibatches):
            own = [t for t in rollout.micro_batches if t.micro_batch.minibatch == minibatch]
            pieces = iteration.stoppable(own, "update: micro-batch")
            first = minibatch == 0
            part = self.updater.accumulate(pieces, result.advantages, table, total=total, watch_kl=first)
            mismatch = part.max_mismatch()
            norm = self.updater.step(mismatch if first else None)
            reports.append(torch.cat([part.sums(), torch.stack([mismatch, norm]).double()]))
        return {
            "zero_std_fraction": float(result.zero_std_fraction),
            **self._update_metrics(torch.stack(reports), iteration.number),
            **(self._reweighed_metrics(reweighed) if reweighs else {}),
        }

    def _update_metrics(self, reports: torch.Tensor, iteration: int) -> dict[str, float]:
        """Metrics of [minibatches, 9] local reports: the one place where the update waits for the device.

        Raises:
            LogProbMismatchError, FloatingPointError: see `Updater.check`; nothing was stepped.
        """
        everywhere = self.distributed.all_gather(reports[None]).cpu()  # [processes, minibatches, 9]
        sums, mismatch, norms = everywhere[..., :7].sum(0), everywhere[:, 0, 7].max().item(), everywhere[0, :, 8]
        self.updater.check(mismatch, norms.tolist(), iteration)
        loss, ratio, clipped, kl, divergence, pairs, kl_pairs = sums.sum(0).tolist()
        compared = self.updater.config.update.trust_region == "divergence"
        return {
            "log_prob_mismatch_max": mismatch,
            "grad_norm": norms.mean().item(),
            "policy_loss": loss / pairs,
            "kl": kl / kl_pairs,
            "ratio_mean": ratio / pairs,
            "clip_fraction": clipped / pairs,
            "pre_update_clip_fraction": (sums[0, 2] / sums[0, 5]).item(),
            **({"policy_divergence": divergence / pairs} if compared else {}),
        }

    def _reweighed_metrics(self, sums: torch.Tensor) -> dict[str, float]:
        """How far the rollout's policy was from the trainer's (update.old_log_prob)."""
        gap, weight, capped, pairs = self.distributed.all_gather(sums[None]).sum(0).tolist()
        return {
            "log_prob_mismatch_mean": gap / pairs,
            "importance_weight_mean": weight / pairs,
            "importance_capped_fraction": capped / pairs,
        }
