"""DINOv2 (arXiv 2304.07193), frozen: the adversary's backbone and what independent statistics look through.

Shapes: B images [B, 3, H, W] float32 in [0, 1]; features cls [B, D], patches [B, P, D].
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from transformers import Dinov2Model

from advgrpo.errors import UserError
from advgrpo.runtime.fingerprint import module_fingerprint
from advgrpo.runtime.transfer import to_device
from advgrpo.types import Features
from advgrpo.vision.loading import expanded, load_pretrained

_MEAN = (0.485, 0.456, 0.406)
_STD = (0.229, 0.224, 0.225)


def backbone_folder(path: str) -> str:
    from advgrpo.tiny import BACKBONES

    return str(BACKBONES[path]) if path in BACKBONES else expanded(path)


class DinoBackbone:
    """A frozen Dinov2Model with the one preprocessing used everywhere; errors name the settings `fields`.

    Args:
        layers: numbers, from 1, of layers whose tokens are joined, each behind the model's final LayerNorm
            (DINOv2's get_intermediate_layers); D is then that many times the model's width. Empty: the last one's.
    """

    def __init__(
        self,
        path: str,
        *,
        image_size: int,
        dtype: str,
        device: torch.device,
        layers: tuple[int, ...] = (),
        fields: tuple[str, str] = ("adversary.backbone", "adversary.image_size"),
    ):
        self.folder = backbone_folder(path)
        model = load_pretrained(
            Dinov2Model,
            self.folder,
            model_types=("dinov2",),
            field=fields[0],
            dtype=getattr(torch, dtype),
        )
        if image_size % model.config.patch_size:
            raise UserError(
                f"{fields[1]} = {image_size} is not a multiple of the backbone's patch size {model.config.patch_size}"
            )
        self.model = model.to(device)
        self.image_size, self.device = image_size, device
        check_layers(layers, model.config.num_hidden_layers, path)
        self.layers = layers
        self.width: int = model.config.hidden_size * max(1, len(layers))
        self.num_patches = (image_size // model.config.patch_size) ** 2
        self._mean = torch.tensor(_MEAN, device=device).view(1, 3, 1, 1)
        self._std = torch.tensor(_STD, device=device).view(1, 3, 1, 1)

    @property
    def cache_key(self) -> str:
        """What features depend on beside the image: every weight, the configuration, precision, preprocessing."""
        preprocessing = f"bicubic antialiased:{self.image_size}:{_MEAN}:{_STD}"
        preprocessing += f":layers {self.layers}" if self.layers else ""
        return f"dino:{module_fingerprint(self.model, self.model.dtype, preprocessing)}"

    def of_last_layer(self) -> DinoBackbone:
        """The same network, whose features are those of its last layer alone."""
        if not self.layers:
            return self
        last = copy.copy(self)
        last.layers, last.width = (), self.model.config.hidden_size
        return last

    def preprocess(self, images: torch.Tensor) -> torch.Tensor:
        """[B, 3, H, W] in [0, 1] -> bicubic to image_size, ImageNet mean and standard deviation."""
        images = to_device(images, self.device).float()
        if images.shape[-2:] != (self.image_size, self.image_size):
            size = (self.image_size, self.image_size)
            images = F.interpolate(images, size=size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
        return (images - self._mean) / self._std

    @torch.no_grad()
    def features(self, images: torch.Tensor) -> Features:
        found = self.model(self.preprocess(images).to(self.model.dtype), output_hidden_states=bool(self.layers))
        tokens = found.last_hidden_state
        if self.layers:  # hidden_states begins with the embeddings, which are layer 0
            tokens = torch.cat([self.model.layernorm(found.hidden_states[layer]) for layer in self.layers], dim=-1)
        return Features({"cls": tokens[:, 0].float(), "patches": tokens[:, 1:].float()})


def check_layers(layers: tuple[int, ...], depth: int, path: str) -> None:
    """UserError for a layer that a model of `depth` layers does not have."""
    if layers and max(layers) > depth:
        raise UserError(
            f"adversary.feature_layers = {list(layers)}: adversary.backbone = {path!r} has {depth} layers; want "
            f"numbers from 1 to {depth}"
        )
