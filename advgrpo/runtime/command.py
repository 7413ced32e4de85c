"""What every command does around its work: one line for an error, the same exit codes, --version.

Exit codes: 0 the work is done; 1 it failed on the way (a number that is not finite, a full disk, a lost process), or
the command's own meaning of 1; 2 bad input, found before work; 130 interrupted, or
stopped because the process of another machine was.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Sequence

from rich.console import Console

from advgrpo import __version__
from advgrpo.errors import RunFailure, UserError, one_line

FAILED, INTERRUPTED = 1, 130
_TRACEBACK = "--traceback"
_EXPECTED = (RunFailure, FloatingPointError, OSError, MemoryError, UnicodeError, RecursionError)


def run_command(
    body: Callable[[list[str]], int],
    arguments: Sequence[str] | None = None,
    *,
    interrupted: str = "interrupted",
) -> int:
    """The exit code of `body(arguments)`; errors that can be expected become one line on stderr.

    A bug keeps its traceback; --traceback or ADVGRPO_TRACEBACK=1 shows it for every error. --version prints the version
    and does nothing else.

    Args:
        arguments: without the program's name; None reads them from sys.argv.
        interrupted: what Ctrl-C prints.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    whole_stack = _TRACEBACK in arguments or os.environ.get("ADVGRPO_TRACEBACK", "0") not in ("", "0")
    arguments = [each for each in arguments if each != _TRACEBACK]
    if "--version" in arguments:
        print(f"advgrpo {__version__}")
        return 0
    try:
        return body(arguments)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt:
        _tell(interrupted)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output, such as head, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except Exception as error:
        if whole_stack:
            traceback.print_exc()
        elif not (isinstance(error, (UserError, *_EXPECTED)) or _out_of_memory(error)):
            raise
        _tell(f"error: {describe(error)}")
        return UserError.EXIT_CODE if isinstance(error, UserError) else FAILED


def describe(error: BaseException) -> str:
    """One line: the message, the file where the system names one, and the kind of error where that says more."""
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return "this machine's memory is full; use fewer or smaller images at once (rollout.micro_batch)"
    if isinstance(error, RecursionError):
        return "something is nested too deeply to be read (a file of settings, prompts or references)"
    if isinstance(error, OSError) and error.strerror:
        places = " -> ".join(repr(str(name)) for name in (error.filename, error.filename2) if name is not None)
        return one_line(f"{places or type(error).__name__}: {error.strerror}")
    lines = [line for line in str(error).splitlines() if line.strip()]
    if len(lines) > 2 and "Traceback" in lines[1]:  # another process's: what it was is its last line
        lines = [lines[0], lines[-1]]
    return one_line(" ".join(lines) or type(error).__name__)


def plain_console(**options) -> Console:
    """A console that prints "[...]" of paths and prompts as it stands."""
    return Console(markup=False, highlight=False, **options)


def _out_of_memory(error: Exception) -> bool:
    # torch's errors by name and text: the flags of a command do not need torch
    return type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)


def _tell(line: str) -> None:
    print(line.encode("utf-8", "backslashreplace").decode(), file=sys.stderr)
