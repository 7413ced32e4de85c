"""Sampling and gathering patch features."""

import pytest
import torch

from advgrpo_kernels import philox_permutation, sample_patches


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


def test_dtype_is_kept_and_a_zero_patch_stays_zero():
    patches = torch.zeros(1, 4, 8, dtype=torch.float16)
    got = sample_patches(patches, 2, seed=0, normalize=True).patches
    assert got.dtype == torch.float16
    assert torch.count_nonzero(got) == 0


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
