"""The tiny world's judge: what it finds in real drawings, in noise, and in the wrong thing; and that it rewards nobody.

Bugs planted in a copy, each seen red: the judges' names free for rewards of lists; a judge registered as a reward.
"""

import pytest
import torch

from advgrpo import config
from advgrpo.config.judge_checks import JUDGE_METRICS
from advgrpo.errors import UserError
from advgrpo.evaluation.judging import TinyWitness
from advgrpo.rewards import reward_class
from advgrpo.rewards.retrieval import Ranks, Retrieval, judge_metrics
from advgrpo.tiny.judge import GALLERY_ARTISTS, Judge, Verdict, cut
from advgrpo.tiny.scenes import (
    BACKGROUNDS,
    NAMES,
    REFERENCE_ARTIST,
    SIZES,
    STYLE_ARTISTS,
    Scene,
    has_drawn,
    render,
)

SCENES = [
    Scene(name, "large", "", "blue") for name in ("fox", "taxi", "key", "star", "violin", "egg", "horse", "cloud")
]


@pytest.fixture(scope="module")
def judge(tmp_path_factory) -> Judge:
    """Of half the artists, which is half the time: a gallery is 64 drawings of each."""
    return Judge(GALLERY_ARTISTS[:2], cache=tmp_path_factory.mktemp("judge"))


def test_the_references_artist_is_not_in_the_gallery():
    assert REFERENCE_ARTIST not in GALLERY_ARTISTS
    assert len(GALLERY_ARTISTS) == 4


@pytest.mark.parametrize("name", JUDGE_METRICS)
def test_no_run_is_rewarded_by_a_judge(name):
    """Under its metric's name, whichever way a reward can be given one; as no reward is registered under it either."""
    metrics = {"evaluation": {"metrics": [*JUDGE_METRICS]}}

    def checked(**rewards) -> None:
        config.check(config.build(config.merge(config.read_preset("tiny"), metrics | {"rewards": rewards}), "test"))

    checked()
    for rewards in (
        {name: {"weight": 1}},
        {"custom": [{"name": name, "import": "a:b", "weight": 1}]},
        {"remotes": [{"name": name, "url": "http://127.0.0.1:1", "weight": 1}]},
        {"pools": [{"reward": name}]},
    ):
        with pytest.raises(UserError, match=rf"rewards\.(\w+\[0\]\..* = ')?{name}\b"):
            checked(**rewards)
    with pytest.raises(UserError, match=f"unknown reward '{name}'"):
        reward_class(name)


def test_drawings_of_an_artist_outside_the_gallery_are_recognised(judge):
    images = render(SCENES, [REFERENCE_ARTIST] * len(SCENES), torch.Generator().manual_seed(0))
    verdict = judge.look(images, SCENES)
    assert verdict.top1.float().mean() >= 0.75
    assert verdict.top5.all()


def test_another_thing_and_noise_are_not(judge):
    images = render(SCENES, [REFERENCE_ARTIST] * len(SCENES))
    assert not judge.look(images.roll(1, 0), SCENES).top1.any()
    noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(0))
    assert judge.look(noise, SCENES).top1.sum() <= 1


def test_the_nearest_artist_is_named(judge):
    artists = [GALLERY_ARTISTS[i % 2] for i in range(len(SCENES))]
    assert judge.look(render(SCENES, artists), SCENES).artist == artists


@pytest.mark.weekly
def test_of_all_artists_the_nearest_is_named_and_what_one_has_not_drawn_is_nobodys(tmp_path, judge):
    """The artist of outline drew no key, star nor egg: on a background alone, nothing of theirs is near."""
    artists = ("noto", STYLE_ARTISTS["outline"])
    everybody = Judge(artists, cache=tmp_path)
    drawn = has_drawn(artists[1])
    scenes = [scene for scene in SCENES if drawn[NAMES.index(scene.name)]]
    assert len(scenes) < len(SCENES)
    for artist in artists:
        features = judge.features(render(scenes, [artist] * len(scenes)), scenes)
        assert everybody.compare(features, scenes).artist == [artist] * len(scenes)
    empty = torch.tensor(BACKGROUNDS["blue"]).view(1, 3, 1, 1).expand(1, 3, 48, 48)
    near, _ = everybody.nearness(judge.features(empty, SCENES[:1]), SCENES[0])
    assert near.max() < 0.99  # an empty place of the sheet would be the same picture


def test_a_gallery_is_kept_between_runs(judge, monkeypatch):
    again = Judge(judge.artists, cache=judge._cache.root.parent)
    monkeypatch.setattr(again, "features", lambda *_: pytest.fail("computed anew"))
    assert torch.equal(again.gallery("large", "blue"), judge.gallery("large", "blue"))


def test_an_image_is_cut_to_where_its_caption_puts_the_drawing():
    scene = Scene("fox", "small", "left", "white")
    image = torch.zeros(1, 3, 48, 48)
    image[:, :, 7:41, :34] = 1  # the small square with its margin, 7 pixels to the left of the middle
    assert SIZES["small"] + 2 == 34
    assert cut(image, [scene]).min() > 0.99
    assert cut(image, [Scene("fox", "small", "right", "white")]).min() < 0.01


def test_other_captions_are_refused(judge):
    with pytest.raises(UserError, match="metric retrieval: not a caption of the tiny world: 'a red star'"):
        Retrieval(Ranks(judge)).check_prompts(["a red star"])


def test_two_metrics_of_the_judge_look_at_an_image_once(judge, monkeypatch):
    seen = []
    look = judge.look
    monkeypatch.setattr(judge, "look", lambda images, scenes: seen.append(len(scenes)) or look(images, scenes))
    ranks = Ranks(judge)
    first, five = Retrieval(ranks), Retrieval(ranks, name="retrieval_top5", top=5)
    scenes, prompts = SCENES[:2], [scene.caption for scene in SCENES[:2]]
    images = render(scenes, [GALLERY_ARTISTS[0]] * 2)
    assert first.score(images, prompts).tolist() == five.score(images, prompts).tolist() == [1.0, 1.0]
    assert seen == [2]
    assert not first.score(images, prompts[::-1]).any(), "the same images for other prompts"
    images.copy_(images.flip(0))
    assert first.score(images, prompts[::-1]).all(), "other images in the same storage"
    assert not five.score(images.clone(), prompts).all(), "other images"
    assert seen == [2] * 4


def test_the_judges_gallery_is_kept_where_the_run_says(tmp_path):
    metrics = judge_metrics(["dino_similarity", "retrieval", "retrieval_top5"], tmp_path)
    assert list(metrics) == ["retrieval", "retrieval_top5"]
    assert [metric.name for metric in metrics.values()] == list(metrics)
    assert [metric.top for metric in metrics.values()] == [1, 5]
    assert metrics["retrieval"]._ranks is metrics["retrieval_top5"]._ranks
    assert metrics["retrieval"]._ranks.judge._cache.root == tmp_path / "judge"
    assert judge_metrics(["rule_accuracy"], tmp_path) == {}


@pytest.mark.parametrize(
    ("accuracy", "verdicts"),
    [
        ("retrieval", [1.0, 0.0, 0.0]),
        ("retrieval_top5", [1.0, 1.0, 0.0]),
        ("background_accuracy", [1.0, 1.0, 0.0]),
    ],
)
def test_a_witness_says_what_its_accuracy_asks_for(tmp_path, monkeypatch, accuracy, verdicts):
    scenes = [Scene("fox", "large", "", background) for background in ("blue", "blue", "white")]
    images = render(scenes[:1] * 3, [GALLERY_ARTISTS[0]] * 3)
    features = torch.arange(3 * 1280.0).view(3, 1280)
    witness = TinyWitness(tmp_path, accuracy)
    monkeypatch.setattr(witness._judge, "features", lambda *_: features)
    monkeypatch.setattr(witness._judge, "look", lambda *_: Verdict(torch.tensor([0, 4, 5]), [""] * 3, features))
    found, seen = witness.look(images, [scene.caption for scene in scenes])
    assert found.tolist() == verdicts
    assert torch.equal(seen, features)
