"""docs/troubleshooting.md quotes what the program says: every message in it stands in the code.

A quoted message is a ```text block; "…" in it stands for what differs from case to case, where the code has a value.

Planted bugs that turn it red: a word of a message changed in training/update.py; a "…" left out of a quotation; a
quoted message that nothing says.
"""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HOLE = "…"


def quoted() -> list[str]:
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    return [block.strip() for block in re.findall(r"^```text\n(.*?)^```", text, re.M | re.S)]


def as_text(node: ast.expr) -> str | None:
    """A string literal with "…" for its values; None for any other expression."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return "".join(HOLE if isinstance(part, ast.FormattedValue) else part.value for part in node.values)
    return None


@cache
def said() -> tuple[str, ...]:
    """Every string of the package; "{free}" of a text that is formatted later is a value, too."""
    files = (ROOT / "advgrpo").rglob("*.py")
    nodes = (node for file in files for node in ast.walk(ast.parse(file.read_text())))
    texts = {text for node in nodes if isinstance(node, ast.expr) and (text := as_text(node))}
    return tuple(re.sub(r"\{[^{}]*\}", HOLE, text) for text in texts)


def stands_in(message: str, text: str) -> bool:
    """Whether `message` is part of `text`, in which values that touch are one."""
    return message in re.sub(f"{HOLE}+", HOLE, text)


@pytest.mark.parametrize("message", quoted())
def test_every_quoted_message_is_said(message):
    assert any(stands_in(message, text) for text in said()), message


def test_the_page_quotes_messages():
    assert len(quoted()) >= 20
