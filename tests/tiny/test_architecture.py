"""The tiny models' tokenizers, and that their builders run, twice with the same bits.

Planted bugs that turned this file red: the VAE's images, or the words', drawn from torch's own generator; words built
on the caller's threads; references by another seed or artist; drawings by the references' artist among the VAE's or
the flow's.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from PIL import Image
from transformers import Dinov2Model

from advgrpo.tiny import architecture, reference_dir, scenes
from advgrpo.tiny.architecture import TINY
from advgrpo.tiny.byte_pairs import learn_merges
from advgrpo.tiny.scenes import BASE_ARTISTS, IMAGE_SIZE, JUDGE_ARTISTS, REFERENCE_ARTIST, all_scenes, vocabulary
from tools.tiny import build_backbone, build_pipeline, build_references, build_words, training


def test_every_caption_is_one_token_a_word():
    clip, t5 = architecture.clip_tokenizer(), architecture.t5_tokenizer()
    longest = [0, 0]
    for scene in all_scenes()[::97]:
        words = len(scene.caption.replace(",", " ,").split())
        lengths = [len(clip(scene.caption).input_ids), len(t5(scene.caption).input_ids)]
        assert lengths == [words + 2, words + 1]
        longest = [max(pair) for pair in zip(longest, lengths)]
    assert longest == [TINY.clip_tokens, TINY.t5_tokens]
    assert t5.unk_token_id not in t5("a dog").input_ids


def test_a_tokenizer_trained_anew_numbers_every_piece_as_before():
    """In processes that hash strings differently. The merges, and the pieces' numbers, are all that is trained."""
    program = "from advgrpo.tiny.byte_pairs import learn_merges; import sys; print(learn_merges(sys.argv[1:]))"
    words = list(vocabulary())
    here = str(learn_merges(words))
    for seed, text in (("1", words), ("2", words[::-1])):
        done = subprocess.run([sys.executable, "-c", program, *text], env={**os.environ, "PYTHONHASHSEED": seed},
                              capture_output=True, text=True, check=True)  # fmt: skip
        assert done.stdout.strip() == here
    assert learn_merges(["aab ab"]) == [("a", "b</w>"), ("a", "ab</w>")], "the commonest first"
    assert learn_merges(["cd ab"]) == [("a", "b</w>"), ("c", "d</w>")], "then by the alphabet"
    again, clip = architecture.clip_tokenizer(), architecture.clip_tokenizer()
    assert again.get_vocab() == clip.get_vocab()
    assert {clip.convert_ids_to_tokens(i) for i in clip("a dog, 7!").input_ids[1:-1]} >= {"a</w>", ",</w>"}


class Blots:
    """In the place of the corpus, whose files are on npm: two drawings, each a square of one colour."""

    def __len__(self) -> int:
        return 2

    def images(self, count: int, generator: torch.Generator) -> torch.Tensor:
        return self.composed(torch.randint(2, (count,), generator=generator).tolist(), generator)

    def composed(self, which, generator: torch.Generator) -> torch.Tensor:
        images = torch.rand(len(which), 3, 1, 1, generator=generator).repeat(1, 1, IMAGE_SIZE, IMAGE_SIZE)
        for image, number in zip(images, which):
            image[number, 8:30, 8:30] = 1.0
        return images


@pytest.fixture
def seen(monkeypatch) -> dict[str, list[str]]:
    """Whose drawings are asked for: of the corpus, and of the sheets by whoever renders."""
    asked: dict[str, list[str]] = {"corpus": [], "sheets": []}
    monkeypatch.setattr(build_pipeline.Corpus, "draw", lambda artists: asked["corpus"].extend(artists) or Blots())
    real = scenes.drawings
    monkeypatch.setattr(scenes, "drawings", lambda artist, size: asked["sheets"].append(artist) or real(artist, size))
    return asked


@pytest.mark.parametrize("steps", [0, pytest.param(2, marks=pytest.mark.weekly)])
def test_the_base_and_its_vae_see_the_bases_artists_alone(tmp_path, monkeypatch, seen, steps):
    """All three stages; in CI without their steps, which take seconds: the VAE's draws a batch, the flow's its data."""

    def one_batch(vae, steps, batch, generator, draw) -> list[dict]:
        assert draw(4, generator)[0].shape == (4, 3, IMAGE_SIZE, IMAGE_SIZE)
        vae.register_to_config(shift_factor=0.0, scaling_factor=1.0)
        return []

    if not steps:
        monkeypatch.setattr(build_pipeline, "train_vae", one_batch)
        monkeypatch.setattr(build_pipeline, "train_flow", lambda *_, **__: [])
    assert REFERENCE_ARTIST not in BASE_ARTISTS
    assert not {*JUDGE_ARTISTS} & {*BASE_ARTISTS, REFERENCE_ARTIST}
    vae, good, poor = (str(tmp_path / name) for name in ("vae", "good", "poor"))
    build_pipeline.main(["--output", vae, "--vae-steps", str(steps)])
    assert seen == {"corpus": [*BASE_ARTISTS], "sheets": []}
    flow = ["--steps", str(steps), "--images", "64"]
    build_pipeline.main(["--continue-from", vae, *flow, "--output", good])
    assert {*seen["sheets"]} == {*BASE_ARTISTS}
    seen["sheets"].clear()
    bad = ["--good-share", "0.6", "--watermarks", "0.8"]
    build_pipeline.main(["--continue-from", good, *flow, *bad, "--output", poor])
    assert {*seen["sheets"]} == {*BASE_ARTISTS}
    assert seen["corpus"] == [*BASE_ARTISTS]


@pytest.mark.weekly
def test_the_builders_run_end_to_end(tmp_path, monkeypatch):
    """A few steps of each, so that the recipes cannot rot; what they write loads as float32."""
    monkeypatch.setattr(build_pipeline.Corpus, "draw", lambda artists: Blots())
    build_pipeline.main(["--output", str(tmp_path / "vae"), "--vae-steps", "2"])
    flow = ["--continue-from", str(tmp_path / "vae"), "--steps", "2", "--images", "64"]
    build_pipeline.main(["--output", str(tmp_path / "pipeline"), *flow])
    assert {*json.loads((tmp_path / "pipeline" / "training.json").read_text())} == {"vae", "flow"}
    assert StableDiffusion3Pipeline.from_pretrained(tmp_path / "pipeline").transformer.dtype == torch.float32

    monkeypatch.setattr(build_backbone, "probe", lambda *_: 0.5)
    sources = ["--pipeline", str(tmp_path / "pipeline"), "--output", str(tmp_path / "backbone")]
    build_backbone.main([*sources, "--steps", "2", "--batch", "4"])
    record = json.loads((tmp_path / "backbone" / "training.json").read_text())
    assert record["backbone"][-1]["step"] == 2
    assert record["figures"] == {"probe": 0.5, "probe_untrained": 0.5}
    assert Dinov2Model.from_pretrained(tmp_path / "backbone").dtype == torch.float32


@pytest.mark.weekly
def test_a_rebuild_has_the_same_bits(tmp_path, monkeypatch):
    """Every file of the three stages, but for what the steps took."""
    monkeypatch.setattr(build_pipeline.Corpus, "draw", lambda artists: Blots())
    monkeypatch.setattr(build_backbone, "probe", lambda *_: 0.5)
    poor = ["--good-share", "0.6", "--watermarks", "0.8"]
    for name in ("once", "again"):
        vae, drawings, pipeline, backbone = (tmp_path / name / each for each in ("vae", "drawings", "poor", "backbone"))
        torch.rand(1 if name == "once" else 5)  # what was drawn before is no part of it
        build_pipeline.main(["--output", str(vae), "--vae-steps", "3"])
        flow = ["--steps", "3", "--images", "64"]
        build_pipeline.main(["--continue-from", str(vae), *flow, "--output", str(drawings)])
        build_pipeline.main(["--continue-from", str(drawings), *flow, *poor, "--output", str(pipeline)])
        made = ["--pipeline", str(pipeline), "--output", str(backbone)]
        build_backbone.main([*made, "--steps", "3", "--batch", "4"])
    once, again = (contents(tmp_path / name) for name in ("once", "again"))
    assert once == again
    assert {"vae", "drawings", "poor", "backbone"} == {path.parts[0] for path in once}


@pytest.mark.weekly
def test_words_built_again_have_the_same_bits(tmp_path):
    few = ["--vae-steps", "2", "--flow-steps", "2", "--images", "64", "--batch", "4"]
    for name in ("once", "again"):
        torch.rand(1 if name == "once" else 5)
        torch.set_num_threads(1 if name == "once" else 2)  # as the caller has it; the builder takes one
        build_words.main(["--output", str(tmp_path / name), *few])
        assert torch.get_num_threads() == 1
    once, again = (contents(tmp_path / name) for name in ("once", "again"))
    assert once == again
    assert {"vae", "transformer", "tokenizer"} <= {path.parts[0] for path in once}


def contents(folder: Path) -> dict[Path, bytes]:
    """Of every file by its path within, without the seconds of training.json."""
    found = {}
    for file in filter(Path.is_file, folder.rglob("*")):
        text = file.read_bytes()
        found[file.relative_to(folder)] = re.sub(rb'"seconds": [0-9.]+', b"", text) if file.suffix == ".json" else text
    return found


def test_the_references_builder_writes_what_is_shipped(tmp_path, monkeypatch):
    """Every list, the index, and every picture's pixels; of two prompts of each list the file as well, read again. Not
    the file's bytes, which are those of a version of zlib."""
    shipped = reference_dir()
    index = json.loads((shipped / "references.json").read_text())
    read = {name for part in build_references.split_prompts().values() for text in part[:2] for name in index[text]}
    drawn, write = {}, build_references.write_image

    def keep(path: Path, image: torch.Tensor) -> None:
        drawn[path.name] = image
        if path.name in read:
            write(path, image)

    monkeypatch.setattr(build_references, "write_image", keep)
    build_references.main(["--output", str(tmp_path)])
    assert drawn.keys() == {path.name for path in shipped.glob("*.png")}
    assert all(torch.equal(image, pixels(shipped / name)) for name, image in drawn.items())
    for name in read:
        assert torch.equal(pixels(tmp_path / "references" / name), pixels(shipped / name))
    for name in ("references/references.json", *(f"{part}.txt" for part in build_references.PER_NAME)):
        assert (tmp_path / name).read_bytes() == (shipped.parent / name).read_bytes()


def pixels(path: Path) -> torch.Tensor:
    """[3, H, W] bytes of a PNG."""
    return torch.from_numpy(np.asarray(Image.open(path).convert("RGB")).copy()).permute(2, 0, 1)


def test_noise_levels_lean_towards_noise():
    sigmas = training.sample_sigmas(20_000, torch.Generator().manual_seed(0))
    assert 0.68 < sigmas.median() < 0.78  # a logit-normal's median .5, shifted by 3, is .75; one in ten is uniform
    assert sigmas.min() >= 0
    assert sigmas.max() <= 1
