"""docs/reliability.md justifies advgrpo/runtime/watch.py line by line: what it defines is in one row of a table.

Bugs planted, each seen red: a method without a row; a row of something that is gone; a name in two rows; a row without
a test; a test that does not exist.
"""

import ast
import re
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[2]
HEADING = "## What our watcher does that torch does not"
CODE, DOES, DOES_NOT, TESTS = range(4)


def rows() -> list[list[str]]:
    """The cells of the table's rows, below its head."""
    text = (ROOT / "docs" / "reliability.md").read_text()
    section = text.split(f"{HEADING}\n")[1].split("\n## ")[0]
    found = [line.strip("|\n ").split(" | ") for line in section.splitlines() if line.startswith("|")]
    assert {len(row) for row in found[2:]} == {4}
    return found[2:]


def named(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def assigned(node: ast.stmt) -> list[str]:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def defined() -> list[str]:
    """Constants, functions and classes of the module, and methods as Class.method."""
    tree, found = ast.parse((ROOT / "advgrpo" / "runtime" / "watch.py").read_text()), []
    for node in tree.body:
        found += assigned(node)
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.append(node.name)
        if isinstance(node, ast.ClassDef):
            found += [f"{node.name}.{each.name}" for each in node.body if isinstance(each, ast.FunctionDef)]
    return found


def test_everything_in_it_is_in_one_row():
    assert Counter(name for row in rows() for name in named(row[CODE])) == Counter(defined())
    assert len(defined()) > 50


def test_every_row_says_what_torch_does_and_does_not_and_names_tests_that_there_are():
    tests = set()
    for name in ("test_watch.py", "test_distributed.py"):
        tree = ast.parse((ROOT / "tests" / "runtime" / name).read_text())
        tests |= {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    for row in rows():
        assert row[DOES].strip(), row[CODE]
        assert row[DOES_NOT].strip(), row[CODE]
        assert named(row[TESTS]), row[CODE]
        assert set(named(row[TESTS])) <= tests
