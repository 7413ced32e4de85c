"""Seeds: every random draw is keyed by (run seed, purpose, indices), never by rank, batch split or call order."""

from __future__ import annotations

import hashlib

import torch


def derive_seed(run_seed: int, purpose: str, *indices: int) -> int:
    """A 63-bit seed for one purpose, e.g. derive_seed(42, "sde_noise", iteration)."""
    text = ":".join([str(run_seed), purpose, *map(str, indices)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def generator(run_seed: int, purpose: str, *indices: int) -> torch.Generator:
    """A CPU generator seeded for one purpose; the same on every rank."""
    return torch.Generator().manual_seed(derive_seed(run_seed, purpose, *indices))
