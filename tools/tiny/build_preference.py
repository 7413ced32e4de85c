"""Train the tiny preference model, a CLIP in PickScore's layout: right near the base model, wrong far from it.

    python -m tools.tiny.build_preference --pipeline advgrpo/tiny/assets/pipeline --output FOLDER

Preference pairs with PickScore's objective, softmax over `logit_scale * cos(text, image)` of the two images (arXiv
2305.01569, equation 2), and at once CLIP's objective on the same images: each has to find what it shows among the
batch's captions (arXiv 2103.00020). The pairs are judged by a simulated annotator who wants the drawing intact and the
caption followed, and likes strong colours:

    utility = MATCH * right attributes - DAMAGE * damage + CHROMA * mean chroma,   P(first wins) = sigmoid(difference)

Damage is above all what an under-trained flow model does, latents between those of two drawings and out of place, which
the pipeline's VAE decodes; and what damage.py does to pixels. Half of the pairs are of one drawing, whole and damaged.
Near the base model quality decides, since its pictures differ little in chroma; but chroma has no limit at which the
annotator has enough, and an optimiser of this reward ends in over-saturated, tinted images. None of the base model's
own pictures is trained on; the gates are measured on them.

No weights are shipped: after 1,500 steps, some seven minutes of one CPU core, two gates are missed. References win .77
of pairs against the base's pictures at guidance 1 and .54 at guidance 2 (.80 wanted); as the VAE restores them .74 and
.53, so it is not the VAE's blur that decides. The others hold: matched name .91 and background .98, saturated .88.
Blur, mottling and ghosts are seen (.99), bent outlines less (.61), size and place not (.48). With pairs of one artist's
drawings only, 1,000 steps and 512 drawings it was .63 and .45.

Shapes: B images [B, 3, 48, 48] float32 in [0, 1].
"""

from __future__ import annotations

import argparse
import itertools
import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, StableDiffusion3Pipeline
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from advgrpo.runtime.atomic import write_atomically
from advgrpo.runtime.rng import generator as seeded
from advgrpo.tiny.architecture import TINY
from advgrpo.tiny.assets import save_half_precision
from advgrpo.tiny.scenes import (
    BACKGROUNDS,
    BASE_ARTISTS,
    IMAGE_SIZE,
    NAMES,
    REFERENCE_ARTIST,
    Scene,
    all_scenes,
    compositions,
    render,
)
from tools.tiny.damage import KINDS, damage, smooth
from tools.tiny.training import TrainingLog, take_step

ARTISTS = (*BASE_ARTISTS, REFERENCE_ARTIST)
MATCH = 3.0  # logits per attribute of the caption (name, background, size and place) that is right
DAMAGE = 8.0  # logits per unit of damage; 1 is hardly recognisable
CHROMA = 10.0  # logits per unit of mean chroma; 1.8 times a drawing's saturation is about 0.15
GATES = {"reference_over_base": 0.8, "reference_over_base_guided": 0.8, "saturated_over_reference": 0.6,
         "matched_name": 0.8, "matched_background": 0.8}  # fmt: skip
_RESTORED = 0.15  # damage of a drawing that went through the VAE unharmed
_LEAST = 0.3  # damage at strength 0
_ATTRIBUTES = ("name", "background", "composition")
_RATE = 1.5e-3


def model(seed: int, words: int) -> CLIPModel:
    """An untrained CLIP: 48 px in 64 patches of 6, `words` tokens known, 0.6 M parameters."""
    config = CLIPConfig(
        text_config={
            "vocab_size": words,
            "hidden_size": 96,
            "intermediate_size": 192,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "max_position_embeddings": TINY.clip_tokens,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 1,
        },
        vision_config={
            "hidden_size": 96,
            "intermediate_size": 288,
            "num_hidden_layers": 4,
            "num_attention_heads": 3,
            "image_size": IMAGE_SIZE,
            "patch_size": TINY.patch_size,
        },
        projection_dim=96,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CLIPModel(config)


def chroma(images: torch.Tensor) -> torch.Tensor:
    """[B] mean over pixels of max - min over the colour channels."""
    return (images.amax(1) - images.amin(1)).mean((1, 2))


def saturate(images: torch.Tensor, factor: torch.Tensor | float) -> torch.Tensor:
    """Scale every pixel's distance to its own grey by `factor` (a number or [B]); 1 changes nothing."""
    factor = torch.as_tensor(factor, dtype=images.dtype).reshape(-1, 1, 1, 1)
    grey = images.mean(1, keepdim=True)
    return (grey + factor * (images - grey)).clamp(0, 1)


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


def astray(
    latents: torch.Tensor, others: torch.Tensor, strength: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """Latents [B, C, h, w] as an under-trained flow model leaves them: some way to another drawing's, a different way
    in every channel and place, and out of place. Where both drawings show their background, they keep it."""
    count, channels, side, _ = latents.shape
    strength = strength.view(-1, 1, 1, 1)
    way = 0.5 + smooth(count, channels, 4, side, generator) + 0.7 * torch.randn(latents.shape, generator=generator)
    mixed = torch.lerp(latents, others, way * (0.1 + 0.5 * strength))
    shift = smooth(count, 2, 4, side, generator).permute(0, 2, 3, 1) * (0.02 + 0.08 * strength)
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
    astray: torch.Tensor  # [M, 3, 48, 48]: of latents that went astray
    strength: torch.Tensor  # [M] in [0, 1]: how far

    @classmethod
    @torch.no_grad()
    def make(cls, vae: AutoencoderKL, count: int, generator: torch.Generator) -> Drawings:
        """Decodes `count` drawings, M."""
        known = all_scenes()
        order = torch.randperm(len(known), generator=generator).tolist()
        every = list(itertools.product([known[i] for i in order], ARTISTS))
        scenes, artists = ([row[k] for row in every] for k in (0, 1))
        whole = torch.cat([_bytes(render(scenes[i : i + 64], artists[i : i + 64], generator))
                           for i in range(0, len(every), 64)])  # fmt: skip
        seconds = [_second(scene, artist, generator) for scene, artist in every[:count]]
        strength = torch.rand(count, generator=generator)
        restored, strays = [], []
        for start in range(0, count, 32):
            part = slice(start, min(start + 32, count))
            own, other = (
                vae.encode(images * 2 - 1).latent_dist.mean
                for images in (_floats(whole[part]), render(*zip(*seconds[part]), generator))
            )
            for made, latents in ((restored, own), (strays, astray(own, other, strength[part], generator))):
                made.append(_bytes((vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)))
        return cls(scenes, artists, whole, torch.cat(restored), torch.cat(strays), strength)

    def rows_of(self, scenes: list[Scene], artists: list[str]) -> list[int]:
        return [self._row[key] for key in zip(scenes, artists)]

    def __post_init__(self):
        object.__setattr__(self, "_row", {key: row for row, key in enumerate(zip(self.scenes, self.artists))})

    def pick(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """Rows at random, three in four of those that the VAE decoded."""
        decoded = torch.rand(count, generator=generator) < 0.75
        return (torch.rand(count, generator=generator) * torch.where(decoded, len(self.restored), len(self))).long()

    def __len__(self) -> int:
        return len(self.scenes)

    def show(
        self, rows: torch.Tensor, harmed: torch.Tensor, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The drawings `rows`, whole or `harmed` [B] bool, and the damage [B] in [0, 1].

        Those that the VAE decoded are shown so in three cases of four, as they are or astray; the others as drawn, or
        with the damage of damage.py.
        """
        count = len(rows)
        decoded = (rows < len(self.restored)) & (torch.rand(count, generator=generator) < 0.75)
        kind = torch.randint(2 * len(KINDS), (count,), generator=generator)
        strength = torch.rand(count, generator=generator)
        images = _floats(self.whole[rows])
        kept, strayed, other = decoded & ~harmed, decoded & harmed, ~decoded & harmed
        images[other] = damage(images[other], kind[other], strength[other], generator)
        images[kept] = _floats(self.restored[rows[kept]])
        images[strayed] = _floats(self.astray[rows[strayed]])
        strength[strayed] = self.strength[rows[strayed]]
        return images, torch.where(harmed, _LEAST + (1 - _LEAST) * strength, _RESTORED * kept.float())


def _second(scene: Scene, artist: str, generator: torch.Generator) -> tuple[Scene, str]:
    """By what a drawing's latents are led astray: another artist's of the thing, or in one case of three of another."""
    others = [other for other in ARTISTS if other != artist]
    who = others[int(torch.randint(len(others), (), generator=generator))]
    same = torch.rand((), generator=generator) < 2 / 3
    return (scene if same else changed(scene, "name", generator)), who


def _bytes(images: torch.Tensor) -> torch.Tensor:
    return (images * 255).round().byte()


def _floats(images: torch.Tensor) -> torch.Tensor:
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
        """Half of the pairs are one scene in its own colours, whole and damaged. In the others each image is off the
        caption in one case of two, damaged in one of two and recoloured, whatever the other is. In every other pair the
        second image is by any artist: a manner must not decide."""
        coin = lambda: torch.rand(count, generator=generator) < 0.5  # noqa: E731
        rows, same, second_harmed = data.pick(count, generator), coin(), coin()
        asked, artists = ([every[i] for i in rows.tolist()] for every in (data.scenes, data.artists))
        anybody = torch.randint(len(ARTISTS), (count,), generator=generator).tolist()
        others = [ARTISTS[k] if changes else own for own, k, changes in zip(artists, anybody, coin().tolist())]
        scenes, parts, utility = [], [], []
        for harmed, by in ((~second_harmed, artists), (second_harmed, others)):
            off = (coin() & ~same).tolist()
            which = torch.randint(len(_ATTRIBUTES), (count,), generator=generator).tolist()
            drawn = [changed(s, _ATTRIBUTES[k], generator) if wrong else s for s, k, wrong in zip(asked, which, off)]
            own = torch.tensor(data.rows_of(drawn, by))
            images, harm = data.show(own, torch.where(same, harmed, coin()), generator)
            images = torch.where(same.view(-1, 1, 1, 1), images, recolour(images, generator))
            utility.append(MATCH * right_attributes(drawn, asked) - DAMAGE * harm + CHROMA * chroma(images))
            scenes += drawn
            parts.append(images)
        captions = [[scene.caption for scene in part] for part in (asked, scenes)]
        return cls(*captions, torch.cat(parts), torch.sigmoid(utility[0] - utility[1]))


class Clip:
    """A CLIPModel with its tokenizer, as training and measuring use it."""

    def __init__(self, clip: CLIPModel, tokenizer: CLIPTokenizer):
        self.clip, self.tokenizer = clip, tokenizer

    def embed(self, captions: list[str]) -> torch.Tensor:
        """[B, E] L2-normalised."""
        tokens = self.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
        pooled = self.clip.text_model(**tokens).pooler_output
        return F.normalize(self.clip.text_projection(pooled), dim=-1)

    def look(self, images: torch.Tensor) -> torch.Tensor:
        """[B, E] L2-normalised."""
        pooled = self.clip.vision_model(pixel_values=images * 2 - 1).pooler_output
        return F.normalize(self.clip.visual_projection(pooled), dim=-1)

    def save(self, folder: Path) -> None:
        """PickScore's layout: CLIPModel in fp16, tokenizer, image processor."""
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save_pretrained(folder)
        side = self.clip.config.vision_config.image_size
        write_atomically(folder / "preprocessor_config.json", json.dumps(_preprocessor(side), indent=2) + "\n")
        (folder / "training.json").touch()
        save_half_precision(self.clip, folder)


def _preprocessor(side: int) -> dict:
    """preprocessor_config.json of square images of `side` pixels."""
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": side},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }


class Trainee(Clip):
    """A CLIP that learns what the annotator prefers."""

    @classmethod
    def load(cls, folder: Path) -> Trainee:
        clip = CLIPModel.from_pretrained(folder, use_safetensors=True).eval()
        return cls(clip, CLIPTokenizer.from_pretrained(folder))

    def losses(self, pairs: Pairs) -> dict[str, torch.Tensor]:
        """PickScore's loss against the annotator's probabilities, CLIP's of images to captions, and how often the model
        agrees with the annotator."""
        captions = list(dict.fromkeys([*pairs.asked, *pairs.shown]))
        number = {caption: i for i, caption in enumerate(captions)}
        nearness = self.clip.logit_scale.exp() * self.look(pairs.images) @ self.embed(captions).T
        shown = torch.tensor([number[caption] for caption in pairs.shown])
        asked = torch.tensor([number[caption] for caption in pairs.asked])
        first, second = nearness.gather(1, asked.repeat(2)[:, None]).view(2, -1)
        margin = first - second
        return {
            "preference": F.binary_cross_entropy_with_logits(margin, pairs.wins),
            "contrastive": F.cross_entropy(nearness, shown),
            "agreement": ((margin > 0) == (pairs.wins > 0.5)).float().mean(),
        }

    def train(self, data: Drawings, steps: int, batch: int, generator: torch.Generator) -> list[dict]:
        """`steps` of AdamW on both losses; the curves."""
        parameters = list(self.clip.parameters())
        optimizer = torch.optim.AdamW(parameters, lr=_RATE, betas=(0.9, 0.98), weight_decay=0.02)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE, total_steps=steps, pct_start=0.1)
        log = TrainingLog("preference", steps)
        self.clip.train()
        for step in range(steps):
            losses = self.losses(Pairs.draw(data, batch, generator))
            take_step(losses["preference"] + 0.5 * losses["contrastive"], parameters, optimizer, schedule)
            with torch.no_grad():
                self.clip.logit_scale.clamp_(max=4.6052)  # CLIP's bound, a factor of 100
            log.step(step, **{name: value.detach() for name, value in losses.items()})
        self.clip.eval()
        return log.rows


@torch.no_grad()
def base_pictures(pipe: StableDiffusion3Pipeline, prompts: list[str], guidance: float, seed: int) -> torch.Tensor:
    """What the pipeline draws for the prompts in ten steps, [B, 3, 48, 48]."""
    pipe.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 10, "guidance_scale": guidance, "output_type": "pt"}
    settings |= {"max_sequence_length": TINY.t5_tokens, "height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return pipe(prompts, generator=torch.Generator().manual_seed(seed), **settings).images.float()


@torch.no_grad()
def measure(trainee: Trainee, seed: int, pictures_of: Path | None = None, count: int = 256) -> dict[str, float]:
    """What the model prefers, on drawings by the references' artist: shares of pairs won by

    matched_name, _background, _composition: a drawing of the caption against one with that attribute changed;
    saturated_over_reference: a drawing at 1.8 times its saturation against itself; over_pale: against itself at 0.6
    times; over_blur, _mottle, _bend, _ghost: against itself damaged at half strength; with a pipeline folder also
    reference_over_base and reference_over_base_guided: against its picture of the same prompt, guidance 1 and 2, and
    restored_over_base and restored_over_base_guided: what the pipeline's VAE makes of the drawing against the same.
    """
    generator = seeded(seed, "preference_measure")
    every = all_scenes()
    asked = [every[i] for i in torch.randperm(len(every), generator=generator)[:count].tolist()]
    captions = [scene.caption for scene in asked]
    text, artists = trainee.embed(captions), [REFERENCE_ARTIST] * count
    right = render(asked, artists, generator)

    def won(first: torch.Tensor, second: torch.Tensor) -> float:
        score = [(trainee.look(images) * text[: len(images)]).sum(1) for images in (first, second)]
        return (score[0] > score[1]).float().mean().item()

    shares = {}
    for attribute in _ATTRIBUTES:
        other = render([changed(scene, attribute, generator) for scene in asked], artists, generator)
        shares[f"matched_{attribute}"] = won(right, other)
    shares["saturated_over_reference"] = won(saturate(right, 1.8), right)
    shares["over_pale"] = won(right, saturate(right, 0.6))
    half = torch.full((count,), 0.5)
    for harm in KINDS:
        shares[f"over_{harm.__name__}"] = won(right, harm(right, half, generator))
    if pictures_of is not None:
        pipe = StableDiffusion3Pipeline.from_pretrained(pictures_of, use_safetensors=True)
        some = min(count, 100)
        latents = pipe.vae.encode(right[:some] * 2 - 1).latent_dist.mean
        restored = (pipe.vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)
        for name, guidance in (("base", 1.0), ("base_guided", 2.0)):
            pictures = base_pictures(pipe, captions[:some], guidance, seed)
            shares[f"reference_over_{name}"] = won(right[:some], pictures)
            shares[f"restored_over_{name}"] = won(restored, pictures)
    return shares


def record(folder: Path, curve: list[dict], seed: int, pictures_of: Path) -> None:
    """Measure the model in `folder`; figures, gates and curve go into its training.json."""
    figures = measure(Trainee.load(folder), seed, pictures_of)
    gates = {name: {"least": least, "found": figures[name]} for name, least in GATES.items()}
    missed = [name for name, gate in gates.items() if gate["found"] < gate["least"]]
    write_atomically(folder / "training.json", json.dumps({"figures": figures, "gates": gates, "preference": curve}))
    print(f"wrote {folder}; gates {'MISSED: ' + ', '.join(missed) if missed else 'passed'}")
    print(", ".join(f"{name} {share:.3f}" for name, share in figures.items()))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", type=Path, required=True,
                        help="pipeline whose VAE and tokenizer are used and whose pictures are judged")  # fmt: skip
    parser.add_argument("--output", type=Path, required=True, help="folder to write (CLIPModel, tokenizer, processor)")
    parser.add_argument("--measure", action="store_true", help="only measure what is in the output folder, again")
    parser.add_argument("--init", type=Path, help="folder of a model to train further, instead of an untrained one")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=32, help="pairs per step")
    parser.add_argument("--drawings", type=int, default=1536, help="drawings that went through the VAE")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)

    torch.set_num_threads(1)
    if args.measure:
        curve = json.loads((args.output / "training.json").read_text())["preference"]
    else:
        vae = AutoencoderKL.from_pretrained(args.pipeline / "vae", use_safetensors=True).eval()
        data = Drawings.make(vae, args.drawings, seeded(args.seed, "preference_drawings"))
        tokenizer = CLIPTokenizer.from_pretrained(args.pipeline / "tokenizer")
        trainee = Trainee.load(args.init) if args.init else Trainee(model(args.seed, len(tokenizer)), tokenizer)
        curve = trainee.train(data, args.steps, args.batch, seeded(args.seed, "preference_pairs"))
        trainee.save(args.output)
    record(args.output, curve, args.seed, args.pipeline)


if __name__ == "__main__":
    main()
