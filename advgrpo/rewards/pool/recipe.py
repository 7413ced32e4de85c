"""A reward as what it is built from, to be sent to a process that builds it there, and who has it there."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from advgrpo.errors import RunFailure, UserError
from advgrpo.rewards import build_reward
from advgrpo.rewards.custom import CustomReward

if TYPE_CHECKING:
    from advgrpo.rewards.base import Reward

RAISED = {"user": UserError, "run": RunFailure, "finite": FloatingPointError, "unusable": ValueError}


@dataclass(frozen=True)
class Recipe:
    """What a reward is built from; plain values alone."""

    kind: str  # of rewards.REWARDS
    name: str  # the key of its metrics
    owner: str  # how errors call its settings, such as "rewards.ocr"
    device: str
    dtype: str  # of its models, as torch calls it: "float32"
    options: Mapping[str, Any]  # of a custom reward its own, else of the section
    source: str = ""  # where a custom reward is: "file.py:NAME"
    metadata: Mapping[str, Mapping[str, Any]] | None = None  # of the prompt file, for a custom reward

    def build(self) -> Reward:
        """UserError as `build_reward` and `CustomReward`."""
        dtype = getattr(torch, self.dtype)
        if self.kind != "custom":
            return build_reward(self.kind, device=self.device, dtype=dtype, owner=self.owner, **self.options)
        return CustomReward(
            self.source,
            name=self.name,
            options=self.options,
            owner=self.owner,
            metadata=self.metadata,
            device=self.device,
            dtype=dtype,
        )


@dataclass(frozen=True)
class Task:
    """Images to be scored.

    `images` [B, 3, H, W] float32 in [0, 1], one prompt each; `seed` is for the generators of torch, numpy and random,
    so that a reward which draws from them gives the same whoever scores, and when they are scored again.
    """

    images: np.ndarray
    prompts: list[str]
    seed: int


class Host:
    """Who has the reward in a worker: asked by (method, argument), ("build", Recipe) first.

    Answers are ("ok", value), or a kind of `RAISED` and the message of what was raised: an error of another package
    may have a type that nobody else can load.
    """

    def __init__(self) -> None:
        self._name = ""
        self._built: tuple[Reward, torch.device] | None = None

    def answer(self, method: str, argument: Any) -> tuple[str, Any]:
        try:
            return "ok", getattr(self, f"_{method}")(argument)
        except tuple(RAISED.values()) as error:
            return next(kind for kind, raised in RAISED.items() if isinstance(error, raised)), str(error)
        except (Exception, SystemExit) as error:
            return "run", f"reward {self._name}: {type(error).__name__}: {error}"

    def _build(self, recipe: Recipe) -> bool:
        """Whether the reward may be asked what the references would get (training/scoring.py)."""
        self._name = recipe.name
        self._built = recipe.build(), torch.device(recipe.device)
        return getattr(self._built[0], "scores_references", True)

    @property
    def _own(self) -> tuple[Reward, torch.device]:
        assert self._built is not None, "the first question is to build it"
        return self._built

    def _check_prompts(self, prompts: list[str]) -> None:
        self._own[0].check_prompts(prompts)

    @torch.no_grad()
    def _score(self, task: Task) -> list[float]:
        """B scores, float32 in value; errors as `Reward.score`."""
        torch.manual_seed(task.seed)
        random.seed(task.seed)
        np.random.seed(task.seed % 2**32)
        reward, device = self._own
        images = torch.from_numpy(task.images).to(device)
        return reward.score(images, task.prompts, None).float().tolist()
