"""The adversary's features of the reference pictures: computed once per prompt, kept on disk by content."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from ..cache import TensorCache
from ..rewards.base import Adversary
from ..types import Features
from .references import ReferenceSet

_IN_MEMORY = 512  # prompts


class ReferenceFeatures:
    """`kept_part` of the features of every reference of a prompt, [n, ...] each.

    All pictures of a prompt go through the adversary in one batch, whether or not some were seen before, so that cached
    and fresh features agree to the last bit.
    """

    def __init__(self, references: ReferenceSet, adversary: Adversary, cache_dir: Path):
        self.references, self.adversary = references, adversary
        self.tensors = TensorCache(cache_dir / "references", in_memory=_IN_MEMORY, device=adversary.device)
        self._adversary_key = adversary.cache_key

    def prompt(self, prompt: str) -> Features:
        """Features of the prompt's references, in the order of the index, on the adversary's device."""
        key = self._key(prompt)
        tensors = self.tensors.load(key)
        if tensors is None:
            tensors = self.tensors.store(key, self._compute(prompt).tensors)
        return Features(tensors)

    def _key(self, prompt: str) -> str:
        keys = [self._adversary_key, *(self.references.content_key(f) for f in self.references.files(prompt))]
        if self.adversary.text_dependent:
            keys.append(f"prompt:{prompt}")
        return hashlib.sha256("\0".join(keys).encode()).hexdigest()

    def _compute(self, prompt: str) -> Features:
        pictures = [self.references.load_images([f]) for f in self.references.files(prompt)]
        if len({p.shape for p in pictures}) == 1:
            pictures = [torch.cat(pictures)]
        features = Features.cat([self.adversary.features(p, [prompt] * len(p)) for p in pictures])
        return self.adversary.kept_part(features)
