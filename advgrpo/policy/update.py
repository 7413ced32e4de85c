"""The generator's update: clipped policy loss on the window's steps, one optimizer step per optimizer window.

The forward repeats the rollout's own: same tiles, same weights, same batch shapes, so before the first optimizer step
every likelihood ratio is exactly 1 (METHOD section 5).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from advgrpo_kernels import clipped_policy_loss, gaussian_step

from ..config import Config
from ..types import Conditioning, TileRollout, WindowStep
from .base import Policy
from .dynamics import StepTable


class DriftError(RuntimeError):
    """Log-probabilities of the update differ from the rollout's although the weights are the same."""


@dataclass
class UpdateStats:
    """Sums over this process's (picture, step) pairs; tensors stay on the device until they are logged."""

    pairs: int = 0
    loss: list[torch.Tensor] = field(default_factory=list)
    ratio: list[torch.Tensor] = field(default_factory=list)
    clipped: list[torch.Tensor] = field(default_factory=list)
    kl: list[torch.Tensor] = field(default_factory=list)
    kl_pairs: int = 0
    drift: list[torch.Tensor] = field(default_factory=list)  # max |log p - log p_old| of each tile and step

    def sums(self) -> dict[str, float]:
        total = {name: sum(getattr(self, name), torch.zeros(())).item() for name in ("loss", "ratio", "clipped", "kl")}
        return {**total, "pairs": self.pairs, "kl_pairs": self.kl_pairs}

    def max_drift(self) -> float:
        return torch.stack(self.drift).max().item() if self.drift else 0.0


class Updater:
    """Accumulates gradients over tiles, sums them over processes in one flat all-reduce, clips and steps."""

    def __init__(self, policy: Policy, config: Config, *, reduce: Callable[[list[torch.Tensor]], None], fused: bool):
        self.policy, self.config, self.reduce = policy, config, reduce
        self.named = list(policy.trainable_parameters())
        update = config.update
        self.optimizer = torch.optim.AdamW(
            [p for _, p in self.named],
            lr=update.learning_rate,
            betas=update.betas,
            eps=update.eps,
            weight_decay=update.weight_decay,
            fused=fused,
        )

    def accumulate(
        self, tiles: list[TileRollout], advantages: torch.Tensor, table: StepTable, *, total: int, watch_kl: bool
    ) -> UpdateStats:
        """Gradients of one optimizer window. `advantages` is [B global], indexed by image id; `total` is the window's
        number of pictures over all processes. `watch_kl` measures the KL to the base on the tile of picture 0 even when
        the loss does not use it.
        """
        stats = UpdateStats()
        weight = 1.0 / (total * len(table.window))
        for rollout in tiles:
            row = rollout.tile.row.to(self.policy.device)
            prompts = self.policy.encode(rollout.tile.prompts)
            tile_advantages = advantages[rollout.tile.image_ids.to(advantages.device)].to(self.policy.device)
            for step in rollout.steps:
                measure_kl = self.config.update.kl_weight > 0 or (watch_kl and int(rollout.tile.image_ids[0]) == 0)
                loss = self._step_loss(step, prompts, row, tile_advantages, table, measure_kl)
                (loss.loss * (len(row) * weight)).backward()
                self._record(stats, loss, step, measure_kl)
        return stats

    def _step_loss(self, step: WindowStep, prompts: Conditioning, row, advantages, table: StepTable, measure_kl: bool):
        conditioning = prompts if step.shared else prompts.rows(row)
        coefficients, timestep = table.coefficients[step.step], table.timesteps[step.step]
        velocity = self._velocity(step, timestep, conditioning, row)
        latents = step.latents.index_select(0, row) if step.shared else step.latents
        reference_mean = None
        if measure_kl:
            with torch.no_grad(), self.policy.reference():
                base = self._velocity(step, timestep, conditioning, row)
            reference_mean = gaussian_step(
                latents, base[0], coefficients, uncond_velocity=base[1], guidance_scale=self._guidance,
                noise=torch.zeros_like(latents), likelihood=None, return_mean=True,
            ).mean  # fmt: skip
        return clipped_policy_loss(
            latents,
            velocity[0],
            step.next_latents,
            coefficients,
            step.log_prob,
            advantages,
            clip_range=self.config.update.clip_range,
            adv_clip=self.config.advantage.clip,
            uncond_velocity=velocity[1],
            guidance_scale=self._guidance,
            likelihood=self.config.rollout.likelihood,
            reference_mean=reference_mean,
            kl_weight=self.config.update.kl_weight,
        )

    def _velocity(self, step: WindowStep, timestep, conditioning: Conditioning, row):
        velocity = self.policy.velocity(step.latents, timestep, conditioning, guided=self._guidance != 1.0)
        return tuple(v.index_select(0, row) if v is not None and step.shared else v for v in velocity)

    @property
    def _guidance(self) -> float:
        return self.config.rollout.guidance_scale

    def _record(self, stats: UpdateStats, loss, step: WindowStep, measured_kl: bool) -> None:
        rows = len(loss.log_prob)
        stats.pairs += rows
        stats.loss.append(loss.loss.detach() * rows)
        stats.ratio.append(loss.ratio.sum())
        stats.clipped.append(loss.clip_fraction * rows)
        stats.drift.append((loss.log_prob - step.log_prob).abs().max())
        if measured_kl:
            stats.kl.append(loss.kl * rows)
            stats.kl_pairs += rows

    def step(self) -> float:
        """Sum gradients over processes, clip, and step the optimizer; returns the gradient norm before clipping.

        Raises:
            FloatingPointError: the gradient is not finite; nothing has been changed.
        """
        parameters = [p for _, p in self.named]
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self.reduce([p.grad for p in parameters])
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.config.update.max_grad_norm).item()
        if not norm < float("inf"):
            worst = [name for name, p in self.named if not torch.isfinite(p.grad).all()]
            raise FloatingPointError(
                f"gradient norm is {norm}, first in {worst[:1] or ['the sum']}; the optimizer was not stepped. Lower "
                "update.learning_rate, or resume from the last checkpoint with another seed"
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm
