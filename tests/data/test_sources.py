"""Reference images that are sound but cannot teach what they should: one for all prompts, or one for each.

Bugs planted in a copy, each seen red: files compared by name; held-out prompts looked at; a style refused; the note
counting entries of the index instead of files.
"""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from advgrpo import config
from advgrpo.data.sources import Sources
from advgrpo.errors import UserError

TRAINING, HELD_OUT = ["a red star", "a green ring", "a blue square"], ["a red ring"]


@pytest.fixture
def read(unit_config, tmp_path):
    """Function {prompt: files} -> Sources; files 0.png to 3.png differ, copy.png is 0.png."""
    (tmp_path / "prompts.txt").write_text("\n".join(TRAINING))
    (tmp_path / "held_out_prompts.txt").write_text("\n".join(HELD_OUT))
    folder = tmp_path / "own"
    folder.mkdir()
    for number in range(4):
        pixels = np.random.default_rng(number).integers(0, 255, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    shutil.copy(folder / "0.png", folder / "copy.png")

    def make(index=None, **data):
        (folder / "references.json").write_text(json.dumps(index or {}))
        data = data or {"references": str(folder), "style": ""}
        changes = {"data": data, "evaluation": {"metrics": ["saturation"]}}
        settings = config.build(config.merge(unit_config.model_dump(), changes), "test")
        return Sources.read(settings), settings

    make.folder = folder
    return make


@pytest.mark.parametrize(
    "files", [["0.png"] * 3, ["0.png", "copy.png", "0.png"]], ids=["one file", "copies under two names"]
)
def test_one_image_for_all_training_prompts_is_refused(read, files):
    index = {prompt: [file] for prompt, file in zip(TRAINING, files)} | {HELD_OUT[0]: ["1.png"]}
    with pytest.raises(UserError) as error:
        read(index)
    assert "data.references = " in str(error.value)
    assert "all 3 training prompts have one and the same image, 0.png; give each prompt its own" in str(error.value)


@pytest.mark.parametrize("other", [["1.png"], ["0.png", "1.png"]])
def test_one_prompt_with_another_image_is_enough(read, other):
    sources, _ = read({TRAINING[0]: other, **{prompt: ["0.png"] for prompt in TRAINING[1:] + HELD_OUT}})
    assert sources.prompts == TRAINING


def test_a_style_is_for_all_prompts_and_said_to_be_poor_where_it_is(read, tmp_path):
    sources, settings = read(references="", style=str(read.folder))
    assert len(sources.references.files(TRAINING[0])) == len(sources.references.files(TRAINING[1])) == 5
    assert sources.notes(settings) == []
    (tmp_path / "poor").mkdir()
    shutil.copy(read.folder / "0.png", tmp_path / "poor")
    sources, settings = read(references="", style=str(tmp_path / "poor"))
    assert sources.notes(settings)[0].startswith("3 of 3 training prompts have one reference")


def test_prompts_with_one_reference_are_counted(read):
    pairs = {TRAINING[0]: ["0.png", "1.png"], TRAINING[1]: ["2.png"], TRAINING[2]: ["3.png", "3.png"]}
    sources, settings = read({**pairs, HELD_OUT[0]: ["1.png"]})
    (line,) = sources.notes(settings)
    assert line.startswith("2 of 3 training prompts have one reference")
    assert line.endswith("(first: 'a green ring')")
    whole = {prompt: ["0.png", "1.png"] for prompt in TRAINING}
    sources, settings = read({**whole, HELD_OUT[0]: ["1.png"]})
    assert sources.notes(settings) == []


def test_held_out_prompts_are_none_that_are_trained_on(read, tmp_path):
    (tmp_path / "held_out_prompts.txt").write_text("\n".join([*HELD_OUT, TRAINING[1]]))
    with pytest.raises(UserError, match=r"shares 1 prompts with data\.prompts, first 'a green ring'"):
        read({prompt: [f"{number}.png"] for number, prompt in enumerate(TRAINING + HELD_OUT)})
