"""Making the runs of the experiments: each in a folder of its own, kept when finished, continued when cut short.

A run's folder holds what every run leaves (run.py), and `samples.safetensors` (the grids' images, for the report),
`judged/` (judging.py), `log.txt`, `origin.txt` (when the run it starts from was finished), and `failure.txt` while its
last attempt failed.
"""

from __future__ import annotations

import json
import shutil
import time
import traceback
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from advgrpo import config as configuration
from advgrpo.config import Config
from advgrpo.errors import UserError
from advgrpo.evaluation.judging import TinyWitness
from advgrpo.experiments.judging import Judged, Judging, Subject, judge, missing, read
from advgrpo.experiments.plan import Job, settings
from advgrpo.reporting.display import Display
from advgrpo.runtime.atomic import write_atomically
from advgrpo.runtime.checkpoint import latest_checkpoint
from advgrpo.runtime.distributed import Distributed
from advgrpo.training.run import Run

_SAMPLES, _ORIGIN, _FAILURE = "samples.safetensors", "origin.txt", "failure.txt"


class Stopped(Exception):
    """A run ended early, by a signal or its monitor; calling again continues it."""


@dataclass(frozen=True)
class Finished:
    """What a finished run says, or, with an empty summary, what the base model's judging does."""

    summary: dict  # run.summarize
    config: Config


@dataclass(frozen=True)
class Plan:
    """Where runs are made, how long they are, what they are judged on, and what is laid over every arm."""

    work: Path
    iterations: int
    judging: Judging
    file: Path | None = None

    def folder(self, job: Job) -> Path:
        return job.folder(self.work)

    def config(self, job: Job) -> Config:
        return settings(job, self.work, self.iterations, self.file)

    def finished(self, job: Job) -> Finished | None:
        """The run's results if it is trained with exactly these settings, from the present start, and judged."""
        if not self.trained(job) or missing(self.subject(job), self.judging):
            return None
        return Finished((self._summary(job) or {}) if job.made.trains else {}, self.config(job))

    def trained(self, job: Job) -> bool:
        """Whether nothing is left but to judge it."""
        if not job.made.trains:
            return True
        return self._summary(job) is not None and (self.folder(job) / _SAMPLES).is_file() and self.same_origin(job)

    def subject(self, job: Job) -> Subject:
        """Whom the judge looks at."""
        lora = self.folder(job) / "lora" if job.made.trains else None
        return Subject(self.folder(job) / "judged", self.config(job), lora)

    def judged(self, job: Job) -> dict[str, dict[float, Judged]]:
        """What the judge saw of a finished run: prompt list -> guidance scale -> numbers."""
        subject = self.subject(job)
        scales = self.judging.guidance_scales
        return {name: {scale: read(subject, name, scale) for scale in scales} for name in self.judging.prompts}

    def origin_stamp(self, job: Job) -> str:
        """When the run that `job` starts from was finished; UserError if it is not."""
        if job.origin is None:
            return ""
        summary = self._summary(job.origin)
        if summary is None:
            raise UserError(f"{job} starts from {job.origin}, which is not finished")
        return summary["finished"]

    def same_origin(self, job: Job) -> bool:
        """Whether what lies in the run's folder started from the LoRA that is there now."""
        file = self.folder(job) / _ORIGIN
        return job.origin is None or (file.is_file() and file.read_text() == self.origin_stamp(job))

    def _summary(self, job: Job) -> dict | None:
        folder = self.folder(job)
        if not (folder / "summary.json").is_file():
            return None
        summary = json.loads((folder / "summary.json").read_text())
        saved = configuration.build(configuration.read_yaml(folder / "config.yaml"), str(folder / "config.yaml"))
        wanted = self.config(job)
        same = _comparable(saved) == _comparable(wanted) and summary["iterations"] == wanted.iterations
        return summary if same else None

    def failure(self, job: Job) -> str:
        """Why the run is not there: its last error, or that it was not made."""
        file = self.folder(job) / _FAILURE
        return file.read_text().strip() if file.is_file() else "not made yet, or made with other settings"

    def samples(self, job: Job) -> dict[str, torch.Tensor]:
        """{"base" and "trained": [prompts, images, 3, H, W] float32 in [0, 1]} of the grid's prompts."""
        return {name: images.float() / 255 for name, images in load_file(self.folder(job) / _SAMPLES).items()}


def _comparable(config: Config) -> dict:
    """Without paths that depend on where the runs are kept; what a run starts from is compared by `same_origin`."""
    plain = config.model_dump(mode="json")
    plain["output_dir"] = plain["data"]["cache_dir"] = plain["model"]["lora"]["start_from"] = ""
    plain["update"]["teacher"] = ""
    return plain


def make_all(chains: list[list[Job]], plan: Plan, console: Console) -> list[Job]:
    """Make every run that is not there; returns those that failed.

    Raises:
        Stopped: a run was ended by a signal.
    """
    jobs = [job for chain in chains for job in chain]
    failed: list[Job] = []
    for number, job in enumerate(jobs, 1):
        if plan.finished(job) is not None:
            console.print(f"[{number}/{len(jobs)}] {job}: there already", markup=False)
            continue
        began = time.monotonic()
        error = _attempt(job, plan, failed)
        if error:
            failed.append(job)
            console.print(f"[{number}/{len(jobs)}] {job}: FAILED: {error}", markup=False)
        else:
            console.print(f"[{number}/{len(jobs)}] {job}: {time.monotonic() - began:.0f} s", markup=False)
    return failed


def _attempt(job: Job, plan: Plan, failed: list[Job]) -> str:
    """Make one run; its error, which is also left in the run's folder, or nothing."""
    failure = plan.folder(job) / _FAILURE
    try:
        if job.origin in failed:
            raise UserError(f"it starts from {job.origin}, which failed")
        make(job, plan)
    except Stopped:
        raise
    except Exception as error:  # one arm's error must not cost the others' hours
        text = str(error) if isinstance(error, UserError) else "".join(traceback.format_exception_only(error)).strip()
        failure.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(failure, text + "\n")
        if not isinstance(error, UserError):
            with (failure.parent / "log.txt").open("a") as log:
                log.write("".join(traceback.format_exception(error)))
        return text
    failure.unlink(missing_ok=True)
    return ""


def make(job: Job, plan: Plan) -> None:
    """Train one run to its end, from its last checkpoint if it has one, and have it judged.

    Raises:
        Stopped: it was ended by a signal or its monitor, after saving a checkpoint.
        UserError: bad settings, or a checkpoint made with others.
    """
    folder = plan.folder(job)
    if not plan.trained(job):
        _train(job, plan)
    folder.mkdir(parents=True, exist_ok=True)
    config = plan.config(job)
    with (folder / "log.txt").open("a") as log:
        distributed = Distributed.start(config.device, timeout_seconds=config.collective_timeout)
        try:
            witness = _witness(config.data.cache_dir)
            judge(plan.subject(job), plan.judging, witness, distributed, Display(Console(file=log, width=200)))
        finally:
            distributed.close()


@cache
def _witness(folder: str) -> TinyWitness:
    """One for all runs: it remembers its galleries."""
    return TinyWitness(Path(folder).expanduser())


def _train(job: Job, plan: Plan) -> None:
    config, folder = plan.config(job), plan.folder(job)
    origin = plan.origin_stamp(job)
    resume = latest_checkpoint(folder / "checkpoints") is not None and plan.same_origin(job)
    if not resume and folder.exists():
        shutil.rmtree(folder)  # cut short before its first checkpoint, or its start has been trained anew
    write_atomically(folder / _ORIGIN, origin)
    if resume and not (folder / _SAMPLES).is_file():
        (folder / "summary.json").unlink(missing_ok=True)  # cut short between the two: evaluate and draw again
    with (folder / "log.txt").open("a") as log:
        distributed = Distributed.start(config.device, timeout_seconds=config.collective_timeout)
        try:
            run = Run(config, distributed, resume=resume, console=Console(file=log, width=200))
            run.train()
        finally:
            distributed.close()
    if run.stopped:
        raise Stopped(f"{job} was stopped after {run.trainer.iteration} iterations; call again to continue")
    images = {
        name: torch.stack([(images.clamp(0, 1) * 255).round().byte() for _, images in rows])
        for name, rows in run.samples.items()
    }
    write_atomically(folder / _SAMPLES, lambda file: save_file(images, file))
