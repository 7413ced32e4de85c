"""An adversary that is a small head on frozen features (arXiv 2511.20256, eqs. 9-14), whatever the backbone.

Features are computed once per image and serve the reward, the head's training and the similarity metric alike; there
is one head forward (`score_features`).

Shapes: B images [B, 3, H, W] float32 in [0, 1]; features cls [B, D], patches [B, P, D].
"""

from __future__ import annotations

from typing import Protocol

import torch

from advgrpo.adversary.discriminator_adam import DiscriminatorAdam
from advgrpo.config import AdversarySection
from advgrpo.errors import UserError
from advgrpo.runtime import rng
from advgrpo.types import Features
from advgrpo_kernels import (
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
        self.head = _init_head(backbone.width, config.hidden_size, seed, backbone.device)
        self.optimizer = DiscriminatorAdam(self.parameters(), lr=config.learning_rate, betas=config.betas)

    @property
    def device(self) -> torch.device:
        return self.backbone.device

    @property
    def cache_key(self) -> str:
        return f"{self.backbone.cache_key}:{self.config.cached_patches}"

    def parameters(self) -> list[torch.nn.Parameter]:
        return list(self.head.values())

    def features(self, images: torch.Tensor, prompts: list[str]) -> Features:
        """Frozen features "cls" [B, D] and "patches" [B, P, D] of images; the prompts are not looked at."""
        return self.backbone.features(images)

    @torch.no_grad()
    def score(self, features: Features, sample_ids: torch.Tensor, *, purpose: str, iteration: int):
        """FeatureScore of each image; its random patches are keyed by (purpose, iteration, sample id)."""
        seed = rng.derive_seed(self.seed, f"{purpose}_patches", iteration)
        return score_features(
            features["cls"],
            features["patches"],
            self._sample(features["patches"], seed, sample_ids).indices,
            self.head,
            weights=self.config.reward_weights,
            normalize=self.config.normalize != "never",
        )

    def centre(self, generated: float, reference: float) -> None:
        """Nothing to do: the head's last layer has a bias, which the hinge moves."""

    def loss(self, reference: Features, generated: Features, *, total: int | None = None):
        """HingeHeadLoss on features whose patches are already the chosen ones (`training_features`)."""
        return hinge_head_loss(
            reference["cls"],
            reference["patches"],
            generated["cls"],
            generated["patches"],
            self.head,
            weights=self.config.loss_weights,
            normalize=self.config.normalize == "always",
            total=total,
        )

    def training_features(self, features: Features, sample_ids: torch.Tensor, seed: int | torch.Tensor) -> Features:
        """The features with `num_patches` random patches each, keyed by (seed, sample id)."""
        patches = features["patches"]
        if len(features) == 0:  # this process holds none of the drawn images
            return Features({"cls": features["cls"], "patches": patches[:, : self.config.num_patches]})
        return Features({"cls": features["cls"], "patches": self._sample(patches, seed, sample_ids).patches})

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
        gradient = self.head["b2"].grad
        gradient.masked_fill_(gradient.abs() < _BIAS_GRADIENT_NOISE, 0.0)
        self.optimizer.step()

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {name: p.detach() for name, p in self.head.items()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.head.items():
                parameter.copy_(state[name])


def _init_head(width: int, hidden: int, seed: int, device: torch.device) -> dict[str, torch.nn.Parameter]:
    """Linear(D, H) -> GELU -> Linear(H, 1) with torch.nn.Linear's default initialisation, seeded."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rng.derive_seed(seed, "head_init"))
        first, second = torch.nn.Linear(width, hidden), torch.nn.Linear(hidden, 1)
    tensors = {"w1": first.weight, "b1": first.bias, "w2": second.weight, "b2": second.bias}
    return {name: torch.nn.Parameter(t.detach().to(device)) for name, t in tensors.items()}
