"""What a reward offers; everything outside `rewards/` talks to this protocol only. A class that names it as its base
needs to write what differs.

Shapes: B images [B, 3, H, W] float32 in [0, 1], one prompt each.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch

from advgrpo.data.references import ReferenceSet


@runtime_checkable
class Reward(Protocol):
    """A fixed judge of images: higher is better. Nothing in it is trained.

    One that takes long, or waits for other machines, has an attribute `progress`, which the run sets to
    `Distributed.step`, and calls it with what it begins and how long that may take.
    """

    name: str  # the key of its metrics, "reward_<name>"

    def check_prompts(self, prompts: list[str]) -> None:
        """Called once before anything is scored, where possible before a model is loaded. Most judge any prompt.

        Raises:
            UserError: the first of `prompts` that cannot be judged, or a judge that does not answer.
        """

    def score(self, images: torch.Tensor, prompts: list[str], references: ReferenceSet | None) -> torch.Tensor:
        """One score per image.

        Args:
            images: [B, 3, H, W] float32 in [0, 1], on any device.
            prompts: the B prompts the images were made for.
            references: the run's reference images by prompt; None where there are none. Rewards that compare with
                them (the similarities) raise without, the others do not look at them.

        Returns:
            [B] float32, finite, on the device of `images`.

        Raises:
            UserError: `references` is None or lacks a prompt, and this reward needs it.
            FloatingPointError: a score is not finite; the message names the reward and the prompt.
            RuntimeError: the judge could not score an image (a remote scorer timed out, a model failed). A failed
                score is never replaced by a number.
        """
        ...
