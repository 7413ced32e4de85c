"""The tiny world's rule-based judge as a reward, in the manner of GenEval (arXiv 2310.11513).

GenEval asks of an image whether every attribute of its prompt is there. Strict, the reward is that verdict, 0 or 1;
graded, it is the mean of the three attributes that the judge (tiny/rules.py) sees, so that a group of images is seldom
all alike:

    r = (overlap + [place] + [background]) / 3

with `overlap` the intersection over union of the drawing's box with the box that the nearest artist fills for the same
prompt, about 1 on a crisp drawing. What is drawn in the box the rules do not see.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from advgrpo.errors import UserError
from advgrpo.rewards.base import Reward
from advgrpo.rewards.pixels import check_images
from advgrpo.runtime.transfer import to_device
from advgrpo.tiny.rules import look
from advgrpo.tiny.scenes import Scene

if TYPE_CHECKING:
    from advgrpo.data.references import ReferenceSet


class RuleReward(Reward):
    """The `Reward` protocol over the tiny world's rules, on the CPU, where the same image always scores the same.

    Args:
        strict: 1 for images all of whose attributes are the prompt's, 0 otherwise: background, place, and the drawing's
            box, which is its size.
    """

    name = "rule"

    def __init__(self, *, strict: bool = False) -> None:
        self.strict = strict

    def check_prompts(self, prompts: list[str]) -> None:
        """UserError for the first prompt that is no caption of the tiny world; call it before any work is done."""
        for prompt in prompts:
            try:
                Scene.parse(prompt)
            except ValueError as error:
                raise UserError(f"reward rule: {error}; it judges the tiny world's drawings only") from None

    def score(self, images: torch.Tensor, prompts: list[str], references: ReferenceSet | None = None) -> torch.Tensor:
        """Rewards [B] float32 in [0, 1] on the images' device; `references` are not looked at.

        Raises:
            UserError: a prompt that is no caption of the tiny world, before anything is judged.
            ValueError: unusable images (see `check_images`), or images that are not square.
        """
        self.check_prompts(prompts)
        checked = check_images(images, prompts)
        if checked.shape[-1] != checked.shape[-2]:
            raise ValueError(f"the judge wants square images, got {list(checked.shape)}")
        seen = look(checked, prompts)
        graded = (seen.overlap + seen.place_correct + seen.background_correct) / 3
        return to_device(seen.correct.float() if self.strict else graded, images.device)
