"""The rule reward on drawings whose attributes are known.

Planted bugs that turned this file red: 0 / 0 overlap of an empty image let through, strict without the background,
the outline rewarded for any shape, the background left out, prompts not checked first, batches with others' prompts,
the emoji world's place left out, mixed prompts let through.
"""

import pytest
import torch

from advgrpo.errors import UserError
from advgrpo.rewards.rule import RuleReward
from advgrpo.tiny import scenes
from advgrpo.tiny.shapes import Scene, render

SCENE = Scene("star", "red", "blue", "large", "in the center of")
OTHERS = {
    "shape": Scene("ring", "red", "blue", "large", "in the center of"),
    "colour": Scene("star", "green", "blue", "large", "in the center of"),
    "background": Scene("star", "red", "white", "large", "in the center of"),
    "everything": Scene("ring", "green", "white", "large", "in the center of"),
}


def draw(*scenes: Scene, roughness: float = 0.0) -> torch.Tensor:
    return render(list(scenes), torch.Generator().manual_seed(0), roughness=roughness)


def test_every_attribute_is_a_third():
    images = draw(SCENE, *OTHERS.values())
    right, shape, colour, background, everything = RuleReward().score(images, [SCENE.caption] * 5, None).tolist()
    outline = 3 * right - 2
    assert 0.9 < outline < 1
    assert shape == pytest.approx(2 / 3)
    assert colour == pytest.approx(right - 1 / 3, abs=0.02)
    assert background == pytest.approx(right - 1 / 3, abs=0.02)
    assert everything == 0


def test_strict_wants_all_of_it():
    images = draw(SCENE, *OTHERS.values())
    scores = RuleReward(strict=True).score(images, [SCENE.caption] * 5, None)
    assert scores.tolist() == [1, 0, 0, 0, 0]
    assert scores.dtype == torch.float32


def test_graded_prefers_the_crisper_outline():
    scenes = [SCENE] * 16
    crisp, rough = (RuleReward().score(draw(*scenes, roughness=r), [SCENE.caption] * 16, None) for r in (0.0, 0.4))
    assert crisp.mean() > rough.mean() + 0.02
    assert rough.std() > 0
    assert rough.max() <= 1


def test_an_empty_image_is_no_drawing():
    empty = torch.full((1, 3, 32, 32), 0.5)
    assert RuleReward(strict=True).score(empty, [SCENE.caption], None).item() == 0
    assert RuleReward().score(empty, [SCENE.caption], None).item() <= 1 / 3


def test_scores_do_not_depend_on_the_batch(monkeypatch):
    scenes = [SCENE, *OTHERS.values()] * 2
    images, prompts = draw(*scenes, roughness=0.3), [scene.caption for scene in scenes]
    whole = RuleReward().score(images, prompts, None)
    monkeypatch.setattr("advgrpo.rewards.rule._BATCH", 3)
    assert torch.equal(whole, RuleReward().score(images, prompts, None))
    assert torch.equal(whole[4:5], RuleReward().score(images[4:5], prompts[4:5], None))


def test_prompts_are_checked_before_anything_is_judged(monkeypatch):
    monkeypatch.setattr("advgrpo.rewards.rule.judge", lambda *_: pytest.fail("judged"))
    for attempt in (
        lambda: RuleReward().check_prompts([SCENE.caption, "a red dragon"]),
        lambda: RuleReward().score(draw(SCENE, SCENE), [SCENE.caption, "a red dragon"], None),
    ):
        with pytest.raises(UserError, match=r"reward rule: .*'a red dragon'"):
            attempt()
    RuleReward().check_prompts([SCENE.caption])


@pytest.mark.parametrize(
    ("images", "complaint"),
    [
        (torch.full((1, 3, 32, 32), float("nan")), "large red star .* spans"),
        (torch.zeros(2, 3, 32, 32), "2 images but 1 prompts"),
        (torch.zeros(1, 3, 32, 16), "square"),
    ],
)
def test_bad_images(images, complaint):
    with pytest.raises(ValueError, match=complaint):
        RuleReward().score(images, [SCENE.caption], None)


FOX = emoji.Scene("fox", "small", "left", "blue")
OTHER_LAYOUTS = {
    "place": emoji.Scene("fox", "small", "right", "blue"),
    "size": emoji.Scene("fox", "large", "", "blue"),
    "background": emoji.Scene("fox", "small", "left", "white"),
    "everything": emoji.Scene("fox", "large", "", "white"),
}


def test_every_attribute_of_an_emoji_is_a_third():
    images = emoji.render([FOX, *OTHER_LAYOUTS.values()], ["noto"] * 5)
    scores = RuleReward().score(images, [FOX.caption] * 5, None)
    right, place, size, background, everything = scores.tolist()
    assert scores.dtype == torch.float32
    assert right == pytest.approx(1)
    assert 1 / 3 < place < 0.8  # a box beside its place overlaps in part
    assert 1 / 3 < size < 0.6  # the middle is not the left either
    assert background == pytest.approx(right - 1 / 3, abs=0.02)
    assert everything == pytest.approx(size - 1 / 3, abs=0.02)
    assert RuleReward(strict=True).score(images, [FOX.caption] * 5, None).tolist() == [1, 0, 0, 0, 0]


def test_an_emoji_prompts_empty_image_is_no_drawing():
    empty = torch.full((1, 3, 48, 48), 0.5)
    assert RuleReward(strict=True).score(empty, [FOX.caption], None).item() == 0
    assert RuleReward().score(empty, [FOX.caption], None).item() <= 1 / 3


def test_emoji_scores_do_not_depend_on_the_batch(monkeypatch):
    scenes = [FOX, *OTHER_LAYOUTS.values()]
    images, prompts = emoji.render(scenes, ["noto"] * 5), [scene.caption for scene in reversed(scenes)]
    whole = RuleReward().score(images, prompts, None)
    monkeypatch.setattr("advgrpo.rewards.rule._BATCH", 2)
    assert torch.equal(whole, RuleReward().score(images, prompts, None))


def test_prompts_of_two_worlds_are_refused():
    with pytest.raises(
        UserError, match=r"'a small fox on blue, left' are captions of two worlds; give it prompts of one"
    ):
        RuleReward().check_prompts([SCENE.caption, SCENE.caption, FOX.caption])
    with pytest.raises(UserError, match="they read like 'a small fox on blue, left'"):
        RuleReward().check_prompts(["a small fax on blue, left"])
    RuleReward().check_prompts([FOX.caption])
