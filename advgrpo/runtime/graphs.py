"""CUDA graphs: a function of static storage, captured once per shape and replayed with one launch.

A graph repeats the launches of one call with the addresses and Python numbers of that call. Hence the rules for a
captured function:

- It takes no arguments. What varies lies in tensors that are overwritten in place (`StaticBuffers`, parameters, seeds
  and counters as device tensors); what it writes that must survive lies in tensors made before the capture. What varies
  and is no tensor is set on the function's owner before the call and is part of the call's key: the form of the
  prompts (`Sampler._prompts`), a number of images (`DiscriminatorTrainer._total`).
- It reads nothing on the host (`item`, `tolist`, `nonzero`, boolean masks, `torch.equal`) and makes no tensor from host
  values (`torch.tensor`); a Python number it uses is frozen, so put whatever selects it into the key.
- Gradients and optimizer state keep their storage: `zero_grad(set_to_none=False)`, a `fused` or `capturable` optimizer.
  Load checkpoints in place, or `clear()` afterwards.
- What it returns is valid until the next call of any function captured by the same backend, which may reuse the
  memory. Copy what has to live longer.

Warm-up calls are real calls: they run eagerly, on the stream that captures, create gradients, optimizer state and the
libraries' workspaces, and count like any other. So nothing is run twice and nothing has to be undone.

`tests/graph_emulator.py` is a second backend, which keeps these semantics on a CPU and raises where a rule is broken.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Protocol

import torch

from advgrpo.errors import RunFailure
from advgrpo.runtime.phases import named_range

Function = Callable[[], Any]


class CaptureError(RunFailure):
    """A function could not be captured; nothing it does has happened."""


class GraphBackend(Protocol):
    """What captures and replays; graphs of one backend share memory."""

    def warm_up(self, function: Function) -> Any:
        """Run `function` eagerly, where it is going to be captured."""
        ...

    def capture(self, function: Function) -> Function:
        """Record one call of `function` without executing it; the result replays it and returns the same tensors."""
        ...


class CudaGraphs:
    """CUDA graphs of one device in one memory pool, captured on one side stream."""

    def __init__(self, device: torch.device):
        self.device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    def warm_up(self, function: Function) -> Any:
        with torch.cuda.device(self.device):
            current = torch.cuda.current_stream()
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                result = function()
            current.wait_stream(self._stream)
        return result

    def capture(self, function: Function) -> Function:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device):
            current = torch.cuda.current_stream()
            try:
                # thread_local: the thread that prefetches references may allocate meanwhile
                with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                    result = function()
            finally:
                torch.cuda.set_stream(current)  # PyTorch leaves the capture stream current when a capture fails

        def replay() -> Any:
            graph.replay()
            return result

        return replay


class CapturedFunction:
    """`function`, replayed from a graph per key; called plainly while there is no backend.

    Args:
        function: obeys the rules of the module docstring.
        name: in error messages and in the named ranges of profilers.
        backend: None runs `function` eagerly on every call.
        switch: the setting that turns graphs off, for the error message ("--no-fast").
        warm_up_calls: eager calls before the capture, for each key.
    """

    def __init__(
        self,
        function: Function,
        *,
        name: str,
        backend: GraphBackend | None,
        switch: str = "--no-fast",
        warm_up_calls: int = 2,
    ):
        self.function, self.name, self.backend, self.switch = function, name, backend, switch
        self.warm_up_calls = warm_up_calls
        self._warm: dict[Hashable, int] = {}  # warm-up calls so far
        self._replays: dict[Hashable, Function] = {}

    @property
    def captures(self) -> int:
        """Graphs held."""
        return len(self._replays)

    def __call__(self, key: Hashable = ()) -> Any:
        """One call. `key` holds everything frozen by a capture: shapes, and Python numbers that may change.

        Raises:
            CaptureError: the capture failed; the message names the function, the cause and the setting to change.
            torch.cuda.OutOfMemoryError: the GPU was full while capturing, as it may be in an eager call.
        """
        with named_range(self.name):
            if self.backend is None:
                return self.function()
            if key not in self._replays:
                if self._warm.get(key, 0) < self.warm_up_calls:
                    self._warm[key] = self._warm.get(key, 0) + 1
                    return self.backend.warm_up(self.function)
                self._replays[key] = self._capture()
            return self._replays[key]()

    def clear(self) -> None:
        """Forget every graph: tensors the function uses were replaced. The next calls warm up and capture again."""
        self._warm.clear()
        self._replays.clear()

    def _capture(self) -> Function:
        try:
            return self.backend.capture(self.function)
        except Exception as error:
            cause = error
            while cause.__context__ is not None:  # ending a capture that failed raises an error that says less
                cause = cause.__context__
            if isinstance(cause, torch.cuda.OutOfMemoryError):
                raise cause from None
            raise CaptureError(
                f"{self.name} cannot be captured as a CUDA graph: {type(cause).__name__}: {cause}. "
                f"Turn graphs off with {self.switch}: the same function then runs eagerly, with the same results"
            ) from error


class StaticBuffers:
    """Named inputs of a captured function, on one device.

    With `static`, `fill` copies into storage that stays the same for each (name, shape, dtype), so that a graph of
    earlier shapes is still valid when they come back; without, it only holds the tensor, at no cost.
    """

    def __init__(self, device: torch.device, *, static: bool):
        self.device, self.static = device, static
        self.tensors: dict[str, torch.Tensor] = {}  # the current ones
        self._storage: dict[tuple, torch.Tensor] = {}

    def fill(self, name: str, tensor: torch.Tensor) -> None:
        """Make `tensor`, on any device, the value of `name`; from pinned host memory without waiting for the copy."""
        if not self.static:
            self.tensors[name] = tensor.to(self.device, non_blocking=True)
            return
        slot = (name, tensor.shape, tensor.dtype)
        if slot not in self._storage:
            self._storage[slot] = torch.empty(tensor.shape, dtype=tensor.dtype, device=self.device)
        self.tensors[name] = self._storage[slot].copy_(tensor, non_blocking=True)

    def drop(self, name: str) -> None:
        """Forget one value, if there is one, not its storage."""
        self.tensors.pop(name, None)

    def reset(self) -> None:
        """Forget the values, not their storage: the next ones may have other names."""
        self.tensors.clear()

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    def key(self) -> tuple:
        """What a capture freezes of them, for `CapturedFunction`."""
        return tuple((name, tensor.shape, tensor.dtype) for name, tensor in sorted(self.tensors.items()))
