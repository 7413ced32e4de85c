"""Pictures of prompts and a witness who looks at them: what a comparison of models at several guidance scales rests on.

Shapes: P prompts, K images of each, R references of each, D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import torch

from advgrpo.data.prompts import load_prompts
from advgrpo.data.references import ReferenceSet
from advgrpo.data.sources import shipped_path
from advgrpo.errors import UserError
from advgrpo.evaluation.frontier import Point
from advgrpo.reporting.display import Display

if TYPE_CHECKING:
    from advgrpo.evaluation.evaluator import Evaluator
    from advgrpo.tiny.judge import Judge


Accuracy = Literal["retrieval", "retrieval_top5", "background_accuracy", "classifier_accuracy"]


class Witness(Protocol):
    """Who judges: nobody a reward, a backbone or a setting has seen."""

    def look(self, images: torch.Tensor, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Verdicts [B], higher is better, and features [B, D] of images [B, 3, H, W] in [0, 1]."""
        ...


class TinyWitness:
    """The tiny world's judges: is the nearest drawing, or one of the five nearest names, the prompt's? Is the
    background of its colour? Or does the second judge name the drawing so?"""

    distance = "KID x 1000 in EfficientNet-Lite0's features"

    def __init__(self, cache: Path, accuracy: Accuracy = "retrieval"):
        from advgrpo.tiny.judge import Judge
        from advgrpo.tiny.second_judge import SecondJudge

        self.accuracy = accuracy
        self._second = SecondJudge() if accuracy == "classifier_accuracy" else None
        self._cache, self._judge = cache, Judge(cache=cache)

    @cached_property
    def _of_style(self) -> Judge:
        from advgrpo.tiny.judge import EVERY_ARTIST, Judge

        return Judge(EVERY_ARTIST, cache=self._cache)

    def look(self, images: torch.Tensor, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        from advgrpo.tiny.rules import background_right
        from advgrpo.tiny.scenes import Scene

        images, scenes = images.cpu(), [Scene.parse(prompt) for prompt in prompts]
        if self._second is not None:
            return self._second.look(images, scenes).float(), self._judge.features(images, scenes)
        if self.accuracy == "background_accuracy":
            return background_right(images, scenes).float(), self._judge.features(images, scenes)
        verdict = self._judge.look(images, scenes)
        right = verdict.top1 if self.accuracy == "retrieval" else verdict.top5
        return right.float(), verdict.features

    def artists(self, features: torch.Tensor, prompts: list[str]) -> list[str]:
        """Who drew the drawing, of anything by anybody, that is nearest to each of the features [B, D] of `look`."""
        from advgrpo.tiny.scenes import Scene

        return self._of_style.compare(features, [Scene.parse(prompt) for prompt in prompts]).artist


@dataclass(frozen=True)
class Prompts:
    """Prompts with their references, and these as the witness sees them."""

    texts: list[str]
    images: torch.Tensor  # [P, R, 3, H, W] float32 in [0, 1]
    references: torch.Tensor  # features [P, R, D]

    @classmethod
    def read(cls, name: str, references: str, witness: Witness) -> Prompts:
        """Of a prompt file and a folder of references, or the names of shipped ones; UserError where one is missing."""
        texts = [prompt.text for prompt in load_prompts(shipped_path("held_out_prompts", name))]
        known = ReferenceSet.load(shipped_path("references", references), texts)
        count = min(len(known.files(text)) for text in texts)
        images = torch.cat([known.load_images(known.files(text)[:count]) for text in texts])
        _, features = witness.look(images, [text for text in texts for _ in range(count)])
        shape = (len(texts), count)
        return cls(texts, images.unflatten(0, shape), features.unflatten(0, shape))


def refuse_shared(tuning: Sequence[str], report: Sequence[str]) -> None:
    """UserError where a prompt on which guidance is chosen is reported on as well."""
    shared = set(tuning) & set(report)
    if shared:
        raise UserError(f"--tuning-prompts shares {len(shared)} prompts with --prompts, first {min(shared)!r}")


@torch.no_grad()
def draw(evaluator: Evaluator, texts: Sequence[str], scale: float, per_prompt: int, display: Display) -> torch.Tensor:
    """[P, K, 3, H, W] on the CPU: every prompt from noise that its number and the evaluator's seed key, at one guidance
    scale."""
    at_scale = replace(evaluator, settings=evaluator.settings.model_copy(update={"guidance_scale": scale}))
    images, at_once = [], max(1, evaluator.micro_batch // per_prompt)
    with display.steps(f"drawing at guidance {scale:g}", len(texts)) as tell:
        for start in range(0, len(texts), at_once):
            numbers = range(start, min(start + at_once, len(texts)))
            each = [texts[number] for number in numbers for _ in range(per_prompt)]
            ids = torch.cat([evaluator.ids(number, per_prompt) for number in numbers])
            images.append(at_scale.images(each, ids).cpu())
            tell(numbers.stop)
    return torch.cat(images).unflatten(0, (len(texts), per_prompt))


def repeated(texts: Sequence[str], images: torch.Tensor) -> list[str]:
    """The prompt of every image of [P, K, ...]."""
    return [text for text in texts for _ in range(images.shape[1])]


def point(images: torch.Tensor, prompts: Prompts, witness: Witness) -> Point:
    """What the witness makes of images [P, K, 3, H, W]."""
    verdicts, features = witness.look(images.flatten(0, 1), repeated(prompts.texts, images))
    shape = tuple(images.shape[:2])
    return Point.of(verdicts.view(shape), features.unflatten(0, shape), prompts.references)
