"""The tiny world's rule-based judge as a reward, in the manner of GenEval (arXiv 2310.11513).

GenEval asks of an image whether every attribute of its prompt is there. Strict, the reward is that verdict, 0 or 1;
graded, it is the mean of the three attributes the judge sees, so that a group of images is seldom all alike:

    r = (overlap * [shape] + [colour] + [background]) / 3

with `overlap` the intersection over union with the best-fitting template, about 0.95 on a crisp drawing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from advgrpo.errors import UserError
from advgrpo.rewards.base import Reward
from advgrpo.rewards.pixels import check_images
from advgrpo.runtime.transfer import to_device
from advgrpo.tiny.judge import judge
from advgrpo.tiny.shapes import Scene

if TYPE_CHECKING:
    from advgrpo.data.references import ReferenceSet

_BATCH = 64  # images judged together: the judge holds 30 templates of every image at once


class RuleReward(Reward):
    """The `Reward` protocol over `tiny.judge`. It judges on the CPU, where the same image always scores the same.

    Args:
        strict: 1 for images whose shape (outline included), colour and background are all the prompt's, 0 otherwise.
    """

    name = "rule"

    def __init__(self, *, strict: bool = False) -> None:
        self.strict = strict

    def check_prompts(self, prompts: list[str]) -> None:
        """UserError for the first prompt the judge cannot understand; call it before any work is done."""
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
        parts = [
            self._score_batch(checked[start : start + _BATCH], prompts[start : start + _BATCH])
            for start in range(0, len(prompts), _BATCH)
        ]
        return to_device(torch.cat(parts), images.device)

    def _score_batch(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        verdict = judge(images, prompts)
        if self.strict:
            return (verdict.correct & verdict.background_correct).float()
        wanted = [Scene.parse(prompt).shape for prompt in prompts]
        same_shape = torch.tensor([seen == shape for seen, shape in zip(verdict.shape, wanted)])
        colours = verdict.colour_correct.float() + verdict.background_correct.float()
        outline = verdict.overlap.float().where(same_shape, torch.zeros(()))  # where nothing is drawn, overlap is 0 / 0
        return (outline + colours) / 3
