"""The compiled library of `csrc/`: found, loaded by ctypes on first use, and the tables its launchers read.

Built by `ADVGRPO_BUILD_CUDA=1 pip install ...` into this package, or anywhere, named by ADVGRPO_KERNELS_LIBRARY.
"""

from __future__ import annotations

import ctypes
import functools
import os
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from .._runtime import DEFAULT_BACKEND, _warn_once

CUDA_BACKENDS = ("auto", "cuda", "torch")
PACKAGE = Path(__file__).parents[1]
TABLES_KEPT = 8


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled library, None when it was not built.

    Raises:
        OSError: ADVGRPO_KERNELS_LIBRARY names a file that does not load.
    """
    named = os.environ.get("ADVGRPO_KERNELS_LIBRARY")
    paths = [Path(named)] if named else sorted(PACKAGE.glob("_cuda*.so"))
    if not paths:
        return None
    loaded = ctypes.CDLL(str(paths[0]))
    pointer, count, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double
    loaded.advgrpo_merge_lora.argtypes = [pointer, pointer, count, ctypes.c_int, pointer]
    loaded.advgrpo_multi_tensor_adamw.argtypes = [*[pointer] * 2, count, *[pointer] * 3, *[number] * 7, pointer]
    return loaded


def loaded_library() -> ctypes.CDLL:
    """The compiled library, for a launch that `pick_cuda_backend` has chosen it for.

    Raises:
        RuntimeError: there is none.
    """
    loaded = library()
    if loaded is None:
        raise RuntimeError("the CUDA library of csrc/ is not there: build with ADVGRPO_BUILD_CUDA=1")
    return loaded


def pick_cuda_backend(requested: str, *tensors: torch.Tensor) -> str:
    """ "cuda" or "torch" for the list ops; an explicit "cuda" is honoured or raises, "auto" says once why not."""
    if requested not in CUDA_BACKENDS:
        raise ValueError(f"backend must be one of {CUDA_BACKENDS}, got {requested!r}")
    on_cuda = all(t.is_cuda for t in tensors)
    if requested == "cuda":
        if not on_cuda or library() is None:
            raise RuntimeError("backend='cuda' needs CUDA tensors and a build with ADVGRPO_BUILD_CUDA=1")
        return "cuda"
    if requested == "torch" or DEFAULT_BACKEND == "torch" or not on_cuda:
        return "torch"
    if library() is None:
        _warn_once("advgrpo_kernels was built without csrc/ (ADVGRPO_BUILD_CUDA=1): list ops run one tensor at a time")
        return "torch"
    return "cuda"


def check_launch(name: str, error: int) -> None:
    """Raise RuntimeError for a cudaError_t other than success."""
    if error:
        raise RuntimeError(f"{name}: the launch returned cudaError {error}")


class Table:
    """Rows of 8-byte words in device memory, and for every block the row it works on.

    Args:
        rows: integers (and floats, as doubles), one list per tensor; the word `first_block` is filled in here.
        blocks: how many blocks each row gets.
        first_block: position of that word.
    """

    def __init__(
        self, rows: Sequence[Sequence[int | float]], blocks: Sequence[int], first_block: int, device: torch.device
    ):
        of_block, packed = [], b""
        for index, (row, count) in enumerate(zip(rows, blocks)):
            words = list(row)
            words[first_block] = len(of_block)
            packed += struct.pack("".join("d" if isinstance(word, float) else "q" for word in words), *words)
            of_block += [index] * count
        self.blocks = len(of_block)
        self.rows = _upload(torch.frombuffer(bytearray(packed), dtype=torch.int64), device)
        self.of_block = _upload(torch.tensor(of_block, dtype=torch.int32), device)
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self._uploaded = None if self._stream is None else self._stream.record_event()

    def use_on(self, stream: torch.cuda.Stream | None) -> None:
        """Order a use on `stream` (None: a CPU) behind the upload, and keep the memory until that use is done."""
        if stream is None or self._uploaded is None or stream == self._stream:
            return
        stream.wait_event(self._uploaded)
        for tensor in (self.rows, self.of_block):
            tensor.record_stream(stream)


def _upload(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """To the device without waiting for it: from pinned memory, which the allocator keeps until the copy is done."""
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


class TableCache:
    """The last few tables by key, so that tensors that stay where they are need no new upload."""

    def __init__(self) -> None:
        self._tables: dict[object, Table] = {}
        self._captured: list[Table] = []  # a CUDA graph reads its tables at every replay: these are never dropped

    def get(self, key: object, build: Callable[[], Table], *, capturing: bool = False, stream=None) -> Table:
        """The table of `key`, built if it is not there, ready for use on `stream` (None: a CPU).

        Raises:
            RuntimeError: it would have to be uploaded during a CUDA graph capture.
        """
        table = self._tables.pop(key, None)
        if table is None and capturing:
            raise RuntimeError("call this op once with the same tensors before capturing it in a CUDA graph")
        self._tables[key] = table = table or build()
        if capturing:  # PyTorch waits for the device before it captures: the upload is done
            self._captured.append(table)
        elif stream is not None:
            table.use_on(stream)
        if len(self._tables) > TABLES_KEPT:
            self._tables.pop(next(iter(self._tables)))
        return table


def is_capturing(tensor: torch.Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def aligned(*tensors: torch.Tensor | None) -> bool:
    """Whether 128-bit accesses are possible from the start of every tensor."""
    return all(t is None or t.data_ptr() % 16 == 0 for t in tensors)


def pointer(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def stream_of(tensor: torch.Tensor) -> torch.cuda.Stream | None:
    """The stream that work on `tensor` goes to now; None on a CPU."""
    return torch.cuda.current_stream(tensor.device) if tensor.is_cuda else None


def current_stream(tensor: torch.Tensor) -> int:
    stream = stream_of(tensor)
    return 0 if stream is None else stream.cuda_stream
