"""The thread by which the processes of a job know about each other: signs of life, failure reports, requests to stop.

Every process has one, with its own connection to the job's key-value store. Once a second it leaves a note (`Note`): a
beat, what the process is doing, and at which meeting point of the job it has arrived. From the notes of the others a
process that waits can say who keeps it waiting, and where; who stops leaving notes is dead or stopped.

What torchrun and c10d do already is not done here: an agent sees at once that a process of its own machine has ended,
and starts all again; a collective of gloo's ends at its time-out, and NCCL's watchdog kills a process whose does not; a
store whose machine answers "connection reset" raises. docs/reliability.md has, for all that is here, what torch does in
that case, what it does not, and the test that goes red without it.
"""

from __future__ import annotations

import faulthandler
import json
import math
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import ErrorHandler

from advgrpo.errors import RunFailure, UserError, printable
from advgrpo.runtime.atomic import write_atomically
from advgrpo.runtime.command import INTERRUPTED

# How long a job lives on after a process was stopped or hangs is the sum of these, of the collective timeout, and of
# what torchrun leaves between SIGTERM and SIGKILL (`seconds_to_the_end`): less than a minute.
POLL_SECONDS = 1.0
SILENCE_SECONDS = 20.0  # without a sign of life a process counts as dead; nothing here holds the GIL this long
BEHIND_SECONDS = 6.0  # beyond what a process allows itself: a collective's own time-out, which says more, comes first
GRACE_SECONDS = 5.0  # for the main thread to end by itself
SAVE_SECONDS = 7.0  # for what is saved before the end, which begins at once, beside the grace
LONGEST_SAVE_SECONDS = 600.0  # that the others wait for rank 0, where their end would be its end
END_SECONDS = 2.0  # after the grace, for the error to be written down
LINGER_SECONDS = 5.0  # a failed rank stays for the others to read its report: torchrun ends all once one exits
TORCHRUN_SECONDS = 30.0  # between SIGTERM and SIGKILL, which alone ends a stopped process
_WAIT_POLL_SECONDS = 0.05
_REPORT_POLLS = 3  # until a rank that fails is taken not to report it, and one without a new note to be dead
_DIAGNOSIS_POLLS = 8  # until the rank that looks for the cause is taken not to report it, alive or not


def seconds_to_the_end(timeout: float) -> dict[str, float]:
    """How long a job can go on once a process of it does not, by what became of that process.

    Args:
        timeout: of collectives, and of work within `monitored` that sets itself no other limit.
    """
    leaving = max(GRACE_SECONDS + END_SECONDS, SAVE_SECONDS)
    return {
        "stopped": SILENCE_SECONDS + 2 * POLL_SECONDS + leaving + TORCHRUN_SECONDS,
        "hangs": timeout + BEHIND_SECONDS + 2 * POLL_SECONDS + leaving,
        "hangs, and the collective notices": timeout + _DIAGNOSIS_POLLS * POLL_SECONDS + LINGER_SECONDS + leaving,
    }


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
        self.stop_machine = ""  # whose wish that was first
        self.has_stopped = False  # rank 0 has stopped: nothing is left for this process to do
        self.has_reported = False
        self.before_exit: Callable[[], None] = lambda: None  # done once the job has failed; must not raise
        self.note = Note()
        self._store = store
        self._rank = rank
        self._world_size = world_size
        self._main_thread = threading.main_thread().ident
        self._left = threading.Event()  # the main thread leaves the job
        self._looks = 0  # how often the store has answered all that one look asks it
        self._cut_off = False  # it answers no more, and nothing may be asked of it
        self._neighbour = (rank + 1) % world_size
        self._neighbour_note = b""
        self._clock, self._last_look = 0.0, time.monotonic()  # seconds of this thread's own: not those of a SIGSTOP
        self._neighbour_seen = 0.0  # by that clock
        self._neighbour_at = (0, 0)  # place and steps of the neighbour when it was last seen to move on
        self._neighbour_moved = 0.0

    def run(self) -> None:
        threading.Thread(target=self._fence, name="advgrpo-fence", daemon=True).start()
        while self.failure is None and not self.has_stopped:
            try:
                failure = self._look()
                self.failure = self.failure or failure
                self._looks += 1
            except dist.DistError as error:
                lost = f"rank {self._rank} lost the job's store, which ends with rank 0 or torchrun ({error})"
                self.failure = Failure(0, 0, lost, lost)
            if self.failure is None and not self.has_stopped and self._left.wait(POLL_SECONDS):
                return
        if self.failure is None:
            self._leave_after_stop()
        elif not self._cut_off:
            self._leave_after_failure()

    def _fence(self) -> None:
        """End this process where the store has not answered for as long as makes others count it as dead.

        A store whose machine is cut off neither answers nor fails, and who asks it waits for ever: `run`, and the main
        thread. The others go on without this process, which must not hold their folder, or write to it. What counts is
        time in which this thread ran: after SIGSTOP and SIGCONT the store is asked before anything is concluded.
        """
        looks, waited = self._looks, 0.0
        while self.failure is None and not self.has_stopped and not self._left.wait(POLL_SECONDS):
            waited = waited + POLL_SECONDS if looks == self._looks else 0.0
            looks = self._looks
            if waited > SILENCE_SECONDS:
                text = f"rank {self._rank} was cut off: the job's store has not answered for {waited:.0f} s"
                self._cut_off, self.failure = True, Failure(self._rank, self._rank, text, text)
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
            diagnosis, waits_for = self._diagnose_once()
        self.has_reported = True
        if self._cut_off:
            return self.failure
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
        self.join(SILENCE_SECONDS)
        self._say_goodbye()

    def _say_goodbye(self) -> None:
        """Last of all: rank 0, and the store with it, may be gone right after.

        Those that are to fail wait for rank 0 to have saved: torchrun ends all processes of a machine, rank 0 too, once
        one of them has failed. A store that has gone silent would be asked for ever, so a timer of C's ends that.
        """
        most = SILENCE_SECONDS + (LONGEST_SAVE_SECONDS if self.goes_on else 0.0)
        faulthandler.dump_traceback_later(most, exit=True, file=sys.__stderr__)
        self._store.set(f"alive/{self._rank}", "done")
        if self.goes_on:
            all_come(self._store, ["saved"], LONGEST_SAVE_SECONDS)
        self._store.add("goodbyes", 1)
        faulthandler.cancel_dump_traceback_later()

    def wait_for_goodbyes(self, seconds: float = math.inf) -> None:
        def all_left() -> bool:
            return self.failure is not None or self._store.add("goodbyes", 0) >= self._world_size - 1

        self._wait_until(all_left, seconds)
        self.leave()

    def late(self, place: int, since: float, seen: dict[int, tuple[tuple[int, int], float]]) -> str:
        """Which of the ranks that this one looks after, expected at `place`, has begun nothing new for longer than it
        may; empty while all move on.

        Args:
            since: when the waiting began, by time.monotonic.
            seen: (place, steps) of every rank and when they were first seen; kept up to date here, {} at first.
        """
        now = time.monotonic()
        for rank, note in self._behind(place):
            at = (note.place, note.steps)
            if rank not in seen or seen[rank][0] != at:
                seen[rank] = (at, now if rank in seen else since)
            if note.within and now - seen[rank][1] > note.within:
                return f"rank {rank} has not come any further than {note.doing!r} for {now - seen[rank][1]:.0f} s"
        return ""

    def waited_for(self, place: int) -> str:
        """Which of the ranks that this one looks after are not at `place` yet and at what; empty where all are."""
        return self._named_behind(dict(self._behind(place)), place)

    def _behind(self, place: int) -> Iterator[tuple[int, Note]]:
        """Those that follow this rank in the ring and are not at `place` yet, up to the first that is; their notes.

        So each rank that is behind is looked after by one of those that wait for it, and all of them together read as
        many notes as there are ranks.
        """
        for step in range(1, self._world_size):
            rank = (self._rank + step) % self._world_size
            note = self._note_of(rank)
            if note is not None and note.place >= place:
                return
            if note is not None:
                yield rank, note

    def _named_behind(self, notes: dict[int, Note], place: int) -> str:
        """The ranks that have not come to `place` yet and what they are doing."""
        return ", ".join(f"rank {rank} ({note.doing})" for rank, note in notes.items() if note.place < place)

    def _look(self) -> Failure | None:
        # A C extension that never gives the GIL back stops this thread too; the timer below belongs to C.
        faulthandler.dump_traceback_later(0.75 * SILENCE_SECONDS, file=sys.__stderr__)
        self.note.beat += 1
        self._store.set(f"alive/{self._rank}", json.dumps(asdict(self.note)))
        if self._store.check(["failure"]):
            return Failure.read(self._store.get("failure"))
        if self.wanted_stop is not None and self.stop_reason is None:
            self._store.compare_set("stop", "", stop_wish(self.wanted_stop, machine()))
        for key in ("stop", "stopped"):
            if self.stop_reason is None and self._store.check([key]):
                wish = json.loads(self._store.get(key))
                self.stop_machine, self.stop_reason = wish["machine"], wish["reason"]
        self.has_stopped = self._rank != 0 and self._store.check(["stopped"])
        key, now = f"alive/{self._neighbour}", self._own_time()
        note = self._store.get(key) if self._store.check([key]) else b""
        if note != self._neighbour_note or note in (b"", b"done"):
            self._neighbour_note, self._neighbour_seen = note, now
        elif now - self._neighbour_seen > SILENCE_SECONDS:
            text = (
                f"it has given no sign of life for {SILENCE_SECONDS:.0f} s and left no error (killed, stopped, out of "
                f"memory, or its machine is gone); its last work was {Note.read(note).doing!r}"
            )
            return self._publish(Failure(self._neighbour, self._rank, text, text))
        return self._look_for_a_hang(Note.read(note), now) if note not in (b"", b"done") else None

    def _own_time(self) -> float:
        """After SIGSTOP and SIGCONT of a whole job nobody has seen the others be silent."""
        now = time.monotonic()
        self._clock += min(now - self._last_look, 4 * POLL_SECONDS)
        self._last_look = now
        return self._clock

    def _look_for_a_hang(self, note: Note, now: float) -> Failure | None:
        """A failure if the neighbour, which lives, keeps this process waiting for longer than it allows itself.

        Every process looks, also one whose main thread waits inside NCCL: somebody in the ring waits for the one that
        hangs, and is its neighbour.
        """
        at = (note.place, note.steps)
        if at != self._neighbour_at or note.place >= self.note.place or not note.within:
            self._neighbour_at, self._neighbour_moved = at, now
        waited = now - self._neighbour_moved
        if waited <= note.within + BEHIND_SECONDS:
            return None
        text = (
            f"it has not come any further than {note.doing!r} for {waited:.0f} s, while rank {self._rank} waits for it "
            f"after {self.note.doing!r}"
        )
        hangs = Failure(self._neighbour, self._rank, text, text, waits_for=(self._neighbour,))
        return self._publish(hangs)

    def _notes(self) -> dict[int, Note]:
        """The newest note of every other rank that still works; two requests, once all have left one."""
        keys = {f"alive/{rank}": rank for rank in range(self._world_size) if rank != self._rank}
        if not self._store.check(list(keys)):
            keys = {key: rank for key, rank in keys.items() if self._store.check([key])}
        texts = self._store.multi_get(list(keys)) if keys else []
        return {rank: Note.read(text) for rank, text in zip(keys.values(), texts) if text != b"done"}

    def _note_of(self, rank: int) -> Note | None:
        """The newest note of a rank; None before its first one, and after it has left."""
        key = f"alive/{rank}"
        text = self._store.get(key) if self._store.check([key]) else b"done"
        return None if text == b"done" else Note.read(text)

    def _diagnose_once(self) -> tuple[str, tuple[int, ...]]:
        """`_diagnose` on the first rank that asks, after waiting for a report; the others wait for that rank's report.

        All of them reading the notes of all would be a million notes of a job of a thousand ranks. Where no report
        comes, because the one that diagnoses has died meanwhile, nothing is known.
        """
        try:
            first = int(self._store.compare_set("diagnosing", "", str(self._rank)))
            if first != self._rank:
                self._wait_for_report_of(first)
                return "", ()
            before = self._notes()
            self._wait_until(lambda: self.failure is not None, _REPORT_POLLS * POLL_SECONDS)
            diagnosis, waits_for = ("", ()) if self.failure is not None else self._diagnose(before, self._notes())
        except dist.DistError:  # the store is gone, which `report` says
            return "", ()
        if diagnosis:
            tell(self._rank, diagnosis)
        return diagnosis, waits_for

    def _wait_for_report_of(self, rank: int) -> None:
        """Until a failure is known; no longer than `rank` leaves notes, and not for ever.

        Who gives up reports what little it knows, and the first report counts.
        """
        seen, silent = None, 0
        for _ in range(_DIAGNOSIS_POLLS):
            self._wait_until(lambda: self.failure is not None, POLL_SECONDS)
            note = self._note_of(rank)
            silent = silent + 1 if note == seen else 0
            seen = note
            if self.failure is not None or silent == _REPORT_POLLS:
                return

    def _diagnose(self, before: dict[int, Note], after: dict[int, Note]) -> tuple[str, tuple[int, ...]]:
        """Why a collective failed, from the notes around a few seconds of waiting: who is silent, or who is behind."""
        silent = [rank for rank in after if rank in before and before[rank].beat == after[rank].beat]
        if silent:
            named = ", ".join(f"rank {rank} (last work: {after[rank].doing})" for rank in silent)
            return f"no sign of life since from {named}: probably killed or stopped, see torchrun's exit codes", ()
        behind = tuple(rank for rank, note in after.items() if note.place < self.note.place)
        if not behind:
            return "", ()
        return f"not there: {self._named_behind(after, self.note.place)}; this rank was at {self.note.doing!r}", behind

    def _publish(self, failure: Failure) -> Failure:
        """The first report wins; returns the winner."""
        return Failure.read(self._store.compare_set("failure", "", json.dumps(asdict(failure))))

    def _leave_after_failure(self) -> None:
        own, began = self.failure.is_own(self._rank), time.monotonic()
        grace = GRACE_SECONDS + (LINGER_SECONDS if own else 0.0)
        # A timer of C's ends the process also where the work before the end hangs, or nobody gets the GIL any more.
        latest = max(grace + END_SECONDS, SAVE_SECONDS)
        faulthandler.dump_traceback_later(latest, exit=True, file=sys.__stderr__)
        if self._left.is_set():  # while the timer was set
            faulthandler.cancel_dump_traceback_later()
            return
        self._acknowledge()
        self.before_exit()
        if self.failure.reporter == self._rank and not own:
            self._tell_stacks(self.failure.waits_for)
        if self._left.wait(max(0.0, grace - (time.monotonic() - began))):
            return
        error = self.failure.as_exception()
        ErrorFile().record_exception(error)
        tell(self._rank, f"{error}\nThis rank did not end by itself and was here:")
        faulthandler.dump_traceback(file=sys.__stderr__)
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
        """The stacks that other ranks leave when they read this rank's report, which takes them a second."""
        with suppress(dist.DistError):
            keys = [f"failure/stack/{rank}" for rank in ranks]
            self._wait_until(lambda: self._store.check(keys), 2 * POLL_SECONDS)
            for rank, key in zip(ranks, keys):
                if self._store.check([key]):
                    tell(self._rank, f"rank {rank} was here:\n{self._store.get(key).decode().rstrip()}")

    def _leave_after_stop(self) -> None:
        """A process that waits for rank 0 in a collective would wait for ever: rank 0 has left."""
        if not self._left.wait(GRACE_SECONDS):
            with suppress(dist.DistError):
                self._say_goodbye()
            exit_now(INTERRUPTED if self.goes_on else 0)

    @property
    def goes_on(self) -> bool:
        """Whether the job stops because another machine was told to, which may be all that is taken away: with
        torchrun's `--nnodes MIN:MAX` this one goes on, which it does where processes fail and may be started again.

        A signal that reached one process of this machine was meant for the job.
        """
        elsewhere = self.wanted_stop is None and self.stop_reason is not None and self.stop_machine != machine()
        starts, most = (int(os.environ.get(f"TORCHELASTIC_{name}", "0")) for name in ("RESTART_COUNT", "MAX_RESTARTS"))
        return elsewhere and starts < most

    @staticmethod
    def _wait_until(condition: Callable[[], bool], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not condition() and time.monotonic() < deadline:
            time.sleep(_WAIT_POLL_SECONDS)


def all_come(store: dist.Store, keys: Sequence[str], seconds: float) -> bool:
    """Whether all keys are set within so many seconds; one request, which the store answers when they are there."""
    try:
        store.wait(list(keys), timedelta(seconds=seconds))
    except dist.DistStoreError:  # also where the store is gone, which the next request to it says
        return False
    return True


def machine() -> str:
    """Which of the job's machines this process is on, as torchrun numbers its agents."""
    return os.environ.get("GROUP_RANK", "0")


def stop_wish(reason: str, of: str) -> str:
    """What the store holds of a machine's wish to stop."""
    return json.dumps({"machine": of, "reason": reason})


def tell(rank: int, text: str) -> None:
    print(f"[rank {rank}] {printable(text)}", file=sys.stderr, flush=True)  # other ranks' and machines' words


class ErrorFile(ErrorHandler):
    """The file that torchrun names in its report: torch's content, but whole. Half of one, as a process leaves it that
    is killed while it writes, ends the agent that reads it, and with it this machine's part in the job.
    """

    def record_exception(self, e: BaseException) -> None:
        """Nothing where torchrun has not started this process, or its file cannot be written."""
        if not (file := os.environ.get("TORCHELASTIC_ERROR_FILE")):
            return
        told = {"py_callstack": "".join(traceback.format_exception(e)), "timestamp": str(int(time.time()))}
        content = {"message": {"message": f"{type(e).__name__}: {e}", "extraInfo": told}}
        with suppress(OSError):
            write_atomically(Path(file), json.dumps(content))


def exit_now(code: int) -> None:
    """End the process without any teardown, which could wait for a rank that is gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
