"""What fits a GPU, before a run: python -m advgrpo.plan --preset sd35m-dino-paper --gpu 24,80 --processes 8"""

from __future__ import annotations

import argparse
import sys

from rich.console import Console

from . import config as configuration
from .errors import UserError
from .train import parse, quiet_libraries

_SIZES = "24,40,80,141"


def _arguments(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="python -m advgrpo.plan",
        description="Estimate GPU memory by component and choose micro-batch, gradient checkpointing and the place of "
        "the text encoders for each GPU size. Needs neither GPU nor network.",
        epilog="Every flag of python -m advgrpo.train is understood as well: --preset, --config, --model.resolution, "
        f"... Presets: {', '.join(configuration.preset_names())}.",
        allow_abbrev=False,
    )
    parser.add_argument("--gpu", default=_SIZES, help=f"sizes in GB, or auto for this machine's GPU (default {_SIZES})")
    parser.add_argument("--processes", type=int, default=1, help="GPUs that share an iteration's pictures (default 1)")
    return parser.parse_known_args(arguments)


def _sizes(text: str) -> list[float]:
    if text == "auto":
        import torch

        if not torch.cuda.is_available():
            raise UserError("--gpu auto: this machine has no CUDA device; pass a size in GB, such as --gpu 80")
        return [torch.cuda.get_device_properties(0).total_memory / 1e9]
    try:
        return [float(size) for size in text.split(",")]
    except ValueError:
        raise UserError(f"--gpu {text}: want sizes in GB such as {_SIZES}, or auto") from None


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0 when some size fits, 1 when none does, 2 for bad input."""
    chosen, flags = _arguments(sys.argv[1:] if arguments is None else arguments)
    try:
        sizes = _sizes(chosen.gpu)
        config, _ = parse(flags)
        from .memory import plan, table  # imports torch only once the flags are right

        quiet_libraries()
        plans = [plan(config, size, processes=chosen.processes) for size in sizes]
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return UserError.EXIT_CODE
    console = Console()
    console.print(table(plans))
    for each in plans:
        console.print(each.line(), soft_wrap=True, highlight=False)
    return 0 if any(each.fits for each in plans) else 1


if __name__ == "__main__":
    sys.exit(main())
