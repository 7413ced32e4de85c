"""Measure what the world leaves to gain: the references and the base pipeline beside a ceiling that can be missed.

    python -m tools.tiny.measure_world --pipeline advgrpo/tiny/assets/pipeline --output advgrpo/tiny/assets

Shares of pictures whose nearest drawing is of the prompt's name, in the eyes of the independent judge
(advgrpo/tiny/judge.py), on the tuning and the report prompts, two pictures each:

- the ceiling: every artist of the gallery draws the prompts, and is judged without their own drawings;
- the references, and what the base pipeline draws at guidance 1, 1.5, 2 and 3: by the same four galleries, for the
  gates, and by the whole one, as everywhere else.

The gates, printed and kept in world.json: the references reach .9 of the ceiling, and the base lies between .25 and .65
of it at its own best guidance, which the tuning prompts choose. The noise is that of `python -m advgrpo.frontier`.

Shapes: B images [B, 3, 48, 48] float32 in [0, 1].
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from advgrpo.data.references import ReferenceSet
from advgrpo.evaluation.judging import draw
from advgrpo.reporting.display import Display
from advgrpo.runtime.atomic import write_atomically
from advgrpo.runtime.command import plain_console
from advgrpo.runtime.distributed import Distributed
from advgrpo.runtime.libraries import quiet_libraries
from advgrpo.runtime.rng import generator as seeded
from advgrpo.sampling.drawing import ModelOptions
from advgrpo.tiny import WORLDS, other_prompts
from advgrpo.tiny.judge import GALLERY_ARTISTS, Judge
from advgrpo.tiny.scenes import Scene, render
from advgrpo.training.models import load_model, settings_of

LISTS = ("tuning", "report")
SCALES = (1.0, 1.5, 2.0, 3.0)
EACH = 2  # pictures of a prompt, by whomever
REFERENCES_LEAST = 0.9
BASE_LEAST, BASE_MOST = 0.25, 0.65
RECORD = "world.json"


class Galleries:
    """The whole gallery, and for each of its artists the one without them."""

    def __init__(self, cache: Path):
        self.whole = Judge(cache=cache)
        self.without = {
            artist: Judge(tuple(other for other in GALLERY_ARTISTS if other != artist), cache=cache)
            for artist in GALLERY_ARTISTS
        }

    def shares(self, images: torch.Tensor, scenes: list[Scene]) -> dict[str, float]:
        """Of B images of B scenes found: "retrieval" by the whole gallery, "without_one" as the mean of the others."""
        features = self.whole.features(images, scenes)
        found = lambda judge: judge.compare(features, scenes).top1.float().mean().item()  # noqa: E731
        others = [found(judge) for judge in self.without.values()]
        return {"retrieval": found(self.whole), "without_one": sum(others) / len(others)}

    def ceiling(self, scenes: list[Scene], generator: torch.Generator) -> dict[str, float]:
        """Of drawings by each artist of the gallery, found without their own: {artist: share}."""
        return {
            artist: judge.look(render(scenes, [artist] * len(scenes), generator), scenes).top1.float().mean().item()
            for artist, judge in self.without.items()
        }


def prompts_of(name: str) -> list[str]:
    """A list's captions."""
    return other_prompts()[f"tiny:{name}"].read_text().splitlines()


def references_of(texts: list[str]) -> torch.Tensor:
    """EACH references of every caption, [EACH * captions, 3, 48, 48], next to each other."""
    known = ReferenceSet.load(WORLDS["tiny"].references, texts)
    return torch.cat([known.load_images(known.files(text)[:EACH]) for text in texts])


def draw_base(pipeline: Path, cache: Path, texts: dict[str, list[str]]) -> dict[str, dict[float, torch.Tensor]]:
    """What the pipeline draws: list -> guidance -> [EACH * captions, 3, 48, 48]."""
    options = ModelOptions(model=str(pipeline), cache_dir=str(cache))
    distributed, display = Distributed.start(options.device), Display(plain_console())
    every = [text for part in texts.values() for text in part]
    settings = settings_of(options, pipeline, "", distributed.device)
    evaluator = load_model(options, settings, every, distributed, display)
    try:
        return {
            name: {scale: draw(evaluator, part, scale, EACH, display).flatten(0, 1) for scale in SCALES}
            for name, part in texts.items()
        }
    finally:
        distributed.close()


def measure(pipeline: Path, cache: Path, seed: int) -> dict[str, dict]:
    """By list of prompts: {"ceiling": {artist: share}, "references": shares, "base": {guidance: shares}}."""
    galleries, generator = Galleries(cache), seeded(seed, "measure_world")
    texts = {name: prompts_of(name) for name in LISTS}
    drawn, found = draw_base(pipeline, cache, texts), {}
    for name, part in texts.items():
        scenes = [Scene.parse(text) for text in part for _ in range(EACH)]
        found[name] = {
            "ceiling": galleries.ceiling(scenes, generator),
            "references": galleries.shares(references_of(part), scenes),
            "base": {f"{scale:g}": galleries.shares(images, scenes) for scale, images in drawn[name].items()},
        }
    return found


def gates(figures: dict[str, dict]) -> dict[str, dict[str, float]]:
    """What is asked of the figures of `measure`, by list: {"least", "most", "found", and of the base "guidance"}."""
    best = max(figures["tuning"]["base"], key=lambda scale: figures["tuning"]["base"][scale]["retrieval"])
    asked = {}
    for name, part in figures.items():
        ceiling = sum(part["ceiling"].values()) / len(part["ceiling"])
        references, base = (each["without_one"] / ceiling for each in (part["references"], part["base"][best]))
        of_base = {"least": BASE_LEAST, "most": BASE_MOST, "found": base, "guidance": float(best)}
        asked |= {f"{name}: references": {"least": REFERENCES_LEAST, "found": references}, f"{name}: base": of_base}
    return asked


def passed(gate: dict[str, float]) -> bool:
    """Whether what was found is within the gate."""
    return gate["least"] <= gate["found"] <= gate.get("most", float("inf"))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", type=Path, required=True, help="the base pipeline's folder")
    parser.add_argument("--output", type=Path, required=True, help=f"folder for {RECORD}")
    parser.add_argument("--cache-dir", type=Path, default=Path("~/.cache/advgrpo"), help="galleries and captions")
    parser.add_argument("--seed", type=int, default=0, help="where the gallery's artists' drawings stand")
    args = parser.parse_args(arguments)

    quiet_libraries()
    figures = measure(args.pipeline, args.cache_dir.expanduser(), args.seed)
    asked = gates(figures)
    write_atomically(args.output / RECORD, json.dumps({"figures": figures, "gates": asked}, indent=1) + "\n")
    for name, part in figures.items():
        print(f"{name}: references {part['references']['retrieval']:.3f}, base ", end="")
        print(", ".join(f"{shares['retrieval']:.3f} at {scale}" for scale, shares in part["base"].items()))
        print("  ceiling " + ", ".join(f"{artist} {share:.3f}" for artist, share in part["ceiling"].items()))
    for name, gate in asked.items():
        wanted = f"at least {gate['least']:g}" + (f", at most {gate['most']:g}" if "most" in gate else "")
        print(f"gate {'passed' if passed(gate) else 'MISSED'}: {name} {gate['found']:.3f} of the ceiling ({wanted})")


if __name__ == "__main__":
    main()
