"""A finder that lets the others find a module and calls a function right after that module was executed."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable
from types import ModuleType


class AfterImport(importlib.abc.MetaPathFinder):
    """For modules whose names `wanted` accepts; put it first in sys.meta_path."""

    def __init__(self, wanted: Callable[[str], bool], call: Callable[[ModuleType], None]):
        self._wanted, self._call = wanted, call

    def find_spec(self, fullname: str, path=None, target=None) -> importlib.machinery.ModuleSpec | None:
        if not self._wanted(fullname):
            return None
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader, self._call)
                return spec
        return None


class _Loader(importlib.abc.Loader):
    """The module's own loader, which is back in its place by the time its code runs."""

    def __init__(self, loader: importlib.abc.Loader, call: Callable[[ModuleType], None]):
        self._loader, self._call = loader, call

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        self._call(module)

    def __getattr__(self, name: str):  # get_source, is_package, get_data, ...
        return getattr(self._loader, name)
