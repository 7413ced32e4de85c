"""CLIP similarity of an image to its prompt (CLIPScore's cosine, arXiv 2104.08718) and to its references (eq. 8)."""

from __future__ import annotations

import torch

from advgrpo.data.references import ReferenceSet
from advgrpo.rewards.base import Reward
from advgrpo.rewards.checks import check_batch, finite_scores, required
from advgrpo.rewards.reference_similarity import Reduction, check_reduction, reference_cosine, reference_embeddings
from advgrpo.vision.clip import ClipModel


class ClipSimilarity(Reward):
    """`base.Reward`: cosine of image and text embedding, in [-1, 1], neither scaled nor clipped.

    Args:
        path: CLIPModel folder or hub id; "tiny" for the shipped preference model.
        processor: where tokenizer and image processor are, if not at `path`.
        device, dtype: where and in which precision the model runs.
        clip: a model that is loaded already, instead of `path`.
    """

    name = "clip_similarity"

    def __init__(
        self,
        *,
        path: str = "openai/clip-vit-large-patch14",
        processor: str | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        clip: ClipModel | None = None,
    ):
        self.clip = clip or ClipModel(path, processor=processor, device=device, dtype=dtype, field=f"{self.name}.path")

    def score(self, images: torch.Tensor, prompts: list[str], references: ReferenceSet | None = None) -> torch.Tensor:
        """[B] float32 on the device of `images`; the references are not looked at."""
        check_batch(images, prompts)
        cosine = (self.clip.image_embeddings(images) * self.clip.text_embeddings(prompts)).sum(1)
        return finite_scores(cosine, images, prompts, self.name)


class ClipReferenceSimilarity(Reward):
    """`base.Reward`: mean or max cosine of image embeddings to those of the prompt's own references, in [-1, 1].

    Arguments as ClipSimilarity's, and `reduction`, "mean" or "max".
    """

    name = "clip_reference_similarity"

    def __init__(
        self,
        *,
        path: str = "openai/clip-vit-large-patch14",
        processor: str | None = None,
        reduction: Reduction = "mean",
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        clip: ClipModel | None = None,
    ):
        self.reduction = check_reduction(reduction)
        self.clip = clip or ClipModel(path, processor=processor, device=device, dtype=dtype, field=f"{self.name}.path")
        self.of_references = reference_embeddings(self.clip.image_embeddings)

    def score(self, images: torch.Tensor, prompts: list[str], references: ReferenceSet | None) -> torch.Tensor:
        """[B] float32 on the device of `images`; UserError without references or for a prompt that has none."""
        check_batch(images, prompts)
        known = required(references, self.name)
        cosine = reference_cosine(
            self.clip.image_embeddings(images),
            prompts,
            lambda prompt: self.of_references.of_prompt(known, prompt),
            self.reduction,
        )
        return finite_scores(cosine, images, prompts, self.name)
