"""The tiny worlds' rule-based judges as a reward, in the manner of GenEval (arXiv 2310.11513).

GenEval asks of an image whether every attribute of its prompt is there. Strict, the reward is that verdict, 0 or 1;
graded, it is the mean of the three attributes the judge sees, so that a group of images is seldom all alike. Which
judge it is follows from the prompts. Of shapes (tiny/judge.py),

    r = (overlap * [shape] + [colour] + [background]) / 3

with `overlap` the intersection over union with the best-fitting template, about 0.95 on a crisp drawing; of emoji
drawings (tiny/emoji/rules.py)

    r = (overlap + [place] + [background]) / 3

with `overlap` that of the drawing's box with the box that the nearest artist fills for the same prompt, about 1 on a
crisp drawing. What is drawn in the box the rules do not see.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from advgrpo.errors import UserError
from advgrpo.rewards.base import Reward
from advgrpo.rewards.pixels import check_images
from advgrpo.runtime.transfer import to_device
from advgrpo.tiny import shapes
from advgrpo.tiny.emoji import scenes as emoji
from advgrpo.tiny.emoji.rules import look
from advgrpo.tiny.judge import judge

if TYPE_CHECKING:
    from advgrpo.data.references import ReferenceSet

_BATCH = 64  # images judged together: the judge holds 30 templates of every image at once


class RuleReward(Reward):
    """The `Reward` protocol over the worlds' judges, on the CPU, where the same image always scores the same.

    Args:
        strict: 1 for images all of whose attributes are the prompt's, 0 otherwise: shape (outline included), colour and
            background, or the drawing's box, place and background.
    """

    name = "rule"

    def __init__(self, *, strict: bool = False) -> None:
        self.strict = strict

    def check_prompts(self, prompts: list[str]) -> None:
        """UserError for a prompt no judge understands, or prompts of two worlds; call it before any work is done."""
        _judge_of(prompts)

    def score(self, images: torch.Tensor, prompts: list[str], references: ReferenceSet | None = None) -> torch.Tensor:
        """Rewards [B] float32 in [0, 1] on the images' device; `references` are not looked at.

        Raises:
            UserError: a prompt that is no caption of a tiny world, or prompts of two, before anything is judged.
            ValueError: unusable images (see `check_images`), or images that are not square.
        """
        score = _judge_of(prompts)
        checked = check_images(images, prompts)
        if checked.shape[-1] != checked.shape[-2]:
            raise ValueError(f"the judge wants square images, got {list(checked.shape)}")
        parts = [
            score(checked[start : start + _BATCH], prompts[start : start + _BATCH], self.strict)
            for start in range(0, len(prompts), _BATCH)
        ]
        return to_device(torch.cat(parts), images.device)


def _score_shapes(images: torch.Tensor, prompts: list[str], strict: bool) -> torch.Tensor:
    verdict = judge(images, prompts)
    if strict:
        return (verdict.correct & verdict.background_correct).float()
    wanted = [shapes.Scene.parse(prompt).shape for prompt in prompts]
    same_shape = torch.tensor([seen == shape for seen, shape in zip(verdict.shape, wanted)])
    colours = verdict.colour_correct.float() + verdict.background_correct.float()
    outline = verdict.overlap.float().where(same_shape, torch.zeros(()))  # where nothing is drawn, overlap is 0 / 0
    return (outline + colours) / 3


def _score_emoji(images: torch.Tensor, prompts: list[str], strict: bool) -> torch.Tensor:
    layout = look(images, prompts)
    return layout.correct.float() if strict else (layout.overlap + layout.place_correct + layout.background_correct) / 3


# the grammars of the worlds' captions, and who judges images of them
_JUDGES = ((shapes.Scene.parse, _score_shapes), (emoji.Scene.parse, _score_emoji))


def _judge_of(prompts: list[str]) -> Callable[[torch.Tensor, list[str], bool], torch.Tensor]:
    """Of the world whose captions the prompts are; UserError where they are of none, or of two."""
    first: dict[int, str] = {}
    for prompt in prompts:
        first.setdefault(_world_of(prompt), prompt)
    if len(first) > 1:
        one, other = first.values()
        raise UserError(f"reward rule: {one!r} and {other!r} are captions of two worlds; give it prompts of one")
    return _JUDGES[next(iter(first), 0)][1]


def _world_of(prompt: str) -> int:
    complaints = []
    for number, (parse, _) in enumerate(_JUDGES):
        try:
            parse(prompt)
        except ValueError as error:
            complaints.append(str(error))
        else:
            return number
    raise UserError(f"reward rule: {', '.join(complaints)}; it judges the tiny world's drawings only")
