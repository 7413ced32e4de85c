"""Group-relative advantages."""

from pathlib import Path

import numpy as np
import pytest
import torch

from advgrpo_kernels import group_advantages

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.mark.parametrize("std", ["group", "global"])
def test_advantages_of_the_public_implementation(std):
    golden = np.load(GOLDEN / "advantages_adv_grpo.npz")
    got = group_advantages(
        torch.from_numpy(golden["rewards"]), torch.from_numpy(golden["prompt_index"]), std=std, clip=None
    )
    expected = torch.from_numpy(golden[f"advantages_{std}_std"])
    torch.testing.assert_close(got.advantages.double(), expected, rtol=1e-6, atol=1e-6)


def test_statistics_by_hand():
    rewards = torch.tensor([1.0, 5.0, 3.0, 7.0, 2.0])
    ids = torch.tensor([-7, 2**40, -7, 2**40, 0])
    got = group_advantages(rewards, ids, eps=0.0)
    assert got.group_mean.tolist() == [2.0, 6.0, 2.0, 6.0, 2.0]
    assert got.group_std.tolist() == [1.0, 1.0, 1.0, 1.0, 0.0]
    assert got.advantages.tolist() == [-1.0, -1.0, 1.0, 1.0, 0.0]
    assert got.zero_std_fraction.item() == pytest.approx(1 / 3)
    assert group_advantages(rewards, ids, std="none").advantages.tolist() == [-1.0, -1.0, 1.0, 1.0, 0.0]


@pytest.mark.parametrize("std", ["group", "global", "none"])
def test_a_group_of_equal_rewards_gets_exactly_zero(std):
    """0.1 is not a binary fraction, so 3·0.1/3 may differ from 0.1; over eps = 1e-12 that would be visible."""
    rewards = torch.full((9,), 0.1, dtype=torch.float64)
    rewards[6:] = torch.tensor([1.0, 2.0, 3.0])
    ids = torch.tensor([1] * 3 + [2] * 3 + [3] * 3)
    got = group_advantages(rewards, ids, std=std, eps=1e-12)
    assert torch.count_nonzero(got.advantages[:6]) == 0
    assert torch.count_nonzero(got.group_std[:6]) == 0
    assert got.zero_std_fraction.item() == pytest.approx(2 / 3)
    assert got.advantages[8] > 0


def test_large_offsets_do_not_cancel():
    rewards = 2.0**20 + torch.arange(16, dtype=torch.float64) * 2.0**-20
    got = group_advantages(rewards, torch.zeros(16, dtype=torch.int64), eps=0.0)
    expected = (np.arange(16) - 7.5) / np.arange(16).std()
    np.testing.assert_allclose(got.advantages.numpy(), expected, rtol=1e-6)


def test_clip_and_order():
    rewards = torch.cat([torch.zeros(99), torch.ones(1)])
    ids = torch.zeros(100, dtype=torch.int64)
    got = group_advantages(rewards, ids)
    assert got.advantages.max() == 5.0
    order = torch.randperm(100)
    assert torch.equal(group_advantages(rewards[order], ids).advantages, got.advantages[order])


def test_bad_arguments_raise():
    rewards, ids = torch.rand(4), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"group_ids must be int64 \[4\]"):
        group_advantages(rewards, ids.int())
    with pytest.raises(ValueError, match="std must be one of"):
        group_advantages(rewards, ids, std="batch")
    with pytest.raises(ValueError, match="rewards must be a non-empty"):
        group_advantages(rewards[:0], ids[:0])
    with pytest.raises(ValueError, match="eps must be >= 0"):
        group_advantages(rewards, ids, eps=-1.0)
