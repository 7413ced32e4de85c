"""Tensors on disk by content key, the most recently used ones in memory: text embeddings and reference features."""

from __future__ import annotations

import os
import uuid
from collections import OrderedDict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file


class TensorCache:
    """One safetensors file per key under `root`; several runs may share it.

    Args:
        root: folder, made on the first store.
        in_memory: how many entries stay in memory.
        device: where the tensors handed out live.
    """

    def __init__(self, root: Path, *, in_memory: int, device: torch.device | str = "cpu"):
        self.root, self.in_memory, self.device = root, in_memory, device
        self._memory: OrderedDict[str, dict[str, torch.Tensor]] = OrderedDict()

    def path(self, key: str) -> Path:
        return self.root / key[:2] / f"{key}.safetensors"

    def __contains__(self, key: str) -> bool:
        return key in self._memory or self.path(key).exists()

    def load(self, key: str) -> dict[str, torch.Tensor] | None:
        """The tensors stored under `key`; None when there are none, or the file was cut short by a crash."""
        if key in self._memory:
            self._memory.move_to_end(key)
            return self._memory[key]
        try:
            tensors = load_file(self.path(key))
        except FileNotFoundError:
            return None
        except SafetensorError:
            self.path(key).unlink(missing_ok=True)
            return None
        return self._remember(key, tensors)

    def store(self, key: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Write `tensors` under `key` and hand them out as `load` would."""
        path = self.path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{uuid.uuid4().hex}")  # another process may store the same key
        own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        save_file(own, temporary)
        os.replace(temporary, path)
        return self._remember(key, own)

    def _remember(self, key: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        self._memory[key] = {name: tensor.to(self.device) for name, tensor in tensors.items()}
        if len(self._memory) > self.in_memory:
            self._memory.popitem(last=False)
        return self._memory[key]
