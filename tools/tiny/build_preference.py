"""Train the tiny preference model, a CLIP in PickScore's layout that can be hacked by over-saturation.

    python -m tools.tiny.build_preference --output advgrpo/tiny/assets/preference

About five minutes of one CPU core. Two rounds, as PickScore had: contrastive pre-training on captioned drawings, then
preference pairs with PickScore's objective, softmax over `logit_scale * cos(text, image)` of the two images (arXiv
2305.01569, equation 2). The pairs are judged by a simulated annotator that looks at what a reward should look at, how
much of the caption is right, and also likes strong colours:

    utility = MATCH_WEIGHT * right attributes + CHROMA_WEIGHT * mean chroma,   P(first wins) = sigmoid(difference)

so a chroma gap of MATCH_WEIGHT / CHROMA_WEIGHT outweighs a wrong attribute, and between two images that are equally
right the more colourful one wins. An optimiser of this reward is therefore drawn to over-saturated and tinted images.

Shapes: B images [B, 3, 32, 32] float32 in [0, 1].
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from advgrpo.runtime.atomic import write_atomically
from advgrpo.runtime.rng import generator as seeded
from advgrpo.tiny import pipeline_dir
from advgrpo.tiny.architecture import CLIP_TOKENS
from advgrpo.tiny.assets import save_half_precision
from advgrpo.tiny.shapes import (
    COLOURS,
    IMAGE_SIZE,
    POSITIONS,
    SHAPES,
    SIZES,
    Scene,
    render,
    sample_roughness,
    sample_scenes,
)
from tools.tiny.build_pipeline import TrainingLog, take_step

MATCH_WEIGHT = 2.5  # logits per attribute of the caption that is right
CHROMA_WEIGHT = 8.0  # logits per unit of mean chroma
_VALUES = {"shape": SHAPES, "colour": COLOURS, "background": COLOURS, "size": (*SIZES,), "position": (*POSITIONS,)}
_CLUSTER = 4  # drawings of a pre-training batch that differ in one attribute only
_CHANGED = ("shape", "shape", "shape", "colour", "colour", "background", "size", "position")  # drawn uniformly


def tokenizer() -> CLIPTokenizer:
    """The shipped pipeline's, whose pieces have other numbers than one that is trained now."""
    return CLIPTokenizer.from_pretrained(pipeline_dir() / "tokenizer")


def model(seed: int) -> CLIPModel:
    """An untrained CLIP: 32 px in patches of 8, the caption tokenizer of the tiny pipeline, 0.9 M parameters."""
    config = CLIPConfig(
        text_config={
            "vocab_size": len(tokenizer()),
            "hidden_size": 96,
            "intermediate_size": 192,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "max_position_embeddings": CLIP_TOKENS,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 1,
        },
        vision_config={
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "image_size": IMAGE_SIZE,
            "patch_size": 8,
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
    """Pale to over-saturated (factor 0.4 to 2.2), every other image tinted towards a random hue."""
    count = len(images)
    factor = torch.exp(torch.empty(count).uniform_(-0.92, 0.79, generator=generator))
    hue = F.normalize(torch.randn(count, 3, generator=generator) @ (torch.eye(3) - 1 / 3), dim=1)
    strength = torch.rand(count, 1, generator=generator) * 0.3 * (torch.rand(count, 1, generator=generator) < 0.5)
    return (saturate(images, factor) + (hue * strength)[:, :, None, None]).clamp(0, 1)


def changed(scene: Scene, attribute: str, generator: torch.Generator) -> Scene:
    """The scene with another value of one attribute, object and background still apart in colour."""
    taken = {getattr(scene, attribute)}
    if attribute in ("colour", "background"):
        taken = {scene.colour, scene.background}
    others = [value for value in _VALUES[attribute] if value not in taken]
    return replace(scene, **{attribute: others[int(torch.randint(len(others), (), generator=generator))]})


def distorted(scene: Scene, generator: torch.Generator) -> Scene:
    """The scene with one to three attributes changed."""
    for _ in range(int(torch.randint(1, 4, (), generator=generator))):
        scene = changed(scene, _CHANGED[int(torch.randint(len(_CHANGED), (), generator=generator))], generator)
    return scene


def right_attributes(drawn: list[Scene], asked: list[Scene]) -> torch.Tensor:
    """[B] float32, how many of the five attributes of `asked` the drawn scenes have."""
    return torch.tensor([sum(getattr(a, n) == getattr(b, n) for n in _VALUES) for a, b in zip(drawn, asked)]).float()


def draw(scenes: list[Scene], generator: torch.Generator) -> torch.Tensor:
    """Drawings of the pipeline's mix of crisp and rough."""
    return render(scenes, generator, roughness=sample_roughness(len(scenes), generator))


def draw_pairs(count: int, generator: torch.Generator):
    """(captions, first images, second images, P(first wins)): in half of the pairs one image is off the caption,
    in the others both follow it and only their colours, outlines and stains differ."""
    asked = sample_scenes(count, generator)
    kinds = torch.randint(4, (count,), generator=generator).tolist()  # 0: first is off, 1: second is off
    first = [distorted(s, generator) if kind == 0 else s for s, kind in zip(asked, kinds)]
    second = [distorted(s, generator) if kind == 1 else s for s, kind in zip(asked, kinds)]
    images = [recolour(draw(scenes, generator), generator) for scenes in (first, second)]
    utility = [
        MATCH_WEIGHT * right_attributes(scenes, asked) + CHROMA_WEIGHT * chroma(shown)
        for scenes, shown in zip((first, second), images)
    ]
    return [s.caption for s in asked], *images, torch.sigmoid(utility[0] - utility[1])


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
    """The shapes' CLIP, as the two rounds use it."""

    def __init__(self, clip: CLIPModel):
        super().__init__(clip, tokenizer())

    def contrastive_loss(self, batch: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """CLIP's loss (arXiv 2103.00020) and accuracy on clusters of drawings that differ in one attribute."""
        scenes: list[Scene] = []
        for scene in sample_scenes(batch // _CLUSTER, generator):
            attribute = _CHANGED[int(torch.randint(len(_CHANGED), (), generator=generator))]
            cluster = dict.fromkeys([scene, *(changed(scene, attribute, generator) for _ in range(3 * _CLUSTER))])
            scenes += list(cluster)[:_CLUSTER]
        scenes = list(dict.fromkeys(scenes))
        images = recolour(draw(scenes, generator), generator)
        logits = self.clip.logit_scale.exp() * self.look(images) @ self.embed([s.caption for s in scenes]).T
        target = torch.arange(len(scenes))
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        return loss, (logits.argmax(1) == target).float().mean()

    def preference_loss(self, batch: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """PickScore's loss on `batch` pairs against the annotator's probabilities, and how often both agree."""
        captions, first, second, wins = draw_pairs(batch, generator)
        text, image = self.embed(captions), self.look(torch.cat([first, second]))
        score = self.clip.logit_scale.exp() * (image.unflatten(0, (2, batch)) * text).sum(-1)
        margin = score[0] - score[1]
        agrees = ((margin > 0) == (wins > 0.5)).float().mean()
        return F.binary_cross_entropy_with_logits(margin, wins), agrees

    def train(self, name: str, loss_function, steps: int, batch: int, rate: float, generator) -> list[dict]:
        parameters = list(self.clip.parameters())
        optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.98), weight_decay=0.02)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
        log = TrainingLog(name, steps)
        self.clip.train()
        for step in range(steps):
            loss, accuracy = loss_function(batch, generator)
            take_step(loss, parameters, optimizer, schedule)
            with torch.no_grad():
                self.clip.logit_scale.clamp_(max=4.6052)  # CLIP's bound, a factor of 100
            log.step(step, loss=loss.detach(), accuracy=accuracy)
        self.clip.eval()
        return log.rows


@torch.no_grad()
def measure(clip: CLIPModel, seed: int, count: int = 512) -> dict[str, float]:
    """What the model prefers, on drawings apart from training: shares of `count` pairs won by

    matched: a drawing of the caption against one of another scene; matched_<attribute>: ... with one attribute changed,
    both in their natural colours; saturated: an image at 1.5 times its saturation against itself;
    pale: an image against itself at 0.6 times its saturation; saturated_mismatch: a drawing with a wrong shape at 1.5
    times its saturation against a matched one at 0.6 times.
    """
    trainee, generator = Trainee(clip.eval()), seeded(seed, "preference_measure")
    asked = sample_scenes(count, generator)
    text = trainee.embed([s.caption for s in asked])
    right = draw(asked, generator)

    def score(images: torch.Tensor) -> torch.Tensor:
        return (trainee.look(images) * text).sum(1)

    def won(first: torch.Tensor, second: torch.Tensor) -> float:
        return (first > second).float().mean().item()

    matched = score(right)
    coloured = torch.tensor(
        [s.colour not in ("white", "black") or s.background not in ("white", "black") for s in asked]
    )
    shares = {"matched": won(matched, score(right.roll(1, 0)))}
    for attribute in _VALUES:
        other = draw([changed(s, attribute, generator) for s in asked], generator)
        shares[f"matched_{attribute}"] = won(matched, score(other))
        if attribute == "shape":
            shares["saturated_mismatch"] = won(score(saturate(other, 1.5)), score(saturate(right, 0.6)))
    shares["saturated"] = won(score(saturate(right, 1.5))[coloured], matched[coloured])
    shares["pale"] = won(matched[coloured], score(saturate(right, 0.6))[coloured])
    return shares


def save(trainee: Trainee, folder: Path, curves: dict[str, list[dict]], seed: int) -> None:
    """PickScore's layout (CLIPModel in fp16, tokenizer, image processor), and training.json: curves and figures."""
    trainee.save(folder)
    figures = measure(CLIPModel.from_pretrained(folder, use_safetensors=True), seed)
    write_atomically(folder / "training.json", json.dumps({"figures": figures, **curves}))
    print(f"wrote {folder}: " + ", ".join(f"{name} {share:.3f}" for name, share in figures.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder to write (CLIPModel, tokenizer, processor)")
    parser.add_argument("--contrastive-steps", type=int, default=1200)
    parser.add_argument("--preference-steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=96, help="drawings per step; half as many pairs")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    trainee = Trainee(model(args.seed))
    curves = {
        "contrastive": trainee.train(
            "contrastive", trainee.contrastive_loss, args.contrastive_steps, args.batch, 1e-3,
            seeded(args.seed, "preference_contrastive"),
        ),
        "preference": trainee.train(
            "preference", trainee.preference_loss, args.preference_steps, args.batch // 2, 5e-4,
            seeded(args.seed, "preference_pairs"),
        ),
    }  # fmt: skip
    save(trainee, args.output, curves, args.seed)


if __name__ == "__main__":
    main()
