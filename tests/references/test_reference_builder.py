"""Reference sets are drawn the same whatever interrupts, shards or reorders the work, and damage is found.

Planted bugs that turned this file red: seeds without the image's number or without the prompt; only the missing part
of a batch drawn; damaged images kept; an image or a set of another recipe, or a foreign index, taken over; files
written in place; index written while images are missing; shards that overlap; blank images and NaN kept; earlier
prompts dropped from the index; duplicates found by bytes instead of pixels; missing, small, changed and unlisted files
not reported; guidance given to Qwen-Image as guidance_scale; its negative prompt, the seeds or the arguments left out.
"""

import inspect
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from advgrpo.data.references import ReferenceSet
from advgrpo.errors import UserError
from advgrpo.references.__main__ import BAD_SET, main
from advgrpo.references.builder import Built, Recipe, ReferenceBuilder, Shard, image_name, image_seed
from advgrpo.references.check import check_set, draw_contact_sheet

PROMPTS = ["a red star", "a green ring", "ein Würfel, blau", "a fourth prompt", "a fifth"]
RECIPE = Recipe("m", "f", "P", seed=3, batch_size=2, dtype="float32", arguments={"height": 16})


def noise(prompt: str, seeds: list[int]) -> np.ndarray:
    """Images that depend on prompt, seed and batch shape, as a network's do in the last bits."""
    offset = len(prompt) / 100 + len(seeds) / 10
    return np.stack([np.random.default_rng(seed).random((20, 20, 3)) * 0.5 + offset for seed in seeds])


def build(out: Path, prompts=PROMPTS, *, recipe=RECIPE, draw=noise, per_prompt=3, shard=None) -> Built:
    return ReferenceBuilder(out, recipe, draw, per_prompt=per_prompt).build(prompts, shard, report=lambda line: None)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def whole(tmp_path) -> Path:
    """A set drawn in one go."""
    assert build(tmp_path / "whole") == Built(drawn=15)
    return tmp_path / "whole"


def test_a_built_set_is_a_reference_set(whole):
    references = ReferenceSet.load(whole, PROMPTS)
    for prompt in PROMPTS:
        images = references.load_images(references.files(prompt))
        seeds = [image_seed(3, prompt, number) for number in range(3)]
        expected = np.concatenate([noise(prompt, seeds[:2]), noise(prompt, seeds[2:])]).clip(0, 1)
        assert np.abs(images.permute(0, 2, 3, 1).numpy() - expected).max() <= 0.5 / 255 + 1e-6
    assert len({image_seed(3, prompt, number) for prompt in PROMPTS for number in range(3)}) == 15
    manifest = json.loads((whole / "manifest.json").read_text())
    assert manifest["recipe"]["arguments"] == {"height": 16}
    assert manifest["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert len(manifest["images"]) == 15
    assert check_set(whole, PROMPTS).ok


def test_a_second_run_draws_nothing(whole):
    before = content(whole)
    assert build(whole, draw=lambda *_: pytest.fail("drew")) == Built(kept=15)
    assert content(whole) == before


def test_shards_and_order_give_the_same_set(whole, tmp_path):
    shuffled = PROMPTS[::-1]
    first = build(tmp_path / "parts", shuffled, shard=Shard(0, 2))
    assert first == Built(drawn=9, missing=6)
    assert not (tmp_path / "parts/references.json").exists()
    assert build(tmp_path / "parts", shuffled, shard=Shard(1, 2)) == Built(drawn=6)
    images = {name: data for name, data in content(tmp_path / "parts").items() if name.endswith(".png")}
    assert images.items() <= content(whole).items()
    assert len(images) == 15
    assert check_set(tmp_path / "parts", PROMPTS).ok


def test_damaged_and_lost_images_are_drawn_again(whole):
    before = content(whole)
    lost, cut, painted, exchanged = (
        whole / image_name(PROMPTS[0], 1),
        *(whole / image_name(p, 0) for p in PROMPTS[:3]),
    )
    lost.unlink()
    cut.write_bytes(cut.read_bytes()[:200])
    Image.new("RGB", (20, 20), "red").save(painted)
    shutil.copy(whole / image_name(PROMPTS[3], 0), exchanged)
    built = build(whole)
    assert (built.drawn, built.kept) == (4, 11)
    assert sorted(built.redrawn) == sorted(path.name for path in (cut, painted, exchanged))
    assert content(whole) == before


KILLED = """
import sys, time
from pathlib import Path
sys.path[:0] = {paths!r}
import numpy as np
from advgrpo.references.builder import Recipe, ReferenceBuilder
{noise}
def slow(prompt, seeds):
    time.sleep(0.2)
    return noise(prompt, seeds)
ReferenceBuilder(Path({out!r}), {recipe!r}, slow, per_prompt=3).build({prompts!r})
"""


def test_killed_and_resumed(whole, tmp_path):
    out = tmp_path / "killed"
    root = Path(__file__).parents[2]
    paths, source = [str(root), str(root / "kernels")], inspect.getsource(noise)
    code = KILLED.format(paths=paths, noise=source, out=str(out), recipe=RECIPE, prompts=PROMPTS)
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path)
    deadline = time.monotonic() + 60
    while len(list(out.glob("*.png"))) < 4 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    finished = len(list(out.glob("*.png")))
    assert 4 <= finished < 15
    built = build(out)
    assert (built.kept, built.drawn, built.redrawn) == (finished, 15 - finished, [])
    assert content(out) == content(whole)


def test_a_write_that_fails_leaves_no_half_image(tmp_path, monkeypatch):
    real = Image.Image.save

    def full_disk(self, file, *args, **kwargs):
        real(self, file, *args, **kwargs)
        Path(file).write_bytes(Path(file).read_bytes()[:50])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full_disk)
    with pytest.raises(UserError, match=r"cannot write .*No space left"):
        build(tmp_path / "set")
    assert content(tmp_path / "set") == {}


def test_an_index_that_cannot_be_written_leaves_the_old_one(whole, monkeypatch):
    before = (whole / "references.json").read_bytes()

    def full_disk(self, content):
        with self.open("wb") as file:
            file.write(content[: len(content) // 2])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full_disk)
        with pytest.raises(UserError, match=r"cannot write manifest.json .*No space left"):
            build(whole, ["a sixth"])
    assert (whole / "references.json").read_bytes() == before
    assert check_set(whole, PROMPTS).ok
    assert build(whole, ["a sixth"]) == Built(kept=3)


def test_more_prompts_join_the_set(whole):
    assert build(whole, ["a sixth"]) == Built(drawn=3)
    assert check_set(whole, [*PROMPTS, "a sixth"]).ok
    assert len(json.loads((whole / "manifest.json").read_text())["images"]) == 18


@pytest.mark.parametrize("change", [{"seed": 4}, {"batch_size": 3}, {"arguments": {"height": 32}}, {"model": "n"}])
def test_another_recipe_needs_another_folder(whole, change):
    other = Recipe(**{**RECIPE.__dict__, **change})
    key = next(iter(change))
    with pytest.raises(UserError, match=f"drawn with {key} = .*use another folder"):
        build(whole, recipe=other)
    (whole / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"references.json that was not made here"):
        build(whole, recipe=other)
    (whole / "references.json").unlink()  # as after a kill: the stamps tell
    with pytest.raises(UserError, match="was drawn with other settings"):
        build(whole, recipe=other)


def test_blank_images_are_not_kept(tmp_path):
    def censor(prompt, seeds):
        return np.zeros((len(seeds), 20, 20, 3)) if prompt == PROMPTS[1] else noise(prompt, seeds)

    with pytest.raises(UserError, match=r"1 prompts have images in a single colour.*'a green ring'"):
        build(tmp_path / "set", draw=censor)
    assert len(content(tmp_path / "set")) == 12
    assert build(tmp_path / "set") == Built(drawn=3, kept=12)


@pytest.mark.parametrize(
    ("images", "complaint"),
    [
        (np.full((2, 4, 4, 3), np.nan), "not finite"),
        (np.zeros((1, 4, 4, 3)), r"want 2 images"),
        (np.zeros((2, 3, 4, 4)), "want 2"),
    ],
)
def test_what_is_no_image(tmp_path, images, complaint):
    with pytest.raises(RuntimeError, match=f"prompt 'a red star': .*{complaint}"):
        build(tmp_path / "set", draw=lambda *_: images)
    assert content(tmp_path / "set") == {}


def test_shards_from_text_and_torchrun(monkeypatch):
    assert Shard.parse("1/4") == Shard(1, 4)
    assert Shard.parse("") == Shard(0, 1)
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert Shard.parse("") == Shard(2, 3)
    for text in ("4/4", "-1/4", "1", "a/b", "/2"):
        with pytest.raises(UserError, match=f"--shard {text}: want i/n"):
            Shard.parse(text)


def test_check_finds_every_planted_error(whole, tmp_path):
    def name(prompt, number):
        return image_name(PROMPTS[prompt], number)

    (whole / name(0, 0)).unlink()
    (whole / name(1, 0)).write_bytes(b"no image")
    Image.new("L", (20, 20)).save(whole / name(1, 1))
    Image.new("RGB", (40, 8), "blue").save(whole / name(2, 0))
    Image.open(whole / name(3, 0)).save(whole / name(3, 1), compress_level=0)  # other bytes, other comment
    Image.new("RGB", (20, 20), "green").save(whole / "stray.png")
    index = json.loads((whole / "references.json").read_text())
    index[PROMPTS[4]].pop()
    (whole / "references.json").write_text(json.dumps(index))
    report = check_set(whole, [*PROMPTS, "a prompt nobody drew"])
    assert not report.ok
    assert report.without_references == ["a prompt nobody drew"]
    assert report.missing == [name(0, 0)]
    assert [line.split(":")[0] for line in report.unreadable] == [name(1, 0)]
    assert report.unconverted == [f"{name(1, 1)}: has mode L, not RGB"]
    assert report.too_small == [f"{name(2, 0)}: 40x8"]
    assert report.not_square == [f"{name(2, 0)}: 40x8"]
    assert report.one_colour == sorted([name(1, 1), name(2, 0)])
    assert report.duplicates == [f"{name(3, 0)} = {name(3, 1)}"]
    assert report.changed == sorted([name(1, 0), name(1, 1), name(2, 0), name(3, 1)])
    assert report.too_few == [f"{PROMPTS[4]}: 2"]
    assert report.unlisted == sorted([name(4, 2), "stray.png"])
    assert report.sizes == {(20, 20): 11, (40, 8): 1}
    sheet = tmp_path / "sheet.png"
    assert draw_contact_sheet(whole, sheet, prompts=PROMPTS, tile=64) == 15 - 4  # lost, no image, no RGB, not listed
    assert Image.open(sheet).height > 5 * 64


def test_check_of_a_style(whole, tmp_path, capsys):
    """A folder of images without an index: the same findings, and all rows of the sheet from one list."""
    style = tmp_path / "style"
    style.mkdir()
    for number, source in enumerate(sorted(whole.glob("*.png"))[:10]):
        shutil.copy(source, style / f"{number}.PNG")
    assert check_set(style).ok
    assert draw_contact_sheet(style, tmp_path / "sheet.png", rows=2, per_row=3, tile=64) == 5  # every second of 10
    shutil.copy(style / "0.PNG", style / "again.png")
    assert check_set(style).duplicates == ["0.PNG = again.png"]
    assert main(["check", str(style)]) == BAD_SET
    assert "0.PNG = again.png" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"references.json does not exist"):
        check_set(style, PROMPTS)


def test_check_without_a_set(tmp_path):
    with pytest.raises(UserError, match="is no folder"):
        check_set(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"references.json does not exist"):
        check_set(tmp_path)
    (tmp_path / "references.json").write_text("{}")
    assert check_set(tmp_path, ["x"]).without_references == ["x"]
    with pytest.raises(UserError, match="no contact sheet"):
        draw_contact_sheet(tmp_path, tmp_path / "sheet.png", prompts=["x"])
    (tmp_path / "manifest.json").write_text("[]")
    with pytest.raises(UserError, match="is not a manifest"):
        check_set(tmp_path)


@pytest.fixture
def prompt_file(tmp_path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("a small red star on the left of a blue background\na large green ring\n")
    return path


def test_the_command_with_a_diffusers_pipeline(unit_pipeline, prompt_file, tmp_path, capsys):
    """Two shards and a lost image give byte for byte what one run gives, and `check` agrees."""
    command = ["generate", "--model", unit_pipeline, "--prompts", str(prompt_file), "--per-prompt", "3"]
    command += ["--batch-size", "2", "--num-steps", "2", "--height", "32", "--width", "32", "--guidance-scale", "1.5"]
    command += ["--arguments", '{"max_sequence_length": 12}', "--out"]
    assert main([*command, str(tmp_path / "one")]) == 0
    for part in ("0/2", "1/2"):
        assert main([*command, str(tmp_path / "two"), "--shard", part]) == 0
    assert content(tmp_path / "one") == content(tmp_path / "two")
    (next((tmp_path / "two").glob("*-01.png"))).unlink()
    capsys.readouterr()
    assert main([*command, str(tmp_path / "two")]) == 0
    assert "drew 1 images, kept 5" in capsys.readouterr().out
    assert content(tmp_path / "one") == content(tmp_path / "two")
    images = [np.asarray(Image.open(path)) for path in sorted((tmp_path / "one").glob("*.png"))]
    assert len({image.tobytes() for image in images}) == 6
    check = ["check", str(tmp_path / "one"), "--prompts", str(prompt_file)]
    assert main([*check, "--sheet", str(tmp_path / "sheet.png"), "--sheet-rows", "1"]) == 0
    out = capsys.readouterr().out
    assert "size 32x32" in out
    assert "with 3 images" in out
    assert main([*check, "--min-size", "33"]) == BAD_SET
    assert "error: too small" in capsys.readouterr().out
    assert main([*command, str(tmp_path / "one"), "--seed", "1"]) == 2
    assert "seed = 0, not 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--prompts", "nowhere.txt"], "prompt file nowhere.txt does not exist"),
        (["--per-prompt", "0"], "--per-prompt 0"),
        (["--batch-size", "0"], "--batch-size 0"),
        (["--num-steps", "-1"], "--num-steps -1"),
        (["--shard", "2/2"], "--shard 2/2"),
        (["--arguments", "{"], "is not JSON"),
        (["--arguments", "[]"], "is not a JSON object"),
        (["--arguments", '{"generator": 1}'], "'generator' is set by this command"),
        (["--model", "no/such/model"], "--model no/such/model: neither a folder nor a hub model"),
        (["--model", "."], "model_index.json is missing"),
    ],
)
def test_bad_options_before_a_model_is_loaded(arguments, complaint, prompt_file, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    defaults = {"--prompts": str(prompt_file), "--out": "set", "--model": "tiny"}
    options = [text for pair in (defaults | dict([arguments])).items() for text in pair]
    assert main(["generate", *options]) == 2
    assert complaint in capsys.readouterr().err
    assert not (tmp_path / "set").exists()


def test_an_empty_list_of_prompt_files(tmp_path, capsys):
    assert main(["generate", "--out", str(tmp_path / "set"), "--prompts"]) == 2
    assert main(["check", str(tmp_path), "--prompts"]) == 2
    assert capsys.readouterr().err.count("--prompts: give at least one") == 2


def test_arguments_fit_the_pipeline():
    """Qwen-Image guides only with a negative prompt and by true_cfg_scale; unknown arguments name the nearest."""
    from diffusers import QwenImagePipeline, StableDiffusion3Pipeline, StableVideoDiffusionPipeline

    from advgrpo.references.pipeline import DrawSettings, call_arguments

    settings = DrawSettings("m", 0, 1, num_steps=20, guidance_scale=3.0, height=64)
    qwen, sd3, video = (
        object.__new__(k) for k in (QwenImagePipeline, StableDiffusion3Pipeline, StableVideoDiffusionPipeline)
    )
    assert call_arguments(qwen, settings) == {
        "negative_prompt": " ",
        "num_inference_steps": 20,
        "true_cfg_scale": 3.0,
        "height": 64,
    }
    assert call_arguments(qwen, DrawSettings("m", 0, 1, arguments={"negative_prompt": "blurry"})) == {
        "negative_prompt": "blurry"
    }
    assert call_arguments(sd3, settings) == {"num_inference_steps": 20, "guidance_scale": 3.0, "height": 64}
    with pytest.raises(UserError, match="no argument 'max_sequence_lenght'; did you mean 'max_sequence_length'"):
        call_arguments(sd3, DrawSettings("m", 0, 1, arguments={"max_sequence_lenght": 1}))
    with pytest.raises(UserError, match="StableVideoDiffusionPipeline is no text-to-image pipeline"):
        call_arguments(video, settings)
