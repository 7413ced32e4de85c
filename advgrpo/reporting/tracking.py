"""What a run says about itself while it runs: metrics.jsonl, a progress bar, and what trackers are told (trackers.py).

Only rank 0 says anything, and nothing here is ever read back to decide how training goes on.
"""

import contextlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console

from advgrpo.errors import UserError, one_line
from advgrpo.reporting.display import Display
from advgrpo.reporting.metric_names import VERSION, VERSION_KEY, current_names
from advgrpo.reporting.trackers import Trackers
from advgrpo.runtime.atomic import move_aside, write_atomically
from advgrpo.types import Flag

METRICS_FILE = "metrics.jsonl"

Scalar = float | int | str | None


class RunLog:
    """Records one dictionary of metrics per iteration. A context manager; on ranks other than 0 it does nothing.

    Args:
        output_dir: the run's folder; gets `metrics.jsonl`.
        total_iterations: where the display's bar ends.
        start_iteration: the first iteration this process runs. Records of it and of later ones, left by the process
            that is resumed, are removed, so that the files become those of a run that never stopped.
        is_main: whether this is rank 0.
        trackers: are told every number; started and finished by whoever made them.
        display: where progress goes; a live bar on a terminal, else one line per iteration.

    Raises:
        UserError: the folder cannot be written.
    """

    def __init__(
        self,
        output_dir: str | Path,
        *,
        total_iterations: int,
        start_iteration: int = 0,
        is_main: bool = True,
        trackers: Trackers | None = None,
        display: Display | None = None,
    ) -> None:
        self.is_main = is_main
        self._file = None
        self._trackers = trackers or Trackers([], print)
        self._open = contextlib.ExitStack()
        if not is_main:
            return
        output_dir = Path(output_dir)
        self.display = display or Display(Console())
        self._file = open_metrics(output_dir / METRICS_FILE, start_iteration, self.display.print_line)
        self._open.enter_context(self.display.iterations(total_iterations, start_iteration))

    def log(self, metrics: Mapping[str, Scalar], flags: Sequence[Flag] | None = None) -> None:
        """Record one iteration; `metrics` holds its number from 0 as "iteration", and Python scalars.

        Non-finite numbers are written as null: JSON has none, and Python's bare NaN breaks other readers. Names of the
        monitor's active `flags` are written as "flags" (None: there is no monitor); each is shown with its advice when
        it appears, and again when it has cleared.

        Raises:
            ValueError: no "iteration".
            TypeError: a value that is no Python scalar (a tensor would synchronise with the GPU at every call).
        """
        if not self.is_main:
            return
        record: dict[str, Any] = plain(metrics)
        if flags is not None:
            record["flags"] = [flag.name for flag in flags]
        if not isinstance(record.get("iteration"), int):
            raise ValueError(f'metrics must hold an integer "iteration", got {metrics.get("iteration")!r}')
        self._file.write(metrics_line(record))
        self._file.flush()
        numbers = {k: v for k, v in record.items() if isinstance(v, (int, float)) and k != "iteration"}
        self._trackers.log(numbers, record["iteration"])
        self.display.show(record)
        self.display.show_flags(flags or (), record["iteration"])

    def sync(self) -> None:
        """Force what was logged to the disk; a checkpoint that is saved then never knows more iterations than it."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())

    def print_line(self, text: str) -> None:
        """Print a line without breaking the progress bar; on rank 0 only."""
        if self.is_main:
            self.display.print_line(text)

    def close(self) -> None:
        """Flush and close everything. May be called twice."""
        self._open.close()
        if self._file is not None:
            self._file.close()
        self._file = None
        self.is_main = False

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def metrics_line(record: Mapping[str, Any]) -> str:
    """A record as a line of metrics.jsonl; ValueError for a number that is not finite."""
    return json.dumps({VERSION_KEY: VERSION, **record}, allow_nan=False) + "\n"


def load_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl`, in file order. A last line cut off by a kill is left out.

    Raises:
        UserError: a missing file, or a damaged line elsewhere (named by its number).
    """
    try:
        records, damage = _read_metrics(Path(path))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: not the folder of a run") from None
    if damage:
        raise UserError(f"{path}, {damage}; repair or remove it")
    return [record for _, record in records]


def _read_metrics(path: Path) -> tuple[list[tuple[str, dict[str, Any]]], str]:
    """(lines that hold a record, with it; what is wrong with the first that does not, or nothing)."""
    lines = path.read_bytes().split(b"\n")
    lines.pop()  # what follows the last newline: nothing, or a record that was cut off
    records, damage = [], ""
    for number, raw in enumerate(lines, start=1):
        try:
            line = raw.decode("utf-8")
            record = json.loads(line)
            if not _is_record(record):
                raise ValueError
            record = current_names(record)
        except (ValueError, RecursionError):  # of which UnicodeDecodeError is one
            shown = one_line(raw[:80].decode("utf-8", "backslashreplace"))
            damage = damage or f"line {number} is not a metrics record: {shown!r}"
            continue
        records.append((line, record))
    return records, damage


def _is_record(record: Any) -> bool:
    if not isinstance(record, dict) or type(record.get("iteration")) is not int:
        return False
    scalars = {name: value for name, value in record.items() if name != "flags"}
    flags = record.get("flags", [])
    return all(value is None or isinstance(value, (bool, int, float, str)) for value in scalars.values()) and (
        isinstance(flags, list) and all(isinstance(name, str) for name in flags)
    )


def open_metrics(path: Path, start_iteration: int, say: Callable[[str], None]) -> Any:
    """The file with the records before `start_iteration`, to be appended to.

    Training needs nothing of what is in it, so a damaged one is put aside and what can be read of it goes on.
    """
    try:
        records, damage = _read_metrics(path) if path.exists() else ([], "")
        kept = [line for line, record in records if record["iteration"] < start_iteration]
        if damage:
            say(f"{path}, {damage}; it is now {move_aside(path).name}, and its {len(kept)} readable records go on")
        write_atomically(path, "".join(line + "\n" for line in kept))
        return path.open("a", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): choose another output directory") from error


def plain(metrics: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """`metrics` as they are recorded; see `RunLog.log`."""
    return {key: _plain(key, value) for key, value in metrics.items()}


def _plain(key: str, value: Scalar) -> Scalar:
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    raise TypeError(f"metric {key!r} is a {type(value).__name__}; convert it to a Python scalar first")
