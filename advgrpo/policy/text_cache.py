"""Text embeddings, computed once per prompt and kept on disk, keyed by the content of encoders and prompt."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch

from ..cache import TensorCache
from ..types import Conditioning

_IN_MEMORY = 4096  # prompts


class TextCache:
    """`encode` is called with the prompts that are not on disk yet and returns their Conditioning."""

    def __init__(self, root: Path, fingerprint: str, encode: Callable[[list[str]], Conditioning]):
        self.fingerprint, self.encode = fingerprint, encode
        self.tensors = TensorCache(root, in_memory=_IN_MEMORY)

    def key(self, prompt: str) -> str:
        return hashlib.sha256(f"{self.fingerprint}\0{prompt}".encode()).hexdigest()

    def missing(self, prompts: list[str]) -> list[str]:
        return [p for p in dict.fromkeys(prompts) if self.key(p) not in self.tensors]

    def fill(self, prompts: list[str]) -> None:
        """Encode and store the prompts that are missing, all in one call of the encoders."""
        missing = self.missing(prompts)
        if not missing:
            return
        embeddings = self.encode(missing)
        for prompt, text, pooled in zip(missing, embeddings.text, embeddings.pooled):
            self.tensors.store(self.key(prompt), {"text": text, "pooled": pooled})

    def load(self, prompts: list[str]) -> Conditioning:
        """Embeddings of the prompts in order, on the CPU; encodes what is missing."""
        self.fill(prompts)
        rows = [self._row(p) for p in prompts]
        return Conditioning(torch.stack([r["text"] for r in rows]), torch.stack([r["pooled"] for r in rows]))

    def _row(self, prompt: str) -> dict[str, torch.Tensor]:
        row = self.tensors.load(self.key(prompt))
        if row is None:  # the file was cut short when a machine went down
            self.fill([prompt])
            row = self.tensors.load(self.key(prompt))
        return row
