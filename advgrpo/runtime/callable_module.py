"""`from advgrpo import train; train(config)` although `advgrpo.train` is the module of a command.

Whichever of the two somebody imports first, the package's attribute is the module: so it is the module that is called.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    """A module that stands for the function of its own name in `advgrpo.api`."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return getattr(import_module("advgrpo.api"), self.__name__.rpartition(".")[2])(*arguments, **options)


def make_callable(module: str) -> None:
    """Let `advgrpo.NAME` be called as `advgrpo.api.NAME`; `module` is its `__name__`."""
    if module != "__main__":  # as a command it is not imported under its name
        sys.modules[module].__class__ = _Callable
