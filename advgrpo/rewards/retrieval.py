"""The tiny world's independent judges as metrics: is the nearest drawing, of any artist, of the prompt's name, and
does a classifier name it so?

Never a reward: what they measure would no longer be independent.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from advgrpo.config.judge_checks import JUDGE_METRICS
from advgrpo.errors import UserError
from advgrpo.rewards.base import Reward
from advgrpo.rewards.pixels import check_images
from advgrpo.runtime.transfer import to_device
from advgrpo.tiny.judge import Judge
from advgrpo.tiny.scenes import Scene
from advgrpo.tiny.second_judge import SecondJudge

if TYPE_CHECKING:
    from advgrpo.data.references import ReferenceSet


_TOP = {"retrieval": 1, "retrieval_top5": 5}  # how many names count


def judge_metrics(names: Iterable[str], cache: Path) -> dict[str, JudgeMetric]:
    """Those of `names` that are a judge's, by name: two that ask one judge have it look at every image once.

    Args:
        names: metrics, the judges' and others.
        cache: folder where the gallery's features are kept between runs.

    Raises:
        UserError: retrieval is asked for, and the judge's packages are missing.
    """
    own = [name for name in names if name in JUDGE_METRICS]
    ranks = Ranks(Judge(cache=cache)) if _TOP.keys() & own else None
    found: dict[str, JudgeMetric] = {}
    for name in own:
        found[name] = Retrieval(ranks, name=name, top=_TOP[name]) if name in _TOP else ClassifierAccuracy()
    return found


class Ranks:
    """The judge's ranks of images; what it was asked last is remembered for the next metric that asks the same."""

    def __init__(self, judge: Judge) -> None:
        self.judge = judge
        self._images: weakref.ref[torch.Tensor] | None = None
        self._asked: tuple[int, list[str]] | None = None  # version of the images, their prompts
        self._ranks = torch.zeros(0, dtype=torch.long)

    def of(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        """[B] int64 on the CPU: how many names are nearer than the prompt's.

        Raises:
            UserError: a prompt that is no caption of the tiny world.
            ValueError: unusable images (see `check_images`).
        """
        asked = (images._version, list(prompts))
        if self._images is None or self._images() is not images or self._asked != asked:
            checked = check_images(images, prompts)
            self._ranks = self.judge.look(checked, [Scene.parse(prompt) for prompt in prompts]).rank
            self._images, self._asked = weakref.ref(images), asked
        return self._ranks


class JudgeMetric(Reward):
    """`base.Reward` of captions of the tiny world only."""

    def check_prompts(self, prompts: list[str]) -> None:
        """UserError for the first prompt that is no caption of the tiny world."""
        for prompt in prompts:
            try:
                Scene.parse(prompt)
            except ValueError as error:
                raise UserError(f"metric {self.name}: {error}; it judges the tiny world's drawings only") from None


class Retrieval(JudgeMetric):
    """`base.Reward`: 1 where the prompt's name is the nearest (`top` = 1) or among the `top` nearest names, else 0.

    Args:
        ranks: whom to ask, shared by the metrics of one evaluation.
        name: of the metric.
        top: how many names count.
    """

    def __init__(self, ranks: Ranks, *, name: str = "retrieval", top: int = 1) -> None:
        self.name, self.top = name, top
        self._ranks = ranks

    def score(self, images: torch.Tensor, prompts: list[str], references: ReferenceSet | None = None) -> torch.Tensor:
        """[B] float32, 0 or 1, on the images' device; `references` are not looked at.

        Raises:
            UserError: a prompt that is no caption of the tiny world.
            ValueError: unusable images (see `check_images`).
        """
        self.check_prompts(prompts)
        return to_device((self._ranks.of(images, prompts) < self.top).float(), images.device)


class ClassifierAccuracy(JudgeMetric):
    """`base.Reward`: 1 where the second judge, a classifier, finds the prompt's name the likeliest, else 0.

    Args:
        judge: whom to ask; None for the shipped one.
    """

    name = "classifier_accuracy"

    def __init__(self, judge: SecondJudge | None = None) -> None:
        self._judge = SecondJudge() if judge is None else judge

    def score(self, images: torch.Tensor, prompts: list[str], references: ReferenceSet | None = None) -> torch.Tensor:
        """[B] float32, 0 or 1, on the images' device; `references` are not looked at.

        Raises:
            UserError: a prompt that is no caption of the tiny world.
            ValueError: unusable images (see `check_images`).
        """
        self.check_prompts(prompts)
        checked = check_images(images, prompts)
        right = self._judge.look(checked, [Scene.parse(prompt) for prompt in prompts])
        return to_device(right.float(), images.device)
