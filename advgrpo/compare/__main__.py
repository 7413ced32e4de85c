r"""A human blind comparison: draw on the same noise, vote on a page, report.

python -m advgrpo.compare tiny runs/tiny --prompts prompts.txt --out comparison
python -m advgrpo.compare serve comparison --port 8000      # or open comparison/index.html as a file
python -m advgrpo.compare report comparison votes-*.jsonl
python -m advgrpo.compare serve --help                      # so has report

A side called serve or report is written ./serve.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console

from advgrpo import config as configuration
from advgrpo.compare.settings import Compare, Report, Serve
from advgrpo.runtime.command import plain_console, run_command

_PROGRAM = "python -m advgrpo.compare"


def make(options: Compare, console: Console) -> None:
    """Draw what is missing, write comparison.json and index.html."""
    from advgrpo.compare.making import make_comparison
    from advgrpo.reporting.display import Display
    from advgrpo.runtime.libraries import quiet_libraries

    quiet_libraries()
    make_comparison(options, Display(console))


def serve(options: Serve) -> None:
    """Until interrupted."""
    from advgrpo.compare.server import serve_folder

    serve_folder(options)


def report(options: Report, console: Console) -> None:
    """Print the report and write it into the comparison's folder."""
    from advgrpo.compare.reporting import write_report

    write_report(options, console)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit codes of `command.run_command`."""
    return run_command(_compare, arguments, interrupted="interrupted; run the same command again to continue")


def _compare(arguments: list[str]) -> int:
    if arguments and arguments[0] in ("serve", "report"):
        commands = {"serve": Serve, "report": Report}
        options = configuration.parse_command(commands, arguments, program=_PROGRAM, about=__doc__ or "")
    else:
        options = configuration.parse_options(Compare, arguments, program=_PROGRAM, about=__doc__ or "")
    if isinstance(options, Serve):
        serve(options)
    elif isinstance(options, Report):
        report(options, plain_console())
    else:
        make(options, plain_console())
    return 0


if __name__ == "__main__":
    sys.exit(main())
