"""CUDA streams on a CPU: operators run in the order of the program, and what streams leave open is an error.

Inside `Streams()` torch.cuda's streams are emulated, and every operator belongs to the current one. Each stream knows
how far it has waited for the others (vector clocks, Lamport 1978 and Mattern 1989). `Race` is raised where memory is

- read by a stream that has not waited for the one that wrote it last;
- written by one that has not waited for those that wrote or read it since. Memory of graphs is written by every replay
  of another graph (`graph_emulator.py`), so two graphs of one pool that may run at once are such a race;
- of a tensor that one stream allocated and another used without `Tensor.record_stream`, and that is gone: it may have
  been handed out anew while it was in use. This is raised at the end.

Not emulated: events of one's own, copies between host and device, Triton, and what other threads do.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from dataclasses import dataclass, field
from unittest import mock

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from tests.graph_emulator import _identity, _tensors, _written

ALLOCATE = {"empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided"}
ALLOCATE |= {"new_zeros", "new_ones", "new_full", "zeros_like", "ones_like", "full_like"}  # look at no value


class Race(RuntimeError):
    """Two streams use the same memory, and nothing says who comes first."""


class EmulatedStream:
    """`known[s]`: the number of the last operator of stream s that is over before anything that is queued here now."""

    def __init__(self, name: str) -> None:
        self.name, self.known = name, Counter()

    def wait_stream(self, other: EmulatedStream) -> None:
        self.known |= other.known  # the larger of both, stream by stream


@dataclass
class _Memory:
    """Who allocated a storage, wrote it last and has read it since; each by stream, with the operator's number."""

    born: EmulatedStream | None
    storage: StorageWeakRef  # which keeps its identity from being given to another
    written: tuple[EmulatedStream, int] | None = None
    read: dict[EmulatedStream, int] = field(default_factory=dict)
    used: dict[EmulatedStream, str] = field(default_factory=dict)  # by which operator first
    recorded: set[EmulatedStream] = field(default_factory=set)


class Streams(TorchDispatchMode):
    """The mode; `operators` counts those of each stream by its name."""

    def __init__(self) -> None:
        super().__init__()
        self.main = self.current = EmulatedStream("main")
        self.operators: Counter[str] = Counter()
        self._made = 0
        self._memory: dict[int, _Memory] = {}
        self._crossed: list[_Memory] = []
        self._around = contextlib.ExitStack()

    def __enter__(self):
        self._around.enter_context(mock.patch("torch.cuda.Stream", self._new))
        self._around.enter_context(mock.patch("torch.cuda.current_stream", self._get))
        self._around.enter_context(mock.patch("torch.cuda.stream", self._within))
        self._around.enter_context(mock.patch.object(torch.Tensor, "record_stream", self._recording))
        return super().__enter__()

    def __exit__(self, kind, *error):
        super().__exit__(kind, *error)
        self._around.__exit__(kind, *error)
        if kind is None:
            self._check_recorded()

    def _new(self, device=None, priority: int = 0) -> EmulatedStream:
        self._made += 1
        return EmulatedStream(f"side {self._made}")

    def _get(self, device=None) -> EmulatedStream:
        return self.current

    @property
    def _recording(self):
        return lambda tensor, stream: self._seen(tensor).recorded.add(stream)

    @contextlib.contextmanager
    def _within(self, stream: EmulatedStream):
        outside, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = outside

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, stream = kwargs or {}, self.current
        name = func.overloadpacket.__name__
        if func.is_view or func.namespace in ("profiler", "prim"):
            return func(*args, **kwargs)
        stream.known[stream] += 1
        self.operators[stream.name] += 1
        given = {_identity(t): t for t in _tensors((args, kwargs))}
        written = {_identity(t) for t in _written(func, args, kwargs)}
        for identity, tensor in given.items():
            if identity in written:
                self._write(tensor, name)
            elif name not in ALLOCATE:
                self._read(tensor, name)
        result = func(*args, **kwargs)
        for tensor in _tensors(result):
            if _identity(tensor) not in given:
                reference = StorageWeakRef(tensor.untyped_storage())
                self._memory[_identity(tensor)] = _Memory(stream, reference, (stream, stream.known[stream]))
        return result

    def _seen(self, tensor: torch.Tensor) -> _Memory:
        """Of a tensor from before: no stream's."""
        made = _Memory(None, StorageWeakRef(tensor.untyped_storage()))
        return self._memory.setdefault(_identity(tensor), made)

    def _used(self, tensor: torch.Tensor, name: str) -> _Memory:
        memory, stream = self._seen(tensor), self.current
        if memory.born not in (None, stream) and stream not in memory.used:
            memory.used[stream] = name
            self._crossed.append(memory)
        return memory

    def _read(self, tensor: torch.Tensor, name: str) -> None:
        memory, stream = self._used(tensor, name), self.current
        self._after(memory.written, f"{name} reads on {stream.name} what was written")
        memory.read[stream] = stream.known[stream]

    def _write(self, tensor: torch.Tensor, name: str) -> None:
        memory, stream = self._used(tensor, name), self.current
        self._after(memory.written, f"{name} writes on {stream.name} what was written")
        for reader in memory.read.items():
            self._after(reader, f"{name} writes on {stream.name} what was read")
        memory.written, memory.read = (stream, stream.known[stream]), {}

    def _after(self, access: tuple[EmulatedStream, int] | None, what: str) -> None:
        if access is not None and access[1] > self.current.known[access[0]]:
            raise Race(f"{what} on {access[0].name}, without waiting for it")

    def _check_recorded(self) -> None:
        for memory in self._crossed:
            for stream, name in memory.used.items():
                if stream not in memory.recorded and memory.storage.expired():
                    raise Race(f"{name} on {stream.name} used a tensor of {memory.born.name} that was not recorded")
