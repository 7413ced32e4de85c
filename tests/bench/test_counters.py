"""The instruments of bench/counters.py on functions whose counts are known by hand, and on our kernels.

Planted bugs that turned this file red: views counted; `_unsafe_view` counted; copies inside our operators not seen;
the optimizer's three launches counted as one; a gather that reads its whole table; broadcast dimensions read in full;
what `copy_` overwrites counted as read; a tensor read that another is made like; matrix products counted as
elementwise; `tolist` not seen; host tensors counted as the device's; a saved storage counted per view; parameters
counted as saved; scalars left out of the trace; recomputation left out of the backward pass.
"""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from advgrpo_kernels import (
    ada_layer_norm,
    clipped_policy_loss,
    fp8_quantize,
    gated_residual,
    gaussian_step,
    gelu,
    group_advantages,
    group_norm,
    hinge_head_loss,
    merge_lora,
    multi_tensor_adamw,
    qk_rms_norm,
    sample_patches,
    score_features,
    swiglu,
)
from bench.counters import (
    ElementwiseBytes,
    HostSyncError,
    HostSyncs,
    Launches,
    SavedTensors,
    Trace,
    flops,
    on_gpu,
)


@pytest.fixture(autouse=True)
def _poison_empty():
    """The root conftest's is off here: a fill after every allocation would be counted."""


def meta(*shape, **options):
    return torch.empty(shape, device="meta", **options)


def names(run, **counter):
    with Launches(**counter) as launches:
        run()
    return launches.names


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_launches_leave_out_views_and_allocations(device):
    x, weight, bias = (torch.zeros(shape, device=device) for shape in [(2, 3, 4), (5, 4), (5,)])

    def run():
        y = F.linear(x, weight, bias)  # view, t, addmm, view
        y = y.transpose(1, 2).reshape(-1)  # a copy and its view
        return torch.empty_like(y), (y + 1)[1:].unsqueeze(0)

    assert names(run) == ["addmm", "clone", "add"]


def test_launches_of_a_backward_pass():
    x = meta(3, 4, requires_grad=True)
    loss = (x * 2).sum()
    assert names(loss.backward) == ["ones_like", "mul"]


def test_attention_is_one_launch_on_a_gpu_each_way():
    qkv = [meta(2, 3, 5, 16, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    with on_gpu():
        out = F.scaled_dot_product_attention(*qkv)
        with Launches() as launches:
            F.scaled_dot_product_attention(*qkv)
            out.backward(meta(*out.shape, dtype=torch.bfloat16))
    assert launches.names == [f"_scaled_dot_product_flash_attention{suffix}" for suffix in ("", "_backward")]
    assert len(names(lambda: F.scaled_dot_product_attention(*qkv))) > 3  # outside, the decomposition
    with on_gpu(), pytest.raises(NotImplementedError, match="masks"):
        F.scaled_dot_product_attention(*qkv, attn_mask=meta(5, 5))


def kernel_calls():
    """Name -> (call on meta tensors, its launches); the same counts as tests/kernels' with real tensors."""
    x, vector, grid = meta(2, 3, 16), meta(2, 16), meta(2, 3, 4)
    rows, ids, patches, cls = meta(2), meta(6, dtype=torch.int64), meta(2, 9, 6), meta(2, 6)
    head = {n: meta(*s) for n, s in {"w1": (8, 6), "b1": (8,), "w2": (1, 8), "b2": (1,)}.items()}
    qkv, weights, table = meta(2, 5, 3, 2, 16), [meta(16), meta(16)], meta(3)
    norm, residual, gelus = "_residual_norm_fwd_kernel", "_residual_norm_fwd_kernel", "_gelu_fwd_kernel"
    group_norms = ["_group_norm_moments_kernel", "_group_norm_scales_kernel", "_group_norm_fwd_kernel"]
    seed, step = meta(dtype=torch.int64), meta(dtype=torch.int64)
    draw = {"seed": seed, "sample_ids": ids[:2], "step": step}
    chosen = meta(2, 4, dtype=torch.int64)
    policy = (grid, grid, grid, table, rows, rows)
    return {
        "qk_rms_norm": (lambda: qk_rms_norm(qkv, weights), ["_qk_rms_norm_fwd_kernel"]),
        "ada_layer_norm": (lambda: ada_layer_norm(x, vector, vector), [norm]),
        "ada_layer_norm of a strided x": (lambda: ada_layer_norm(x[:, :2], vector, vector), ["clone", norm]),
        "ada_layer_norm fp8": (lambda: ada_layer_norm(x, vector, vector, quantize=True), [norm]),
        "gated_residual": (lambda: gated_residual(x, x, vector), [residual]),
        "gelu": (lambda: gelu(x), [gelus]),
        "swiglu of a part": (lambda: swiglu(x[..., 4:]), ["_swiglu_fwd_kernel"]),
        "group_norm": (lambda: group_norm(meta(2, 8, 3, 4), 2, meta(8), meta(8), silu=True), group_norms),
        "fp8 by row": (lambda: fp8_quantize(x), ["_fp8_rows_kernel"]),
        "fp8 by tensor": (lambda: fp8_quantize(x, granularity="tensor"), ["_fp8_amax_kernel", "_fp8_tensor_kernel"]),
        "gaussian_step": (lambda: gaussian_step(grid, grid, table, **draw), ["_gaussian_step_kernel"]),
        "clipped_policy_loss": (
            lambda: clipped_policy_loss(*policy, clip_range=1e-4),
            ["_gaussian_log_prob_kernel", "_clipped_policy_loss_kernel"],
        ),
        "group_advantages": (lambda: group_advantages(meta(6), ids), ["_group_advantages_kernel"]),
        "sample_patches": (lambda: sample_patches(patches, 4, seed=seed), ["_sample_patches_kernel"]),
        "score_features": (lambda: score_features(cls, patches, chosen, head), ["_head_rows_kernel", "_mix_kernel"]),
        "hinge_head_loss": (
            lambda: hinge_head_loss(cls, patches, cls, patches, head),
            ["_head_rows_kernel", "_hinge_kernel"],
        ),
        "merge_lora": (
            lambda: merge_lora([meta(4, 6)] * 3, [meta(2, 6)] * 3, [meta(4, 2)] * 3, 2.0, outs=[meta(4, 6)] * 3),
            ["merge_lora"],
        ),
    }


@pytest.mark.parametrize("name", kernel_calls())
def test_our_kernels_are_counted_as_they_launch(name):
    call, expected = kernel_calls()[name]
    with on_gpu(), torch.no_grad(), Launches() as launches:
        call()
    assert launches.names == expected


def test_the_optimizer_is_three_launches():
    parameters, state = [meta(8)], [[meta(8)] for _ in range(3)]
    settings = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
    with on_gpu(), Launches() as launches:
        multi_tensor_adamw(parameters, [meta(8)], *state[:2], meta(dtype=torch.int64), **settings)
    assert launches.count == 3


def test_without_on_gpu_the_reference_is_counted():
    with Launches() as launches:
        gelu(meta(2, 3, 16))
    assert "_gelu_fwd_kernel" not in launches.names


def test_elementwise_bytes():
    x, row, index = meta(4, 8), meta(8, dtype=torch.bfloat16), meta(2, dtype=torch.int64)

    def bytes_of(run):
        with ElementwiseBytes() as traffic:
            run()
        return traffic.total

    assert bytes_of(lambda: x + 1) == 2 * 128
    assert bytes_of(lambda: x + row.expand(4, 8)) == 128 + 16 + 128  # a broadcast row is read once
    assert bytes_of(lambda: x.mul_(2)) == 2 * 128  # read and written
    assert bytes_of(lambda: x.zero_()) == 128  # only written
    assert bytes_of(lambda: x.new_zeros(3)) == 12
    assert bytes_of(lambda: torch.zeros_like(x)) == 128  # reads nothing of what it is like
    assert bytes_of(lambda: x.copy_(row)) == 16 + 128
    assert bytes_of(lambda: torch.cat([x, x])) == 4 * 128
    assert bytes_of(lambda: x.index_select(0, index)) == 64 + 64 + 16  # rows it picks, not the table
    assert bytes_of(lambda: x @ x.t()) == 0
    assert bytes_of(lambda: F.conv2d(x.view(1, 1, 4, 8), meta(1, 1, 3, 3))) == 0
    with on_gpu():
        assert bytes_of(lambda: gelu(x)) == 2 * 128
        q = meta(1, 1, 4, 16)
        assert bytes_of(lambda: F.scaled_dot_product_attention(q, q, q)) == 0
        assert bytes_of(lambda: F.scaled_dot_product_attention(query=q, key=q, value=q)) == 0


def test_flops():
    a, b = meta(3, 4), meta(4, 5)
    assert flops(lambda: a @ b) == 2 * 3 * 4 * 5
    with on_gpu():  # forward two products, backward five: scores are computed again
        q, k, v = (meta(2, 3, 7, 16, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
        out = []
        one = 2 * 2 * 3 * 7 * 7 * 16
        assert flops(lambda: out.append(F.scaled_dot_product_attention(q, k, v))) == 2 * one
        assert flops(lambda: out[0].backward(meta(2, 3, 7, 16, dtype=torch.bfloat16))) == 5 * one


@pytest.mark.parametrize("backward", ["method", "backward", "grad"])
def test_recomputation_sees_the_gpu_as_well(backward):
    q = meta(2, 3, 7, 16, dtype=torch.bfloat16, requires_grad=True)
    with on_gpu():
        out = checkpoint(lambda q: F.scaled_dot_product_attention(q, q, q), q, use_reentrant=False)
        run = {
            "method": out.sum().backward,
            "backward": lambda: torch.autograd.backward(out.sum()),
            "grad": lambda: torch.autograd.grad(out.sum(), q),
        }[backward]
        counted = names(run)
    assert sum(name.startswith("_scaled_dot_product_flash") for name in counted) == 2


SYNCS = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool((x > 0).any()),
    "float": lambda x: float(x[0]),
    "nonzero": lambda x: x.nonzero(),
    "boolean index": lambda x: x[x > 0],
    "equal": lambda x: torch.equal(x, x + 1),
    "tolist": lambda x: x.tolist(),
    "unique": lambda x: torch.unique(x),
    "masked_select": lambda x: torch.masked_select(x, x > 0),
}


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("sync", SYNCS.values(), ids=SYNCS)
def test_syncs_raise(sync, device):
    with pytest.raises(HostSyncError, match="waits for the device"), HostSyncs(device):
        sync(torch.zeros(3, device=device))


@pytest.mark.parametrize(
    "sync", [lambda x: x.cpu(), lambda x: torch.zeros(3).copy_(x), lambda x: x.to("cpu", torch.half)]
)
def test_copies_to_the_host_raise(sync):
    with pytest.raises(HostSyncError), HostSyncs():
        sync(meta(3))


def test_work_without_syncs_passes_and_host_tensors_are_free():
    host = torch.arange(3)
    with HostSyncs():
        meta(3).add_(1).sum().sqrt().expand(4)
        assert host.tolist() == [0, 1, 2]
        assert host.sum().item() == 3
        host.to("meta")


def test_syncs_are_counted_when_allowed():
    x = torch.ones(3)
    with HostSyncs("cpu", forbidden=False) as syncs:
        for _ in range(2):
            x.sum().item()
        x.tolist()
    assert syncs.names == ["_local_scalar_dense", "_local_scalar_dense", "tolist"]


def test_saved_tensors_count_each_storage_once_and_no_parameters():
    weight, x = torch.zeros(4, 4, requires_grad=True), torch.zeros(8, 4, requires_grad=True)
    with SavedTensors([weight]) as saved:
        hidden = x @ weight  # saves x and the weight
        (hidden[:4] * hidden[4:]).sum()  # saves two halves of one storage
    assert saved.total == 2 * 8 * 4 * 4
    with SavedTensors() as saved, torch.no_grad():
        x @ weight
    assert saved.total == 0


def test_trace_sees_whatever_a_graph_would_freeze():
    table, rows = meta(10, 3), meta(4, 3)

    def trace(step):
        with Trace() as recorded:
            step()
        return recorded.lines

    def by_device_counter(counter):
        return lambda: rows * table.index_select(0, counter)

    first, second = (trace(by_device_counter(meta(1, dtype=torch.int64))) for _ in range(2))
    assert first == second
    assert len(first) == 2
    assert trace(lambda: rows * 0.5) != trace(lambda: rows * 0.25)  # a host scalar changes from step to step
    assert trace(lambda: rows + 1) != trace(lambda: rows[:2] + 1)
    with on_gpu():
        calls = [trace(lambda i=i: gaussian_step(rows, rows, meta(3), seed=1, step=i)) for i in range(2)]
    assert calls[0] != calls[1]
