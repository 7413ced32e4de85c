"""Reference images: sound but of no use (one for all prompts, or one for each), and checked by several processes.

Bugs planted in a copy, each seen red: files compared by name; held-out prompts looked at; a style refused; the note
counting entries of the index instead of files; every process checks all images, or rank 0 alone; files read on past
the first that differs.
"""

import json
import shutil
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from advgrpo import config
from advgrpo.data import references as of_references
from advgrpo.data.sources import Sources
from advgrpo.errors import UserError
from tests import zygote
from tests.training.test_run import environment

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

    def make(index=None, share=(0, 1), **data):
        (folder / "references.json").write_text(json.dumps(index or {}))
        data = data or {"references": str(folder), "style": ""}
        changes = {"data": data, "evaluation": {"metrics": ["saturation"]}}
        settings = config.build(config.merge(unit_config.model_dump(), changes), "test")
        return Sources.read(settings, rank=share[0], world_size=share[1]), settings

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


@pytest.mark.parametrize("world_size", [1, 3, 8])
@pytest.mark.parametrize("style", [False, True])
def test_processes_share_out_the_images_to_check(read, world_size, style, monkeypatch):
    checked, real = Counter(), of_references.check_reference
    monkeypatch.setattr(
        of_references, "check_reference", lambda file, *how: checked.update([file.name]) or real(file, *how)
    )
    index = {prompt: ["0.png", "1.png", "2.png", "3.png"] for prompt in TRAINING + HELD_OUT}
    data = {"references": "", "style": str(read.folder)} if style else {}
    for rank in range(world_size):
        sources, _ = read(index, (rank, world_size), **data)
        assert len(sources.references.files(TRAINING[0])) == 4 + style  # every process knows all of them
    assert checked == dict.fromkeys(sorted(f.name for f in read.folder.glob("*.png"))[: 4 + style], 1)


def test_a_bad_image_is_an_error_of_the_process_that_checks_it(read):
    (read.folder / "1.png").write_text("not an image")
    index = {prompt: ["0.png", "1.png", "2.png", "3.png"] for prompt in TRAINING + HELD_OUT}
    assert read(index, (0, 2))
    with pytest.raises(UserError, match=r"reference image .*1\.png is unreadable or truncated"):
        read(index, (1, 2))
    (read.folder / "3.png").write_text("nor this")
    with pytest.raises(UserError, match=r"\(2 of 2 images of this process's share are unusable, also 3\.png\)"):
        read(index, (1, 2))


def test_of_prompts_with_an_image_each_no_more_are_read_than_it_takes(read, monkeypatch):
    """Every process compares them."""
    looked, real = [], of_references.ReferenceSet.content_key
    monkeypatch.setattr(
        of_references.ReferenceSet, "content_key", lambda self, f: looked.append(f.name) or real(self, f)
    )
    read({prompt: [f"{number}.png"] for number, prompt in enumerate(TRAINING + HELD_OUT)})
    assert set(looked) == {"0.png", "1.png"}


@pytest.mark.slow
@pytest.mark.weekly
@pytest.mark.parametrize("bad", [0, 1])
def test_a_bad_image_of_any_processs_share_ends_all_before_a_model_is_loaded(read, bad, tmp_path):
    (read.folder / f"{bad}.png").write_text("not an image")
    index = {prompt: ["0.png", "1.png"] for prompt in TRAINING + HELD_OUT}
    _, settings = read(index, (1 - bad, 2))
    (tmp_path / "settings.yaml").write_text(config.dump(settings))
    arguments = ["--config", str(tmp_path / "settings.yaml")]
    done = zygote.run("advgrpo.train:main", arguments, processes=2, environment=environment())
    assert done.returncode != 0
    for line in (
        f"{bad}.png is unreadable or truncated",
        f"[rank {1 - bad}] ending because rank {bad} failed: reference",
    ):
        assert line in done.stderr
    assert not (tmp_path / "run").exists()
