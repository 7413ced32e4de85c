"""The tiny world's words: captions, images, sets, the shipped pipeline that draws them, and its builder.

Planted bugs that turned this file red: held-out captions drawn from the training ones, words without jitter, capital
letters without pieces of their own, a training loop that ignores `draw`, captions cut short, other weights in the
preset.
"""

import json

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from PIL import Image

from advgrpo import tiny, train
from advgrpo.data.prompts import load_prompts
from advgrpo.data.references import ReferenceSet
from advgrpo.rewards.ocr import OcrReward, target_text
from advgrpo.tiny import words
from tools.tiny import build_words


@pytest.fixture(scope="module")
def reward() -> OcrReward:
    return OcrReward(detection_size=192)


def test_word_images_are_read(reward):
    """What the tiny world's OCR reward rests on: crisp images score 1, and another word's prompt does not."""
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


@pytest.fixture(scope="module")
def shipped() -> tiny.World:
    return tiny.WORLDS["tiny:words"]


def test_the_shipped_set_is_what_the_command_writes(shipped, tmp_path):
    words.main(["--output", str(tmp_path), "--size", "32", "--per-prompt", "4"])
    assert shipped.prompts.read_bytes() == (tmp_path / "prompts.txt").read_bytes()
    assert shipped.held_out_prompts.read_bytes() == (tmp_path / "held_out_prompts.txt").read_bytes()
    files = sorted(path.name for path in shipped.references.iterdir())
    assert files == sorted(path.name for path in (tmp_path / "references").iterdir())
    for name in files[::100]:
        with Image.open(shipped.references / name) as kept, Image.open(tmp_path / "references" / name) as drawn:
            assert abs(np.asarray(kept, dtype=int) - np.asarray(drawn, dtype=int)).max() <= 2  # fonts move by versions


@pytest.mark.weekly
def test_the_shipped_pipeline_draws_words_that_are_read(shipped, reward):
    """Above half of the letters without guidance, and more with it: what a text-rendering reward starts from."""
    pipe = StableDiffusion3Pipeline.from_pretrained(shipped.pipeline)
    pipe.set_progress_bar_config(disable=True)
    prompts = [p.text for p in load_prompts(shipped.held_out_prompts)][:16]
    settings = {"num_inference_steps": 10, "height": 32, "width": 32, "output_type": "pt"}
    settings["max_sequence_length"] = shipped.max_sequence_length
    means = []
    for guidance in (1.0, 2.0):
        noise = [torch.Generator().manual_seed(k) for k in range(16)]
        images = pipe(prompts, guidance_scale=guidance, generator=noise, **settings).images
        means.append(reward.score(images, prompts, None).mean().item())
    assert means[0] >= 0.5
    assert means[1] >= 0.7


@pytest.mark.weekly
def test_the_ocr_preset_trains_and_scores_words(tmp_path):
    """Two iterations of the job, words' references and all; its metrics hold both rewards."""
    flags = ["--preset", "tiny-adv-ocr", "--iterations", "2", "--output-dir", str(tmp_path / "run")]
    flags += ["--rollout.prompts-per-iteration", "4", "--rollout.micro-batch", "8", "--data.cache-dir", str(tmp_path)]
    flags += ["--data.held-out-prompts", "", "--output.no-tensorboard"]
    assert train.main(flags) == 0
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    for row in rows:
        assert 0.2 < row["reward_ocr"] <= 1
        mixed = 0.5 * row["reward_ocr"] + 0.5 * row["reward_dino_similarity"]
        assert row["reward_generated"] == pytest.approx(mixed, abs=1e-6)


def test_builder_runs_end_to_end(tmp_path, monkeypatch):
    """A few steps, so that the recipe cannot rot; every caption is read to its end, and the T5 spells capitals."""
    drawn, real = [], build_words.draw
    monkeypatch.setattr(build_words, "draw", lambda count, generator: drawn.append(count) or real(count, generator))
    steps = ["--vae-steps", "2", "--flow-steps", "2", "--batch", "4", "--images", "64"]
    build_words.main(["--output", str(tmp_path), *steps])
    pipe = StableDiffusion3Pipeline.from_pretrained(tmp_path)
    spelled = pipe.tokenizer_3(words.WordScene("CAT", "red", "white").caption).input_ids
    pieces = ["▁the", "▁word", "▁", *'"CAT"', "▁in", "▁red", "▁on", "▁a", "▁white", "▁background", "</s>"]
    assert pipe.tokenizer_3.convert_ids_to_tokens(spelled) == pieces
    assert len(pieces) <= build_words.SIZE.t5_tokens == tiny.WORLDS["tiny:words"].max_sequence_length
    captions = words.split_prompts(110, 0)[0]
    assert max(len(pipe.tokenizer(caption, truncation=False).input_ids) for caption in captions) <= 17
    assert [row["step"] for row in json.loads((tmp_path / "training.json").read_text())["flow"]] == [2]
    assert len(drawn) == 2 + 8 + 1  # the VAE's steps, the scale of its latents, the flow's images
