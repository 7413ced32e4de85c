"""`from advgrpo import train; train(config)` although `advgrpo.train` is the module of a command.

Whichever of the two somebody imports first, the package's attribute is the module: so it is the module that is called,
and calls its own function of that name, here `advgrpo.train.train`.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return getattr(self, self.__name__.rpartition(".")[2])(*arguments, **options)


def make_callable(module: str) -> None:
    """Let a module be called as its function of the same name; `module` is its `__name__`."""
    if module != "__main__":  # as a command it is not imported under its name
        sys.modules[module].__class__ = _Callable
