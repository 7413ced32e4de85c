"""An iteration of ours against B1's and B0's on the tiny model, in one process, taking turns, the same algorithm on
all sides: a noise per image, then one per prompt for ours and B1.

In CPU seconds of one thread; B1's blocks are not compiled on a CPU. What is gated on a GPU is in test_structure.py.

The lower end of the interval is held to `bench.gate.HELD`, so that neighbours on the machine widen it instead of
deciding. Planted, and its own control: every row computed before the window, which B1 shares.
"""

import pytest
import torch

from advgrpo_kernels import _cpu
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


def timed(unit, sides) -> tuple[dict, dict]:
    """What `bench.step` reports of a unit, and the rounds of its sides, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rounds = timing.interleave(sides, "cpu", repeats=ROUNDS, warmup=1)
    finally:
        torch.set_num_threads(threads)
    return figures(unit, rounds, ROUNDS), rounds


def verdicts(report: dict) -> list[str]:
    """Of what the report has."""
    return [row["verdict"] for row in gate.held(report) if row["unit"] in report]


@pytest.mark.slow
@pytest.mark.weekly
def test_shared_noise_holds_its_threshold(contenders):
    iteration = units(contenders.with_noise("shared"))["iteration"]
    report, _ = timed(iteration, iteration.sides)
    assert verdicts({"iteration_shared": report}) == ["ok"], report


@pytest.mark.weekly
@pytest.mark.slow
def test_shared_noise_would_not_hold_it_without_the_shared_prefix(contenders, monkeypatch):
    shared = contenders.with_noise("shared")
    iteration = units(shared)["iteration"]

    def unshared():
        with monkeypatch.context() as patch:
            patch.setattr(shared.objective.sampler, "share_prefix", False)
            patch.setattr(_cpu, "gains_by_products", lambda: False)  # where ours run they hold it alone
            shared.trainer.iterate()

    report, rounds = timed(iteration, iteration.sides | {"unshared": unshared})
    over_b1 = timing.as_json(timing.ratio(rounds["b1"], rounds["unshared"]))
    control = {"iteration_shared": {"over_b1": over_b1, "rounds": report["rounds"]}}
    assert verdicts(control) == ["BELOW"], control


@pytest.mark.weekly
@pytest.mark.slow
def test_a_noise_per_image_holds_its_thresholds(contenders):
    iteration = units(contenders)["iteration"]
    report, _ = timed(iteration, iteration.sides)
    assert verdicts({"iteration": report}) == ["ok", "ok"], report
