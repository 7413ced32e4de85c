"""The emoji world's independent judge as a metric: is the nearest drawing, of any artist, of the prompt's name?

Never a reward: what it measures would no longer be independent.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from advgrpo.errors import UserError
from advgrpo.rewards.base import Reward
from advgrpo.rewards.pixels import check_images
from advgrpo.runtime.transfer import to_device
from advgrpo.tiny.emoji.judge import Judge
from advgrpo.tiny.emoji.scenes import Scene

if TYPE_CHECKING:
    from advgrpo.data.references import ReferenceSet


class Retrieval(Reward):
    """`base.Reward`: 1 where the prompt's name is the nearest (`top` = 1) or among the `top` nearest names, else 0.

    Args:
        top: how many names count.
    """

    name = "retrieval"

    def __init__(self, *, top: int = 1) -> None:
        self.top = top
        self._judge = Judge()

    def check_prompts(self, prompts: list[str]) -> None:
        """UserError for the first prompt that is no caption of the emoji world."""
        for prompt in prompts:
            try:
                Scene.parse(prompt)
            except ValueError as error:
                raise UserError(f"metric {self.name}: {error}; it judges the emoji world's drawings only") from None

    def score(self, images: torch.Tensor, prompts: list[str], references: ReferenceSet | None = None) -> torch.Tensor:
        """[B] float32, 0 or 1, on the images' device; `references` are not looked at.

        Raises:
            UserError: a prompt that is no caption of the emoji world.
            ValueError: unusable images (see `check_images`).
        """
        self.check_prompts(prompts)
        checked = check_images(images, prompts)
        ranks = self._judge.look(checked, [Scene.parse(prompt) for prompt in prompts]).rank
        return to_device((ranks < self.top).float(), images.device)
