"""Advantage-weighted matching, the policy gradient of the flow-matching loss (AWM, arXiv 2509.25050; method.md, 9).

Images are drawn by ODE steps and their latents noised again (forward_process.py). Instead of a likelihood the policy
has the negative, weighted error of its velocity v against the flow u, at a level σ of an image

    ℓ = mean((v - u)²),    log p = -w(ℓ, σ),    ρ = exp(log p - log p_old)
    L = max(-A ρ, -A clip(ρ, 1 - κ, 1 + κ)) + β · mean((v - v_to)²)

    w = ℓ | σ ℓ | σ² ℓ | σ (√(ℓ + ε) - 10⁻⁵) | σ ((ℓ + ε)^p - ε^p) / p,    ε = 10⁻¹⁰

log p_old is that of the weights which drew the images, at the same noise: of the first minibatch it is the policy's own
log p, so ρ is 1 and the gradient that of A · w. A is the advantage among the images of the prompt, clipped to
±`advantage.clip`, κ is `update.clip_range`, β `update.kl_weight` and v_to the velocity of `update.kl_to`: with "ema" it
is what the public implementation calls ema_kl_beta.

Measured against X-GenGroup/Flow-Factory a0b2bc5, src/flow_factory/trainers/awm.py: tests/training/test_awm.py. The
loss is plain torch, as NFT's.

Shapes: G images of the iteration, M of a micro-batch, K noise levels of an image, latents [., C, h, w] float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from advgrpo.config import AwmSection
from advgrpo.runtime.transfer import to_device
from advgrpo.sampling.dynamics import StepTable
from advgrpo.training.forward_process import ForwardProcess, Level
from advgrpo.training.objective import Iteration, Parts
from advgrpo.training.scoring import Scored, Scorer
from advgrpo.types import MicroBatchRollout, Rollout

_EPS = 1e-10  # under roots, whose slope at 0 is infinite
_HUBER_SHIFT = 1e-5  # √ε: no error weighs nothing

_WEIGHTINGS: dict[str, Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]] = {
    "uniform": lambda error, sigma, power: error,
    "sigma": lambda error, sigma, power: sigma * error,
    "sigma_squared": lambda error, sigma, power: sigma.square() * error,
    "huber": lambda error, sigma, power: sigma * ((error + _EPS).sqrt() - _HUBER_SHIFT),
    "generalized_huber": lambda error, sigma, power: sigma * ((error + _EPS) ** power - _EPS**power) / power,
}


def matching_log_prob(
    velocity: torch.Tensor, flow: torch.Tensor, sigma: torch.Tensor, *, weighting: str, power: float
) -> torch.Tensor:
    """log p [M] float32, the negative weighted error of velocities against flows.

    Args:
        velocity, flow: v and u = ε - x₀, [M, C, h, w] float32.
        sigma: noise levels [M] float32.
        weighting: w, as `AwmSection.weighting`.
        power: p of the generalised Huber weighting.
    """
    error = (velocity.double() - flow.double()).square().mean((1, 2, 3))  # ρ is the difference of two that are near
    return -_WEIGHTINGS[weighting](error, sigma.double(), power).float()


def awm_loss(
    log_prob: torch.Tensor, old_log_prob: torch.Tensor, advantages: torch.Tensor, *, clip_range: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss without the KL, ρ), each [M]; the gradient is that of `log_prob` alone.

    Args:
        log_prob, old_log_prob: of the trained policy, and of the one that drew the images, [M] float32.
        advantages: A [M] float32, clipped already.
        clip_range: κ.
    """
    ratio = (log_prob - old_log_prob).exp()
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return torch.maximum(-advantages * ratio, -advantages * clipped), ratio


@dataclass
class AdvantageWeightedMatching(ForwardProcess):
    """`objective.Objective`: see the module's docstring.

    Args:
        section: settings of the loss.
        kl_weight, clip_range: `update.kl_weight` and `update.clip_range`.
    """

    draws: ClassVar[str] = "awm"
    update_metrics: ClassVar[tuple[str, ...]] = (
        "zero_std_fraction",
        "awm_loss",
        "kl",
        "ratio_mean",
        "clip_fraction",
        "grad_norm",
    )

    section: AwmSection
    kl_weight: float
    clip_range: float

    @classmethod
    def own_settings(cls, parts: Parts, scorer: Scorer) -> dict[str, Any]:
        update = parts.config.update
        return {"section": parts.config.awm, "kl_weight": update.kl_weight, "clip_range": update.clip_range}

    @property
    def noise_levels(self) -> AwmSection:
        return self.section

    def update(
        self, rollout: Rollout, scored: Scored, table: StepTable, iteration: Iteration
    ) -> dict[str, float | None]:
        """One optimizer step per minibatch."""
        result, reports = self.advantages(scored), []
        advantages = result.advantages.clamp(-self.advantage.clip, self.advantage.clip)
        total = self.micro_batches.images_per_minibatch
        parts: list[list[MicroBatchRollout]] = [[] for _ in range(self.micro_batches.minibatches)]
        for each in rollout.micro_batches:
            parts[each.micro_batch.minibatch].append(each)
        later = [each for part in parts[1:] for each in part]
        pieces = iteration.stoppable(later, "update: log-probabilities of micro-batch")
        old = {id(each): self.log_probs(each, table, iteration.number) for each in pieces}
        for number, part in enumerate(parts):
            pieces = iteration.stoppable(part, "update: micro-batch")
            sums = self.accumulate(
                ((each, old.get(id(each))) for each in pieces),
                advantages,
                table,
                iteration.number,
                total=total,
                watch_kl=number == 0,
            )
            reports.append(torch.cat([sums, self.updater.step().double()[None]]))
        (loss, ratio, clipped, kl, kl_pairs), grad_norm = self.gathered(reports, iteration.number)
        pairs = self.settings.images * self.trained
        return {
            "zero_std_fraction": float(result.zero_std_fraction),
            "awm_loss": loss / pairs,
            "kl": kl / kl_pairs,
            "ratio_mean": ratio / pairs,
            "clip_fraction": clipped / pairs,
            "grad_norm": grad_norm,
        }

    @torch.no_grad()
    def log_probs(self, rollout: MicroBatchRollout, table: StepTable, iteration: int) -> list[torch.Tensor]:
        """log p [M] of the policy as it is, at each of the K levels of a micro-batch."""
        prompts = self.prepared(rollout, table)
        found = []
        for level in self.noised(rollout, iteration):
            found.append(self._log_prob(self.policy.predict(level.noisy, level.step, prompts)[0].float(), level))
        return found

    def accumulate(
        self,
        micro_batches: Iterable[tuple[MicroBatchRollout, list[torch.Tensor] | None]],
        advantages: torch.Tensor,
        table: StepTable,
        iteration: int,
        *,
        total: int,
        watch_kl: bool,
    ) -> torch.Tensor:
        """Gradients of one minibatch, whose images number `total` over all processes.

        Args:
            micro_batches: each with its log p_old [M] by level; None where the policy is still the one that drew.
            advantages: A [G], by image number, clipped.
            watch_kl: measure the KL at the first level of image 0's micro-batch even where the loss does not use it.

        Returns:
            [5] float64 on the device, sums over this process's pairs of image and level: loss, ρ, whether it is
            beyond the clip, the KL, and the number of pairs that the last is of.
        """
        self.updater.zero_gradients()
        sums = torch.zeros(5, dtype=torch.float64, device=self.policy.device)
        weight = 1.0 / (total * self.trained)
        for place, (rollout, old) in enumerate(micro_batches):
            ids = rollout.micro_batch.image_ids
            prompts = self.prepared(rollout, table)
            own = advantages[to_device(ids, advantages.device)]
            levels = self.noised(rollout, iteration)
            pulled, counts = self.levels_of_kl(levels, ids, watch_kl=watch_kl, first=place == 0)
            targets = self.without_gradient(self.updater.kl_target(), pulled, prompts)
            for number, level in enumerate(levels):
                velocity = self.policy.predict(level.noisy, level.step, prompts)[0].float()
                log_prob = self._log_prob(velocity, level)
                before = log_prob.detach() if old is None else old[number]
                losses, ratio = awm_loss(log_prob, before, own, clip_range=self.clip_range)
                if counts and number < len(targets):
                    kl = (velocity - targets[number]).square().mean((1, 2, 3))
                    losses = losses + self.kl_weight * kl
                    sums[3] += kl.detach().double().sum()
                    sums[4] += len(ids)
                (losses.sum() * weight).backward()
                beyond = (ratio.detach() - 1).abs() > self.clip_range
                sums[:3] += torch.stack([part.detach().double().sum() for part in (losses, ratio, beyond)])
        return sums

    def _log_prob(self, velocity: torch.Tensor, level: Level) -> torch.Tensor:
        section = self.section
        return matching_log_prob(
            velocity, level.flow, level.sigma, weighting=section.weighting, power=section.huber_power
        )
