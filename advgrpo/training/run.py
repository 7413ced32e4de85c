"""A training run: what it needs before work starts, its loop, and what it leaves in the output folder."""

from __future__ import annotations

import json
import logging
import os
import platform
import sys
import time
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console

from advgrpo import config as configuration
from advgrpo.adversary.build import build_adversary
from advgrpo.config import Config
from advgrpo.data.prompt_lengths import cut_prompts
from advgrpo.data.sources import Sources
from advgrpo.engine.engine import check_reachable
from advgrpo.errors import RunFailure, UserError
from advgrpo.evaluation.evaluator import Evaluator
from advgrpo.plan.advice import advice
from advgrpo.plan.work import badly_shared
from advgrpo.policy.base import LoraReader
from advgrpo.policy.parts import Parts, parts_of
from advgrpo.policy.pipelines import pipeline_folder
from advgrpo.report.band import band_of
from advgrpo.report.page import REPORT_FILE, write_report
from advgrpo.report.run_files import RunFiles
from advgrpo.reporting.display import Display
from advgrpo.reporting.evaluations import (
    EVALUATIONS_FILE,
    Evaluated,
    comparable,
    gains,
    load_evaluations,
    record_evaluation,
)
from advgrpo.reporting.metric_names import FIRST, half_widths, held_out_means, with_interval
from advgrpo.reporting.plots import HeldOut, draw_curves, draw_grid
from advgrpo.reporting.trackers import RunInfo, Trackers, choose
from advgrpo.reporting.tracking import METRICS_FILE, RunLog, load_metrics, plain
from advgrpo.runtime import checkpoint as checkpoints
from advgrpo.runtime.allocator import keep_freed_memory
from advgrpo.runtime.atomic import clean, move_aside, write_atomically, write_folder_atomically
from advgrpo.runtime.distributed import SLOW_SECONDS, Distributed
from advgrpo.runtime.folders import FolderLock, writable
from advgrpo.runtime.graphs import CudaGraphs
from advgrpo.runtime.mesh import Mesh
from advgrpo.runtime.watch import StopRequested
from advgrpo.training import best as best_of
from advgrpo.training.best import Best
from advgrpo.training.build import (
    blind_spots,
    build_early_rewards,
    build_metrics,
    build_observer,
    build_policy,
    build_scorer,
    build_trainer,
    check_prompts,
)
from advgrpo.training.callbacks import Callback, Callbacks, Stage
from advgrpo.training.fast import FastPaths, least_memory_gb
from advgrpo.training.model_card import CARD, RunFacts, newest_grid, write_card, write_samples
from advgrpo.training.preflight import preflight
from advgrpo.training.resuming import JUDGED_ON, SUMMARY_FILE, Resume, Resuming, Saved, differences, made_from
from advgrpo.training.state_in_parts import save_in_parts
from advgrpo.training.stopping import Keeper, signals_stop
from advgrpo.training.trainer import Trainer
from advgrpo.types import Flag

logger = logging.getLogger(__name__)
CONFIG_FILE = "config.yaml"
# What is longest in watch.seconds_to_the_end, and as much again: a machine that is cut off ends its processes itself.
LAST_START_SECONDS = 120.0


def prepare_output(folder: Path) -> None:
    """Create the output folder and prove that it can be written to."""
    writable(folder, "output_dir")


class Run:
    """Builds every part from the config and drives the iterations; only rank 0 writes."""

    def __init__(
        self,
        config: Config,
        distributed: Distributed,
        *,
        resume: Resume | Literal["auto"] | bool = False,
        console: Console,
        callbacks: Iterable[Callback] = (),
    ):
        """`resume`: which checkpoint to go on from; True is the newest in the output folder, False a new run. What
        `callbacks` are told, and when, they say themselves.

        Raises:
            UserError: whatever is wrong with settings, files, models or the checkpoint, or another run in the folder.
        """
        self.config, self.distributed, self.console = config, distributed, console
        self.display = Display(console)
        self.callbacks = Callbacks(callbacks if distributed.is_main else ())
        self.folder = Path(config.output_dir)
        self.nothing_left = ""  # why the run is done already; then nothing is loaded
        self.base: dict[str, float] = {}
        self.start: dict[str, float] = {}  # of the LoRA that model.lora.start_from names
        self.samples: dict[str, list] = {}
        self.unlogged: dict | None = None  # metrics of the newest iteration, while its evaluation is not done
        self.best: Best | None = Best(keep) if (keep := config.evaluation.keep_best) else None
        self.stopped = ""  # why the run ended early
        self.stopped_by_others = False  # at the wish of other processes than this one
        self._asked = ""  # why a callback wants the end
        self._measured_on_other = ""  # what earlier evaluations depended on and is no longer what it was
        self._monitor_knows_beginning = False  # although it has to be evaluated again
        self.parts: Parts | None = None  # how the trained weights lie on the processes, where no one has them all
        self.trackers = Trackers([], self.display.print_line)
        self._lock: FolderLock | None = None
        try:
            self._prepare(Resume.of(resume))
        except BaseException:
            self.close()
            raise

    def _prepare(self, resume: Resume) -> None:
        """From settings to a trainer that stands where the run goes on."""
        config, distributed = self.config, self.distributed
        configuration.check(config)
        for refused in (configuration.no_sequence_groups, configuration.unevenly_sharded):
            if reason := refused(config, distributed.world_size):
                raise UserError(reason)
        with distributed.monitored("read prompts and references", at_most_seconds=SLOW_SECONDS):
            sources = Sources.read(
                config, check=partial(check_prompts, config), rank=distributed.rank, world_size=distributed.world_size
            )
        with distributed.monitored("wait for the output folder", at_most_seconds=2 * LAST_START_SECONDS):
            if distributed.is_main:
                self._take_the_folder()
        resuming = Resuming(config, self.folder, distributed, resume, self.console)
        saved = resuming.choose()
        with distributed.monitored("look whether anything is left to do", at_most_seconds=SLOW_SECONDS):
            done = resuming.done(saved, sources) if distributed.is_main else ""
        self.nothing_left = distributed.gather_json(done)[0]
        if self.nothing_left:
            resuming.tell(saved)
            return
        preflight(config)
        check_reachable(config, distributed)
        keep_freed_memory(distributed.device)
        free_gb = least_memory_gb(distributed)
        fast = FastPaths.choose(config, distributed.device, processes=distributed.world_size, free_gb=free_gb)
        if distributed.is_main:
            fast.print(self.console)
            if uneven := badly_shared(config, distributed.world_size):
                self.console.print(f"note: {uneven}", soft_wrap=True)
            if config.model.offload != "none" and distributed.device.type == "cpu":
                self.console.print(f"note: model.offload = {config.model.offload!r} changes nothing on a CPU")
            if config.rollout.decode_stream != "main" and distributed.device.type == "cpu":
                self.console.print(
                    "note: rollout.decode_stream = 'side' changes nothing on a CPU, which has no streams"
                )
        with distributed.monitored("hash what the run is made from", at_most_seconds=SLOW_SECONDS):
            self.made_from = made_from(config, sources) if distributed.is_main else {}
        changed = self._changed(resuming, saved)
        with distributed.monitored("load the models", at_most_seconds=SLOW_SECONDS):
            self.trainer, self.evaluator = self._build(sources, fast)
        while saved is not None and (reason := self._misfit(saved)):
            saved = resuming.next(saved, reason)
            changed = self._changed(resuming, saved)
        resuming.tell(saved)
        self.resumed = saved is not None
        if saved is not None:
            self._restore(saved, changed)
        newest = self.trainer.iteration if self.resumed else None
        write = weakref.WeakMethod(self._write_checkpoint)  # a cycle would keep the lock of a run nobody holds any more
        self.parts = parts_of(self.trainer.policy)
        self.keeper = Keeper(
            lambda tensors, state: write()(tensors, state),
            self.trainer,
            distributed,
            newest,
            alone=self.parts is None,
        )

    def close(self) -> None:
        """Let another run have the output folder; `train` does it at its end."""
        if self._lock is not None:
            self._lock.release()

    def _build(self, sources: Sources, fast: FastPaths) -> tuple[Trainer, Evaluator]:
        config, distributed = self.config, self.distributed
        self.cut_prompts = self._tell_of_prompts(sources) if distributed.is_main else {}
        early = build_early_rewards(config, sources, distributed)  # first: what is wrong with one is found at once
        policy = build_policy(config, sources, distributed, fast, self.display)
        distributed.progress("load the adversary", within_seconds=SLOW_SECONDS)
        adversary = (
            build_adversary(config.adversary, device=distributed.device, seed=config.seed)
            if config.learns_adversary
            else None
        )
        distributed.progress("load what judges images", within_seconds=SLOW_SECONDS)
        observer = build_observer(config, adversary, distributed.device)
        if unseen := blind_spots(config, observer):
            self.console.print(unseen, highlight=False)
        metrics = build_metrics(config, sources, observer, distributed, early)
        trainer = build_trainer(
            config,
            policy,
            sources.prompts,
            sources.references,
            lambda: build_scorer(config, sources, adversary, observer, distributed, early),
            distributed,
            fast,
            CudaGraphs(distributed.device) if fast.graphs else None,
        )
        evaluator = Evaluator(
            policy,
            metrics,
            sources.references,
            sources.held_out,
            config.evaluation,
            config.rollout.micro_batch,
            config.seed,
            distributed,
            self.display,
            together=config.model.is_sharded(distributed.world_size),
            mesh=Mesh.of(distributed, config.model.sequence_parallel),
        )
        return trainer, evaluator

    def _take_the_folder(self) -> None:
        """Of this process alone from now on; torchrun's last start of the job may take a minute to leave it."""
        prepare_output(self.folder)
        patience = LAST_START_SECONDS if self.distributed.started_by_torchrun else 0.0
        self._lock = FolderLock(self.folder, "output_dir", patience)
        for folder in (self.folder, self.folder / "samples", self.folder / "lora"):
            clean(folder)

    def _tell_of_prompts(self, sources: Sources) -> dict[str, int]:
        """Print what becomes of prompts that nobody would notice; {tokenizer: how many it cuts} for the summary."""
        lines = sources.notes(self.config)
        model, prompts = self.config.model, [*sources.prompts, *sources.held_out]
        cut = cut_prompts(pipeline_folder(model.path), prompts, model.max_sequence_length)
        lines += [each.describe(len(prompts)) for each in cut]
        for line in lines:
            self.console.print(f"note: {line}", soft_wrap=True)
        return {name: len(each.prompts) for each in cut for name in each.tokenizers}

    def train(self) -> None:
        """Train until trainer.finished; on SIGTERM, SIGINT, SIGHUP or the monitor's wish save a checkpoint and return.

        After it `stopped` says why the run ended early; it is empty where it did not.
        """
        try:
            if self.nothing_left:
                self.console.print(self.nothing_left, soft_wrap=True)
                return
            with signals_stop(self.distributed):
                try:
                    self._train()
                    self._finish()
                except StopRequested as reason:
                    self.stopped, self.stopped_by_others = str(reason), self.distributed.stopped_by_others
                    self._stop()
        finally:
            self._finish_trackers()
            self.close()

    def _train(self) -> None:
        config, trainer, main = self.config, self.trainer, self.distributed.is_main
        if main:
            self._clear_the_way()
        self._start_trackers()
        if not self.base:
            if main and self._measured_on_other and self.evaluator.prompts:
                self._set_evaluations_aside()
            self.base = self._evaluate_base()
        if not self.start:
            self.start = self._evaluate_start()
        self._draw_samples("base", self.base)
        log = RunLog(
            self.folder,
            total_iterations=config.iterations,
            start_iteration=self._first_to_log,
            is_main=main,
            trackers=self.trackers,
            display=self.display,
        )
        self.distributed.stops_together = self.parts is not None
        with log, self.keeper.at_failure():
            while self.unlogged is not None or not self._at_end:
                if self.unlogged is None:
                    self.unlogged = plain(self._iterate())
                self._log(log)
                wanted = self.distributed.stop_reason if self.parts is not None else ""
                reasons = self.distributed.gather_json(wanted or _flagged_to_stop(trainer.flags) or self._asked)
                flagged = [text for text in reasons if text]
                every = config.output.checkpoint_every
                if flagged or self._at_end or (every and trainer.iteration % every == 0):
                    log.sync()
                    self.save()
                if flagged and not self._at_end:
                    self._stop_together()
                    raise StopRequested(flagged[0])
            self.distributed.stops_together = False
            if main and self._ended_early:
                self.display.print_line(f"ended after iteration {trainer.iteration}: {self._ended_early}")

    @property
    def _ended_early(self) -> str:
        """Why the run is at its end before it has its length: nothing better has come for long; "" while it is not."""
        if self.best is None or self.trainer.finished:
            return ""
        return best_of.ended_early(self.best.state(), self.config.evaluation)

    @property
    def _at_end(self) -> bool:
        return self.trainer.finished or bool(self._ended_early)

    @property
    def _first_to_log(self) -> int:
        return self.trainer.iteration - (self.unlogged is not None)

    def _start_trackers(self) -> None:
        """On process 0 alone: what it waits for must not look like hanging."""
        if not self.distributed.is_main:
            return
        config, output = self.config, self.config.output
        self.trackers = Trackers(choose(output), self.display.print_line)
        self.distributed.progress("start the trackers", within_seconds=SLOW_SECONDS)
        self.trackers.start(
            RunInfo(
                folder=self.folder,
                settings=config.model_dump(mode="json"),
                name=output.run_name or self.folder.resolve().name,
                resumed=self.resumed,
                start_iteration=self._first_to_log,
                group=output.group,
                tags=output.tags,
            )
        )

    def _finish_trackers(self) -> None:
        if self.distributed.is_main:
            self.distributed.progress("finish the trackers", within_seconds=SLOW_SECONDS)
            self.trackers.finish()

    def _log(self, log: RunLog) -> None:
        """Record the newest iteration, after an evaluation if one is due; cut short, both are done on resuming."""
        metrics, done, every = self.unlogged, self.trainer.iteration, self.config.evaluation.every
        if not self.trainer.finished and every and done % every == 0:
            found = self._evaluate("during")
            self.callbacks.on_evaluation("during", found, done)
            metrics = metrics | found | self._count_in(found)
            self._draw_samples(f"iteration-{done:06d}", found)
        log.log(metrics, self.trainer.flags)
        self.unlogged = None
        if not self.trainer.finished and every and done % every == 0 and self.evaluator.prompts:
            self._write_report()
        self._asked = self.callbacks.on_iteration(metrics, self.trainer.flags) or ""

    def _count_in(self, found: dict[str, float]) -> dict[str, float | int | None]:
        """An evaluation among those of which the best is kept; what there is to record of them."""
        if self.best is None or not found:
            return {}
        before, done = self.best, self.trainer.iteration
        self.best = before.after(found, done, self.trainer.ema.state_dict())
        if self.best.found_at(done) and self.distributed.is_main:
            self._write_best()
            than = "" if before.value is None else f", {before.value:.4f} at iteration {before.iteration} before"
            self.display.print_line(
                f"iteration {done}: {self.best.metric} {self.best.value:.4f} is the best so far{than}; kept in "
                f"{best_of.FOLDER}"
            )
        return self.best.record()

    def _write_best(self) -> None:
        """OUT/lora-best with the weights of the best evaluation so far."""
        policy, best = self.trainer.policy, self.best
        with self.trainer.averaged(best.weights):
            write_folder_atomically(self.folder / best_of.FOLDER, lambda folder: policy.export(folder, best.header()))

    def _stop_together(self) -> None:
        """Where the end needs all processes: what `_stop` leaves to one, while they are all here."""
        if self.parts is not None:
            self.export()
            self.distributed.stops_together = False
            self.distributed.check_stop()

    def _stop(self) -> None:
        """Leave a run that ends early so that it can be continued: on rank 0 alone, the others may be gone."""
        if not self.distributed.is_main:
            return
        if self.keeper.began:
            before = self.keeper.saved
            self.keeper.keep()
            self.trainer.abandon()
            if self.keeper.saved != before:
                self._tell_of_checkpoint()
        again = "start it again" if self.keeper.saved is None else f"continue with --resume {self.folder}"
        self.console.print(f"stopped by {self.stopped} after {self.trainer.iteration} iterations; {again}")
        if self.keeper.began and not self._at_end:  # last: whoever stops a run does not wait for long
            if self.parts is None:
                self.export()
            self._write_card({})
            self._draw_curves({})
            self._write_report()

    def _iterate(self) -> dict:
        """One iteration; running out of GPU memory names the knob to turn."""
        try:
            return self.trainer.iterate()
        except torch.cuda.OutOfMemoryError as error:
            raise UserError(advice(error, self.config, processes=self.distributed.world_size)) from error

    def _evaluate(self, stage: Stage) -> dict[str, float]:
        """Held-out metrics of the averaged weights, or of the base model; empty without held-out prompts.

        At the ends of the run over all images, and apart from it over each prompt's first ones, the only ones that are
        evaluated in between.
        """
        if not self.evaluator.prompts:
            return {}
        evaluation = self.config.evaluation
        during = evaluation.during_images_per_prompt
        count, first = (during, 0) if stage == "during" else (evaluation.images_per_prompt, during)
        if stage == "base":
            scores = self.evaluator.base().scores(count)
        else:
            with self.trainer.averaged(self._weights_of_start() if stage == "start" else None):
                scores = self.evaluator.scores(count)
        found = self.evaluator.means(scores, first=first)
        by_prompt = {name: values[:, :during].mean(1).tolist() for name, values in scores.items()}
        of_all = {name: values.mean(1).tolist() for name, values in scores.items()} if count > during else {}
        self._judge(stage, found, by_prompt, of_all)
        return found

    def _weights_of_start(self) -> Mapping[str, torch.Tensor] | None:
        """Of `model.lora.start_from`, where a resumed run has others already; None: the averages are these."""
        if not self.resumed:
            return None
        policy, field = self.trainer.policy, "model.lora.start_from"
        if not isinstance(policy, LoraReader):
            raise UserError(f"{field}: a {type(policy).__name__} reads no LoRA")
        return policy.parameters_of_lora(Path(self.config.model.lora.start_from), field)

    def _judge(
        self,
        stage: Stage,
        found: dict[str, float],
        by_prompt: dict[str, list[float]],
        of_all: dict[str, list[float]],
    ) -> None:
        """What the monitor makes of an evaluation, and its line in OUT/evaluations.jsonl.

        A LoRA that the run starts from is what its training is compared with, not the base model.
        """
        trainer = self.trainer
        done = trainer.iteration if stage in ("during", "final") else 0  # a resumed run may have to judge the base anew
        levels = trainer.monitor.levels() if done else {}
        begins = stage == ("start" if self.config.model.lora.start_from else "base")
        known = self._monitor_knows_beginning or not begins
        if done or not known:
            trainer.flags = trainer.monitor.evaluated(done, by_prompt)
        if self.distributed.is_main:
            during = self.config.evaluation.during_images_per_prompt
            line = Evaluated(stage, done, during, found, by_prompt, levels, of_all)
            since = trainer.iteration if stage in ("base", "start") and self.resumed else -1
            self._say_outside(record_evaluation(self.folder / EVALUATIONS_FILE, line, done=since))

    def _set_evaluations_aside(self) -> None:
        """Evaluations on other content than that of now: none that is to come can be compared with them."""
        file = self.folder / EVALUATIONS_FILE
        lines = load_evaluations(file)
        if not lines:
            return
        dropped = ", ".join(f"{line.stage} at {line.iteration}" for line in lines)
        self.console.print(
            f"note: with other content of {self._measured_on_other} earlier evaluations ({dropped}) compare with none "
            f"that is to come: {EVALUATIONS_FILE} is now {move_aside(file).name}, and a new one begins",
            soft_wrap=True,
        )

    def _evaluate_base(self) -> dict[str, float]:
        """The base model: adapters are disabled, so a resumed or LoRA-started run measures the same thing."""
        if not self.evaluator.prompts:
            return {}
        self.display.print_line(f"evaluating the base model on {len(self.evaluator.prompts)} held-out prompts")
        base = self._evaluate("base")
        self.console.print(f"base model: {_shown(base)}")
        self.callbacks.on_evaluation("base", base, self.trainer.iteration)
        return base

    def _evaluate_start(self) -> dict[str, float]:
        """The LoRA the run starts from, on the same noise as the base model; a resumed run reads it again."""
        start = self.config.model.lora.start_from
        if not start or not self.evaluator.prompts:
            return {}
        self.console.print(f"evaluating {start}")
        found = self._evaluate("start")
        self.console.print(f"start: {_shown(found)}")
        self.callbacks.on_evaluation("start", found, self.trainer.iteration)
        return found

    def _finish(self) -> None:
        """Export, final evaluation, images and summary."""
        final = self._evaluate("final")
        if final:
            self.callbacks.on_evaluation("final", final, self.trainer.iteration)
            self._count_in(final)
        self._draw_samples("final", final)
        if self.parts is not None or self.distributed.is_main:
            self.export()
        if not self.distributed.is_main:
            return
        rows = self._draw_curves(final)
        summary = summarize(self.config, rows, self.base, final, self.start, iterations=self.trainer.iteration)
        gained = gains(load_evaluations(self.folder / EVALUATIONS_FILE))
        summary["gain"] = {name: asdict(interval) for name, interval in gained.items()}
        summary["prompts_cut_by"] = self.cut_prompts
        if self.best is not None:
            summary |= self._best_for_summary()
        self._tell_trackers(final)
        self._write_card(summary)
        self._write_summary(summary)
        self._write_report()
        if not summary["trained"]:
            self.console.print(f"note: {summary['not_trained_because']}", soft_wrap=True)
        for name in summary["final"]:
            was, now = (with_interval(summary, stage, name) for stage in ("base", "final"))
            gain = f", gain {gained[name].text('+.4f')}" if name in gained else ""
            self.console.print(f"{name}: base {was} -> final {now}{gain}")
        if self.best is not None and self.best.value is not None:
            self.console.print(
                f"best {self.best.metric} {self.best.value:.4f} at iteration {self.best.iteration}: {best_of.FOLDER}"
            )
        self.console.print(f"wrote {self.folder}/lora, samples/, curves.png, summary.json")

    def _best_for_summary(self) -> dict[str, Any]:
        record = {"metric": self.best.metric, **self.best.record()}
        return {"best": record, **({"ended_early": self._ended_early} if self._ended_early else {})}

    def _write_card(self, summary: dict) -> None:
        """README.md beside the LoRA, as the hub reads it; of full fine-tuning none, which is no LoRA."""
        if self.config.model.train != "lora":
            return
        lora = self.folder / "lora"
        write_samples(lora, self.samples.get("trained", []))
        facts = RunFacts.of(self.config, summary, self.trainer.iteration)
        if write_card(lora, facts, newest_grid(self.folder)) is None:
            self.display.print_line(f"note: {lora / CARD} was not written by this program and stays as it is")

    def _write_report(self) -> None:
        """OUT/report.html, of what is on the disk; it is of use to readers alone, so the run goes on without it."""
        if not self.distributed.is_main:
            return
        self.distributed.progress("write the report", within_seconds=SLOW_SECONDS)
        try:
            write_report(self.folder)
        except Exception as error:  # whatever is wrong with a page is no reason to lose what is trained
            name = type(error).__name__
            self.display.print_line(f"WARNING: {REPORT_FILE} could not be written ({name}: {error}); training goes on")

    def _say_outside(self, before: Sequence[Evaluated]) -> None:
        """A run of a recorded preset that is beyond all recorded runs says so, once for each metric."""
        config = self.config
        band = band_of(config)
        if band is None:
            return
        now = load_evaluations(self.folder / EVALUATIONS_FILE)
        files = (RunFiles(self.folder, config, evaluations=lines).held_out() for lines in (before, now))
        known, found = (
            band.outside({n: [(p.iteration, p.value) for p in ps] for n, ps in each.items()}) for each in files
        )
        for outside in found:
            if outside.metric not in {each.metric for each in known}:
                self.display.print_line(f"note: {outside}, with the settings of the preset {band.preset}")

    def _tell_trackers(self, final: dict[str, float]) -> None:
        """The held-out metrics before and after training, which no iteration's record has."""
        stages = {"base": self.base, "final": final}
        ends = {f"{stage}_{name}": v for stage, found in stages.items() for name, v in held_out_means(found).items()}
        if self.best is not None:
            ends |= {name: value for name, value in self.best.record().items() if value is not None}
        self.trackers.log(ends, max(self.trainer.iteration - 1, 0))

    def _write_summary(self, summary: dict) -> None:
        """OUT/summary.json: before the trackers send what is left, which may take minutes, and with what that gave."""
        before = None
        while before != self.trackers.lost:
            before = dict(self.trackers.lost)
            text = json.dumps({**summary, "trackers_lost": before}, indent=2) + "\n"
            write_atomically(self.folder / SUMMARY_FILE, text)
            self._finish_trackers()

    def _draw_curves(self, final: dict[str, float]) -> list[dict]:
        """OUT/curves.png from the metrics so far, which are returned."""
        rows = load_metrics(self.folder / METRICS_FILE)
        evaluation = self.config.evaluation
        counts = evaluation.during_images_per_prompt, evaluation.images_per_prompt
        if rows:  # a damaged file may have held none
            drawn = comparable(rows, load_evaluations(self.folder / EVALUATIONS_FILE))
            draw_curves(drawn, self.folder / "curves.png", HeldOut(self.base, final, *counts))
        return rows

    def export(self) -> None:
        """OUT/lora (after full fine-tuning OUT/transformer, or OUT/unet) with the averaged weights.

        Raises:
            RunFailure: a weight is not finite; nothing is written.
        """
        with self.trainer.averaged():
            policy = self.trainer.policy
            self._refuse_not_finite({f"ema.{name}": p for name, p in policy.trainable_parameters()}, {}, "exported")
            policy.export(self.folder / ("lora" if self.config.model.train == "lora" else policy.component))

    def _draw_samples(self, name: str, scores: dict[str, float]) -> None:
        """OUT/samples/NAME.png: base, trained (but for the base's own grid) and reference images."""
        main = self.distributed.is_main
        with self.distributed.monitored("draw samples"):  # rank 0 draws, the others wait, or draw along where they must
            if not self.evaluator.draws_grid or not self.evaluator.prompts:
                return
            if name == "base":
                self.samples["base"] = self.evaluator.base().grid_images()
            else:
                with self.trainer.averaged():
                    self.samples["trained"] = self.evaluator.grid_images()
            if main:
                self._write_grid(name, scores)

    def _write_grid(self, name: str, scores: dict[str, float]) -> None:
        rows = []
        for number, (prompt, _) in enumerate(self.samples["base"]):
            blocks = [(column, images[number][1]) for column, images in self.samples.items()]
            references = self.evaluator.references
            if references is not None:
                size = tuple(blocks[0][1].shape[-2:])
                blocks.append(("references", references.load_images(references.files(prompt)[:4], size=size)))
            rows.append((prompt, blocks))
        (self.folder / "samples").mkdir(exist_ok=True)
        file = self.folder / "samples" / f"{name}.png"
        draw_grid(rows, file, header=self._heading(name, scores))
        if name != "base":
            self.trackers.images("samples", file, [prompt for prompt, _ in rows], max(self.trainer.iteration - 1, 0))
        elif not self.resumed:  # a resumed run draws it again, and the trackers have it
            self.trackers.images("samples_base", file, [prompt for prompt, _ in rows], 0)

    def _heading(self, name: str, scores: dict[str, float]) -> str:
        """What a grid shows: the run, how far it is, how it was sampled, and what the held-out images score."""
        config, trained = self.config, name != "base"
        stage = f"iteration {self.trainer.iteration} of {config.iterations}" if trained else "base model"
        sampled = f"{config.evaluation.num_steps} steps, guidance {config.evaluation.guidance_scale:g}"
        parts = [self.folder.name, stage, f"seed {config.seed}", sampled]
        during = not any(name.endswith(FIRST) for name in scores)  # then compare with as many images of the base
        base = held_out_means(self.base, first=during)
        for metric, value in held_out_means(scores).items():
            before = f"{base[metric]:.3f} -> " if trained else ""
            parts.append(f"{metric} {before}{value:.3f}")
        return " · ".join(parts)

    def save(self) -> None:
        """Write a checkpoint. What is not in parts is the same on every process, so rank 0 alone writes it.

        Raises:
            RunFailure: something in it is not finite. Nothing is written, and older checkpoints stay.
            UserError: as `save_checkpoint`.
        """
        with self.distributed.monitored("save a checkpoint"):
            if self.parts is not None or self.distributed.is_main:
                self.keeper.save()
            if self.distributed.is_main:
                self._tell_of_checkpoint()

    def _tell_of_checkpoint(self) -> None:
        done = self.keeper.saved
        self.callbacks.on_checkpoint(checkpoints.folder_of(self.folder / "checkpoints", done), done)

    def _write_checkpoint(self, tensors: dict[str, torch.Tensor], state: dict) -> None:
        """Of the trainer's state between two iterations; also called by the thread that watches the other processes."""
        done = state["trainer"]["iteration"]
        # What the newest iteration has found is only part of it once that iteration's changes are.
        unlogged = self.unlogged if self.unlogged and self.unlogged["iteration"] == done - 1 else None
        state = {
            **state,
            "config": self.config.model_dump(mode="json"),
            "base": self.base,
            "start": self.start,
            "unlogged": unlogged,
            "made_from": self.made_from,
        }
        if self.best is not None:
            best = self.best
            state[best_of.STATE] = best.state()
            tensors = tensors | {best_of.TENSORS + name: tensor for name, tensor in best.weights.items()}
        self._refuse_not_finite(tensors, state, "saved")
        root, keep = self.folder / "checkpoints", self.config.output.keep_checkpoints
        if self.parts is None:
            checkpoints.save_checkpoint(root, done, tensors, state, keep)
        else:
            save_in_parts(root, done, tensors, state, keep, self.parts)

    def _refuse_not_finite(self, tensors: dict[str, torch.Tensor], state: dict, what_for: str) -> None:
        name = checkpoints.not_finite(tensors, state)
        if name is None:
            return
        remedy = "Look at the last rows of metrics.jsonl"
        if name in tensors:
            part = "adversary" if name.startswith(("head", "replay")) else "update"
            remedy = f"Start again with a lower {part}.learning_rate"
        latest = checkpoints.latest_checkpoint(self.folder / "checkpoints")
        kept = f"; {latest} is as it was" if latest else ""
        raise RunFailure(
            f"after {self.trainer.iteration} iterations {name} is not finite, so nothing was {what_for}{kept}. {remedy}"
        )

    def _changed(self, resuming: Resuming, saved: Saved | None) -> tuple[str, ...]:
        """What of the run's data is not what it was at the checkpoint, by consent; the same on every process."""
        looks = saved is not None and self.distributed.is_main
        changed = resuming.refuse_changes(saved, self.made_from) if looks else ()
        return tuple(self.distributed.gather_json(changed)[0])

    def _misfit(self, saved: Saved) -> str:
        """Take the checkpoint over, or say why it does not fit: then no process has taken anything.

        What process 0 finds counts on all; where each has its rows, what any finds.
        """
        reason, restored, best = "", None, None
        own = {name: t for name, t in saved.tensors.items() if not name.startswith(best_of.TENSORS)}
        parameters = dict(self.trainer.policy.trainable_parameters())
        try:
            best = self.best and Best.read(self.best.metric, saved.tensors, saved.state, parameters)
            restored = self.trainer.checked(own, saved.state)
        except UserError as error:
            reason = str(error)
        found = self.distributed.gather_json(reason)
        if decided := next(filter(None, found if parts_of(self.trainer.policy) is not None else found[:1]), ""):
            return decided
        if restored is None:
            raise UserError(f"checkpoint {saved.path}: {reason}")
        self.trainer.take(restored)
        self.best = best
        return ""

    def _restore(self, saved: Saved, changed: tuple[str, ...]) -> None:
        """What the trainer does not know; it has been loaded."""
        self._measured_on_other = ", ".join(sorted(JUDGED_ON.intersection(changed)))
        known = {} if self._measured_on_other else dict(saved.state)
        if "start" in changed:
            known.pop("start", None)
        for stage in ("base", "start"):  # those of an older program may lack metrics: then evaluated again
            values = known.get(stage, {})
            setattr(self, stage, values if self.evaluator.names() <= values.keys() else {})
        begins = "start" if self.config.model.lora.start_from else "base"
        self._monitor_knows_beginning = bool(known.get(begins)) and not getattr(self, begins)
        if self._measured_on_other and self.best is not None:
            self.best = Best(self.best.metric)  # the next evaluation is the first of those that can be compared
        self.unlogged = saved.state.get("unlogged")
        self.console.print(f"resumed {self.folder} at iteration {self.trainer.iteration}", soft_wrap=True)
        if not self.distributed.is_main or not (self.folder / CONFIG_FILE).exists():
            return
        try:
            first = configuration.load(file=self.folder / CONFIG_FILE).model_dump(mode="json")
        except UserError as error:
            self.console.print(f"note: {error}; the checkpoint's settings count", soft_wrap=True)
            return
        other = differences(first, self.config.model_dump(mode="json"), free=("output_dir",))
        if other:
            self.console.print(f"note: since {CONFIG_FILE} was written: {'; '.join(other)}", soft_wrap=True)

    def _clear_the_way(self) -> None:
        """Files of a future that does not come, and the settings of a run that begins; rank 0 calls it."""
        if not self.resumed or not (self.folder / CONFIG_FILE).exists():
            write_atomically(self.folder / CONFIG_FILE, configuration.dump(self.config))
        if self.resumed:
            checkpoints.set_later_aside(self.folder / "checkpoints", self.trainer.iteration)
        self._restore_best()
        if not self._at_end:
            (self.folder / SUMMARY_FILE).unlink(missing_ok=True)

    def _restore_best(self) -> None:
        """OUT/lora-best as it was when the run was here: what is there may be of a future that does not come, or the
        best of evaluations that none to come is compared with."""
        if self.best is not None and self.best.value is not None:
            self._write_best()
        elif self.best is not None and (self.folder / best_of.FOLDER).exists():
            moved = move_aside(self.folder / best_of.FOLDER)
            why = "is of a later iteration than the run goes on from"
            if self._measured_on_other:
                why = f"was the best with other content of {self._measured_on_other}"
            self.display.print_line(f"{best_of.FOLDER} {why}: now {moved.name}")


def _flagged_to_stop(flags: list[Flag]) -> str:
    """Why the monitor ends the run; empty while it does not."""
    names = ", ".join(flag.name for flag in flags if flag.stop)
    return f"the monitor (monitor.stop names {names}; leave it out to go on)" if names else ""


def _shown(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in held_out_means(values).items())


def summarize(
    config: Config,
    rows: list[dict],
    base: dict[str, float],
    final: dict[str, float],
    start: dict[str, float],
    *,
    iterations: int,
) -> dict:
    """What OUT/summary.json holds: held-out metrics before and after, speed, versions, seed.

    `rows` are the records of metrics.jsonl, from which iterations may be missing: then speed is that of the others.
    "start" are those of the LoRA the run started from, where there was one; "ci95" holds half the width of every
    metric's 95 % interval over prompts. `Run` adds "gain", each metric's end less the base model's, paired by prompt.
    """
    stages = {"base": base, **({"start": start} if start else {}), "final": final}
    timed = [row["seconds"] for row in rows if isinstance(row.get("seconds"), (int, float))]
    per_second = len(timed) / sum(timed) if sum(timed) else None
    missing = len(rows) < iterations
    reason = configuration.untrained(config) or ("" if missing else _untrained(rows, config.objective.loss))
    return {
        "seed": config.seed,
        "iterations": iterations,
        "trained": not reason,
        **({"not_trained_because": reason} if reason else {}),
        **{stage: held_out_means(values) for stage, values in stages.items()},
        "ci95": {stage: half_widths(values) for stage, values in stages.items()},
        "images_per_second": per_second and per_second * config.images_per_iteration,
        "iterations_per_second": per_second,
        "training_seconds": sum(timed),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": {
            "platform": platform.platform(),
            "cpus": os.cpu_count(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "versions": versions(),
    }


def _untrained(rows: list[dict], loss: str) -> str:
    """Why the generator is as it was, although the settings could have trained it; "" where it was trained."""
    if any(row.get(loss) is not None for row in rows):
        return ""
    return "no iteration trained the generator: the adversary was fooled, and trained, in each (adversary.schedule)"


def versions() -> dict[str, str]:
    """Of what decides about numbers, for files that hold results."""
    import diffusers
    import peft
    import transformers

    modules = {"torch": torch, "diffusers": diffusers, "transformers": transformers, "peft": peft}
    return {"python": sys.version.split()[0], **{name: module.__version__ for name, module in modules.items()}}
