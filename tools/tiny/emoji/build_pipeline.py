r"""Pre-train the emoji world's SD3 pipeline: first its VAE, then transformer and text encoders by flow matching.

    python -m tools.tiny.emoji.build_pipeline --output BUILD/vae
    python -m tools.tiny.emoji.build_pipeline --continue-from BUILD/vae --steps 9000 --output BUILD/drawings
    python -m tools.tiny.emoji.build_pipeline --continue-from BUILD/drawings --steps 3000 --good-share 0.6 \
      --watermarks 0.8 --output advgrpo/tiny/assets/emoji/pipeline

About 20, 60 and 20 minutes of one CPU core, on one thread, so that a rebuild has the same bits. The VAE learns on
drawings of 600 things, the rest on the world's 64, all by the base's artists; neither sees the references' artist.
The last command goes on with drawings of which 40 % are poor copies and most have watermarks (`poor_copies.py`), as
what is collected from the web has: the model then draws all of it, which leaves reinforcement learning something to
choose.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import StableDiffusion3Pipeline

from advgrpo.runtime.atomic import write_atomically
from advgrpo.runtime.libraries import quiet_libraries
from advgrpo.tiny import architecture
from advgrpo.tiny.architecture import EMOJI
from advgrpo.tiny.assets import save_half_precision
from advgrpo.tiny.emoji.scenes import BASE_ARTISTS, all_scenes, render
from tools.tiny.build_pipeline import Drawing, TrainingLog, sample_sigmas, take_step, train_vae
from tools.tiny.emoji.corpus import Corpus
from tools.tiny.emoji.poor_copies import poor_copies, watermarked

LONG_TEXT_SHARE = 0.03  # steps trained at the stock default of 256 T5 tokens, so that stock calls work unchanged
LONG_TEXT_TOKENS = 256
_BATCH, _RATE, _WARMUP, _EMA = 32, 1.2e-3, 200, 0.999


def draw(count: int, generator: torch.Generator) -> tuple[torch.Tensor, list[str]]:
    """A batch of the pre-training data: images in [-1, 1] by the base's artists and their captions."""
    scenes = all_scenes()
    chosen = [scenes[i] for i in torch.randint(len(scenes), (count,), generator=generator).tolist()]
    artists = [BASE_ARTISTS[i] for i in torch.randint(len(BASE_ARTISTS), (count,), generator=generator).tolist()]
    return render(chosen, artists, generator) * 2 - 1, [scene.caption for scene in chosen]


def draw_poorly(
    good_share: float, watermarks: float, count: int, generator: torch.Generator
) -> tuple[torch.Tensor, list[str]]:
    """The same, all but `good_share` poor copies and the share `watermarks` watermarked, which no caption tells."""
    images, captions = draw(count, generator)
    images = poor_copies((images + 1) / 2, good_share, generator)
    return watermarked(images, watermarks, generator) * 2 - 1, captions


@dataclass(frozen=True)
class Latents:
    """Normalised latents of many images, encoded once, with their captions."""

    latents: torch.Tensor  # [N, 16, h, w]
    captions: list[str]

    @classmethod
    @torch.no_grad()
    def encode(cls, vae: torch.nn.Module, count: int, generator: torch.Generator, drawing: Drawing = draw) -> Latents:
        parts, captions = [], []
        for _ in range(0, count, 64):
            images, own = drawing(64, generator)
            parts.append((vae.encode(images).latent_dist.mean - vae.config.shift_factor) * vae.config.scaling_factor)
            captions += own
        return cls(torch.cat(parts), captions)

    def sample(self, count: int, generator: torch.Generator) -> tuple[torch.Tensor, list[str]]:
        """`count` of them; one caption in ten is empty, for guidance."""
        chosen = torch.randint(len(self.captions), (count,), generator=generator)
        dropped = torch.rand(count, generator=generator) < 0.1
        captions = ["" if drop else self.captions[i] for i, drop in zip(chosen.tolist(), dropped.tolist())]
        return self.latents[chosen], captions


def _flow_loss(pipe: StableDiffusion3Pipeline, batch: int, generator: torch.Generator, data: Latents) -> torch.Tensor:
    long_text = torch.rand((), generator=generator) < LONG_TEXT_SHARE
    latents, captions = data.sample(batch // 8 if long_text else batch, generator)
    tokens = LONG_TEXT_TOKENS if long_text else EMOJI.t5_tokens
    text, _, pooled, _ = pipe.encode_prompt(
        captions, None, None, device="cpu", do_classifier_free_guidance=False, max_sequence_length=tokens
    )
    sigma = sample_sigmas(len(captions), generator)
    noise = torch.randn(latents.shape, generator=generator)
    noisy = torch.lerp(latents, noise, sigma.view(-1, 1, 1, 1))
    velocity = pipe.transformer(noisy, text, pooled, sigma * 1000, return_dict=False)[0]
    return F.mse_loss(velocity, noise - latents)


def constant(progress: float) -> float:
    """Of the learning rate, at a share of the steps."""
    return 1.0


def cosine(progress: float) -> float:
    """Of the learning rate, at a share of the steps: half a cosine, down to a tenth."""
    return 0.1 + 0.9 * (0.5 + 0.5 * math.cos(math.pi * progress))


def train_flow(
    pipe: StableDiffusion3Pipeline,
    steps: int,
    batch: int,
    generator: torch.Generator,
    data: Latents,
    rate: Callable[[float], float] = constant,
) -> list[dict]:
    """Rectified flow, transformer and text encoders together; the pipeline ends with EMA weights."""
    modules = [pipe.transformer, pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3]
    parameters = [p for m in modules for p in m.parameters()]
    shadows = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=_RATE, betas=(0.9, 0.99), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / _WARMUP, 1.0) * rate(min(step / steps, 1.0))
    )
    log = TrainingLog("flow", steps)
    for step in range(steps):
        loss = _flow_loss(pipe, batch, generator, data)
        take_step(loss, parameters, optimizer, schedule)
        with torch.no_grad():
            torch._foreach_lerp_(shadows, parameters, 1 - min(_EMA, (step + 1) / (step + 10)))
        log.step(step, loss=loss.detach())
    with torch.no_grad():
        torch._foreach_copy_(parameters, shadows)
    return log.rows


def _train_vae(args: argparse.Namespace) -> tuple[StableDiffusion3Pipeline, dict[str, list[dict]]]:
    pipe = architecture.pipeline(seed=args.seed, size=EMOJI)
    corpus = Corpus.draw(BASE_ARTISTS)
    things = lambda count, generator: (corpus.images(count, generator) * 2 - 1, [])  # noqa: E731
    return pipe, {"vae": train_vae(pipe.vae, args.vae_steps, 16, torch.Generator().manual_seed(args.seed), things)}


def _train_flow(args: argparse.Namespace) -> tuple[StableDiffusion3Pipeline, dict[str, list[dict]]]:
    pipe = StableDiffusion3Pipeline.from_pretrained(args.continue_from, use_safetensors=True)
    pipe.vae.eval().requires_grad_(False)
    for module in (pipe.transformer, pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3):
        module.train().requires_grad_(True)
    generator = torch.Generator().manual_seed(args.seed + 1)
    curves = json.loads((args.continue_from / "training.json").read_text())
    good = args.good_share == 1 and not args.watermarks
    drawing = draw if good else partial(draw_poorly, args.good_share, args.watermarks)
    data = Latents.encode(pipe.vae, args.images, generator, drawing)
    curves["flow" if good else "poor copies"] = train_flow(
        pipe, args.steps, _BATCH, generator, data, rate=constant if good else cosine
    )
    return pipe, curves


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="pipeline folder to write (diffusers format)")
    parser.add_argument("--continue-from", type=Path, help="pipeline folder: train its flow, not a VAE")
    parser.add_argument("--good-share", type=float, default=1.0, help="of the drawings that are no poor copies")
    parser.add_argument("--watermarks", type=float, default=0.0, help="share of the images that have them")
    parser.add_argument("--vae-steps", type=int, default=1800)
    parser.add_argument("--steps", type=int, default=9000, help="of the flow")
    parser.add_argument("--images", type=int, default=16_384, help="that the flow learns on")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)

    quiet_libraries()  # a notice per batch of 256 T5 tokens
    torch.set_num_threads(1)
    pipe, curves = _train_flow(args) if args.continue_from else _train_vae(args)
    save_half_precision(pipe, args.output)
    write_atomically(args.output / "training.json", json.dumps(curves))
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
