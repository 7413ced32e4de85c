"""The HTTP server that `serve.py` starts: what it refuses, and what a request may cost; the protocol is remote.py's.

Who asks is looked at first (401, 403), then the form of the request (415, 411, 413), then its body
(`scoring_request.py`). Every part has its time: a client that sends a byte now and then is answered 408, and a request
that the judge cannot answer in time 503, which says that it may be sent again later.

Why Host and Origin are looked at: a web page that somebody on this machine or network visits can make the browser send
requests here. Such requests have an Origin, or, after the page's own name was made to point here, that name as Host.
"""

from __future__ import annotations

import hmac
import io
import ipaddress
import json
import logging
import queue
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from advgrpo.errors import UserError, printable
from advgrpo.rewards.checks import finite_scores
from advgrpo.rewards.remote import PROTOCOL_VERSION
from advgrpo.rewards.scoring_request import Limits, Refusal, decode, parse_request, too_late

if TYPE_CHECKING:
    from advgrpo.data.references import ReferenceSet
    from advgrpo.rewards.base import Reward

_ANSWER_SECONDS = 10.0  # for a client to take its answer
_LINGER_SECONDS = 5.0  # for a client that was refused to stop sending
_DECODED = 2  # requests whose images are in memory: one is scored, the next is decoded meanwhile
_ROOM = 4  # bodies of the largest size that are in memory
_NAME = "[a-z0-9._-]+"
Result = TypeVar("Result")
_log = logging.getLogger(__name__)


class _Gone(Exception):
    """The client has hung up."""


class ScoringServer(ThreadingHTTPServer):
    """Scores with `reward`, one request at a time, in a thread of its own; call `serve_forever()`.

    Args:
        token: what clients must show; "" asks for none.
        hosts: names that requests may call this server by, beside addresses and localhost.
    """

    request_queue_size = 512  # connections that wait to be taken; the system may allow fewer
    daemon_threads = True

    def __init__(
        self,
        address: tuple[str, int],
        reward: Reward,
        references: ReferenceSet | None,
        limits: Limits,
        token: str,
        hosts: tuple[str, ...],
    ) -> None:
        self.reward, self.references, self.limits, self.token = reward, references, limits, token
        self.hosts = frozenset(name.lower().rstrip(".") for name in ("localhost", socket.gethostname(), *hosts))
        self.room = _Room(_ROOM * limits.max_bytes)
        self._decoded = threading.BoundedSemaphore(_DECODED)
        self._worker = Worker(self.after_each)
        super().__init__(address, _Handler)

    def server_close(self) -> None:
        super().server_close()
        self._worker.stop()

    def after_each(self) -> None:
        """Runs in the thread of scoring after every job, once its result is known to who waits for it."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        if isinstance(sys.exc_info()[1], OSError):
            _log.info("%s: the connection broke", client_address[0])
        else:
            _log.exception("a request of %s", client_address[0])

    def describe(self, path: str) -> dict[str, Any]:
        """The answer to a GET."""
        return {"reward": self.reward.name, "version": PROTOCOL_VERSION}

    def answer(self, path: str, body: bytes, is_wanted: Callable[[], bool]) -> dict[str, Any]:
        """The answer to a POST: the scores of its images.

        Args:
            is_wanted: asked right before scoring, which may be long after the client gave up.

        Raises:
            Refusal: the request is not one, costs too much, or cannot be answered in time.
            Exception: the reward's.
        """
        ends = time.monotonic() + self.limits.score_seconds
        images, prompts = parse_request(body, self.limits, ends)
        return {"scores": self.in_turn(images, ends, is_wanted, lambda images: self._score(images, prompts))}

    def in_turn(
        self,
        images: list[bytes],
        ends: float,
        is_wanted: Callable[[], bool],
        work: Callable[[torch.Tensor], Result],
    ) -> Result:
        """`work` on the decoded images, in the thread of scoring.

        Raises:
            Refusal: a damaged image, or it is not done by `ends` (time.monotonic).
            Exception: that of `work`.
        """
        if not self._decoded.acquire(timeout=max(0.0, ends - time.monotonic())):
            raise too_late("waiting for its turn")
        job = None
        try:
            images = decode(images, self.limits, ends)
            job = self._worker.submit(lambda: _wanted(is_wanted, lambda: work(images)))
        finally:
            if job is None:
                self._decoded.release()
        job.add_done_callback(lambda _: self._decoded.release())
        return result_of(job, ends)

    def _score(self, images: torch.Tensor, prompts: list[str]) -> list[float]:
        scores = self.reward.score(images, prompts, self.references)
        return finite_scores(scores, images, prompts, self.reward.name).tolist()


def result_of(job: Future, ends: float) -> Any:
    """What a job of `Worker` gives; Refusal where that is not known by `ends`, and it is not begun any more."""
    wait([job], max(0.0, ends - time.monotonic()))
    if not job.done():
        job.cancel()  # where it has begun it goes on, and nobody else's begins
        raise too_late("waiting for its scores")
    return job.result()


def _wanted(is_wanted: Callable[[], bool], work: Callable[[], Result]) -> Result:
    if not is_wanted():
        raise _Gone
    return work()


class Worker:
    """One thread for all scoring: rewards are not made for several, and it can be left alone with what hangs.

    Args:
        after_each: called in that thread after every job.
    """

    def __init__(self, after_each: Callable[[], None]) -> None:
        self._jobs: queue.SimpleQueue = queue.SimpleQueue()
        self._after_each = after_each
        self._thread = threading.Thread(target=self._run, name="advgrpo-score", daemon=True)
        self._thread.start()

    def submit(self, work: Callable[[], Any]) -> Future:
        job: Future = Future()
        self._jobs.put((job, work))
        return job

    def stop(self) -> None:
        """After what is waiting now."""
        self._jobs.put(None)

    def join(self) -> None:
        """Wait until it has stopped."""
        self._thread.join()

    def _run(self) -> None:
        while self._take(self._jobs.get()):
            self._after_each()

    @staticmethod
    def _take(entry: tuple[Future, Callable[[], Any]] | None) -> bool:
        """In a function of its own, which keeps no images alive until the next come."""
        if entry is None:
            return False
        job, work = entry
        if job.set_running_or_notify_cancel():
            try:
                job.set_result(work())
            except BaseException as error:
                job.set_exception(error)
        return True


Server = TypeVar("Server", bound=ThreadingHTTPServer)


class _Room:
    """Memory for bodies; whoever finds too little waits, unread."""

    def __init__(self, size: int) -> None:
        self._left, self._changed = size, threading.Condition()

    @contextmanager
    def taken(self, size: int, seconds: float) -> Iterator[None]:
        with self._changed:
            if not self._changed.wait_for(lambda: self._left >= size, seconds):
                raise too_late("before it was read")
            self._left -= size
        try:
            yield
        finally:
            with self._changed:
                self._left += size
                self._changed.notify_all()


class _Incoming(io.RawIOBase):
    """What a client sends, until its time is over: a socket's own time-out starts anew with every byte."""

    def __init__(self, connection: socket.socket, seconds: float) -> None:
        self._connection = connection
        self.allow(seconds)

    def allow(self, seconds: float) -> None:
        self._ends = time.monotonic() + seconds

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        left = self._ends - time.monotonic()
        if left <= 0:
            raise TimeoutError("the request's time is over")
        self._connection.settimeout(left)
        return self._connection.recv_into(buffer)


class _Handler(BaseHTTPRequestHandler):
    server: ScoringServer

    def setup(self) -> None:
        super().setup()
        self._incoming = _Incoming(self.connection, self.server.limits.request_seconds)
        self.rfile = io.BufferedReader(self._incoming)
        self._is_read = False  # all of the request

    def do_POST(self) -> None:
        self._respond(self._posted)

    def do_GET(self) -> None:
        self._respond(lambda: self.server.describe(self.path))

    def _respond(self, work: Callable[[], dict[str, Any]]) -> None:
        headers: dict[str, str] = {}
        try:
            self._check_who()
            status, content = 200, work()
        except _Gone:
            self.log_message("%s", "hung up before its turn")
            return
        except Refusal as refusal:
            status, content, headers = refusal.status, {"error": str(refusal)}, refusal.headers
        except UserError as error:
            status, content = 400, {"error": str(error)}
        except ValueError as error:
            status, content = 400, {"error": f"{type(error).__name__}: {error}"}
        except Exception as error:
            _log.exception("reward %s failed", self.server.reward.name)
            status, content = 500, {"error": f"{type(error).__name__}: {error}"}
        self._answer(status, content, headers)

    def _check_who(self) -> None:
        """Refusal unless it calls this server by a name of its own, comes from no web page, and shows the token."""
        hosts = self.headers.get_all("Host", [])
        if len(hosts) != 1 or not is_own_host(hosts[0], self.server.hosts):
            called = ", ".join(map(repr, hosts)) or "missing"
            remedy = "if that is this server, start it with --allow-hosts"
            raise Refusal(f"the Host of the request is {called}; {remedy}", 403)
        if "Origin" in self.headers:
            raise Refusal("requests of web pages are not served", 403)
        kind, _, given = self.headers.get("Authorization", "").partition(" ")
        token = self.server.token.encode()
        if token and not (kind.lower() == "bearer" and hmac.compare_digest(given.strip().encode("utf-8"), token)):
            raise Refusal("want the server's token as Authorization: Bearer TOKEN", 401, WWW_Authenticate="Bearer")

    def _posted(self) -> dict[str, Any]:
        limits = self.server.limits
        if self.headers.get_content_type() != "application/json":
            raise Refusal(f"want Content-Type: application/json, not {self.headers.get_content_type()}", 415)
        length = self.headers.get("Content-Length", "")
        if not re.fullmatch("[0-9]{1,18}", length):
            raise Refusal("the request has no Content-Length", 411)
        if int(length) > limits.max_bytes:
            raise Refusal(f"the request is longer than {limits.max_bytes} bytes; send fewer images", 413)
        with self.server.room.taken(int(length), limits.request_seconds):
            return self.server.answer(self.path, self._body(int(length)), self._is_there)

    def _body(self, length: int) -> bytes:
        seconds = self.server.limits.request_seconds
        self._incoming.allow(seconds)
        try:
            body = self.rfile.read(length)
        except TimeoutError:
            raise Refusal(f"the request did not come to its end within {seconds:g} s", 408) from None
        except OSError:
            raise _Gone from None
        if len(body) < length:
            raise Refusal("the request broke off")
        self._is_read = True
        return body

    def _is_there(self) -> bool:
        """Whether the client still waits: one that gave up has sent the request again, and the judge is busy enough."""
        try:
            self.connection.settimeout(0)
            return self.connection.recv(1, socket.MSG_PEEK) != b""
        except BlockingIOError:
            return True
        except OSError:
            return False

    def _answer(self, status: int, content: dict[str, Any], headers: dict[str, str]) -> None:
        body = json.dumps(content).encode()
        self.connection.settimeout(_ANSWER_SECONDS)
        self.send_response(status)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), **named}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
        if not self._is_read:
            self._linger()

    def _linger(self) -> None:
        """Closing a connection with unread bytes resets it, and the client would lose the answer."""
        self._incoming.allow(_LINGER_SECONDS)
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            while self.rfile.read1(65536):
                pass

    def log_message(self, format: str, *args: Any) -> None:
        _log.info("%s %s", self.address_string(), printable(format % args))


def is_own_host(host: str, names: frozenset[str]) -> bool:
    """Whether a request with this Host is meant for a server of these names: one of them, or an address.

    An address is always meant: DNS cannot make another server's point here.
    """
    found = re.fullmatch(rf"(\[[0-9a-f:.]+\]|{_NAME})(:[0-9]{{1,5}})?", host.strip().lower())
    if not found:
        return False
    name = found[1].strip("[]").rstrip(".")
    with suppress(ValueError):
        ipaddress.ip_address(name)
        return True
    return name in names


def make_server(
    reward: Reward,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    references: ReferenceSet | None = None,
    limits: Limits | None = None,
    token: str = "",
    hosts: tuple[str, ...] = (),
) -> ScoringServer:
    """A server that scores with `reward`, one request at a time; call `serve_forever()` on it.

    Bad requests and the reward's UserError and ValueError are answered with 4xx, its other exceptions with 500, each as
    `{"error": text}`. "metadata" of a request is accepted and not looked at: no reward of ours uses any.

    Args:
        host: an address or name of this machine, by which requests may call it.
        port: 0 takes a free one, see `server_address`.
        token: what clients must show; "" asks for none.
        hosts: further names by which requests may call the server, such as a load balancer's.

    Raises:
        UserError: the address cannot be listened on, or one of `hosts` is no name.
    """
    return listening(
        lambda: ScoringServer((host, port), reward, references, limits or Limits(), token, (host, *hosts)),
        host,
        port,
        hosts,
    )


def listening(make: Callable[[], Server], host: str, port: int, hosts: tuple[str, ...]) -> Server:
    """`make()`, a server at this address that may be called by `hosts`; UserError as `make_server`."""
    for name in hosts:
        if not re.fullmatch(_NAME, name.lower()):
            raise UserError(f"--allow-hosts {name}: want names of this machine, without port, such as judge.local")
    try:
        return make()
    except (OSError, OverflowError, UnicodeError) as error:
        raise UserError(f"cannot listen on {host}:{port} ({error}); choose another --host or --port") from None
