"""An iteration of ours against B1's and B0's on the tiny model, in one process, taking turns, the same algorithm on
all sides: a noise per image, then one per prompt for ours and B1.

In CPU seconds of one thread; B1's blocks are not compiled on a CPU. What is gated on a GPU is in test_structure.py.

The lower end of the interval is held to `bench.gate.HELD`, so that neighbours on the machine widen it instead of
deciding. Planted, and its own control: every row computed before the window, which B1 shares.
"""

import pytest
import torch

from bench import gate, timing
from bench.contenders import Contenders, tiny
from bench.step import figures, units

ROUNDS = 3
SMALLER = {  # an eighth of the preset's work
    "prompts_per_iteration": 2,
    "micro_batch": 8,
    "guidance_scale": 1.0,
    "initial_noise": "per_image",
}


@pytest.fixture(scope="module")
def contenders(tmp_path_factory) -> Contenders:
    return tiny(tmp_path_factory.mktemp("speed"), "cpu", rollout=SMALLER)


@pytest.mark.slow
def test_whole_iterations_hold_their_thresholds_and_would_not_without_the_shared_prefix(contenders, monkeypatch):
    shared = contenders.with_noise("shared")
    iteration, iteration_shared = (units(c)["iteration"] for c in (contenders, shared))

    def unshared():
        with monkeypatch.context() as patch:
            patch.setattr(shared.objective.sampler, "share_prefix", False)
            shared.trainer.iterate()

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        own = timing.interleave(iteration.sides, "cpu", repeats=ROUNDS, warmup=1)
        both = timing.interleave(iteration_shared.sides | {"unshared": unshared}, "cpu", repeats=ROUNDS, warmup=1)
    finally:
        torch.set_num_threads(threads)
    report = {
        "iteration": figures(iteration, own, ROUNDS),
        "iteration_shared": figures(iteration_shared, both, ROUNDS),
    }
    rows = gate.held(report)
    assert [row["verdict"] for row in rows] == ["ok"] * len(rows), rows
    control = {"iteration_shared": {"over_b1": timing.as_json(timing.ratio(both["b1"], both["unshared"]))}}
    assert gate.held(control)[-1]["verdict"] == "BELOW", control
