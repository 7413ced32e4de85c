"""tests/golden: nothing in it is unexplained, changed or left uncompared.

Planted bugs that turned this file red: a file added; one byte of a recording changed; an array added to one; a row of
the page left out; a recording that no test names.
"""

import hashlib
import re
from pathlib import Path

import numpy as np
import pytest

TESTS = Path(__file__).parents[1]
GOLDEN = TESTS / "golden"
STEPS = {"latents", "velocity", "next_latents", "sigma", "sigma_next", "mean", "std_dev_t", "log_prob", "grad_velocity"}


def rows() -> dict[str, list[str]]:
    """Name of a file -> the cells of its row."""
    lines = [line for line in (GOLDEN / "README.md").read_text().splitlines() if line.startswith("| `")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0].strip("`"): row for row in cells}


def test_the_page_lists_every_file():
    assert rows().keys() == {path.name for path in GOLDEN.iterdir() if path.is_file()} - {"README.md"}


@pytest.mark.parametrize("name", rows())
def test_a_recording_is_the_one_the_page_describes(name):
    digest = hashlib.sha256((GOLDEN / name).read_bytes()).hexdigest()
    assert digest.startswith(rows()[name][1].strip("`"))


@pytest.mark.parametrize("name", [name for name in rows() if name.endswith(".npz")])
def test_the_page_names_every_array(name):
    named = set(re.findall(r"`(\w+)`", rows()[name][3]))
    if "as above" in rows()[name][3]:
        named = set(re.findall(r"`(\w+)`", rows()["flow_sde_flow_grpo.npz"][3])) - named
    for first in [array for array in named if array.startswith("w0_")]:  # `w0_grad` … `w3_grad`
        named |= {f"w{i}{first[2:]}" for i in range(4)}
    with np.load(GOLDEN / name) as arrays:
        held = {re.sub(r"^\d_", "", array) for array in arrays}
    assert held == named


def test_every_recording_is_named_by_a_test():
    text = "".join(path.read_text() for path in TESTS.rglob("*.py") if path.name != Path(__file__).name)
    assert [name for name in rows() if name not in text] == []
