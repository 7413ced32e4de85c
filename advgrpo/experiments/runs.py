"""Making the runs of the experiments: each in a folder of its own, kept when finished, continued when cut short.

A run's folder holds what every run leaves (run.py), and `samples.safetensors` (the grids' images, for the report),
`log.txt`, `origin.txt` (when the run it starts from was finished), and `failure.txt` while its last attempt failed.
"""

from __future__ import annotations

import json
import shutil
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from advgrpo import config as configuration
from advgrpo.config import Config
from advgrpo.errors import UserError
from advgrpo.experiments.plan import Job, settings
from advgrpo.runtime.atomic import write_atomically
from advgrpo.runtime.checkpoint import latest_checkpoint
from advgrpo.runtime.distributed import Distributed
from advgrpo.training.run import Run

_SAMPLES, _ORIGIN, _FAILURE = "samples.safetensors", "origin.txt", "failure.txt"


class Stopped(Exception):
    """A run ended early, by a signal or its monitor; calling again continues it."""


@dataclass(frozen=True)
class Finished:
    """What a finished run says."""

    summary: dict  # run.summarize
    config: Config


@dataclass(frozen=True)
class Plan:
    """Where runs are made, how long they are, and what is laid over every arm."""

    work: Path
    iterations: int
    file: Path | None = None

    def folder(self, job: Job) -> Path:
        return job.folder(self.work)

    def config(self, job: Job) -> Config:
        return settings(job, self.work, self.iterations, self.file)

    def finished(self, job: Job) -> Finished | None:
        """The run's results if it is finished with exactly these settings, and from the present start."""
        summary = self._summary(job)
        if summary is None or not (self.folder(job) / _SAMPLES).is_file() or not self.same_origin(job):
            return None
        return Finished(summary, self.config(job))

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
        same = _comparable(saved) == _comparable(self.config(job)) and summary["iterations"] == self.iterations
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
        write_atomically(failure, text + "\n")
        if not isinstance(error, UserError):
            with (failure.parent / "log.txt").open("a") as log:
                log.write("".join(traceback.format_exception(error)))
        return text
    failure.unlink(missing_ok=True)
    return ""


def make(job: Job, plan: Plan) -> None:
    """Train one run to its end, from its last checkpoint if it has one.

    Raises:
        Stopped: it was ended by a signal or its monitor, after saving a checkpoint.
        UserError: bad settings, or a checkpoint made with others.
    """
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
