"""Initial noise by the number of a row, as torch draws it: what a rollout engine can be handed as a seed.

The house's own noise (Philox, `advgrpo_kernels.philox_normal`) is keyed by (seed, row) on any device, but no engine
draws it. Engines draw `torch.randn` with a CPU generator per row, whose seeds follow each other within a request; so
here a row's seed is the key of the draw plus its number, and the noise is repeated to the bit.
"""

from __future__ import annotations

import math

import torch

PHILOX = "philox"
TORCH_NOISE = {
    "torch_float32": torch.float32,
    "torch_bfloat16": torch.bfloat16,
    "torch_float16": torch.float16,
}
_KEYS = 2**48  # keys of draws; with any row's number added a seed still is a positive int64


def row_seeds(seed: int, ids: torch.Tensor) -> list[int]:
    """[R] seeds of a draw's rows, a function of (seed, id) alone; rows whose ids follow each other have such seeds.

    Args:
        ids: [R] int64, at least 0 and below 2^48.
    """
    return [seed % _KEYS + number for number in ids.tolist()]


def torch_noise(seeds: list[int], shape: tuple[int, ...], noise: str) -> torch.Tensor:
    """[R, *shape] float32 on the host: `torch.randn` of a CPU generator per row, in the dtype that `noise` names.

    Args:
        noise: a key of `TORCH_NOISE`.
    """
    dtype, count = TORCH_NOISE[noise], math.prod(shape)
    rows = [torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=dtype) for seed in seeds]
    return torch.stack(rows).float().view(len(seeds), *shape) if rows else torch.zeros(0, *shape)
