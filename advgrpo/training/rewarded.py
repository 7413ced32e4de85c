"""The iteration of every objective that learns from rewards: rollout, rewards, discriminator updates, the update.

How images are drawn and what is learned from their advantages differs: policy_gradient.py, nft.py. What they are worth,
when the head trains and what the monitor sees does not. Nothing here knows a model, a reward or a kind of adversary.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, Self

import torch

from advgrpo.adversary.trainer import DiscriminatorBatch, DiscriminatorTrainer, UpdatePlan, paired_accuracy
from advgrpo.config import AdvantageSection, RolloutSection
from advgrpo.engine.engine import RolloutEngine, Rows
from advgrpo.monitor.image_statistics import ImageStatistics, measure
from advgrpo.policy.base import Policy
from advgrpo.runtime import rng
from advgrpo.runtime.distributed import SLOW_SECONDS, Distributed
from advgrpo.runtime.streams import CurrentStream, Stream, stream_of
from advgrpo.runtime.transfer import to_device
from advgrpo.sampling.dynamics import StepTable
from advgrpo.sampling.noise import row_seeds
from advgrpo.sampling.sampler import Sampler
from advgrpo.training.clean_start import State
from advgrpo.training.micro_batches import MicroBatches
from advgrpo.training.objective import Iteration, Outcome, Parts
from advgrpo.training.restoring import Restorable, RestoredHead, check_head
from advgrpo.training.scoring import Scored, Scorer
from advgrpo.training.update import Updater
from advgrpo.types import Conditioning, MicroBatch, MicroBatchRollout, Rollout
from advgrpo_kernels import Advantages, group_advantages


def build_sampler(parts: Parts, *, window_merged: bool) -> Sampler:
    """As the settings say; `window_merged`: whether the window's steps run merged weights as well."""
    config = parts.config
    return Sampler(
        parts.policy,
        config.rollout.guidance_scale,
        config.rollout.likelihood,
        share_prefix=parts.fast.share_prefix,
        noise=config.rollout.noise,
        merged=parts.policy.has_merged,
        window_merged=window_merged,
        graphs=parts.graphs,
        shared_noise=config.rollout.initial_noise == "shared",
        keep_means=config.update.trust_region != "ratio",
        whole=config.rollout.window.one_for_all,
    )


def build_engine(parts: Parts) -> RolloutEngine | None:
    """The rollout engine of the settings, verified; None where they ask for none."""
    if not parts.config.rollout.engine.draws:
        return None
    engine = RolloutEngine(parts.config, parts.policy, parts.micro_batches.prompts, parts.distributed)
    engine.verify()
    return engine


@dataclass
class RewardedObjective(ABC):
    """`objective.Objective`: images are drawn, judged beside the others of their prompt, and learned from.

    Args:
        policy, updater: what is trained, and how.
        sampler, scorer: what draws images, and what they are worth.
        discriminator_trainer: trains the reward that learns; None where none does.
        micro_batches: which images an iteration has.
        settings: sections of the run's settings.
        seed: of the run.
        due: iteration -> whether the monitor looks at it.
        together: all processes run every forward, also those that only one of them needs: the base is in parts on them.
        engine: takes the ODE steps before the window, or all where there is none; None: the sampler takes them.
        decode_stream: decodes a rollout's images, while the next ones are sampled where it is a side stream.
    """

    keeps_clean_latents: ClassVar[bool] = False  # the update learns from the latents that images are decoded from
    update_metrics: ClassVar[tuple[str, ...]]  # which an iteration has not that trains only the head

    policy: Policy
    updater: Updater
    sampler: Sampler
    scorer: Scorer
    discriminator_trainer: DiscriminatorTrainer | None
    micro_batches: MicroBatches
    distributed: Distributed
    settings: RolloutSection
    advantage: AdvantageSection
    seed: int
    due: Callable[[int], bool]
    together: bool
    engine: RolloutEngine | None = field(default=None, kw_only=True)
    decode_stream: Stream = field(default_factory=CurrentStream, kw_only=True)

    def __post_init__(self) -> None:
        self._of_references = None if self.scorer.references is None else self.scorer.reference_statistics

    @classmethod
    def build(cls, parts: Parts) -> Self:
        """Sampler and discriminator trainer as the settings say."""
        config, distributed, scorer = parts.config, parts.distributed, parts.scorer()
        discriminator_trainer = None
        if scorer.adversary is not None:
            discriminator_trainer = DiscriminatorTrainer(
                scorer.adversary,
                reduce=distributed.all_reduce_sum,
                rank=distributed.rank,
                world_size=distributed.world_size,
                graphs=parts.graphs,
            )
        return cls(
            policy=parts.policy,
            updater=parts.updater,
            sampler=build_sampler(parts, window_merged=config.rollout.window_forward == "merged"),
            scorer=scorer,
            discriminator_trainer=discriminator_trainer,
            micro_batches=parts.micro_batches,
            distributed=distributed,
            settings=config.rollout,
            advantage=config.advantage,
            seed=config.seed,
            due=parts.monitor.due,
            together=config.model.is_sharded(distributed.world_size),
            engine=build_engine(parts),
            decode_stream=stream_of(config.rollout.decode_stream, parts.policy.device),
            **cls.own_settings(parts, scorer),
        )

    @classmethod
    def own_settings(cls, parts: Parts, scorer: Scorer) -> dict[str, Any]:
        """What a subclass is built with besides."""
        return {}

    def iterate(self, iteration: Iteration) -> Outcome:
        """Rollout, rewards, discriminator updates, generator update."""
        number = iteration.number
        table = self.table(number)
        chosen = self.choose(table, iteration)
        with iteration.phase("sample"), self.behaviour(iteration):
            rollout = self.rollout(table, number, chosen)
            merge_error = self.policy.merge_error() if self.due(number) else None
        judged = rollout.judged
        with iteration.phase("score"):
            scored = self.scorer.score(judged, number)
            compared = self.compared(rollout, scored, table, number)
        iteration.changes()
        with iteration.phase("discriminator"):
            plan, discriminator_metrics = self.train_discriminator(judged, scored, number)
        with iteration.phase("update"):
            update_metrics = self.update(rollout, scored, table, iteration) if plan.generator else self.not_updated()
            self.updater.ema.global_step += not plan.generator  # the released code counts such an iteration as a step
        metrics = {**scored.metrics(self.settings.group_size), **compared, **discriminator_metrics, **update_metrics}
        statistics = {} if merge_error is None else {"monitor_merge_error": merge_error}
        return Outcome(metrics, partial(self.measure, judged, scored), statistics)

    def not_updated(self) -> dict[str, float | None]:
        """Metrics of an iteration that trains only the head."""
        return dict.fromkeys(self.update_metrics)

    @abstractmethod
    def table(self, iteration: int) -> StepTable:
        """This iteration's steps, the stochastic ones among them."""

    def choose(self, table: StepTable, iteration: Iteration) -> torch.Tensor | None:
        """Which scouts to draw exactly, as `rollout` takes them; None where nothing is scouted."""
        return None

    def compared(self, rollout: Rollout, scored: Scored, table: StepTable, iteration: int) -> dict[str, float | None]:
        """Metrics of how well cheaper images stand for dearer ones, before anything learns."""
        return {}

    def behaviour(self, iteration: Iteration) -> AbstractContextManager[Any]:
        """Inside, the policy holds the weights that draw the images: those that are trained, unless it says else."""
        return contextlib.nullcontext()

    @abstractmethod
    def update(
        self, rollout: Rollout, scored: Scored, table: StepTable, iteration: Iteration
    ) -> dict[str, float | None]:
        """Train the generator on the images; `update_metrics` and more."""

    def rollout(self, table: StepTable, iteration: int, chosen: torch.Tensor | None = None) -> Rollout:
        """Sample the images of this process and those that draw along; draws are keyed by group or image number, never
        by micro-batch or process.

        Args:
            chosen: int64 by image number, on the host: which of the iteration's scouts each image is, whose draws it
                then has; None: nothing was scouted.
        """
        self.policy.merge()
        if self.engine is not None:
            self.engine.synchronise(iteration)
        micro_batches = self.micro_batches.of(iteration, chosen)
        judged = [prompt for each in micro_batches if each.judged for prompt in each.prompts]
        self.scorer.prefetch(judged)  # while the GPU samples
        drawn, stream = [], self.decode_stream
        for each in self.draw(self.sampler, table, micro_batches, iteration, "sample", decode_stream=stream):
            if each.micro_batch.judged:
                with stream.work():
                    self.scorer.begin(each)
            drawn.append(each)
        stream.join(*(each.images for each in drawn))
        return Rollout(drawn)

    def draw(
        self,
        sampler: Sampler,
        table: StepTable,
        micro_batches: Sequence[MicroBatch],
        iteration: int,
        what: str,
        *,
        decode_stream: Stream | None = None,
    ) -> Iterator[MicroBatchRollout]:
        """The images of micro-batches, one of these after the other; the same by whatever sampler and table draws them,
        up to what these compute differently.

        Args:
            what: is done, for those who wait.
            decode_stream: decodes the images, which who reads them joins first; None: the current one does.
        """
        decode_stream = decode_stream or CurrentStream()
        initial_seed = rng.derive_seed(self.seed, "initial_noise", iteration)
        noise_seed = rng.derive_seed(self.seed, "step_noise", iteration)
        encoded: dict[tuple[str, ...], Conditioning] = {}  # the micro-batches of a prompt share its embeddings
        waits = self.micro_batches.mesh.sequence_size > 1  # in an exchange for one that judges
        pieces = self.distributed.stoppable(
            micro_batches, f"{what}: micro-batch", within_seconds=SLOW_SECONDS if waits else None
        )
        for micro_batch in pieces:
            texts = tuple(micro_batch.prompts)
            if texts not in encoded:
                encoded[texts] = self.policy.encode(micro_batch.prompts)
            yield self._sample(sampler, table, micro_batch, encoded[texts], initial_seed, noise_seed, decode_stream)

    def _sample(
        self,
        sampler: Sampler,
        table: StepTable,
        micro_batch: MicroBatch,
        conditioning: Conditioning,
        initial_seed: int,
        noise_seed: int,
        decode_stream: Stream,
    ) -> MicroBatchRollout:
        table, reached = self._reached(sampler, table.of(micro_batch.branch), micro_batch, initial_seed)
        latents, steps = reached, []
        if self.engine is None or table.window:
            latents, steps = sampler.run(
                table,
                conditioning,
                reached,
                to_device(micro_batch.row, self.policy.device),
                noise_seed=noise_seed,
                image_ids=to_device(micro_batch.draws, self.policy.device),
            )
        clean = latents if self.keeps_clean_latents else None
        with decode_stream.work(latents):
            images = self.policy.decode(latents) if micro_batch.judged else latents.new_zeros(0, 3, 1, 1)
        return MicroBatchRollout(micro_batch, conditioning, steps, images, clean)

    def _reached(
        self, sampler: Sampler, table: StepTable, micro_batch: MicroBatch, seed: int
    ) -> tuple[StepTable, torch.Tensor]:
        """What is left of the steps, and the latents they start from: all of them and the initial noise, unless an
        engine takes those before the window, or where there is none, all."""
        owners = micro_batch.trajectories if sampler.shared_noise else micro_batch.draws
        initial, first = sampler.initial_latents(seed, owners), table.window[0] if table.window else len(table.numbers)
        if self.engine is None or not first:
            return table, initial
        texts = micro_batch.prompts if sampler.shared_noise else micro_batch.captions
        reached = self.engine.latents(Rows(texts, row_seeds(seed, owners), initial), first)
        return replace(table, taken=tuple(step for step in table.taken if step >= first)), reached

    def train_discriminator(
        self, rollout: Rollout, scored: Scored, iteration: int
    ) -> tuple[UpdatePlan, dict[str, float]]:
        """Discriminator updates when the schedule says so; generations are remembered for later iterations either
        way."""
        trainer = self.discriminator_trainer
        if trainer is None:
            return UpdatePlan(0, True), {}
        batch = DiscriminatorBatch(rollout.image_ids, scored.generated, scored.reference, total=self.settings.images)
        sides = scored.components["adversary"], scored.reference_rewards
        return trainer.learn(
            batch,
            sides,
            paired_accuracy(*sides, self.settings.group_size),
            iteration,
            optimizer_steps=self.micro_batches.minibatches,
            agree=lambda numbers: self.distributed.gather_json(numbers)[0],
            gather=self.distributed.all_gather,
        )

    def advantages(self, scored: Scored) -> Advantages:
        """Of all images of the iteration, each among those of its prompt."""
        image_ids = torch.arange(self.settings.images, device=scored.rewards.device)
        return group_advantages(
            scored.rewards,
            image_ids // self.settings.group_size,
            std=self.advantage.std,
            eps=self.advantage.eps,
            clip=self.advantage.clip,
        )

    def measure(self, rollout: Rollout, scored: Scored) -> ImageStatistics:
        """What the monitor sees of the images."""
        return measure(rollout, scored.embeddings, self._of_references, self.settings.group_size, self.distributed)

    def state(self) -> State:
        """The head that learns, its optimizer and its memory of older images; nothing where none learns."""
        return ({}, {}) if self.discriminator_trainer is None else self.discriminator_trainer.state()

    def checked(self, tensors: dict[str, torch.Tensor], state: Mapping[str, Any]) -> Restorable:
        """See `restoring.check_head`."""
        if self.discriminator_trainer is None:
            return Restorable()
        return check_head(self.discriminator_trainer, tensors, state)

    def load(self, found: Restorable) -> None:
        """Continue from what `checked` returned."""
        if isinstance(found, RestoredHead):
            found.apply(self.discriminator_trainer)
