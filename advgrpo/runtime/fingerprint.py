"""Content hashes: of tensors, of a network with its configuration, of files. Cache keys are made of these alone.

A key that leaves something out (a weight, a tokenizer file) hands one network's results to another without a word, so
everything is hashed, in threads: hashlib and reading work without the GIL, 1 to 2 GB/s and core.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from advgrpo.runtime.atomic import write_atomically

_THREADS = min(8, os.cpu_count() or 1)
_CHUNK = 64 << 20  # bytes of a file that one thread hashes at a time
_SETTLED_SECONDS = 2.0  # a file that changed this shortly before it was looked at may change again unseen
_NOT_CONTENT = ("_name_or_path", "transformers_version")  # of a configuration: where it came from


def tensors_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 in hex over names, dtypes, shapes and every byte, in the order of the names; tensors on any device."""

    def one(name: str) -> bytes:
        tensor = tensors[name].detach()
        content = hashlib.sha256(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        return f"{name}:{tensor.dtype}:{list(tensor.shape)}:{content.hexdigest()}\n".encode()

    threads = _THREADS if sum(t.nbytes for t in tensors.values()) > _CHUNK // 4 else 1
    return hashlib.sha256(_joined(one, sorted(tensors), threads)).hexdigest()


def module_fingerprint(module: torch.nn.Module, *settings: object) -> str:
    """Hash of every parameter and buffer of a network with a transformers configuration, of that, and of `settings`."""
    tensors = {**dict(module.named_parameters(remove_duplicate=False)), **dict(module.named_buffers())}
    config = {name: value for name, value in module.config.to_dict().items() if name not in _NOT_CONTENT}
    described = json.dumps([config, *map(str, settings)], sort_keys=True, default=str)
    return hashlib.sha256(f"{described}\n{tensors_digest(tensors)}".encode()).hexdigest()


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Hash of what a transformers tokenizer turns text into: vocabulary, merges, normalisation and special tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    model = tokenizer.get_vocab() if backend is None else json.loads(backend.to_str())
    described = [type(tokenizer).__name__, model, {name: str(t) for name, t in tokenizer.special_tokens_map.items()}]
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 over the size and the SHA-256 of each 64 MiB of a file, in hex."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size

        def one(offset: int) -> bytes:
            return hashlib.sha256(os.pread(file.fileno(), _CHUNK, offset)).digest()

        content = _joined(one, range(0, size, _CHUNK), _THREADS if size > _CHUNK else 1)
        return hashlib.sha256(str(size).encode() + content).hexdigest()


def folder_fingerprint(folder: Path, parts: tuple[str, ...], stamps: FileStamps | None = None) -> str:
    """Hash of names and contents of every file in the named sub-folders.

    Args:
        stamps: what earlier calls found, so that files that did not change are not read again.
    """
    digest = hashlib.sha256()
    for path in sorted({p for part in parts for p in (folder / part).rglob("*") if p.is_file()}):
        known = None if stamps is None else stamps.get(path)
        content = file_digest(path) if known is None else known["content"]
        if stamps is not None and known is None:
            stamps.put(path, {"content": content})
        digest.update(f"{path.relative_to(folder)}:{content}\n".encode())
    if stamps is not None:
        stamps.save()
    return digest.hexdigest()


class FileStamps:
    """What was found out about the files of a folder, good for as long as their sizes and times of change stay.

    Args:
        root: where stamps are kept, one JSON per folder.
        folder: holds the files.
    """

    def __init__(self, root: Path, folder: Path):
        self.folder = folder
        self.path = root / f"{hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:32]}.json"
        self._changed = False
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # none yet, or damaged: everything is looked at again
            found = {}
        self._found: dict[str, Any] = found if isinstance(found, dict) else {}

    def get(self, file: Path) -> dict[str, Any] | None:
        """What `put` was given for a file that has not changed since; None for any other."""
        entry = self._found.get(self._name(file))
        if not isinstance(entry, dict) or not isinstance(entry.get("found"), dict):
            return None
        return entry["found"] if entry.get("stamp") == _stamp(file) else None

    def put(self, file: Path, found: dict[str, Any]) -> None:
        """Remember JSON about a file, unless it has changed in the last two seconds."""
        stamp = _stamp(file)
        if time.time() - max(stamp[1:]) / 1e9 < _SETTLED_SECONDS:
            return
        self._found[self._name(file)] = {"stamp": stamp, "found": found}
        self._changed = True

    def save(self) -> None:
        """Write what is new. Stamps save time only: a folder that cannot be written is left alone."""
        if not self._changed:
            return
        with contextlib.suppress(OSError):
            write_atomically(self.path, json.dumps(self._found))
        self._changed = False

    def _name(self, file: Path) -> str:
        return os.path.relpath(file, self.folder)


def _stamp(file: Path) -> list[int]:
    """Size, and times of the last change of content and of anything; a copy that keeps the first cannot keep both."""
    status = file.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _joined(function: Callable[[Any], bytes], items: Sequence, threads: int) -> bytes:
    """The results, in the order of the items."""
    if threads == 1:  # starting others takes longer than hashing a few megabytes
        return b"".join(map(function, items))
    with ThreadPoolExecutor(threads) as pool:
        return b"".join(pool.map(function, items))
