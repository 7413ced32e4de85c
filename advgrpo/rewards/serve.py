"""Serve a reward over HTTP: the other end of `remote.py`, where its protocol is described.

python -m advgrpo.rewards.serve --reward rule --port 8000
python -m advgrpo.rewards.serve --reward ocr --options '{"detection_size": 192, "workers": 4}'

For a judge that needs an environment of its own, copy this idea there: 30 lines of any web framework will do.
Without authentication or encryption: keep it on 127.0.0.1 or inside a private network.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import logging
import sys
import threading
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field

from .. import config as configuration
from ..command import run_command
from ..config import Options
from ..data.pictures import PictureError, open_picture
from ..errors import UserError
from . import build_reward
from .checks import finite_scores
from .remote import PROTOCOL_VERSION

if TYPE_CHECKING:
    from ..data.references import ReferenceSet
    from .base import Reward

_MAX_PIXELS = 4096 * 4096
_log = logging.getLogger(__name__)


class BadRequest(Exception):
    """The client's fault: answered with 400 (or `status`) and not worth a retry."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


def make_server(
    reward: Reward,
    *,
    host: Annotated[str, Field(min_length=1)] = "127.0.0.1",
    port: int = 0,
    references: ReferenceSet | None = None,
    max_request_bytes: int = 256_000_000,
) -> ThreadingHTTPServer:
    """A server that scores with `reward`, one request at a time; call `serve_forever()` on it.

    Bad requests and the reward's UserError and ValueError are answered with 4xx, its other exceptions with 500, each as
    `{"error": text}`. "metadata" of a request is accepted and not looked at: no reward of ours uses any.

    Args:
        port: 0 takes a free one, see `server_address`.
        max_request_bytes: longer bodies are refused unread.

    Raises:
        UserError: the address cannot be listened on.
    """
    lock = threading.Lock()  # rewards are not made for threads

    class Handler(BaseHTTPRequestHandler):
        timeout = 60  # seconds a client may be silent

        def do_POST(self) -> None:
            try:
                images, prompts = _parse_request(self._body())
                with lock:
                    scores = reward.score(images, prompts, references)
                scores = finite_scores(scores, images, prompts, reward.name).tolist()
                status, body = 200, json.dumps({"scores": scores}).encode()
            except BadRequest as error:
                status, body = error.status, _error_body(error)
            except (UserError, ValueError) as error:
                status, body = 400, _error_body(error)
            except Exception as error:
                _log.exception("reward %s failed", reward.name)
                status, body = 500, _error_body(error)
            self._answer(status, body)

        def do_GET(self) -> None:
            self._answer(200, json.dumps({"reward": reward.name, "version": PROTOCOL_VERSION}).encode())

        def _body(self) -> bytes:
            length = self.headers.get("Content-Length", "")
            if not length.isdecimal():
                raise BadRequest("the request has no Content-Length", 411)
            if int(length) > max_request_bytes:
                self.close_connection = True
                raise BadRequest(f"the request is longer than {max_request_bytes} bytes; send fewer pictures", 413)
            body = self.rfile.read(int(length))
            if len(body) < int(length):
                raise BadRequest("the request broke off")
            return body

        def _answer(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            _log.info("%s %s", self.address_string(), format % args)

    try:
        return ThreadingHTTPServer((host, port), Handler)
    except (OSError, OverflowError) as error:
        raise UserError(f"cannot listen on {host}:{port} ({error}); choose another --host or --port") from None


def _error_body(error: Exception) -> bytes:
    text = str(error) if isinstance(error, (BadRequest, UserError)) else f"{type(error).__name__}: {error}"
    return json.dumps({"error": text}).encode()


def _parse_request(body: bytes) -> tuple[torch.Tensor, list[str]]:
    """(images [B, 3, H, W] float32 in [0, 1], B prompts) of a request."""
    try:
        request = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"the request is not JSON ({error})") from None
    if not isinstance(request, dict) or request.get("version") != PROTOCOL_VERSION:
        raise BadRequest(f'want an object with "version": {PROTOCOL_VERSION}')
    encoded, prompts = request.get("images"), request.get("prompts")
    for key, value in (("images", encoded), ("prompts", prompts)):
        if not isinstance(value, list) or not value or not all(isinstance(entry, str) for entry in value):
            raise BadRequest(f'"{key}" must be a list of at least one text')
    if len(encoded) != len(prompts):
        raise BadRequest(f"{len(encoded)} images but {len(prompts)} prompts")
    pictures = [_decode(text, number) for number, text in enumerate(encoded)]
    if len({picture.shape for picture in pictures}) > 1:
        raise BadRequest(f"the pictures differ in size: {sorted({p.shape[1::-1] for p in pictures})}")
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float().div_(255), prompts


def _decode(text: str, number: int) -> np.ndarray:
    """uint8 RGB [H, W, 3]."""
    name = f"image {number}"
    try:
        content = io.BytesIO(base64.b64decode(text, validate=True))
        return np.array(open_picture(content, name, formats=("PNG",), max_pixels=_MAX_PIXELS))
    except binascii.Error as error:
        raise BadRequest(f"{name} is not in base64 ({error})") from None
    except PictureError as error:
        raise BadRequest(f"{name} {error.reason}; want an RGB PNG of up to 16 megapixels") from None


class Serve(Options):
    """Serve a reward over HTTP."""

    reward: Annotated[str, Field(min_length=1)]
    """Name of the reward, such as rule, ocr or pickscore."""
    options: str = "{}"
    """Its options as a JSON object."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where its model runs, if it has one."""
    host: Annotated[str, Field(min_length=1)] = "127.0.0.1"
    """Address to listen on."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """Port to listen on; 0 takes a free one."""
    references: Path | None = None
    """Folder with reference pictures and references.json, for rewards that compare with them."""
    prompts: Path | None = None
    """Prompt file; its prompts need references."""


def serve(settings: Serve) -> None:
    """Build the reward and answer requests until interrupted."""
    from ..data.prompts import load_prompts
    from ..data.references import ReferenceSet
    from ..preflight import check_reward

    try:
        options = json.loads(settings.options)
    except (ValueError, RecursionError) as error:
        raise UserError(f"--options {settings.options!r} is not JSON ({error})") from None
    if not isinstance(options, dict):
        raise UserError(f"--options {settings.options!r} is not a JSON object of options")
    if (settings.references is None) != (settings.prompts is None):
        raise UserError("--references and --prompts belong together: give both or neither")
    references = None
    if settings.references is not None:
        references = ReferenceSet.load(settings.references, [p.text for p in load_prompts(settings.prompts)])
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but torch sees no GPU: use --device cpu, or install a CUDA build of torch")
    if unplaced := {"device", "dtype"} & options.keys():
        raise UserError(f"--options: {min(unplaced)} is no option of a reward; use --device")
    owner = f"--options {settings.reward}"
    check_reward(settings.reward, options, owner)
    reward = build_reward(settings.reward, device=settings.device, owner=owner, **options)
    with make_server(reward, host=settings.host, port=settings.port, references=references) as server:
        host, port = server.server_address[:2]
        print(f"serving reward {reward.name} at http://{host}:{port}", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("stopped", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit codes of `command.run_command`."""
    return run_command(_serve, arguments, interrupted="stopped")


def _serve(arguments: list[str]) -> int:
    from ..train import quiet_libraries

    program = "python -m advgrpo.rewards.serve"
    settings = configuration.parse_options(Serve, arguments, program=program, about=__doc__)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    quiet_libraries()
    serve(settings)
    return 0


if __name__ == "__main__":
    sys.exit(main())
