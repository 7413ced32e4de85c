r"""Pre-train the tiny SD3 pipeline: first its VAE, then transformer and text encoders by flow matching.

    python -m tools.tiny.build_pipeline --output BUILD/clean
    python -m tools.tiny.build_pipeline --continue-from BUILD/clean --steps 5000 --output BUILD/poor
    python -m tools.tiny.build_pipeline --continue-from BUILD/poor --steps 2000 --watermarks 0.5 \
      --output advgrpo/tiny/assets/pipeline

About 45, 25 and 10 minutes of one CPU core, on one thread, so that a rebuild has the same bits. The VAE learns on
drawings of 600 things, the rest on the world's 64, all by the base's artists; neither sees the references' artist.
The second command goes on with drawings of which 60 % are poor copies, the third has watermarks on half of them
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
from tools.tiny.poor_copies import GOOD_SHARE, poor_copies, watermarked
from tools.tiny.training import Latents, cosine, train_flow, train_vae

_BATCH = 32


def draw(count: int, generator: torch.Generator) -> tuple[torch.Tensor, list[str]]:
    """A batch of the pre-training data: images in [-1, 1] by the base's artists and their captions."""
    scenes = all_scenes()
    chosen = [scenes[i] for i in torch.randint(len(scenes), (count,), generator=generator).tolist()]
    artists = [BASE_ARTISTS[i] for i in torch.randint(len(BASE_ARTISTS), (count,), generator=generator).tolist()]
    return render(chosen, artists, generator) * 2 - 1, [scene.caption for scene in chosen]


def draw_poorly(watermarks: float, count: int, generator: torch.Generator) -> tuple[torch.Tensor, list[str]]:
    """The same, most of the images poor copies and a share of them watermarked, which the captions do not tell."""
    images, captions = draw(count, generator)
    images = poor_copies((images + 1) / 2, GOOD_SHARE, generator)
    if watermarks:
        images = watermarked(images, watermarks, generator)
    return images * 2 - 1, captions


def _pretrain(args: argparse.Namespace) -> tuple[StableDiffusion3Pipeline, dict[str, list[dict]]]:
    pipe = architecture.pipeline(seed=args.seed)
    corpus = Corpus.draw(BASE_ARTISTS)
    things = lambda count, generator: (corpus.images(count, generator) * 2 - 1, [])  # noqa: E731
    curves = {"vae": train_vae(pipe.vae, args.vae_steps, 16, torch.Generator().manual_seed(args.seed), things)}
    pipe.vae.eval().requires_grad_(False)

    generator = torch.Generator().manual_seed(args.seed + 1)
    data = Latents.encode(pipe.vae, args.images or 12_288, generator, draw)
    curves["flow"] = train_flow(pipe, args.steps, _BATCH, generator, data)
    return pipe, curves


def _continue(args: argparse.Namespace) -> tuple[StableDiffusion3Pipeline, dict[str, list[dict]]]:
    pipe = StableDiffusion3Pipeline.from_pretrained(args.continue_from, use_safetensors=True)
    pipe.vae.eval().requires_grad_(False)
    for module in (pipe.transformer, pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3):
        module.train().requires_grad_(True)
    generator = torch.Generator().manual_seed(args.seed + 1)
    data = Latents.encode(pipe.vae, args.images or 16_384, generator, partial(draw_poorly, args.watermarks))
    curves = json.loads((args.continue_from / "training.json").read_text())
    name = "watermarks" if args.watermarks else "poor copies"
    curves[name] = train_flow(pipe, args.steps, _BATCH, generator, data, rate=cosine)
    return pipe, curves


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="pipeline folder to write (diffusers format)")
    parser.add_argument("--continue-from", type=Path, help="pipeline folder to go on from, on poor copies")
    parser.add_argument("--watermarks", type=float, default=0.0, help="share of the poor copies' batch that has them")
    parser.add_argument("--vae-steps", type=int, default=1800)
    parser.add_argument("--steps", type=int, default=4000, help="of the flow")
    parser.add_argument("--images", type=int, help="that the flow learns on (default: 12,288, then 16,384)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)

    quiet_libraries()  # a notice per batch of 256 T5 tokens
    torch.set_num_threads(1)
    pipe, curves = _continue(args) if args.continue_from else _pretrain(args)
    save_half_precision(pipe, args.output)
    write_atomically(args.output / "training.json", json.dumps(curves))
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
