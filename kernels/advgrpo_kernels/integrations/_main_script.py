"""Run a script or a module as `__main__`, as python does, with a call between its definitions and its main block.

What runs under `if __name__ == "__main__":` uses the functions that the file defines, so they can only be replaced in
between. The call is a statement of the syntax tree; lines, file names and sources in tracebacks stay those of the file.
"""

from __future__ import annotations

import ast
import builtins
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Callable, Collection
from types import CodeType, ModuleType
from typing import Any

_CALL = "__advgrpo_kernels_patch__"  # a global of the script until it has been called


class CannotRun(Exception):
    """Nothing to run under that name: `code` is the exit code that python has for it."""

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


def run_script(path: str, args: list[str], names: Collection[str], call: Callable[[ModuleType], None]) -> None:
    """Like `python path args`; `call` gets the module when what it defines of `names` is defined."""
    try:
        with open(path, "rb") as file:
            source = file.read()
    except OSError as error:
        message = f"can't open file {os.path.abspath(path)!r}: [Errno {error.errno}] {error.strerror}"
        raise CannotRun(message, 2) from None
    sys.argv[:] = [path, *args]
    if not getattr(sys.flags, "safe_path", False):  # the launcher's own entry, which -m has put there
        sys.path[0] = os.path.dirname(os.path.realpath(path))
    file = os.path.abspath(path)
    loader = importlib.machinery.SourceFileLoader("__main__", file)
    _run(compile_with_call(source, file, names), call, __file__=file, __loader__=loader, __cached__=None)


def run_module(name: str, args: list[str], names: Collection[str], call: Callable[[ModuleType], None]) -> None:
    """Like `python -m name args`; a package is its `__main__`."""
    sys.argv[:] = ["-m", *args]
    spec = _spec_of(name)
    if spec is not None and spec.submodule_search_locations is not None:
        name = f"{name}.__main__"
        spec = _spec_of(name)
    loader: Any = spec and spec.loader  # those that run a file can give its source
    source = loader.get_source(name) if spec and loader and spec.origin else None
    if spec is None or spec.origin is None or not source:
        raise CannotRun(f"No module named {name} with a source to run", 1)
    sys.argv[0] = spec.origin
    names_of_module = {"__file__": spec.origin, "__loader__": spec.loader, "__cached__": spec.cached, "__spec__": spec}
    code = compile_with_call(source, spec.origin, names)
    _run(code, call, __package__=spec.parent, **names_of_module)


def compile_with_call(source: bytes | str, file: str, names: Collection[str]) -> CodeType:
    """The code of a file with one call of the global `_CALL` inserted."""
    tree = ast.parse(source, file)
    at = _position(tree.body, names)
    line = tree.body[min(at, len(tree.body) - 1)] if tree.body else None
    statement = ast.Expr(ast.Call(ast.Name(_CALL, ast.Load()), [], []))
    if line is not None:
        for node in ast.walk(statement):
            ast.copy_location(node, line)
    tree.body.insert(at, statement)
    return compile(ast.fix_missing_locations(tree), file, "exec", dont_inherit=True)


def _position(body: list[ast.stmt], names: Collection[str]) -> int:
    """Before the main block that follows the last definition of `names`; without one, behind that definition.

    A file that defines none of them can still import copies: before its main block then, or behind its last import.
    """
    definitions = [i for i, statement in enumerate(body) if _defines(statement, names)]
    imports = [i for i, statement in enumerate(body) if isinstance(statement, (ast.Import, ast.ImportFrom))]
    after = max(definitions or [-1]) + 1
    blocks = [i for i, statement in enumerate(body) if i >= after and _is_main_block(statement)]
    return blocks[0] if blocks else max([*definitions, *(imports if not definitions else []), -1]) + 1


def _defines(statement: ast.stmt, names: Collection[str]) -> bool:
    kinds = (ast.FunctionDef, ast.ClassDef)
    return any(isinstance(node, kinds) and node.name in names for node in ast.walk(statement))


def _is_main_block(statement: ast.stmt) -> bool:
    if not isinstance(statement, ast.If):
        return False
    for test in ast.walk(statement.test):  # also `__name__ == "__main__" and ...`
        if isinstance(test, ast.Compare) and isinstance(test.ops[0], ast.Eq):
            sides = [ast.unparse(side) for side in (test.left, *test.comparators)]
            if sorted(sides) == ["'__main__'", "__name__"]:
                return True
    return False


def _spec_of(name: str) -> importlib.machinery.ModuleSpec | None:
    try:
        return importlib.util.find_spec(name)
    except ModuleNotFoundError as error:
        if error.name and f"{name}.".startswith(f"{error.name}."):
            return None
        raise  # a parent package that fails to import something else


def _run(code: CodeType, call: Callable[[ModuleType], None], **attributes) -> None:
    main = ModuleType("__main__")
    vars(main).update(__builtins__=builtins, __annotations__={}, **attributes)

    def call_once():
        del vars(main)[_CALL]
        call(main)

    vars(main)[_CALL] = call_once
    launcher = sys.modules["__main__"]  # kept alive by this name: its globals are still in use
    sys.modules["__main__"] = main
    exec(code, vars(main))
    del launcher
