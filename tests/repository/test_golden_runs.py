"""Three iterations of every family of jobs against committed numbers (`golden_runs.py`).

Seen red: references scored with the generations' patch draws; patch seeds of both sides alike; references drawn by
local row. What changes these numbers on purpose records them anew with `make golden` and says why in its message.
"""

import json

import pytest
import torch

from advgrpo_kernels import _cpu
from tests import golden_runs
from tests.parts import some_weekly


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("golden")  # the runs share a cache of texts and features, as a user's do


# An objective or a reward that a run beside them has too.
WEEKLY = {"adv-pickscore", "awm", "mixed", "nft", "style", "words", "adv-grpo-released"}


def assert_repeated(name, folder):
    expected = json.loads((golden_runs.FOLDER / f"{name}.json").read_text())
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = json.loads(json.dumps(golden_runs.run(name, folder)))
    finally:
        torch.set_num_threads(threads)
    if expected["machine"] == golden_runs.machine():
        assert found == expected["iterations"]
    for own, recorded in zip(found, expected["iterations"], strict=True):
        assert own.keys() == recorded.keys()
        for key, value in recorded.items():
            close = value if value is None else pytest.approx(value, rel=golden_runs.TOLERANCE, abs=1e-5)
            assert own[key] == close, key


@pytest.mark.parametrize("name", some_weekly(sorted(golden_runs.RUNS), WEEKLY))
def test_a_run_repeats_its_committed_numbers(name, folder):
    assert_repeated(name, folder)


@pytest.mark.weekly
@pytest.mark.skipif(bool(_cpu.why_not()), reason=_cpu.why_not() or "they are there")
@pytest.mark.parametrize("name", ["adv-grpo", "flow-grpo-kl", "sft"])
def test_so_it_does_with_products_that_this_machine_would_not_choose(name, tmp_path, monkeypatch):
    """PyTorch's where ours are faster, and ours elsewhere."""
    chosen = _cpu.gains_by_products()
    monkeypatch.setattr(_cpu, "gains_by_products", lambda: not chosen)
    monkeypatch.setattr(golden_runs, "machine", dict)
    assert_repeated(name, tmp_path)


def test_every_file_belongs_to_a_run():
    assert {path.stem for path in golden_runs.FOLDER.glob("*.json")} == set(golden_runs.RUNS)
