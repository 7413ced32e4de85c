"""What flows between the parts of an iteration.

Shapes: B images of this process in an iteration, M images of a micro-batch, P different prompts of a micro-batch (M = P
* rows per prompt), C x H x W latents, T sampler steps.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch


@dataclass
class Conditioning:
    """Text embeddings, one row per prompt."""

    text: torch.Tensor  # [P, L, D], the model's dtype
    pooled: torch.Tensor  # [P, E]
    mask: torch.Tensor | None = None  # [P, L] bool, the tokens that are attended to; None: all of them

    def rows(self, index: torch.Tensor) -> Conditioning:
        return Conditioning(**{name: tensor.index_select(0, index) for name, tensor in self.tensors().items()})

    def tensors(self) -> dict[str, torch.Tensor]:
        """What there is, by name; first dimension P."""
        mask = {} if self.mask is None else {"mask": self.mask}
        return {"text": self.text, "pooled": self.pooled, **mask}

    @classmethod
    def joined(cls, parts: Iterable[Conditioning]) -> Conditioning:
        """The rows of all parts, one after the other; all have a mask or none has."""
        named = [part.tensors() for part in parts]
        return cls(**{name: torch.cat([tensors[name] for tensors in named]) for name in named[0]})


@dataclass
class MicroBatch:
    """The unit of computation: rollout and update run the same micro-batches, so their batch shapes agree bit for
    bit."""

    image_ids: torch.Tensor  # [M] int64, global: group * group_size + member
    prompts: list[str]  # P texts
    prompt_groups: torch.Tensor  # [P] int64, the group each prompt row stands for: its position in the iteration
    row: torch.Tensor  # [M] int64 into prompts
    minibatch: int  # which optimizer step of the iteration trains on it
    chosen: torch.Tensor | None = None  # [M] int64, which scouts the images are; None: nothing was scouted
    branch: int | None = None  # which of the window's steps is theirs (rollout.window.branching); None: all are
    judged: bool = True  # by this process; not, by another one that draws the same images with it

    @property
    def trajectories(self) -> torch.Tensor:
        """[P] int64: what keys the initial noise that a prompt row's images share: its group, or the first of those
        that branch off one trajectory."""
        return self.prompt_groups - (self.branch or 0)

    @property
    def draws(self) -> torch.Tensor:
        """[M] int64: what keys everything that is drawn for an image, so that a scout can be drawn again."""
        return self.image_ids if self.chosen is None else self.chosen

    @property
    def captions(self) -> list[str]:
        """[M] the prompt of every image."""
        return [self.prompts[i] for i in self.row.tolist()]


@dataclass
class WindowStep:
    """One stochastic step: everything the update needs to repeat it."""

    step: int
    latents: torch.Tensor  # [M, C, H, W] float32, or [P, C, H, W] where the rows of a prompt are still identical
    next_latents: torch.Tensor  # [M, C, H, W] float32
    log_prob: torch.Tensor  # [M] float32, under the weights that sampled
    shared: bool  # latents hold one row per prompt
    weight: torch.Tensor | None = None  # [M] float32 importance of each row's loss; None: 1
    mean: torch.Tensor | None = None  # [M, C, H, W] float32 of the step's distribution, where the update compares it


@dataclass
class MicroBatchRollout:
    micro_batch: MicroBatch
    conditioning: Conditioning  # of the micro-batch's prompts, on the device, for the update as well
    steps: list[WindowStep]
    images: torch.Tensor  # [M, 3, H, W] float32 in [0, 1]; [0, 3, H, W] where another process judges them
    clean: torch.Tensor | None = None  # [M, C, h, w] float32, what they were decoded from, where that is learned from


@dataclass
class Rollout:
    """One iteration's images of this process, which may have none."""

    micro_batches: list[MicroBatchRollout]

    @property
    def judged(self) -> Rollout:
        """Those that this process judges; every image is judged by one."""
        return Rollout([each for each in self.micro_batches if each.micro_batch.judged])

    @property
    def image_ids(self) -> torch.Tensor:
        return _numbers(t.micro_batch.image_ids for t in self.micro_batches)

    @property
    def draws(self) -> torch.Tensor:
        return _numbers(t.micro_batch.draws for t in self.micro_batches)

    @property
    def prompts(self) -> list[str]:
        return [caption for t in self.micro_batches for caption in t.micro_batch.captions]


def _numbers(parts: Iterable[torch.Tensor]) -> torch.Tensor:
    """[B] int64 on the host of any number of parts."""
    return torch.cat([torch.zeros(0, dtype=torch.int64), *parts])


@dataclass
class Features:
    """What an adversary's frozen part computed of B images: tensors [B, ...] under names of the adversary's choice.

    DINO's are "cls" [B, D] and "patches" [B, P, D], float32.
    """

    tensors: dict[str, torch.Tensor]  # each [B, ...], all on one device

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    @property
    def device(self) -> torch.device:
        return next(iter(self.tensors.values())).device

    def rows(self, index: torch.Tensor) -> Features:
        """The images at `index`, int64 [n] on the features' device."""
        return Features({name: tensor.index_select(0, index) for name, tensor in self.tensors.items()})

    @staticmethod
    def cat(parts: list[Features]) -> Features:
        """The images of all parts, in order; every part has the same names."""
        return Features({name: torch.cat([part[name] for part in parts]) for name in parts[0].tensors})


@dataclass(frozen=True)
class Flag:
    """An active red flag."""

    name: str
    value: float
    threshold: float
    message: str  # what is wrong, with the numbers
    advice: str  # which config field to change, from which value, in which direction
    stop: bool  # whether monitor.stop names it

    def __str__(self) -> str:
        return f"red flag {self.name}: {self.message}. {self.advice}"
