"""Group-relative advantages.

Planted bugs that turned this file red: rows behind the last taken as group 0; ids cut to 32 bits; float32 inside;
groups counted per row; group std under std='global'; mean with the wrong sign.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from advgrpo_kernels import group_advantages
from advgrpo_kernels.ops.group_advantages import _group_advantages_op

GOLDEN = Path(__file__).parents[1] / "golden"


BACKENDS = ["torch", "triton"]


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


@pytest.mark.parametrize("std", ["group", "global"])
def test_advantages_of_the_public_implementation(std, backend, device):
    golden = np.load(GOLDEN / "advantages_adv_grpo.npz")
    rewards, ids = (torch.from_numpy(golden[key]).to(device) for key in ("rewards", "prompt_index"))
    got = group_advantages(rewards, ids, std=std, clip=None, backend=backend)
    expected = torch.from_numpy(golden[f"advantages_{std}_std"])
    torch.testing.assert_close(got.advantages.double().cpu(), expected, rtol=1e-6, atol=1e-6)


def test_statistics_by_hand(backend, device):
    rewards = torch.tensor([1.0, 5.0, 3.0, 7.0, 2.0], device=device)
    ids = torch.tensor([-7, 2**40, -7, 2**40, 0], device=device)  # 2**40 differs from 0 in the high half only
    got = group_advantages(rewards, ids, eps=0.0, backend=backend)
    assert got.group_mean.tolist() == [2.0, 6.0, 2.0, 6.0, 2.0]
    assert got.group_std.tolist() == [1.0, 1.0, 1.0, 1.0, 0.0]
    assert got.advantages.tolist() == [-1.0, -1.0, 1.0, 1.0, 0.0]
    assert got.zero_std_fraction.item() == pytest.approx(1 / 3)
    centred = group_advantages(rewards, ids, std="none", backend=backend)
    assert centred.advantages.tolist() == [-1.0, -1.0, 1.0, 1.0, 0.0]


@pytest.mark.parametrize("std", ["group", "global", "none"])
def test_a_group_of_equal_rewards_gets_exactly_zero(std, backend, device):
    """0.1 is not a binary fraction, so 3·0.1/3 may differ from 0.1; over eps = 1e-12 that would be visible."""
    rewards = torch.full((9,), 0.1, dtype=torch.float64)
    rewards[6:] = torch.tensor([1.0, 2.0, 3.0])
    ids = torch.tensor([1] * 3 + [2] * 3 + [3] * 3)
    got = group_advantages(rewards.to(device), ids.to(device), std=std, eps=1e-12, backend=backend)
    assert torch.count_nonzero(got.advantages[:6]) == 0
    assert torch.count_nonzero(got.group_std[:6]) == 0
    assert got.zero_std_fraction.item() == pytest.approx(2 / 3)
    assert got.advantages[8] > 0


def test_large_offsets_do_not_cancel(backend, device):
    rewards = 2.0**20 + torch.arange(16, dtype=torch.float64) * 2.0**-20
    ids = torch.zeros(16, dtype=torch.int64, device=device)
    got = group_advantages(rewards.to(device), ids, eps=0.0, backend=backend)
    expected = (np.arange(16) - 7.5) / np.arange(16).std()
    np.testing.assert_allclose(got.advantages.cpu().numpy(), expected, rtol=1e-6)


def test_clip_and_order(backend, device):
    rewards = torch.cat([torch.zeros(99), torch.ones(1)]).to(device)
    ids = torch.zeros(100, dtype=torch.int64, device=device)
    got = group_advantages(rewards, ids, backend=backend)
    assert got.advantages.max() == 5.0
    order = torch.randperm(100, device=device)
    permuted = group_advantages(rewards[order], ids, backend=backend)
    torch.testing.assert_close(permuted.advantages, got.advantages[order], rtol=1e-6, atol=0)


@pytest.mark.parametrize("std", ["group", "global", "none"])
@pytest.mark.parametrize(("batch", "dtype"), [(1, torch.float32), (64, torch.float16), (131, torch.float32)])
def test_triton_equals_the_reference(std, batch, dtype, device):
    """Tiles of 64: one row, exactly one tile, three with a ragged last one; groups from 1 to many rows."""
    rewards = torch.rand(2 * batch, device=device).to(dtype)[::2]  # a view
    ids = (torch.randint(0, 9, (batch,), device=device) ** 3 - 100) * 2**31
    got = group_advantages(rewards, ids, std=std, clip=1.2, backend="triton")
    expected = group_advantages(rewards, ids, std=std, clip=1.2, backend="torch")
    for value, reference in zip(got, expected):
        torch.testing.assert_close(value, reference, rtol=1e-6, atol=1e-7)


def test_opcheck(device):
    ids = torch.tensor([0, 0, 1, 1], device=device)
    torch.library.opcheck(_group_advantages_op, (torch.rand(4, device=device), ids, "group", 1e-4, 5.0))


def test_compiles_without_graph_break(device):
    rewards, ids = torch.rand(6, device=device), torch.arange(6, device=device) // 2
    function = lambda r: group_advantages(r, ids, backend="triton").advantages * 2  # noqa: E731
    assert torch.equal(torch.compile(function, fullgraph=True, backend="aot_eager")(rewards), function(rewards))


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


@pytest.mark.gpu
def test_real_size():
    """48 groups of 16 in random order."""
    rewards, ids = torch.randn(768, device="cuda"), (torch.arange(768, device="cuda") % 48)[torch.randperm(768)]
    got = group_advantages(rewards, ids, backend="triton")
    expected = group_advantages(rewards, ids, backend="torch")
    torch.testing.assert_close(got.advantages, expected.advantages, rtol=1e-6, atol=1e-6)
