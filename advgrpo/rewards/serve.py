"""Serve a reward over HTTP: the other end of `remote.py`, where its protocol is described.

python -m advgrpo.rewards.serve --reward rule --port 8000
python -m advgrpo.rewards.serve --reward ocr --options '{"detection_size": 192, "workers": 4}'

For a judge that needs an environment of its own, copy this idea there: 30 lines of any web framework will do.
Without encryption: keep it on 127.0.0.1 or inside a private network, there with a token. What is refused, and what a
request may cost, is in `scoring_server.py`.
"""

from __future__ import annotations

import ipaddress
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field

from advgrpo import config as configuration
from advgrpo.config import Options
from advgrpo.errors import UserError
from advgrpo.rewards import build_reward
from advgrpo.rewards.remote import read_token
from advgrpo.rewards.scoring_request import Limits
from advgrpo.rewards.scoring_server import make_server
from advgrpo.runtime.command import run_command

_LIMITS = Limits()


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
    """Folder with reference images and references.json, for rewards that compare with them."""
    prompts: Path | None = None
    """Prompt file; its prompts need references."""
    token_file: Path | None = None
    """File with a secret that every request must show (rewards.remote.token_file); unset: that of environment variable
    ADVGRPO_REWARD_TOKEN, or none."""
    allow_hosts: tuple[str, ...] = ()
    """Names that requests may call this server by, beside --host, addresses, localhost and this machine's name."""
    max_bytes: Annotated[int, Field(ge=1, le=2**40)] = _LIMITS.max_bytes
    """Bytes of the longest request."""
    max_pixels: Annotated[int, Field(ge=1, le=2**40)] = _LIMITS.max_pixels
    """Pixels of all images of a request; scoring takes at least 15 bytes for each."""
    max_image_pixels: Annotated[int, Field(ge=1, le=2**26)] = _LIMITS.max_image_pixels
    """Pixels of one image."""
    request_seconds: Annotated[float, Field(ge=0.1, le=86400)] = _LIMITS.request_seconds
    """Seconds for a request to arrive."""
    score_seconds: Annotated[float, Field(ge=0.1, le=86400)] = _LIMITS.score_seconds
    """Seconds from there to its answer, other requests' before it included."""


def serve(settings: Serve) -> None:
    """Build the reward and answer requests until interrupted."""
    from advgrpo.data.prompts import load_prompts
    from advgrpo.data.references import ReferenceSet
    from advgrpo.training.preflight import check_reward

    try:
        options = json.loads(settings.options)
    except (ValueError, RecursionError) as error:
        raise UserError(f"--options {settings.options!r} is not JSON ({error})") from None
    if not isinstance(options, dict):
        raise UserError(f"--options {settings.options!r} is not a JSON object of options")
    token = read_token(settings.token_file, "--token-file")
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
    limits = Limits(**{field.name: getattr(settings, field.name) for field in fields(Limits)})
    address = {"host": settings.host, "port": settings.port, "hosts": settings.allow_hosts}
    with make_server(reward, **address, references=references, limits=limits, token=token) as server:
        host, port = server.server_address[:2]
        print(f"serving reward {reward.name} at http://{host}:{port}", flush=True)
        if not token and not ipaddress.ip_address(host).is_loopback:
            print("note: whoever reaches this port may use it; --token-file asks for a token", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("stopped", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit codes of `command.run_command`."""
    return run_command(_serve, arguments, interrupted="stopped")


def _serve(arguments: list[str]) -> int:
    from advgrpo.runtime.libraries import quiet_libraries

    program = "python -m advgrpo.rewards.serve"
    settings = configuration.parse_options(Serve, arguments, program=program, about=__doc__)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    quiet_libraries()
    serve(settings)
    return 0


if __name__ == "__main__":
    sys.exit(main())
