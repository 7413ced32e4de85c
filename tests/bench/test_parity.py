"""What bench.step refuses to time, and what it does not."""

from dataclasses import replace

import pytest
import torch

from bench import parity
from bench.contenders import Contenders, small
from bench.parity import check_update, tolerance


@pytest.fixture(scope="module")
def contenders(tmp_path_factory) -> Contenders:
    return small(tmp_path_factory.mktemp("small"), "cpu")


@pytest.mark.parametrize("side", ["b0", "b1"])
def test_rounding_beyond_the_clip_range_is_no_other_algorithm(contenders, monkeypatch, side):
    """As of compiled blocks, whose forward with gradients is not the one that sampled to the last bit."""
    clip_range = contenders.config.update.clip_range
    same = parity.same_micro_batch

    def rounded(c, other):
        ours, latents, theirs = same(c, other)
        steps = [replace(step, log_prob=step.log_prob + 3 * clip_range) for step in theirs.steps]
        return ours, latents, replace(theirs, steps=steps)

    monkeypatch.setattr(parity, "same_micro_batch", rounded)
    assert clip_range < 1e-3
    check = check_update(contenders, contenders.baselines[side], tolerance(torch.float32))
    assert check.passed, check
    assert contenders.config.update.clip_range == clip_range
