"""Group-relative advantages.

Planted bugs that turned this file red: rows behind the last taken as group 0; ids cut to 32 bits; float32 inside;
groups counted per row; group std under std='global'; mean with the wrong sign; PyTorch sums in float64 by index_add
(order of rows), by one cumulative sum (neighbouring groups) or by a [B, B] comparison (size, time); a loop over columns
and prompts in the trackers' update; the tracker's rewards cut in the order of the prompts' first appearance.
"""

import statistics
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from advgrpo_kernels import group_advantages
from advgrpo_kernels.integrations._statistics import grpo_advantages
from advgrpo_kernels.ops.group_advantages import _group_advantages_op, advantages_of_columns

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
def test_the_order_of_the_rows_changes_no_bit(std):
    """Without rounding to float32, which would hide most of it; rewards over twelve decades, so that orders matter."""
    rewards = (torch.rand(1, 3000, dtype=torch.float64) * 10 ** torch.randint(-6, 7, (1, 3000))).expand(2, -1)
    ids = torch.randint(0, 40, (3000,))
    got = advantages_of_columns(rewards, ids, std=std, eps=1e-4, clip=None)
    for _ in range(3):
        order = torch.randperm(3000)
        permuted = advantages_of_columns(rewards[:, order], ids[order], std=std, eps=1e-4, clip=None)
        for value, expected in zip(permuted[:3], got[:3]):
            assert torch.equal(value, expected[:, order])


def test_a_group_does_not_depend_on_its_neighbours():
    """Neither in its last bit nor when they are not numbers."""
    rewards, ids = torch.rand(64), torch.arange(64) % 4
    alone = group_advantages(rewards[ids == 2], ids[ids == 2])
    for other in (1e12, float("nan"), float("inf")):
        got = group_advantages(torch.where(ids == 2, rewards, other * rewards), ids)
        assert torch.equal(got.advantages[ids == 2], alone.advantages)
    assert got.advantages[ids != 2].isnan().all()


class Tensors(TorchDispatchMode):
    """Records the largest tensor made, and what would make a GPU wait."""

    def __init__(self):
        super().__init__()
        self.largest, self.waits = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.largest = max(
            [self.largest, *(t.numel() for t in torch.utils._pytree.tree_leaves(out) if torch.is_tensor(t))]
        )
        name = func.overloadpacket.__name__
        self.waits += [name] if name in ("_local_scalar_dense", "nonzero", "_unique2", "is_nonzero", "item") else []
        return out


@pytest.mark.parametrize("std", ["group", "global"])
def test_pytorch_needs_memory_in_proportion_and_reads_nothing_on_the_host(std):
    rewards, ids = torch.rand(3000), torch.randint(0, 300, (3000,))
    with Tensors() as tensors:
        group_advantages(rewards, ids, std=std, backend="torch")
    assert tensors.largest <= 2 * 3000
    assert tensors.waits == []


def tracker(global_std=False):
    return SimpleNamespace(stats={}, history_prompts=set(), global_std=global_std)


def by_a_loop_over_prompts(prompts, rewards, global_std=False):
    """How the GRPO codebases' trackers go about it: masks and a list of rows per prompt, in numpy."""
    prompts, stats, advantages = np.array(prompts), {}, np.zeros_like(rewards)
    for prompt in np.unique(prompts):
        stats.setdefault(prompt, []).extend(rewards[prompts == prompt])
    for prompt in stats:
        stats[prompt] = np.stack(stats[prompt])
        mean = stats[prompt].mean(axis=0, keepdims=True)
        std = (rewards if global_std else stats[prompt]).std(axis=0, keepdims=True) + 1e-4
        advantages[prompts == prompt] = (rewards[prompts == prompt] - mean) / std
    return advantages, stats


@pytest.mark.parametrize("global_std", [False, True])
@pytest.mark.parametrize("columns", [(), (3,)], ids=str)
def test_a_tracker_s_update_is_the_loop_over_prompts(columns, global_std):
    prompts = [f"prompt {i}" for i in np.random.default_rng(0).integers(0, 30, 500)]
    rewards, own = np.random.default_rng(1).random((500, *columns)), tracker(global_std)
    got = grpo_advantages(own, prompts, rewards)
    expected, stats = by_a_loop_over_prompts(prompts, rewards, global_std)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-10)
    assert own.stats.keys() == stats.keys()
    assert all(np.array_equal(own.stats[prompt], stats[prompt]) for prompt in stats)


def test_a_tracker_s_update_takes_no_longer_than_the_loop_over_prompts():
    """A rollout of 4,096 images with rewards for 10 timesteps, in groups of 16: a tenth of the loop's time."""
    prompts = [f"an image of thing number {i % 256}" for i in range(4096)]
    rewards = np.random.default_rng(0).random((4096, 10))
    ours, loops = [], []
    for _ in range(5):
        start = time.perf_counter()
        grpo_advantages(tracker(), prompts, rewards)
        ours.append(time.perf_counter() - start)
        start = time.perf_counter()
        by_a_loop_over_prompts(prompts, rewards)
        loops.append(time.perf_counter() - start)
    assert statistics.median(ours) <= statistics.median(loops)


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
