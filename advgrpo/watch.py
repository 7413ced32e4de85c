"""The thread by which the processes of a job know about each other: signs of life, failure reports, requests to stop.

Every process has one, with its own connection to the job's key-value store. Once a second it leaves a note (`Note`): a
beat, what the process is doing, and at which meeting point of the job it has arrived. From the notes of the others a
process that waits can say who keeps it waiting, and where; who stops leaving notes is dead or stopped.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass

import torch.distributed as dist

from .errors import RunFailure, UserError, printable

POLL_SECONDS = 1.0
# A stopped process (SIGSTOP, a frozen machine) costs this + polls + GRACE_SECONDS + the 30 s that torchrun leaves
# between SIGTERM and SIGKILL, which together stay under a minute. Nothing here holds the GIL this long.
SILENCE_SECONDS = 20.0
GRACE_SECONDS = 5.0
LINGER_SECONDS = (
    5.0  # a failed rank stays this long for the others to read its report: torchrun ends all once one exits
)
_WAIT_POLL_SECONDS = 0.05


class CollectiveError(RunFailure):
    """A collective failed or timed out on this rank, and no rank reported why."""


class RankFailure(RunFailure):
    """Another rank failed; the message holds its error."""


class StopRequested(Exception):
    """The job ends early and in order: a signal, or a process that asked for it. The message is the reason."""


@dataclass(frozen=True)
class Failure:
    """What ended the job.

    `waits_for` are the ranks that had not come to where the reporter waited: their stacks belong into the log.
    """

    rank: int
    reporter: int
    summary: str
    details: str
    is_user_error: bool = False
    waits_for: tuple[int, ...] = ()

    @classmethod
    def of(cls, error: BaseException, rank: int, diagnosis: str = "", waits_for: tuple[int, ...] = ()) -> Failure:
        if isinstance(error, UserError):
            return cls(rank, rank, str(error), str(error), is_user_error=True)
        summary = "".join(traceback.format_exception_only(error)).strip()
        details = "".join(traceback.format_exception(error))[-10_000:]
        if diagnosis:
            summary, details = f"{summary}; {diagnosis}", f"{details.rstrip()}\n{diagnosis}\n"
        return cls(rank, rank, summary, details, waits_for=waits_for)

    @classmethod
    def read(cls, text: bytes) -> Failure:
        fields = json.loads(text)
        return cls(**{**fields, "waits_for": tuple(fields["waits_for"])})

    def is_own(self, rank: int) -> bool:
        return self.rank == self.reporter == rank

    @property
    def exit_code(self) -> int:
        return UserError.EXIT_CODE if self.is_user_error else 1

    def as_exception(self) -> Exception:
        if self.is_user_error:
            return UserError(f"{self.details} (found on rank {self.rank})")
        return RankFailure(f"rank {self.rank} failed with this error:\n{self.details.rstrip()}")


@dataclass
class Note:
    """What a process last said about itself."""

    beat: int = 0  # grows every second
    place: int = 0  # collectives and meetings entered so far; every rank passes the same ones in the same order
    steps: int = 0  # pieces of work begun so far
    doing: str = "starting"
    within: float = 0.0  # seconds that this piece of work may take; 0 where nobody knows

    @classmethod
    def read(cls, text: bytes) -> Note:
        return cls(**json.loads(text))


class Watch(threading.Thread):
    """Leaves and reads notes, finds failure reports, and ends a process whose main thread cannot end itself."""

    def __init__(self, store: dist.Store, rank: int, world_size: int) -> None:
        super().__init__(name="advgrpo-watch", daemon=True)
        self.failure: Failure | None = None
        self.wanted_stop: str | None = None  # why this rank wants the job to stop
        self.stop_reason: str | None = None  # why the job shall stop, once anybody said so
        self.has_stopped = False  # rank 0 has stopped: nothing is left for this process to do
        self.has_reported = False
        self.before_exit: Callable[[], None] = lambda: None  # the last thing this process does if the thread ends it
        self.note = Note()
        self._store = store
        self._rank = rank
        self._world_size = world_size
        self._main_thread = threading.main_thread().ident
        self._left = threading.Event()  # the main thread leaves the job
        self._neighbour = (rank + 1) % world_size
        self._neighbour_note = b""
        self._neighbour_seen = time.monotonic()

    def run(self) -> None:
        while self.failure is None and not self.has_stopped:
            try:
                self.failure = self._look()
            except dist.DistError as error:
                lost = f"rank {self._rank} lost the job's store, which ends with rank 0 or torchrun ({error})"
                self.failure = Failure(0, 0, lost, lost)
            if self.failure is None and not self.has_stopped and self._left.wait(POLL_SECONDS):
                return
        if self.failure is None:
            self._leave_after_stop()
        else:
            self._leave_after_failure()

    def leave(self) -> None:
        """The main thread leaves the job by itself; nothing is watched any more."""
        faulthandler.cancel_dump_traceback_later()
        self._left.set()

    def report(self, error: BaseException) -> Failure:
        """Publish `error` unless a rank did so before; returns the failure that counts, once others had time to see it.

        Called from the main thread.
        """
        diagnosis, waits_for = "", ()
        if isinstance(error, CollectiveError) and self.failure is None:
            # Usually the echo of a rank that is about to report, or whose process has just been killed.
            tell(self._rank, f"{error}\nWaiting for the report of the rank that caused it.")
            before = self._notes()
            self._wait_until(lambda: self.failure is not None, 3 * POLL_SECONDS)
            diagnosis, waits_for = self._diagnose(before, self._notes())
            if self.failure is None and diagnosis:
                tell(self._rank, diagnosis)
        self.has_reported = True
        mine = Failure.of(error, self._rank, diagnosis, waits_for)
        try:
            cause = self._publish(mine)
            if cause == mine:
                others = self._world_size - 1
                self._wait_until(lambda: self._store.add("failure/seen", 0) >= others, LINGER_SECONDS)
                self._tell_stacks(waits_for)
        except dist.DistError:  # the store is gone, and with it whoever hosted it: they end by losing it too
            return self.failure or mine
        return cause

    def say_goodbye(self) -> None:
        self.leave()
        self.join()
        self._store.set(f"alive/{self._rank}", "done")
        self._store.add("goodbyes", 1)  # last: rank 0, and the store with it, may be gone right after

    def wait_for_goodbyes(self) -> None:
        while self._store.add("goodbyes", 0) < self._world_size - 1 and self.failure is None:
            time.sleep(_WAIT_POLL_SECONDS)
        self.leave()

    def late(self, place: int, since: float, seen: dict[int, tuple[tuple[int, int], float]]) -> str:
        """Which rank, expected at `place`, has begun nothing new for longer than it may; empty while all move on.

        Args:
            since: when the waiting began, by time.monotonic.
            seen: (place, steps) of every rank and when they were first seen; kept up to date here, {} at first.
        """
        now = time.monotonic()
        for rank, note in self._notes().items():
            at = (note.place, note.steps)
            if rank not in seen or seen[rank][0] != at:
                seen[rank] = (at, now if rank in seen else since)
            if note.place < place and note.within and now - seen[rank][1] > note.within:
                return f"rank {rank} has not come any further than {note.doing!r} for {now - seen[rank][1]:.0f} s"
        return ""

    def behind(self, place: int) -> str:
        """The ranks that have not come to `place` yet and what they are doing, for people who wait."""
        return ", ".join(f"rank {r} ({note.doing})" for r, note in self._notes().items() if note.place < place)

    def _look(self) -> Failure | None:
        # A C extension that never gives the GIL back stops this thread too; the timer below belongs to C.
        faulthandler.dump_traceback_later(0.75 * SILENCE_SECONDS, file=sys.__stderr__)
        self.note.beat += 1
        self._store.set(f"alive/{self._rank}", json.dumps(asdict(self.note)))
        if self._store.check(["failure"]):
            return Failure.read(self._store.get("failure"))
        if self.wanted_stop is not None and self.stop_reason is None:
            self._store.compare_set("stop", "", self.wanted_stop)
        for key in ("stop", "stopped"):
            if self.stop_reason is None and self._store.check([key]):
                self.stop_reason = self._store.get(key).decode()
        self.has_stopped = self._rank != 0 and self._store.check(["stopped"])
        key, now = f"alive/{self._neighbour}", time.monotonic()
        note = self._store.get(key) if self._store.check([key]) else b""
        if note != self._neighbour_note or note in (b"", b"done"):
            self._neighbour_note, self._neighbour_seen = note, now
        elif now - self._neighbour_seen > SILENCE_SECONDS:
            text = (
                f"it has given no sign of life for {SILENCE_SECONDS:.0f} s and left no error (killed, stopped, out of "
                f"memory, or its machine is gone); its last work was {Note.read(note).doing!r}"
            )
            return self._publish(Failure(self._neighbour, self._rank, text, text))
        return None

    def _notes(self) -> dict[int, Note]:
        """The newest note of every other rank that still works."""
        found = {}
        for rank in range(self._world_size):
            key = f"alive/{rank}"
            if rank != self._rank and self._store.check([key]) and (text := self._store.get(key)) != b"done":
                found[rank] = Note.read(text)
        return found

    def _diagnose(self, before: dict[int, Note], after: dict[int, Note]) -> tuple[str, tuple[int, ...]]:
        """Why a collective failed, from the notes around a few seconds of waiting: who is silent, or who is behind."""
        silent = [rank for rank in after if rank in before and before[rank].beat == after[rank].beat]
        if silent:
            named = ", ".join(f"rank {rank} (last work: {after[rank].doing})" for rank in silent)
            return f"no sign of life since from {named}: probably killed or stopped, see torchrun's exit codes", ()
        behind = tuple(rank for rank, note in after.items() if note.place < self.note.place)
        if not behind:
            return "", ()
        return f"not there: {self.behind(self.note.place)}; this rank was at {self.note.doing!r}", behind

    def _publish(self, failure: Failure) -> Failure:
        """The first report wins; returns the winner."""
        return Failure.read(self._store.compare_set("failure", "", json.dumps(asdict(failure))))

    def _leave_after_failure(self) -> None:
        self._acknowledge()
        if self._left.wait(GRACE_SECONDS + (LINGER_SECONDS if self.failure.is_own(self._rank) else 0)):
            return
        tell(self._rank, f"{self.failure.as_exception()}\nThis rank did not end by itself and was here:")
        faulthandler.dump_traceback(file=sys.__stderr__)
        try:
            self.before_exit()
        finally:
            exit_now(self.failure.exit_code)

    def _acknowledge(self) -> None:
        if self.failure.is_own(self._rank):
            return
        # At once, in one line: torchrun may end this process before its main thread gets to raise the whole error.
        tell(self._rank, f"ending because rank {self.failure.rank} failed: {self.failure.summary}")
        with suppress(dist.DistError):  # without a store nobody is left to wait for it
            if self._rank in self.failure.waits_for:
                self._store.set(f"failure/stack/{self._rank}", self._stack())
            self._store.add("failure/seen", 1)

    def _stack(self) -> str:
        frame = sys._current_frames().get(self._main_thread)
        return "".join(traceback.format_stack(frame)) if frame else "its main thread is gone\n"

    def _tell_stacks(self, ranks: tuple[int, ...]) -> None:
        for rank in ranks:
            key = f"failure/stack/{rank}"
            if self._store.check([key]):
                tell(self._rank, f"rank {rank} was here:\n{self._store.get(key).decode().rstrip()}")

    def _leave_after_stop(self) -> None:
        """A process that waits for rank 0 in a collective would wait for ever: rank 0 has left."""
        if not self._left.wait(GRACE_SECONDS):
            with suppress(dist.DistError):
                self._store.set(f"alive/{self._rank}", "done")
                self._store.add("goodbyes", 1)
            exit_now(0)

    @staticmethod
    def _wait_until(condition: Callable[[], bool], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not condition() and time.monotonic() < deadline:
            time.sleep(_WAIT_POLL_SECONDS)


def tell(rank: int, text: str) -> None:
    print(f"[rank {rank}] {printable(text)}", file=sys.stderr, flush=True)  # other ranks' and machines' words


def exit_now(code: int) -> None:
    """End the process without any teardown, which could wait for a rank that is gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
