"""Write a run's report, or record the band that runs of a preset are compared with.

python -m advgrpo.report runs/tiny
python -m advgrpo.report band runs/seed1 runs/seed2 runs/seed3 --preset tiny --out curves.json
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from advgrpo import config as configuration
from advgrpo.config import Options, Positional
from advgrpo.runtime.command import plain_console, run_command


class Report(Options):
    """Write OUT/report.html of a run, also of one that an older version made or that is under way."""

    out: Annotated[Path, Positional]
    """The run's output folder."""


class BandOptions(Options):
    """Record the held-out curves of runs of a preset, of several seeds, to compare others with.

    The runs must have the preset's settings; only the seed, where a run lies, what it runs on, what it says and how
    often it is evaluated may differ.
    """

    runs: Annotated[list[Path], Positional]
    """Output folders of runs that have ended."""
    preset: str
    """The preset's name."""
    out: Path
    """File to write; advgrpo/presets/curves/PRESET.json ships with the package."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit codes of `command.run_command`."""
    return run_command(_report, arguments)


def _report(arguments: list[str]) -> int:
    say = plain_console().print
    if arguments[:1] == ["band"]:
        program = "python -m advgrpo.report band"
        options = configuration.parse_options(BandOptions, arguments[1:], program=program, about=BandOptions.__doc__)
        from advgrpo.report.band import write_band

        band = write_band(options.runs, options.preset, options.out)
        say(f"wrote {options.out}: {band.runs} runs of {band.preset}", soft_wrap=True)
        return 0
    options = configuration.parse_options(Report, arguments, program="python -m advgrpo.report", about=__doc__)
    from advgrpo.report.page import write_report

    say(f"wrote {write_report(options.out)}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
