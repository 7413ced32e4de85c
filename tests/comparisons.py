"""Comparisons for tests: of flat pictures, drawn in a moment, and votes on them."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from advgrpo.compare.__main__ import main
from advgrpo.compare.plan import Comparison, Pair
from advgrpo.compare.votes import Vote

PROMPTS = ("a lighthouse at dusk", 'two otters </script> on a "river" & a bank', "ein Fahrrad, 自転車")
Chooses = Callable[[Comparison, Pair, str, str], str]  # (comparison, pair, left, right) -> left, tie or right


def picture_side(folder: Path, number: int, prompts: Sequence[str] = PROMPTS, size: tuple[int, int] = (24, 24)) -> Path:
    """A folder of pictures with references.json; every side and prompt has a colour gradient of its own."""
    folder.mkdir(parents=True)
    for place in range(len(prompts)):
        ramp = np.linspace(0, 255, size[0] * size[1]).reshape(size[1], size[0])
        pixels = np.stack([ramp, np.full_like(ramp, 60 * number), np.full_like(ramp, 40 * place)], -1)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{place}.png")
    index = {prompt: [f"{place}.png"] for place, prompt in enumerate(prompts)}
    (folder / "references.json").write_text(json.dumps(index))
    return folder


def make(folder: Path, *flags: str, sides: int = 2, prompts: Sequence[str] = PROMPTS) -> tuple[Path, Comparison]:
    """The folder of a comparison of sides named A, B, ..., made by the command, and what it compares."""
    names = [chr(ord("A") + number) for number in range(sides)]
    given = [str(picture_side(folder / f"pictures of {name}", n, prompts)) for n, name in enumerate(names)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    where = ["--prompts", str(folder / "prompts.jsonl"), "--out", str(folder / "out"), "--device", "cpu"]
    assert main([*given, "--names", *names, *where, *flags]) == 0
    return folder / "out", Comparison.read(folder / "out")


def vote(comparison: Comparison, pair: str = "", rater: str = "Ann", **changed) -> Vote:
    """A vote for the left picture in every question, with `changed` fields."""
    name = pair or next(iter(comparison.pairs))
    shown = comparison.pairs[name]
    fields = {
        "id": hashlib.sha256(f"{rater} {name}".encode()).hexdigest()[:32],
        "comparison": comparison.id,
        "rater": rater,
        "pair": name,
        "left": shown.a,
        "right": shown.b,
        "answers": dict.fromkeys(comparison.questions, "left"),
        "milliseconds": 4000,
        "at": 1_790_000_000_000,
    }
    return Vote(**{**fields, **changed})


def votes_by(comparison: Comparison, rater: str, chooses: Chooses, seed: int = 0) -> list[Vote]:
    """One on every pair, the sides turned at random."""
    generator, votes = random.Random(f"{rater} {seed}"), []
    for name, pair in comparison.pairs.items():
        left, right = (pair.a, pair.b) if generator.random() < 0.5 else (pair.b, pair.a)
        answers = {question: chooses(comparison, pair, left, right) for question in comparison.questions}
        number = f"{generator.getrandbits(128):032x}"
        votes.append(vote(comparison, name, rater, id=number, left=left, right=right, answers=answers))
    return votes


def attentive(comparison: Comparison, pair: Pair, left: str, right: str) -> str:
    """Prefers the side that comes first, and passes every check."""
    if left == right:
        return "tie"
    if pair.kind == "noise":
        return "left" if left == pair.a else "right"
    return "left" if comparison.pictures[left].side < comparison.pictures[right].side else "right"


def always_left(comparison: Comparison, pair: Pair, left: str, right: str) -> str:
    """Does not look."""
    return "left"
