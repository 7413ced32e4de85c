"""Write the prompt lists and the reference images: drawings by the references' artist, and references.json.

python -m tools.tiny.build_references --output advgrpo/tiny/assets

Five disjoint lists. Names in `held_out_names.txt` are in no other list; the others share names but no composition:
prompts.txt trains, held_out_prompts.txt is what a run evaluates on, tuning_prompts.txt chooses settings, and
report_prompts.txt and held_out_names.txt are for reported figures only.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from advgrpo.runtime.atomic import write_atomically
from advgrpo.tiny.assets import write_image
from advgrpo.tiny.scenes import NAMES, REFERENCE_ARTIST, Scene, compositions, render

HELD_OUT_NAMES = 16
PER_NAME = {"prompts": 8, "held_out_prompts": 1, "tuning_prompts": 2, "report_prompts": 2, "held_out_names": 6}
REFERENCES = {"prompts": 3, "held_out_prompts": 3, "tuning_prompts": 2, "report_prompts": 2, "held_out_names": 2}


def split_prompts(seed: int = 20_256) -> dict[str, list[str]]:
    """The lists' captions; every name equally often in a list, compositions at random without repetition."""
    generator = torch.Generator().manual_seed(seed)
    shuffled = lambda items: [items[i] for i in torch.randperm(len(items), generator=generator).tolist()]  # noqa: E731
    names = shuffled(list(NAMES))
    lists: dict[str, list[str]] = {name: [] for name in PER_NAME}
    for name in sorted(names[HELD_OUT_NAMES:]):
        remaining = shuffled(compositions())
        for part in list(PER_NAME)[:-1]:
            own, remaining = remaining[: PER_NAME[part]], remaining[PER_NAME[part] :]
            lists[part] += [Scene(name, *composition).caption for composition in own]
    for name in sorted(names[:HELD_OUT_NAMES]):
        own = shuffled(compositions())[: PER_NAME["held_out_names"]]
        lists["held_out_names"] += [Scene(name, *composition).caption for composition in own]
    return {part: shuffled(captions) for part, captions in lists.items()}


def write_references(folder: Path, lists: dict[str, list[str]], generator: torch.Generator) -> int:
    """PNG files folder/NNN-K.png and references.json {prompt: [files]}; returns how many images."""
    folder.mkdir(parents=True, exist_ok=True)
    index: dict[str, list[str]] = {}
    for part, captions in lists.items():
        for caption in captions:
            count = REFERENCES[part]
            images = render([Scene.parse(caption)] * count, [REFERENCE_ARTIST] * count, generator)
            index[caption] = [f"{len(index):03d}-{k}.png" for k in range(count)]
            for name, image in zip(index[caption], images):
                write_image(folder / name, (image * 255).round().byte())
    write_atomically(folder / "references.json", json.dumps(index, indent=1) + "\n")
    return sum(map(len, index.values()))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="assets folder to write into")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    lists = split_prompts()
    count = write_references(args.output / "references", lists, torch.Generator().manual_seed(args.seed))
    for name, captions in lists.items():
        write_atomically(args.output / f"{name}.txt", "".join(f"{caption}\n" for caption in captions))
    counts = ", ".join(f"{len(captions)} in {name}" for name, captions in lists.items())
    print(f"wrote {count} references; prompts: {counts}")


if __name__ == "__main__":
    main()
