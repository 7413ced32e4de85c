"""What an iteration's images are worth: the adversary's score, fixed rewards, their composition, and how like the
references they are. Nothing here knows which adversary, observer or reward it is.

Shapes: B local images of this process, which may be none, G global ones of the iteration, by image number.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import torch

from advgrpo.adversary.augmentation import Augmentation
from advgrpo.adversary.base import Adversary, features_of_black
from advgrpo.adversary.reference_features import ReferenceFeatures, reference_draws
from advgrpo.config import NEED_REFERENCES, RewardSection, RolloutSection
from advgrpo.data.per_reference import PerReference
from advgrpo.data.references import ReferenceSet
from advgrpo.monitor.image_statistics import PROMPTS_IN_MEMORY, REFERENCES_LOOKED_AT, reference_statistics
from advgrpo.reporting.metric_names import OF_REFERENCES
from advgrpo.rewards.base import Reward
from advgrpo.rewards.compose import compose
from advgrpo.rewards.pool.reward import Begun, PooledReward
from advgrpo.runtime.cache import LastUsed
from advgrpo.runtime.distributed import Distributed
from advgrpo.runtime.transfer import to_device
from advgrpo.training.ahead import ReferencesAhead
from advgrpo.training.columns import Columns
from advgrpo.training.observer import DinoObserver
from advgrpo.types import Features, MicroBatchRollout, Rollout


@dataclass
class Scored:
    """Rewards of an iteration."""

    generated: Features | None  # [B] the adversary's features; None without an adversary
    reference: Features | None  # [B] the reference paired with each image
    embeddings: torch.Tensor | None  # [B, D] DINO class tokens, for independent statistics; None without a DINO
    rewards: torch.Tensor  # [G] float32, what the generator is trained on
    components: dict[str, torch.Tensor]  # [G] float32 each, raw; "adversary" and the fixed rewards
    reference_rewards: torch.Tensor | None  # [G] float32, the adversary's score of the references
    dino_similarity: float | None  # mean over all images
    of_references: dict[str, torch.Tensor]  # [G] float32 each, fixed rewards of the references of each image's prompt

    def metrics(self, group_size: int) -> dict[str, float]:
        spread = self.rewards.view(-1, group_size).std(dim=1, correction=0).mean()
        found = {"reward_generated": self.rewards.mean(), "reward_std": spread}
        if self.reference_rewards is not None:
            found["reward_reference"] = self.reference_rewards.mean()
        if list(self.components) != ["adversary"]:
            found |= {f"reward_{name}": reward.mean() for name, reward in self.components.items()}
        found |= {f"reward_{name}{OF_REFERENCES}": reward.mean() for name, reward in self.of_references.items()}
        values = torch.stack(list(found.values())).tolist()
        similarity = {} if self.dino_similarity is None else {"dino_similarity": self.dino_similarity}
        return {**dict(zip(found, values)), **similarity}


class ReferenceScores:
    """What a prompt's own references get from a fixed reward: the mean of a few, computed once per prompt.

    Rewards of different prompts differ more than a few iterations of training move them. Beside the references' of the
    same prompts a rise can be seen, and one far above them is not progress (monitor.py's reward_hacking). Left out are
    rewards that compare with the references themselves, and judges behind HTTP, whose time is not ours to spend
    (`scores_references` of a reward that is not known here).
    """

    def __init__(self, rewards: Mapping[str, Reward], references: ReferenceSet, device: torch.device):
        self.rewards = {
            name: reward
            for name, reward in rewards.items()
            if name not in NEED_REFERENCES and getattr(reward, "scores_references", True)
        }
        self.references, self.device = references, device
        self._means = PerReference(
            self._mean_scores, LastUsed(PROMPTS_IN_MEMORY), of_text=True, first=REFERENCES_LOOKED_AT
        )

    def missing(self, prompt: str, size: tuple[int, int]) -> list[Path]:
        """The references that would have to be decoded for the prompt."""
        return self._means.missing(self.references, prompt, size) if self.rewards else []

    def columns(self, prompts: list[str], size: tuple[int, int]) -> dict[str, torch.Tensor]:
        """name -> [len(prompts)] float32 on the device; the references are resized to `size`, (height, width)."""
        if not self.rewards:
            return {}
        rows = [self._means.of_prompt(self.references, prompt, size) for prompt in prompts]
        return {name: torch.stack([row[name] for row in rows]) for name in self.rewards}

    def _mean_scores(self, batches: list[torch.Tensor], prompt: str) -> dict[str, torch.Tensor]:
        images = torch.cat(batches).to(self.device)
        return {
            name: reward.score(images, [prompt] * len(images), None).to(self.device).float().mean()
            for name, reward in self.rewards.items()
        }


@dataclass
class Scorer:
    """Scores rollouts.

    Args:
        rollout: how many images there are, and in which groups.
        seed: of the run.
        adversary: the learned reward, or None.
        reference_features: its features of the references, when there is one.
        rewards: fixed rewards by name.
        weights: sections of `rewards` by name, the adversary's too: how they make one reward.
        references: the reference images, where the run has any.
        observer: looks at the images for statistics; it may look through the adversary's own backbone.
        watches: whether what the references would get is of interest.
        size: height and width of the images; needed where workers decode references ahead of time.
    """

    rollout: RolloutSection
    seed: int
    adversary: Adversary | None
    reference_features: ReferenceFeatures | None
    rewards: Mapping[str, Reward]
    weights: Mapping[str, RewardSection]
    references: ReferenceSet | None
    observer: DinoObserver | None
    distributed: Distributed
    watches: bool = False
    size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        watched = self.references is not None and self.watches
        device = self.distributed.device
        self._of_references = ReferenceScores(self.rewards, self.references, device) if watched else None
        self._statistics = reference_statistics()
        self._ahead = self._references_ahead() if self.references is not None and self.references.workers else None
        self._begun: dict[str, list[Begun]] = {}  # by reward with workers: the rollout under way, as far as it is drawn

    def _references_ahead(self) -> ReferencesAhead:
        size = self.size
        assert self.references is not None
        assert size is not None
        embeddings = [*self.rewards.values(), *([self.observer.metric] if self.observer else [])]
        missing = [
            partial(each.of_references.missing, self.references)
            for each in embeddings
            if hasattr(each, "of_references")
        ]
        if self.reference_features is not None:
            missing.append(self.reference_features.missing)
        if self._of_references is not None:
            missing.append(partial(self._of_references.missing, size=size))
        if self.watches:
            missing.append(partial(self._statistics.missing, self.references, size=size))
        measure = partial(self._statistics.of_prompt, self.references, size=size)
        return ReferencesAhead(self.references, missing, measure if self.watches else None)

    def prefetch(self, prompts: list[str]) -> None:
        """A rollout begins: begin to load what scoring these prompts' images needs."""
        self._begun = {name: [] for name, reward in self.rewards.items() if isinstance(reward, PooledReward)}
        if self.reference_features is not None:
            self.reference_features.prefetch(prompts)
        if self._ahead is not None:
            self._ahead.begin(prompts)

    def begin(self, drawn: MicroBatchRollout) -> None:
        """Let the rewards that have workers begin with a micro-batch of the rollout, while the next one is drawn."""
        for name, begun in self._begun.items():
            reward = self.rewards[name]
            assert isinstance(reward, PooledReward)
            begun.append(reward.begin(drawn.images, drawn.micro_batch.captions))

    def reference_statistics(self, prompt: str, size: tuple[int, int]) -> torch.Tensor:
        """`image_statistics.reference_statistics` of a prompt's references."""
        assert self.references is not None
        if self._ahead is not None:
            self._ahead.finish()
        return self._statistics.of_prompt(self.references, prompt, size)

    def score(self, rollout: Rollout, iteration: int) -> Scored:
        """Every reward of every image under the adversary as it stands, gathered over processes.

        Processes may take very different times to sample and to score (a slow judge, references seen for the first
        time): they wait for each other before the gather, for as long as each of them moves on.

        Raises:
            FloatingPointError: a reward of an image or a reference is not finite; names it and the prompt.
            CollectiveError: a process has not come any further for too long; names it and the reward.
            StopRequested: somebody asked for the end.
        """
        generated = reference = None
        if self._ahead is not None:
            self._ahead.asked()
        with self.distributed.monitored("sample and score"):
            if self.adversary is not None:
                generated, reference = self._features(rollout, iteration)
            columns, embeddings = self._columns(rollout, generated, reference, iteration)
        everywhere = columns.gathered(rollout.image_ids, self.distributed)
        _check_finite(everywhere, rollout, self.rollout.group_size)
        return Scored(
            generated,
            reference,
            embeddings,
            compose(everywhere.rewards, self.weights, self.rollout.group_size),
            everywhere.rewards,
            everywhere.paired,
            None if everywhere.similarity is None else everywhere.similarity.mean().item(),
            everywhere.of_references,
        )

    def totals(self, drawn: Iterable[MicroBatchRollout], iteration: int, group_size: int) -> torch.Tensor:
        """[G] float32: the generator's reward of images in groups of `group_size`, by image number, and nothing else.

        Each micro-batch that this process judges is scored as it is drawn and then let go of. The same image gets the
        same reward as from `score` up to rounding: all that is drawn for it is keyed by `MicroBatch.draws`.

        Raises:
            As `score`.
        """
        parts: list[dict[str, torch.Tensor]] = []
        seen: list[MicroBatchRollout] = []
        if self._ahead is not None:
            self._ahead.asked()
        with self.distributed.monitored("draw and score scouts"):
            for micro_batch in drawn:
                if not micro_batch.micro_batch.judged:
                    continue
                rollout = Rollout([micro_batch])
                rewards = self._fixed_rewards(rollout)
                if self.adversary is not None:
                    features = self._generated(rollout, iteration)
                    rewards["adversary"] = self._adversary_reward(features, rollout.draws, "reward", iteration)
                parts.append(rewards)
                seen.append(
                    replace(micro_batch, steps=[], images=micro_batch.images.sum())
                )  # which tells if all are finite
        none = self._no_rewards()
        columns = Columns({name: torch.cat([none[name], *(part[name] for part in parts)]) for name in none})
        rollout = Rollout(seen)
        everywhere = columns.gathered(rollout.image_ids, self.distributed)
        _check_finite(everywhere, rollout, group_size)
        return compose(everywhere.rewards, self.weights, group_size)

    def _columns(
        self, rollout: Rollout, generated: Features | None, reference: Features | None, iteration: int
    ) -> tuple[Columns, torch.Tensor | None]:
        """(columns [B], DINO class tokens [B, D] or None) of this process's images."""
        if not rollout.micro_batches:
            return self._no_columns()
        columns = Columns()
        if self.adversary is not None:
            draws = rollout.draws
            columns.rewards["adversary"] = self._adversary_reward(generated, draws, "reward", iteration)
            columns.paired = self._adversary_reward(reference, draws, "reference", iteration)
        columns.rewards |= self._fixed_rewards(rollout)
        if self._of_references is not None:
            self.distributed.step("rewards of the references")
            size = tuple(rollout.micro_batches[0].images.shape[-2:])
            columns.of_references = self._of_references.columns(rollout.prompts, size)
        self.distributed.step("DINO similarity")
        if self.observer is None:
            return columns, None
        looked = self.observer.look(rollout, self.references, generated, self.reference_features)
        embeddings, columns.similarity = looked
        return columns, embeddings

    def _no_columns(self) -> tuple[Columns, torch.Tensor | None]:
        """What `_columns` gives of no images: the same names and widths, for those who gather them."""
        none, rewards = torch.zeros(0, device=self.distributed.device), self._no_rewards()
        of_references = {} if self._of_references is None else dict.fromkeys(self._of_references.rewards, none)
        columns = Columns(rewards, rewards.get("adversary"), of_references)
        if self.observer is None:
            return columns, None
        columns.similarity = None if self.references is None else none
        return columns, none.new_zeros(0, self.observer.backbone.width)

    def _no_rewards(self) -> dict[str, torch.Tensor]:
        """[0] float32 each: the rewards of no images, in the order of the columns."""
        names = [*([] if self.adversary is None else ["adversary"]), *self.rewards]
        return dict.fromkeys(names, torch.zeros(0, device=self.distributed.device))

    def _features(self, rollout: Rollout, iteration: int) -> tuple[Features, Features]:
        """The adversary's features of every image, computed once, and of one reference each, from the cache."""
        if not rollout.micro_batches:
            return self._no_features
        generated = self._generated(rollout, iteration)
        self.distributed.step("reward adversary: references")
        return generated, self.reference_features.pick(rollout.prompts, self._reference_draws(rollout, iteration))

    @cached_property
    def _no_features(self) -> tuple[Features, Features]:
        """What `_features` gives of no images: the same names, widths and dtypes."""
        black = features_of_black(self.adversary)
        nobody = torch.zeros(0, dtype=torch.int64, device=black.device)
        return black.rows(nobody), self.adversary.cached_features(black).rows(nobody)

    def _generated(self, rollout: Rollout, iteration: int) -> Features:
        """The adversary's features of every image [B], as it sees them."""
        micro_batches = self.distributed.stoppable(rollout.micro_batches, "reward adversary: micro-batch")
        augmented = Augmentation(self.adversary.config.augment, self.seed).generated
        return Features.cat(
            [
                self.adversary.features(augmented(t.images, t.micro_batch.draws, iteration), t.micro_batch.captions)
                for t in micro_batches
            ]
        )

    def _reference_draws(self, rollout: Rollout, iteration: int) -> torch.Tensor:
        """[B] in [0, 1): which of its prompt's references each image is paired with (adversary.reference_choice)."""
        return reference_draws(
            self.adversary.config.reference_choice,
            self.references,
            rollout.prompts,
            rollout.image_ids,
            rollout.image_ids % self.rollout.group_size,
            total=self.rollout.images,
            seed=self.seed,
            iteration=iteration,
            views=Augmentation(self.adversary.config.augment, self.seed).views,
        )

    def _adversary_reward(self, features: Features, draws: torch.Tensor, purpose: str, iteration: int) -> torch.Tensor:
        """[B]; `draws` [B] int64 on the host key the patches that are looked at."""
        keys = to_device(draws, features.device)
        return self.adversary.score(features, keys, purpose=purpose, iteration=iteration).reward

    def _fixed_rewards(self, rollout: Rollout) -> dict[str, torch.Tensor]:
        """[B] each: the fixed rewards. They alone get the images in one piece, a copy that is gone afterwards."""
        if not self.rewards:
            return {}
        images = torch.cat([micro_batch.images for micro_batch in rollout.micro_batches])
        columns = {}
        for name, reward in self.rewards.items():
            self.distributed.progress(f"reward {name}")
            with self.distributed.interruptible():
                begun = self._begun.pop(name, [])
                if begun and isinstance(reward, PooledReward):
                    columns[name] = reward.finish(begun, images.device)
                else:
                    columns[name] = reward.score(images, rollout.prompts, self.references).to(images.device)
        return columns


def _check_finite(columns: Columns, rollout: Rollout, group_size: int) -> None:
    """FloatingPointError naming the first of the gathered columns, and its prompt, that has a value without meaning."""
    described = columns.described()
    finite = torch.stack([torch.isfinite(values) for values in described.values()])
    if bool(finite.all()):
        return
    local = dict(zip(rollout.image_ids.tolist(), rollout.prompts))
    for what, values in described.items():
        bad = (~torch.isfinite(values)).nonzero().flatten().tolist()
        if bad:
            first = next((i for i in bad if i in local), bad[0])  # one whose prompt this process knows
            named = f"prompt {local[first]!r}" if first in local else f"group {first // group_size}"
            raise FloatingPointError(
                f"{what} of {len(bad)} images is not finite, first that of {named} (image {first}): "
                f"{values[first]}. No score is made up for it; {_to_blame(rollout)}"
            )


def _to_blame(rollout: Rollout) -> str:
    """What to look at: rewards of images that are not finite are no fault of the reward."""
    if all(bool(micro_batch.images.isfinite().all()) for micro_batch in rollout.micro_batches):
        return "check the reward model and its precision"
    return (
        "the images themselves are not finite: look at what drew them (rollout.guidance_scale, model.dtype, "
        "model.lora.start_from, update.learning_rate), not at the reward"
    )
