"""Networks that judge images, by name, without a network, and what a forward of theirs takes, counted on the meta
device.

The constants are the values of the hub's config.json files, as in known_models.py, where DINOv2's are. PickScore is a
CLIP-H/14 as LAION's, whose tokenizer and preprocessing it has.
"""

from __future__ import annotations

import copy
import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from advgrpo import tiny
from advgrpo.plan.activations import AliveBytes, OnGpu
from advgrpo.plan.known_models import BACKBONES, meta_transformers_model, read_config
from advgrpo.vision.preprocess import ImagePreprocess

CLIP, DINO, SIGLIP = "CLIPModel", "Dinov2Model", "SiglipVisionModel"
_CLIP_H14: dict[str, Any] = {
    "projection_dim": 1024,
    "text_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "projection_dim": 1024,
        "hidden_act": "gelu",
    },
    "vision_config": {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_attention_heads": 16,
        "num_hidden_layers": 32,
        "patch_size": 14,
        "image_size": 224,
        "projection_dim": 1024,
        "hidden_act": "gelu",
    },
}
_CLIP_L14: dict[str, Any] = {
    "projection_dim": 768,
    "text_config": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_attention_heads": 12,
        "num_hidden_layers": 12,
        "projection_dim": 768,
    },
    "vision_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": 14,
        "image_size": 224,
        "projection_dim": 768,
    },
}
CLIPS = {
    "yuvalkirstain/PickScore_v1": _CLIP_H14,
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": _CLIP_H14,
    "openai/clip-vit-large-patch14": _CLIP_L14,
}
_SO400M = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
SIGLIPS: dict[str, dict[str, Any]] = {
    "google/siglip-so400m-patch14-384": _SO400M | {"patch_size": 14, "image_size": 384},
    "google/siglip-base-patch16-224": {"patch_size": 16, "image_size": 224},  # transformers' defaults otherwise
}
_KNOWN = {CLIP: CLIPS, DINO: BACKBONES, SIGLIP: SIGLIPS}
_SHIPPED = {CLIP: tiny.PREFERENCE_MODELS, DINO: tiny.BACKBONES, SIGLIP: {}}


@dataclass(frozen=True)
class Network:
    """A frozen network that looks at images."""

    kind: str  # transformers' class
    config: str  # its config.json
    side: int  # pixels that images are resized to; of a CLIP its own
    dtype: torch.dtype

    @property
    def _vision(self) -> dict[str, Any]:
        found = json.loads(self.config)
        return found.get("vision_config", found)

    @property
    def width(self) -> int:
        return self._vision.get("hidden_size", 768)

    @property
    def patches(self) -> int:
        return (self.side // self._vision.get("patch_size", 14 if self.kind == DINO else 16)) ** 2

    @property
    def embedding(self) -> int:
        """Width of what a CLIP gives of an image or a text."""
        return json.loads(self.config).get("projection_dim", 512)

    @property
    def weights(self) -> int:
        """Bytes."""
        return sum(p.numel() for p in self._meta().parameters()) * self.dtype.itemsize

    def _meta(self) -> torch.nn.Module:
        return meta_transformers_model(self.kind, self.config).eval()

    def look_bytes(self, resolution: int) -> int:
        """Most bytes alive while one image of so many pixels a side is resized and looked at."""
        return _look_bytes(self, resolution)

    def last_layers(self, count: int) -> torch.nn.ModuleList:
        """A copy of a CLIP's last vision layers, float32, on the meta device."""
        layers: Any = self._meta().vision_model.encoder.layers
        return copy.deepcopy(layers[len(layers) - count :]).float().requires_grad_(True)


def known_network(kind: str, path: str, *, side: int = 0, dtype: str) -> Network | None:
    """The network of class `kind` behind a hub id that is known here, a name of the tiny world, or a local folder; None
    behind any other.

    Raises:
        UserError: the folder's config.json cannot be read.
    """
    config = _KNOWN[kind].get(path)
    if config is None:
        folder = _SHIPPED[kind].get(path) or Path(path).expanduser()
        if not folder.is_dir():
            return None
        config = read_config(folder / "config.json")
    if kind == SIGLIP:
        config = config.get("vision_config", config)
    own = config.get("vision_config", {}).get("image_size", 224)
    return Network(kind, json.dumps(config, sort_keys=True), side or own, getattr(torch, dtype))


@functools.cache
def _look_bytes(network: Network, resolution: int) -> int:
    model: Any = copy.deepcopy(network._meta()).to(network.dtype)
    preprocess = ImagePreprocess(size=(network.side, network.side), device="meta")
    image = torch.empty(1, 3, resolution, resolution, device="meta")
    with torch.no_grad(), OnGpu(), AliveBytes() as counted:
        pixels = preprocess(image).to(network.dtype)
        if network.kind == CLIP:
            model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output).float()
        elif network.kind == SIGLIP:
            found = model(pixels, interpolate_pos_encoding=network.side != model.config.image_size)
            found.pooler_output.float(), found.last_hidden_state.float()
        else:
            tokens = model(pixels).last_hidden_state
            tokens[:, 0].float(), tokens[:, 1:].float()
    return counted.peak


@functools.cache
def last_layers_bytes(network: Network, layers: int, *, trains: bool) -> tuple[int, int]:
    """(bytes whatever the batch, bytes of an image) alive at once while a CLIP's last vision layers, which are float32,
    compute in the network's dtype; with `trains` until their gradients are there."""

    def most(images: int) -> int:
        tail, low = network.last_layers(layers), network.dtype if network.dtype != torch.float32 else None
        for parameter in tail.parameters():
            parameter.grad = torch.empty_like(parameter)
        hidden = torch.empty(images, network.patches + 1, network.width, dtype=network.dtype, device="meta")
        with torch.set_grad_enabled(trains), OnGpu(low), AliveBytes() as counted:
            for layer in tail:
                hidden = layer(hidden, None)
            if trains:
                hidden[:, 0].float().sum().backward()
        return counted.peak

    few, many = most(8), most(16)
    each = (many - few) // 8
    return few - 8 * each, each
