"""The rule reward on drawings whose attributes are known.

Planted bugs that turned this file red: strict without the background, the background or the place left out, prompts not
checked first, images judged by another image's prompt.
"""

import pytest
import torch

from advgrpo.errors import UserError
from advgrpo.rewards.rule import RuleReward
from advgrpo.tiny.scenes import Scene, render

FOX = Scene("fox", "small", "left", "blue")
OTHERS = {
    "place": Scene("fox", "small", "right", "blue"),
    "size": Scene("fox", "large", "", "blue"),
    "background": Scene("fox", "small", "left", "white"),
    "everything": Scene("fox", "large", "", "white"),
}


def draw(*scenes: Scene) -> torch.Tensor:
    return render(scenes, ["noto"] * len(scenes))


def test_every_attribute_is_a_third():
    scores = RuleReward().score(draw(FOX, *OTHERS.values()), [FOX.caption] * 5, None)
    right, place, size, background, everything = scores.tolist()
    assert scores.dtype == torch.float32
    assert right == pytest.approx(1)
    assert 1 / 3 < place < 0.8  # a box beside its place overlaps in part
    assert 1 / 3 < size < 0.6  # the middle is not the left either
    assert background == pytest.approx(right - 1 / 3, abs=0.02)
    assert everything == pytest.approx(size - 1 / 3, abs=0.02)


def test_strict_wants_all_of_it():
    scores = RuleReward(strict=True).score(draw(FOX, *OTHERS.values()), [FOX.caption] * 5, None)
    assert scores.tolist() == [1, 0, 0, 0, 0]
    assert scores.dtype == torch.float32


def test_what_is_drawn_does_not_count():
    other = Scene("panda", "small", "left", "blue")
    assert RuleReward().score(draw(other), [FOX.caption], None).item() > 0.9


def test_an_empty_image_is_no_drawing():
    empty = torch.full((1, 3, 48, 48), 0.5)
    assert RuleReward(strict=True).score(empty, [FOX.caption], None).item() == 0
    assert RuleReward().score(empty, [FOX.caption], None).item() <= 1 / 3


def test_scores_do_not_depend_on_the_batch():
    scenes = [FOX, *OTHERS.values()]
    images, prompts = draw(*scenes), [scene.caption for scene in reversed(scenes)]
    whole = RuleReward().score(images, prompts, None)
    alone = [RuleReward().score(images[i : i + 1], prompts[i : i + 1], None) for i in range(5)]
    assert torch.equal(whole, torch.cat(alone))


def test_prompts_are_checked_before_anything_is_judged(monkeypatch):
    monkeypatch.setattr("advgrpo.rewards.rule.look", lambda *_: pytest.fail("judged"))
    for attempt in (
        lambda: RuleReward().check_prompts([FOX.caption, "a red dragon"]),
        lambda: RuleReward().score(draw(FOX, FOX), [FOX.caption, "a red dragon"], None),
    ):
        with pytest.raises(UserError, match=r"reward rule: .*'a red dragon' \(they read like 'a small fox"):
            attempt()
    RuleReward().check_prompts([FOX.caption])


@pytest.mark.parametrize(
    ("images", "complaint"),
    [
        (torch.full((1, 3, 48, 48), float("nan")), "small fox .* spans"),
        (torch.zeros(2, 3, 48, 48), "2 images but 1 prompts"),
        (torch.zeros(1, 3, 48, 16), "square"),
    ],
)
def test_bad_images(images, complaint):
    with pytest.raises(ValueError, match=complaint):
        RuleReward().score(images, [FOX.caption], None)
