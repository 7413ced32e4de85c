"""DINO similarity of an image to the reference images of its own prompt (docs/method.md 6.4's second term)."""

from __future__ import annotations

import torch

from advgrpo.data.references import ReferenceSet
from advgrpo.rewards.base import Reward
from advgrpo.rewards.checks import check_batch, finite_scores, required
from advgrpo.rewards.reference_similarity import Reduction, check_reduction, reference_cosine, reference_embeddings
from advgrpo.vision.dino import DinoBackbone


class DinoSimilarity(Reward):
    """`base.Reward`: mean or max cosine of class tokens to those of the prompt's own references, in [-1, 1].

    Args:
        path: Dinov2Model folder or hub id; "tiny" for the shipped one.
        reduction: "mean" is what the paper reports, "max" the released code's partner of the OCR reward.
        image_size: images are resized to this, a multiple of the backbone's patch.
        device, dtype: where and in which precision the backbone runs.
        backbone: one that is loaded already, such as the adversary's, instead of `path`.
        fields: the settings that `path` and `image_size` come from, for error messages.
    """

    name = "dino_similarity"

    def __init__(
        self,
        *,
        path: str = "facebook/dinov2-base",
        reduction: Reduction = "mean",
        image_size: int = 518,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        backbone: DinoBackbone | None = None,
        fields: tuple[str, str] = ("dino_similarity.path", "dino_similarity.image_size"),
    ):
        self.reduction = check_reduction(reduction)
        self.backbone = backbone or DinoBackbone(
            path,
            image_size=image_size,
            dtype=str(dtype).removeprefix("torch."),
            device=torch.device(device),
            fields=fields,
        )
        self.of_references = reference_embeddings(self.embed)

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """Class tokens [B, D] float32 of images."""
        return self.backbone.features(images)["cls"]

    def cosine(self, embeddings: torch.Tensor, prompts: list[str], references: ReferenceSet) -> torch.Tensor:
        """[B] from class tokens [B, D] that are computed already."""
        own = self.of_references.of_prompt
        return reference_cosine(embeddings, prompts, lambda prompt: own(references, prompt), self.reduction)

    def score(self, images: torch.Tensor, prompts: list[str], references: ReferenceSet | None) -> torch.Tensor:
        """[B] float32 on the device of `images`; UserError without references or for a prompt that has none."""
        check_batch(images, prompts)
        known = required(references, self.name)
        return finite_scores(self.cosine(self.embed(images), prompts, known), images, prompts, self.name)
