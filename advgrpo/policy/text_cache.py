"""Text embeddings, computed once per prompt and kept on disk, keyed by the content of encoders and prompt."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

from advgrpo.runtime.cache import TensorCache
from advgrpo.types import Conditioning

_IN_MEMORY = 512  # prompts; about 2 MB each with a T5 at 128 tokens, and every process keeps its own


class TextCache:
    """`encode` is called with prompts that are not on disk yet and yields their Conditioning, a few at a time in order.

    What it has yielded is stored before it goes on: of a run that is killed while it encodes nothing finished is lost,
    and the embeddings of all prompts (42 GB of 25,000 at SD3.5's size) are never held at once.
    """

    def __init__(self, root: Path, fingerprint: str, encode: Callable[[list[str]], Iterable[Conditioning]]):
        self.fingerprint, self.encode = fingerprint, encode
        self.tensors = TensorCache(root, in_memory=_IN_MEMORY)

    def key(self, prompt: str) -> str:
        return hashlib.sha256(f"{self.fingerprint}\0{prompt}".encode()).hexdigest()

    def missing(self, prompts: Sequence[str]) -> list[str]:
        """Those neither in memory nor in the folder, each once."""
        return self.absent([p for p in dict.fromkeys(prompts) if self.key(p) not in self.tensors])

    def absent(self, prompts: Sequence[str]) -> list[str]:
        """Those whose file is not in the folder, whatever this process has in memory: see `TensorCache.absent`."""
        keys = {self.key(prompt): prompt for prompt in prompts}
        return [keys[key] for key in self.tensors.absent(keys)]

    def fill(self, prompts: Sequence[str], tell: Callable[[int], None] = lambda done: None) -> None:
        """Encode and store the prompts that are missing; `tell` is called with how many of them are done."""
        missing, done = self.missing(prompts), 0
        if not missing:
            return
        for part in self.encode(missing):
            tensors = part.tensors()
            for row in range(len(part.text)):
                self.tensors.store(self.key(missing[done]), {name: tensor[row] for name, tensor in tensors.items()})
                done += 1
            tell(done)

    def load(self, prompts: list[str]) -> Conditioning:
        """Embeddings of the prompts in order, on the CPU; encodes what is missing."""
        self.fill(prompts)
        rows = [self._row(p) for p in prompts]
        return Conditioning(**{name: torch.stack([row[name] for row in rows]) for name in rows[0]})

    def _row(self, prompt: str) -> dict[str, torch.Tensor]:
        row = self.tensors.load(self.key(prompt))
        if row is None:  # the file was cut short when a machine went down
            self.fill([prompt])
            row = self.tensors.load(self.key(prompt))
        return row
