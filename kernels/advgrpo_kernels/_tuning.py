"""Rows per program and warps of the streaming layer kernels: as their files say, or as measured on this GPU.

Nothing is tuned while it runs: `TUNED` is a committed table by the name that the driver gives the GPU, and what it does
not name keeps the kernel's own launch. One launch per kernel and GPU, whatever the shape: a window step and the update
that reads it must compute the same bits.

Written by `python -m bench.tune --adopt FILE` from what a GPU has measured; empty until one has.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Generator
from typing import NamedTuple

import torch


class Launch(NamedTuple):
    """rows: of a program's tile (tokens; for qk_rms_norm pairs of token and head)."""

    rows: int
    warps: int


TUNED: dict[str, dict[str, Launch]] = {}

_forced: dict[str, Launch] = {}


def launch_of(kernel: str, tensor: torch.Tensor, own: Launch) -> Launch:
    """How `kernel` is launched on the device of `tensor`; `own` where nothing was measured."""
    if kernel in _forced:
        return _forced[kernel]
    if not TUNED or tensor.device.type != "cuda":
        return own
    return TUNED.get(_name(tensor.device.index), {}).get(kernel, own)


@contextlib.contextmanager
def forced(kernel: str, launch: Launch) -> Generator[None, None, None]:
    """Inside, `kernel` is launched so, wherever it runs: to measure it."""
    before = dict(_forced)
    _forced[kernel] = launch
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)


@functools.cache
def _name(index: int) -> str:
    return torch.cuda.get_device_name(index)
