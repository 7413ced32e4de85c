"""An iteration of ours against B0's on the tiny model, in one process.

Where the factor comes from, in CPU seconds of one thread: the rows of a prompt are computed once up to the window's
first step, in sampling and in the update; merged LoRA on ODE steps; adapters folded into the narrow weights; one QKV
product per stream; a channels_last decoder; cached reference features. What is gated on a GPU is in test_structure.py.

Planted in the test below: every row computed in every step.
"""

import statistics
import time

import pytest
import torch

from bench.contenders import Contenders, tiny
from bench.step import units

ROUNDS = 5
ATTEMPTS = 4  # a busy machine moves a median by a few per cent


@pytest.fixture(scope="module")
def contenders(tmp_path_factory) -> Contenders:
    return tiny(tmp_path_factory.mktemp("speed"), "cpu")


def ratio(contenders: Contenders) -> float:
    """Median CPU time of B0's iteration over ours, taking turns; CPU time, since others may use the machine too."""
    unit, seconds = units(contenders)["iteration"], {"ours": [], "baseline": []}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for turn in range(ROUNDS + 1):  # the first is warm-up
            for name, values in seconds.items():
                begin = time.process_time()
                getattr(unit, name)()
                if turn:
                    values.append(time.process_time() - begin)
    finally:
        torch.set_num_threads(threads)
    return statistics.median(seconds["baseline"]) / statistics.median(seconds["ours"])


@pytest.mark.slow
def test_an_iteration_is_twice_as_fast_as_the_baseline(contenders, monkeypatch):
    best = 0.0
    for _ in range(ATTEMPTS):
        best = max(best, ratio(contenders))
        if best >= 2.0:
            break
    assert best >= 2.0
    monkeypatch.setattr(contenders.trainer.sampler, "share_prefix", False)
    assert ratio(contenders) < 2.0
