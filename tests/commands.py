"""The commands of the package, and what each of them runs."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable

COMMANDS = (
    "train",
    "generate",
    "evaluate",
    "plan",
    "references",
    "experiments",
    "export",
    "compare",
    "report",
    "rewards.serve",
)


def main_of(name: str) -> Callable[..., int]:
    """`main` of `python -m advgrpo.NAME`: of the file, or of the folder's `__main__`."""
    in_folder = importlib.util.find_spec(f"advgrpo.{name}").submodule_search_locations is not None
    return importlib.import_module(f"advgrpo.{name}.__main__" if in_folder else f"advgrpo.{name}").main
