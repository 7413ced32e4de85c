"""The prepared prompts that a captured function reads, since it takes no arguments (runtime/graphs.py)."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Generic

import torch

from advgrpo.policy.base import Capturable, P
from advgrpo.runtime.graphs import StaticBuffers


class CurrentPrompts(Generic[P]):
    """Those of the step under way, of the sampler or the update.

    For a step that is captured they lie in storage that stays the same for each shape; else they are the ones given.

    Args:
        storage: the policy where its steps are captured; None where they run eagerly.
    """

    def __init__(self, device: torch.device, storage: Capturable[P] | None):
        self.storage = storage
        self._buffers = StaticBuffers(device, static=storage is not None)
        self._prepared: P | None = None

    def set(self, prepared: P, *, copied: bool = True) -> None:
        """Without `copied` they are used where they lie, which inside a captured function is in its own memory."""
        if self.storage is None or not copied:
            self._prepared = prepared
            return
        self._buffers.reset()
        for name, tensor in self.storage.prompt_tensors(prepared).items():
            self._buffers.fill(name, tensor)
        self._prepared = self.storage.with_prompt_tensors(prepared, self._buffers.tensors)

    def get(self) -> P:
        if self._prepared is None:
            raise RuntimeError("no prompts are set")
        return self._prepared

    def key(self) -> Hashable:
        """What a capture freezes of them."""
        return self._buffers.key()
