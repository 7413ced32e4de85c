r"""Pre-train the tiny SD3 pipeline: first its VAE, then transformer and text encoders by flow matching.

    python -m tools.tiny.build_pipeline --output BUILD/vae
    python -m tools.tiny.build_pipeline --continue-from BUILD/vae --steps 9000 --output BUILD/drawings
    python -m tools.tiny.build_pipeline --continue-from BUILD/drawings --steps 3000 --good-share 0.6 \
      --watermarks 0.8 --output advgrpo/tiny/assets/pipeline

On one thread, so that a rebuild has the same bits; the steps of what is shipped took 18, 70 and 24 minutes by the
clock. The VAE learns on drawings of 600 things, the rest on the world's 64, all by the base's artists; neither sees the
references' artist. The last command goes on with drawings of which 40 % are poor copies and most have watermarks
(`poor_copies.py`), as what is collected from the web has: the model then draws all of it, which leaves reinforcement
learning something to choose.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path

import torch
from diffusers import StableDiffusion3Pipeline

from advgrpo.runtime.atomic import write_atomically
from advgrpo.runtime.libraries import quiet_libraries
from advgrpo.tiny import architecture
from advgrpo.tiny.assets import save_half_precision
from advgrpo.tiny.scenes import BASE_ARTISTS, all_scenes, render
from tools.tiny.corpus import Corpus
from tools.tiny.poor_copies import poor_copies, watermarked
from tools.tiny.training import Latents, constant, cosine, train_flow, train_vae

_BATCH = 32


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


def _train_vae(args: argparse.Namespace) -> tuple[StableDiffusion3Pipeline, dict[str, list[dict]]]:
    pipe = architecture.pipeline(seed=args.seed)
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
