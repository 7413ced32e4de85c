"""What `make tiny-assets` would build beside what is shipped: where they are equal, where they are known to differ, and
that docs/tiny.md says so.

Bugs planted in a copy, each seen red: a builder's default of other steps, or of another batch, than are shipped; a
stage of the recipe cut short; letters numbered in another order; the pipeline's tokenizer in the preference model's
folder, as a rebuild has it; seconds, or a first row, on the page that no record has.
"""

import argparse
import importlib
import json
import re
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from advgrpo import tiny
from advgrpo.tiny import architecture
from tools.tiny.build_words import SIZE as WORDS

ROOT = Path(__file__).parents[2]
ASSETS = tiny.WORLDS["tiny"].pipeline.parent
PAGE = " ".join((ROOT / "docs" / "tiny.md").read_text().split())

# Shipped parts that their recipe would not give again. A rebuild takes its part out of here and out of docs/tiny.md.
STEPS_OF_BEFORE = {"words/pipeline": {"vae": 400, "flow": 3000}}
TOKENIZERS_OF_BEFORE = {f"words/pipeline/tokenizer{number}" for number in ("", "_2", "_3")} | {"preference"}


def records() -> dict[str, dict[str, list[dict]]]:
    """Folder of each shipped model -> its curves by name, rows of step, seconds and losses."""
    found = {}
    for file in ASSETS.rglob("training.json"):
        curves = json.loads(file.read_text())
        rows = {name: curve for name, curve in curves.items() if isinstance(curve, list)}
        found[file.parent.relative_to(ASSETS).as_posix()] = rows
    return found


def recipe() -> list[list[str]]:
    """The commands of `make tiny-assets`, each as the module and its arguments."""
    makefile = (ROOT / "Makefile").read_text()
    folder = re.search(r"^ASSETS := (.+)$", makefile, re.MULTILINE)[1]
    lines = re.search(r"^tiny-assets:.*\n((?:\t.*\n)+)", makefile, re.MULTILINE)[1].replace("\\\n", " ")
    return [line.replace("$(ASSETS)", folder).split()[2:] for line in lines.splitlines()]


class Read(Exception):
    """The settings that a command made of its arguments, before it did anything."""


@pytest.fixture
def commands(monkeypatch) -> list[tuple[str, argparse.Namespace]]:
    """The recipe's builders with their settings, defaults included."""
    real = argparse.ArgumentParser.parse_args

    def stop(parser: argparse.ArgumentParser, arguments: list[str]) -> argparse.Namespace:
        raise Read(real(parser, arguments))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    found = []
    for module, *arguments in recipe():
        with pytest.raises(Read) as read:
            importlib.import_module(module).main(arguments)
        found.append((module.rpartition(".")[2], read.value.args[0]))
    return found


def steps_asked(builder: str, settings: argparse.Namespace) -> dict[str, int]:
    """Steps of each curve that a builder of these settings records; none of one that trains nothing."""
    if builder == "build_words":
        return {"vae": settings.vae_steps, "flow": settings.flow_steps}
    if builder == "build_pipeline":
        if settings.continue_from is None:
            return {"vae": settings.vae_steps}
        poor = settings.good_share < 1 or settings.watermarks > 0
        return {"poor copies" if poor else "flow": settings.steps}
    return {builder.removeprefix("build_"): settings.steps} if hasattr(settings, "steps") else {}


@pytest.fixture
def asked(commands) -> dict[str, dict[str, int]]:
    """Folder of each model that the recipe makes -> the steps of its curves."""
    kept: dict[Path, dict[str, int]] = {}
    for builder, settings in commands:
        own = steps_asked(builder, settings)
        if builder == "build_pipeline" and settings.continue_from is not None:
            own = kept[settings.continue_from] | own  # a stage keeps the curves of what it goes on with
        if own:
            kept[settings.output] = own
    shipped = {ROOT / folder: steps for folder, steps in kept.items() if (ROOT / folder).is_relative_to(ASSETS)}
    return {folder.relative_to(ASSETS).as_posix(): steps for folder, steps in shipped.items()}


def test_every_record_ends_at_the_step_that_the_recipe_asks_for(asked):
    """But for the words, whose shipped pipeline the recipe does not make."""
    shipped = {name: {curve: rows[-1]["step"] for curve, rows in own.items()} for name, own in records().items()}
    assert shipped == asked | STEPS_OF_BEFORE
    for name, steps in STEPS_OF_BEFORE.items():
        assert asked[name] != steps, f"{name} is what the recipe makes: take it out of STEPS_OF_BEFORE"
        assert f"`{name}` |" in PAGE
        assert all(f"{number:,}" in PAGE for number in (*steps.values(), *asked[name].values()))


def test_the_page_has_what_was_made_again_of_the_records(commands):
    """First rows as they are recorded; and the backbone's batch, which its record does not tell but its first row does:
    10.8518 in batches of 64, 12.1752 of 128."""
    first = {f"{name}: {curve}": rows[0] for name, own in records().items() for curve, rows in own.items()}
    for said in (
        f"loss {first['pipeline: vae']['loss']:.7f}, as recorded",
        f"contrast {first['backbone: backbone']['contrast']:.4f}, as recorded",
        f"recorded as {first['second_judge: second_judge']['loss']:.4f}",
        f"recorded as {first['preference: preference']['preference']:.6f}",
    ):
        assert said.replace(" 0.", " .") in PAGE
    settings = dict(commands)["build_backbone"]
    assert f"| `backbone` | {settings.steps:,} steps of {settings.batch} drawings |" in PAGE


def pieces(folder: Path) -> dict:
    """What a saved tokenizer learned: its pieces, their numbers and merges; not how it last padded, as the file has."""
    return json.loads((folder / "tokenizer.json").read_text())["model"]


def test_every_shipped_tokenizer_is_the_builders_but_for_those_of_before(tmp_path):
    def built(tokenizer: PreTrainedTokenizerBase) -> dict:
        tokenizer.save_pretrained(tmp_path)
        return pieces(tmp_path)

    wanted = {"preference": pieces(ASSETS / "pipeline" / "tokenizer")}  # which its builder takes
    for folder, size in (("pipeline", architecture.TINY), ("words/pipeline", WORDS)):
        clip, t5 = built(architecture.clip_tokenizer(size)), built(architecture.t5_tokenizer(size))
        wanted |= {f"{folder}/tokenizer": clip, f"{folder}/tokenizer_2": clip, f"{folder}/tokenizer_3": t5}
    shipped = {file.parent.relative_to(ASSETS).as_posix(): file.parent for file in ASSETS.rglob("tokenizer.json")}
    assert shipped.keys() == wanted.keys()
    assert {name for name, folder in shipped.items() if pieces(folder) != wanted[name]} == TOKENIZERS_OF_BEFORE
    before, now = (len(each["vocab"]) for each in (pieces(shipped["preference"]), wanted["preference"]))
    assert f"an earlier tokenizer of {before} pieces" in PAGE
    assert f"the pipeline's tokenizer, of {now} pieces" in PAGE


def test_the_page_has_the_recorded_seconds(asked):
    """Of every training loop, their sum, and that of what the recipe asks for at the same rates: six hours at most."""
    seconds = {name: sum(rows[-1]["seconds"] for rows in own.values()) for name, own in records().items()}
    for name, own in seconds.items():
        assert re.search(rf"\| `{name}` \|[^|]*\| {own:,.0f} \|", PAGE), (name, own)
    total = sum(seconds.values())
    assert f"{total:,.0f} seconds, {total / 3600:.1f} hours" in PAGE
    again = sum(
        rows[-1]["seconds"] * asked[name][curve] / rows[-1]["step"]
        for name, own in records().items()
        for curve, rows in own.items()
    )
    assert f"{again / 3600:.1f} hours at the same rates" in PAGE
    assert again <= 6 * 3600
