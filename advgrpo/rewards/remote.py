"""A reward model behind HTTP, for judges that do not install beside a modern stack (GenEval, UnifiedReward, ...).

The protocol, version 1. Request: `POST <url>` with `Content-Type: application/json` and the body

    {"version": 1, "images": [base64 of PNG bytes, ...], "prompts": [text, ...], "metadata": [object, ...]}

one entry per picture in every list; "metadata" only if the client was given any. Answer: status 200,
`Content-Type: application/json`, and `{"scores": [number, ...]}`, one finite number per picture, higher is better. Any
other status is a failure, whose body may be `{"error": text}`. Nothing is ever pickled, redirects are not followed and
proxies not used. `python -m advgrpo.rewards.serve` is the other end, for any reward of ours.

Connection errors, answers that break off, time-outs and 5xx are tried again after a growing pause; 4xx and answers
that are wrong in content are not, because they would be wrong again. A failure is an error, never a score.
"""

from __future__ import annotations

import base64
import http.client
import io
import itertools
import json
import logging
import math
import socket
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np
import torch
from PIL import Image

from ..errors import RunFailure, UserError
from .checks import finite_scores
from .pixels import to_uint8

if TYPE_CHECKING:
    from ..data.references import ReferenceSet

PROTOCOL_VERSION = 1
_LONGEST_PAUSE = 30.0  # seconds
_log = logging.getLogger(__name__)


class _Retryable(Exception):
    """The request may succeed if it is sent again."""


class _Refused(Exception):
    """The request would fail again."""


class RemoteReward:
    """The `Reward` protocol over the HTTP protocol above. One request at a time; safe to use from one thread.

    Args:
        url: http:// or https:// address that takes the POST.
        name: the key of its metrics, and how errors call it.
        batch_size: pictures per request.
        timeout: seconds a request may take in all, from connecting to the answer's last byte.
        retries: how often a failed request is sent again.
        backoff: seconds before the first repetition; doubles each time, up to 30.
        max_answer_bytes: longer answers are refused without being read to the end.
        metadata: what the server needs to know about a prompt beside its text (such as GenEval's objects), by prompt;
            JSON values. Every prompt scored must then be in it.

    Raises:
        UserError: an argument out of range, or a URL that is not http(s) with a host.
    """

    def __init__(
        self,
        *,
        url: str,
        name: str = "remote",
        batch_size: int = 16,
        timeout: float = 60.0,
        retries: int = 3,
        backoff: float = 1.0,
        max_answer_bytes: int = 1_000_000,
        metadata: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        self.name, self.url = name, url
        self._connect, self._path = _parse_url(url, name)
        for field, value, low in (("batch_size", batch_size, 1), ("retries", retries, 0), ("backoff", backoff, 0)):
            if value < low:
                raise UserError(f"reward {name}: {field} = {value} must be at least {low}")
        if not 0 < timeout < math.inf:
            raise UserError(f"reward {name}: timeout = {timeout} must be a positive number of seconds")
        if max_answer_bytes < 1:
            raise UserError(f"reward {name}: max_answer_bytes = {max_answer_bytes} must be at least 1")
        self.batch_size, self.timeout, self.retries, self.backoff = batch_size, timeout, retries, backoff
        self.max_answer_bytes = max_answer_bytes
        self.metadata = metadata

    def check_prompts(self, prompts: list[str]) -> None:
        """Metadata for every prompt, and one trial request with a grey picture; call it before any work is done.

        Raises:
            UserError: a prompt without metadata, or the server does not answer as it should.
        """
        self._metadata_of(prompts)
        try:
            self.score(torch.full((1, 3, 64, 64), 0.5), prompts[:1], None)
        except (RunFailure, FloatingPointError) as error:
            raise UserError(f"{error}; start the server, or correct its url and settings") from error

    def score(self, images: torch.Tensor, prompts: list[str], references: ReferenceSet | None = None) -> torch.Tensor:
        """Rewards [B] float32 on the pictures' device; `references` are not sent.

        Raises:
            UserError: a prompt without metadata.
            ValueError: unusable pictures (see `to_uint8`).
            FloatingPointError: a score that is not finite in float32; names the prompt.
            RunFailure: no valid answer, after the retries if they could help; names the prompts.
        """
        pixels, metadata = to_uint8(images, prompts), self._metadata_of(prompts)
        scores: list[float] = []
        for start in range(0, len(prompts), self.batch_size):
            part = slice(start, start + self.batch_size)
            body = _request_body(pixels[part], prompts[part], metadata[part] if metadata else None)
            scores += self._score_batch(body, prompts[part])
        # From float64, where 1e39 still is a number, so that what overflows float32 is an error with its prompt.
        return finite_scores(torch.tensor(scores, dtype=torch.float64), images, prompts, self.name)

    def _metadata_of(self, prompts: list[str]) -> list[Mapping[str, Any]] | None:
        if self.metadata is None:
            return None
        for prompt in prompts:
            if prompt not in self.metadata:
                raise UserError(f"reward {self.name}: prompt {prompt!r} has no metadata; add it to the prompt file")
        return [self.metadata[prompt] for prompt in prompts]

    def _score_batch(self, body: bytes, prompts: list[str]) -> list[float]:
        others = f" (and {len(prompts) - 1} more)" if len(prompts) > 1 else ""
        where = f"reward {self.name} at {self.url}, prompt {prompts[0]!r}{others}"
        for attempt in itertools.count():
            try:
                return _parse_scores(self._post(body), len(prompts))
            except _Refused as error:
                raise RunFailure(f"{where}: {error}") from error
            except _Retryable as error:
                if attempt == self.retries:
                    raise RunFailure(f"{where}: {error}; gave up after {attempt + 1} attempts") from error
                pause = min(self.backoff * 2**attempt, _LONGEST_PAUSE)
                _log.warning("%s: %s; trying again in %.1f s", where, error, pause)
                time.sleep(pause)

    def _post(self, body: bytes) -> bytes:
        """The body of a 200 answer in JSON, all of it within `timeout`."""
        late = f"no complete answer within {self.timeout} s"
        connection = self._connect(timeout=self.timeout)
        with _Deadline(self.timeout) as deadline:
            try:
                connection.connect()
                deadline.watch(connection.sock)
                headers = {"Content-Type": "application/json", "Accept": "application/json", "Connection": "close"}
                connection.request("POST", self._path, body, headers)
                response = connection.getresponse()
                answer = self._read(response)
            except (OSError, http.client.HTTPException) as error:
                if deadline.passed or isinstance(error, TimeoutError):
                    raise _Retryable(late) from error
                raise _Retryable(f"{type(error).__name__}: {error}") from error
            finally:
                connection.close()
            if deadline.passed:  # an answer without a length ends where it was cut
                raise _Retryable(late)
        return self._check_status(response, answer)

    def _read(self, response: http.client.HTTPResponse) -> bytes:
        answer = response.read(self.max_answer_bytes + 1)
        if len(answer) > self.max_answer_bytes:
            raise _Refused(f"the answer is longer than max_answer_bytes = {self.max_answer_bytes}")
        # read(n) returns what there is when the server hangs up; only read() complains.
        if response.length:
            raise _Retryable(f"the answer broke off {response.length} bytes before its end")
        return answer

    def _check_status(self, response: http.client.HTTPResponse, answer: bytes) -> bytes:
        if response.status != 200:
            text = f"status {response.status} {response.reason}{_error_text(answer)}"
            raise _Retryable(text) if response.status >= 500 else _Refused(text)
        content_type = response.headers.get_content_type() if "Content-Type" in response.headers else "none"
        if content_type != "application/json":
            raise _Refused(f"the answer has content type {content_type}; want application/json")
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


def _parse_url(url: str, name: str) -> tuple[Any, str]:
    """(connection factory, path with query)."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise UserError(f"reward {name}: url = {url!r} is not an address ({error})") from None
    kinds = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}
    if parts.scheme not in kinds or not host or parts.username is not None:
        raise UserError(f"reward {name}: url = {url!r}; want http://host:port/path or https://host/path")
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return lambda timeout: kinds[parts.scheme](host, port, timeout=timeout), path


def _request_body(pixels: np.ndarray, prompts: list[str], metadata: list[Mapping[str, Any]] | None) -> bytes:
    request: dict[str, Any] = {
        "version": PROTOCOL_VERSION,
        "images": [base64.b64encode(_png(picture)).decode() for picture in pixels],
        "prompts": prompts,
    }
    if metadata is not None:
        request["metadata"] = [dict(entry) for entry in metadata]
    return json.dumps(request).encode()


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)  # the network is local, the CPU is busy
    return buffer.getvalue()


def _parse_scores(answer: bytes, count: int) -> list[float]:
    try:
        record = json.loads(answer)
    except (ValueError, RecursionError) as error:
        raise _Refused(f"the answer is not JSON ({error}): {_excerpt(answer)}") from None
    scores = record.get("scores") if isinstance(record, dict) else None
    if not isinstance(scores, list):
        raise _Refused(f'the answer has no list "scores": {_excerpt(answer)}')
    if len(scores) != count:
        raise _Refused(f"the answer has {len(scores)} scores for {count} pictures")
    for score in scores:
        if isinstance(score, bool) or not isinstance(score, (int, float)):
            raise _Refused(f"the answer has a score that is not a number: {json.dumps(score)[:80]}")
    return [_to_float(score) for score in scores]


def _to_float(score: float) -> float:
    try:
        return float(score)
    except OverflowError:  # an integer too long for a double
        return math.inf


def _error_text(answer: bytes) -> str:
    with suppress(ValueError, RecursionError):
        record = json.loads(answer)
        if isinstance(record, dict) and isinstance(record.get("error"), str):
            return f": {record['error'][:300]}"
    return f": {_excerpt(answer)}" if answer else ""


def _excerpt(answer: bytes) -> str:
    return repr(answer[:100].decode("utf-8", "replace"))
