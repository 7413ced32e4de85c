"""Sampling and gathering patch features.

Planted bugs that turned this file red: ranks among P + 3 keys; norms below 1 left alone (stayed green until patches
shorter than 1 were tested); index P accepted; the last patch never drawn; patches written in the order of the source.
"""

import pytest
import torch

from advgrpo_kernels import philox_permutation, sample_patches, sample_patches_ref
from advgrpo_kernels.ops.patches import _sample_patches_op
from advgrpo_kernels.testing import assert_error_within_budget


def test_given_indices_are_gathered_and_normalised():
    patches = torch.randn(3, 10, 6)
    indices = torch.stack([torch.randperm(10)[:4] for _ in range(3)])
    got = sample_patches(patches, 4, indices=indices)
    expected = torch.stack([patches[b, indices[b]] for b in range(3)])
    assert torch.equal(got.patches, expected)
    assert torch.equal(got.indices, indices)
    normalised = sample_patches(patches, 4, indices=indices, normalize=True).patches
    torch.testing.assert_close(normalised, expected / expected.norm(dim=-1, keepdim=True))


def test_seeded_choice_is_the_permutation_of_philox():
    patches = torch.randn(2, 9, 5)
    got = sample_patches(patches, 9, seed=4, sample_ids=torch.tensor([11, 3]), step=2)
    expected = philox_permutation(9, 9, seed=4, sample_ids=torch.tensor([11, 3]), step=2)
    assert torch.equal(got.indices, expected)
    assert torch.equal(got.indices.sort(dim=1).values, torch.arange(9).expand(2, 9))
    assert torch.equal(sample_patches(patches, 3, seed=4).indices, sample_patches(patches, 5, seed=4).indices[:, :3])


def test_a_row_does_not_depend_on_the_batch():
    patches, ids = torch.randn(4, 30, 5), torch.tensor([8, 6, 7, 5])
    whole = sample_patches(patches, 7, seed=1, sample_ids=ids)
    part = sample_patches(patches[1:3], 7, seed=1, sample_ids=ids[1:3])
    assert torch.equal(whole.indices[1:3], part.indices)
    assert not torch.equal(whole.indices, sample_patches(patches, 7, seed=1, sample_ids=ids, step=1).indices)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_dtype_is_kept_and_a_zero_patch_stays_zero(backend, device):
    patches = torch.zeros(1, 4, 8, dtype=torch.float16, device=device)
    got = sample_patches(patches, 2, seed=0, normalize=True, backend=backend).patches
    assert got.dtype == torch.float16
    assert torch.count_nonzero(got) == 0


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_short_patches_are_lengthened(backend, device):
    patches = 1e-6 * torch.randn(1, 4, 8, device=device)
    got = sample_patches(patches, 2, seed=0, normalize=True, backend=backend).patches
    torch.testing.assert_close(got.norm(dim=-1), torch.ones(1, 2, device=device))


def test_bad_arguments_raise():
    patches = torch.randn(2, 5, 3)
    with pytest.raises(ValueError, match="exactly one of seed and indices"):
        sample_patches(patches, 2)
    with pytest.raises(ValueError, match=r"num_patches must lie in \[1, P=5\]"):
        sample_patches(patches, 6, seed=0)
    with pytest.raises(ValueError, match=r"indices must be int64 \[2, 2\]"):
        sample_patches(patches, 2, indices=torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"indices must lie in \[0, P=5\)"):
        sample_patches(patches, 1, indices=torch.tensor([[0], [5]]))
    with pytest.raises(ValueError, match=r"sample_ids must be int64 \[2\]"):
        sample_patches(patches, 1, seed=0, sample_ids=torch.arange(3))


gpu_only = pytest.mark.skipif(not torch.cuda.is_available(), reason="the Triton interpreter truncates bf16 stores")
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=[pytest.mark.gpu, gpu_only])]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("P", "n", "D"), [(1, 1, 3), (37, 9, 50), (16, 16, 128)])
def test_triton_gather_is_exact_and_norm_within_budget(dtype, P, n, D, device):
    patches = torch.randn(2, P, D, device=device).to(dtype)
    indices = torch.randint(0, P, (2, n), device=device)
    taken = sample_patches(patches, n, indices=indices, backend="triton")
    assert torch.equal(taken.patches, sample_patches_ref(patches, indices))
    got = sample_patches(patches, n, indices=indices, normalize=True, backend="triton").patches
    eager = sample_patches_ref(patches, indices, normalize=True)
    true = sample_patches_ref(patches.double(), indices, normalize=True, compute_dtype=torch.float64)
    assert_error_within_budget(got, eager, true, name="patches")


@pytest.mark.parametrize(("P", "n"), [(9, 9), (37, 5), pytest.param(600, 20, marks=pytest.mark.weekly)])
def test_triton_draws_the_reference_s_indices(P, n, device):
    patches = torch.randn(2, P, 6, device=device)
    ids = torch.tensor([11, -(2**40)], device=device)
    for seed, step in ((4, 2), (torch.tensor(-4, device=device), torch.tensor([2], device=device))):
        got = sample_patches(patches, n, seed=seed, sample_ids=ids, step=step, backend="triton")
        expected = sample_patches(patches, n, seed=seed, sample_ids=ids, step=step, backend="torch")
        assert torch.equal(got.indices, expected.indices)
        assert torch.equal(got.patches, expected.patches)


def test_triton_row_does_not_depend_on_the_batch(device):
    patches, ids = torch.randn(3, 30, 5, device=device), torch.tensor([8, 6, 7], device=device)
    whole = sample_patches(patches, 7, seed=1, sample_ids=ids, backend="triton")
    part = sample_patches(patches[1:], 7, seed=1, sample_ids=ids[1:], backend="triton")
    assert torch.equal(whole.indices[1:], part.indices)
    default = sample_patches(patches, 7, seed=1, backend="triton")
    assert torch.equal(default.indices, philox_permutation(30, 7, seed=1, sample_ids=torch.arange(3, device=device)))


def test_triton_index_out_of_range_is_nan_not_foreign_memory(device):
    patches = torch.randn(1, 4, 5, device=device)
    indices = torch.tensor([[3, 4, -1]], device=device)
    taken, _ = _sample_patches_op(patches, 3, indices, None, None, None, 0, 0, True)
    assert torch.isfinite(taken[0, 0]).all()
    assert torch.isnan(taken[0, 1:]).all()


def test_triton_views(device):
    patches = torch.randn(6, 2, 12, device=device).transpose(0, 1)[:, :, ::2]
    got = sample_patches(patches, 3, seed=1, backend="triton")
    assert torch.equal(got.patches, sample_patches(patches, 3, seed=1, backend="torch").patches)


def test_opcheck(device):
    patches = torch.randn(1, 5, 3, device=device)
    torch.library.opcheck(_sample_patches_op, (patches, 2, None, None, None, None, 3, 0, True))
    indices = torch.tensor([[4, 0]], device=device)
    torch.library.opcheck(_sample_patches_op, (patches, 2, indices, None, None, None, 0, 0, False))


def test_compiles_without_graph_break(device):
    patches = torch.randn(1, 5, 3, device=device)
    function = lambda x: sample_patches(x, 2, seed=1, backend="triton").patches.sin()  # noqa: E731
    assert torch.equal(torch.compile(function, fullgraph=True, backend="aot_eager")(patches), function(patches))


@pytest.mark.gpu
def test_real_size():
    patches = torch.randn(96, 1369, 768, device="cuda").bfloat16()
    got = sample_patches(patches, 64, seed=1, normalize=True, backend="triton")
    expected = sample_patches(patches, 64, seed=1, normalize=True, backend="torch")
    assert torch.equal(got.indices, expected.indices)
    torch.testing.assert_close(got.patches, expected.patches, rtol=2**-7, atol=1e-6)
