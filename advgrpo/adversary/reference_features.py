"""The adversary's features of the reference images: computed once per prompt, kept on disk by content."""

from __future__ import annotations

import contextlib
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from advgrpo.adversary.augmentation import Augmentation
from advgrpo.adversary.base import Adversary
from advgrpo.data.per_reference import PerReference
from advgrpo.data.references import ReferenceSet
from advgrpo.errors import UserError
from advgrpo.runtime import rng
from advgrpo.runtime.cache import TensorCache
from advgrpo.runtime.transfer import to_device
from advgrpo.types import Features

_IN_MEMORY = 512  # prompts
_WAS_FLOAT32 = ":float32"
_SAME_NETWORK = 0.1  # relative difference: bfloat16 and float32 of one ViT-L differ by 0.013, two networks by about 1


class ReferenceFeatures:
    """`cached_features` of the features of every reference of a prompt, [n, ...] each; with adversary.augment of every
    view of each of them, [n · views, ...], those of a reference next to each other.

    All images of a prompt go through the adversary in one batch, whether or not some were seen before, so that cached
    and fresh features agree to the last bit. Generations are judged by features of this process, references by cached
    ones; that both come from one network is proven on the first entry that another process has stored. For that,
    `PerReference` is used step by step: loaded apart from computed, and a foreign entry computed beside the stored one.

    `prefetch` loads an iteration's prompts in a background thread, on a GPU on a stream of its own, while the sampler
    runs. What is not on disk yet is computed by whoever asks for it: the GPU belongs to the sampler meanwhile.
    """

    def __init__(self, references: ReferenceSet, adversary: Adversary, cache_dir: Path):
        self.references, self.adversary = references, adversary
        self.tensors = TensorCache(cache_dir / "references", in_memory=_IN_MEMORY, device=adversary.device)
        self.augmentation = Augmentation(adversary.config.augment, adversary.seed)
        owner = adversary.cache_key + self.augmentation.cache_key
        self._values = PerReference(self._features, self.tensors, owner=owner, of_text=adversary.text_dependent)
        self._computed: set[str] = set()  # keys of this process, until one of another has been proven
        self._proven = False
        self._cache_lock = threading.Lock()  # the thread below and the caller's use one cache
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="references")
        self._pending: dict[str, Future] = {}  # by prompt
        self._stream = torch.cuda.Stream(adversary.device) if adversary.device.type == "cuda" else None

    def prefetch(self, prompts: list[str]) -> None:
        """Begin to load the prompts' features and return at once; an error surfaces when a prompt is asked for."""
        for prompt in dict.fromkeys(prompts):
            if prompt not in self._pending:
                self._pending[prompt] = self._thread.submit(self._load, prompt)

    def missing(self, prompt: str) -> list[Path]:
        """The references that would have to be decoded for the prompt; none where their features are stored."""
        return self._values.missing(self.references, prompt)

    def prompt(self, prompt: str) -> Features:
        """Features of the prompt's references, in the order of the index, on the adversary's device.

        Raises:
            UserError: an image can no longer be read, or the cache holds another network's features.
            FloatingPointError: the adversary's features of a reference are not finite; they are not stored.
            Exception: whatever `prefetch` came across for this prompt, as its thread raised it.
        """
        return _unpacked(self._stored(prompt))

    def _stored(self, prompt: str) -> dict[str, torch.Tensor]:
        """As `prompt`, in the form that the cache keeps (`_packed`)."""
        pending = self._pending.pop(prompt, None)
        tensors = None if pending is None else pending.result()
        tensors = tensors or self._load(prompt)  # a prompt with the same references may have computed them since
        if tensors is None:
            tensors = self._store(prompt)
        elif not self._proven and self._key(prompt) not in self._computed:
            self._prove(prompt, tensors)
        if self._stream is not None:  # loaded on that stream, used on this one
            for tensor in tensors.values():
                tensor.record_stream(torch.cuda.current_stream(tensor.device))
        return tensors

    def pick(self, prompts: list[str], draws: torch.Tensor) -> Features:
        """One reference per image: of the n (views of references) of its prompt, number floor(draw * n).

        Args:
            prompts: the prompts of B images.
            draws: [B] float32 in [0, 1), on the host.

        Returns:
            The features [B, ...], by one gather per tensor, whatever B.
        """
        # prompts that share their references share the cache's dict, and are gathered from once
        own = {prompt: Features(self._stored(prompt)) for prompt in dict.fromkeys(prompts)}
        sets = {id(features.tensors): features for features in own.values()}
        first, starts = 0, {}
        for identity, features in sets.items():
            starts[identity] = first
            first += len(features)
        start = torch.tensor([starts[id(own[prompt].tensors)] for prompt in prompts])
        count = torch.tensor([len(own[prompt]) for prompt in prompts])
        index = to_device(start + (draws * count).long(), self.adversary.device)
        candidates = list(sets.values())
        if len({tuple(features.tensors) for features in candidates}) > 1:  # not all of them could be packed
            candidates = [_unpacked(features.tensors) for features in candidates]
        return _unpacked((candidates[0] if len(candidates) == 1 else Features.cat(candidates)).rows(index).tensors)

    def _store(self, prompt: str) -> dict[str, torch.Tensor]:
        computed, key = self._compute(prompt), self._key(prompt)
        for name, tensor in computed.items():
            if not tensor.isfinite().all():
                raise FloatingPointError(
                    f"the adversary's features ({name}) of the references of prompt {prompt!r} are not finite; check "
                    f"{self.adversary.config.backbone} and adversary.dtype = {self.adversary.config.dtype}"
                )
        if not self._proven:
            self._computed.add(key)
        with self._cache_lock:
            return self.tensors.store(key, _packed(computed))

    def _prove(self, prompt: str, cached: dict[str, torch.Tensor]) -> None:
        """UserError unless the cached features of the prompt's references are what this process's network gives."""
        known_ones = _unpacked(cached).tensors
        for name, fresh in self._compute(prompt).items():
            stored, fresh = known_ones.get(name), fresh.float()
            known = stored is not None and stored.shape == fresh.shape
            gap = (stored.float() - fresh).norm() / fresh.norm().clamp_min(1e-12) if known else torch.tensor(torch.inf)
            if not gap <= _SAME_NETWORK:
                raise UserError(
                    f"{self.tensors.path(self._key(prompt))} holds features ({name}) of the references of prompt "
                    f"{prompt!r} that adversary.backbone = {self.adversary.config.backbone} does not give (relative "
                    f"difference {gap.item():.2g}); remove {self.tensors.root} or set data.cache_dir to another folder"
                )
        self._proven = True
        self._computed.clear()

    def _load(self, prompt: str) -> dict[str, torch.Tensor] | None:
        """From memory or disk; None where nothing is stored."""
        stream = contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream)
        with self._cache_lock, stream:
            return self._values.load(self.references, prompt)

    def _key(self, prompt: str) -> str:
        return self._values.key(self.references, prompt)

    def _compute(self, prompt: str) -> dict[str, torch.Tensor]:
        return self._values.make(self.references, prompt)

    def _features(self, batches: list[torch.Tensor], prompt: str) -> dict[str, torch.Tensor]:
        found, first = [], 0
        for images in batches:
            found.append(self._views(images, prompt, first))
            first += len(images)
        return self.adversary.cached_features(Features.cat(found)).tensors

    def _views(self, images: torch.Tensor, prompt: str, first: int) -> Features:
        """Features of every view of references of one size, which begin with reference `first` of the prompt."""
        if self.augmentation.views == 1:
            return self.adversary.features(self.augmentation.view(images, 0, first), [prompt] * len(images))
        looked = [self.augmentation.view(images, number, first) for number in range(self.augmentation.views)]
        views = [self.adversary.features(each, [prompt] * len(images)) for each in looked]
        return Features(
            {name: torch.stack([view[name] for view in views], dim=1).flatten(0, 1) for name in views[0].tensors}
        )


def _packed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """float32 in bfloat16 where that loses nothing, as of a backbone that computes in it: half the disk and memory.

    Such a tensor's name says what it is to become again.
    """
    packed = {}
    for name, tensor in tensors.items():
        half = tensor.to(torch.bfloat16)
        lossless = tensor.dtype == torch.float32 and torch.equal(half.float(), tensor)
        packed[f"{name}{_WAS_FLOAT32}" if lossless else name] = half if lossless else tensor
    return packed


def _unpacked(tensors: dict[str, torch.Tensor]) -> Features:
    """What `_packed` was given."""
    return Features(
        {
            name.removesuffix(_WAS_FLOAT32): tensor.float() if name.endswith(_WAS_FLOAT32) else tensor
            for name, tensor in tensors.items()
        }
    )


def reference_draws(
    choice: str,
    references: ReferenceSet,
    prompts: list[str],
    image_ids: torch.Tensor,
    places: torch.Tensor,
    *,
    total: int,
    seed: int,
    iteration: int,
    views: int = 1,
) -> torch.Tensor:
    """Which of its prompt's references each image is paired with, for `ReferenceFeatures.pick`.

    Args:
        choice: adversary.reference_choice, "random" or "in_turn".
        prompts: the prompts of B images.
        image_ids: [B] int64 on the host, their numbers in the iteration, below `total`.
        places: [B] int64 on the host, their places among the images of their prompt ("in_turn" goes by them).
        total: images of the iteration over all processes.
        seed: of the run.
        views: of each reference (`Augmentation`); which of them is random either way.

    Returns:
        [B] float32 in [0, 1), on the host; keyed by (seed, iteration, image number).
    """
    if choice == "in_turn":
        of_prompt = {prompt: len(references.files(prompt)) for prompt in dict.fromkeys(prompts)}
        count = torch.tensor([of_prompt[prompt] for prompt in prompts])
        view = torch.randint(views, (total,), generator=rng.generator(seed, "reference_view", iteration))[image_ids]
        return (places % count + (view + 0.5) / views) / count
    return torch.rand(total, generator=rng.generator(seed, "reference", iteration))[image_ids]
