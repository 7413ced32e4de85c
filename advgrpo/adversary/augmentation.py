"""What a discriminator sees of an image: all of it, or a random crop that may be mirrored.

Generations are cropped anew in every iteration, keyed by (seed, iteration, image number), and both the reward and the
head's training look at that crop: features are computed once. References are cached, so each has `REFERENCE_VIEWS`
crops, chosen once by its place among the prompt's references, the same for every run; which of them an image is
compared with is drawn with the reference (`reference_features.reference_draws`).

A crop is a window of 7/8 of each side, whatever the side, with the pixels as they are: generations and references are
enlarged alike when the backbone's preprocessing resizes them. (7/8 is AlexNet's 224 of 256 pixels.)

Shapes: B images [B, C, H, W] -> [B, C, round(7H/8), round(7W/8)].
"""

from __future__ import annotations

from typing import Literal

import torch

from advgrpo.runtime import rng
from advgrpo.runtime.transfer import to_device
from advgrpo_kernels import philox_integers

REFERENCE_VIEWS = 4  # crops kept of every reference, and as many times the memory of their features


class Augmentation:
    """Random crops of one run.

    Args:
        augment: adversary.augment.
        seed: of the run.
    """

    def __init__(self, augment: Literal["none", "crop", "crop_flip"], seed: int):
        self.augment, self.seed = augment, seed

    @property
    def views(self) -> int:
        """How many crops of a reference there are."""
        return 1 if self.augment == "none" else REFERENCE_VIEWS

    @property
    def cache_key(self) -> str:
        """What features of references depend on beside what they depend on without augmentation; "" where that is
        all."""
        return "" if self.augment == "none" else f":{self.augment}:{REFERENCE_VIEWS}"

    def generated(self, images: torch.Tensor, image_ids: torch.Tensor, iteration: int) -> torch.Tensor:
        """One crop of each image.

        Args:
            images: [B, C, H, W], on any device.
            image_ids: [B] int64, numbers in the iteration.
        """
        if self.augment == "none":
            return images
        return self._cropped(images, image_ids, rng.derive_seed(self.seed, "augment", iteration))

    def view(self, images: torch.Tensor, number: int, first: int = 0) -> torch.Tensor:
        """View `number`, below `views`, of references [B, C, H, W], which begin with reference `first` of a prompt."""
        if self.augment == "none":
            return images
        places = torch.arange(first, first + len(images))
        return self._cropped(images, places, rng.derive_seed(0, "augment_reference", number))

    def _cropped(self, images: torch.Tensor, ids: torch.Tensor, seed: int) -> torch.Tensor:
        ids = to_device(ids, images.device)
        *_, height, width = images.shape
        rows, columns = (self._window(side, ids, seed, axis) for axis, side in enumerate((height, width)))
        if self.augment == "crop_flip":
            mirrored = philox_integers(2, 1, seed=seed, sample_ids=ids, step=2).bool()
            columns = torch.where(mirrored, columns.flip(1), columns)
        batch, channels = (torch.arange(size, device=images.device) for size in images.shape[:2])
        return images[
            batch[:, None, None, None], channels[None, :, None, None], rows[:, None, :, None], columns[:, None, None, :]
        ]

    @staticmethod
    def _window(side: int, ids: torch.Tensor, seed: int, axis: int) -> torch.Tensor:
        """[B, kept] pixels of a side, next to each other from a random one on."""
        kept = round(side * 7 / 8)
        start = philox_integers(side - kept + 1, 1, seed=seed, sample_ids=ids, step=axis)
        return start + torch.arange(kept, device=ids.device)
