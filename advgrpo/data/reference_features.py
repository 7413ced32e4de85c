"""Backbone features of the reference pictures: computed once per prompt, kept on disk by content."""

from __future__ import annotations

import hashlib
import os
import uuid
from collections import OrderedDict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from advgrpo_kernels import philox_permutation

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
        self.root = cache_dir / "references"
        self._key = f"{adversary.backbone.cache_key}:{max_patches}"
        self._memory: OrderedDict[str, Features] = OrderedDict()

    def prompt(self, prompt: str) -> Features:
        """Features of the prompt's references, in the order of the index, on the backbone's device."""
        if prompt in self._memory:
            self._memory.move_to_end(prompt)
            return self._memory[prompt]
        path = self._path(prompt)
        try:
            tensors = load_file(path)
            features = Features(tensors["cls"], tensors["patches"])
        except (FileNotFoundError, SafetensorError):  # not computed yet, or cut short when a machine went down
            features = self._compute(prompt)
            self._store(path, features)
        device = self.adversary.backbone.device
        features = Features(features.cls.to(device), features.patches.to(device))
        self._memory[prompt] = features
        if len(self._memory) > _IN_MEMORY:
            self._memory.popitem(last=False)
        return features

    def _path(self, prompt: str) -> Path:
        keys = [self.references.content_key(f) for f in self.references.files(prompt)]
        digest = hashlib.sha256("\0".join([self._key, *keys]).encode()).hexdigest()
        return self.root / digest[:2] / f"{digest}.safetensors"

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

    def _store(self, path: Path, features: Features) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{uuid.uuid4().hex}")  # another process may compute the same prompt
        save_file({"cls": features.cls.cpu().contiguous(), "patches": features.patches.cpu().contiguous()}, temporary)
        os.replace(temporary, path)
