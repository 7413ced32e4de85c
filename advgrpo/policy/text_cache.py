"""Text embeddings on disk, one safetensors file per prompt, keyed by the content of encoders and prompt."""

from __future__ import annotations

import hashlib
import os
import uuid
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..types import Conditioning

_EDGE = 1 << 20  # bytes hashed at each end of a weight file: enough to tell models apart without reading gigabytes
_IN_MEMORY = 4096  # prompts


def folder_fingerprint(folder: Path, parts: tuple[str, ...]) -> str:
    """Hash of the named sub-folders: file names, sizes and the first and last MiB of every file."""
    digest = hashlib.sha256()
    for path in sorted(p for part in parts for p in (folder / part).rglob("*") if p.is_file()):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder)}:{size}".encode())
        with path.open("rb") as file:
            digest.update(file.read(_EDGE))
            file.seek(max(0, size - _EDGE))
            digest.update(file.read(_EDGE))
    return digest.hexdigest()


class TextCache:
    """`encode` is called with the prompts that are not on disk yet and returns their Conditioning."""

    def __init__(self, root: Path, fingerprint: str, encode: Callable[[list[str]], Conditioning]):
        self.root, self.fingerprint, self._encode = root, fingerprint, encode
        self._memory: OrderedDict[str, Conditioning] = OrderedDict()

    def _path(self, prompt: str) -> Path:
        key = hashlib.sha256(f"{self.fingerprint}\0{prompt}".encode()).hexdigest()
        return self.root / key[:2] / f"{key}.safetensors"

    def missing(self, prompts: list[str]) -> list[str]:
        return [p for p in dict.fromkeys(prompts) if not self._path(p).exists()]

    def fill(self, prompts: list[str]) -> None:
        """Encode and store the prompts that are missing."""
        missing = self.missing(prompts)
        if not missing:
            return
        embeddings = self._encode(missing)
        for i, prompt in enumerate(missing):
            path = self._path(prompt)
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(f".{uuid.uuid4().hex}")  # concurrent runs may write the same prompt
            tensors = {"text": embeddings.text[i].cpu(), "pooled": embeddings.pooled[i].cpu()}
            save_file({k: v.contiguous().clone() for k, v in tensors.items()}, temporary)
            os.replace(temporary, path)

    def load(self, prompts: list[str]) -> Conditioning:
        """Embeddings of the prompts in order, on the CPU; encodes what is missing."""
        self.fill([p for p in prompts if p not in self._memory])
        rows = [self._row(p) for p in prompts]
        return Conditioning(torch.stack([r.text for r in rows]), torch.stack([r.pooled for r in rows]))

    def _row(self, prompt: str) -> Conditioning:
        if prompt in self._memory:
            self._memory.move_to_end(prompt)
            return self._memory[prompt]
        try:
            tensors = load_file(self._path(prompt))
        except SafetensorError:  # cut short when a machine went down
            self._path(prompt).unlink()
            self.fill([prompt])
            tensors = load_file(self._path(prompt))
        row = Conditioning(tensors["text"], tensors["pooled"])
        self._memory[prompt] = row
        if len(self._memory) > _IN_MEMORY:
            self._memory.popitem(last=False)
        return row
