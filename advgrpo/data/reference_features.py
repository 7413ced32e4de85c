"""Backbone features of the reference pictures: computed once per prompt, kept on disk by content."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from advgrpo_kernels import philox_permutation

from ..cache import TensorCache
from ..types import Features
from .references import ReferenceSet

_IN_MEMORY = 512  # prompts


class ReferenceFeatures:
    """Features of every reference of a prompt: cls [n, D] and at most `max_patches` patches [n, P', D] each.

    All pictures of a prompt go through the backbone in one batch, whether or not some were seen before, so that cached
    and fresh features agree to the last bit.
    """

    def __init__(self, references: ReferenceSet, adversary, cache_dir: Path, max_patches: int):
        self.references, self.adversary, self.max_patches = references, adversary, max_patches
        self.tensors = TensorCache(cache_dir / "references", in_memory=_IN_MEMORY, device=adversary.backbone.device)
        self._backbone_key = f"{adversary.backbone.cache_key}:{max_patches}"

    def prompt(self, prompt: str) -> Features:
        """Features of the prompt's references, in the order of the index, on the backbone's device."""
        key = self._key(prompt)
        tensors = self.tensors.load(key)
        if tensors is None:
            computed = self._compute(prompt)
            tensors = self.tensors.store(key, {"cls": computed.cls, "patches": computed.patches})
        return Features(tensors["cls"], tensors["patches"])

    def _key(self, prompt: str) -> str:
        keys = [self.references.content_key(f) for f in self.references.files(prompt)]
        return hashlib.sha256("\0".join([self._backbone_key, *keys]).encode()).hexdigest()

    def _compute(self, prompt: str) -> Features:
        pictures = [self.references.load_images([f]) for f in self.references.files(prompt)]
        if len({p.shape for p in pictures}) == 1:
            pictures = [torch.cat(pictures)]
        features = Features.cat([self.adversary.features(p) for p in pictures])
        count = features.patches.shape[1]
        if count > self.max_patches:
            ids = torch.arange(len(features), device=features.cls.device)
            kept = philox_permutation(count, self.max_patches, seed=0, sample_ids=ids)
            patches = features.patches.gather(1, kept[:, :, None].expand(-1, -1, features.patches.shape[2]))
            features = Features(features.cls, patches)
        return features
