"""How a run ends before its time: by a signal, or by an error, in either case without losing iterations.

A signal is a request to end (distributed.py says where), after which the state of the iteration's start is saved. When
a process fails, rank 0 saves that state too before it ends.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch

from advgrpo.runtime.distributed import Distributed
from advgrpo.runtime.watch import StopRequested

if TYPE_CHECKING:
    from advgrpo.training.trainer import Trainer

_ONE_SIGNAL_SECONDS = 2.0  # schedulers signal every process, and torchrun passes the same signal on
SLOWEST_DISK = 20e6  # bytes per second: a checkpoint that is written slower counts as hanging


@contextlib.contextmanager
def signals_stop(distributed: Distributed) -> Iterator[None]:
    """SIGTERM, SIGINT and SIGHUP ask for the job's end; another one, seconds later, ends this process at once.

    In another thread than the main one, which alone may handle signals, they do what they did before.

    Raises:
        KeyboardInterrupt: at the second signal.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    first: float | None = None

    def ask(number: int, _frame: object) -> None:
        nonlocal first
        now = time.monotonic()
        if first is not None and now - first > _ONE_SIGNAL_SECONDS:
            raise KeyboardInterrupt
        if first is None:
            first, name = now, signal.Signals(number).name
            if distributed.is_main:
                _say(f"{name}: saving, then the run ends (again to end it at once)\n")
            distributed.ask_to_stop(name)

    before = {number: signal.signal(number, ask) for number in _numbers()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _numbers() -> list[signal.Signals]:
    """nohup has a process ignore SIGHUP: it shall go on when the terminal is gone."""
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [signal.SIGTERM, signal.SIGINT, *([] if ignored else [signal.SIGHUP])]


def _say(text: str) -> None:
    """Straight to standard error: a handler may have come into the middle of a print, which nothing may print into.

    After SIGHUP the terminal may be gone, and every print an error: then they all go nowhere.
    """
    for stream in (2, 1):
        try:
            os.write(stream, text.encode() if stream == 2 else b"")
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)


class Keeper:
    """Saves what a run can be continued from, once per iteration, from whichever thread has to.

    Args:
        write: writes a checkpoint of `Trainer.state()`'s result.
        trainer: whose state it is.
        saved: the iteration of the newest checkpoint; None where there is none.
        alone: one process can write it; otherwise `save` is called by all together, and nothing is kept at a failure.
    """

    def __init__(
        self,
        write: Callable[[dict[str, torch.Tensor], dict], None],
        trainer: Trainer,
        distributed: Distributed,
        saved: int | None = None,
        *,
        alone: bool = True,
    ):
        self._write, self._trainer, self._distributed, self._alone = write, trainer, distributed, alone
        self.saved = saved
        self.began = False  # there is something to keep

    def save(self) -> None:
        """Write a checkpoint of the present state; called between iterations."""
        with self._trainer.clean.state() as state:
            self._save(*state)

    def keep(self) -> None:
        """Write a checkpoint of the newest state that can be continued from, unless there is one, or none is known."""
        if not self._alone:
            return
        with self._trainer.clean.state() as state:
            if state is not None and state[1]["trainer"]["iteration"] != self.saved:
                self._save(*state)

    @contextlib.contextmanager
    def at_failure(self) -> Iterator[None]:
        """Inside, what the iterations have given is kept when this process fails, or another one."""
        self.began = True
        self._distributed.before_exit(self._keep_aside)
        try:
            yield
        except StopRequested:
            raise
        except Exception:
            self._keep_what_there_is()
            raise
        finally:
            self._distributed.before_exit(lambda: None)

    def _save(self, tensors: dict[str, torch.Tensor], state: dict) -> None:
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        within = self._distributed.timeout_seconds + size / SLOWEST_DISK
        self._distributed.progress("write a checkpoint", within_seconds=within)
        self.saved = state["trainer"]["iteration"]  # also if it fails: a full disk is still full the next time
        self._write(tensors, state)

    def _keep_aside(self) -> None:
        """From the watching thread; on a GPU beside the main thread's work, which may wait for ever."""
        self._keep_what_there_is(beside=True)

    def _keep_what_there_is(self, *, beside: bool = False) -> None:
        """As `keep`, in the course of an error, which counts for more than one in saving."""
        device = self._distributed.device
        if not self._distributed.is_main or (self._trainer.iteration == 0 and self.saved is None):
            return
        try:
            own = beside and device.type == "cuda"
            with torch.cuda.stream(torch.cuda.Stream(device)) if own else contextlib.nullcontext():
                self.keep()
        except Exception as error:
            print(f"what was trained since the last checkpoint could not be saved: {error}", file=sys.stderr)
