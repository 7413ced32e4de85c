"""PickScore (docs/method.md section 6): `score = logit_scale * cos(text, image) / 26`.

Its layers learn in adversary/pickscore.py.

The model is a CLIP-H trained on human preference pairs (arXiv 2305.01569, yuvalkirstain/PickScore_v1, whose tokenizer
and image processor are laion/CLIP-ViT-H-14-laion2B-s32B-b79K's); "tiny" is the shipped one.

Shapes: B images [B, 3, H, W] float32 in [0, 1].
"""

from __future__ import annotations

import torch

from advgrpo.data.references import ReferenceSet
from advgrpo.rewards.base import Reward
from advgrpo.rewards.checks import check_batch, finite_scores
from advgrpo.vision.clip import ClipModel

SCALE = 26.0  # brings PickScore_v1's logits, about 17 to 26, to below 1


class PickScore(Reward):
    """`base.Reward`: PickScore of image and prompt.

    Args:
        path: CLIPModel folder or hub id; "tiny" for the shipped preference model.
        processor: where tokenizer and image processor are, if not at `path`.
        device, dtype: where and in which precision the model runs.
    """

    name = "pickscore"

    def __init__(
        self,
        *,
        path: str = "yuvalkirstain/PickScore_v1",
        processor: str | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        self.clip = ClipModel(path, processor=processor, device=device, dtype=dtype, field="pickscore.path")

    def score(self, images: torch.Tensor, prompts: list[str], references: ReferenceSet | None = None) -> torch.Tensor:
        """[B] float32 on the device of `images`; the references are not looked at."""
        check_batch(images, prompts)
        cosine = (self.clip.image_embeddings(images) * self.clip.text_embeddings(prompts)).sum(1)
        return finite_scores(self.clip.logit_scale * cosine / SCALE, images, prompts, self.name)
