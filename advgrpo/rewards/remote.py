"""A reward model behind HTTP, for judges that do not install beside a modern stack (GenEval, UnifiedReward, ...).

The protocol, version 1. Request: `POST <url>` with `Content-Type: application/json` and the body

    {"version": 1, "images": [base64 of PNG bytes, ...], "prompts": [text, ...], "metadata": [object, ...]}

one entry per image in every list; "metadata" only if the client was given any. Answer: status 200,
`Content-Type: application/json`, and `{"scores": [number, ...]}`, one finite number per image, higher is better. Any
other status is a failure, whose body may be `{"error": text}`. Nothing is ever pickled, redirects are not followed and
proxies not used. `python -m advgrpo.rewards.serve` is the other end, for any reward of ours; what a request to a
discriminator that learns may hold besides is in service/server.py. Where both ends know a token (`read_token`), the
request has it in `Authorization: Bearer <token>`.

A failure is an error, never a score. What becomes of it:

- Nobody answers (connection refused or timed out, unknown host, status 502, 503, 504): the judge is down, probably
  being restarted, and waited for up to `wait` seconds.
- Connections and answers that break off, time-outs, status 408, 429 and other 5xx: tried again `retries` times.
- Anything else (other statuses, a certificate that is not valid, answers that are wrong in content) would be wrong
  again: an error at once.
"""

from __future__ import annotations

import base64
import http.client
import io
import itertools
import json
import logging
import math
import os
import re
import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np
import torch
from PIL import Image

from advgrpo.errors import RunFailure, UserError, one_line
from advgrpo.rewards.base import Reward
from advgrpo.rewards.checks import finite_scores
from advgrpo.rewards.pixels import to_uint8
from advgrpo.runtime.reading import read_text

if TYPE_CHECKING:
    from advgrpo.data.references import ReferenceSet

PROTOCOL_VERSION = 1
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


def read_token(file: str | Path | None, field: str) -> str:
    """The secret that both ends share: the text of `file`, else environment variable ADVGRPO_REWARD_TOKEN, else "".

    Raises:
        UserError: naming the variable, or `field` (such as "--token-file") and the file, never the secret: a file that
            cannot be read, or not one line of visible ASCII.
    """
    if file:
        source = f"{field} {file}"
        token = read_text(Path(file).expanduser(), field, "write the token into it").strip()
    elif TOKEN_VARIABLE not in os.environ:
        return ""
    else:
        token, source = os.environ[TOKEN_VARIABLE], f"environment variable {TOKEN_VARIABLE}"
    if not re.fullmatch(r"[!-~]{1,4096}", token):
        raise UserError(f"{source}: want the token alone, in one line of visible ASCII characters")
    return token


class _Retryable(Exception):
    """The request may succeed if it is sent again.

    Args:
        down: nobody was there to take it.
        pause: seconds that the server asks to be left alone.
    """

    def __init__(self, text: str, *, down: bool = False, pause: float = 0.0) -> None:
        super().__init__(text)
        self.down, self.pause = down, pause


class _Refused(Exception):
    """The request would fail again."""


class RemoteReward(Reward):
    """The `Reward` protocol over the HTTP protocol above. One request at a time; safe to use from one thread.

    Args:
        url: http:// or https:// address that takes the POST.
        name: the key of its metrics, and how errors call it.
        batch_size: images per request.
        timeout: seconds a request may take in all, from connecting to the answer's last byte.
        retries: how often a request that failed is sent again.
        backoff: seconds before the first repetition; doubles each time, up to 30.
        wait: seconds that a judge which is down is waited for, if `retries` did not take that long.
        token_file: a file with the server's token; see `read_token`.
        max_answer_bytes: longer answers are refused without being read to the end.
        metadata: what the server needs to know about a prompt beside its text (such as GenEval's objects), by prompt;
            JSON values. Every prompt scored must then be in it.

    Attributes:
        progress: told before every attempt what begins and how long it may take, as `Distributed.progress`; it is for
            the run to set.

    Raises:
        UserError: an argument out of range, a URL that is not http(s) with a host, or an unusable token file.
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
        wait: float = 300.0,
        token_file: str = "",
        max_answer_bytes: int = 1_000_000,
        metadata: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        self.name, self.url = name, url
        self._connect, self._path = _parse_url(url, name)
        for field, value, low, high in (
            ("batch_size", batch_size, 1, math.inf),
            ("timeout", timeout, 1e-3, 86_400),
            ("retries", retries, 0, 1000),
            ("backoff", backoff, 1e-3, _LONGEST_PAUSE),
            ("wait", wait, 0, 604_800),
            ("max_answer_bytes", max_answer_bytes, 1, math.inf),
        ):
            if not low <= value <= high:
                to = "" if high == math.inf else f" and at most {high:g}"
                raise UserError(f"reward {name}: {field} = {value} must be at least {low}{to}")
        self.batch_size, self.timeout, self.retries = batch_size, timeout, retries
        self.backoff, self.wait, self.max_answer_bytes = backoff, wait, max_answer_bytes
        self.metadata = metadata
        self.progress: Callable[..., None] = _untold
        self._token = read_token(token_file, f"reward {name}: token_file =")

    def check_prompts(self, prompts: list[str]) -> None:
        """Metadata for every prompt, and one trial request with a grey image; call it before any work is done.

        Raises:
            UserError: a prompt without metadata, or the server does not answer as it should.
        """
        self._metadata_of(prompts)
        try:
            self.score(torch.full((1, 3, 64, 64), 0.5), prompts[:1], None)
        except (RunFailure, FloatingPointError) as error:
            raise UserError(f"{error}; start the server, or correct its url and settings") from error

    def score(self, images: torch.Tensor, prompts: list[str], references: ReferenceSet | None = None) -> torch.Tensor:
        """Rewards [B] float32 on the images' device; `references` are not sent.

        Raises:
            UserError: a prompt without metadata.
            ValueError: unusable images (see `to_uint8`).
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
        patience, began = _Patience(self.retries, self.backoff, self.wait), time.monotonic()
        for attempt in itertools.count(1):
            # A host with several addresses is tried at each of them; a pause follows, and then the next attempt.
            within = 2 * (self.timeout + _LONGEST_PAUSE)
            self.progress(f"reward {self.name} at {self.url}, attempt {attempt}", within_seconds=within)
            try:
                return _parse_scores(self._post(body), len(prompts))
            except _Refused as error:
                raise RunFailure(f"{where}: {self._shown(error)}") from None
            except _Retryable as error:
                pause, said = patience.pause(error), f"{where}: {self._shown(error)}"
            if pause is None:
                limits = f"retries = {self.retries}, wait = {self.wait:g} s"
                took = f"{attempt} attempts in {time.monotonic() - began:.0f} s"
                raise RunFailure(f"{said}; gave up after {took} ({limits})")
            _log.warning("%s; trying again in %.1f s", said, pause)
            time.sleep(pause)

    def _shown(self, error: Exception) -> str:
        """Its text without what a server could put there to harm a terminal or a log."""
        text = str(error).replace(self._token, "***") if self._token else str(error)
        return one_line(text, _LONGEST_WORDS)

    def _post(self, body: bytes) -> bytes:
        """The body of a 200 answer in JSON, all of it within `timeout`."""
        late = f"no complete answer within {self.timeout} s"
        headers = {"Content-Type": "application/json", "Accept": "application/json", "Connection": "close"}
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        connection = self._connect(timeout=self.timeout)
        with _Deadline(self.timeout) as deadline:
            try:
                _reach(connection, self.timeout)
                deadline.watch(connection.sock)
                connection.request("POST", self._path, body, headers)
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
        return _check_answer(response, answer)

    def _read(self, response: http.client.HTTPResponse) -> bytes:
        answer = response.read(self.max_answer_bytes + 1)
        if len(answer) > self.max_answer_bytes:
            raise _Refused(f"the answer is longer than max_answer_bytes = {self.max_answer_bytes}")
        # read(n) returns what there is when the server hangs up; only read() complains.
        if response.length:
            raise _Retryable(f"the answer broke off {response.length} bytes before its end")
        return answer


def _untold(doing: str, *, within_seconds: float) -> None:
    """Nobody watches."""


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
        raise _Refused(f"the certificate is not valid ({error.verify_message})") from None
    except ssl.SSLError:  # somebody answers, but not as a judge does
        raise
    except TimeoutError:
        raise _Retryable(f"no connection within {timeout} s", down=True) from None
    except OSError as error:
        raise _Retryable(f"{type(error).__name__}: {error}", down=True) from None


def _check_answer(response: http.client.HTTPResponse, answer: bytes) -> bytes:
    status = response.status
    if status != 200:
        text = f"status {status} {response.reason}{_error_text(answer)}"
        if status in _DOWN:
            asked = response.headers.get("Retry-After", "")
            raise _Retryable(text, down=True, pause=float(asked) if re.fullmatch(r"[0-9]{1,6}", asked) else 0.0)
        if status >= 500 or status in _PASSING:
            raise _Retryable(text)
        raise _Refused(text + _REMEDIES.get(status, _REMEDIES.get(status // 100, "")))
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
    if not re.fullmatch(r"[!-~]+", url or "-"):
        why = "it holds a space, a control character or a letter that is not ASCII"
        raise UserError(f"reward {name}: url = {url!r} is not an address ({why})")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
        (host or "-").encode("idna")  # as connecting does
    except ValueError as error:
        raise UserError(f"reward {name}: url = {url!r} is not an address ({error})") from None
    kinds = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}
    if parts.scheme not in kinds or not host or port == 0 or parts.username is not None:
        raise UserError(f"reward {name}: url = {url!r}; want http://host:port/path or https://host/path")
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return lambda timeout: kinds[parts.scheme](host, port, timeout=timeout), path


def _request_body(pixels: np.ndarray, prompts: list[str], metadata: list[Mapping[str, Any]] | None) -> bytes:
    request: dict[str, Any] = {
        "version": PROTOCOL_VERSION,
        "images": [base64.b64encode(_png(image)).decode() for image in pixels],
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
        raise _Refused(f"the answer has {len(scores)} scores for {count} images")
    for score in scores:
        if isinstance(score, bool) or not isinstance(score, (int, float)):
            raise _Refused(f"the answer has a score that is not a number: {json.dumps(score)[:2000]}")
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
            return f": {record['error']}"
    return f": {_excerpt(answer)}" if answer else ""


def _excerpt(answer: bytes) -> str:
    return repr(answer[:2000].decode("utf-8", "replace"))  # `_shown` cuts what is left without the token
