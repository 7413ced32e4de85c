"""One worker: a process of this machine, or a Ray actor on any machine of a cluster.

What its reward raises is raised here; `WorkerDied` says that nobody is there any more to answer.
"""

from __future__ import annotations

import importlib
import importlib.util
import pickle
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection
from types import ModuleType
from typing import Any, Literal, Protocol

from advgrpo.errors import UserError, one_line
from advgrpo.rewards.pool import child
from advgrpo.rewards.pool.recipe import RAISED, Host

Kind = Literal["processes", "ray"]
_POLL_SECONDS = 0.2
_MOST = 300  # characters of another's error
_LATE = "gave no answer within {:g} s and was ended"


class WorkerDied(Exception):
    """A worker is gone, or was ended because it did not answer in time; the message goes on after "its worker"."""


class Worker(Protocol):
    """Who has a reward and is asked, by one thread at a time."""

    def ask(self, method: str, argument: Any, *, within_seconds: float) -> Any:
        """What `Host` answers; it builds its reward first.

        Raises:
            WorkerDied: no answer: it has ended, or has been ended after `within_seconds`.
            UserError, RunFailure, FloatingPointError, ValueError: as the reward raised it.
        """
        ...

    def end(self) -> None:
        """At once, from any thread; who waits for an answer gets `WorkerDied`. Harmless when it has ended."""
        ...


class ProcessWorker:
    """A Python process of its own, not a fork: the trainer has threads and a GPU, and its main module may be a script
    that must not run twice."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", child.__name__, str(theirs.fileno())]
            self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        self._connection, self._overdue = Connection(ours.detach()), threading.Event()

    def ask(self, method: str, argument: Any, *, within_seconds: float) -> Any:
        timer = threading.Timer(within_seconds, self._late)
        timer.daemon = True
        timer.start()  # also for a question that nobody takes out of the socket
        try:
            self._connection.send_bytes(pickle.dumps((method, argument), pickle.HIGHEST_PROTOCOL))
            while not self._connection.poll(_POLL_SECONDS):
                if self._process.poll() is not None:  # what it has forked may hold the socket
                    raise EOFError
            answer = pickle.loads(self._connection.recv_bytes())
        except (EOFError, OSError):
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(1.0)  # its own end, if it comes to one
            self.end()
            self._process.wait()
            late, code = self._overdue.is_set(), self._process.returncode
            raise WorkerDied(_LATE.format(within_seconds) if late else f"ended with {_how(code)}") from None
        finally:
            timer.cancel()
        return _value(answer)

    def _late(self) -> None:
        self._overdue.set()
        self.end()

    def end(self) -> None:
        with suppress(ProcessLookupError):
            self._process.kill()


def _how(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit status {code}"


class RayWorker:
    """An actor, which lives as long as this driver.

    Args:
        ray: the package, connected.
        gpus: of each actor, which may be a part of one; Ray then chooses the device, and the recipe's is "cuda".
    """

    def __init__(self, ray: ModuleType, gpus: float) -> None:
        self._ray = ray
        self._actor = self._ray.remote(Host).options(num_cpus=1, num_gpus=gpus, max_restarts=0).remote()

    def ask(self, method: str, argument: Any, *, within_seconds: float) -> Any:
        errors = self._ray.exceptions
        try:
            answered = self._actor.answer.remote(method, argument)
            answer = self._ray.get(answered, timeout=within_seconds)
        except errors.GetTimeoutError:
            self.end()
            raise WorkerDied(_LATE.format(within_seconds)) from None
        except errors.RayActorError as error:
            raise WorkerDied(f"was lost ({one_line(str(error), _MOST)})") from None
        return _value(answer)

    def end(self) -> None:
        if self._ray.is_initialized():  # else the actor has ended with it, and to ask would start it again
            self._ray.kill(self._actor)


def _connected() -> ModuleType:
    """Ray, in the cluster that RAY_ADDRESS names, else in one that is started on this machine."""
    ray = importlib.import_module("ray")
    if not ray.is_initialized():
        ray.init(log_to_driver=False, logging_level="error", configure_logging=False)
    return ray


def _value(answer: tuple[str, Any]) -> Any:
    kind, value = answer
    if kind != "ok":
        raise RAISED[kind](value)
    return value


def check_installed(kind: Kind, field: str) -> None:
    """UserError, naming `field`, where workers of this kind need a package that is not installed."""
    if kind == "ray" and importlib.util.find_spec("ray") is None:
        raise UserError(f"{field} = ray: Ray is not installed; pip install 'advgrpo[ray]', or want processes")


def starter(kind: Kind, gpus: float) -> Callable[[], Worker]:
    """What starts one more worker, which has no reward yet; from any thread."""
    return ProcessWorker if kind == "processes" else partial(RayWorker, _connected(), gpus)
