"""The tiny world's preference model: its losses, its builder, and what the shipped one prefers.

Bugs planted in a copy, each seen red: the two images of a pair swapped in the loss; draws that ignore the seed.
"""

import json

import pytest
import torch

from advgrpo import tiny
from advgrpo.rewards.pickscore import PickScore
from advgrpo.tiny.architecture import TINY, clip_tokenizer, vae
from advgrpo.tiny.scenes import REFERENCE_ARTIST, Scene, render
from tools.tiny import annotator, poor_copies
from tools.tiny import build_preference as builder
from tools.tiny.damage import saturate

SHIPPED = tiny.PREFERENCE_MODELS["tiny"]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def network() -> builder.AutoencoderKL:
    """An untrained VAE."""
    torch.manual_seed(0)
    return vae(TINY).eval()


def untrained() -> builder.Trainee:
    tokenizer = clip_tokenizer(TINY)
    return builder.Trainee(builder.model(0, len(tokenizer)), tokenizer)


def test_the_losses_prefer_the_preferred_and_name_what_is_shown(network, monkeypatch):
    """Images whose embeddings agree with the annotator cost less than the same images the other way round."""
    trainee = untrained()
    pairs = annotator.Pairs.draw(annotator.Drawings.make(network, 8, seeded()), 16, seeded())
    text = trainee.embed(pairs.asked)
    better = torch.where(pairs.wins > 0.5, 1.0, -1.0)[:, None]
    losses = []
    for sign in (1.0, -1.0):
        embedded = torch.cat([sign * better * text, -sign * better * text])
        monkeypatch.setattr(trainee, "look", lambda images, embedded=embedded: embedded)
        losses.append({name: value.item() for name, value in trainee.losses(pairs).items()})
    assert losses[0]["preference"] < losses[1]["preference"]
    assert (losses[0]["agreement"], losses[1]["agreement"]) == (1.0, 0.0)
    monkeypatch.setattr(trainee, "look", lambda images: trainee.embed(pairs.shown))
    named = trainee.losses(pairs)["contrastive"]
    monkeypatch.setattr(trainee, "look", lambda images: trainee.embed(pairs.shown[1:] + pairs.shown[:1]))
    assert named < trainee.losses(pairs)["contrastive"]


@pytest.mark.weekly
def test_the_builder_runs_end_to_end_and_repeats(tmp_path, monkeypatch, network):
    pipeline = tmp_path / "pipeline"
    network.save_pretrained(pipeline / "vae")
    clip_tokenizer(TINY).save_pretrained(pipeline / "tokenizer")
    monkeypatch.setattr(builder.StableDiffusion3Pipeline, "from_pretrained", lambda *_, **__: None)
    monkeypatch.setattr(builder, "measure_on_drawings", lambda *_: dict.fromkeys(builder.GATES, 0.7))
    monkeypatch.setattr(builder, "measure_on_base", lambda *_: {"reference_over_base": 0.85})
    weights = []
    for folder, seed in (("first", 0), ("again", 0), ("other", 1)):
        arguments = ["--steps", 3, "--batch", 4, "--drawings", 8, "--seed", seed, "--pipeline", pipeline]
        builder.main(["--output", str(tmp_path / folder), *map(str, arguments)])
        weights.append((tmp_path / folder / "model.safetensors").read_bytes())
    assert weights[0] == weights[1] != weights[2]
    record = json.loads((tmp_path / "first" / "training.json").read_text())
    assert record["preference"][-1]["step"] == 3
    assert record["gates"]["reference_over_base"] == {"least": 0.8, "found": 0.85}
    assert record["gates"]["reference_over_base_guided"] == {"least": 0.8, "found": 0.7}
    score = PickScore(path=str(tmp_path / "first")).score(torch.rand(2, 3, 48, 48), ["a star", "a dog"], None)
    assert score.shape == (2,)
    monkeypatch.setattr(builder, "measure_on_drawings", lambda *_: dict.fromkeys(builder.GATES, 0.9))
    builder.main(["--measure", "--output", str(tmp_path / "first"), "--pipeline", str(tmp_path)])
    again = json.loads((tmp_path / "first" / "training.json").read_text())
    assert again["preference"] == record["preference"]
    assert again["gates"]["reference_over_base_guided"]["found"] == 0.9
    assert (tmp_path / "first" / "model.safetensors").read_bytes() == weights[0]


@pytest.fixture(scope="module")
def figures() -> dict[str, float]:
    return builder.measure_on_drawings(builder.Trainee.load(SHIPPED), seed=0)


def test_the_shipped_model_passes_its_gates(figures):
    """What drawings alone can show is measured again; the pictures of the base are taken from the record."""
    record = json.loads((SHIPPED / "training.json").read_text())
    assert {name: gate["least"] for name, gate in record["gates"].items()} == builder.GATES
    assert all(gate["found"] >= gate["least"] for gate in record["gates"].values())
    assert figures == pytest.approx({name: record["figures"][name] for name in figures}, abs=0.02)
    assert {name for name in builder.GATES if "base" not in name} <= figures.keys()


def test_the_shipped_model_tells_the_base_from_references():
    """On a few pictures: the gate's pairs in small."""
    prompts = tiny.other_prompts()["tiny:tuning"].read_text().splitlines()[:24]
    pipe = builder.StableDiffusion3Pipeline.from_pretrained(tiny.WORLDS["tiny"].pipeline, use_safetensors=True)
    pictures = builder.base_pictures(pipe, prompts, 2.0, seed=1)
    references = render([Scene.parse(prompt) for prompt in prompts], [REFERENCE_ARTIST] * len(prompts))
    reward = PickScore(path="tiny")
    wins = reward.score(references, prompts, None) > reward.score(pictures, prompts, None)
    assert wins.float().mean() >= 0.6


def test_pickscore_by_the_worlds_name():
    scenes = [scene for scene in builder._tuning_scenes() if scene.size == "large"][:40]
    captions = [scene.caption for scene in scenes]
    images = render(scenes, [REFERENCE_ARTIST] * len(scenes))
    reward = PickScore(path="tiny")
    right = reward.score(images, captions, None)
    for worse, least in (
        (reward.score(images, captions[1:] + captions[:1], None), 0.9),
        (reward.score(poor_copies.watermarked(images, 1.0, seeded()), captions, None), 0.9),
        (reward.score(saturate(images, 0.5), captions, None), 0.8),
    ):
        assert (right > worse).float().mean() >= least


def test_the_page_has_the_recorded_figures():
    from pathlib import Path

    found = json.loads((SHIPPED / "training.json").read_text())["figures"]
    page = (Path(__file__).parents[2] / "docs" / "tiny.md").read_text()
    names = ("reference_over_base", "reference_over_base_guided", "saturated_over_reference", "named_base_guided")
    for name in names:
        assert f"{found[name]:.3f}".lstrip("0") in page, name


def test_the_shipped_model_is_small_and_readable():
    files = [path for path in SHIPPED.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 2 * 2**20
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in files)
