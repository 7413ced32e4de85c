"""Train a text-to-image flow model with an adversarial reward.

python -m advgrpo.train --fast                                   # the embedded tiny default
python -m advgrpo.train --preset sd35m-dino-paper --data.prompts p.txt --data.references refs/
torchrun --nproc-per-node=8 -m advgrpo.train --preset ...        # the same run on 8 GPUs
python -m advgrpo.train --resume runs/tiny                       # as if never stopped
"""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from pathlib import Path

import tyro
from rich.console import Console

from . import config as configuration
from .config import Config
from .errors import UserError


def parse(arguments: list[str]) -> tuple[Config, bool]:
    """(config, whether to resume). Presets and files first, then flags over them.

    Raises:
        UserError: unknown preset or key, a value of the wrong kind, or an unreadable file.
        SystemExit: --help, or a flag tyro does not know (it names the nearest).
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset")
    first.add_argument("--config", type=Path)
    first.add_argument("--resume", type=Path)
    chosen, flags = first.parse_known_args(arguments)
    if chosen.resume is not None:
        if chosen.preset or chosen.config:
            raise UserError("--resume continues with the run's own settings; leave out --preset and --config")
        saved = chosen.resume / "config.yaml"
        if not saved.is_file():
            raise UserError(f"--resume {chosen.resume}: {saved} is missing; pass the output folder of an earlier run")
        base = configuration.build(configuration.read_yaml(saved), str(saved))
        base.output_dir = str(chosen.resume)
    else:
        base = configuration.load(chosen.preset, chosen.config)
    flags_over = tyro.cli(
        Config,
        args=flags,
        default=base,
        prog="python -m advgrpo.train",
        description=_description(),
        config=(tyro.conf.AvoidSubcommands,),
    )
    return configuration.build(flags_over.model_dump(), "command line"), chosen.resume is not None


def _description() -> str:
    presets = ", ".join(configuration.preset_names())
    return (
        f"{__doc__}\n\n"
        f"--preset NAME    start from a preset: {presets} (default: tiny)\n"
        "--config FILE    YAML laid over the preset; may name one itself (preset: NAME)\n"
        "--resume RUN     continue the run in this output folder; give no preset or config\n"
        "Every field below is a flag; the defaults shown are those of the chosen preset."
    )


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0 after a finished or cleanly stopped run, 2 for bad input, 130 when interrupted outside the loop."""
    arguments = sys.argv[1:] if arguments is None else arguments
    console = Console(stderr=False)
    try:
        config, resume = parse(arguments)
        quiet_libraries()
        from .distributed import Distributed  # imports of torch and diffusers only once the flags are right
        from .run import Run

        distributed = Distributed.start(config.device, timeout_seconds=config.collective_timeout)
        if not distributed.is_main:
            console.quiet = True
        try:
            with distributed.guard():
                Run(config, distributed, resume=resume, console=console).train()
        finally:
            distributed.close()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return UserError.EXIT_CODE
    except KeyboardInterrupt:
        print("interrupted; the last checkpoint, if there is one, is what --resume continues from", file=sys.stderr)
        return 130
    return 0


def quiet_libraries() -> None:
    """Loading bars and notices of libraries would tear the progress display."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


if __name__ == "__main__":
    sys.exit(main())
