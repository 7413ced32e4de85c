"""Draw the reference set: 8 crisp images per prompt, prompt lists, and references.json.

python -m tools.tiny.build_references --output advgrpo/tiny/assets
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from advgrpo.runtime.atomic import write_atomically
from advgrpo.tiny.assets import write_image
from advgrpo.tiny.shapes import Scene, render, split_prompts


def write_images(folder: Path, prompts: list[str], per_prompt: int, generator: torch.Generator) -> dict[str, list]:
    """PNG files folder/NNN-K.png; returns {prompt: [file names]}."""
    folder.mkdir(parents=True, exist_ok=True)
    index = {}
    for number, prompt in enumerate(prompts):
        images = render([Scene.parse(prompt)] * per_prompt, generator)
        names = [f"{number:03d}-{k}.png" for k in range(per_prompt)]
        for name, image in zip(names, images):
            write_image(folder / name, (image * 255).round().byte())
        index[prompt] = names
    return index


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="assets folder to write into")
    parser.add_argument("--train", type=int, default=96, help="training prompts")
    parser.add_argument("--held-out", type=int, default=48, help="evaluation prompts")
    parser.add_argument("--report", type=int, default=48, help="prompts of reported results, never of tuning")
    parser.add_argument("--per-prompt", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    lists = split_prompts(args.train, args.held_out, args.report)
    generator = torch.Generator().manual_seed(args.seed)
    index = write_images(args.output / "references", [p for part in lists for p in part], args.per_prompt, generator)
    write_atomically(args.output / "references" / "references.json", json.dumps(index, indent=1) + "\n")
    for name, prompts in zip(("prompts.txt", "held_out_prompts.txt", "report_prompts.txt"), lists):
        write_atomically(args.output / name, "".join(f"{p}\n" for p in prompts))
    counts = " + ".join(str(len(prompts)) for prompts in lists)
    print(f"wrote {counts} prompts with {args.per_prompt} references each to {args.output}")


if __name__ == "__main__":
    main()
