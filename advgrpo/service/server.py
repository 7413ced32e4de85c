"""The HTTP end of a discriminator that learns: remote.py's protocol, and what makes an iteration.

A request for scores may say more than version, images and prompts:

    "collect": true            the head learns from these images; without, they are scored and forgotten, so that any
                               client of remote.py's protocol, evaluation among them, leaves the head alone
    "request": text            a name of this request's own, the same when it is sent again
    "iteration": number        that the images belong to; without, the one that is collected now
    "sample_ids": [number]     the images' numbers in the iteration; without, the next that are free

and is answered {"scores": [...], "iteration": number}. With "collect" it needs a name, or iteration and sample_ids:
sent again, it gets the answer it had and is not collected twice. Status 409: it contradicts what was collected. 503: it
came before the iteration before it was complete.

`POST /end` with {"version": 1, "iteration": number} trains on the images that there are, with "discard": true it
forgets them. `GET /status` says how the discriminator does.
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from advgrpo.rewards.scoring_request import Limits, Refusal, parse_images, read_request
from advgrpo.rewards.scoring_server import Result, ScoringServer, listening, result_of
from advgrpo.service.collecting import AdversaryService, Asked

_log = logging.getLogger(__name__)


class AdversaryServer(ScoringServer):
    """Scores, collects and learns with `service`, in one thread.

    Attributes:
        failure: what ended it, for who called `serve_forever`; None where nothing did.
    """

    def __init__(
        self, address: tuple[str, int], service: AdversaryService, limits: Limits, token: str, hosts: tuple[str, ...]
    ) -> None:
        self.service = service
        self.failure: Exception | None = None
        self._is_ending = False
        super().__init__(address, service, None, limits, token, hosts)

    def describe(self, path: str) -> dict[str, Any]:
        return self.service.status()

    def answer(self, path: str, body: bytes, is_wanted: Callable[[], bool]) -> dict[str, Any]:
        ends = time.monotonic() + self.limits.score_seconds
        request = read_request(body)
        if path.partition("?")[0].rstrip("/").endswith("/end"):
            return self._end(request, ends)
        images, prompts = parse_images(request, self.limits, ends)
        asked = Asked.read(request, len(prompts))
        digest = hashlib.sha256(json.dumps(prompts).encode())
        for image in images:
            digest.update(hashlib.sha256(image).digest())
        iteration, scores = self.in_turn(
            images,
            ends,
            is_wanted,
            self._open(lambda images: self.service.score(images, prompts, asked, digest.hexdigest())),
        )
        return {"scores": scores, "iteration": iteration}

    def after_each(self) -> None:
        """The iteration that the job has completed is learned from before anything else is done."""
        if self.failure is None:
            try:
                self.service.settle()
            except Exception as error:
                self._fail(error)

    def finish(self) -> None:
        """After `serve_forever`: refuse what waits, finish what has begun; the service is nobody else's then."""
        self._is_ending = True
        self.server_close()
        self._worker.join()

    def _end(self, request: dict[str, Any], ends: float) -> dict[str, Any]:
        iteration, discard = request.get("iteration"), request.get("discard", False)
        if type(iteration) is not int or type(discard) is not bool:
            raise Refusal('want "iteration", a whole number (GET /status tells it), and "discard", true or false')

        def work(_: None) -> dict[str, Any]:
            try:
                return self.service.end(iteration, discard=discard)
            except Refusal:
                raise
            except Exception as error:
                self._fail(error)
                raise

        return result_of(self._worker.submit(lambda: self._open(work)(None)), ends)

    def _open(self, work: Callable[..., Result]) -> Callable[..., Result]:
        """`work`, unless the server has come to its end when its turn comes."""

        def checked(argument: Any) -> Result:
            if self._is_ending or self.failure is not None:
                raise Refusal("the server is ending; send the request again when it is back", 503, Retry_After="5")
            return work(argument)

        return checked

    def _fail(self, error: Exception) -> None:
        """End the server: a head whose training failed may not go on, and what it would give is no reward."""
        self.failure = error
        threading.Thread(target=self.shutdown, name="advgrpo-shutdown", daemon=True).start()


def make_adversary_server(
    service: AdversaryService,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    limits: Limits | None = None,
    token: str = "",
    hosts: tuple[str, ...] = (),
) -> AdversaryServer:
    """As `make_server`, for a discriminator that learns; call `serve_forever()`, then `finish()`.

    Raises:
        UserError: the address cannot be listened on, or one of `hosts` is no name.
    """
    address, names = (host, port), (host, *hosts)
    return listening(lambda: AdversaryServer(address, service, limits or Limits(), token, names), host, port, hosts)
