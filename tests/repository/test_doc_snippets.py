"""docs/kernels/index.md is a program: its snippets run in order, and between them they call every op.

Planted bugs that turn it red: an argument that `gaussian_step` does not have; the section on FP8 taken out; a row of
the table of ops that leads to no section.
"""

import inspect
import re
from pathlib import Path

import advgrpo_kernels

PAGE = Path(__file__).parents[2] / "docs" / "kernels" / "index.md"


def snippets() -> list[tuple[int, str]]:
    """(line number, code) of every Python block."""
    text = PAGE.read_text()
    blocks = re.finditer(r"^```python\n(.*?)^```", text, re.M | re.S)
    return [(text[: block.start(1)].count("\n"), block[1]) for block in blocks]


def ops() -> set[str]:
    functions = [name for name in advgrpo_kernels.__all__ if inspect.isfunction(getattr(advgrpo_kernels, name))]
    return {name for name in functions if not name.endswith("_ref")}


def test_the_snippets_run_in_order():
    program: dict[str, object] = {}
    for line, code in snippets():
        exec(compile("\n" * line + code, str(PAGE), "exec"), program)


def test_every_op_has_a_snippet_and_a_row():
    code = "\n".join(code for _, code in snippets())
    called = {name for name in ops() if re.search(rf"(?<!import )\b{name}\(", code)}
    assert ops() - called == set()
    table = "\n".join(line for line in PAGE.read_text().splitlines() if line.startswith("| ["))
    assert ops() - set(re.findall(r"`(\w+)`", table)) == set()
