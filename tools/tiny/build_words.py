"""Teach the tiny SD3 pipeline to draw words: fine-tune its VAE, then transformer and text encoders, on word images.

    python -m tools.tiny.build_words --output advgrpo/tiny/assets/words/pipeline

About 17 minutes of one CPU core; what it reaches is in `words.py`. Captions read `the word "CAT" in red on a white
background`, which the T5 tokenizer of "tiny" cannot spell; it gets capital letters and "word" as pieces, at the end, so
that all others keep their numbers. Call the result with max_sequence_length=16. The CLIPs see the first 13 tokens,
without the background.
"""

from __future__ import annotations

import argparse
import json
import string
from pathlib import Path

import torch
from diffusers import StableDiffusion3Pipeline
from transformers import T5TokenizerFast

from advgrpo.runtime.atomic import write_atomically
from advgrpo.runtime.libraries import quiet_libraries
from advgrpo.tiny import pipeline_dir
from advgrpo.tiny.assets import save_half_precision
from advgrpo.tiny.shapes import IMAGE_SIZE
from advgrpo.tiny.words import all_scenes, render
from tools.tiny.build_pipeline import train_flow, train_vae

T5_TOKENS = 16


def draw(count: int, generator: torch.Generator) -> tuple[torch.Tensor, list[str]]:
    """A batch of word images in [-1, 1] and their captions."""
    scenes = all_scenes()
    chosen = [scenes[i] for i in torch.randint(len(scenes), (count,), generator=generator).tolist()]
    return render(chosen, generator, size=IMAGE_SIZE) * 2 - 1, [scene.caption for scene in chosen]


def add_letters(pipe: StableDiffusion3Pipeline) -> None:
    """Give the T5 capital letters, which start as the small ones' embeddings, and the piece "word"."""
    old = pipe.tokenizer_3
    pieces = [tuple(piece) for piece in json.loads(old.backend_tokenizer.to_str())["model"]["vocab"]]
    pieces += [("▁word", -1.0), *((letter, -10.0) for letter in string.ascii_uppercase)]
    new = T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=T5_TOKENS)
    pipe.text_encoder_3.resize_token_embeddings(len(new), mean_resizing=False)
    weight = pipe.text_encoder_3.get_input_embeddings().weight
    small, capital = (new.convert_tokens_to_ids(list(s)) for s in (string.ascii_lowercase, string.ascii_uppercase))
    with torch.no_grad():
        weight[capital] = weight[small]
    pipe.register_modules(tokenizer_3=new)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="pipeline folder to write (diffusers format)")
    parser.add_argument("--init", type=Path, default=pipeline_dir(), help="pipeline folder to start from")
    parser.add_argument("--vae-steps", type=int, default=400)
    parser.add_argument("--flow-steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    quiet_libraries()  # one notice per batch that the CLIPs see a part of the text
    torch.manual_seed(args.seed)  # the new embeddings of resize_token_embeddings
    pipe = StableDiffusion3Pipeline.from_pretrained(args.init, use_safetensors=True)
    add_letters(pipe)
    generator = torch.Generator().manual_seed(args.seed)
    curves = {"vae": train_vae(pipe.vae, args.vae_steps, args.batch, generator, draw)}
    pipe.vae.requires_grad_(False)
    curves["flow"] = train_flow(pipe, args.flow_steps, args.batch, generator, draw, T5_TOKENS)
    save_half_precision(pipe, args.output)
    write_atomically(args.output / "training.json", json.dumps(curves))
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
