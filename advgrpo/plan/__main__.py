"""Estimate GPU memory by component and choose what fits each GPU size: micro-batch and gradient checkpointing. Needs
neither GPU nor network; every flag of python -m advgrpo.train is understood as well.

python -m advgrpo.plan --preset sd35m-dino-paper --gpu 24,80 --processes 8
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from advgrpo import config as configuration
from advgrpo.config.command_line import Start, read_settings
from advgrpo.errors import UserError
from advgrpo.runtime.command import plain_console, run_command
from advgrpo.runtime.libraries import quiet_libraries

_NOTHING_FITS = 1
_SIZES = "24,40,80,141"
_MOST_GB = 10_000


class Plan(Start):
    """What the plan is for, and where the settings come from."""

    gpu: Annotated[str, Field(min_length=1)] = _SIZES
    """Sizes in GB, separated by commas, or auto for this machine's GPU."""
    processes: Annotated[int, Field(ge=1, le=65536)] = 1
    """GPUs that share an iteration's images."""


def _sizes(text: str) -> list[float]:
    if text == "auto":
        import torch

        if not torch.cuda.is_available():
            raise UserError("--gpu auto: this machine has no CUDA device; pass a size in GB, such as --gpu 80")
        return [torch.cuda.get_device_properties(0).total_memory / 1e9]
    try:
        sizes = [float(size) for size in text.split(",")]
    except ValueError:
        raise UserError(f"--gpu {text}: want sizes in GB such as {_SIZES}, or auto") from None
    if not all(0 < size <= _MOST_GB for size in sizes):
        raise UserError(f"--gpu {text}: want sizes above 0 and up to {_MOST_GB} GB, such as {_SIZES}, or auto")
    return sizes


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit codes of `command.run_command`; 1 when no size fits."""
    return run_command(_plan, arguments)


def _plan(arguments: list[str]) -> int:
    about = f"{__doc__}\nPresets: {', '.join(configuration.preset_names())}."
    config, chosen = read_settings(arguments, Plan, program="python -m advgrpo.plan", about=about)
    sizes = _sizes(chosen.gpu)
    from advgrpo.plan.memory import plan, table  # imports torch only once the flags are right
    from advgrpo.plan.work import micro_batches
    from advgrpo.training.preflight import check_without_network

    def check(micro_batch: int, checkpointing: bool) -> None:
        """What training would say to these settings."""
        recommended = config.model_copy(deep=True)
        recommended.rollout.micro_batch, recommended.model.gradient_checkpointing = micro_batch, checkpointing
        configuration.check(recommended, with_data=False)

    cut, most = (config.rollout, config.update.minibatches), config.rollout.micro_batch
    if not any(configuration.fits_micro_batches(*cut, prompts=n) for n in range(1, most + 1)):
        configuration.check_micro_batches(*cut)  # no number of images would suit this micro-batch
    check((micro_batches(*cut) or [most])[-1], False)
    quiet_libraries()
    check_without_network(config)
    plans = [plan(config, size, processes=chosen.processes) for size in sizes]
    for each in plans:
        check(each.knobs.micro_batch, each.knobs.gradient_checkpointing)
    console = plain_console()
    console.print(table(plans))
    for each in plans:
        console.print(each.line(), soft_wrap=True)
    return 0 if any(each.fits for each in plans) else _NOTHING_FITS


if __name__ == "__main__":
    sys.exit(main())
