"""A discriminator that serves others: it scores their images, collects them, and learns as in a run of our own.

An iteration is the images that one state of somebody's generator made, posted in any number of requests by any number
of processes. Scores are given at once, under the head as it stands. When the iteration is complete the schedule
decides, and the head trains on exactly these images with one reference drawn for each, by the trainer's own
`DiscriminatorTrainer` and with its seeds. Images are numbered from 0 in an iteration, by who posts them or in the order
of arrival; the numbers key every draw, so only the first makes the draws independent of that order.

Nothing here is safe for several threads: `server.py` calls all of it, but for `status`, from one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from advgrpo.adversary.base import Adversary
from advgrpo.adversary.reference_features import ReferenceFeatures, reference_draws
from advgrpo.adversary.trainer import DiscriminatorBatch, DiscriminatorTrainer, paired_accuracy
from advgrpo.config import Config
from advgrpo.data.references import ReferenceSet
from advgrpo.errors import UserError
from advgrpo.monitor.monitor import Knobs, Monitor, OverpoweredAdversary, RewardCollapse, SleepingAdversary
from advgrpo.rewards.checks import finite_scores
from advgrpo.rewards.remote import PROTOCOL_VERSION
from advgrpo.rewards.scoring_request import Refusal
from advgrpo.runtime.transfer import to_device
from advgrpo.types import Features

Record = dict[str, float | int | None]
_WATCHED = (RewardCollapse, OverpoweredAdversary, SleepingAdversary)  # red flags that need no generator of ours
_SOON = "1"  # seconds after which a request that came too early may come again


class Asked(BaseModel):
    """What a request says beside its images and prompts."""

    model_config = ConfigDict(strict=True, frozen=True)

    collect: bool = False  # learn from the images; else they are scored and forgotten
    iteration: int | None = Field(None, ge=0)  # that they belong to; None: the one that is collected now
    sample_ids: list[int] | None = None  # their numbers in the iteration; None: the next that are free
    request: str = Field("", max_length=200)  # a name of this request's own, which a repetition has too

    @field_validator("sample_ids")
    @classmethod
    def _distinct(cls, ids: list[int] | None) -> list[int] | None:
        if ids is not None and (len(set(ids)) < len(ids) or min(ids, default=0) < 0):
            raise ValueError("want different numbers from 0")
        return ids

    @classmethod
    def read(cls, request: Mapping[str, Any], count: int) -> Asked:
        """Of a request's JSON object with `count` images; Refusal for entries of another kind, or that lack others."""
        try:
            asked = cls.model_validate({name: request[name] for name in cls.model_fields if name in request})
        except ValidationError as error:
            first = error.errors()[0]
            raise Refusal(f'"{first["loc"][0]}": {first["msg"]}') from None
        if asked.sample_ids is not None and len(asked.sample_ids) != count:
            raise Refusal(f"{count} images but {len(asked.sample_ids)} sample_ids")
        if asked.collect and not asked.request and (asked.sample_ids is None or asked.iteration is None):
            raise Refusal(
                'a request with "collect" needs a name, "request", or both "iteration" and "sample_ids": without, one '
                "that is sent again would be collected twice"
            )
        if not asked.collect and (asked.iteration is not None or asked.request):
            raise Refusal('"iteration" and "request" belong to "collect": true')
        return asked

    @property
    def key(self) -> str:
        """What a repetition of a collected request has in common with it."""
        return f"request {self.request}" if self.request else f"iteration {self.iteration} ids {self.sample_ids}"


class Answer(BaseModel):
    """What a collected request was answered."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    key: str  # of `Asked`
    digest: str  # of the images and prompts
    iteration: int = Field(ge=0)
    ids: list[int]  # numbers of the images
    scores: list[float]


@dataclass(frozen=True)
class Sizes:
    """Of an iteration.

    Args:
        images: that make it complete.
        batch_size: images whose features are computed at once.
        optimizer_steps: of the generator, for schedule "ratio".
    """

    images: int
    batch_size: int
    optimizer_steps: int

    def settings(self, config: Config) -> dict[str, Any]:
        """What results depend on beside images and references, as JSON."""
        return {"adversary": config.adversary.model_dump(mode="json"), "seed": config.seed, **asdict(self)}


@dataclass
class Collected:
    """The images of one request."""

    answer: Answer
    prompts: list[str]
    images: torch.Tensor  # [B, 3, H, W] uint8 on the host: a checkpoint keeps them, features are computed again
    features: Features  # [B] of the adversary


class AdversaryService:
    """Scores, collects, learns.

    Args:
        config: sections adversary and monitor, and the seed; nothing else is looked at.
        features: the adversary's features of `references`.

    Attributes:
        learned: told after every iteration, with its record.
    """

    def __init__(
        self,
        config: Config,
        adversary: Adversary,
        references: ReferenceSet,
        features: ReferenceFeatures,
        sizes: Sizes,
    ):
        self.config, self.adversary, self.references = config, adversary, references
        self.sizes, self.images = sizes, sizes.images
        self.name = f"adversary {config.adversary.kind}"
        self.reference_features = features
        self.discriminator_trainer = DiscriminatorTrainer(adversary, reduce=lambda _: None, rank=0, world_size=1)
        self.monitor = Monitor(config.monitor, Knobs.of(config))
        self.monitor.red_flags = [flag for flag in self.monitor.red_flags if isinstance(flag, _WATCHED)]
        self.learned: Callable[[Record], None] = lambda _: None
        self.iteration = 0  # the one that is collected
        self.collected: list[Collected] = []
        self.before: dict[str, Answer] = {}  # of the iteration before, whose last requests may be sent again
        self.newest: Record | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """See `Sizes.settings`."""
        return self.sizes.settings(self.config)

    @property
    def count(self) -> int:
        """Images collected."""
        return sum(len(each.prompts) for each in list(self.collected))

    def status(self) -> dict[str, Any]:
        """Where it stands, as JSON; from any thread."""
        return {
            "reward": self.name,
            "version": PROTOCOL_VERSION,
            "iteration": self.iteration,
            "collected": self.count,
            "images": self.images,
            "newest": self.newest,
            "flags": [str(flag) for flag in self.monitor.active()],
        }

    def score(self, images: torch.Tensor, prompts: list[str], asked: Asked, digest: str) -> tuple[int, list[float]]:
        """The images' scores, after which they may be collected.

        Args:
            images: [B, 3, H, W] float32, multiples of 1/255.
            digest: of images and prompts; a request that is sent again has the same.

        Returns:
            The iteration that they belong to, and B scores. A request that was collected before gets its old answer.

        Raises:
            Refusal: of an iteration that is over (409) or not begun (503, it may come again), numbers that are taken,
                or more images than the iteration lacks.
            UserError: a prompt without references.
            FloatingPointError: a score is not finite; nothing was collected.
        """
        if not asked.collect:
            ids = list(range(len(prompts))) if asked.sample_ids is None else asked.sample_ids
            return self.iteration, self._scored(images, prompts, ids)[1]
        known = self._known(asked, digest)
        if known is None:
            self._check_turn(asked)
            for prompt in dict.fromkeys(prompts):
                self.references.files(prompt)
            ids = self._numbers(asked, len(prompts))
            features, scores = self._scored(images, prompts, ids)
            known = Answer(key=asked.key, digest=digest, iteration=self.iteration, ids=ids, scores=scores)
            stored = (images * 255).round().byte().cpu()
            self.collected.append(Collected(known, prompts, stored, features))
        return known.iteration, known.scores

    def settle(self) -> None:
        """Learn if the iteration is complete; whatever it raises, the discriminator cannot be trusted any more."""
        if self.count >= self.images:
            self._learn()

    def end(self, iteration: int, *, discard: bool) -> dict[str, Any]:
        """End the iteration with the images that there are, or forget them and begin it anew.

        Returns:
            The iteration that is collected now, and the record of the one that was ended.

        Raises:
            Refusal: another iteration than the one that is collected, or nothing to learn from.
        """
        over = self.newest is not None and iteration == self.iteration - 1 == self.newest["iteration"]
        if over and not discard:  # sent again, or the last image has ended it
            return {"iteration": self.iteration, "record": self.newest}
        if iteration != self.iteration:
            raise Refusal(f"iteration {self.iteration} is collected, not {iteration}", 409)
        if discard:
            self.collected = []
            return {"iteration": self.iteration, "record": None}
        if not self.collected:
            raise Refusal(f"iteration {self.iteration} has no images to learn from", 409)
        return {"iteration": self.iteration + 1, "record": self._learn()}

    def restore(self, collected: list[Collected]) -> None:
        """Take over images of a checkpoint; their features are computed anew, in the same batches."""
        for each in collected:
            images = each.images.float().div_(255)
            each.features = self._features(images, each.prompts, each.answer.ids, each.answer.iteration)
        self.collected = collected

    def _known(self, asked: Asked, digest: str) -> Answer | None:
        """The answer to a request that was collected; Refusal where only its name was."""
        known = {each.answer.key: each.answer for each in self.collected}.get(asked.key) or self.before.get(asked.key)
        if known is not None and known.digest != digest:
            raise Refusal(
                f"{asked.key} was collected before, with other images; every request has a name of its own", 409
            )
        return known

    def _check_turn(self, asked: Asked) -> None:
        if asked.iteration is None or asked.iteration == self.iteration:
            return
        if asked.iteration < self.iteration:
            raise Refusal(f"iteration {asked.iteration} is over; iteration {self.iteration} is collected", 409)
        there = f"iteration {self.iteration} has {self.count} of {self.images} images"
        remedy = f"send it when that is complete, or end it (POST /end) before iteration {asked.iteration}"
        raise Refusal(f"{there}; {remedy}", 503, Retry_After=_SOON)

    def _numbers(self, asked: Asked, count: int) -> list[int]:
        """The images' numbers in the iteration: those given, or the next that are free."""
        taken = {number for each in self.collected for number in each.answer.ids}
        if count > self.images - len(taken):
            raise Refusal(
                f"iteration {self.iteration} lacks {self.images - len(taken)} of {self.images} images, the request has "
                f"{count}; start the server with --images as many as an iteration of yours has",
                409,
            )
        if asked.sample_ids is None:
            return [number for number in range(self.images) if number not in taken][:count]
        for number in asked.sample_ids:
            if number in taken or number >= self.images:
                why = "was collected before" if number in taken else f"is not below --images {self.images}"
                raise Refusal(f"sample_ids: {number} {why} (iteration {self.iteration})", 409)
        return asked.sample_ids

    def _scored(self, images: torch.Tensor, prompts: list[str], ids: list[int]) -> tuple[Features, list[float]]:
        features = self._features(images, prompts, ids, self.iteration)
        scores = self._rewards(features, torch.tensor(ids), "reward")
        return features, finite_scores(scores, images, prompts, self.name).tolist()

    def _features(self, images: torch.Tensor, prompts: list[str], ids: list[int], iteration: int) -> Features:
        images = self.reference_features.augmentation.generated(images, torch.tensor(ids), iteration)
        size = self.sizes.batch_size
        parts = [slice(first, first + size) for first in range(0, len(prompts), size)]
        return Features.cat([self.adversary.features(images[part], prompts[part]) for part in parts])

    def _rewards(self, features: Features, ids: torch.Tensor, purpose: str) -> torch.Tensor:
        ids = to_device(ids, self.adversary.device)
        return self.adversary.score(features, ids, purpose=purpose, iteration=self.iteration).reward

    def _learn(self) -> Record:
        """The iteration's end: what `Scorer` and `Trainer` do with its images, then the next begins."""
        started = time.perf_counter()
        batch, prompts, groups = self._batch()
        sides = [
            self._rewards(features, batch.image_ids, purpose)
            for purpose, features in (("reward", batch.generated), ("reference", batch.reference))
        ]
        # columns of one table, as the trainer gathers them: a sum over a strided column rounds in another order
        rewards = torch.stack([each.float() for each in sides], dim=1).unbind(1)
        if not bool(rewards[1].isfinite().all()):  # those of the images were looked at when they came
            raise FloatingPointError(
                f"iteration {self.iteration}: the reward {self.name} of the references is not finite; check the model "
                "and its precision (adversary.dtype)"
            )
        plan, metrics = self.discriminator_trainer.learn(
            batch,
            rewards,
            _paired_accuracy(*rewards, groups),
            self.iteration,
            optimizer_steps=self.sizes.optimizer_steps,
            agree=lambda numbers: numbers,
            gather=lambda tensor: tensor,
        )
        record = {
            "iteration": self.iteration,
            "images": len(prompts),
            "reward_generated": rewards[0].mean().item(),
            "reward_reference": rewards[1].mean().item(),
            **metrics,
            "train_generator": int(plan.generator),
            "seconds": time.perf_counter() - started,
        }
        if self.monitor.due(self.iteration):
            self.monitor.check(record)
        self.before = {each.answer.key: each.answer for each in self.collected}
        self.collected, self.newest = [], record
        self.iteration += 1
        self.learned(record)
        return record

    def _batch(self) -> tuple[DiscriminatorBatch, list[str], list[list[int]]]:
        """(what the head learns from, the prompts, which images are of one prompt), by image number.

        An iteration that was ended early may lack numbers; those that are there then move together.
        """
        rows = [(number, each, row) for each in self.collected for row, number in enumerate(each.answer.ids)]
        rows.sort(key=lambda entry: entry[0])
        prompts, ids = [each.prompts[row] for _, each, row in rows], torch.arange(len(rows))
        groups: dict[str, list[int]] = {}
        places = torch.zeros_like(ids)
        for number, prompt in enumerate(prompts):
            group = groups.setdefault(prompt, [])
            places[number] = len(group)
            group.append(number)
        generated = Features(
            {
                name: torch.cat([each.features[name][row : row + 1] for _, each, row in rows])
                for name in rows[0][1].features.tensors
            }
        )
        draws = reference_draws(
            self.config.adversary.reference_choice,
            self.references,
            prompts,
            ids,
            places,
            total=len(rows),
            seed=self.config.seed,
            iteration=self.iteration,
            views=self.reference_features.augmentation.views,
        )
        reference = self.reference_features.pick(prompts, draws)
        return DiscriminatorBatch(ids, generated, reference, total=len(rows)), prompts, list(groups.values())


def _paired_accuracy(generated: torch.Tensor, reference: torch.Tensor, groups: list[list[int]]) -> torch.Tensor:
    """`paired_accuracy` of images of one prompt, however many of each there are and wherever they stand."""
    if len({len(group) for group in groups}) == 1:
        index = torch.tensor(groups, device=generated.device).flatten()
        return paired_accuracy(generated[index], reference[index], len(groups[0]))
    return torch.stack([paired_accuracy(generated[group], reference[group], len(group)) for group in groups]).mean()


def restored_answers(entries: list[Any], where: str) -> list[Answer]:
    """Of a checkpoint's JSON; UserError naming `where` for anything else."""
    try:
        found = [Answer.model_validate(entry) for entry in entries]
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{where} in state.json is damaged: {first['msg']}") from None
    if any(len(answer.ids) != len(answer.scores) for answer in found):
        raise UserError(f"{where} in state.json is damaged: as many scores as ids are wanted")
    return found
