"""Tensors on disk by content key, the most recently used ones in memory: text embeddings and reference features.

Every file carries a checksum over its key and everything in it. A file that does not agree with it (a flipped bit, a
crash halfway, a copy under another name) is removed, named in a warning and counts as absent: what it held is computed
again, never trained on.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Generic, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from advgrpo.errors import UserError
from advgrpo.runtime.atomic import write_atomically
from advgrpo.runtime.fingerprint import tensors_digest

_CHECKSUM = "checksum"  # key in the file's metadata
logger = logging.getLogger(__name__)
T = TypeVar("T")


class _DamagedError(Exception):
    pass


class LastUsed(Generic[T]):
    """Values by key in memory, the `most` that were used last."""

    def __init__(self, most: int):
        self.most = most
        self._values: OrderedDict[str, T] = OrderedDict()

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def load(self, key: str) -> T | None:
        """The value stored under `key`; None when there is none."""
        if key not in self._values:
            return None
        self._values.move_to_end(key)
        return self._values[key]

    def store(self, key: str, value: T) -> T:
        """Keep `value` under `key`, and hand it out."""
        self._values[key] = value
        self._values.move_to_end(key)
        if len(self._values) > self.most:
            self._values.popitem(last=False)
        return value


class TensorCache:
    """One safetensors file per key under `root`; several runs may share it.

    Args:
        root: folder, made on the first store.
        in_memory: how many entries stay in memory.
        device: where the tensors handed out live.
    """

    def __init__(self, root: Path, *, in_memory: int, device: torch.device | str = "cpu"):
        self.root, self.device = root, device
        self._memory: LastUsed[dict[str, torch.Tensor]] = LastUsed(in_memory)

    def path(self, key: str) -> Path:
        return self.root / key[:2] / f"{key}.safetensors"

    def __contains__(self, key: str) -> bool:
        return key in self._memory or self.path(key).exists()

    def absent(self, keys: Collection[str]) -> list[str]:
        """Keys that have no file, as their folders are listed now.

        A network file system that has once said that a file does not exist may go on saying so for a minute after
        another machine has written it; to list a folder it asks the server.
        """
        listed: dict[Path, set[str]] = {}
        for folder in {self.path(key).parent for key in keys}:
            try:
                listed[folder] = set(os.listdir(folder))
            except FileNotFoundError:
                listed[folder] = set()
        return [key for key in keys if self.path(key).name not in listed[self.path(key).parent]]

    def checksum(self, key: str) -> str:
        """What the key's file says its content is, by its header and length alone.

        "" where there is none, or where these show damage (it is gone then); a flipped bit behind the header does not.
        """
        try:
            with safe_open(self.path(key), "pt") as file:
                said = (file.metadata() or {}).get(_CHECKSUM, "")
        except FileNotFoundError:
            return ""
        except SafetensorError:
            said = ""
        if not said:
            self._from_disk(key)  # which names and removes it
        return said

    def file(self, key: str) -> bytes:
        """The key's file, for `store_file` of another cache; b"" where there is none that is sound, as in `load`."""
        return b"" if self._from_disk(key) is None else self.path(key).read_bytes()

    def store_file(self, key: str, content: bytes) -> None:
        """Write what `file` of another cache gave, in place of what is there; UserError as `store`."""
        with self._writing():
            write_atomically(self.path(key), content)

    def leave(self, name: str) -> None:
        """An empty file beside the folders of entries, for others who may see the same cache; UserError as `store`."""
        with self._writing():
            write_atomically(self.root / name, b"")

    def load(self, key: str) -> dict[str, torch.Tensor] | None:
        """The tensors stored under `key`; None when there are none, or the file was damaged (it is gone then).

        Raises:
            UserError: a damaged file cannot be removed.
        """
        known = self._memory.load(key)
        if known is not None:
            return known
        tensors = self._from_disk(key)
        return None if tensors is None else self._remember(key, tensors)

    def store(self, key: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Write `tensors` under `key` and hand them out as `load` would.

        Raises:
            UserError: the folder cannot be written.
        """
        path = self.path(key)
        own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        with self._writing():
            write_atomically(path, lambda file: save_file(own, file, metadata={_CHECKSUM: _checksum(key, own)}))
        return self._remember(key, own)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"the cache {self.root} cannot be written ({error}); make room there or set data.cache_dir"
            ) from error

    def _from_disk(self, key: str) -> dict[str, torch.Tensor] | None:
        """As `load`, whatever is in memory."""
        try:
            return _read(self.path(key), key)
        except FileNotFoundError:
            return None
        except (_DamagedError, SafetensorError) as error:
            logger.warning("cache file %s is damaged (%s); its content is computed again", self.path(key), error)
            with self._writing():
                self.path(key).unlink(missing_ok=True)
            return None

    def _remember(self, key: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return self._memory.store(key, {name: tensor.to(self.device) for name, tensor in tensors.items()})


def _checksum(key: str, tensors: Mapping[str, torch.Tensor]) -> str:
    return hashlib.sha256(f"{key}:{tensors_digest(tensors)}".encode()).hexdigest()


def _read(path: Path, key: str) -> dict[str, torch.Tensor]:
    """The file's tensors; _DamagedError or SafetensorError unless they are what was written under `key`."""
    with safe_open(path, "pt") as file:
        expected = (file.metadata() or {}).get(_CHECKSUM)
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    if expected is None:
        raise _DamagedError("it has no checksum")
    if expected != _checksum(key, tensors):
        raise _DamagedError("its checksum does not fit")
    return tensors
