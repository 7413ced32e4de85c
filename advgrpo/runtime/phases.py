"""The phases of an iteration: how long each took, and a named range for profilers.

On a GPU a phase is timed by CUDA events that are read after the iteration, so measuring waits for nothing. The ranges
are NVTX (Nsight Systems; by the package `nvtx`, or PyTorch's own where that is not installed) and, for the traces
`bench.profile` writes, PyTorch's `record_function`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import time
from collections.abc import Iterator

import torch

_HAS_NVTX = importlib.util.find_spec("nvtx") is not None


@contextlib.contextmanager
def named_range(name: str) -> Iterator[None]:
    """A range called `name` in NVTX and in PyTorch's profiler."""
    with contextlib.ExitStack() as stack:
        if _HAS_NVTX:
            import nvtx

            stack.enter_context(nvtx.annotate(name, domain="advgrpo"))
        elif torch.cuda.is_available():
            stack.enter_context(torch.cuda.nvtx.range(name))
        stack.enter_context(torch.profiler.record_function(name))
        yield


class Phases:
    """Times of one iteration's phases on one device."""

    def __init__(self, device: torch.device):
        self.device = device
        self._marks: dict[str, list[tuple]] = {}  # (begin, end) of each time a phase ran

    @contextlib.contextmanager
    def measure(self, name: str) -> Iterator[None]:
        with named_range(name):
            begin = self._mark()
            yield
            self._marks.setdefault(name, []).append((begin, self._mark()))

    def seconds(self) -> dict[str, float]:
        """Seconds by phase; on a GPU it waits for the last phase to end."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return {name: sum(self._between(*pair) for pair in pairs) for name, pairs in self._marks.items()}

    def _mark(self):
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, begin, end) -> float:
        return begin.elapsed_time(end) * 1e-3 if self.device.type == "cuda" else end - begin
