"""What a run can be continued from at any moment, also in the middle of an iteration.

A checkpoint holds the state between two iterations. Sampling and scoring change none of it; from the head's training to
the end of the iteration, and while the averaged weights stand in for the trained ones, it is in between. Where it is
small enough, a copy is made before that, so that a run that must end at once (a signal, a failed process) loses the
iteration under way and nothing else.
"""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

State = tuple[dict[str, torch.Tensor], dict[str, Any]]  # tensors and JSON, as in a checkpoint


class CleanStart:
    """Knows whether the state is whole, and keeps a copy of it while it is not.

    Args:
        read: the state as it stands: live tensors, which need not be copied.
        copies: whether to copy it before a change; without, there is nothing to continue from while it changes.

    Any thread may ask for the state; while one has it, no change begins or ends.
    """

    def __init__(self, read: Callable[[], State], *, copies: bool):
        self._read, self._copies = read, copies
        self._lock = threading.Lock()
        self._changing = False
        self._copy: State | None = None

    @property
    def known(self) -> bool:
        """Whether there is a state to continue from."""
        return not self._changing or self._copy is not None

    def begin(self) -> None:
        """The state changes from here on; the copy is on the tensors' own devices, and nothing waits for it."""
        with self._lock:
            if self._copies:
                tensors, rest = self._read()
                self._copy = {name: tensor.clone() for name, tensor in tensors.items()}, copy.deepcopy(rest)
            self._changing = True

    def end(self) -> None:
        """The state is whole again, the new one or the old one."""
        with self._lock:
            self._changing, self._copy = False, None

    def restore(self, load: Callable[..., None]) -> None:
        """Undo the change under way: `load(tensors, rest)` of the copy, where there is one."""
        with self._lock:
            if self._copy is not None:
                load(*self._copy)
                self._changing, self._copy = False, None

    @contextlib.contextmanager
    def changed(self) -> Iterator[None]:
        """Around a change that is undone at the end, also by an error."""
        self.begin()
        try:
            yield
        finally:
            self.end()

    @contextlib.contextmanager
    def state(self) -> Iterator[State | None]:
        """The state to continue from, or None; it stays as it is inside."""
        with self._lock:
            yield self._copy if self._changing else self._read()
