"""Train a text-to-image flow model with an adversarial reward.

python -m advgrpo.train --fast               # the embedded tiny default
python -m advgrpo.train --preset sd35m-dino-paper --config my.yaml
torchrun --nproc-per-node=8 -m advgrpo.train --preset ...    # on 8 GPUs
python -m advgrpo.train --resume runs/tiny   # as if never stopped
python -m advgrpo.train --output-dir runs/a --resume auto   # start or continue
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from advgrpo import config as configuration
from advgrpo.config import Config
from advgrpo.config.command_line import Start, read_settings
from advgrpo.runtime.callable_module import make_callable
from advgrpo.runtime.command import plain_console, run_command
from advgrpo.runtime.libraries import quiet_libraries

if TYPE_CHECKING:
    from advgrpo.training.resuming import Resume

_INTERRUPTED = "interrupted; the last checkpoint, if there is one, is what --resume continues from"


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

    return record(_train)(arguments) or 0


def _train(arguments: list[str]) -> int:
    config, start = parse(arguments)
    quiet_libraries()
    from advgrpo.runtime.distributed import Distributed  # imports of torch and diffusers only once the flags are right
    from advgrpo.training.run import Run

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


if __name__ == "__main__":
    sys.exit(main())

make_callable(__name__)
