"""The repository cites only what it contains: a reader can follow every reference.

Planted bugs that turn it red: "METHOD section 4" in a docstring; docs/method.md section 9; a link to a missing file;
`make matrix`; formula 5.3 taken out, or given twice; an empty line in the middle of a table.
"""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (".py", ".md", ".yaml", ".toml", ".sh", ".cu")


def texts():
    """path -> content of every tracked text file but this one."""
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    files = [ROOT / name for name in names if name.endswith(TEXT) or name == "Makefile"]
    return {path: path.read_text() for path in files if path != Path(__file__) and path.exists()}


@pytest.fixture(scope="module")
def everything():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    return texts()


def test_nothing_outside_the_repository_is_cited(everything):
    foreign = re.compile(r"\bMETHOD(\.md|,? section)|\bPERFORMANCE\.md|\bFACTS\.md|\bissue \d|\.\./shared|/work/")
    found = [f"{path}: {match[0]}" for path, text in everything.items() for match in foreign.finditer(text)]
    assert not found


def test_sections_and_formulas_of_the_method_exist(everything):
    method = (ROOT / "docs" / "method.md").read_text()
    sections = set(re.findall(r"^## (\d+)\.", method, re.M))
    formulas = set(re.findall(r"\\tag\{(\d+\.\d+)\}", method))
    assert len(sections) >= 8
    assert len(formulas) >= 10
    for path, text in everything.items():
        for kind, number in re.findall(r"docs/method\.md[,:]?\s+(section )?(\d+(?:\.\d+)?)", text):
            assert number in (sections if kind else formulas), f"{path} cites docs/method.md {kind}{number}"


def test_formulas_of_the_method_are_numbered_by_section_without_a_gap(everything):
    method = (ROOT / "docs" / "method.md").read_text()
    for section, body in re.findall(r"^## (\d+)\.(.*?)(?=^## |\Z)", method, re.M | re.S):
        numbers = re.findall(r"\\tag\{(\d+)\.(\d+)\}", body)
        assert numbers == [(section, str(n)) for n in range(1, len(numbers) + 1)]
    assert method.count("\n$$") == method.count(r"\tag{"), "a formula on a line of its own has a number"


def test_relative_links_of_the_docs_lead_somewhere(everything):
    for path, text in everything.items():
        if path.suffix != ".md":
            continue
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
            if not re.match(r"[a-z]+:", target):
                assert (path.parent / target).exists(), f"{path}: {target}"


def test_rows_of_a_table_stand_below_its_head(everything):
    """Rows behind an empty line are no table to who shows the page."""
    head = re.compile(r"(?<=\n)(?<!\|\n)\|.*\n(?!\|[ :|-]+\|(?:\n|\Z))")
    pages = {path: re.sub(r"^```.*?^```", "", text, flags=re.M | re.S) for path, text in everything.items()}
    found = [f"{path}: {row}" for path, text in pages.items() if path.suffix == ".md" for row in head.findall(text)]
    assert found == []


def test_every_make_target_that_is_named_exists(everything):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    named = {(path, name) for path, text in everything.items() for name in re.findall(r"`make ([a-z-]+)", text)}
    assert len(named) > 10
    assert [(str(path), name) for path, name in sorted(named) if name not in targets] == []
