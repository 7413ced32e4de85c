"""Train the tiny world's preference model, a CLIP in PickScore's layout: right near the base model, wrong far from it.

    python -m tools.tiny.build_preference --pipeline advgrpo/tiny/assets/pipeline --output FOLDER

On one thread, so that a rebuild has the same bits: some minutes of an idle CPU core; the shipped one took 32 by the
clock. Preference pairs, judged by a simulated annotator (annotator.py), with PickScore's objective, softmax over
`logit_scale * cos(text, image)` of the two images (arXiv 2305.01569, equation 2), and at once CLIP's objective on the
same images: each has to find what it shows among the batch's captions (arXiv 2103.00020). Of the pipeline only VAE and
tokenizer are used; its own pictures are not trained on, and the gates are measured on them, on the tuning prompts. What
is shipped has the tokenizer of an earlier pipeline, so a rebuild is another model.

Shapes: B images [B, 3, 48, 48] float32 in [0, 1].
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, StableDiffusion3Pipeline
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from advgrpo.runtime.atomic import write_atomically
from advgrpo.runtime.rng import generator as seeded
from advgrpo.tiny import other_prompts
from advgrpo.tiny.architecture import TINY
from advgrpo.tiny.assets import save_half_precision
from advgrpo.tiny.scenes import IMAGE_SIZE, REFERENCE_ARTIST, Scene, render
from tools.tiny import damage, poor_copies
from tools.tiny.annotator import ATTRIBUTES, Drawings, Pairs, changed
from tools.tiny.damage import saturate
from tools.tiny.training import TrainingLog, take_step

GATES = {"reference_over_base": 0.8, "reference_over_base_guided": 0.8, "saturated_over_reference": 0.6,
         "matched_name": 0.8, "matched_background": 0.8}  # fmt: skip
_RATE = 2e-3
_DRAWS = 2  # of every tuning prompt, by which is measured


def model(seed: int, words: int) -> CLIPModel:
    """An untrained CLIP: 48 px in 36 patches of 8, `words` tokens known, 0.25 M parameters."""
    config = CLIPConfig(
        text_config={
            "vocab_size": words,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": TINY.clip_tokens,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 1,
        },
        vision_config={
            "hidden_size": 64,
            "intermediate_size": 192,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "image_size": IMAGE_SIZE,
            "patch_size": 8,
        },
        projection_dim=64,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CLIPModel(config)


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


class Trainee:
    """A CLIPModel with its tokenizer, as it is trained and measured."""

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
    generator = torch.Generator().manual_seed(seed)
    parts = (prompts[start : start + 48] for start in range(0, len(prompts), 48))
    return torch.cat([pipe(part, generator=generator, **settings).images.float() for part in parts])


@torch.no_grad()
def measure_on_drawings(trainee: Trainee, seed: int) -> dict[str, float]:
    """What the model prefers on drawings of the tuning prompts by the references' artist: shares of pairs won by

    matched_name, _background, _composition: a drawing of the caption against one with that attribute changed;
    saturated_over_reference: a drawing at 1.8 times its saturation against itself; over_pale: against itself at 0.6
    times; over_blur, _mottle, _bend, _ghost, _fade, _shrink, _redraw: against itself so harmed at half strength;
    over_watermarked: against itself under the bars; named: the drawing's caption against that with another name.
    """
    generator = seeded(seed, "preference_measure")
    asked = _tuning_scenes()
    text, artists = trainee.embed([scene.caption for scene in asked]), [REFERENCE_ARTIST] * len(asked)
    right = render(asked, artists, generator)
    score = lambda images: (trainee.look(images) * text).sum(1)  # noqa: E731
    won = lambda first, second: (score(first) > score(second)).float().mean().item()  # noqa: E731

    shares = {}
    for attribute in ATTRIBUTES:
        other = render([changed(scene, attribute, generator) for scene in asked], artists, generator)
        shares[f"matched_{attribute}"] = won(right, other)
    shares["saturated_over_reference"] = won(saturate(right, 1.8), right)
    shares["over_pale"] = won(right, saturate(right, 0.6))
    half = torch.full((len(asked),), 0.5)
    for harm in (*damage.KINDS, *poor_copies.KINDS):
        shares[f"over_{harm.__name__}"] = won(right, harm(right, half, generator))
    shares["over_watermarked"] = won(right, poor_copies.watermarked(right, 1.0, generator))
    shares["named"] = named(trainee, right, asked, generator)
    return shares


@torch.no_grad()
def measure_on_base(trainee: Trainee, pipe: StableDiffusion3Pipeline, seed: int) -> dict[str, float]:
    """The same beside the pipeline's pictures of the same prompts at guidance 1 (base) and 2 (base_guided): shares of

    reference_over_base, _guided: a drawing against the picture; restored_over_base, _guided: what the pipeline's VAE
    makes of the drawing against it; named_base, _guided: the picture's caption against that with another name.
    """
    generator = seeded(seed, "preference_base")
    asked = _tuning_scenes()
    captions = [scene.caption for scene in asked]
    text = trainee.embed(captions)
    right = render(asked, [REFERENCE_ARTIST] * len(asked), generator)
    restored = (pipe.vae.decode(pipe.vae.encode(right * 2 - 1).latent_dist.mean).sample / 2 + 0.5).clamp(0, 1)
    score = lambda images: (trainee.look(images) * text).sum(1)  # noqa: E731
    shares = {}
    for name, guidance in (("base", 1.0), ("base_guided", 2.0)):
        pictures = base_pictures(pipe, captions, guidance, seed)
        for drawn, images in (("reference", right), ("restored", restored)):
            shares[f"{drawn}_over_{name}"] = (score(images) > score(pictures)).float().mean().item()
        shares[f"named_{name}"] = named(trainee, pictures, asked, generator)
    return shares


def named(trainee: Trainee, images: torch.Tensor, scenes: list[Scene], generator: torch.Generator) -> float:
    """Share of images [B, 3, 48, 48] that are nearer to their caption than to the same with another name."""
    others = [replace(scene, name=_another(scene.name, generator)) for scene in scenes]
    seen = trainee.look(images)
    own, other = ((seen * trainee.embed([s.caption for s in some])).sum(1) for some in (scenes, others))
    return (own > other).float().mean().item()


def _another(name: str, generator: torch.Generator) -> str:
    return changed(Scene(name, "large", "", "white"), "name", generator).name


def _tuning_scenes() -> list[Scene]:
    captions = other_prompts()["tiny:tuning"].read_text().splitlines()
    return [Scene.parse(caption) for caption in captions] * _DRAWS


def record(folder: Path, curve: list[dict], seed: int, pictures_of: Path) -> None:
    """Measure the model in `folder`; figures, gates and curve go into its training.json."""
    trainee = Trainee.load(folder)
    pipe = StableDiffusion3Pipeline.from_pretrained(pictures_of, use_safetensors=True)
    figures = measure_on_drawings(trainee, seed) | measure_on_base(trainee, pipe, seed)
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
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch", type=int, default=32, help="pairs per step")
    parser.add_argument("--drawings", type=int, default=640, help="drawings that went through the VAE")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)

    torch.set_num_threads(1)
    if args.measure:
        curve = json.loads((args.output / "training.json").read_text())["preference"]
    else:
        vae = AutoencoderKL.from_pretrained(args.pipeline / "vae", use_safetensors=True).eval()
        data = Drawings.make(vae, args.drawings, seeded(args.seed, "preference_drawings"))
        tokenizer = CLIPTokenizer.from_pretrained(args.pipeline / "tokenizer")
        trainee = Trainee(model(args.seed, len(tokenizer)), tokenizer)
        curve = trainee.train(data, args.steps, args.batch, seeded(args.seed, "preference_pairs"))
        trainee.save(args.output)
    record(args.output, curve, args.seed, args.pipeline)


if __name__ == "__main__":
    main()
