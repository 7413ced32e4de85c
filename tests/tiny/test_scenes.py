"""The tiny world's images: captions, drawings, composition."""

import numpy as np
import pytest
import torch
from PIL import Image

from advgrpo.tiny import WORLDS, style_dir
from advgrpo.tiny.scenes import (
    ARTISTS,
    BACKGROUNDS,
    IMAGE_SIZE,
    JITTER,
    NAMES,
    PLACES,
    SIZES,
    STYLE_ARTISTS,
    Scene,
    all_scenes,
    compositions,
    drawings,
    has_drawn,
    read_sheet,
    render,
    vocabulary,
    write_sheet,
)


def test_captions_are_read_back_as_the_scene_they_describe():
    scenes = all_scenes()
    assert len({scene.caption for scene in scenes}) == len(scenes) == len(NAMES) * len(compositions())
    assert all(Scene.parse(scene.caption) == scene for scene in scenes)
    assert Scene("fox", "small", "left", "blue").caption == "a small fox on blue, left"


@pytest.mark.parametrize(
    "caption", ["a fox", "a large fox on blue, left", "a small fox on blue", "a small fix on blue, left", ""]
)
def test_other_texts_are_refused_with_an_example(caption):
    with pytest.raises(ValueError, match="they read like 'a small fox on blue, left'"):
        Scene.parse(caption)


def test_every_word_of_a_caption_is_in_the_vocabulary():
    words = vocabulary()
    assert {",", "fox"} <= set(words)
    assert words == sorted(set(words))


@pytest.mark.parametrize("artist", ARTISTS)
def test_every_artist_drew_every_thing_differently(artist):
    for size, side in SIZES.items():
        found = drawings(artist, size)
        assert found.shape == (len(NAMES), 4, side, side)
        covered = found[:, 3].mean((1, 2))
        assert 0.08 < covered.min() < covered.max() < 1  # key and pencil are thin; nothing fills its square
        assert (found[:, :3] <= found[:, 3:] + 1e-6).all()  # premultiplied
        distances = torch.cdist(found.flatten(1), found.flatten(1)) + torch.eye(len(NAMES)) * 1e9
        assert distances.min() > 1


@pytest.mark.parametrize(("style", "things"), [("ink", 64), ("outline", 44)])
def test_a_style_artists_sheet_has_what_its_pictures_show(style, things):
    """Every thing that was drawn stands out; the first picture of the style is one of the sheet's drawings."""
    artist = STYLE_ARTISTS[style]
    drawn = has_drawn(artist)
    assert drawn.sum() == things
    scene = next(
        s for s in map(Scene.parse, WORLDS["tiny"].prompts.read_text().splitlines()) if drawn[NAMES.index(s.name)]
    )
    shown = torch.from_numpy(np.asarray(Image.open(style_dir(style) / "000.png").convert("RGB")).copy())
    tiles = torch.stack([render([scene], [artist], torch.Generator().manual_seed(seed))[0] for seed in range(60)])
    assert (tiles - shown.permute(2, 0, 1) / 255).abs().amax((1, 2, 3)).min() < 0.01  # one of nine jitters


def test_an_unknown_artist_is_refused():
    with pytest.raises(ValueError, match="unknown artist 'openmoji'"):
        drawings("openmoji", "large")


def test_a_sheet_is_read_as_it_was_written(tmp_path):
    from PIL import Image

    generator = torch.Generator().manual_seed(0)
    pixels = (torch.rand(11, 6, 6, 4, generator=generator) * 255).round().byte()
    pixels[..., 3] = 255
    write_sheet([Image.fromarray(tile.numpy(), "RGBA") for tile in pixels], tmp_path / "sheet.png")
    found = read_sheet(tmp_path / "sheet.png", 11)
    assert torch.equal((found[:, :3] * 255).round().byte(), pixels[..., :3].permute(0, 3, 1, 2))


@pytest.mark.parametrize("scene", all_scenes(["fox"]), ids=lambda scene: scene.caption)
def test_a_drawing_stands_where_its_caption_says(scene):
    image = render([scene], ["twemoji"])[0]
    background = torch.tensor(BACKGROUNDS[scene.background]).view(3, 1, 1)
    drawn = ((image - background).abs().amax(0) > 0.02).nonzero().float()
    middle = (drawn.amin(0) + drawn.amax(0) + 1) / 2 - IMAGE_SIZE / 2
    assert (middle - torch.tensor(PLACES[scene.place]).flip(0)).abs().max() <= 2.5  # drawings need not be centred
    assert torch.equal(image[:, 0, 0], background.flatten())


def test_a_generator_moves_drawings_by_the_jitter_and_no_more():
    scene = Scene("star", "small", "left", "white")
    generator = torch.Generator().manual_seed(3)
    still = render([scene], ["noto"])[0]
    shifted = {tuple(still.roll((dy, dx), (1, 2)).flatten().tolist()) for dx in (-1, 0, 1) for dy in (-1, 0, 1)}
    assert JITTER == 1
    seen = {tuple(image.flatten().tolist()) for image in render([scene] * 60, ["noto"] * 60, generator)}
    assert seen == shifted
