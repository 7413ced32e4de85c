"""The OCR reward on rendered words.

The engine is RapidOCR itself; one instance for the file keeps it at a few seconds.

Planted bugs that turned this file red: no cap of the distance at the target's length, no containment, white space or
case kept, substitutions at cost 2, channels in the wrong order (here and in pixels.py), levels not rounded, NaN let
through, a failing engine read as an empty text, prompts without a target given one.
"""

from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from advgrpo.errors import UserError
from advgrpo.rewards.ocr import OcrReward, edit_distance, target_text, text_reward
from advgrpo.tiny import words

FONT = matplotlib.get_data_path() + "/fonts/ttf/DejaVuSans.ttf"


@pytest.fixture(scope="module")
def reward() -> OcrReward:
    return OcrReward(detection_size=192)


def image(*lines: str, size: int = 128, colour: str = "black") -> torch.Tensor:
    """[3, S, S] with the lines in the middle of a white background."""
    canvas = Image.new("RGB", (size, size), "white")
    text, font = "\n".join(lines), ImageFont.truetype(FONT, size // 5)
    ImageDraw.Draw(canvas).text((size / 2, size / 2), text, colour, font=font, anchor="mm")
    return torch.from_numpy(np.array(canvas)).permute(2, 0, 1).float() / 255


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ("", "", 0),
        ("abc", "abc", 0),
        ("", "abc", 3),
        ("abc", "", 3),
        ("kitten", "sitting", 3),
        ("flaw", "lawn", 2),
        ("intention", "execution", 5),
        ("ab", "ba", 2),  # Levenshtein's, not Damerau's: a transposition costs two
    ],
)
def test_edit_distance(first, second, expected):
    assert edit_distance(first, second) == expected == edit_distance(second, first)


@pytest.mark.parametrize(
    ("target", "recognized", "expected"),
    [
        ("OPEN", "open", 1.0),
        ("New York", "NEWYORK", 1.0),
        ("OPEN", "we are OPEN today", 1.0),  # contained
        ("OPEN", "OPEM", 0.75),
        ("OPEN", "", 0.0),
        ("OPEN", "a much longer text", 0.0),  # the distance is capped at the target's length
        ("New York", "New\nYor", 1 - 1 / 7),
    ],
)
def test_formula(target, recognized, expected):
    assert text_reward(target, recognized) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ('a sign that says "OPEN"', "OPEN"),
        ("a sign that says “Jour de fête”", "Jour de fête"),
        ('"first" and "second"', "first"),
        ('it\'s the word " spaced "', "spaced"),
    ],
)
def test_target(prompt, expected):
    assert target_text(prompt) == expected


@pytest.mark.parametrize("prompt", ["no text", 'an "" empty one', 'a blank " " one', 'an open " quote', "'single'"])
def test_prompt_without_target_is_an_error_before_reading(prompt, reward, monkeypatch):
    monkeypatch.setattr(reward, "_read_one", lambda *_: pytest.fail("read an image"))
    with pytest.raises(UserError, match="no text in double quotes"):
        reward.check_prompts(['fine "x"', prompt])
    with pytest.raises(UserError, match="no text in double quotes"):
        reward.score(torch.zeros(2, 3, 64, 64), ['fine "x"', prompt], None)
    reward.check_prompts(['fine "x"'])


def test_rendered_words(reward):
    """Exact, misspelt, two lines, no text, another text; each image's own score."""
    images = torch.stack([image("OPEN"), image("OPFN"), image("NEW", "YORK"), image(), image("ZZZZ")])
    prompts = ['a sign "OPEN"', 'a sign "OPEN"', 'a sign "New York"', 'a sign "OPEN"', 'a sign "OPEN"']
    scores = reward.score(images, prompts, None)
    assert scores.dtype == torch.float32
    assert scores.tolist() == pytest.approx([1.0, 0.75, 1.0, 0.0, 0.0])
    assert reward.name == "ocr"


class FakeEngine:
    """Stands in for RapidOCR where its input or its failure is the point."""

    def __init__(self, params):
        pass

    def __call__(self, pixels):
        if pixels.max() == 0:
            raise OSError("model file truncated")
        return SimpleNamespace(txts=(str(pixels[0, 0].tolist()),))


@pytest.fixture
def fake_reward(monkeypatch) -> OcrReward:
    monkeypatch.setattr("advgrpo.rewards.ocr._engine_class", lambda: FakeEngine)
    return OcrReward()


def test_the_engine_gets_blue_green_red_bytes(fake_reward):
    orange = torch.tensor([1.0, 0.5, 0.0]).view(1, 3, 1, 1).expand(1, 3, 4, 4)
    assert fake_reward.read(orange, ["x"]) == ["[0, 128, 255]"]


def test_processes_that_wait_learn_of_every_image(fake_reward, monkeypatch):
    told = []
    monkeypatch.setattr(fake_reward, "progress", told.append)
    fake_reward.read(torch.ones(2, 3, 8, 8), ['say "a"', 'say "b"'])
    assert told == ["reward ocr: 1 of 2 images read", "reward ocr: 2 of 2 images read"]


def test_engine_failure_names_the_prompt(fake_reward):
    images = torch.stack([torch.ones(3, 8, 8), torch.zeros(3, 8, 8)])
    with pytest.raises(RuntimeError, match="OCR failed on the image for prompt 'a \"B\"': model file truncated"):
        fake_reward.score(images, ['a "A"', 'a "B"'], None)


def test_scores_do_not_depend_on_the_batch_or_the_workers():
    scenes = [words.WordScene.parse(c) for c in words.split_prompts(4, 0)[0]]
    images = words.render(scenes, torch.Generator().manual_seed(1)) * 0.4 + 0.3
    images += 0.15 * torch.randn(images.shape, generator=torch.Generator().manual_seed(2))
    images.clamp_(0, 1)
    captions = [s.caption for s in scenes]
    one, two = OcrReward(detection_size=192), OcrReward(detection_size=192, workers=2)
    together = two.read(images, captions)
    assert together == [one.read(images[i : i + 1], [captions[i]])[0] for i in range(len(images))]
    assert any(together)


@pytest.mark.parametrize(
    ("images", "complaint"),
    [
        (torch.full((2, 3, 8, 8), float("nan")), "'\"a\"' spans"),
        (torch.stack([torch.zeros(3, 8, 8), torch.full((3, 8, 8), 1.5)]), "'\"b\"' spans"),
        (torch.zeros(2, 1, 8, 8), "want float images"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), "want float images"),
        (torch.zeros(3, 3, 8, 8), "3 images but 2 prompts"),
    ],
)
def test_bad_images(images, complaint, reward):
    with pytest.raises(ValueError, match=complaint):
        reward.read(images, ['"a"', '"b"'])


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"detection_size": 8}, "detection_size"),
        ({"min_confidence": 1.0}, "min_confidence"),
        ({"workers": 0}, "workers"),
    ],
)
def test_bad_arguments(arguments, field):
    with pytest.raises(UserError, match=field):
        OcrReward(**arguments)
