"""The tiny world's words: captions, pictures, sets, the shipped pipeline that draws them, and its builder.

Planted bugs that turned this file red: held-out captions drawn from the training ones, words without jitter, capital
letters without pieces of their own, new letters that renumber the old pieces, a training loop that ignores `draw`.
"""

import json

import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from advgrpo import tiny
from advgrpo.data.prompts import load_prompts
from advgrpo.data.references import ReferenceSet
from advgrpo.rewards.ocr import OcrReward, target_text
from advgrpo.tiny import build_words, words


@pytest.fixture(scope="module")
def reward() -> OcrReward:
    return OcrReward(detection_size=192)


def test_word_pictures_are_read(reward):
    """What the tiny world's OCR reward rests on: crisp pictures score 1, and another word's prompt does not."""
    captions = words.split_prompts(8, 0)[0]
    images = words.render([words.WordScene.parse(c) for c in captions], torch.Generator().manual_seed(0))
    assert images.shape == (8, 3, 64, 64)
    assert reward.score(images, captions, None).tolist() == [1.0] * 8
    assert reward.score(images, captions[1:] + captions[:1], None).max() < 1


def test_word_captions_round_trip_and_splits_are_disjoint():
    train, held_out = words.split_prompts(120, 60)
    assert len({*train, *held_out}) == 180
    assert {words.WordScene.parse(c).word for c in train[:55]} == set(words.WORDS)
    for caption in train + held_out:
        scene = words.WordScene.parse(caption)
        assert scene.caption == caption
        assert target_text(caption) == scene.word
    with pytest.raises(ValueError, match="not a caption"):
        words.WordScene.parse("the word CAT in red on a white background")
    with pytest.raises(ValueError, match="exceeds"):
        words.split_prompts(len(words.all_scenes()), 1)


def test_word_renders_are_deterministic_and_jittered():
    scenes = [words.WordScene("CAT", "red", "white")] * 2
    first, again = (words.render(scenes, torch.Generator().manual_seed(3), size=32) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first[0], first[1])


def test_written_set_loads_as_prompts_and_references(tmp_path):
    command = ["--output", str(tmp_path), "--train", "4", "--held-out", "2", "--per-prompt", "2", "--size", "32"]
    words.main(command)
    prompts = [p.text for name in ("prompts", "held_out_prompts") for p in load_prompts(tmp_path / f"{name}.txt")]
    assert len(prompts) == 6
    references = ReferenceSet.load(tmp_path / "references", prompts)
    assert all(len(references.files(prompt)) == 2 for prompt in prompts)
    assert references.load_images(references.files(prompts[0])).shape == (2, 3, 32, 32)
    before = {file: file.read_bytes() for file in (tmp_path / "references").iterdir()}
    assert len(json.loads((tmp_path / "references/references.json").read_text())) == 6
    words.main(command)
    assert before == {file: file.read_bytes() for file in (tmp_path / "references").iterdir()}


def test_builder_runs_end_to_end(tmp_path, monkeypatch):
    """A few steps, so that the recipe cannot rot; the T5 spells capitals and keeps the old pieces' numbers."""
    drawn, real = [], build_words.draw
    monkeypatch.setattr(build_words, "draw", lambda count, generator: drawn.append(count) or real(count, generator))
    steps = ["--vae-steps", "2", "--flow-steps", "2", "--batch", "4"]
    monkeypatch.setattr("sys.argv", ["builder", "--output", str(tmp_path), *steps])
    build_words.main()
    pipe = StableDiffusion3Pipeline.from_pretrained(tmp_path)
    spelled = pipe.tokenizer_3(words.WordScene("CAT", "red", "white").caption).input_ids
    pieces = ["▁the", "▁word", "▁", *'"CAT"', "▁in", "▁red", "▁on", "▁a", "▁white", "▁background", "</s>"]
    assert pipe.tokenizer_3.convert_ids_to_tokens(spelled) == pieces
    assert len(pieces) <= build_words.T5_TOKENS
    shapes = StableDiffusion3Pipeline.from_pretrained(tiny.pipeline_dir())
    for text in tiny.prompts_file().read_text().splitlines()[:8]:
        assert pipe.tokenizer_3(text).input_ids == shapes.tokenizer_3(text).input_ids
    assert [row["step"] for row in json.loads((tmp_path / "training.json").read_text())["flow"]] == [2]
    assert len(drawn) == 2 + 8 + 2  # the VAE's steps, the scale of its latents, the flow's steps
