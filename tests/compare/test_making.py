"""`python -m advgrpo.compare A B`: what is a side, one noise for all, what is kept, what the page does not tell."""

import base64
import io
import json
import re
import shutil

import numpy as np
import pytest
import torch
import yaml
from diffusers import SD3Transformer2DModel
from PIL import Image

from advgrpo import Config
from advgrpo.compare.__main__ import main
from advgrpo.compare.page import data_address
from advgrpo.compare.plan import QUESTIONS, Comparison
from advgrpo.compare.votes import VOTES
from advgrpo.policy.sd3 import SD3Policy
from tests.comparisons import PROMPTS, make, picture_side, vote

FAST = ["--num-steps", "2", "--guidance-scale", "1", "--device", "cpu", "--checks", "0"]


@pytest.fixture(scope="module")
def run(unit_pipeline, tmp_path_factory):
    """What a run of the LoRA kind leaves, as far as it is drawn with."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    settings = Config.load("tiny", {"model": {"path": unit_pipeline, "lora": {"rank": 4, "alpha": 8}}})
    policy = SD3Policy(settings.model, device=torch.device("cpu"), cache_dir=folder / "cache", seed=0)
    policy.export(folder / "untrained")
    with torch.no_grad():
        for _, parameter in policy.trainable_parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    policy.export(folder / "lora")
    (folder / "config.yaml").write_text(yaml.safe_dump(settings.model_dump(mode="json")))
    return folder


@pytest.fixture(scope="module")
def full_run(unit_pipeline, tmp_path_factory):
    """A run of full fine-tuning."""
    folder = tmp_path_factory.mktemp("runs") / "full"
    network = SD3Transformer2DModel.from_pretrained(unit_pipeline, subfolder="transformer")
    with torch.no_grad():
        network.proj_out.weight.mul_(-1)
    network.save_pretrained(folder / "transformer")
    settings = Config.load("tiny", {"model": {"path": unit_pipeline, "train": "full"}, "update": {"kl_weight": 0.0}})
    (folder / "config.yaml").write_text(yaml.safe_dump(settings.model_dump(mode="json")))
    return folder


@pytest.fixture
def prompts(tmp_path):
    (tmp_path / "prompts.txt").write_text("a lighthouse\nan otter\n")
    return ["--prompts", str(tmp_path / "prompts.txt")]


def shown(folder) -> dict[tuple[str, int, int], np.ndarray]:
    """(side, prompt, number) -> pixels, of the page."""
    comparison, data = Comparison.read(folder), page_data(folder)
    found = {}
    for name, picture in comparison.pictures.items():
        content = base64.b64decode(data["pictures"][name].partition(",")[2])
        pixels = np.asarray(Image.open(io.BytesIO(content)), dtype=float)
        found[comparison.sides[picture.side] + "*" * picture.noise, picture.prompt, picture.number] = pixels
    return found


def page_data(folder) -> dict:
    page = (folder / "index.html").read_text()
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])


def test_all_sides_begin_at_the_same_noise_whatever_their_order(tmp_path, prompts, unit_pipeline, run, full_run):
    """To the pixel: a LoRA that has learned nothing draws what the base draws, and so does a copy of the base; the base
    is the same before and after a LoRA and another network were drawn; a LoRA's folder is the run that it is of."""
    shutil.copytree(unit_pipeline, tmp_path / "copy")
    sides = {"lora": run / "lora", "full": full_run, "base": unit_pipeline, "run": run, "copy": tmp_path / "copy"}
    sides["untrained"] = run / "untrained"
    flags = [*prompts, *FAST, "--model", unit_pipeline, "--images-per-prompt", "2", "--seed", "3"]
    for out, names in (("one", list(sides)), ("two", list(reversed(sides)))):
        given = [str(sides[name]) for name in names]
        assert main([*given, "--names", *names, *flags, "--out", str(tmp_path / out)]) == 0
    one, two = shown(tmp_path / "one"), shown(tmp_path / "two")
    assert one.keys() == two.keys()
    assert len(one) == 6 * 2 * 2
    assert all((one[key] == two[key]).all() for key in one)
    for prompt in range(2):
        for number in range(2):
            base = one["base", prompt, number]
            assert (base == one["copy", prompt, number]).all()
            assert (base == one["untrained", prompt, number]).all()
            assert (one["lora", prompt, number] == one["run", prompt, number]).all()
            for other in ("lora", "full"):
                assert np.abs(base - one[other, prompt, number]).mean() > 0.5
        assert np.abs(one["base", prompt, 0] - one["base", prompt, 1]).mean() > 0.5
    assert np.abs(one["base", 0, 0] - one["base", 1, 0]).mean() > 0.5


def test_what_is_drawn_is_kept_and_other_settings_draw_anew(tmp_path, prompts, unit_pipeline, run, capsys):
    def draws(*flags: str) -> str:
        out = ["--names", "base", "tuned", "--out", str(tmp_path / "out")]
        assert main([unit_pipeline, str(run), *prompts, *FAST, *out, *flags]) == 0
        return " ".join(re.findall(r"drew \d+ pictures, kept \d+", capsys.readouterr().out))

    assert draws() == "drew 2 pictures, kept 0 drew 2 pictures, kept 0"
    first = (tmp_path / "out" / "index.html").read_bytes()
    assert draws() == "drew 0 pictures, kept 2 drew 0 pictures, kept 2"
    assert (tmp_path / "out" / "index.html").read_bytes() == first
    lost = sorted((tmp_path / "out" / "pictures").glob("*/*.png"))[0]
    lost.write_bytes(lost.read_bytes()[: lost.stat().st_size // 2])  # a disk's fault
    assert "drew 1 pictures, kept 1" in draws()
    assert (tmp_path / "out" / "index.html").read_bytes() == first
    assert draws("--seed", "1") == "drew 2 pictures, kept 0 drew 2 pictures, kept 0"
    assert draws("--num-steps", "3") == "drew 2 pictures, kept 0 drew 2 pictures, kept 0"
    assert draws() == "drew 0 pictures, kept 2 drew 0 pictures, kept 2"


def test_nothing_is_loaded_where_nothing_is_missing(tmp_path, prompts, unit_pipeline, run, monkeypatch):
    flags = [unit_pipeline, str(run), *prompts, *FAST, "--out", str(tmp_path / "out")]
    assert main(flags) == 0
    monkeypatch.setattr("advgrpo.compare.drawing.open_stock", lambda *_: pytest.fail("a pipeline is loaded"))
    assert main(flags) == 0


def test_the_page_does_not_tell_the_sides(tmp_path):
    folder, comparison = make(tmp_path, "--title", "Which?", sides=3)
    page, data = (folder / "index.html").read_text(), page_data(folder)
    assert not re.search(r"pictures of [ABC]|\"noise\"|\"same\"|\"side\"|kind", json.dumps({**data, "pictures": 0}))
    assert str(tmp_path) not in page
    assert "https://" not in page
    assert set(data) == {"id", "title", "prompts", "questions", "pairs", "checks", "pairs_per_rater", "pictures"}
    assert set(data["questions"]) == {"quality", "aesthetics", "alignment"}
    assert data["prompts"] == list(PROMPTS)
    assert [pair["id"] for pair in data["pairs"]] == sorted(comparison.pairs)
    assert all(pair["pictures"] == sorted(pair["pictures"]) for pair in data["pairs"])
    kinds = [pair.kind for pair in comparison.pairs.values()]
    assert (kinds.count("sides"), kinds.count("same"), kinds.count("noise")) == (9, 2, 2)
    first = [comparison.pictures[p["pictures"][0]].side < comparison.pictures[p["pictures"][1]].side
             for p in data["pairs"] if comparison.pairs[p["id"]].kind == "sides"]  # fmt: skip
    assert 0 < sum(first) < len(first)


def test_checks_are_what_they_say(tmp_path):
    folder, comparison = make(tmp_path, "--checks", "6")
    pictures = shown(folder)
    for pair in comparison.pairs.values():
        a, b = comparison.pictures[pair.a], comparison.pictures[pair.b]
        if pair.kind == "same":
            assert pair.a == pair.b
        elif pair.kind == "noise":
            assert (a.side, a.prompt, a.number, a.noise, b.noise) == (b.side, b.prompt, b.number, False, True)
            name = comparison.sides[b.side]
            clean, noisy = pictures[name, b.prompt, b.number], pictures[f"{name}*", b.prompt, b.number]
            assert np.abs(clean - noisy).mean() > 40
        else:
            assert (a.prompt, a.number, a.side < b.side) == (b.prompt, b.number, True)


def test_a_file_that_says_more_than_pixels_loses_it():
    """The text chunk of what `ReferenceBuilder` draws names its recipe."""
    image = Image.new("RGB", (8, 8), "red")
    image.info["advgrpo"] = "the recipe"
    for encoding in ("png", "webp"):
        content = base64.b64decode(data_address(image, encoding).partition(",")[2])
        assert b"recipe" not in content
        assert Image.open(io.BytesIO(content)).size == (8, 8)


def test_a_larger_picture_is_reduced_so_that_its_size_tells_nothing(tmp_path, capsys):
    small, large = picture_side(tmp_path / "s", 0), picture_side(tmp_path / "l", 1, size=(48, 48))
    wide = picture_side(tmp_path / "w", 1, size=(48, 24))
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    flags = ["--prompts", str(tmp_path / "p.jsonl"), "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert main([str(small), str(large), *flags]) == 0
    assert {pixels.shape for pixels in shown(tmp_path / "out").values()} == {(24, 24, 3)}
    assert main([str(small), str(wide), *flags]) == 2
    assert "a picture of 48 x 24 cannot be compared with one of 24 x 24" in capsys.readouterr().err


def test_votes_hold_the_folder_for_their_comparison(tmp_path, capsys):
    folder, comparison = make(tmp_path)
    (folder / VOTES).write_bytes(vote(comparison).line())
    sides = [str(tmp_path / f"pictures of {name}") for name in "AB"]
    same = [*sides, "--names", "A", "B", "--prompts", str(tmp_path / "prompts.jsonl"), "--out", str(folder)]
    assert main([*same, "--device", "cpu"]) == 0
    assert Comparison.read(folder) == comparison
    for other in (["--seed", "9"], ["--title", "Other?"], ["--checks", "2"]):
        assert main([*same, "--device", "cpu", *other]) == 2
        assert "holds votes on another comparison" in capsys.readouterr().err
        assert Comparison.read(folder) == comparison


def test_the_questions_are_the_papers():
    assert list(QUESTIONS) == ["quality", "aesthetics", "alignment"]
