"""CUDA graphs on a CPU: a backend for `advgrpo.runtime.graphs.CapturedFunction` with the semantics of the real one.

`capture` runs the function once under a dispatch mode that records every operator with its tensor arguments by storage
and its Python arguments frozen, then takes back everything the run wrote: a capture executes nothing. A replay executes
the recorded operators again and writes their results into the recorded storages.

What a GPU would refuse or get wrong in silence raises `HostReadError` at capture: values read on the host, tensors made
from host values, draws from a stateful generator. Memory first allocated during a capture belongs to the pool: it is
overwritten with 0xFF bytes (NaN, -1) after the capture and whenever another graph of the backend is replayed, as the
graphs of a pool reuse each other's memory.

Not emulated: copies between host and device in code that names its devices (there is only one here), allocation limits,
and concurrency.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_READS = {
    *("_local_scalar_dense", "is_nonzero", "nonzero", "equal", "masked_select", "_unique2", "unique_dim"),
    *("unique_consecutive", "bincount", "repeat_interleave.Tensor"),
}
_FROM_HOST = {"lift_fresh"}  # what torch.tensor and new_tensor dispatch
_ALLOCATIONS = {"empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided"}
_HOST_FUNCTIONS = {
    function: function.__name__
    for function in (torch.Tensor.cpu, torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.__array__)
} | {torch.from_numpy: "from_numpy"}


class HostReadError(RuntimeError):
    """A captured function needs the host: a GPU would refuse, or freeze what it read."""


@dataclass
class _Call:
    function: Callable
    args: tuple
    kwargs: dict
    results: list[torch.Tensor]  # those the call did not write in place


@dataclass
class _Graph:
    calls: list[_Call] = field(default_factory=list)
    pool: dict[int, torch.UntypedStorage] = field(default_factory=dict)  # by identity: allocated during the capture
    saved: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = field(default_factory=dict)  # and its copy

    def poison(self) -> None:
        for storage in self.pool.values():
            _bytes(storage).fill_(255)


class EmulatedGraphs:
    """The backend; `replays` counts launches of graphs."""

    def __init__(self) -> None:
        self.replays = 0
        self._graphs: list[_Graph] = []

    def warm_up(self, function: Callable[[], Any]) -> Any:
        return function()

    def capture(self, function: Callable[[], Any]) -> Callable[[], Any]:
        graph = _Graph()
        try:
            with _NoHost(), _Recorder(graph):
                result = function()
        finally:
            for storage, copy in graph.saved.values():
                storage.copy_(copy)
        graph.poison()
        self._graphs.append(graph)

        def replay() -> Any:
            self.replays += 1
            for other in self._graphs:
                if other is not graph:
                    other.poison()
            with torch.no_grad():
                for call in graph.calls:
                    _execute(call)
            return result

        return replay


class _NoHost(TorchFunctionMode):
    """Reads that are no operators on a CPU."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in _HOST_FUNCTIONS:
            raise HostReadError(f"{_HOST_FUNCTIONS[function]} inside a captured function")
        return function(*args, **(kwargs or {}))


class _Recorder(TorchDispatchMode):
    def __init__(self, graph: _Graph):
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function.namespace in ("profiler", "prim"):
            return function(*args, **kwargs)
        _check(function, args)
        inputs = {_identity(t) for t in _tensors((args, kwargs))}
        for tensor in _written(function, args, kwargs):
            self._save(tensor)
        result = function(*args, **kwargs)
        fresh = [t for t in _tensors(result) if _identity(t) not in inputs]
        self.graph.pool.update((_identity(t), t.untyped_storage()) for t in fresh)
        computes = fresh and function.overloadpacket.__name__ not in _ALLOCATIONS
        if computes or function._schema.is_mutable:  # a view needs nothing: it shares the storage
            self.graph.calls.append(_Call(function, args, kwargs, [t.detach() for t in fresh]))
        return result

    def _save(self, tensor: torch.Tensor) -> None:
        identity, storage = _identity(tensor), tensor.untyped_storage()
        if identity not in self.graph.pool and identity not in self.graph.saved:
            self.graph.saved[identity] = storage, storage.clone()


def _check(function, args: tuple) -> None:
    name = function.overloadpacket.__name__
    if name in ("index", "index_put", "index_put_") and any(t.dtype == torch.bool for t in _tensors(args[1])):
        raise HostReadError(f"{name} by a boolean mask: the host must know how many it selects")
    if name in _READS or f"{name}.{function._overloadname}" in _READS:
        raise HostReadError(f"{name} reads a device value on the host")
    if name in _FROM_HOST:
        raise HostReadError("a tensor is made from host values inside a captured function")
    drawn = torch.Tag.nondeterministic_seeded in function.tags and "scaled_dot_product" not in name
    if drawn:
        raise HostReadError(f"{name} draws from a stateful generator; key draws by Philox seeds in device memory")


def _execute(call: _Call) -> None:
    inputs = {_identity(t) for t in _tensors((call.args, call.kwargs))}
    fresh = [t for t in _tensors(call.function(*call.args, **call.kwargs)) if _identity(t) not in inputs]
    for recorded, computed in zip(call.results, fresh, strict=True):
        recorded.copy_(computed)


def _written(function, args: tuple, kwargs: dict) -> Iterable[torch.Tensor]:
    for position, argument in enumerate(function._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            yield from _tensors(value)


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _identity(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _bytes(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(storage)
