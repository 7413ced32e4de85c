"""Train a text-to-image flow model with an adversarial reward.

python -m advgrpo.train --fast               # the embedded tiny default
python -m advgrpo.train --preset sd35m-dino-paper --config my.yaml
torchrun --nproc-per-node=8 -m advgrpo.train --preset ...    # on 8 GPUs
python -m advgrpo.train --resume runs/tiny   # as if never stopped
python -m advgrpo.train --output-dir runs/a --resume auto   # start or continue
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from advgrpo import config as configuration
from advgrpo.config import Config
from advgrpo.config.command_line import Start, read_settings
from advgrpo.runtime.callable_module import make_callable
from advgrpo.runtime.command import INTERRUPTED, plain_console, run_command
from advgrpo.runtime.libraries import quiet_libraries

if TYPE_CHECKING:
    from rich.console import Console

    from advgrpo.training.callbacks import Callback
    from advgrpo.training.resuming import Resume
    from advgrpo.training.run import Run

_INTERRUPTED = "interrupted; the last checkpoint, if there is one, is what --resume continues from"


@dataclass(frozen=True)
class Result:
    """What a training leaves."""

    folder: Path  # the output folder, with samples/, curves.png, checkpoints/ and what follows
    lora: Path | None  # what `evaluate`, `generate` and stock diffusers load; None after full fine-tuning
    metrics: list[dict[str, Any]]  # one dictionary per iteration, as in metrics.jsonl
    summary: dict[str, Any]  # summary.json: held-out metrics before and after, speed, versions; {} where it was stopped
    stopped: str  # why it ended early; "" where it did not


def train(
    config: Config | None = None,
    *,
    callbacks: Iterable[Callback] = (),
    resume: Literal["auto"] | bool = False,
    console: Console | None = None,
) -> Result:
    """Train, from the first iteration or from a checkpoint in `config.output_dir`.

    Args:
        config: `Config.load(...)`; None is the embedded tiny run.
        callbacks: told of iterations, evaluations and checkpoints; one can end the run.
        resume: True goes on from the newest checkpoint, as if the run had never stopped; "auto" does so where there is
            one.
        console: where progress goes; None prints it, `Console(quiet=True)` does not.

    Returns:
        The result; the same on every process, but that only process 0's has metrics and summary.

    Raises:
        UserError: whatever is wrong with settings, files or models, before any work.
        RunFailure: the training went wrong; the state of the last whole iteration is saved.
    """
    from advgrpo.reporting.tracking import METRICS_FILE, load_metrics
    from advgrpo.training.resuming import SUMMARY_FILE

    config = Config.load() if config is None else config
    run = _run(config, resume=resume, console=console, callbacks=callbacks)
    folder, is_main = run.folder, run.distributed.is_main
    rows = load_metrics(folder / METRICS_FILE) if is_main else []
    summary = folder / SUMMARY_FILE
    found = json.loads(summary.read_text()) if is_main and summary.exists() else {}
    return Result(folder, folder / "lora" if config.model.train == "lora" else None, rows, found, run.stopped)


def _run(
    config: Config,
    *,
    resume: Resume | Literal["auto"] | bool,
    console: Console | None = None,
    callbacks: Iterable[Callback] = (),
) -> Run:
    """A run from its start to its end, in this process's place among those of the job."""
    # torch and diffusers are imported only once the settings are right
    from advgrpo.runtime.distributed import Distributed
    from advgrpo.training.run import Run

    distributed = Distributed.start(config.device, timeout_seconds=config.collective_timeout)
    console = plain_console(quiet=not distributed.is_main) if console is None else console
    if reason := configuration.untrained(config):
        console.print(f"note: {reason}", soft_wrap=True)
    try:
        with distributed.guard():
            run = Run(config, distributed, resume=resume, console=console, callbacks=callbacks)
            run.train()
    finally:
        distributed.close()
    return run


def parse(arguments: Sequence[str]) -> tuple[Config, Start]:
    """Settings and start of this command's flags; raises as `read_settings`."""
    about = f"{__doc__}\nPresets: {', '.join(configuration.preset_names())}."
    return read_settings(arguments, Start, program="python -m advgrpo.train", about=about)


def resume_of(start: Start) -> Resume:
    """What the run makes of --resume, --resume-from and --accept-changed."""
    from advgrpo.training.resuming import Resume

    if start.resume_from is not None:
        return Resume("checkpoint", start.resume_from, accepted=start.accept_changed)
    mode = "never" if start.resume is None else "auto" if start.resume == "auto" else "folder"
    return Resume(mode, accepted=start.accept_changed)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit codes of `command.run_command`."""
    return run_command(_recorded, arguments, interrupted=_INTERRUPTED)


def _recorded(arguments: list[str]) -> int:
    """`_train`; under torchrun its error is also in the file that torchrun, and who started it, look into.

    Inside of `run_command`, which turns errors into exit codes. A process that ends because another has failed records
    that one's error, so whichever torchrun takes for the first, it names what went wrong.
    """
    if "TORCHELASTIC_ERROR_FILE" not in os.environ:
        return _train(arguments)
    from torch.distributed.elastic.multiprocessing.errors import record

    from advgrpo.runtime.watch import ErrorFile

    return record(_train, ErrorFile())(arguments) or 0


def _train(arguments: list[str]) -> int:
    config, start = parse(arguments)
    quiet_libraries()
    run = _run(config, resume=resume_of(start))
    return INTERRUPTED if run.stopped_by_others else 0


if __name__ == "__main__":
    sys.exit(main())

make_callable(__name__)
