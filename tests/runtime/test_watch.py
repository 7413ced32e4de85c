"""What a watch sees in the notes of the others, in one process: who is looked at, and how long what may take."""

import json
import os
import re
import threading
import time
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from advgrpo.runtime import watch
from advgrpo.runtime.distributed import Distributed
from advgrpo.runtime.watch import ErrorFile, Note, StopRequested, Watch


@pytest.fixture
def clock(monkeypatch):
    """Seconds that only the test moves on."""
    now = [1000.0]
    monkeypatch.setattr(watch.time, "monotonic", lambda: now[0])
    return now


def watches(world_size: int) -> tuple[list[Watch], dist.HashStore]:
    """A watch of every rank, not running, over one store."""
    store = dist.HashStore()
    return [Watch(store, rank, world_size) for rank in range(world_size)], store


def look(one: Watch):
    try:
        return one._look()
    finally:
        one.leave()  # of faulthandler's timer


def test_every_rank_is_watched_by_another_one(clock):
    """A rank that nobody looks at can die unseen."""
    seen = set()
    for rank in range(3):
        everyone, store = watches(3)
        for one in everyone:
            store.set(f"alive/{one._rank}", json.dumps(asdict(Note(beat=7, doing="its work"))))
        assert look(everyone[rank]) is None
        clock[0] += 3600.0  # stopped and continued: nobody was seen to be silent
        assert look(everyone[rank]) is None
        for _ in range(int(watch.SILENCE_SECONDS / watch.POLL_SECONDS)):
            clock[0] += watch.POLL_SECONDS
            failure = look(everyone[rank])
        assert failure.reporter == rank
        assert "its last work was 'its work'" in failure.summary
        seen.add(failure.rank)
    assert seen == {0, 1, 2}


def test_each_rank_that_is_behind_is_looked_after_by_one_that_waits(clock):
    """All together read as many notes as there are ranks, and the ones that hang are found."""
    (everyone, store), behind = watches(64), {0, 5, 6, 7, 40, 63}
    for one in everyone:
        store.set(f"alive/{one._rank}", json.dumps(asdict(Note(place=3 - (one._rank in behind), within=9.0))))
    store.set("alive/41", "done")  # has left: nobody waits for it, nor relies on it
    waiting, read = [one for one in everyone if one._rank not in behind | {41}], []
    for one in waiting:
        one._store = SimpleNamespace(check=store.check, get=lambda key: read.append(key) or store.get(key))
    named = [one.waited_for(3) for one in waiting]
    assert sorted(int(rank) for text in named for rank in re.findall(r"rank (\d+)", text)) == sorted(behind)
    assert len(read) <= 64
    seen = [{} for _ in waiting]
    assert not any(one.late(3, clock[0], own) for one, own in zip(waiting, seen))
    clock[0] += 10.0
    late = [found for one, own in zip(waiting, seen) if (found := one.late(3, clock[0], own))]
    assert [re.match(r"rank (\d+) has not come any further", text)[1] for text in late] == ["5", "40", "63"]


class Counted:
    """A store that counts what is asked of it."""

    def __init__(self, store: dist.Store):
        self.store, self.asked = store, 0

    def __getattr__(self, name):
        self.asked += 1
        return getattr(self.store, name)


def test_one_rank_looks_for_the_cause_of_a_collective_that_failed_on_all(monkeypatch):
    """Each of a thousand reading the notes of a thousand would be what the store does in its last seconds."""
    monkeypatch.setattr(Watch, "_wait_until", staticmethod(lambda condition, seconds: None))
    (everyone, store), behind = watches(64), {7, 40}
    for one in everyone:
        one.note = Note(place=3 - (one._rank in behind), doing="its work")
        store.set(f"alive/{one._rank}", json.dumps(asdict(one.note)))
        one._store = Counted(store)
    waiting = [one for one in everyone if one._rank not in behind]
    monkeypatch.setattr(Watch, "_diagnose", lambda self, before, after: alive(self, before, after))
    causes = {one.report(watch.CollectiveError("all_gather timed out")) for one in waiting}
    (cause,) = causes
    assert cause.waits_for == (7, 40)
    assert "not there: rank 7 (its work), rank 40 (its work)" in cause.summary
    assert max(one._store.asked for one in waiting) <= 12


real_diagnose = Watch._diagnose


def alive(one: Watch, before: dict[int, Note], after: dict[int, Note]):
    """The diagnosis where a beat has passed between the notes."""
    for note in after.values():
        note.beat += 1
    return real_diagnose(one, before, after)


@pytest.mark.parametrize(
    ("dies", "reports", "polls"),
    [(99, 7, 7), (0, 99, 4), (3, 99, 6), (99, 99, 8)],
    ids=["it takes its time", "it is dead", "it dies", "it hangs"],
)
def test_how_long_the_others_wait_for_the_rank_that_looks_for_the_cause(dies, reports, polls, monkeypatch):
    """As long as it lives, within what all may take to the end; of a dead one nobody expects a report."""
    (first, second), store = watches(2)
    monkeypatch.setattr(watch, "LINGER_SECONDS", 0.0)
    cause, waited = watch.Failure(0, 0, "not there: rank 7", "not there: rank 7"), []

    def wait(condition, seconds: float) -> None:
        if seconds == watch.POLL_SECONDS:
            waited.append(seconds)
            if len(waited) <= dies:
                store.set("alive/0", json.dumps(asdict(Note(beat=len(waited)))))
            if len(waited) == reports:
                second.failure = first._publish(cause)

    monkeypatch.setattr(Watch, "_wait_until", staticmethod(wait))
    store.set("alive/0", json.dumps(asdict(Note())))
    store.set("diagnosing", "0")
    found = second.report(watch.CollectiveError("all_gather timed out"))
    assert len(waited) == polls
    if reports < 99:
        assert found == cause
    else:
        assert found.is_own(1)
        assert found.summary.endswith("CollectiveError: all_gather timed out")


@pytest.mark.parametrize(("within", "wanted"), [(None, 40.0), (7.0, 7.0)])
def test_work_without_a_limit_of_its_own_has_the_collectives(within, wanted):
    job = Distributed(0, 2, 0, "cpu")
    job.timeout_seconds, (job._watch, _) = 40.0, watches(2)[0]
    job.progress("its work", within_seconds=within)
    assert (job._watch.note.doing, job._watch.note.within) == ("its work", wanted)


def test_the_first_report_counts(monkeypatch):
    monkeypatch.setattr(watch, "LINGER_SECONDS", 0.0)
    (first, second), _ = watches(2)
    causes = [one.report(error) for one, error in ((first, OSError("fire")), (second, RuntimeError("echo")))]
    assert [cause.summary for cause in causes] == ["OSError: fire"] * 2


def test_a_rank_that_was_asked_to_stop_goes_on_until_rank_0_has_stopped():
    """Rank 0 saves: if another one left first it could wait for that one in a collective."""
    job = Distributed(1, 2, 0, "cpu")
    (_, job._watch), job._store = watches(2)
    job.ask_to_stop("SIGTERM")
    job.check_stop()
    look(job._watch)
    assert json.loads(job._store.get("stop")) == {"machine": "0", "reason": "SIGTERM"}, "rank 0 will read it"
    job.check_stop()
    job._store.set("stopped", watch.stop_wish("SIGTERM", "0"))
    look(job._watch)
    with pytest.raises(StopRequested, match="SIGTERM"):
        job.check_stop()


@pytest.mark.parametrize(
    ("asked", "left", "goes_on"),
    [("1", "1", True), ("0", "1", False), ("1", "0", False)],
    ids=["another machine", "this machine", "no restart left"],
)
def test_a_machine_goes_on_where_another_one_was_told_to_stop(asked, left, goes_on, monkeypatch):
    """torchrun starts processes again that fail, if it may; a signal to one of a machine is meant for the job."""
    monkeypatch.setenv("GROUP_RANK", "0")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", str(2 + int(left)))
    job = Distributed(1, 2, 0, "cpu")
    (_, job._watch), job._store = watches(2)
    assert not job.stopped_by_others
    job._store.set("stop", watch.stop_wish("SIGTERM", asked))
    look(job._watch)
    assert job.stop_reason == "SIGTERM"
    assert job.stopped_by_others == goes_on
    job.ask_to_stop("SIGTERM")
    assert not job.stopped_by_others


def test_who_is_to_fail_waits_until_rank_0_has_saved(monkeypatch):
    """torchrun would end rank 0 in the middle of it, where they are on one machine."""
    monkeypatch.setattr(Watch, "goes_on", property(lambda self: True))
    (_, other), store = watches(2)
    other._left.set()
    other._store = Counted(store)
    leaving = threading.Thread(target=other._say_goodbye, daemon=True)
    leaving.start()
    leaving.join(0.5)
    assert leaving.is_alive()
    assert store.get("alive/1") == b"done", "rank 0 must not take its silence for its death"
    assert other._store.asked <= 2, "asleep in the store rather than asking again and again"
    store.set("saved", "")
    leaving.join(10)
    assert not leaving.is_alive()


@pytest.mark.parametrize("answers", [False, True])
def test_a_process_that_is_cut_off_saves_and_ends_by_itself(answers, monkeypatch):
    """The store neither answers nor fails, and both threads that ask it wait for ever."""
    for name, seconds in {"POLL_SECONDS": 0.02, "SILENCE_SECONDS": 0.3, "GRACE_SECONDS": 0.1}.items():
        monkeypatch.setattr(watch, name, seconds)
    monkeypatch.setattr(watch, "LINGER_SECONDS", 0.0)
    done, mended = [], threading.Event()
    monkeypatch.setattr(watch, "exit_now", lambda code: done.append(code))
    store = dist.HashStore()
    stuck = SimpleNamespace(set=store.set if answers else lambda *_: mended.wait(), check=store.check, get=store.get)
    one = Watch(stuck, 0, 2)
    one.before_exit = lambda: done.append("saved")
    one.start()
    deadline = time.monotonic() + (0.8 if answers else 20.0)
    while len(done) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert done == ([] if answers else ["saved", 1])
    if not answers:
        assert "was cut off" in one.failure.summary
        assert one.report(OSError("an echo")) is one.failure, "nothing more is asked of the store"
    one.leave()
    mended.set()
    one.join()


def test_the_end_that_hangs_comes_after_the_one_that_writes_the_error_down(monkeypatch):
    """C's timer, which kills in the middle of whatever is done."""
    killed = []
    monkeypatch.setattr(watch.faulthandler, "dump_traceback_later", lambda seconds, **_: killed.append(seconds))
    monkeypatch.setattr(watch, "exit_now", lambda code: None)
    for name in ("GRACE_SECONDS", "LINGER_SECONDS"):
        monkeypatch.setattr(watch, name, 0.1)
    monkeypatch.setattr(watch, "SAVE_SECONDS", 0.0)
    (one, other), _ = watches(2)
    for each in (one, other):
        each.failure = watch.Failure(0, 0, "burning", "burning")
        began = time.monotonic()
        each._leave_after_failure()
        assert killed.pop() >= time.monotonic() - began + 1


def test_torchruns_agent_never_reads_half_an_error(tmp_path, monkeypatch):
    file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as dying:
        dying.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            ErrorFile().record_exception(OSError("on fire"))
    assert not file.exists(), "the agent takes that for a process that left no error"
    try:
        raise OSError("on fire")
    except OSError as error:
        ErrorFile().record_exception(error)
    read = ProcessFailure(local_rank=0, pid=1, exitcode=1, error_file=str(file))
    assert read.message["message"] == "OSError: on fire"
    assert "in test_torchruns_agent_never_reads_half_an_error" in read.message["extraInfo"]["py_callstack"]
    assert abs(read.timestamp - time.time()) < 60
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path))  # a folder
    ErrorFile().record_exception(OSError("on fire"))
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE")
    ErrorFile().record_exception(OSError("on fire"))
