"""Serve a reward over HTTP: the other end of `remote.py`, where its protocol is described.

python -m advgrpo.rewards.serve --reward rule --port 8000
python -m advgrpo.rewards.serve --reward ocr --options '{"detection_size": 192, "workers": 4}'
python -m advgrpo.rewards.serve --adversary dino --references DIR --checkpoint OUT    # it learns; --help says more

For a judge that needs an environment of its own, copy this idea there: 30 lines of any web framework will do.
Without encryption: keep it on 127.0.0.1 or inside a private network, there with a token. What is refused, and what a
request may cost, is in `scoring_server.py`.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field

from advgrpo import config as configuration
from advgrpo.config import Options
from advgrpo.errors import UserError
from advgrpo.rewards import build_reward
from advgrpo.rewards.listening import Listening, tell_address
from advgrpo.rewards.remote import read_token
from advgrpo.rewards.scoring_server import make_server
from advgrpo.runtime.command import run_command


class Served(Options):
    """Which reward."""

    reward: Annotated[str, Field(min_length=1)]
    """Name of the reward, such as rule, ocr or pickscore."""
    options: str = "{}"
    """Its options as a JSON object."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where its model runs, if it has one."""
    references: Path | None = None
    """Folder with reference images and references.json, for rewards that compare with them."""
    prompts: Path | None = None
    """Prompt file; its prompts need references."""


class Serve(Listening, Served):
    """Serve a reward over HTTP."""


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
    limits = settings.limits()
    with make_server(reward, **settings.address(), references=references, limits=limits, token=token) as server:
        tell_address(server, f"reward {reward.name}")
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
    if any(each.partition("=")[0] == "--adversary" for each in arguments):
        from advgrpo.service.command import serve_adversary

        return serve_adversary(arguments, program)
    settings = configuration.parse_options(Serve, arguments, program=program, about=__doc__)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    quiet_libraries()
    serve(settings)
    return 0


if __name__ == "__main__":
    sys.exit(main())
