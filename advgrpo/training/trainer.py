"""The iteration (docs/method.md section 7), readable top to bottom; nothing here knows a model or a reward."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import torch

from advgrpo.adversary.trainer import DiscriminatorBatch, DiscriminatorTrainer, UpdatePlan, paired_accuracy
from advgrpo.config import Config
from advgrpo.data.prompts import GroupSampler
from advgrpo.monitor.image_statistics import ReferenceStatistics, measure
from advgrpo.monitor.monitor import Monitor
from advgrpo.policy.base import Policy
from advgrpo.runtime import rng
from advgrpo.runtime.checkpoint import pack_optimizer
from advgrpo.runtime.distributed import Distributed
from advgrpo.runtime.graphs import GraphBackend
from advgrpo.runtime.phases import Phases
from advgrpo.runtime.transfer import to_device
from advgrpo.sampling.dynamics import StepTable, step_table, window_steps
from advgrpo.sampling.sampler import Sampler
from advgrpo.training import restoring
from advgrpo.training.clean_start import CleanStart
from advgrpo.training.ema import Ema
from advgrpo.training.fast import FastPaths
from advgrpo.training.scoring import Scored, Scorer
from advgrpo.training.supervised import SupervisedUpdater
from advgrpo.training.update import Updater
from advgrpo.types import Conditioning, Flag, MicroBatch, MicroBatchRollout, Rollout
from advgrpo_kernels import group_advantages


class Trainer:
    """Owns everything an iteration touches; `iterate` runs one and returns its metrics."""

    def __init__(
        self,
        config: Config,
        *,
        policy: Policy,
        scorer: Scorer,
        prompts: list[str],
        distributed: Distributed,
        fast: FastPaths,
        graphs: GraphBackend | None = None,
    ):
        self.config, self.policy, self.scorer = config, policy, scorer
        self.prompts, self.distributed = prompts, distributed
        rollout = config.rollout
        self.groups = GroupSampler(len(prompts), rollout.prompts_per_iteration, config.seed)
        self.sampler = Sampler(
            policy,
            rollout.guidance_scale,
            rollout.likelihood,
            share_prefix=fast.share_prefix,
            merged=policy.has_merged,
            window_merged=rollout.window_forward == "merged",
            graphs=graphs,
            shared_noise=rollout.initial_noise == "shared",
        )
        self.ema = Ema.of(policy.trainable_parameters(), config.update)
        self.updater = Updater(
            policy, config, reduce=distributed.all_reduce_sum, fused=fast.fused_optimizer, ema=self.ema
        )
        self.supervised = (
            SupervisedUpdater(policy, self.updater, scorer.references, config)
            if config.update.objective == "sft"
            else None
        )
        self.adversary = scorer.adversary
        self.discriminator_trainer = (
            None
            if self.adversary is None
            else DiscriminatorTrainer(
                self.adversary,
                reduce=distributed.all_reduce_sum,
                rank=distributed.rank,
                world_size=distributed.world_size,
                graphs=graphs,
            )
        )
        self.monitor = Monitor(config.monitor, config)
        self.reference_statistics = None if scorer.references is None else ReferenceStatistics(scorer.references)
        self.flags: list[Flag] = []  # active after the newest iteration
        self.iteration = 0  # the next one to run
        # Rank 0 alone saves. After full fine-tuning a copy of weights and moments would not fit beside them.
        self.clean = CleanStart(self.state, copies=distributed.is_main and config.model.train == "lora")

    @property
    def finished(self) -> bool:
        """Whether the run has its length: `iterations`, or `global_steps` before that."""
        limit = self.config.global_steps
        return self.iteration >= self.config.iterations or 0 < limit <= self.ema.global_step

    def iterate(self) -> dict[str, float]:
        """One iteration of `update.objective`; returns its metrics and times.

        Raises:
            StopRequested: somebody asked for the end; `abandon` then goes back to the iteration's start.
        """
        iteration, phases = self.iteration, Phases(self.policy.device)
        started = time.perf_counter()
        # Nothing of ours draws from torch's own generator; a reward of somebody else's may, and is resumed exactly too.
        torch.manual_seed(rng.derive_seed(self.config.seed, "torch", iteration))
        train = self.reinforce if self.supervised is None else self.imitate
        metrics = {"iteration": iteration, **train(iteration, phases)}
        self.iteration += 1
        phase_seconds = {f"seconds_{name}": value for name, value in phases.seconds().items()}
        seconds = time.perf_counter() - started
        metrics |= {"images_per_second": self.config.images_per_iteration / seconds, "seconds": seconds}
        self.clean.end()
        return metrics | phase_seconds

    def reinforce(self, iteration: int, phases: Phases) -> dict[str, float]:
        """Rollout, rewards, discriminator updates, generator update. Returns the metrics."""
        window = window_steps(self.config, iteration)
        table = step_table(self.policy, self.config.rollout.num_steps, window, rollout=self.config.rollout)
        with phases.measure("sample"):
            rollout = self.rollout(table, iteration)
        with phases.measure("score"):
            scored = self.scorer.score(rollout, iteration)
        self.clean.begin()
        with phases.measure("discriminator"):
            plan, discriminator_metrics = self.train_discriminator(rollout, scored, iteration)
        with phases.measure("update"):
            update_metrics = self.update(rollout, scored, table) if plan.generator else _NO_UPDATE
            self.ema.global_step += not plan.generator  # the released code counts such an iteration as a step
        metrics = {**scored.metrics(self.config.rollout.group_size), **discriminator_metrics, **update_metrics}
        with phases.measure("monitor"):
            metrics |= self.monitor_metrics(metrics, iteration, rollout, scored)
        return metrics

    def imitate(self, iteration: int, phases: Phases) -> dict[str, float]:
        """Supervised fine-tuning: one optimizer step per window on references of the iteration's prompts."""
        windows, reports = self.config.update.minibatches, []
        micro_batches, total = self.micro_batches(iteration), self.config.images_per_iteration // windows
        self.clean.begin()
        with phases.measure("update"):
            for window in range(windows):
                mine = self._pieces(
                    [micro_batch for micro_batch in micro_batches if micro_batch.minibatch == window],
                    "update: micro-batch",
                )
                loss = self.supervised.accumulate(mine, iteration, total=total)
                reports.append(torch.stack([loss, self.updater.step().double()]))
            everywhere = self.distributed.all_gather(torch.stack(reports)[None]).cpu()  # [processes, windows, 2]
            norms = everywhere[0, :, 1]
            self.updater.check(0.0, norms.tolist(), iteration)
        loss = everywhere[..., 0].sum().item() / self.config.images_per_iteration
        metrics = {"sft_loss": loss, "grad_norm": norms.mean().item()}
        with phases.measure("monitor"):
            metrics |= self.monitor_metrics(metrics, iteration)
        return metrics

    def abandon(self) -> None:
        """Go back to the start of the iteration under way, if one is and a copy was made of it."""
        self.clean.restore(self.load)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the policy holds the averaged weights."""
        with self.clean.changed(), self.ema.swap():
            yield

    def _pieces(self, micro_batches: list, what: str) -> Iterator:
        """Micro-batches of the update: it may end between them where the iteration's start is kept."""
        if self.clean.known or not self.distributed.is_main:
            yield from self.distributed.stoppable(micro_batches, what)
            return
        for number, micro_batch in enumerate(micro_batches, 1):
            self.distributed.progress(f"{what} {number} of {len(micro_batches)}")
            yield micro_batch

    def micro_batches(self, iteration: int) -> list[MicroBatch]:
        """This process's micro-batches, in order of minibatch. Which micro-batches exist does not depend on the
        processes."""
        rollout = self.config.rollout
        size, micro = rollout.group_size, rollout.micro_batch
        prompt_of_group = self.groups.next(iteration)
        windows = self.config.update.minibatches
        per_window = self.config.images_per_iteration // (micro * windows)
        share = per_window // self.distributed.world_size
        mine = []
        for window in range(windows):
            first = window * per_window + self.distributed.rank * share
            for number in range(first, first + share):
                ids = torch.arange(number * micro, (number + 1) * micro)
                group_ids = ids // size
                groups = group_ids.unique()
                prompts = [self.prompts[prompt_of_group[g]] for g in groups.tolist()]
                mine.append(MicroBatch(ids, prompts, groups, torch.searchsorted(groups, group_ids), window))
        return mine

    def rollout(self, table: StepTable, iteration: int) -> Rollout:
        """Sample this process's images; draws are keyed by group or image number, never by micro-batch or process."""
        seed = self.config.seed
        initial_seed = rng.derive_seed(seed, "initial_noise", iteration)
        noise_seed = rng.derive_seed(seed, "step_noise", iteration)
        self.policy.merge()
        self._merge_error = self.policy.merge_error() if self.monitor.due(iteration) else None
        micro_batches, rollouts = self.micro_batches(iteration), []
        self.scorer.prefetch(
            [prompt for micro_batch in micro_batches for prompt in micro_batch.prompts]
        )  # while the GPU samples
        encoded: dict[tuple[str, ...], Conditioning] = {}  # the micro-batches of a prompt share its embeddings
        for micro_batch in self.distributed.stoppable(micro_batches, "sample: micro-batch"):
            texts = tuple(micro_batch.prompts)
            if texts not in encoded:
                encoded[texts] = self.policy.encode(micro_batch.prompts)
            owners = micro_batch.prompt_groups if self.sampler.shared_noise else micro_batch.image_ids
            latents, steps = self.sampler.run(
                table,
                encoded[texts],
                self.sampler.initial_latents(initial_seed, owners),
                to_device(micro_batch.row, self.policy.device),
                noise_seed=noise_seed,
                image_ids=to_device(micro_batch.image_ids, self.policy.device),
            )
            rollouts.append(MicroBatchRollout(micro_batch, encoded[texts], steps, self.policy.decode(latents)))
        return Rollout(rollouts)

    def train_discriminator(
        self, rollout: Rollout, scored: Scored, iteration: int
    ) -> tuple[UpdatePlan, dict[str, float]]:
        """Discriminator updates when the schedule says so; generations are remembered for later iterations either
        way."""
        if self.discriminator_trainer is None:
            return UpdatePlan(0, True), {}
        batch = DiscriminatorBatch(
            rollout.image_ids, scored.generated, scored.reference, total=self.config.images_per_iteration
        )
        sides = scored.components["adversary"], scored.reference_rewards
        return self.discriminator_trainer.learn(
            batch,
            sides,
            paired_accuracy(*sides, self.config.rollout.group_size),
            iteration,
            optimizer_steps=self.config.update.minibatches,
            agree=lambda numbers: self.distributed.gather_json(numbers)[0],
            gather=self.distributed.all_gather,
        )

    def update(self, rollout: Rollout, scored: Scored, table: StepTable) -> dict[str, float]:
        """Advantages, then one optimizer step and one EMA step per minibatch."""
        config = self.config
        image_ids = torch.arange(config.images_per_iteration, device=scored.rewards.device)
        result = group_advantages(
            scored.rewards,
            image_ids // config.rollout.group_size,
            std=config.advantage.std,
            eps=config.advantage.eps,
            clip=config.advantage.clip,
        )
        windows = config.update.minibatches
        reports = []
        if config.update.old_log_prob != "rollout":
            reweighed = self.updater.reweigh(self._pieces(rollout.micro_batches, "reweigh: micro-batch"), table)
        for window in range(windows):
            micro_batches = self._pieces(
                [t for t in rollout.micro_batches if t.micro_batch.minibatch == window], "update: micro-batch"
            )
            total = config.images_per_iteration // windows
            part = self.updater.accumulate(micro_batches, result.advantages, table, total=total, watch_kl=window == 0)
            mismatch = part.max_mismatch()
            norm = self.updater.step(mismatch if window == 0 else None)
            reports.append(torch.cat([part.sums(), torch.stack([mismatch, norm]).double()]))
        return {
            "zero_std_fraction": float(result.zero_std_fraction),
            **self._update_metrics(torch.stack(reports)),
            **(self._reweighed_metrics(reweighed) if config.update.old_log_prob != "rollout" else {}),
        }

    def _update_metrics(self, reports: torch.Tensor) -> dict[str, float]:
        """Metrics of [minibatches, 8] local reports: the one place where the update waits for the device.

        Raises:
            LogProbMismatchError, FloatingPointError: see `Updater.check`; nothing was stepped.
        """
        everywhere = self.distributed.all_gather(reports[None]).cpu()  # [processes, windows, 8]
        sums, mismatch, norms = everywhere[..., :6].sum(0), everywhere[:, 0, 6].max().item(), everywhere[0, :, 7]
        self.updater.check(mismatch, norms.tolist(), self.iteration)
        loss, ratio, clipped, kl, pairs, kl_pairs = sums.sum(0).tolist()
        return {
            "log_prob_mismatch_max": mismatch,
            "grad_norm": norms.mean().item(),
            "policy_loss": loss / pairs,
            "kl": kl / kl_pairs,
            "ratio_mean": ratio / pairs,
            "clip_fraction": clipped / pairs,
            "pre_update_clip_fraction": (sums[0, 2] / sums[0, 4]).item(),
        }

    def _reweighed_metrics(self, sums: torch.Tensor) -> dict[str, float]:
        """How far the rollout's policy was from the trainer's (update.old_log_prob)."""
        gap, weight, capped, pairs = self.distributed.all_gather(sums[None]).sum(0).tolist()
        return {
            "log_prob_mismatch_mean": gap / pairs,
            "importance_weight_mean": weight / pairs,
            "importance_capped_fraction": capped / pairs,
        }

    def monitor_metrics(
        self,
        metrics: dict[str, float],
        iteration: int,
        rollout: Rollout | None = None,
        scored: Scored | None = None,
    ) -> dict[str, float]:
        """Judge the iteration if it is due: sets `flags` and returns the statistics that they rest on.

        Without a rollout there are no images to look at.
        """
        if not self.monitor.due(iteration):
            return {}
        group_size, images = self.config.rollout.group_size, None
        if rollout is not None:
            images = measure(rollout, scored.embeddings, self.reference_statistics, group_size, self.distributed)
        rms = None  # of the gradient as Adam sees it: clipped, over all trained elements
        if metrics["grad_norm"] is not None:
            elements = sum(p.numel() for _, p in self.policy.trainable_parameters())
            rms = min(metrics["grad_norm"], self.config.update.max_grad_norm) / elements**0.5
        statistics = {**(images.metrics() if images else {}), "monitor_gradient_rms": rms}
        if rollout is not None and self._merge_error is not None:
            statistics["monitor_merge_error"] = self._merge_error.item()
        self.flags = self.monitor.check({"iteration": iteration, **metrics, **statistics}, images)
        return statistics

    def state(self) -> tuple[dict[str, torch.Tensor], dict]:
        """Everything the next iteration depends on, as tensors and JSON; the same on every process."""
        optimizer_tensors, optimizer_state = pack_optimizer(self.updater.optimizer, "optimizer")
        tensors = {
            **{f"policy.{name}": p.detach() for name, p in self.policy.trainable_parameters()},
            **{f"ema.{name}": t for name, t in self.ema.state_dict().items()},
            **optimizer_tensors,
        }
        steps = {"iteration": self.iteration, "global_step": self.ema.global_step}
        state = {**steps, "optimizer": optimizer_state, "monitor": self.monitor.state()}
        if self.discriminator_trainer is not None:
            head_tensors, head_state = self.discriminator_trainer.state()
            tensors |= head_tensors
            state |= head_state
        return tensors, {"trainer": state}

    def load(self, tensors: dict[str, torch.Tensor], state: dict) -> None:
        """Continue from `state()`'s result as if never stopped.

        Raises:
            UserError: it is not this run's, or not finite; see `restoring.check`. Nothing was changed.
        """
        found = restoring.check(self, tensors, state)
        with torch.no_grad():
            for name, parameter in self.policy.trainable_parameters():
                parameter.copy_(found.policy[name])
        self.ema.load_state_dict(found.ema)
        self.updater.optimizer.load_state_dict(found.optimizer)
        if self.discriminator_trainer is not None:
            found.head.apply(self.discriminator_trainer)
        self.monitor.load(found.monitor)
        self.flags = self.monitor.active()
        self.iteration, self.ema.global_step = found.iteration, found.global_step


# An iteration that trains only the head (schedule "alternate") has no generator metrics.
_NO_UPDATE: dict[str, float | None] = dict.fromkeys(
    (
        "zero_std_fraction",
        "policy_loss",
        "kl",
        "ratio_mean",
        "clip_fraction",
        "pre_update_clip_fraction",
        "log_prob_mismatch_max",
        "grad_norm",
    )
)
