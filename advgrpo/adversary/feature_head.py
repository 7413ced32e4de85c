"""An adversary that is a small head on frozen features (arXiv 2511.20256, eqs. 9-14), whatever the backbone.

Features are computed once per image and serve the reward, the head's training and the similarity metric alike; there
is one head forward (`score_features`).

Shapes: B images [B, 3, H, W] float32 in [0, 1]; features cls [B, D], patches [B, P, D].
"""

from __future__ import annotations

from typing import Protocol

import torch

from advgrpo.adversary.base import image_weights
from advgrpo.adversary.discriminator_adam import DiscriminatorAdam, forget_moments
from advgrpo.adversary.gradient_penalty import r1_penalty
from advgrpo.adversary.head import Head
from advgrpo.config import AdversarySection
from advgrpo.errors import UserError
from advgrpo.runtime import rng
from advgrpo.types import Features
from advgrpo_kernels import (
    FeatureScore,
    HingeHeadLoss,
    PatchSample,
    hinge_head_loss,
    philox_integers,
    philox_permutation,
    sample_patches,
    score_features,
)

_BIAS_GRADIENT_NOISE = 1e-6  # rounding reaches 2e-7; real values are 3e-6 and more up to 768 images of 64 patches


class FrozenBackbone(Protocol):
    """A frozen network that describes images: DinoBackbone, SiglipBackbone."""

    device: torch.device
    width: int  # D
    num_patches: int  # P

    @property
    def cache_key(self) -> str:
        """What `features` depends on beside the image."""
        ...

    def features(self, images: torch.Tensor) -> Features:
        """ "cls" [B, D] and "patches" [B, P, D] of images, without gradient."""
        ...


class FeatureHeadAdversary:
    """`base.Adversary` of frozen features: a head on the pooled feature and on random patches learns.

    Args:
        config: section `adversary`.
        backbone: what looks at images.
        seed: of the run.

    Raises:
        UserError: more patches per image than the backbone has or the reference cache keeps.
    """

    text_dependent = False

    def __init__(self, config: AdversarySection, backbone: FrozenBackbone, *, seed: int):
        self.config, self.backbone, self.seed = config, backbone, seed
        if config.num_patches > min(backbone.num_patches, config.cached_patches):
            raise UserError(
                f"adversary.num_patches = {config.num_patches} exceeds the backbone's {backbone.num_patches} "
                f"patches or adversary.cached_patches = {config.cached_patches}"
            )
        self.heads = [
            Head(
                backbone.width,
                config.hidden_size,
                seed=_initial_seed(seed, number),
                device=backbone.device,
                reward_ema=config.reward_ema,
                spectral_norm=config.spectral_norm,
            )
            for number in range(config.heads)
        ]
        self.optimizer = DiscriminatorAdam(self.parameters(), lr=config.learning_rate, betas=config.betas)

    @property
    def device(self) -> torch.device:
        return self.backbone.device

    @property
    def cache_key(self) -> str:
        return f"{self.backbone.cache_key}:{self.config.cached_patches}"

    @property
    def head(self) -> dict[str, torch.nn.Parameter]:
        """The weights that learn, by name, of the first head."""
        return self.heads[0].weights

    def parameters(self) -> list[torch.nn.Parameter]:
        return [parameter for head in self.heads for parameter in head.weights.values()]

    def features(self, images: torch.Tensor, prompts: list[str]) -> Features:
        """Frozen features "cls" [B, D] and "patches" [B, P, D] of images; the prompts are not looked at."""
        return self.backbone.features(images)

    @torch.no_grad()
    def score(self, features: Features, sample_ids: torch.Tensor, *, purpose: str, iteration: int):
        """FeatureScore of each image, the mean over heads; random patches are keyed by (purpose, iteration, sample id,
        head)."""
        seed = rng.derive_seed(self.seed, f"{purpose}_patches", iteration)
        scores = [
            score_features(
                features["cls"],
                features["patches"],
                self._sample(features["patches"], seed, _ids_of_head(sample_ids, number)).indices,
                head.rewarding(),
                weights=self.config.reward_weights,
                normalize=self.config.normalize != "never",
            )
            for number, head in enumerate(self.heads)
        ]
        return scores[0] if len(scores) == 1 else FeatureScore(*(torch.stack(each).mean(0) for each in zip(*scores)))

    def centre(self, generated: float, reference: float) -> None:
        """Nothing to do: the head's last layer has a bias, which the hinge moves."""

    def loss(self, reference: Features, generated: Features, *, total: int | None = None):
        """HingeHeadLoss, and the gradient penalty with it, the mean over heads, on features whose patches are already
        the chosen ones (`training_features`)."""
        results = [
            self._loss(head, self._of_head(reference, number), self._of_head(generated, number), total)
            for number, head in enumerate(self.heads)
        ]
        return results[0] if len(results) == 1 else HingeHeadLoss(*(torch.stack(each).mean() for each in zip(*results)))

    def _loss(self, head: Head, reference: Features, generated: Features, total: int | None) -> HingeHeadLoss:
        weights = head.learning()
        settings = {"weights": self.config.loss_weights, "normalize": self.config.normalize == "always", "total": total}
        sides = (reference["cls"], reference["patches"], generated["cls"], generated["patches"])
        counts = image_weights(reference, generated)
        result = hinge_head_loss(*sides, weights, image_weights=counts, **settings)
        if not self.config.gradient_penalty:
            return result
        of_references = None if counts is None else counts[0]
        penalty = r1_penalty(
            reference, weights, gamma=self.config.gradient_penalty, image_weights=of_references, **settings
        )
        return result._replace(loss=result.loss + penalty)

    def _of_head(self, features: Features, number: int) -> Features:
        """What one head looks at of `training_features`: its own patches."""
        if len(self.heads) == 1:
            return features
        own = slice(number * self.config.num_patches, (number + 1) * self.config.num_patches)
        return Features({**features.tensors, "patches": features["patches"][:, own]})

    def training_features(self, features: Features, sample_ids: torch.Tensor, seed: int | torch.Tensor) -> Features:
        """The features with `num_patches` random patches for each head, keyed by (seed, sample id, head)."""
        patches = features["patches"]
        if len(features) == 0:  # this process holds none of the drawn images
            count = self.config.num_patches * len(self.heads)
            return Features({"cls": features["cls"], "patches": patches.new_zeros(0, count, patches.shape[2])})
        drawn = [
            self._sample(patches, seed, _ids_of_head(sample_ids, number)).patches for number in range(len(self.heads))
        ]
        return Features({"cls": features["cls"], "patches": drawn[0] if len(drawn) == 1 else torch.cat(drawn, dim=1)})

    def _sample(self, patches: torch.Tensor, seed: int | torch.Tensor, sample_ids: torch.Tensor) -> PatchSample:
        """`num_patches` of each image's patches [B, P, D], as adversary.patch_sampling says."""
        count = self.config.num_patches
        if self.config.patch_sampling == "without_replacement":
            return sample_patches(patches, count, seed=seed, sample_ids=sample_ids)
        drawn = philox_integers(patches.shape[1], count, seed=seed, sample_ids=sample_ids)
        return sample_patches(patches, count, indices=drawn)

    def cached_features(self, features: Features) -> Features:
        """The features with `cached_patches` random patches each, the same for every image's place in the batch."""
        patches, limit = features["patches"], self.config.cached_patches
        if patches.shape[1] <= limit:
            return features
        ids = torch.arange(len(features), device=patches.device)
        kept = philox_permutation(patches.shape[1], limit, seed=0, sample_ids=ids)
        patches = patches.gather(1, kept[:, :, None].expand(-1, -1, patches.shape[2]))
        return Features({"cls": features["cls"], "patches": patches})

    def step(self) -> None:
        """One Adam step on the summed gradients.

        The hinge's gradient by the output bias is a difference of counts, a multiple of λ/(2·images·patches). Where
        the counts are equal, float32 leaves a residue of rounding, of which Adam would take the sign and move the bias
        by a whole learning rate, in a direction that depends on the order of summation: it is exactly zero instead.
        """
        for head in self.heads:
            gradient = head.weights["b2"].grad
            gradient.masked_fill_(gradient.abs() < _BIAS_GRADIENT_NOISE / len(self.heads), 0.0)
        self.optimizer.step()
        for head in self.heads:
            head.stepped()

    def restart(self, number: int) -> None:
        """Forget what was learned: initial weights of restart `number` (from 1), an optimizer that has not stepped."""
        for place, head in enumerate(self.heads):
            head.restart(_initial_seed(self.seed, place, number))
        forget_moments(self.optimizer)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The first head's tensors by their names, those of head k > 0 as k.NAME."""
        return {
            f"{number}.{name}" if number else name: tensor
            for number, head in enumerate(self.heads)
            for name, tensor in head.state_dict().items()
        }

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        with torch.no_grad():
            for name, tensor in self.state_dict().items():
                tensor.copy_(state[name])


def _initial_seed(seed: int, head: int, restart: int = 0) -> int:
    """Of a head's initial weights; those of the first head at the start are those of a run that has one."""
    return rng.derive_seed(seed, "head_init", *((head, restart) if head or restart else ()))


def _ids_of_head(sample_ids: torch.Tensor, number: int) -> torch.Tensor:
    """Ids that key a head's own draws: far from every image's number, and the first head's are these."""
    return sample_ids + (number << 32) if number else sample_ids
