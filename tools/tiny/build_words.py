"""Pre-train the tiny SD3 pipeline that draws words: its VAE, then transformer and text encoders, on word images.

    python -m tools.tiny.build_words --output advgrpo/tiny/assets/words/pipeline

An hour or so of one CPU core, on one thread, so that a rebuild has the same bits. What is shipped, and measured in
`words.py`, was made otherwise: 400 steps of the VAE and 3,000 of the flow on word images, from an earlier pipeline of
1,500 and 4,500 steps that drew shapes and whose tokenizers it has; nothing trained by this recipe alone has been
measured. Captions read `the word "CAT" in red on a white background`; call the result with
max_sequence_length=16.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from advgrpo.runtime.atomic import write_atomically
from advgrpo.runtime.libraries import quiet_libraries
from advgrpo.tiny import architecture
from advgrpo.tiny.assets import save_half_precision
from advgrpo.tiny.words import all_scenes, render, vocabulary
from tools.tiny.training import Latents, cosine, train_flow, train_vae

# a caption is 14 pieces to the T5, which begins the word with one of its own, and 13 to the CLIPs
SIZE = architecture.Size(tuple(vocabulary()), 15, image_size=32, dual_layers=3, patch_size=4, capitals=True)


def draw(count: int, generator: torch.Generator) -> tuple[torch.Tensor, list[str]]:
    """A batch of word images in [-1, 1] and their captions."""
    scenes = all_scenes()
    chosen = [scenes[i] for i in torch.randint(len(scenes), (count,), generator=generator).tolist()]
    return render(chosen, generator, size=SIZE.image_size) * 2 - 1, [scene.caption for scene in chosen]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="pipeline folder to write (diffusers format)")
    parser.add_argument("--vae-steps", type=int, default=1900)
    parser.add_argument("--flow-steps", type=int, default=7500)
    parser.add_argument("--images", type=int, default=16_384, help="that the flow learns on")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)

    quiet_libraries()  # a notice per batch of 256 T5 tokens
    torch.set_num_threads(1)
    pipe = architecture.pipeline(seed=args.seed, size=SIZE)
    generator = torch.Generator().manual_seed(args.seed)
    curves = {"vae": train_vae(pipe.vae, args.vae_steps, args.batch, generator, draw)}
    pipe.vae.eval().requires_grad_(False)
    data = Latents.encode(pipe.vae, args.images, generator, draw)
    curves["flow"] = train_flow(pipe, args.flow_steps, args.batch, generator, data, cosine, short_text=SIZE.t5_tokens)
    save_half_precision(pipe, args.output)
    write_atomically(args.output / "training.json", json.dumps(curves))
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
