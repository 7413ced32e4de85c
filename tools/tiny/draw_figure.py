"""Draw docs/figures/tiny_base.png: what the artists draw and what the base pipeline makes of the same captions.

python -m tools.tiny.draw_figure --output docs/figures/tiny_base.png
python -m tools.tiny.draw_figure --lora runs/tiny/lora --output docs/figures/tiny_gain.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import StableDiffusion3Pipeline

from advgrpo.reporting.plots import draw_grid
from advgrpo.runtime.libraries import quiet_libraries
from advgrpo.tiny import WORLDS, other_prompts
from advgrpo.tiny.scenes import BASE_ARTISTS, REFERENCE_ARTIST, Scene, render

COLUMNS = 12
SCALES = (1.0, 2.0, 3.0)


@torch.no_grad()
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--lora", type=Path, help="draw the base and it at guidance 2 instead, on the same noise")
    args = parser.parse_args(arguments)
    quiet_libraries()
    world = WORLDS["tiny"]
    shown = "report" if args.lora else "tuning"
    captions = other_prompts()[f"tiny:{shown}"].read_text().splitlines()[:COLUMNS]
    scenes = [Scene.parse(caption) for caption in captions]
    rows = [
        (f"drawn by {artist}", [("", render(scenes, [artist] * COLUMNS))])
        for artist in (REFERENCE_ARTIST, BASE_ARTISTS[1])
    ]
    pipe = StableDiffusion3Pipeline.from_pretrained(world.pipeline, use_safetensors=True)
    pipe.set_progress_bar_config(disable=True)
    side = world.image_size // 4
    latents = torch.randn(COLUMNS, 16, side, side, generator=torch.Generator().manual_seed(5))

    def add(name: str, scale: float) -> None:
        images = pipe(
            captions, latents=latents, num_inference_steps=10, guidance_scale=scale, output_type="pt",
            max_sequence_length=world.max_sequence_length, height=world.image_size, width=world.image_size,
        ).images  # fmt: skip
        rows.append((f"{name} at guidance {scale:g}", [("", images.float())]))

    for scale in (2.0,) if args.lora else SCALES:
        add("the base pipeline", scale)
    if args.lora:
        pipe.load_lora_weights(args.lora)
        add("with the LoRA", 2.0)
    draw_grid(rows, args.output)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
