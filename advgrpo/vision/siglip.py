"""SigLIP (arXiv 2303.15343), frozen, as another backbone of the adversary: the same head on its features.

Shapes: B images [B, 3, H, W] float32 in [0, 1]; features "cls" [B, D], the attention-pooled image, and "patches"
[B, P, D]; there is no class token.
"""

from __future__ import annotations

import torch
from transformers import SiglipVisionModel

from advgrpo.errors import UserError
from advgrpo.runtime.fingerprint import module_fingerprint
from advgrpo.types import Features
from advgrpo.vision.loading import expanded, load_pretrained
from advgrpo.vision.preprocess import ImagePreprocess


class SiglipBackbone:
    """A frozen SiglipVisionModel, from a folder or hub id of a SigLIP or of its vision model alone.

    Images are resized to `image_size`, mean and standard deviation are the model's own; positions are interpolated
    where the model was trained at another size.

    Raises:
        UserError: the model cannot be loaded or has no pooling head, or its patches do not divide `image_size`.
    """

    def __init__(self, path: str, *, image_size: int, dtype: str, device: torch.device):
        self.folder = expanded(path)
        model = load_pretrained(
            SiglipVisionModel,
            self.folder,
            model_types=("siglip", "siglip_vision_model"),
            field="adversary.backbone",
            dtype=getattr(torch, dtype),
        )
        config = model.config
        if not getattr(config, "vision_use_head", True):
            raise UserError(f"adversary.backbone = {path!r} has no pooling head, so nothing describes a whole image")
        if image_size % config.patch_size:
            raise UserError(
                f"adversary.image_size = {image_size} is not a multiple of the backbone's patch size "
                f"{config.patch_size}"
            )
        self.model = model.to(device)
        self.image_size, self.device = image_size, device
        self.width: int = config.hidden_size
        self.num_patches = (image_size // config.patch_size) ** 2
        self.preprocess = ImagePreprocess.load(
            self.folder, field="adversary.backbone", device=device, size=(image_size, image_size)
        )

    @property
    def cache_key(self) -> str:
        """What features depend on beside the image: every weight, the configuration, precision, preprocessing."""
        return f"siglip:{module_fingerprint(self.model, self.model.dtype, self.preprocess.settings)}"

    @torch.no_grad()
    def features(self, images: torch.Tensor) -> Features:
        output = self.model(
            self.preprocess(images).to(self.model.dtype),
            interpolate_pos_encoding=self.image_size != self.model.config.image_size,
        )
        return Features({"cls": output.pooler_output.float(), "patches": output.last_hidden_state.float()})
