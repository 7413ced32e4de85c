"""The tiny world's second judge: what it finds in drawings and in the wrong thing, its builder, and its metric."""

import json
from pathlib import Path

import pytest
import torch

from advgrpo import tiny
from advgrpo.errors import UserError
from advgrpo.frontier import TinyWitness
from advgrpo.rewards import retrieval
from advgrpo.rewards.retrieval import ClassifierAccuracy, judge_metrics
from advgrpo.tiny import second_judge
from advgrpo.tiny.scenes import (
    BASE_ARTISTS,
    JUDGE_ARTISTS,
    NAMES,
    REFERENCE_ARTIST,
    STYLE_ARTISTS,
    Scene,
    render,
)
from tools.tiny import annotator, build_backbone
from tools.tiny import build_second_judge as builder

SHIPPED = tiny.WORLDS["tiny"].pipeline.parent / "second_judge"
RECORD = json.loads((SHIPPED / "training.json").read_text())


@pytest.fixture(scope="module")
def judge() -> second_judge.SecondJudge:
    return second_judge.SecondJudge()


def drawn(scenes: list[Scene], artist: str) -> torch.Tensor:
    return render(scenes, [artist] * len(scenes), torch.Generator().manual_seed(0))


def test_it_names_scenes_that_it_was_not_trained_on(judge):
    apart = builder.split()[1][::4]
    for artist in JUDGE_ARTISTS:
        images = drawn(apart, artist)
        assert judge.look(images, apart).float().mean() >= 0.9
        assert judge.look(images.roll(10, 0), apart).float().mean() <= 0.1, "another name's"


def test_it_knows_things_by_the_references_artist(judge):
    scenes = [Scene(name, "small", "left", "blue") for name in NAMES]
    seen = judge.look(drawn(scenes, REFERENCE_ARTIST), scenes).float().mean()
    assert seen >= RECORD["figures"]["reference_artist"] - 0.15
    noise = torch.rand(64, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    assert judge.look(noise, scenes).float().mean() <= 0.05


def test_it_looks_where_the_caption_puts_the_drawing(judge):
    here, there = (
        [Scene(name, "small", place, "white") for name in ("fox", "taxi", "star", "violin", "egg", "cloud")]
        for place in ("left", "right")
    )
    images = drawn(here, JUDGE_ARTISTS[0])
    assert judge.look(images, here).all()
    assert judge.look(images, there).float().mean() < 1


def test_nothing_that_is_trained_or_rewarded_was_drawn_by_its_artists():
    others = {*BASE_ARTISTS, REFERENCE_ARTIST, *annotator.ARTISTS, *build_backbone.ARTISTS, *STYLE_ARTISTS.values()}
    assert not set(JUDGE_ARTISTS) & others


def test_scenes_that_it_learns_on_are_not_those_it_is_measured_on():
    train, apart = builder.split()
    assert not set(train) & set(apart)
    assert len(train) + len(apart) == 64 * 30
    assert {scene.name for scene in train} == {scene.name for scene in apart} == set(NAMES)


def test_only_the_judges_artists_are_trained_on(monkeypatch):
    seen = []
    real = builder.render
    spied = lambda scenes, artists, generator: seen.append((scenes, set(artists))) or real(scenes, artists, generator)  # noqa: E731
    monkeypatch.setattr(builder, "render", spied)
    builder.train(1, 4, 0)
    assert set.union(*(artists for _, artists in seen)) == set(JUDGE_ARTISTS)
    assert all(scenes == builder.split()[0] for scenes, _ in seen)


def test_views_are_of_the_same_thing():
    images = drawn([Scene("fox", "large", "", "white")] * 40, JUDGE_ARTISTS[0])
    cuts = builder.cut(images, [Scene("fox", "large", "", "white")] * 40, second_judge.PIXELS)
    views = builder.augment(cuts, torch.Generator().manual_seed(0))
    assert views.shape == cuts.shape == (40, 3, 32, 32)
    assert views.min() >= 0
    assert views.max() <= 1
    change = (views - cuts).abs().mean((1, 2, 3))
    assert change.min() > 0.005
    assert change.mean() < 0.2
    mirrored = [(view.flip(2) - cut).abs().mean() < (view - cut).abs().mean() for view, cut in zip(views, cuts)]
    assert 0.3 < sum(mirrored) / 40 < 0.7


@pytest.mark.weekly
def test_the_builder_runs_end_to_end_and_repeats(tmp_path, monkeypatch):
    monkeypatch.setattr(builder, "measure", lambda *_: dict.fromkeys(builder.GATES, 0.5))
    weights = []
    for folder, seed in (("first", 0), ("again", 0), ("other", 1)):
        arguments = ["--steps", "2", "--batch", "8", "--seed", str(seed), "--pipeline", str(tmp_path)]
        builder.main(["--output", str(tmp_path / folder), *arguments])
        weights.append((tmp_path / folder / "model.safetensors").read_bytes())
    assert weights[0] == weights[1] != weights[2]
    record = json.loads((tmp_path / "first" / "training.json").read_text())
    assert record["second_judge"][-1]["step"] == 2
    assert record["gates"]["own_artists"] == {"least": builder.GATES["own_artists"], "found": 0.5}
    loaded = second_judge.load(tmp_path / "first")
    assert {value.dtype for value in loaded.state_dict().values()} == {torch.float32}
    monkeypatch.setattr(builder, "measure", lambda *_: dict.fromkeys(builder.GATES, 1.0))
    builder.main(["--measure", "--output", str(tmp_path / "first"), "--pipeline", str(tmp_path)])
    again = json.loads((tmp_path / "first" / "training.json").read_text())
    assert again["second_judge"] == record["second_judge"]
    assert again["gates"]["own_artists"]["found"] == 1.0


def test_the_metric_asks_it_and_refuses_other_captions(judge):
    scenes = [Scene(name, "large", "", "blue") for name in ("fox", "taxi", "key", "star")]
    prompts, images = [scene.caption for scene in scenes], drawn(scenes, JUDGE_ARTISTS[1])
    metric = ClassifierAccuracy(judge)
    assert metric.score(images, prompts).tolist() == [1.0] * 4
    assert metric.score(images, prompts[1:] + prompts[:1]).tolist() == [0.0] * 4
    with pytest.raises(UserError, match="metric classifier_accuracy: not a caption of the tiny world: 'a red star'"):
        metric.check_prompts(["a red star"])
    with pytest.raises(ValueError, match="want finite values"):
        metric.score(images + 1, prompts)


def test_the_metric_needs_no_extra(monkeypatch, tmp_path):
    monkeypatch.setattr(retrieval, "Judge", lambda **_: pytest.fail("EfficientNet was asked for"))
    found = judge_metrics(["saturation", "classifier_accuracy"], tmp_path)
    assert list(found) == ["classifier_accuracy"]
    assert isinstance(found["classifier_accuracy"], ClassifierAccuracy)


def test_the_frontier_takes_its_verdict_and_the_others_features(tmp_path):
    scenes = [Scene(name, "large", "", "blue") for name in ("fox", "taxi")]
    images, prompts = drawn(scenes, JUDGE_ARTISTS[0]), [scene.caption for scene in scenes]
    witness = TinyWitness(tmp_path, "classifier_accuracy")
    assert witness.accuracy == "classifier_accuracy"
    witness._judge.look = lambda *_: pytest.fail("its verdict was asked for")
    verdicts, features = witness.look(images, prompts[::-1])
    assert verdicts.tolist() == [0.0, 0.0]
    assert features.shape == (2, 1280)


def test_the_page_has_the_recorded_figures():
    assert all(gate["found"] >= gate["least"] for gate in RECORD["gates"].values())
    assert {name: gate["least"] for name, gate in RECORD["gates"].items()} == builder.GATES
    page = (Path(__file__).parents[2] / "docs" / "tiny.md").read_text()
    for name in ("own_artists", "reference_artist", "base_artists", "base_at_1", "base_at_2", "base_at_3"):
        assert f"{RECORD['figures'][name]:.3f}".lstrip("0") in page, name


def test_the_shipped_judge_is_small_and_readable():
    files = [path for path in SHIPPED.iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 2**20
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in files)
