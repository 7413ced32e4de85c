"""How the processes of an attempt find each other in a store that outlives attempts: threads here, over a real store.

Bugs planted, each seen red: ranks welcomed one after the other; an old token's answer taken for everybody's; tokens
read once; a rank that is late left out; nobody waited for; no deadline of rank 0, or of the others.
"""

import threading
import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from advgrpo.errors import UserError
from advgrpo.runtime import distributed, watch
from advgrpo.runtime.distributed import _agree_on_attempt
from tests.runtime.test_watch import Counted

_MOST_SECONDS = 20.0


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    """Who would wait for ever ends before its test does."""
    monkeypatch.setattr(distributed, "START_SECONDS", _MOST_SECONDS / 2)


class Ranks:
    """Processes that are threads, each with a connection of its own to torchrun's kind of store."""

    def __init__(self, world_size: int, store: dist.Store | None = None):
        self.world_size = world_size
        self.store = store or dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.attempts: dict[int, str] = {}
        self.errors: dict[int, Exception] = {}
        self._threads: list[threading.Thread] = []

    def start(self, *ranks: int, by=lambda store: store) -> None:
        """By: what of a connection a rank sees."""
        for rank in ranks:
            store = self.store if isinstance(self.store, dist.HashStore) else self.store.clone()
            self._threads.append(threading.Thread(target=self._one, args=(rank, by(store)), daemon=True))
            self._threads[-1].start()

    def _one(self, rank: int, store: dist.Store) -> None:
        try:
            self.attempts[rank] = _agree_on_attempt(store, rank, self.world_size)
        except UserError as error:
            self.errors[rank] = error

    def end(self) -> None:
        for thread in self._threads:
            thread.join(_MOST_SECONDS)
        assert not any(thread.is_alive() for thread in self._threads)

    def agreed(self) -> str:
        self.end()
        assert self.errors == {}
        assert sorted(self.attempts) == list(range(self.world_size))
        (name,) = set(self.attempts.values())
        return name


def wait_for(store: dist.Store, key: str) -> None:
    store.wait([key], timedelta(seconds=_MOST_SECONDS))


@pytest.mark.parametrize("world_size", [2, 16, 256])
def test_rank_0_asks_as_often_of_however_many_ranks(world_size, monkeypatch):
    monkeypatch.setattr(distributed, "_FIRST_PATIENCE_SECONDS", _MOST_SECONDS)  # or a busy computer costs a round
    ranks, counted = Ranks(world_size, dist.HashStore()), []
    ranks.start(*range(1, world_size))
    for rank in range(1, world_size):
        wait_for(ranks.store, f"hello/{rank}")
    ranks.start(0, by=lambda store: counted.append(Counted(store)) or counted[0])
    ranks.agreed()
    assert counted[0].asked == 4


def test_ranks_that_are_late_are_waited_for_and_rank_0_too():
    ranks = Ranks(3)
    ranks.start(1)
    time.sleep(0.2)
    ranks.start(0)
    time.sleep(0.2)
    assert ranks.attempts == {}
    ranks.start(2)
    ranks.agreed()


def test_tokens_of_an_attempt_that_is_gone_are_no_answer_to_the_next_one(monkeypatch):
    monkeypatch.setattr(watch, "POLL_SECONDS", 0.1)
    first = Ranks(3)
    first.start(0, 1, 2)
    old = first.agreed()
    second = Ranks(3, first.store)
    second.start(1)
    time.sleep(0.2)
    assert second.attempts == {}, "it has been answered before, but not this token"
    second.start(0)
    time.sleep(0.5)
    assert 0 not in second.attempts, "rank 2 has left its old token alone"
    second.start(2)
    assert second.agreed() != old


def test_a_rank_that_dies_before_it_reads_its_answer_and_comes_again_is_answered(monkeypatch):
    monkeypatch.setattr(watch, "POLL_SECONDS", 0.1)
    ranks = Ranks(3)
    ranks.store.set("hello/1", "0123456789abcdef")  # and it is gone
    ranks.start(0, 2)
    wait_for(ranks.store, "welcome/0123456789abcdef")
    time.sleep(0.3)
    assert 0 not in ranks.attempts
    ranks.start(1)
    assert ranks.agreed() == ranks.store.get("welcome/0123456789abcdef").decode()


@pytest.mark.parametrize("come", [{0, 1}, {1, 2}, {0}], ids=["one is missing", "rank 0 is missing", "only rank 0"])
@pytest.mark.parametrize("old", [False, True], ids=["", "with old tokens"])
def test_who_waits_for_a_rank_that_never_comes_is_told(come, old, monkeypatch):
    monkeypatch.setattr(watch, "POLL_SECONDS", 0.1)
    ranks = Ranks(3)
    if old:
        first = Ranks(3, ranks.store)
        first.start(0, 1, 2)
        first.agreed()
    monkeypatch.setattr(distributed, "START_SECONDS", 0.5)
    began = time.monotonic()
    ranks.start(*come)
    ranks.end()
    waiting = {0} & come or come  # where it is there, rank 0 decides whether all are
    assert waiting <= ranks.errors.keys()
    assert all("not all processes of the job came up within 0 s" in str(ranks.errors[rank]) for rank in waiting)
    assert time.monotonic() - began >= 0.5
