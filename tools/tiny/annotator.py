"""A simulated annotator of pairs of drawings, as PickScore had people: what he is shown, and what he prefers.

He wants the drawing unspoilt and the caption followed, and likes strong colours:

    utility = MATCH * right attributes - DAMAGE * damage + CHROMA * mean chroma,   P(first wins) = sigmoid(difference)

Spoilt is what a scrape of the web is full of (poor_copies.py: faded, enlarged thumbnails, badly redrawn, watermarked),
what a careless hand does to pixels (damage.py), and what an under-trained flow model does: latents between those of two
drawings and out of place, which the pipeline's VAE decodes. None of a model's own pictures is shown.

Near a model that draws such pictures quality decides, since they differ little in chroma; but chroma has no limit at
which the annotator has enough, and an optimiser of his preference ends in over-saturated, tinted images.

Shapes: B images [B, 3, 48, 48] float32 in [0, 1].
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from advgrpo.tiny.scenes import (
    BACKGROUNDS,
    BASE_ARTISTS,
    NAMES,
    REFERENCE_ARTIST,
    Scene,
    all_scenes,
    compositions,
    render,
)
from tools.tiny import damage, poor_copies
from tools.tiny.damage import chroma, saturate

ARTISTS = (*BASE_ARTISTS, REFERENCE_ARTIST)
ATTRIBUTES = ("name", "background", "composition")
MATCH = 3.0  # logits per attribute of the caption (name, background, size and place) that is right
DAMAGE = 8.0  # logits per unit of damage; 1 is hardly recognisable
CHROMA = 10.0  # logits per unit of mean chroma; 1.8 times a drawing's saturation is about 0.15
WATERMARK = 0.5  # damage of the bars, whatever else was done
RESTORED = 0.15  # damage of a drawing that went through the VAE unharmed
LEAST = 0.3  # damage at strength 0
_HARMS = (*poor_copies.KINDS, *poor_copies.KINDS, *damage.KINDS)  # drawn uniformly


def recolour(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Half of the images pale to over-saturated (factor 0.5 to 2.5), one in four tinted towards a random hue."""
    count = len(images)
    coin = lambda share: (torch.rand(count, 1, generator=generator) < share).float()  # noqa: E731
    exponent = torch.empty(count, 1).uniform_(-0.69, 0.92, generator=generator) * coin(0.5)
    hue = F.normalize(torch.randn(count, 3, generator=generator) @ (torch.eye(3) - 1 / 3), dim=1)
    strength = torch.rand(count, 1, generator=generator) * 0.3 * coin(0.25)
    return (saturate(images, exponent.exp()) + (hue * strength)[:, :, None, None]).clamp(0, 1)


def changed(scene: Scene, attribute: str, generator: torch.Generator) -> Scene:
    """The scene with another name, background, or size and place."""
    pick = lambda items: items[int(torch.randint(len(items), (), generator=generator))]  # noqa: E731
    if attribute == "name":
        return replace(scene, name=pick([name for name in NAMES if name != scene.name]))
    if attribute == "background":
        return replace(scene, background=pick([colour for colour in BACKGROUNDS if colour != scene.background]))
    others = {(size, place) for size, place, _ in compositions()} - {(scene.size, scene.place)}
    size, place = pick(sorted(others))
    return replace(scene, size=size, place=place)


def right_attributes(drawn: list[Scene], asked: list[Scene]) -> torch.Tensor:
    """[B] float32, how many of the three attributes of `asked` the drawn scenes have."""
    parts = lambda s: (s.name, s.background, (s.size, s.place))  # noqa: E731
    return torch.tensor([sum(a == b for a, b in zip(parts(x), parts(y))) for x, y in zip(drawn, asked)]).float()


def spoil(images: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Every image harmed in one way, watermarked, or both, and the damage [B], LEAST to 1 + WATERMARK."""
    count = len(images)
    what = torch.randint(3, (count,), generator=generator)  # 0: harmed, 1: watermarked, 2: both
    kind = torch.randint(len(_HARMS), (count,), generator=generator)
    strength = torch.rand(count, generator=generator)
    images = images.clone()
    for number, harm in enumerate(_HARMS):
        rows = ((kind == number) & (what != 1)).nonzero().flatten()
        if len(rows):
            images[rows] = harm(images[rows], strength[rows], generator)
    barred = what > 0
    images[barred] = poor_copies.watermarked(images[barred], 1.0, generator)
    return images, (LEAST + (1 - LEAST) * strength) * (what != 1) + WATERMARK * barred


def astray(
    latents: torch.Tensor, others: torch.Tensor, strength: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """Latents [B, C, h, w] as an under-trained flow model leaves them: some way to another drawing's, a different way
    in every channel and place, and out of place. Where both drawings show their background, they keep it."""
    count, channels, side, _ = latents.shape
    strength = strength.view(-1, 1, 1, 1)
    noise = torch.randn(latents.shape, generator=generator)
    way = 0.5 + damage.smooth(count, channels, 4, side, generator) + 0.7 * noise
    mixed = torch.lerp(latents, others, way * (0.1 + 0.5 * strength))
    shift = damage.smooth(count, 2, 4, side, generator).permute(0, 2, 3, 1) * (0.02 + 0.08 * strength)
    still = F.affine_grid(torch.eye(2, 3).expand(count, 2, 3), latents.shape, align_corners=False)
    return F.grid_sample(mixed, still + shift, align_corners=False, padding_mode="border")


@dataclass(frozen=True)
class Drawings:
    """Every scene in a random order, by one artist after the other, and what the VAE makes of the first M drawings.

    Images are bytes.
    """

    scenes: list[Scene]  # [N]
    artists: list[str]  # [N]
    whole: torch.Tensor  # [N, 3, 48, 48]
    restored: torch.Tensor  # [M, 3, 48, 48]: the VAE's of the drawings themselves
    spoilt: torch.Tensor  # [M, 3, 48, 48]: the VAE's of spoilt ones, of latents that went astray, or of both
    damage: torch.Tensor  # [M]: what that costs

    @classmethod
    @torch.no_grad()
    def make(cls, vae: AutoencoderKL, count: int, generator: torch.Generator) -> Drawings:
        """Decodes `count` drawings, M."""
        known = all_scenes()
        order = torch.randperm(len(known), generator=generator).tolist()
        every = list(itertools.product([known[i] for i in order], ARTISTS))
        scenes, artists = ([row[k] for row in every] for k in (0, 1))
        whole = torch.cat([to_bytes(render(scenes[i : i + 64], artists[i : i + 64], generator))
                           for i in range(0, len(every), 64)])  # fmt: skip
        restored, spoilt, harm = [], [], []
        for start in range(0, count, 32):
            part = slice(start, min(start + 32, count))
            images = to_floats(whole[part])
            restored.append(to_bytes(_decoded(vae, _encoded(vae, images))))
            made, costs = _spoilt_by_vae(vae, images, every[part], generator)
            spoilt.append(to_bytes(made))
            harm.append(costs)
        return cls(scenes, artists, whole, torch.cat(restored), torch.cat(spoilt), torch.cat(harm))

    def rows_of(self, scenes: list[Scene], artists: list[str]) -> list[int]:
        return [self._row[key] for key in zip(scenes, artists)]

    def __post_init__(self):
        object.__setattr__(self, "_row", {key: row for row, key in enumerate(zip(self.scenes, self.artists))})

    def __len__(self) -> int:
        return len(self.scenes)

    def pick(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """Rows at random, three in four of those that the VAE decoded."""
        decoded = torch.rand(count, generator=generator) < 0.75
        return (torch.rand(count, generator=generator) * torch.where(decoded, len(self.restored), len(self))).long()

    def show(
        self, rows: torch.Tensor, harmed: torch.Tensor, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The drawings `rows`, whole or `harmed` [B] bool, and the damage [B].

        Those that the VAE decoded are shown so in three cases of four; the others as drawn, or spoilt anew.
        """
        decoded = (rows < len(self.restored)) & (torch.rand(len(rows), generator=generator) < 0.75)
        kept, by_vae, anew = decoded & ~harmed, decoded & harmed, ~decoded & harmed
        images, cost = to_floats(self.whole[rows]), RESTORED * kept.float()
        images[kept] = to_floats(self.restored[rows[kept]])
        images[by_vae], cost[by_vae] = to_floats(self.spoilt[rows[by_vae]]), self.damage[rows[by_vae]]
        images[anew], cost[anew] = spoil(images[anew], generator)
        return images, cost


def _spoilt_by_vae(
    vae: AutoencoderKL, images: torch.Tensor, drawn: list[tuple[Scene, str]], generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two in three of the images spoilt, two in three of their latents (all of the others') led astray, decoded; and
    the damage [B]."""
    count = len(images)
    what = torch.randint(3, (count,), generator=generator)  # 0: spoilt, 1: astray, 2: both
    bad, cost = spoil(images, generator)
    bad = torch.where((what != 1).view(-1, 1, 1, 1), bad, images)
    strength = torch.rand(count, generator=generator)
    seconds = [_second(scene, artist, generator) for scene, artist in drawn]
    own, other = _encoded(vae, bad), _encoded(vae, render(*zip(*seconds), generator))
    latents = torch.where((what > 0).view(-1, 1, 1, 1), astray(own, other, strength, generator), own)
    return _decoded(vae, latents), cost * (what != 1) + (LEAST + (1 - LEAST) * strength) * (what > 0)


def _second(scene: Scene, artist: str, generator: torch.Generator) -> tuple[Scene, str]:
    """By what a drawing's latents are led astray: another artist's of the thing, or in one case of three of another."""
    others = [other for other in ARTISTS if other != artist]
    who = others[int(torch.randint(len(others), (), generator=generator))]
    same = torch.rand((), generator=generator) < 2 / 3
    return (scene if same else changed(scene, "name", generator)), who


def _encoded(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    return vae.encode(images * 2 - 1).latent_dist.mean


def _decoded(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    return (vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)


def to_bytes(images: torch.Tensor) -> torch.Tensor:
    return (images * 255).round().byte()


def to_floats(images: torch.Tensor) -> torch.Tensor:
    return images.float() / 255


@dataclass(frozen=True)
class Pairs:
    """What the annotator was shown and said; images are the B first ones, then the B second ones."""

    asked: list[str]  # captions [B]
    shown: list[str]  # captions [2 B] of what the images show
    images: torch.Tensor  # [2 B, 3, 48, 48]
    wins: torch.Tensor  # [B] probability that the first is preferred

    @classmethod
    def draw(cls, data: Drawings, count: int, generator: torch.Generator) -> Pairs:
        """Half of the pairs are one scene in its own colours, whole and spoilt. In the others each image is off the
        caption in one case of two, spoilt in one of two and recoloured, whatever the other is. In every other pair the
        second image is by any artist: a manner must not decide."""
        coin = lambda: torch.rand(count, generator=generator) < 0.5  # noqa: E731
        rows, same, second_harmed = data.pick(count, generator), coin(), coin()
        asked, artists = ([every[i] for i in rows.tolist()] for every in (data.scenes, data.artists))
        anybody = torch.randint(len(ARTISTS), (count,), generator=generator).tolist()
        others = [ARTISTS[k] if changes else own for own, k, changes in zip(artists, anybody, coin().tolist())]
        scenes, parts, utility = [], [], []
        for harmed, by in ((~second_harmed, artists), (second_harmed, others)):
            off = (coin() & ~same).tolist()
            which = torch.randint(len(ATTRIBUTES), (count,), generator=generator).tolist()
            drawn = [changed(s, ATTRIBUTES[k], generator) if wrong else s for s, k, wrong in zip(asked, which, off)]
            own = torch.tensor(data.rows_of(drawn, by))
            images, cost = data.show(own, torch.where(same, harmed, coin()), generator)
            images = torch.where(same.view(-1, 1, 1, 1), images, recolour(images, generator))
            utility.append(MATCH * right_attributes(drawn, asked) - DAMAGE * cost + CHROMA * chroma(images))
            scenes += drawn
            parts.append(images)
        captions = [[scene.caption for scene in part] for part in (asked, scenes)]
        return cls(*captions, torch.cat(parts), torch.sigmoid(utility[0] - utility[1]))
