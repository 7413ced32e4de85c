"""What an iteration's images are worth: the adversary's score, fixed rewards, their composition, and how like the
references they are. Nothing here knows which adversary, observer or reward it is.

Shapes: B local images of this process, G global ones of the iteration, by image number.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from advgrpo.adversary.base import Adversary
from advgrpo.adversary.reference_features import ReferenceFeatures, reference_draws
from advgrpo.config import NEED_REFERENCES, Config
from advgrpo.data.references import ReferenceSet
from advgrpo.monitor.image_statistics import looked_at
from advgrpo.reporting.metric_names import OF_REFERENCES
from advgrpo.rewards.base import Reward
from advgrpo.rewards.compose import compose
from advgrpo.rewards.dino_similarity import DinoSimilarity
from advgrpo.rewards.reference_similarity import reference_cosine
from advgrpo.runtime.distributed import Distributed
from advgrpo.runtime.transfer import to_device
from advgrpo.types import Features, Rollout

_COLUMN = "_of_references_"  # prefix of columns that are gathered with the rewards


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

    def __init__(self, rewards: Mapping[str, Reward], references: ReferenceSet):
        self.rewards = {
            name: reward
            for name, reward in rewards.items()
            if name not in NEED_REFERENCES and getattr(reward, "scores_references", True)
        }
        self.references = references
        self._of_prompt: dict[tuple[str, tuple[int, int]], dict[str, torch.Tensor]] = {}

    def columns(self, prompts: list[str], like: torch.Tensor) -> dict[str, torch.Tensor]:
        """name -> [len(prompts)] float32 on the device of `like` [B, 3, H, W], whose size the references get."""
        if not self.rewards:
            return {}
        rows = [self._prompt(prompt, like) for prompt in prompts]
        return {name: torch.stack([row[name] for row in rows]) for name in self.rewards}

    def _prompt(self, prompt: str, like: torch.Tensor) -> dict[str, torch.Tensor]:
        key = (prompt, tuple(like.shape[-2:]))
        if key not in self._of_prompt:
            images = looked_at(self.references, *key).to(like.device)
            self._of_prompt[key] = {
                name: reward.score(images, [prompt] * len(images), None).to(like.device).float().mean()
                for name, reward in self.rewards.items()
            }
        return self._of_prompt[key]


@dataclass
class Scorer:
    """Scores rollouts.

    Args:
        adversary: the learned reward, or None.
        reference_features: its features of the references, when there is one.
        rewards: fixed rewards by name.
        references: the reference images, where the run has any.
        observer: DINO for statistics that no reward is trained on; it may look through the adversary's own backbone.
    """

    config: Config
    adversary: Adversary | None
    reference_features: ReferenceFeatures | None
    rewards: Mapping[str, Reward]
    references: ReferenceSet | None
    observer: DinoSimilarity | None
    distributed: Distributed

    def __post_init__(self) -> None:
        watched = self.references is not None and self.config.monitor.every > 0
        self._of_references = ReferenceScores(self.rewards, self.references) if watched else None
        backbone = None if self.adversary is None else self.adversary.backbone
        self._shared = self.observer is not None and self.observer.backbone is backbone  # its features exist already

    def prefetch(self, prompts: list[str]) -> None:
        """Begin to load what scoring these prompts' images needs."""
        if self.reference_features is not None:
            self.reference_features.prefetch(prompts)

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
        with self.distributed.monitored("sample and score"):
            if self.adversary is not None:
                generated, reference = self._features(rollout, iteration)
            columns, embeddings = self._columns(rollout, generated, reference, iteration)
        by_id = self._gathered(columns, rollout)
        _check_finite(by_id, rollout, self.config)
        reference_rewards, similarity = by_id.pop("_reference", None), by_id.pop("_similarity", None)
        own = [name for name in by_id if name.startswith(_COLUMN)]
        of_references = {name.removeprefix(_COLUMN): by_id.pop(name) for name in own}
        return Scored(
            generated,
            reference,
            embeddings,
            compose(by_id, self.config.rewards.sections(), self.config.rollout.group_size),
            by_id,
            reference_rewards,
            None if similarity is None else similarity.mean().item(),
            of_references,
        )

    def _columns(self, rollout: Rollout, generated: Features | None, reference: Features | None, iteration: int):
        """(name -> [B], DINO class tokens [B, D] or None) of this process's images."""
        columns: dict[str, torch.Tensor] = {}
        if self.adversary is not None:
            columns |= self._adversary_columns(rollout, generated, reference, iteration)
        columns |= self._fixed_columns(rollout)
        if self._of_references is not None:
            self.distributed.step("rewards of the references")
            found = self._of_references.columns(rollout.prompts, rollout.micro_batches[0].images)
            columns |= {f"{_COLUMN}{name}": column for name, column in found.items()}
        self.distributed.step("DINO similarity")
        embeddings, similar = self._similarity(rollout, generated)
        return columns if similar is None else {**columns, "_similarity": similar}, embeddings

    def _features(self, rollout: Rollout, iteration: int) -> tuple[Features, Features]:
        """The adversary's features of every image, computed once, and of one reference each, from the cache."""
        micro_batches = self.distributed.stoppable(rollout.micro_batches, "reward adversary: micro-batch")
        generated = Features.cat([self.adversary.features(t.images, t.micro_batch.captions) for t in micro_batches])
        self.distributed.step("reward adversary: references")
        return generated, self.reference_features.pick(rollout.prompts, self._reference_draws(rollout, iteration))

    def _reference_draws(self, rollout: Rollout, iteration: int) -> torch.Tensor:
        """[B] in [0, 1): which of its prompt's references each image is paired with (adversary.reference_choice)."""
        return reference_draws(
            self.config.adversary.reference_choice,
            self.references,
            rollout.prompts,
            rollout.image_ids,
            rollout.image_ids % self.config.rollout.group_size,
            total=self.config.images_per_iteration,
            seed=self.config.seed,
            iteration=iteration,
        )

    def _adversary_columns(self, rollout: Rollout, generated: Features, reference: Features, iteration: int):
        ids = to_device(rollout.image_ids, generated.device)
        sides = {"adversary": ("reward", generated), "_reference": ("reference", reference)}
        return {
            name: self.adversary.score(features, ids, purpose=purpose, iteration=iteration).reward
            for name, (purpose, features) in sides.items()
        }

    def _fixed_columns(self, rollout: Rollout) -> dict[str, torch.Tensor]:
        """[B] each: the fixed rewards. They alone get the images in one piece, a copy that is gone afterwards."""
        if not self.rewards:
            return {}
        images = torch.cat([micro_batch.images for micro_batch in rollout.micro_batches])
        columns = {}
        for name, reward in self.rewards.items():
            self.distributed.progress(f"reward {name}")
            with self.distributed.interruptible():
                columns[name] = reward.score(images, rollout.prompts, self.references).to(images.device)
        return columns

    def _similarity(self, rollout: Rollout, generated: Features | None):
        """(class tokens [B, D], cosine to the own references [B]), each None where there is nothing to tell it by."""
        if self.observer is None:
            return None, None
        if self._shared:
            embeddings, own = generated["cls"], self.reference_features.prompt
            return embeddings, reference_cosine(embeddings, rollout.prompts, lambda prompt: own(prompt)["cls"])
        embeddings = torch.cat([self.observer.embed(micro_batch.images) for micro_batch in rollout.micro_batches])
        if self.references is None:
            return embeddings, None
        return embeddings, self.observer.cosine(embeddings, rollout.prompts, self.references)

    def _gathered(self, columns: dict[str, torch.Tensor], rollout: Rollout) -> dict[str, torch.Tensor]:
        """[G] each, by image number: one gather for all of them."""
        table = torch.stack([column.float() for column in columns.values()], dim=1)
        ids = self.distributed.all_gather(to_device(rollout.image_ids, table.device))
        return dict(zip(columns, self.distributed.all_gather(table)[ids.argsort()].unbind(1)))


def _check_finite(columns: Mapping[str, torch.Tensor], rollout: Rollout, config: Config) -> None:
    """FloatingPointError naming the first of the gathered columns, and its prompt, that has a value without meaning."""
    finite = torch.stack([torch.isfinite(values) for values in columns.values()])
    if bool(finite.all()):
        return
    local = dict(zip(rollout.image_ids.tolist(), rollout.prompts))
    for name, values in columns.items():
        bad = (~torch.isfinite(values)).nonzero().flatten().tolist()
        if bad:
            first = next((i for i in bad if i in local), bad[0])  # one whose prompt this process knows
            named = f"prompt {local[first]!r}" if first in local else f"group {first // config.rollout.group_size}"
            raise FloatingPointError(
                f"{_what(name)} of {len(bad)} images is not finite, first that of {named} (image {first}): "
                f"{values[first]}. No score is made up for it; {_to_blame(rollout)}"
            )


def _what(column: str) -> str:
    """A gathered column in the user's words."""
    if column == "_reference":
        return "the reward adversary of the references"
    if column == "_similarity":
        return "the DINO similarity to the references"
    if column.startswith(_COLUMN):
        return f"the reward {column.removeprefix(_COLUMN)} of the references"
    return f"the reward {column}"


def _to_blame(rollout: Rollout) -> str:
    """What to look at: rewards of images that are not finite are no fault of the reward."""
    if all(bool(micro_batch.images.isfinite().all()) for micro_batch in rollout.micro_batches):
        return "check the reward model and its precision"
    return (
        "the images themselves are not finite: look at what drew them (rollout.guidance_scale, model.dtype, "
        "model.lora.start_from, update.learning_rate), not at the reward"
    )
