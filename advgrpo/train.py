"""Train a text-to-image flow model with an adversarial reward.

python -m advgrpo.train --fast               # the embedded tiny default
python -m advgrpo.train --preset sd35m-dino-paper --config my.yaml
torchrun --nproc-per-node=8 -m advgrpo.train --preset ...    # on 8 GPUs
python -m advgrpo.train --resume runs/tiny   # as if never stopped
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import Field, ValidationError

from . import config as configuration
from .command import plain_console, run_command
from .config import Config, Options
from .errors import UserError

_INTERRUPTED = "interrupted; the last checkpoint, if there is one, is what --resume continues from"


class Start(Options):
    """Where the settings come from; every other flag of the command is a setting."""

    preset: Annotated[str, Field(min_length=1)] | None = None
    """Start from a preset instead of tiny."""
    config: Path | None = None
    """YAML laid over the preset; may name one itself (preset: NAME)."""
    resume: Path | None = None
    """Continue the run in this output folder; give no preset or config."""


Own = TypeVar("Own", bound=Start)


def parse(arguments: Sequence[str]) -> tuple[Config, bool]:
    """(config, whether to resume) of this command's flags; raises as `read_settings`."""
    about = f"{__doc__}\nPresets: {', '.join(configuration.preset_names())}."
    config, start = read_settings(arguments, Start, program="python -m advgrpo.train", about=about)
    return config, start.resume is not None


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
    if start.resume is not None and elsewhere is not None and Path(elsewhere) != start.resume:
        raise UserError(
            f"--resume {start.resume} goes on in that folder: leave out --output-dir {elsewhere}, or copy the folder "
            f"there and pass --resume {elsewhere}"
        )
    base, source = _base(start)
    merged = configuration.merge(base, configuration.nested(flags))
    return configuration.build(merged, "command line" if flags else source), start


def _base(start: Start) -> tuple[dict, str]:
    """The settings that flags are laid over, and what to call them in errors."""
    if start.resume is None:
        return configuration.read(start.preset, start.config)
    if start.preset or start.config:
        raise UserError("--resume continues with the run's own settings; leave out --preset and --config")
    saved = start.resume / "config.yaml"
    if not saved.is_file():
        raise UserError(f"--resume {start.resume}: {saved} is missing; pass the output folder of an earlier run")
    return {**configuration.read_yaml(saved), "output_dir": str(start.resume)}, str(saved)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit codes of `command.run_command`."""
    return run_command(_train, arguments, interrupted=_INTERRUPTED)


def _train(arguments: list[str]) -> int:
    config, resume = parse(arguments)
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
            Run(config, distributed, resume=resume, console=console).train()
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
