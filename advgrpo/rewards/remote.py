"""A reward model behind HTTP, for judges that do not install beside a modern stack (GenEval, UnifiedReward, ...).

Our protocol, version 1. Request: `POST <url>` with `Content-Type: application/json` and the body

    {"version": 1, "images": [base64 of PNG bytes, ...], "prompts": [text, ...], "metadata": [object, ...]}

one entry per image in every list; "metadata" only if the client was given any. Answer: status 200,
`Content-Type: application/json`, and `{"scores": [number, ...]}`, one finite number per image, higher is better. Any
other status is a failure, whose body may be `{"error": text}`. Nothing is ever pickled, redirects are not followed and
proxies not used. `python -m advgrpo.rewards.serve` is the other end, for any reward of ours, and
`examples/rewards/serve_elsewhere.py` for environments without advgrpo; what a request to a discriminator that learns
may hold besides is in service/server.py. Where both ends know a token, it is in `Authorization: Bearer <token>`.

Protocol flow_grpo is that of flow_grpo's reward servers (`flow_grpo.py`). What becomes of failures is in
`judge_client.py`.
"""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from PIL import Image

from advgrpo.errors import RunFailure, UserError
from advgrpo.rewards import flow_grpo
from advgrpo.rewards.base import Reward
from advgrpo.rewards.checks import finite_scores
from advgrpo.rewards.judge_client import (
    TOKEN_VARIABLE,
    JudgeClient,
    Refused,
    check_ranges,
    excerpt,
    parse_json,
    read_token,
    to_float,
    token_variable,
    untold,
)
from advgrpo.rewards.pixels import to_uint8

if TYPE_CHECKING:
    from advgrpo.data.references import ReferenceSet

__all__ = ["PROTOCOL_VERSION", "TOKEN_VARIABLE", "RemoteReward", "read_token"]
PROTOCOL_VERSION = 1


class WireProtocol(Protocol):
    """What a kind of server takes and gives; modules and objects alike."""

    CONTENT_TYPE: str

    def request(self, pixels: np.ndarray, prompts: list[str], metadata: list[Mapping[str, Any]] | None) -> bytes:
        """The body for images uint8 [B, H, W, 3]."""
        ...

    def scores(self, answer: bytes, count: int, key: str) -> list[float]:
        """One number per image; `Refused` for anything else."""
        ...


class RemoteReward(Reward):
    """The `Reward` protocol over HTTP. One request at a time; safe to use from one thread.

    Args:
        url: http:// or https:// address that takes the POST.
        name: the key of its metrics, and how errors call it.
        protocol: "advgrpo" or "flow_grpo".
        scores_key: of protocol flow_grpo: which list of the answer is the reward.
        batch_size: images per request.
        timeout, retries, backoff, wait, max_answer_bytes: see `JudgeClient`.
        token_file: a file with the server's token; see `read_token`.
        metadata: what the server needs to know about a prompt beside its text (such as GenEval's objects), by prompt;
            JSON values. Every prompt scored must then be in it.

    Attributes:
        progress: told before every attempt what begins and how long it may take, as `Distributed.progress`; it is for
            the run to set.

    Raises:
        UserError: an argument out of range, a URL that is not http(s) with a host, or an unusable token file.
    """

    scores_references = False  # its time is not ours to spend

    def __init__(
        self,
        *,
        url: str,
        name: str = "remote",
        protocol: str = "advgrpo",
        scores_key: str = "",
        batch_size: int = 16,
        timeout: float = 60.0,
        retries: int = 3,
        backoff: float = 1.0,
        wait: float = 300.0,
        token_file: str = "",
        max_answer_bytes: int = 1_000_000,
        metadata: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        if protocol not in PROTOCOLS:
            raise UserError(f"reward {name}: protocol = {protocol!r}: want {' or '.join(PROTOCOLS)}")
        if scores_key and protocol != "flow_grpo":
            raise UserError(f"reward {name}: scores_key = {scores_key!r} is protocol flow_grpo's; leave it empty")
        self.name, self.url, self._protocol, self._scores_key = name, url, PROTOCOLS[protocol], scores_key
        check_ranges(f"reward {name}", ("batch_size", batch_size, 1, math.inf))
        self.batch_size, self.metadata = batch_size, metadata
        self.progress: Callable[..., None] = untold
        self._client = JudgeClient(
            url,
            name=name,
            content_type=self._protocol.CONTENT_TYPE,
            timeout=timeout,
            retries=retries,
            backoff=backoff,
            wait=wait,
            token=read_token(token_file, f"reward {name}: token_file =", token_variable(name)),
            max_answer_bytes=max_answer_bytes,
        )

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
            body = self._protocol.request(pixels[part], prompts[part], metadata[part] if metadata else None)
            count = len(prompts[part])
            scores += self._client.ask(
                body,
                lambda answer, count=count: self._protocol.scores(answer, count, self._scores_key),
                prompts[part],
                tell=self.progress,
            )
        # From float64, where 1e39 still is a number, so that what overflows float32 is an error with its prompt.
        return finite_scores(torch.tensor(scores, dtype=torch.float64), images, prompts, self.name)

    def _metadata_of(self, prompts: list[str]) -> list[Mapping[str, Any]] | None:
        if self.metadata is None:
            return None
        for prompt in prompts:
            if prompt not in self.metadata:
                raise UserError(f"reward {self.name}: prompt {prompt!r} has no metadata; add it to the prompt file")
        return [self.metadata[prompt] for prompt in prompts]


class _Ours:
    """The protocol of this file."""

    CONTENT_TYPE = "application/json"

    @staticmethod
    def request(pixels: np.ndarray, prompts: list[str], metadata: list[Mapping[str, Any]] | None) -> bytes:
        request: dict[str, Any] = {
            "version": PROTOCOL_VERSION,
            "images": [base64.b64encode(png(image)).decode() for image in pixels],
            "prompts": prompts,
        }
        if metadata is not None:
            request["metadata"] = [dict(entry) for entry in metadata]
        return json.dumps(request).encode()

    @staticmethod
    def scores(answer: bytes, count: int, key: str = "") -> list[float]:
        record = parse_json(answer)
        scores = record.get("scores") if isinstance(record, dict) else None
        if not isinstance(scores, list):
            raise Refused(f'the answer has no list "scores": {excerpt(answer)}')
        if len(scores) != count:
            raise Refused(f"the answer has {len(scores)} scores for {count} images")
        for score in scores:
            if isinstance(score, bool) or not isinstance(score, (int, float)):
                raise Refused(f"the answer has a score that is not a number: {json.dumps(score)[:2000]}")
        return [to_float(score) for score in scores]


PROTOCOLS: dict[str, WireProtocol] = {"advgrpo": _Ours(), "flow_grpo": flow_grpo.Pickles()}


def png(pixels: np.ndarray) -> bytes:
    """An image uint8 [H, W, 3] as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)  # the network is local, the CPU is busy
    return buffer.getvalue()
