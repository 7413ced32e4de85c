"""What is made of reference images, made once: features, embeddings, statistics, latents, scores.

Shapes: n references of a prompt, decoded into batches [., 3, H, W] float32 in [0, 1] on the CPU.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import torch

from advgrpo.data.references import ReferenceSet

T = TypeVar("T")
Size = tuple[int, int]  # height and width


class Store(Protocol[T]):
    """Where values stay: `cache.LastUsed` in memory, `cache.TensorCache` on disk as well."""

    def __contains__(self, key: str) -> bool: ...

    def load(self, key: str) -> T | None: ...

    def store(self, key: str, value: T) -> T: ...


class PerReference(Generic[T]):
    """A value of references, computed once for their content: prompts with the same images share it.

    Args:
        compute: (batches, prompt) -> the value. The batches are the images in order: one batch where they are of one
            size, else one of each. It is told the prompt, on which the value may depend only with `of_text`.
        store: where values stay; its bound is the cache's.
        owner: what else the value depends on, such as weights, where the store outlives this object.
        of_text: the value depends on the prompt too, so prompts do not share it.
        first: how many references of a prompt are looked at, from the first; None: all.
    """

    def __init__(
        self,
        compute: Callable[[list[torch.Tensor], str], T],
        store: Store[T],
        *,
        owner: str = "",
        of_text: bool = False,
        first: int | None = None,
    ):
        self.compute, self.store, self.owner, self.of_text, self.first = compute, store, owner, of_text, first

    def of_prompt(self, references: ReferenceSet, prompt: str, size: Size | None = None) -> T:
        """The value of the prompt's references, resized to `size` where one is given.

        Raises:
            UserError: `references` was not loaded with this prompt, or an image can no longer be read.
        """
        return self._known_or_made(references, self._files(references, prompt), prompt, size)

    def of_file(self, references: ReferenceSet, file: Path, size: Size | None = None) -> T:
        """The value of one image; UserError where it can no longer be read."""
        return self._known_or_made(references, [file], "", size)

    def load(self, references: ReferenceSet, prompt: str) -> T | None:
        """The value of the prompt's references if the store has it."""
        return self.store.load(self.key(references, prompt))

    def missing(self, references: ReferenceSet, prompt: str, size: Size | None = None) -> list[Path]:
        """The images that would have to be decoded for the prompt's value; none where the store has it."""
        files = self._files(references, prompt)
        return [] if self._key(references, files, prompt, size) in self.store else files

    def make(self, references: ReferenceSet, prompt: str) -> T:
        """The value of the prompt's references, computed whatever the store has, and not stored."""
        return self.compute(decoded(references, self._files(references, prompt), None), prompt)

    def key(self, references: ReferenceSet, prompt: str) -> str:
        """What the value of the prompt's references is stored under."""
        return self._key(references, self._files(references, prompt), prompt, None)

    def _known_or_made(self, references: ReferenceSet, files: list[Path], prompt: str, size: Size | None) -> T:
        key = self._key(references, files, prompt, size)
        known = self.store.load(key)
        if known is not None:
            return known
        return self.store.store(key, self.compute(decoded(references, files, size), prompt))

    def _files(self, references: ReferenceSet, prompt: str) -> list[Path]:
        return references.files(prompt)[: self.first]

    def _key(self, references: ReferenceSet, files: list[Path], prompt: str, size: Size | None) -> str:
        parts = [self.owner, *(references.content_key(file) for file in files)]
        if self.of_text:
            parts.append(f"prompt:{prompt}")
        if size is not None:
            parts.append("size:{}x{}".format(*size))
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def decoded(references: ReferenceSet, files: list[Path], size: Size | None) -> list[torch.Tensor]:
    """The images in order, as few batches as can be: one where `size` or chance makes them alike, else one of each."""
    if size is not None:
        return [references.load_images(files, size=size)]
    images = [references.load_images([file]) for file in files]
    return [torch.cat(images)] if len({image.shape for image in images}) == 1 else images
