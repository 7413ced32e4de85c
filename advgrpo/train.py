"""Train a text-to-image flow model with an adversarial reward.

python -m advgrpo.train --fast               # the embedded tiny default
python -m advgrpo.train --preset sd35m-dino-paper --config my.yaml
torchrun --nproc-per-node=8 -m advgrpo.train --preset ...    # on 8 GPUs
python -m advgrpo.train --resume runs/tiny   # as if never stopped
python -m advgrpo.train --output-dir runs/a --resume auto   # start or continue
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import Field, ValidationError

from . import config as configuration
from .command import plain_console, run_command
from .config import Config, Options
from .errors import UserError

if TYPE_CHECKING:
    from .resuming import Resume

_INTERRUPTED = "interrupted; the last checkpoint, if there is one, is what --resume continues from"
Source = Literal["prompts", "held_out_prompts", "references", "base"]


class Start(Options):
    """Where the settings come from; every other flag of the command is a setting."""

    preset: Annotated[str, Field(min_length=1)] | None = None
    """Start from a preset instead of tiny."""
    config: Path | None = None
    """YAML laid over the preset; may name one itself (preset: NAME)."""
    resume: Literal["auto"] | Path | None = None
    """auto: start what the other flags describe, or go on with it from the newest whole checkpoint in --output-dir. A
    folder: continue the run in it, with its settings; give no preset or config."""
    resume_from: Path | None = None
    """Continue from this checkpoint (OUT/checkpoints/iteration-N), with its settings; what came after it is dropped."""
    accept_changed: tuple[Source, ...] = ()
    """Resume although the content of these has changed: prompts, held_out_prompts, references, base (the model)."""


Own = TypeVar("Own", bound=Start)


def parse(arguments: Sequence[str]) -> tuple[Config, Start]:
    """Settings and start of this command's flags; raises as `read_settings`."""
    about = f"{__doc__}\nPresets: {', '.join(configuration.preset_names())}."
    return read_settings(arguments, Start, program="python -m advgrpo.train", about=about)


def read_settings(arguments: Sequence[str], own: type[Own], *, program: str, about: str) -> tuple[Config, Own]:
    """Presets and files first, then flags over them; and the command's own flags.

    Raises:
        UserError: unknown preset, key or flag, a value of the wrong kind, or an unreadable file.
        SystemExit: --help or --help-all.
    """
    first = configuration.leaves(own)
    if any(each in ("--help", "-h", "--help-all") for each in arguments):
        print(configuration.settings_help(Config, program, about, first, every="--help-all" in arguments))
        raise SystemExit(0)
    fields = {**first, **configuration.leaves(Config)}
    flags = configuration.read_flags(arguments, fields, sections=configuration.section_names(Config))
    given = {name: flags.pop(name) for name in first if name in flags}
    try:
        start = own.model_validate(given)
    except ValidationError as error:
        raise UserError(configuration.explain(error, own, given, dotted=False)) from error
    elsewhere = flags.get("output_dir")
    if isinstance(start.resume, Path) and elsewhere is not None and Path(elsewhere) != start.resume:
        raise UserError(
            f"--resume {start.resume} goes on in that folder: leave out --output-dir {elsewhere}, or copy the folder "
            f"there and pass --resume {elsewhere}"
        )
    base, source = _base(start)
    merged = configuration.merge(base, configuration.nested(flags))
    return configuration.build(merged, "command line" if flags else source), start


def _base(start: Start) -> tuple[dict, str]:
    """The settings that flags are laid over, and what to call them in errors."""
    if start.resume is not None and start.resume_from is not None:
        raise UserError("--resume and --resume-from exclude each other; give the one that says where to go on")
    if start.accept_changed and start.resume is None and start.resume_from is None:
        raise UserError("--accept-changed says what may differ from a checkpoint; give --resume or --resume-from too")
    if start.resume_from is None and not isinstance(start.resume, Path):
        return configuration.read(start.preset, start.config)
    if start.preset or start.config:
        flag = "--resume DIR" if start.resume_from is None else "--resume-from"
        raise UserError(
            f"{flag} continues with the run's own settings; leave out --preset and --config, or use --resume auto"
        )
    return _settings_of_run(start.resume) if start.resume_from is None else _settings_at(start.resume_from)


def _settings_of_run(folder: Path) -> tuple[dict, str]:
    """Those of the newest checkpoint that can be read, for a resume may have changed some; else of config.yaml."""
    from .checkpoint import MANIFEST, checkpoints  # imports torch, which plain starts do later

    if (folder / MANIFEST).exists():
        raise UserError(f"--resume {folder} is a checkpoint, not the folder of a run; use --resume-from {folder}")
    for path in reversed(checkpoints(folder / "checkpoints")):
        try:
            settings = _settings_in(path)
            configuration.build(settings, str(path))
        except UserError:  # the run will say so, where an earlier checkpoint cannot take its place
            continue
        return {**settings, "output_dir": str(folder)}, str(path)
    saved = folder / "config.yaml"
    if not saved.is_file():
        raise UserError(f"--resume {folder}: {saved} is missing; pass the output folder of an earlier run")
    return {**configuration.read_yaml(saved), "output_dir": str(folder)}, str(saved)


def _settings_at(path: Path) -> tuple[dict, str]:
    """Those of a checkpoint; its run's folder is where it is now."""
    from .checkpoint import latest_checkpoint

    latest = latest_checkpoint(path / "checkpoints")
    if latest is not None:
        raise UserError(f"--resume-from {path} is the folder of a run; want a checkpoint in it, such as {latest}")
    settings = _settings_in(path)
    if path.absolute().parent.name == "checkpoints":
        settings = {**settings, "output_dir": os.path.normpath(path / ".." / "..")}
    return settings, str(path)


def _settings_in(path: Path) -> dict[str, Any]:
    from .checkpoint import load_state

    settings = load_state(path).get("config")
    if not isinstance(settings, dict):
        raise UserError(f"checkpoint {path} holds no settings; it was not written by advgrpo.train")
    return settings


def resume_of(start: Start) -> Resume:
    """What the run makes of --resume, --resume-from and --accept-changed."""
    from .resuming import Resume

    if start.resume_from is not None:
        return Resume("checkpoint", start.resume_from, accepted=start.accept_changed)
    mode = "never" if start.resume is None else "auto" if start.resume == "auto" else "folder"
    return Resume(mode, accepted=start.accept_changed)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit codes of `command.run_command`."""
    return run_command(_train, arguments, interrupted=_INTERRUPTED)


def _train(arguments: list[str]) -> int:
    config, start = parse(arguments)
    quiet_libraries()
    from .distributed import Distributed  # imports of torch and diffusers only once the flags are right
    from .run import Run

    console = plain_console()
    distributed = Distributed.start(config.device, timeout_seconds=config.collective_timeout)
    if not distributed.is_main:
        console.quiet = True
    if reason := configuration.untrained(config):
        console.print(f"note: {reason}", soft_wrap=True)
    try:
        with distributed.guard():
            Run(config, distributed, resume=resume_of(start), console=console).train()
    finally:
        distributed.close()
    return 0


def quiet_libraries() -> None:
    """Loading bars and notices of libraries would tear the progress display."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"huggingface_hub\.")  # diffusers' old arguments
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


if __name__ == "__main__":
    sys.exit(main())
