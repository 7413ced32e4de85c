"""The direction of imports is the drawing in docs/architecture.md: a line uses what stands on floors below its own.

Planted: `from advgrpo.training import build` inside a function of data/sources.py, a room missing from the drawing, a
room drawn twice, the judge imported in a function of a reward, the second judge by a builder's annotator.
"""

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "advgrpo"
COMMAND_FILES = {"rewards.serve"}  # commands inside a room; `__main__` is one everywhere
INNER_ROOMS = {"policy.fused"}
JUDGING = {"build_second_judge", "measure_world", "audit_backbone"}  # tools that no shipped part is made by


@functools.cache
def floors() -> dict[str, int]:
    """Room -> floor, of the drawing."""
    page = (ROOT / "docs" / "architecture.md").read_text()
    drawing = re.search(r"## The house\n.*?```text\n(.*?)```", page, re.DOTALL).group(1)
    found: dict[str, int] = {}
    for line in drawing.splitlines():
        number, rest = line.split(maxsplit=1)
        for name in rest.split():
            if name in rooms():
                assert name not in found, f"{name} is drawn twice"
                found[name] = int(number)
    return found


def room(module: str) -> str:
    """The room of a module's name without the package's: "training", or "evaluate.__main__" for a command."""
    parts = module.split(".")
    if parts[-1] == "__main__" and parts[0] in ("config", "experiments"):  # made of their own room alone
        return parts[0]
    if parts[-1] == "__main__" or module in COMMAND_FILES:
        return module
    inner = ".".join(parts[:2])
    return inner if inner in INNER_ROOMS else parts[0]


@functools.cache
def modules() -> dict[str, Path]:
    found = {}
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        found[name.removesuffix("__init__").rstrip(".")] = path
    return found


@functools.cache
def rooms() -> set[str]:
    return {room(name) for name in modules() if name}


def imports(path: Path, name: str) -> Iterator[tuple[int, str]]:
    """(line, module) of everything of ours that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, each.name[8:]) for each in node.names if each.name.startswith("advgrpo."))
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute here"
            base = node.module or ""
            if base == "advgrpo" or base.startswith("advgrpo."):
                for each in node.names:
                    full = f"{base}.{each.name}".removeprefix("advgrpo.")
                    yield node.lineno, full if full in modules() else base.removeprefix("advgrpo").lstrip(".")


def test_every_room_is_in_the_drawing_once():
    assert set(floors()) == rooms()


@pytest.mark.parametrize("name", sorted(name for name in modules() if name))
def test_imports_go_down(name):
    floor, own, path = floors(), room(name), modules()[name]
    up = [
        f"{path.relative_to(ROOT)}:{line} imports {module}"
        for line, module in imports(path, name)
        if module and room(module) != own and floor[room(module)] >= floor[own]
    ]
    assert not up


def test_reading_data_builds_no_rewards():
    for name, path in modules().items():
        if room(name or "errors") == "data":
            assert not [module for _, module in imports(path, name) if module.startswith(("rewards", "adversary"))]


def test_no_reward_adversary_or_builder_reaches_a_judge():
    """By whatever they import, anywhere in a file: the tiny world's judges stay independent. Who reaches them are
    metrics, through rewards/retrieval.py, and the tools that measure by them or build one."""
    judges = {"tiny.judge", "tiny.second_judge", "rewards.retrieval"}
    assert judges <= modules().keys()
    starts = {name for name in modules() if room(name or "errors") in ("rewards", "adversary", "vision")} - judges
    files = {name: modules()[name] for name in starts}
    files |= {f"tools.{path.stem}": path for path in (ROOT / "tools" / "tiny").glob("*.py") if path.stem not in JUDGING}
    assert {"tools.build_pipeline", "tools.build_backbone", "tools.build_preference", "tools.annotator"} <= files.keys()
    reached, waiting = dict.fromkeys(files, ""), list(files)
    while waiting:
        name = waiting.pop()
        for _, module in imports(files.get(name) or modules()[name], name):
            if module and module not in reached:  # the package itself imports nothing of its own
                reached[module] = name
                waiting.append(module)
    assert not {judge: reached[judge] for judge in judges if judge in reached}


def test_the_method_imports_nothing_but_itself_and_torch():
    """The kernels are a library of their own: nothing of the trainer's is in them."""
    kernels = ROOT / "kernels" / "advgrpo_kernels"
    for path in kernels.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [each.name for each in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
            assert not [n for n in names if n.split(".")[0] in ("advgrpo", "bench", "tests")], path
