"""Random patches of each image: choice without replacement, gather, optional L2 normalisation.

The local term of the adversarial reward looks at n of the P patch features of an image (arXiv 2511.20256, eqs. 10-11).
A seeded choice is the random order of `philox_permutation`: a function of (seed, sample id, step) alone, so it does
not depend on how the batch is split.

Shapes:   patches [B, P, D] any float dtype -> patches [B, n, D] in the same dtype, indices [B, n] int64.
Numerics: x / max(|x|, 1e-12), the norm in float32, as torch.nn.functional.normalize.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch

from .._ops import add_op_namespace_prefix
from .._runtime import HAS_TRITON, can_look_at, check_tensors, device_guard, pick_backend
from .philox import PATCH_STREAM, philox_permutation, split_integer

__all__ = ["PatchSample", "sample_patches", "sample_patches_ref"]

NORM_EPS = 1e-12
ROWS, KEYS, WIDTH = 16, 512, 128  # patches per program, keys compared and features moved at a time

if HAS_TRITON:
    import triton
    import triton.language as tl

    from .philox import interleave4, philox_block

    PATCHES: tl.constexpr = tl.constexpr(PATCH_STREAM)

    @triton.jit
    def _keys(seed, step, sample_id, first, COUNT: tl.constexpr):
        """Sort keys of patches first .. first + COUNT - 1 (both multiples of 4), uint32 [COUNT]."""
        block = first // 4 + tl.arange(0, COUNT // 4)
        w0, w1, w2, w3 = philox_block(seed, PATCHES, block, step, sample_id)
        return interleave4(w0, w1, w2, w3)

    @triton.jit
    def _ranks(seed, step, sample_id, first, P, ROWS: tl.constexpr, KEYS: tl.constexpr, KEY_TILES: tl.constexpr):
        """Place of patches first .. first + ROWS - 1 in the random order: how many keys sort before theirs."""
        j = first + tl.arange(0, ROWS)
        key = _keys(seed, step, sample_id, first, ROWS)
        rank = tl.zeros((ROWS,), tl.int32)
        for tile in range(KEY_TILES):
            k = tile * KEYS + tl.arange(0, KEYS)
            other = _keys(seed, step, sample_id, tile * KEYS, KEYS)
            ties = (other[None, :] == key[:, None]) & (k[None, :] < j[:, None])
            before = ((other[None, :] < key[:, None]) | ties) & (k[None, :] < P)
            rank += tl.sum(before.to(tl.int32), axis=1)
        return rank

    @triton.jit(do_not_specialize=["seed", "step"])
    def _sample_patches_kernel(
        patches_ptr,
        indices_ptr,
        sample_ids_ptr,
        seed,
        step,
        out_ptr,
        out_indices_ptr,
        P,
        n,
        D,
        SEEDED: tl.constexpr,
        SEED_IN_MEMORY: tl.constexpr,
        STEP_IN_MEMORY: tl.constexpr,
        NORMALIZE: tl.constexpr,
        ROWS: tl.constexpr,
        KEYS: tl.constexpr,
        KEY_TILES: tl.constexpr,
        WIDTH: tl.constexpr,
        WIDTH_TILES: tl.constexpr,
    ):
        b = tl.program_id(0).to(tl.int64)
        first = tl.program_id(1) * ROWS
        local = first + tl.arange(0, ROWS)
        if SEEDED:
            seed_ = tl.load(seed) if SEED_IN_MEMORY else tl.full((), seed, tl.int64)
            step_ = tl.load(step) if STEP_IN_MEMORY else tl.full((), step, tl.int64)
            sample_id = b if sample_ids_ptr is None else tl.load(sample_ids_ptr + b)
            source, place = local, _ranks(seed_, step_, sample_id, first, P, ROWS, KEYS, KEY_TILES)
            taken = (local < P) & (place < n)
            tl.store(out_indices_ptr + b * n + place, source.to(tl.int64), mask=taken)
            present = taken
        else:
            taken = local < n
            source, place = tl.load(indices_ptr + b * n + local, mask=taken, other=0), local
            present = taken & (source >= 0) & (source < P)
        d = tl.arange(0, WIDTH)
        load_at = patches_ptr + (b * P + source)[:, None] * D
        scale = tl.where(present, 1.0, float("nan"))
        if NORMALIZE:
            squares = tl.zeros((ROWS, WIDTH), tl.float32)
            for tile in range(WIDTH_TILES):
                column = tile * WIDTH + d
                mask = present[:, None] & (column < D)[None, :]
                x = tl.load(load_at + column[None, :], mask=mask, other=0.0).to(tl.float32)
                squares += x * x
            norm = tl.sqrt_rn(tl.sum(squares, axis=1))
            scale = tl.where(present, tl.div_rn(1.0, tl.maximum(norm, 1e-12)), float("nan"))
        store_at = out_ptr + (b * n + place)[:, None] * D
        for tile in range(WIDTH_TILES):
            column = tile * WIDTH + d
            inside = (column < D)[None, :]
            x = tl.load(load_at + column[None, :], mask=present[:, None] & inside, other=0.0).to(tl.float32)
            x = (x * scale[:, None]).to(out_ptr.dtype.element_ty)
            tl.store(store_at + column[None, :], x, mask=taken[:, None] & inside)


@torch.library.custom_op(add_op_namespace_prefix("sample_patches"), mutates_args=())
def _sample_patches_op(
    patches: torch.Tensor,
    num_patches: int,
    indices: torch.Tensor | None,
    sample_ids: torch.Tensor | None,
    seed: torch.Tensor | None,
    step: torch.Tensor | None,
    seed_value: int,
    step_value: int,
    normalize: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(patches, indices; the latter empty when given) in one launch; seed and step are the tensor, else the value."""
    B, P, D = patches.shape
    out, out_indices = _outputs(patches, num_patches, indices)
    seeded = indices is None
    rows = (patches.contiguous(), *(None if t is None else t.contiguous() for t in (indices, sample_ids)))
    random = (seed_value if seed is None else seed, step_value if step is None else step)
    with device_guard(patches):
        _sample_patches_kernel[(B, triton.cdiv(P if seeded else num_patches, ROWS))](
            *(*rows, *random, out, out_indices, P, num_patches, D),
            SEEDED=seeded,
            SEED_IN_MEMORY=seed is not None,
            STEP_IN_MEMORY=step is not None,
            NORMALIZE=normalize,
            ROWS=ROWS,
            KEYS=KEYS,
            KEY_TILES=triton.cdiv(P, KEYS),
            WIDTH=WIDTH,
            WIDTH_TILES=triton.cdiv(D, WIDTH),
            num_warps=4,
        )
    return out, out_indices


@_sample_patches_op.register_fake
def _(patches, num_patches, indices, *_):
    return _outputs(patches, num_patches, indices)


def _outputs(patches: torch.Tensor, n: int, indices: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    B, _, D = patches.shape
    return patches.new_empty(B, n, D), patches.new_empty((B, n) if indices is None else 0, dtype=torch.int64)


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
    check_tensors(patches=patches, indices=indices, sample_ids=sample_ids)
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
        seed_tensor, seed_value = split_integer(seed)
        step_tensor, step_value = split_integer(step)
        taken, drawn = _sample_patches_op(
            *(patches.detach(), num_patches, indices, sample_ids),
            *(seed_tensor, step_tensor, seed_value, step_value, normalize),
        )
        return PatchSample(taken, drawn if indices is None else indices)
    if indices is None:
        ids = torch.arange(B, device=patches.device) if sample_ids is None else sample_ids.to(patches.device)
        seed = cast("int | torch.Tensor", seed)  # exactly one of it and indices is given
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
