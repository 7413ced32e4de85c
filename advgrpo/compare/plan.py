"""Which pictures meet, and what a comparison remembers of that: comparison.json, which the page does not tell.

The page knows pictures and pairs by names that say nothing; a vote names the pair and the pictures that stood left and
right, so that only this file turns it into one for a side.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from advgrpo.errors import UserError
from advgrpo.runtime.reading import parse_json, read_text
from advgrpo.runtime.rng import derive_seed

FILE = "comparison.json"
FORMAT = 1
QUESTIONS = {  # of the paper's human evaluation (arXiv 2511.20256)
    "quality": "Which has the better quality?",
    "aesthetics": "Which is more beautiful?",
    "alignment": "Which fits the text better?",
}
_REMEDY = "make the comparison again with python -m advgrpo.compare A B --prompts FILE --out DIR"

Kind = Literal["sides", "same", "noise"]


@dataclass(frozen=True)
class Picture:
    """One that is shown.

    Attributes:
        side: index into the comparison's sides.
        prompt, number: of which prompt, and which of its pictures.
        noise: destroyed, for an attention check.
    """

    side: int
    prompt: int
    number: int
    noise: bool = False


@dataclass(frozen=True)
class Pair:
    """Two pictures of one prompt, by the names of `Comparison.pictures`.

    Attributes:
        kind: "sides": they are compared; "same": one picture twice, a tie; "noise": `b` must lose.
    """

    kind: Kind
    prompt: int
    a: str
    b: str


@dataclass(frozen=True)
class Comparison:
    """What is compared, and which name stands for what.

    Attributes:
        id: a hash of all else.
        sides: names for the report.
        pairs: by names that say nothing.
    """

    id: str
    title: str
    sides: list[str]
    prompts: list[str]
    questions: dict[str, str]
    pictures: dict[str, Picture]
    pairs: dict[str, Pair]
    pairs_per_rater: int
    seed: int

    def write(self) -> str:
        """The text of comparison.json."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def read(cls, folder: Path) -> Comparison:
        """Of DIR/comparison.json; UserError where there is none, or it is something else."""
        path = folder / FILE
        content = parse_json(read_text(path, "comparison", _REMEDY), f"comparison {path}", _REMEDY)
        try:
            if content.pop("format") != FORMAT:
                raise ValueError("another format")
            content["pictures"] = {name: Picture(**each) for name, each in content["pictures"].items()}
            content["pairs"] = {name: Pair(**each) for name, each in content["pairs"].items()}
            found = cls(**content)
            if found.id != _hash(found):
                raise ValueError("its id is not that of its content")
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"comparison {path} is not what this version writes ({error!r}); {_REMEDY}") from None
        return found


def plan(
    sides: Sequence[str],
    prompts: Sequence[str],
    contents: Sequence[Sequence[Sequence[str]]],
    *,
    title: str,
    pairs_per_rater: int,
    checks: int,
    seed: int,
) -> Comparison:
    """Every two sides meet on every picture of every prompt; checks are spread over prompts and sides by the seed.

    Args:
        sides: their names.
        contents: hashes of the pictures [sides, prompts, images_per_prompt], which the comparison's id depends on.
    """
    random = np.random.default_rng(derive_seed(seed, "comparison"))
    pictures: dict[str, Picture] = {}

    def name(picture: Picture) -> str:
        content = contents[picture.side][picture.prompt][picture.number]
        key = _digest([seed, "picture", picture.side, picture.prompt, picture.number, picture.noise, content])[:16]
        pictures[key] = picture
        return key

    pairs: list[Pair] = []
    for prompt in range(len(prompts)):
        for number in range(len(contents[0][prompt])):
            names = [name(Picture(side, prompt, number)) for side in range(len(sides))]
            pairs += [Pair("sides", prompt, *two) for two in itertools.combinations(names, 2)]
    shown = list(pictures.items())
    for check, place in zip(range(checks), _spread(random, len(shown), checks)):
        own, picture = shown[place]
        other = name(Picture(picture.side, picture.prompt, picture.number, noise=True)) if check % 2 else own
        pairs.append(Pair("noise" if check % 2 else "same", picture.prompt, own, other))
    named = {_digest([seed, "pair", number])[:12]: pair for number, pair in enumerate(pairs)}
    everything = Comparison(
        "", title, list(sides), list(prompts), dict(QUESTIONS), pictures, named, pairs_per_rater, seed
    )
    return Comparison(**{**everything.__dict__, "id": _hash(everything)})


def page_data(comparison: Comparison) -> dict[str, Any]:
    """What the page is told: no side, no kind of pair, and neither by an order.

    Pairs come sorted by their meaningless names, the two pictures of each by theirs; which stands left is drawn for
    each rater in the page. "checks" names the pairs that every rater must get where each is shown a part of them.
    """
    pairs = [
        {"id": name, "prompt": pair.prompt, "pictures": sorted((pair.a, pair.b))}
        for name, pair in sorted(comparison.pairs.items())
    ]
    return {
        "id": comparison.id,
        "title": comparison.title,
        "prompts": comparison.prompts,
        "questions": comparison.questions,
        "pairs": pairs,
        "checks": sorted(name for name, pair in comparison.pairs.items() if pair.kind != "sides"),
        "pairs_per_rater": comparison.pairs_per_rater,
    }


def _spread(random: np.random.Generator, count: int, wanted: int) -> list[int]:
    """`wanted` of `count` places, none twice before all were taken."""
    rounds = -(-wanted // count)
    return np.concatenate([random.permutation(count) for _ in range(rounds)])[:wanted].tolist() if wanted else []


def _hash(comparison: Comparison) -> str:
    return _digest({**asdict(comparison), "id": ""})[:16]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
