"""A process of the job that tests/training/test_start.py starts in forks (zygote.py): starts, and what they look at.

[folder, NAME, ...]: the run of FOLDER/NAME.yaml is built once, which fills its caches, and then again, while every file
that is opened and every folder that is listed under FOLDER is noted: FOLDER/NAME.RANK.json, {"opened": [path, ...],
"listed": [path, ...]} without FOLDER, in order.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from rich.console import Console

from advgrpo import config as configuration
from advgrpo.policy.text_cache import TextCache
from advgrpo.runtime import cache as tensor_cache
from advgrpo.runtime.distributed import Distributed
from advgrpo.training.run import Run

_FOLDERS = 4  # of a text cache: as few for these prompts as the 256 are for those of a real run


class Looks:
    """What this process looks at under a folder. Python tells of its own calls; Rust's safetensors is asked."""

    def __init__(self, folder: Path):
        self.folder, self.noted = f"{folder.resolve()}{os.sep}", {"opened": [], "listed": []}
        sys.addaudithook(self._heard)

    def _heard(self, event: str, given: tuple[Any, ...]) -> None:
        if event in ("open", "os.listdir", "os.scandir"):
            self._note("opened" if event == "open" else "listed", given[0])

    def _note(self, kind: str, path: object) -> None:
        if isinstance(path, (str, bytes, os.PathLike)):
            whole = os.path.abspath(os.fsdecode(path))
            if whole.startswith(self.folder):
                self.noted[kind].append(whole.removeprefix(self.folder))

    def heard_of(self, safe_open: Callable[..., Any]) -> Callable[..., Any]:
        def noted(path: Path, *given: Any) -> Any:
            self._note("opened", path)
            return safe_open(path, *given)

        return noted


def main(arguments: list[str]) -> int:
    folder, *names = arguments
    job, looks, key = Distributed.start("cpu"), Looks(Path(folder)), TextCache.key
    in_few = mock.patch.object(TextCache, "key", lambda self, text: _in_few_folders(key(self, text)))
    opened = mock.patch.object(tensor_cache, "safe_open", looks.heard_of(tensor_cache.safe_open))
    with job.guard(), in_few, opened:
        for name in names:
            settings = configuration.load(file=Path(folder) / f"{name}.yaml")
            for _ in range(2):
                looks.noted = {"opened": [], "listed": []}
                Run(settings, job, console=Console(quiet=True)).close()
            Path(folder, f"{name}.{job.rank}.json").write_text(json.dumps(looks.noted))
    job.close()
    return 0


def _in_few_folders(key: str) -> str:
    return f"{int(key[:2], 16) % _FOLDERS:02d}{key[2:]}"
