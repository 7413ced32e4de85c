"""Negative-aware fine-tuning, learning without likelihoods (DiffusionNFT, arXiv 2509.16117; docs/method.md section 9).

Images are drawn by ODE steps of an old policy. Their latents x₀ are noised again to levels σ of the sampler's schedule,
x_σ = (1 - σ) x₀ + σ ε, where the flow that leads to this image is u = ε - x₀. With v and v_old the velocities of the
trained and of the old policy at x_σ, and the optimality r of the image in [0, 1], the loss of an image at a level is

    v± = v_old ± β (v - v_old),    L± = mean(e±²) / max(mean|e±|, 1e-5),    e± = σ (u - v±)
    L  = c/β · (r L₊ + (1 - r) L₋) + w · mean((v - v_ref)²),    r = (A/c + 1)/2

A is the advantage among the images of the prompt, clipped to ±c (`advantage.clip`); e± are the errors of the predicted
clean latents, x_σ - σ v± - x₀; their mean size, which has no gradient, is the adaptive weight. w is `update.kl_weight`,
v_ref the base model's velocity. Where v = v_old the gradient is that of A · mean(e²)/mean|e|: images are fitted or
avoided by their advantage.

After each iteration that trained, the old policy becomes d · old + (1 - d) · trained (`NftSection.old_decay`).

Measured against the released code (NVlabs/DiffusionNFT 24af555, scripts/train_nft_sd3.py): tests/training/test_nft.py.
The loss is plain torch: beside the networks' forwards it reads a few latents, which no kernel makes faster.

Shapes: G images of the iteration, M of a micro-batch, K noise levels of an image, T sampler steps, latents [., C, h, w]
float32.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from advgrpo.config import NftSection
from advgrpo.runtime.transfer import to_device
from advgrpo.sampling.dynamics import StepTable
from advgrpo.training import restoring
from advgrpo.training.clean_start import State
from advgrpo.training.ema import Ema
from advgrpo.training.forward_process import ForwardProcess
from advgrpo.training.objective import Iteration, Parts
from advgrpo.training.restoring import Restorable
from advgrpo.training.scoring import Scored, Scorer
from advgrpo.types import MicroBatchRollout, Rollout

_SMALLEST_WEIGHT = 1e-5  # of the mean error of a predicted clean latent


def optimality(advantages: torch.Tensor, clip: float) -> torch.Tensor:
    """r in [0, 1] of advantages [G], which are clipped to ±clip: 1/2 for an image that is as good as the mean."""
    return (advantages.clamp(-clip, clip) / clip + 1) / 2


def nft_loss(
    velocity: torch.Tensor,
    old_velocity: torch.Tensor,
    flow: torch.Tensor,
    sigma: torch.Tensor,
    optimality: torch.Tensor,
    *,
    beta: float,
    scale: float,
) -> torch.Tensor:
    """Loss [M] without the KL; its gradient is that of `velocity` alone.

    Args:
        velocity, old_velocity, flow: v, v_old and u = ε - x₀, [M, C, h, w] float32.
        sigma: noise levels [M] float32.
        optimality: r [M] float32.
        beta, scale: β and c of the formula above.
    """
    error, step = flow - old_velocity, beta * (velocity - old_velocity)
    good, bad = (_weighted(sigma.view(-1, 1, 1, 1) * e) for e in (error - step, error + step))
    return (scale / beta) * (optimality * good + (1 - optimality) * bad)


def _weighted(error: torch.Tensor) -> torch.Tensor:
    """[M]: mean square over mean size of the errors [M, C, h, w]."""
    size = error.detach().abs().mean((1, 2, 3)).clamp(min=_SMALLEST_WEIGHT)
    return error.square().mean((1, 2, 3)) / size


@dataclass
class RestoredOldPolicy(Restorable):
    """What `NegativeAwareFineTuning.load` takes over."""

    weights: dict[str, torch.Tensor]
    steps: int
    head: Restorable

    @property
    def prefixes(self) -> list[str]:
        return ["old_policy.", *self.head.prefixes]


@dataclass
class NegativeAwareFineTuning(ForwardProcess):
    """`objective.Objective`: see the module's docstring.

    Args:
        section: settings of the loss and of the old policy.
        kl_weight: `update.kl_weight`.

    Attributes:
        old: the policy that draws.
        steps: optimizer steps so far, by which its decay goes.
    """

    draws: ClassVar[str] = "nft"
    update_metrics: ClassVar[tuple[str, ...]] = (
        "zero_std_fraction",
        "nft_loss",
        "kl",
        "old_policy_distance",
        "old_policy_decay",
        "grad_norm",
    )

    section: NftSection
    kl_weight: float

    def __post_init__(self) -> None:
        super().__post_init__()
        self.old, self.steps = Ema(self.updater.named, decay=0.0), 0

    @classmethod
    def own_settings(cls, parts: Parts, scorer: Scorer) -> dict[str, Any]:
        return {"section": parts.config.nft, "kl_weight": parts.config.update.kl_weight}

    @property
    def noise_levels(self) -> NftSection:
        return self.section

    @contextlib.contextmanager
    def behaviour(self, iteration: Iteration) -> Iterator[None]:
        """Inside, the policy holds the old weights; a checkpoint of that time is of the trained ones."""
        with iteration.clean.changed(), self.old.swap():
            yield

    def update(
        self, rollout: Rollout, scored: Scored, table: StepTable, iteration: Iteration
    ) -> dict[str, float | None]:
        """One optimizer step per minibatch, then the old policy follows."""
        result, reports = self.advantages(scored), []
        rates = optimality(result.advantages, self.advantage.clip)
        total = self.micro_batches.images_per_minibatch
        for minibatch in range(self.micro_batches.minibatches):
            own = [t for t in rollout.micro_batches if t.micro_batch.minibatch == minibatch]
            pieces = iteration.stoppable(own, "update: micro-batch")
            sums = self.accumulate(pieces, rates, table, iteration.number, total=total, watch_kl=minibatch == 0)
            reports.append(torch.cat([sums, self.updater.step().double()[None]]))
        (loss, distance, kl, kl_pairs), grad_norm = self.gathered(reports, iteration.number)
        pairs = self.settings.images * self.trained
        self.steps += self.micro_batches.minibatches
        decay = self.section.old_decay(self.steps)
        self.old.average(decay)
        return {
            "zero_std_fraction": float(result.zero_std_fraction),
            "nft_loss": loss / pairs,
            "kl": kl / kl_pairs,
            "old_policy_distance": distance / pairs,
            "old_policy_decay": decay,
            "grad_norm": grad_norm,
        }

    def accumulate(
        self,
        micro_batches: Iterable[MicroBatchRollout],
        optimality: torch.Tensor,
        table: StepTable,
        iteration: int,
        *,
        total: int,
        watch_kl: bool,
    ) -> torch.Tensor:
        """Gradients of one minibatch, whose images number `total` over all processes.

        Args:
            optimality: r [G], by image number.
            watch_kl: measure the distance to the base at the first level of image 0's micro-batch even where the loss
                does not use it.

        Returns:
            [4] float64 on the device, sums over this process's pairs of image and level: loss, mean((v - v_old)²),
            mean((v - v_ref)²) and the number of pairs that the last is of.
        """
        self.updater.zero_gradients()
        sums = torch.zeros(4, dtype=torch.float64, device=self.policy.device)
        weight = 1.0 / (total * self.trained)
        for place, rollout in enumerate(micro_batches):
            ids = rollout.micro_batch.image_ids
            prompts = self.prepared(rollout, table)
            rates = optimality[to_device(ids, optimality.device)]
            levels = self.noised(rollout, iteration)
            old = self.without_gradient(self.old.swap(), levels, prompts)
            based, counts = self.levels_of_kl(levels, ids, watch_kl=watch_kl, first=place == 0)
            base = self.without_gradient(self.policy.disable_adapter(), based, prompts)
            for number, level in enumerate(levels):
                velocity = self.policy.predict(level.noisy, level.step, prompts)[0].float()
                losses = nft_loss(
                    velocity,
                    old[number],
                    level.flow,
                    level.sigma,
                    rates,
                    beta=self.section.beta,
                    scale=self.advantage.clip,
                )
                if counts and number < len(base):
                    from_base = (velocity - base[number]).square().mean((1, 2, 3))
                    losses = losses + self.kl_weight * from_base
                    sums[2] += from_base.detach().double().sum()
                    sums[3] += len(ids)
                (losses.sum() * weight).backward()
                sums[0] += losses.detach().double().sum()
                sums[1] += (velocity.detach() - old[number]).square().mean((1, 2, 3)).double().sum()
        return sums

    def state(self) -> State:
        """The old policy, beside what all keep."""
        tensors, state = super().state()
        own = {f"old_policy.{name}": tensor for name, tensor in self.old.state_dict().items()}
        return {**tensors, **own}, {**state, "nft_steps": self.steps}

    def checked(self, tensors: dict[str, torch.Tensor], state: Mapping[str, Any]) -> Restorable:
        """Raises UserError for an old policy that is not this run's."""
        weights = restoring.taken(tensors, "old_policy.", self.old.state_dict())
        return RestoredOldPolicy(weights, restoring.count(state, "nft_steps"), super().checked(tensors, state))

    def load(self, found: Restorable) -> None:
        if isinstance(found, RestoredOldPolicy):
            self.old.load_state_dict(found.weights)
            self.steps = found.steps
            super().load(found.head)
