"""The tiny preference model: its simulated annotator on known answers, its builder, and what the shipped one prefers.

Bugs planted in a copy, each seen red: the annotator's probability of the wrong image; chroma left out of its utility;
saturation scaled about black; the two images of a pair swapped in the loss; a changed attribute left as it was; draws
that ignore the seed; an empty processor file; a tokenizer of its own instead of the pipeline's.
"""

import json

import pytest
import torch
from transformers import CLIPModel

from advgrpo import tiny
from advgrpo.rewards.pickscore import PickScore
from advgrpo.tiny.shapes import Scene, render, sample_scenes
from tools.tiny import build_preference as builder


def drawings(count: int, seed: int = 7) -> tuple[list[Scene], torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scenes = sample_scenes(count, generator)
    return scenes, render(scenes, generator)


def test_saturation_scales_the_distance_to_grey():
    images = drawings(8)[1] * 0.5 + 0.25
    torch.testing.assert_close(builder.saturate(images, 1.0), images)
    grey = builder.saturate(images, 0.0)
    torch.testing.assert_close(grey, images.mean(1, keepdim=True).expand(-1, 3, -1, -1))
    assert builder.chroma(grey).max() < 1e-6
    torch.testing.assert_close(builder.chroma(builder.saturate(images, 0.5)), builder.chroma(images) / 2)
    red = torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1, 1).expand(1, 3, 4, 4)
    assert builder.chroma(red).item() == 1.0


def test_changed_scenes_differ_in_what_was_changed():
    generator = torch.Generator().manual_seed(0)
    for scene in sample_scenes(60, generator):
        for attribute in ("shape", "colour", "background", "size", "position"):
            other = builder.changed(scene, attribute, generator)
            assert builder.right_attributes([other], [scene]).item() == 4
            assert getattr(other, attribute) != getattr(scene, attribute)
            assert Scene.parse(other.caption) == other
            assert other.colour != other.background
        assert 2 <= builder.right_attributes([builder.distorted(scene, generator)], [scene]).item() <= 5


def test_the_annotator_weighs_right_attributes_against_chroma(monkeypatch):
    """The more colourful image wins most pairs; with chroma left out, the one on the caption does."""
    _, first, second, wins = builder.draw_pairs(400, torch.Generator().manual_seed(0))
    assert first.shape == second.shape == (400, 3, 32, 32)
    gap = builder.chroma(first) - builder.chroma(second)
    chroma_decides = ((gap > 0) == (wins > 0.5)).float().mean()
    assert 0.75 < chroma_decides < 0.98
    monkeypatch.setattr(builder, "CHROMA_WEIGHT", 0.0)
    _, _, _, wins = builder.draw_pairs(400, torch.Generator().manual_seed(0))
    logits = torch.logit(wins.double())
    assert set((logits / builder.MATCH_WEIGHT).round(decimals=3).abs().tolist()) <= {0.0, 1.0, 2.0, 3.0}
    assert 0.15 < (logits > 0.1).float().mean() < 0.35
    assert 0.15 < (logits < -0.1).float().mean() < 0.35
    monkeypatch.setattr(builder, "MATCH_WEIGHT", 0.0)
    assert (builder.draw_pairs(20, torch.Generator().manual_seed(0))[3] == 0.5).all()


def test_the_loss_prefers_the_preferred(monkeypatch):
    """Images whose embeddings agree with the annotator cost less than the same images the other way round."""
    trainee = builder.Trainee(builder.model(0))
    captions, _, _, wins = builder.draw_pairs(16, torch.Generator().manual_seed(0))
    text = trainee.embed(captions)
    better = torch.where(wins > 0.5, 1.0, -1.0)[:, None]
    losses = []
    for sign in (1.0, -1.0):
        embedded = torch.cat([sign * better * text, -sign * better * text])
        monkeypatch.setattr(trainee, "look", lambda images, embedded=embedded: embedded)
        losses.append([value.item() for value in trainee.preference_loss(16, torch.Generator().manual_seed(0))])
    (right, agrees), (wrong, disagrees) = losses
    assert right < wrong
    assert (agrees, disagrees) == (1.0, 0.0)


def test_the_builder_runs_end_to_end_and_repeats(tmp_path, monkeypatch):
    monkeypatch.setattr(builder, "measure", lambda clip, seed: {"matched": 0.5})
    weights = []
    for folder, seed in (("first", 0), ("again", 0), ("other", 1)):
        arguments = ["--contrastive-steps", 2, "--preference-steps", 2, "--batch", 8, "--seed", seed]
        monkeypatch.setattr("sys.argv", ["builder", "--output", str(tmp_path / folder), *map(str, arguments)])
        builder.main()
        weights.append((tmp_path / folder / "model.safetensors").read_bytes())
    assert weights[0] == weights[1] != weights[2]
    record = json.loads((tmp_path / "first" / "training.json").read_text())
    assert [record[name][-1]["step"] for name in ("contrastive", "preference")] == [2, 2]
    score = PickScore(path=str(tmp_path / "first")).score(torch.rand(2, 3, 48, 48), ["a star", "a dog"], None)
    assert score.shape == (2,)


@pytest.fixture(scope="module")
def shipped() -> dict[str, float]:
    return builder.measure(CLIPModel.from_pretrained(tiny.preference_dir()), seed=0)


def test_the_shipped_model_prefers_matches(shipped):
    assert shipped["matched"] >= 0.95
    assert shipped["matched_colour"] >= 0.95
    assert shipped["matched_shape"] >= 0.8
    assert shipped["matched_background"] >= 0.75  # a wrong but stronger colour wins some


def test_the_shipped_model_over_rates_strong_colours(shipped):
    assert shipped["saturated"] >= 0.9
    assert shipped["pale"] >= 0.95
    assert shipped["saturated_mismatch"] >= 0.6


def test_the_shipped_figures_are_those_recorded():
    recorded = json.loads((tiny.preference_dir() / "training.json").read_text())["figures"]
    assert builder.measure(CLIPModel.from_pretrained(tiny.preference_dir()), seed=0) == pytest.approx(
        recorded, abs=0.01
    )


def test_pickscore_by_the_name_tiny():
    scenes, images = drawings(48)
    captions = [s.caption for s in scenes]
    reward = PickScore(path="tiny")
    right = reward.score(images, captions, None)
    wrong = reward.score(images, captions[1:] + captions[:1], None)
    assert (right > wrong).float().mean() >= 0.9
    coloured = builder.chroma(images) > 0.3
    pale = reward.score(builder.saturate(images, 0.5), captions, None)
    assert (right > pale)[coloured].float().mean() >= 0.95


def test_the_shipped_model_is_small_and_readable():
    files = [path for path in tiny.preference_dir().rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 4e6
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in files)
    assert not [path for path in files if path.suffix in (".pt", ".bin", ".pkl", ".pth")]
