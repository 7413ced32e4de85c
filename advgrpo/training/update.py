"""The generator's update: clipped policy loss on the window's steps, one optimizer step per minibatch.

The forward repeats the rollout's own: same micro-batches, same weights, same batch shapes, so before the first
optimizer step every likelihood ratio is exactly 1.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch

from advgrpo.config import AdvantageSection, RolloutSection, UpdateSection
from advgrpo.errors import RunFailure
from advgrpo.policy.base import Capturable, Policy, Prediction, PreparedPrompts, combining_scale
from advgrpo.policy.current_prompts import CurrentPrompts
from advgrpo.policy.parts import parts_of
from advgrpo.runtime.graphs import CapturedFunction, GraphBackend, StaticBuffers
from advgrpo.runtime.transfer import to_device
from advgrpo.sampling.dynamics import StepTable, step_weights
from advgrpo.training.device_abort import DeviceAbort
from advgrpo.training.ema import Ema
from advgrpo.training.kl_target import kl_target
from advgrpo.training.optimizer import build_optimizer
from advgrpo.types import MicroBatchRollout, WindowStep
from advgrpo_kernels import PolicyLoss, clipped_policy_loss, gaussian_log_prob, gaussian_step

logger = logging.getLogger(__name__)
_OF_STEP = ("latents", "next_latents", "log_prob", "weight", "mean")  # tensors of a WindowStep, the last two optional


class LogProbMismatchError(RunFailure):
    """Log-probabilities of the update differ from the rollout's although the weights are the same."""


@dataclass
class UpdateStats:
    """Sums over this process's (image, step) pairs of a minibatch; they stay on the device."""

    device: torch.device
    pairs: int = 0
    kl_pairs: int = 0
    loss: list[torch.Tensor] = field(default_factory=list)
    ratio: list[torch.Tensor] = field(default_factory=list)
    clipped: list[torch.Tensor] = field(default_factory=list)
    kl: list[torch.Tensor] = field(default_factory=list)
    divergence: list[torch.Tensor] = field(default_factory=list)  # of that trust region, from the rollout's policy
    mismatch: list[torch.Tensor] = field(default_factory=list)  # max |log p - log p_old| of each micro-batch and step

    def sums(self) -> torch.Tensor:
        """[7] float64: loss, ratio, clipped, kl, divergence, pairs, kl_pairs."""
        zero = torch.zeros((), device=self.device)
        columns = (self.loss, self.ratio, self.clipped, self.kl, self.divergence)
        totals = [sum(column, zero) for column in columns]
        counts = [zero + self.pairs, zero + self.kl_pairs]
        return torch.stack([*totals, *counts]).double()

    def max_mismatch(self) -> torch.Tensor:
        """Scalar float32; 0 before the first pair."""
        return torch.stack(self.mismatch).max() if self.mismatch else torch.zeros((), device=self.device)


class _Frozen(NamedTuple):
    """What a captured step holds fast of the call that it was captured in, beside shapes."""

    step: int
    shared: bool
    measure_kl: bool
    weight: float  # of an image in the minibatch's mean


class _Learned(NamedTuple):
    """Sums over a step's images, scalars on the device; names of `UpdateStats`."""

    loss: torch.Tensor
    ratio: torch.Tensor
    clipped: torch.Tensor
    mismatch: torch.Tensor
    divergence: torch.Tensor | None
    kl: torch.Tensor | None


class _Sections(NamedTuple):
    """The settings that the update looks at."""

    update: UpdateSection
    rollout: RolloutSection
    advantage: AdvantageSection


class Updater:
    """Accumulates gradients over micro-batches, sums them over processes in one flat all-reduce, clips and steps.

    Nothing here waits for the device on the fast path. A gradient that is not finite, or a mismatch above the bound,
    leaves the weights as they are, in this and all later steps of the iteration (`DeviceAbort`); `check` reports it
    when the iteration is logged.
    """

    def __init__(
        self,
        policy: Policy,
        update: UpdateSection,
        rollout: RolloutSection,
        advantage: AdvantageSection,
        *,
        reduce: Callable[[list[torch.Tensor]], None],
        fused: bool,
        ema: Ema | None = None,
        graphs: GraphBackend | None = None,
    ):
        """`graphs` captures forward and backward of each step; None runs them eagerly."""
        self.policy, self.config, self.reduce = policy, _Sections(update, rollout, advantage), reduce
        self.step_weights = step_weights(policy, rollout, update.step_weights)
        self.named = list(policy.trainable_parameters())
        self.ema = ema or Ema.of(self.named, update)
        self.kl_target = kl_target(policy, update, self.ema)
        self.abort, parts = DeviceAbort(policy.device), parts_of(policy)
        norm = None if parts is None else lambda gradients: parts.norm([*gradients, self.abort.value])
        self.stepper = build_optimizer([p for _, p in self.named], update, self.ema, fused=fused, norm=norm)
        self.optimizer = self.stepper.optimizer
        storage = policy if graphs is not None and isinstance(policy, Capturable) else None
        if graphs is not None and storage is None:
            logger.warning("a %s is not Capturable: its update runs eagerly", type(policy).__name__)
        backend = None if storage is None else graphs
        # What a step reads, since a captured function takes no arguments (runtime/graphs.py).
        self._inputs = StaticBuffers(policy.device, static=storage is not None)
        self._prompts = CurrentPrompts(policy.device, storage)
        self._current: tuple[WindowStep, StepTable, _Frozen] | None = None
        self.captured = CapturedFunction(
            self._learn, name="update step", backend=backend, switch="update.graphs = false"
        )

    @torch.no_grad()
    def reweigh(self, micro_batches: Iterable[MicroBatchRollout], table: StepTable) -> torch.Tensor:
        """Replace the rollout's log-probabilities by the trainer's, before any optimizer step.

        For rollouts whose window ran other weights than are trained (config: update.old_log_prob). With
        "truncated_importance" each image's loss is weighted by min(p_trainer / p_rollout, cap) (Yao et al. 2025).

        Returns:
            [4] float64 sums over pairs: |log p_trainer - log p_rollout|, weight, share at the cap, pairs.
        """
        sums = torch.zeros(4, dtype=torch.float64, device=self.policy.device)
        for rollout in micro_batches:
            row = to_device(rollout.micro_batch.row, self.policy.device)
            prompts = self._prepare(rollout, table)
            for step in rollout.steps:
                latents, predicted = self._expanded(step, self._predict(step, prompts, row, table), row)
                log_prob = gaussian_log_prob(
                    latents,
                    predicted[0],
                    step.next_latents,
                    table.coefficients[step.step],
                    uncond_velocity=predicted[1],
                    guidance_scale=combining_scale(predicted, self._guidance),
                    likelihood=self.config.rollout.likelihood,
                )
                gap, cap = log_prob - step.log_prob, self.config.update.importance_cap
                step.log_prob = log_prob
                if step.mean is not None:
                    step.mean = self._mean(latents, predicted, table, step)
                weight = gap.exp().clamp(max=cap)
                if self.config.update.old_log_prob == "truncated_importance":
                    step.weight = weight
                sums[:3] += torch.stack([gap.abs().sum(), weight.sum(), (weight == cap).sum()])
                sums[3] += len(row)
        return sums

    def accumulate(
        self,
        micro_batches: Iterable[MicroBatchRollout],
        advantages: torch.Tensor,
        table: StepTable,
        *,
        total: int,
        watch_kl: bool,
        join_kl: bool = False,
    ) -> UpdateStats:
        """Gradients of one minibatch. `advantages` is [B global], indexed by image id; `total` is its
        number of images over all processes. `watch_kl` measures the KL on the first step of the first micro-batch even
        when the loss does not use it: with a shared prefix that forward has one row per prompt. `join_kl` runs that
        forward because another process measures, and counts nothing.
        """
        self.zero_gradients()
        stats, inputs = UpdateStats(self.policy.device), self._inputs
        weight = 1.0 / (total * table.trained_per_image)
        table = self._held(table)
        for place, rollout in enumerate(micro_batches):
            inputs.fill("row", to_device(rollout.micro_batch.row, self.policy.device))
            inputs.fill("advantages", advantages[to_device(rollout.micro_batch.image_ids, advantages.device)])
            self._prompts.set(self._prepare(rollout, table))
            for number, step in enumerate(rollout.steps):
                first = number == 0 and place == 0
                counts_kl = self.config.update.kl_weight > 0 or (watch_kl and first)
                measure_kl = counts_kl or (join_kl and first)
                for name in _OF_STEP:
                    if getattr(step, name) is not None:
                        inputs.fill(name, getattr(step, name))
                frozen = _Frozen(step.step, step.shared, measure_kl, weight)
                self._current = step, table, frozen
                learned = self.captured((inputs.key(), self._prompts.key(), frozen))
                self._record(stats, learned if counts_kl else learned._replace(kl=None), len(step.log_prob))
        inputs.reset()
        self._current = None
        return stats

    def _held(self, table: StepTable) -> StepTable:
        """The table over tensors that a captured step may read."""
        held = {"timesteps": table.timesteps, "coefficients": table.coefficients, "numbers": torch.cat(table.numbers)}
        for name, tensor in held.items():
            self._inputs.fill(name, tensor)
        made = replace(table, timesteps=self._inputs["timesteps"], coefficients=self._inputs["coefficients"])
        made.numbers = list(self._inputs["numbers"].split(1))
        return made

    def _learn(self) -> _Learned:
        """Gradients of the step that is set, added to those that there are. Obeys the rules of `graphs`."""
        assert self._current is not None
        given, table, frozen = self._current
        inputs, prompts = self._inputs, self._prompts.get()
        held = {name: inputs[name] for name in _OF_STEP if getattr(given, name) is not None}
        step, row = replace(given, **held), inputs["row"]
        predicted = self._predict(step, prompts, row, table)
        latents, expanded = self._expanded(step, predicted, row)
        target = self._target_mean(step, latents, prompts, row, table) if frozen.measure_kl else None
        loss = self._loss(step, latents, expanded, inputs["advantages"], table, target)
        self._backward(step, predicted, loss, len(row) * frozen.weight)
        rows = len(loss.log_prob)
        return _Learned(
            loss.loss.detach() * rows,
            loss.ratio.sum(),
            loss.clip_fraction * rows,
            (loss.log_prob - step.log_prob).abs().max(),
            None if loss.divergence is None else loss.divergence.sum(),
            loss.kl * rows if frozen.measure_kl else None,
        )

    def zero_gradients(self) -> None:
        """Before a minibatch's gradients are accumulated."""
        for _, parameter in self.named:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            else:
                parameter.grad.zero_()

    def _prepare(self, rollout: MicroBatchRollout, table: StepTable) -> PreparedPrompts:
        """The same call on the same embeddings as in the rollout, so the same bits."""
        return self.policy.prepare(rollout.conditioning, table.timesteps, guidance=self._guidance)

    def _predict(self, step: WindowStep, prompts: PreparedPrompts, row: torch.Tensor, table: StepTable) -> Prediction:
        """As the rollout computed it: one row per prompt where those are still identical."""
        return self.policy.predict(
            step.latents, table.numbers[step.step], prompts if step.shared else prompts.rows(row)
        )

    def _expanded(self, step: WindowStep, predicted: Prediction, row: torch.Tensor) -> tuple[torch.Tensor, Prediction]:
        """(latents, predicted), one row per image [M, C, H, W], detached."""

        def of_images(tensor: torch.Tensor) -> torch.Tensor:
            tensor = tensor.detach()
            return tensor.index_select(0, row) if step.shared else tensor

        conditional, unconditional = predicted
        guided = None if unconditional is None else of_images(unconditional)
        return of_images(step.latents), (of_images(conditional), guided)

    def _target_mean(
        self, step: WindowStep, latents: torch.Tensor, prompts: PreparedPrompts, row: torch.Tensor, table: StepTable
    ) -> torch.Tensor | None:
        """[M, C, H, W] where the KL's target would go on average from the latents [M, C, H, W]."""
        with torch.no_grad(), self.kl_target():
            _, predicted = self._expanded(step, self._predict(step, prompts, row, table), row)
        return self._mean(latents, predicted, table, step)

    def _mean(
        self, latents: torch.Tensor, predicted: Prediction, table: StepTable, step: WindowStep
    ) -> torch.Tensor | None:
        """[M, C, H, W] of the step's distribution from the latents [M, C, H, W], with the bits that the rollout has."""
        return gaussian_step(
            latents, predicted[0], table.coefficients[step.step], uncond_velocity=predicted[1],
            guidance_scale=combining_scale(predicted, self._guidance), noise=torch.zeros_like(latents),
            likelihood=None, return_mean=True,
        ).mean  # fmt: skip

    def _loss(
        self,
        step: WindowStep,
        latents: torch.Tensor,
        predicted: Prediction,
        advantages: torch.Tensor,
        table: StepTable,
        target_mean: torch.Tensor | None,
    ) -> PolicyLoss:
        """Of M images, with its gradient by what was predicted.

        Args:
            latents, predicted: [M, C, H, W] of `_expanded`.
            advantages: [M], before clipping.
            target_mean: [M, C, H, W] of `_target_mean`; None measures no KL.
        """
        clip = self.config.advantage.clip
        if step.weight is not None:  # weights scale the clipped advantage, so the kernel's own bound is wider
            advantages, clip = advantages.clamp(-clip, clip) * step.weight, clip * self.config.update.importance_cap
        update = self.config.update
        weight = self.step_weights[step.step] * update.policy_weight
        if weight == 0:
            advantages = torch.zeros_like(advantages)
        elif weight != 1:
            advantages, clip = advantages.clamp(-clip, clip) * weight, clip * weight
        return clipped_policy_loss(
            latents,
            predicted[0],
            step.next_latents,
            table.coefficients[step.step],
            step.log_prob,
            advantages,
            clip_range=update.max_divergence if update.trust_region == "divergence" else update.clip_range,
            adv_clip=clip,
            uncond_velocity=predicted[1],
            guidance_scale=combining_scale(predicted, self._guidance),
            likelihood=self.config.rollout.likelihood,
            reference_mean=target_mean,
            kl_weight=self._kl_weight(table.lengths[step.step]),
            kl_std=None if target_mean is None else self._kl_std(table.coefficients[step.step]),
            trust_region=update.trust_region,
            old_mean=step.mean,
        )

    def _kl_weight(self, length: float) -> float:
        """Of a KL over 2s²: with s² = std²·length, weighting by the length is dividing by 2·std² instead."""
        update = self.config.update
        return update.kl_weight * (length if update.kl_variance == "unit_time" else 1.0)

    def _kl_std(self, coefficients: torch.Tensor) -> torch.Tensor | None:
        """What the KL divides by, as its standard deviation; None: as the likelihood says.

        mu - mu' = b·(v - v'), so the mean square of the velocities' difference is that of the means over 2·(|b|/√2)².
        """
        return coefficients[1].abs() * 0.5**0.5 if self.config.update.kl_space == "velocity" else None

    def _backward(self, step: WindowStep, predicted: Prediction, loss: PolicyLoss, weight: float) -> None:
        """The loss's closed-form gradient by the predictions, through the network. No graph is built for the glue.

        Args:
            predicted: what the network gave, [M, C, H, W], or [P, C, H, W] where the step is shared.
            weight: of the micro-batch's mean loss in the minibatch's.
        """
        outputs, gradients = [], []
        for output, gradient in zip(predicted, (loss.velocity_grad, loss.uncond_velocity_grad)):
            if output is None:
                continue
            if gradient is None:
                raise RuntimeError("the loss has no gradient: nothing that was predicted requires one")
            gradient = gradient * weight
            if step.shared:  # images of a prompt lie next to each other: a sum in fixed order
                gradient = gradient.unflatten(0, (len(output), -1)).sum(1)
            outputs.append(output)
            gradients.append(gradient)
        torch.autograd.backward(outputs, gradients)

    @property
    def _guidance(self) -> float:
        return self.config.rollout.guidance_scale

    def _record(self, stats: UpdateStats, learned: _Learned, rows: int) -> None:
        """Of `rows` images; a captured step's results are the next one's memory."""
        stats.pairs += rows
        for name, value in learned._asdict().items():
            if value is not None:
                getattr(stats, name).append(value.clone() if self._inputs.static else value)
        stats.kl_pairs += rows if learned.kl is not None else 0

    def step(self, mismatch: torch.Tensor | None = None) -> torch.Tensor:
        """Sum gradients over processes, clip, step; returns the gradient norm before clipping, on the device.

        `mismatch` is this process's, where no step was taken since the rollout: above update.max_log_prob_mismatch the
        iteration's update is called off, on every process.
        """
        if mismatch is not None:
            self.abort.begin(~(mismatch <= self.config.update.max_log_prob_mismatch))
        gradients = self._gradients()
        self.abort.spoil(gradients)
        self.reduce(gradients)
        norm = self.stepper.step()
        self.abort.watch(norm)
        return norm

    def _gradients(self) -> list[torch.Tensor]:
        """Of every trainable parameter, in order."""
        found = []
        for name, parameter in self.named:
            if parameter.grad is None:
                raise RuntimeError(f"{name} has no gradient: accumulate a minibatch first")
            found.append(parameter.grad)
        return found

    def check(self, mismatch: float, norms: list[float], iteration: int) -> None:
        """Raise what stopped the optimizer, with the values the log has just read.

        Raises:
            LogProbMismatchError: log-probabilities moved before the first step.
            FloatingPointError: a gradient was not finite.
        """
        bound = self.config.update.max_log_prob_mismatch
        if not mismatch <= bound:
            raise LogProbMismatchError(
                f"iteration {iteration}: log-probabilities moved by {mismatch:.3e} before any optimizer step "
                f"(update.max_log_prob_mismatch = {bound:g}). Rollout and update must run the same forward; raise the "
                "bound only if you know why they differ"
            )
        bad = [norm for norm in norms if not norm < float("inf")]
        if bad:
            raise FloatingPointError(
                f"iteration {iteration}: gradient norm is {bad[0]}, first in {self._worst()}; the optimizer was not "
                "stepped. Start again with a lower update.learning_rate"
            )

    def _worst(self) -> str:
        """The first layer whose gradient is not finite."""
        for (name, _), gradient in zip(self.named, self._gradients(), strict=True):
            wrong = (~torch.isfinite(gradient)).flatten().nonzero()
            if len(wrong):
                return self.policy.element_name(name, int(wrong[0]))
        return "the sum"
