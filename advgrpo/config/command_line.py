"""A command's flags: which preset, file or run its settings come from, and what is laid over them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, ValidationError

from advgrpo import config as configuration
from advgrpo.config.base import Options
from advgrpo.config.config import Config
from advgrpo.errors import UserError

Source = Literal["prompts", "held_out_prompts", "references", "base", "rewards", "teacher", "start"]


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
    """Resume although the content of these has changed: prompts, held_out_prompts, references, base (the model),
    rewards (the files of rewards.custom), teacher (update.teacher), start (model.lora.start_from)."""


Own = TypeVar("Own", bound=Start)


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
    if start.resume_from is not None:
        return _settings_at(start.resume_from)
    assert isinstance(start.resume, Path)  # "auto" and None have gone above
    return _settings_of_run(start.resume)


def _settings_of_run(folder: Path) -> tuple[dict, str]:
    """Those of the newest checkpoint that can be read, for a resume may have changed some; else of config.yaml."""
    from advgrpo.runtime.checkpoint import MANIFEST, checkpoints  # imports torch, which plain starts do later
    from advgrpo.runtime.reading import UnreadableError

    if (folder / MANIFEST).exists():
        raise UserError(f"--resume {folder} is a checkpoint, not the folder of a run; use --resume-from {folder}")
    for path in reversed(checkpoints(folder / "checkpoints")):
        try:
            settings = _settings_in(path)
            configuration.build(settings, str(path))
        except UnreadableError:
            raise
        except UserError:  # the run will say so, where an earlier checkpoint cannot take its place
            continue
        return {**settings, "output_dir": str(folder)}, str(path)
    saved = folder / "config.yaml"
    if not saved.is_file():
        raise UserError(f"--resume {folder}: {saved} is missing; pass the output folder of an earlier run")
    return {**configuration.read_yaml(saved), "output_dir": str(folder)}, str(saved)


def _settings_at(path: Path) -> tuple[dict, str]:
    """Those of a checkpoint; its run's folder is where it is now."""
    from advgrpo.runtime.checkpoint import latest_checkpoint

    latest = latest_checkpoint(path / "checkpoints")
    if latest is not None:
        raise UserError(f"--resume-from {path} is the folder of a run; want a checkpoint in it, such as {latest}")
    settings = _settings_in(path)
    if path.absolute().parent.name == "checkpoints":
        settings = {**settings, "output_dir": os.path.normpath(path / ".." / "..")}
    return settings, str(path)


def _settings_in(path: Path) -> dict[str, Any]:
    from advgrpo.runtime.checkpoint import load_state

    settings = load_state(path).get("config")
    if not isinstance(settings, dict):
        raise UserError(f"checkpoint {path} holds no settings; it was not written by advgrpo.train")
    return settings
