"""How rewards and rollout engines ask a server over HTTP: one request with retries, each attempt within a total time,
and several at once.

A failure is an error, never a score. What becomes of it:

- Nobody answers (connection refused or timed out, unknown host, status 502, 503, 504): the judge is down, probably
  being restarted, and waited for up to `wait` seconds.
- Connections and answers that break off, time-outs, status 408, 429 and other 5xx: tried again `retries` times.
- Anything else (other statuses, a certificate that is not valid, answers that are wrong in content) would be wrong
  again: an error at once.

Redirects are not followed and proxies not used. Where both ends know a token (`read_token`), the request has it in
`Authorization: Bearer <token>`.
"""

from __future__ import annotations

import http.client
import itertools
import json
import logging
import math
import os
import queue
import re
import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

from advgrpo.errors import RunFailure, UserError, one_line
from advgrpo.runtime.reading import read_text

Answer = TypeVar("Answer")
Task = TypeVar("Task")
TOKEN_VARIABLE = "ADVGRPO_REWARD_TOKEN"
_LONGEST_PAUSE = 30.0  # seconds
_LONGEST_WORDS = 500  # characters of what a server says, in errors
_DOWN = (502, 503, 504)
_PASSING = (408, 429)  # beside 5xx
_REMEDIES = {
    3: "; redirects are not followed: correct the url",
    401: "; set token_file to a file with the server's token",
}
_log = logging.getLogger(__name__)


def token_variable(name: str) -> str:
    """The environment variable with the token of the reward `name`: no server is sent another's."""
    return TOKEN_VARIABLE if name == "remote" else f"{TOKEN_VARIABLE}_{name.upper()}"


def read_token(file: str | Path | None, field: str, variable: str = TOKEN_VARIABLE) -> str:
    """The secret that both ends share: the text of `file`, else the environment variable, else "".

    Raises:
        UserError: naming the variable, or `field` (such as "--token-file") and the file, never the secret: a file that
            cannot be read, or not one line of visible ASCII.
    """
    if file:
        source = f"{field} {file}"
        token = read_text(Path(file).expanduser(), field, "write the token into it").strip()
    elif variable not in os.environ:
        return ""
    else:
        token, source = os.environ[variable], f"environment variable {variable}"
    if not re.fullmatch(r"[!-~]{1,4096}", token):
        raise UserError(f"{source}: want the token alone, in one line of visible ASCII characters")
    return token


class Refused(Exception):
    """The request would fail again."""


class _Ended(Exception):
    """Nobody waits for the answer any more."""


class _Retryable(Exception):
    """The request may succeed if it is sent again.

    Args:
        down: nobody was there to take it.
        pause: seconds that the server asks to be left alone.
    """

    def __init__(self, text: str, *, down: bool = False, pause: float = 0.0) -> None:
        super().__init__(text)
        self.down, self.pause = down, pause


def check_ranges(owner: str, *limits: tuple[str, float, float, float]) -> None:
    """UserError of `owner` ("reward NAME") for the first (field, value, least, most) out of its range; also for NaN."""
    for field, value, low, high in limits:
        if not low <= value <= high:
            to = "" if high == math.inf else f" and at most {high:g}"
            raise UserError(f"{owner}: {field} = {value} must be at least {low}{to}")


class JudgeClient:
    """Asks one server. Safe to use from several threads.

    Args:
        url: http:// or https:// address that takes the POST.
        name: the reward's, for errors.
        content_type: of the request, and what the answer must have; "" lets an answer have any.
        timeout: seconds a request may take in all, from connecting to the answer's last byte.
        retries: how often a request that failed is sent again.
        backoff: seconds before the first repetition; doubles each time, up to 30.
        wait: seconds that a judge which is down is waited for, if `retries` did not take that long.
        token: sent with every request where it is not empty, and shown in no error.
        max_answer_bytes: longer answers are refused without being read to the end.
        url_field: what the reward calls its url.
        answer_type: what the answer must have, where that is another.
        owner: what errors call whom they are of; "": "reward NAME".
        about: what they call that which a request is of.
        method: of the request, "GET" for one without a body.

    Raises:
        UserError: an argument out of range, or a URL that is not http(s) with a host.
    """

    def __init__(
        self,
        url: str,
        *,
        name: str,
        content_type: str = "application/json",
        timeout: float = 60.0,
        retries: int = 3,
        backoff: float = 1.0,
        wait: float = 300.0,
        token: str = "",
        max_answer_bytes: int = 1_000_000,
        url_field: str = "url",
        answer_type: str = "",
        owner: str = "",
        about: str = "prompt",
        method: Literal["GET", "POST"] = "POST",
    ) -> None:
        self.name, self.url, self.content_type, self.method = name, url, content_type, method
        self.answer_type, self.owner, self.about = answer_type or content_type, owner or f"reward {name}", about
        self._connect, self._path = _parse_url(url, self.owner, url_field)
        check_ranges(
            self.owner,
            ("timeout", timeout, 1e-3, 86_400),
            ("retries", retries, 0, 1000),
            ("backoff", backoff, 1e-3, _LONGEST_PAUSE),
            ("wait", wait, 0, 604_800),
            ("max_answer_bytes", max_answer_bytes, 1, math.inf),
        )
        self.timeout, self.retries, self.backoff, self.wait = timeout, retries, backoff, wait
        self.max_answer_bytes, self._token = max_answer_bytes, token

    def ask(
        self,
        body: bytes,
        read: Callable[[bytes], Answer],
        prompts: Sequence[str],
        *,
        tell: Callable[..., None],
        sleep: Callable[[float], object] | None = None,
    ) -> Answer:
        """What `read` makes of the answer to `body`.

        Args:
            read: raises `Refused` for an answer that is wrong in content.
            prompts: what the request is about, for errors; may be empty.
            tell: told before every attempt what begins and how long it may take, as `Distributed.step`.
            sleep: how to pause.

        Raises:
            RunFailure: no valid answer, after the retries if they could help; names the prompts.
        """
        others = f" (and {len(prompts) - 1} more)" if len(prompts) > 1 else ""
        where = f"{self.owner} at {self.url}" + (f", {self.about} {prompts[0]!r}{others}" if prompts else "")
        patience, began = _Patience(self.retries, self.backoff, self.wait), time.monotonic()
        for attempt in itertools.count(1):
            # A host with several addresses is tried at each of them; a pause follows, and then the next attempt.
            within = 2 * (self.timeout + _LONGEST_PAUSE)
            tell(f"{self.owner} at {self.url}, attempt {attempt}", within_seconds=within)
            try:
                return read(self._post(body))
            except Refused as error:
                raise RunFailure(f"{where}: {self._shown(error)}") from None
            except _Retryable as error:
                pause, said = patience.pause(error), f"{where}: {self._shown(error)}"
            if pause is None:
                limits = f"retries = {self.retries}, wait = {self.wait:g} s"
                took = f"{attempt} attempts in {time.monotonic() - began:.0f} s"
                raise RunFailure(f"{said}; gave up after {took} ({limits})")
            _log.warning("%s; trying again in %.1f s", said, pause)
            (sleep or time.sleep)(pause)
        raise AssertionError("itertools.count ends")

    def ask_all(
        self,
        requests: Sequence[tuple[str, bytes]],
        read: Callable[[bytes], Answer],
        *,
        at_once: int,
        tell: Callable[..., None],
    ) -> list[Answer]:
        """Answers to (prompt, body) requests in their order, `at_once` of them under way at a time.

        `tell` is called in the caller's thread alone, and what it raises ends the wait: no further request begins.

        Raises:
            RunFailure: as `ask`, the first of them.
        """

        def one(request: tuple[str, bytes], tell: Callable[..., None], sleep: Callable[[float], object]) -> Answer:
            return self.ask(request[1], read, [request[0]], tell=tell, sleep=sleep)

        return _side_by_side(requests, one, at_once, tell)

    def _shown(self, error: Exception) -> str:
        """Its text without what a server could put there to harm a terminal or a log."""
        text = str(error).replace(self._token, "***") if self._token else str(error)
        return one_line(text, _LONGEST_WORDS)

    def _post(self, body: bytes) -> bytes:
        """The body of a 200 answer, all of it within `timeout`."""
        late = f"no complete answer within {self.timeout} s"
        headers = {"Connection": "close"}
        if self.content_type:
            headers |= {"Content-Type": self.content_type, "Accept": self.answer_type}
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        connection = self._connect(timeout=self.timeout)
        with _Deadline(self.timeout) as deadline:
            try:
                _reach(connection, self.timeout)
                deadline.watch(connection.sock)
                connection.request(self.method, self._path, body or None, headers)
                response = connection.getresponse()
                answer = self._read(response)
            except (OSError, http.client.HTTPException) as error:
                if deadline.passed or isinstance(error, TimeoutError):
                    raise _Retryable(late) from None
                raise _Retryable(f"{type(error).__name__}: {error}") from None
            finally:
                connection.close()
            if deadline.passed:  # an answer without a length ends where it was cut
                raise _Retryable(late)
        return _check_answer(response, answer, self.answer_type)

    def _read(self, response: http.client.HTTPResponse) -> bytes:
        answer = response.read(self.max_answer_bytes + 1)
        if len(answer) > self.max_answer_bytes:
            raise Refused(f"the answer is longer than max_answer_bytes = {self.max_answer_bytes}")
        # read(n) returns what there is when the server hangs up; only read() complains.
        if response.length:
            raise _Retryable(f"the answer broke off {response.length} bytes before its end")
        return answer


def untold(doing: str, *, within_seconds: float) -> None:
    """Nobody watches."""


def _side_by_side(
    tasks: Sequence[Task],
    work: Callable[[Task, Callable[..., None], Callable[[float], object]], Answer],
    at_once: int,
    tell: Callable[..., None],
) -> list[Answer]:
    """`work(task, tell, sleep)` of every task in threads; daemons, so that a program that ends waits for none."""
    events: queue.SimpleQueue = queue.SimpleQueue()
    waiting, lock, ended = iter(enumerate(tasks)), threading.Lock(), threading.Event()

    def ask_to_tell(doing: str, *, within_seconds: float) -> None:
        if ended.is_set():
            raise _Ended
        events.put((doing, within_seconds))

    def run() -> None:
        for number, task in _taken(waiting, lock, ended):
            try:
                events.put((number, work(task, ask_to_tell, ended.wait), None))
            except Exception as error:
                events.put((number, None, error))

    for _ in range(min(at_once, len(tasks))):
        threading.Thread(target=run, name="advgrpo-judge", daemon=True).start()
    answers: dict[int, Answer] = {}
    try:
        while len(answers) < len(tasks):
            event = events.get()
            if len(event) == 2:
                tell(event[0], within_seconds=event[1])
                continue
            number, answer, error = event
            if error is not None:
                raise error
            answers[number] = answer
    finally:
        ended.set()
    return [answers[number] for number in range(len(tasks))]


def _taken(waiting: Iterator[Task], lock: threading.Lock, ended: threading.Event) -> Iterator[Task]:
    """Tasks one after the other, shared with other threads."""
    while not ended.is_set():
        with lock:
            task = next(waiting, None)
        if task is None:
            return
        yield task


class _Patience:
    """How one request's failures are borne: `retries` of each kind in any case, and `wait` seconds of a judge down."""

    def __init__(self, retries: int, backoff: float, wait: float) -> None:
        self._retries, self._backoff, self._wait = retries, backoff, wait
        self._failures: Counter[bool] = Counter()  # by whether the judge was down
        self._down_since = math.nan

    def pause(self, error: _Retryable) -> float | None:
        """Seconds to the next attempt; None to give up."""
        longer = self._backoff * 2 ** min(self._failures.total(), 20)
        pause = min(max(longer, error.pause), _LONGEST_PAUSE)
        if error.down and not self._failures[True]:
            self._down_since = time.monotonic()
        self._failures[error.down] += 1
        if self._failures[error.down] <= self._retries:
            return pause
        left = self._down_since + self._wait - time.monotonic() if error.down else 0.0
        return min(pause, left) if left > 0 else None


def _reach(connection: http.client.HTTPConnection, timeout: float) -> None:
    """Connect, TLS included."""
    try:
        connection.connect()
    except ssl.SSLCertVerificationError as error:
        raise Refused(f"the certificate is not valid ({error.verify_message})") from None
    except ssl.SSLError:  # somebody answers, but not as a judge does
        raise
    except TimeoutError:
        raise _Retryable(f"no connection within {timeout} s", down=True) from None
    except OSError as error:
        raise _Retryable(f"{type(error).__name__}: {error}", down=True) from None


def _check_answer(response: http.client.HTTPResponse, answer: bytes, wanted: str) -> bytes:
    status = response.status
    if status != 200:
        text = f"status {status} {response.reason}{_error_text(answer)}"
        if status in _DOWN:
            asked = response.headers.get("Retry-After", "")
            raise _Retryable(text, down=True, pause=float(asked) if re.fullmatch(r"[0-9]{1,6}", asked) else 0.0)
        if status >= 500 or status in _PASSING:
            raise _Retryable(text)
        raise Refused(text + _REMEDIES.get(status, _REMEDIES.get(status // 100, "")))
    content_type = response.headers.get_content_type() if "Content-Type" in response.headers else "none"
    if wanted and content_type != wanted:
        raise Refused(f"the answer has content type {content_type}; want {wanted}")
    return answer


class _Deadline:
    """Ends a connection after `seconds`: a socket's own time-out starts anew with every byte of a trickling answer."""

    def __init__(self, seconds: float) -> None:
        self.passed = False
        self._socket: socket.socket | None = None
        self._timer = threading.Timer(seconds, self._expire)
        self._timer.daemon = True

    def __enter__(self) -> _Deadline:
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()

    def watch(self, connected: socket.socket) -> None:
        self._socket = connected
        if self.passed:
            self._expire()

    def _expire(self) -> None:
        self.passed = True
        if self._socket is not None:
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)


def _parse_url(url: str, owner: str, field: str) -> tuple[Any, str]:
    """(connection factory, path with query)."""
    if not re.fullmatch(r"[!-~]+", url or "-"):
        why = "it holds a space, a control character or a letter that is not ASCII"
        raise UserError(f"{owner}: {field} = {url!r} is not an address ({why})")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
        (host or "-").encode("idna")  # as connecting does
    except ValueError as error:
        raise UserError(f"{owner}: {field} = {url!r} is not an address ({error})") from None
    kinds = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}
    if parts.scheme not in kinds or not host or port == 0 or parts.username is not None:
        raise UserError(f"{owner}: {field} = {url!r}; want http://host:port/path or https://host/path")
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return lambda timeout: kinds[parts.scheme](host, port, timeout=timeout), path


def parse_json(answer: bytes) -> Any:
    """What the answer holds; Refused where it is no JSON."""
    try:
        return json.loads(answer)
    except (ValueError, RecursionError) as error:
        raise Refused(f"the answer is not JSON ({error}): {excerpt(answer)}") from None


def excerpt(answer: bytes) -> str:
    """The beginning of an answer, for an error; `JudgeClient` cuts what is left without the token."""
    return repr(answer[:2000].decode("utf-8", "replace"))


def to_float(score: float) -> float:
    """A number of JSON or of a pickle; infinity for an integer too long for a double."""
    try:
        return float(score)
    except OverflowError:
        return math.inf


def _error_text(answer: bytes) -> str:
    """What a server says about a failure: {"error": text}, {"error": {"message": text}}, or the end of a traceback."""
    with suppress(ValueError, RecursionError):
        record = json.loads(answer)
        error = record.get("error", record.get("message")) if isinstance(record, dict) else None
        error = error.get("message") if isinstance(error, dict) else error
        if isinstance(error, str):
            return f": {error}"
    if answer.startswith(b"Traceback "):
        return f": {answer.decode('utf-8', 'replace').strip().splitlines()[-1]}"
    return f": {excerpt(answer)}" if answer else ""
