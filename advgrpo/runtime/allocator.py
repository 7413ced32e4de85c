"""How glibc's malloc treats the memory of large tensors on a CPU."""

from __future__ import annotations

import ctypes
import os
import sys

import torch

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # <malloc.h>
_SETTINGS = {_MMAP_THRESHOLD: 1 << 30, _TRIM_THRESHOLD: (1 << 31) - 1, _TOP_PAD: 64 << 20}  # bytes


def keep_freed_memory(device: torch.device) -> bool:
    """Keep what large tensors free for the next ones, instead of returning it to the system at once.

    By default glibc asks the system for every block of more than 32 MiB, and returns the end of its heap; the next
    block then faults in page by page. The step of a small model on a CPU frees and asks for the same blocks again, and
    spent half of its time there. The process keeps the memory of its peak until it ends.

    Nothing is changed for a device with memory of its own, where the environment sets malloc's variables, or where the
    C library is another one or refuses the threshold, as glibc before 2.35 may.

    Returns: whether the settings were made.
    """
    chosen = any(name.startswith("MALLOC_") for name in os.environ) or "malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if device.type != "cpu" or chosen or not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is None:
        return False
    return all(mallopt(number, value) == 1 for number, value in _SETTINGS.items())  # the threshold, or nothing
