"""Random patches of each image: choice without replacement, gather, optional L2 normalisation.

The local term of the adversarial reward looks at n of the P patch features of an image (arXiv 2511.20256, eqs. 10-11).
A seeded choice is the random order of `philox_permutation`: a function of (seed, sample id, step) alone, so it does
not depend on how the batch is split.

Shapes:   patches [B, P, D] any float dtype -> patches [B, n, D] in the same dtype, indices [B, n] int64.
Numerics: x / max(|x|, 1e-12), the norm in float32, as torch.nn.functional.normalize.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .._runtime import can_look_at, pick_backend
from .philox import philox_permutation

__all__ = ["PatchSample", "sample_patches", "sample_patches_ref"]

NORM_EPS = 1e-12


class PatchSample(NamedTuple):
    """Result of `sample_patches`."""

    patches: torch.Tensor  # [B, n, D] in the dtype of the input
    indices: torch.Tensor  # [B, n] int64 in [0, P)


def sample_patches(
    patches: torch.Tensor,
    num_patches: int,
    *,
    seed: int | torch.Tensor | None = None,
    indices: torch.Tensor | None = None,
    sample_ids: torch.Tensor | None = None,
    step: int | torch.Tensor = 0,
    normalize: bool = False,
    backend: str = "auto",
) -> PatchSample:
    """Take `num_patches` patches of each row: those at `indices`, or a random choice keyed by `seed`.

    Args:
        patches: [B, P, D] floating point. Features of a frozen backbone: no gradient is returned.
        num_patches: n, 1 <= n <= P.
        seed: integer or one-element int64 tensor. Exactly one of `seed` and `indices`.
        indices: [B, n] int64 in [0, P).
        sample_ids: int64 [B]; the draw of a row depends only on (seed, its id, step). Default 0..B-1.
        step: integer or one-element integer tensor, e.g. the iteration.
        normalize: divide each patch by its L2 norm.

    Raises:
        ValueError: names the argument that does not fit. Indices outside [0, P) raise on the CPU; on a GPU, where
            looking would cost a synchronisation, those patches come out NaN.
    """
    if patches.dim() != 3 or patches.numel() == 0 or not patches.is_floating_point():
        raise ValueError(
            f"patches must be non-empty floating point [B, P, D], got {patches.dtype} {tuple(patches.shape)}"
        )
    B, P, _ = patches.shape
    if not 1 <= num_patches <= P:
        raise ValueError(f"num_patches must lie in [1, P={P}], got {num_patches}")
    if (seed is None) == (indices is None):
        raise ValueError("give exactly one of seed and indices")
    if indices is not None:
        check_indices(indices, B, num_patches, P)
    if sample_ids is not None and sample_ids.shape != (B,):
        raise ValueError(f"sample_ids must be int64 [{B}], got {sample_ids.dtype} {tuple(sample_ids.shape)}")
    if pick_backend(backend, patches) == "triton":
        raise NotImplementedError("sample_patches has no Triton kernel yet: use backend='torch' or 'auto'")
    if indices is None:
        ids = torch.arange(B, device=patches.device) if sample_ids is None else sample_ids.to(patches.device)
        indices = philox_permutation(P, num_patches, seed=seed, sample_ids=ids, step=step)
    return PatchSample(sample_patches_ref(patches, indices, normalize=normalize), indices)


def sample_patches_ref(
    patches: torch.Tensor,
    indices: torch.Tensor,
    *,
    normalize: bool = False,
    compute_dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Gather [B, n, D] by plain PyTorch, the norm in `compute_dtype`."""
    taken = patches.detach().gather(1, indices[:, :, None].expand(-1, -1, patches.shape[2]))
    return l2_normalize(taken.to(compute_dtype)).to(patches.dtype) if normalize else taken


def l2_normalize(x: torch.Tensor) -> torch.Tensor:
    """x / max(|x|, 1e-12) over the last dimension."""
    return torch.nn.functional.normalize(x, dim=-1, eps=NORM_EPS)


def check_indices(indices: torch.Tensor, batch: int, count: int, population: int) -> None:
    """Raise ValueError unless `indices` is int64 [B, n] and, where looking is free, within [0, P)."""
    if indices.dtype != torch.int64 or indices.shape != (batch, count):
        raise ValueError(f"indices must be int64 [{batch}, {count}], got {indices.dtype} {tuple(indices.shape)}")
    if can_look_at(indices) and not bool(((indices >= 0) & (indices < population)).all()):
        raise ValueError(f"indices must lie in [0, P={population}), got {int(indices.min())}..{int(indices.max())}")
