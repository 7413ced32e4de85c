"""Where a run's numbers and sample grids are shown: TensorBoard, Weights & Biases and trackio behind one protocol.

metrics.jsonl has everything whether or not a tracker works. So one that cannot start stops a new run, which has lost
nothing yet; one that fails later (a network, a full disk), or cannot start where a run goes on, is given up with a
warning that summary.json repeats, and training continues.
"""

from __future__ import annotations

import importlib
import importlib.util
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from advgrpo.errors import UserError, one_line
from advgrpo.runtime.atomic import write_atomically

FINISH_SECONDS = 120  # for what is still to be sent when a run ends
_SHOWN = 300  # characters of an error


@dataclass(frozen=True)
class RunInfo:
    """What a tracker shows of a run besides its numbers."""

    folder: Path  # the output folder, which keeps what a tracker needs to continue its run
    settings: Mapping[str, Any]  # as JSON holds them
    name: str
    resumed: bool = False  # it goes on, and so does what a tracker has of it
    start_iteration: int = 0  # records from here on are new
    group: str = ""
    tags: tuple[str, ...] = ()


class Tracker(Protocol):
    """One place that shows runs. Everything in it may raise: `Trackers` decides what that means."""

    name: str
    setting: str  # what switches it on, for errors

    def start(self, run: RunInfo) -> None:
        """Begin the run, or go on with the same one where `run.resumed`."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Numbers of iteration `step`, from 0. Steps do not fall, but may repeat, and repeat after a resumption."""

    def images(self, name: str, grid: Path, captions: Sequence[str], step: int) -> None:
        """A PNG file with a row of images per caption."""

    def finish(self) -> None:
        """Send what is left, within `FINISH_SECONDS`."""


class TensorBoardTracker:
    """Event files in OUT/tensorboard. Settings, group and tags are texts there, which it has no other place for."""

    name, setting = "tensorboard", "output.tensorboard = true"

    def start(self, run: RunInfo) -> None:
        module = importlib.import_module("torch.utils.tensorboard")
        # purge_step hides the abandoned records of a resumed run, which event files cannot drop.
        self._writer = module.SummaryWriter(str(run.folder / "tensorboard"), purge_step=run.start_iteration)
        texts = {"settings": _indented(run.settings), "group": run.group, "tags": ", ".join(run.tags)}
        for name, text in texts.items():
            if text:
                self._writer.add_text(f"run/{name}", text, run.start_iteration)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        for key, value in metrics.items():
            self._writer.add_scalar(key, value, step)
        self._writer.flush()  # a killed run keeps what it logged

    def images(self, name: str, grid: Path, captions: Sequence[str], step: int) -> None:
        import numpy as np
        from PIL import Image

        with Image.open(grid) as image:
            self._writer.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")
        self._writer.add_text(f"{name}/prompts", "\n".join(f"{k}. {text}" for k, text in enumerate(captions, 1)), step)
        self._writer.flush()

    def finish(self) -> None:
        self._writer.close()


class WandbTracker:
    """Weights & Biases. The run's id is kept in the output folder, so a resumed run continues its own."""

    name = "wandb"

    def __init__(self, project: str) -> None:
        self.project = project
        self.setting = f"output.wandb_project = {project!r}"

    def start(self, run: RunInfo) -> None:
        self._wandb = importlib.import_module("wandb")
        self._run = self._wandb.init(
            project=self.project,
            name=run.name,
            group=run.group or None,
            tags=list(run.tags),
            config=dict(run.settings),
            dir=str(run.folder),
            id=_kept(run, "wandb_run_id"),
            resume="allow",
            # console: its capture of the terminal would break the progress bar in two.
            settings=self._wandb.Settings(console="off", finish_timeout=FINISH_SECONDS, finish_timeout_raises=True),
        )

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._run.log(dict(metrics), step=step)

    def images(self, name: str, grid: Path, captions: Sequence[str], step: int) -> None:
        self._run.log({name: self._wandb.Image(str(grid), caption="\n".join(captions))}, step=step)

    def finish(self) -> None:
        self._run.finish()


class TrackioTracker:
    """trackio, on this machine's disk or where its own environment variables say (TRACKIO_SPACE_ID, ...).

    It continues a run by its name, so the name is the run's with a random ending that the output folder keeps. Tags,
    which it does not have, stand among the settings.
    """

    name = "trackio"

    def __init__(self, project: str) -> None:
        self.project = project
        self.setting = f"output.trackio_project = {project!r}"

    def start(self, run: RunInfo) -> None:
        self._trackio = importlib.import_module("trackio")
        settings = dict(run.settings) | ({"tags": list(run.tags)} if run.tags else {})
        self._run = self._trackio.init(
            project=self.project,
            name=f"{run.name}-{_kept(run, 'trackio_run_id')}",
            group=run.group or None,
            config=settings,
            resume="allow",
            embed=False,  # its dashboard inside a notebook
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._run.log(dict(metrics), step=step)

    def images(self, name: str, grid: Path, captions: Sequence[str], step: int) -> None:
        self._run.log({name: self._trackio.Image(str(grid), caption="\n".join(captions))}, step=step)

    def finish(self) -> None:
        self._run.finish()


class Trackers:
    """All trackers of a run on process 0; none on the others. What fails is given up, aloud, and training goes on.

    Args:
        say: prints a line without breaking the progress bar.
    """

    def __init__(self, trackers: Sequence[Tracker], say: Callable[[str], None]) -> None:
        self._working = list(trackers)
        self._say = say
        self.lost: dict[str, str] = {}  # name -> since when and why

    def start(self, run: RunInfo) -> None:
        """Start all of them.

        Raises:
            UserError: one is not installed, or does not start in a run that begins.
        """
        waiting, self._working = self._working, []
        for tracker in waiting:
            check_installed(tracker)
            try:
                tracker.start(run)
            except Exception as error:  # each fails in its own ways
                if not run.resumed:
                    self.finish()
                    raise UserError(
                        f"{tracker.setting}: {tracker.name} does not start ({_shown(error)}); see to its login or its "
                        "network, or leave it out"
                    ) from error
                self._lose(tracker, "at the start", error)
            else:
                self._working.append(tracker)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """`Tracker.log` of all that work."""
        for tracker in list(self._working):
            with self._surviving(tracker, f"at iteration {step}"):
                tracker.log(metrics, step)

    def images(self, name: str, grid: Path, captions: Sequence[str], step: int) -> None:
        """`Tracker.images` of all that work."""
        for tracker in list(self._working):
            with self._surviving(tracker, f"at iteration {step}"):
                tracker.images(name, grid, captions, step)

    def finish(self) -> None:
        """`Tracker.finish` of all that work. May be called twice."""
        for tracker in list(self._working):
            with self._surviving(tracker, "at the end"):
                tracker.finish()
        self._working = []

    @contextmanager
    def _surviving(self, tracker: Tracker, when: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._lose(tracker, when, error)

    def _lose(self, tracker: Tracker, when: str, error: Exception) -> None:
        self._working = [each for each in self._working if each is not tracker]
        self.lost[tracker.name] = f"{when}: {_shown(error)}"
        self._say(
            f"WARNING: {tracker.name} has failed {when} and records nothing more ({_shown(error)}); training goes on, "
            "and metrics.jsonl has everything"
        )


def check_installed(tracker: Tracker) -> None:
    """UserError with the line that installs it where a tracker's package is missing."""
    if not installed(tracker.name):
        raise UserError(
            f"{tracker.setting} needs {tracker.name}, which is not installed: pip install {tracker.name}, or switch "
            "it off"
        )


def installed(package: str) -> bool:
    """Whether it can be imported; it is not."""
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # of a module that stands in for it, without a spec
        return True


class TrackerSettings(Protocol):
    """Of section `output`."""

    tensorboard: bool
    wandb_project: str
    trackio_project: str


def choose(output: TrackerSettings) -> list[Tracker]:
    """Those that the settings name."""
    chosen: list[Tracker] = [TensorBoardTracker()] if output.tensorboard else []
    chosen += [WandbTracker(output.wandb_project)] if output.wandb_project else []
    chosen += [TrackioTracker(output.trackio_project)] if output.trackio_project else []
    return chosen


def _kept(run: RunInfo, name: str) -> str:
    """The random id in OUT/`name`, made where a run begins."""
    file = run.folder / name
    if not run.resumed or not file.exists():
        write_atomically(file, secrets.token_hex(4))
    return file.read_text()


def _indented(settings: Mapping[str, Any]) -> str:
    """YAML as a code block of Markdown, which TensorBoard renders."""
    import yaml

    text = yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True)
    return "".join(f"    {line}\n" for line in text.splitlines())


def _shown(error: Exception) -> str:
    return one_line(f"{type(error).__name__}: {error}", _SHOWN)
