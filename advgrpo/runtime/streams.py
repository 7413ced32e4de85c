"""CUDA streams: work that is queued beside what is queued after it, instead of before it.

Kernels of one stream run one after the other. Those of two streams may run at the same time, so three things that one
stream does by itself have to be said:

- work waits for what it reads: `SideStream.work` begins behind all that the current stream has been given so far;
- who reads its results waits for it: `SideStream.join`;
- the allocator hands a freed tensor's memory to the next tensor of the stream that it was allocated on, and knows of no
  other stream that may still be using it, unless it is told (`Tensor.record_stream`, both).

Work on a side stream replays no captured graph: those of a backend share memory (graphs.py) and must not run at the
same time. `tests/stream_emulator.py` finds what is missing of all this on a CPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor

HAVE_STREAMS = ("cuda",)  # types of devices


class Stream(Protocol):
    """Where work is queued."""

    def work(self, *reads: Tensor) -> AbstractContextManager[None]:
        """What is queued within runs here, behind all that was queued before, and reads these of its tensors."""
        ...

    def join(self, *results: Tensor) -> None:
        """What is queued from now on may use these tensors, which work here has made. The host does not wait."""
        ...


class CurrentStream:
    """The one that everything else is queued on: work runs in its place."""

    def work(self, *reads: Tensor) -> AbstractContextManager[None]:
        return contextlib.nullcontext()

    def join(self, *results: Tensor) -> None:
        pass


class SideStream:
    """A stream of its own on a GPU. Memory that its work allocates stays with it when it is freed."""

    def __init__(self, device: torch.device):
        self.device, self._stream = device, torch.cuda.Stream(device)

    @contextlib.contextmanager
    def work(self, *reads: Tensor) -> Iterator[None]:
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            for tensor in reads:
                tensor.record_stream(self._stream)

    def join(self, *results: Tensor) -> None:
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self._stream)
        for tensor in results:
            tensor.record_stream(current)


def stream_of(name: str, device: torch.device) -> Stream:
    """By `rollout.decode_stream`: "side" is a stream of its own where the device has streams."""
    return SideStream(device) if name == "side" and device.type in HAVE_STREAMS else CurrentStream()
