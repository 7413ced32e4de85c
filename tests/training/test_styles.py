"""The tiny world's styles: what is shipped, what of a scene survives in it, and how a run finds it.

Bugs planted in a copy, each seen red: another paper colour; outlines without a contour; hatching without strokes; paler
pastels; six prompts left out; shared references computed per prompt; "tiny:" taken for a folder; no nearest style.
"""

import numpy as np
import pytest
import torch
from PIL import Image

from advgrpo import config, tiny
from advgrpo.adversary.build import build_adversary
from advgrpo.adversary.reference_features import ReferenceFeatures
from advgrpo.data.sources import Sources
from advgrpo.errors import UserError
from advgrpo.tiny.shapes import PALETTE, render
from tools.tiny.build_styles import STYLES, draw, measure, training_scenes, write_style


def test_every_style_is_shipped_and_small():
    assert [name for name in tiny.style_names() if ":" not in name] == sorted(STYLES)
    captions = {scene.caption for scene in training_scenes(300)}
    assert captions == set(tiny.prompts_file().read_text().splitlines())
    total = 0
    for style in STYLES:
        files = sorted(tiny.style_dir(style).iterdir())
        assert [file.name for file in files] == [f"{number:03d}.png" for number in range(300)]
        assert all(file.stat().st_mode & 0o777 == 0o644 for file in files)
        total += sum(file.stat().st_size for file in files)
    assert total < 600_000


def test_the_script_draws_what_is_shipped(tmp_path):
    write_style(tmp_path, "pastel", 300, seed=0)
    for file in tiny.style_dir("pastel").iterdir():
        shipped, drawn = (np.array(Image.open(f)).astype(int) for f in (file, tmp_path / file.name))
        assert shipped.shape == (32, 32, 3)
        assert abs(shipped - drawn).max() <= 1  # another machine may round the other way
    with pytest.raises(ValueError, match="unknown style 'cubist'"):
        draw("cubist", training_scenes(1), torch.Generator())


# Shares of images the judge sees right: shape, colour, background, all three. An outline's paper is white on white.
RECOGNISED = {"outline": (0.65, 0.7, 0.99, 0.5), "pastel": (0.95, 0.85, 0.99, 0.85), "hatched": (0.9, 0.95, 0.99, 0.9)}


@pytest.mark.parametrize("style", STYLES)
def test_the_judge_recognises_a_style_and_dino_tells_it_from_plain_drawings(style):
    found = measure(style, 96, seed=0)
    seen = [found[name] for name in ("shape", "colour", "background", "all_correct")]
    assert all(share >= least for share, least in zip(seen, RECOGNISED[style])), found
    assert found["similarity"] < 0.9
    assert found["spread"] > 0.02


def test_each_style_is_what_its_name_says():
    scenes = training_scenes(96)
    generator = torch.Generator
    plain, inside = render(scenes, generator().manual_seed(0), return_coverage=True)
    outline, pastel, hatched = (draw(style, scenes, generator().manual_seed(0)) for style in STYLES)
    colour, background = (
        torch.tensor([PALETTE[getattr(s, part)] for s in scenes]).view(-1, 3, 1, 1) for part in ("colour", "background")
    )
    for images in (outline, hatched):  # corners are plain background
        torch.testing.assert_close(images[..., 0, 0], background[..., 0, 0])
    torch.testing.assert_close(pastel[..., 0, 0], 0.75 * background[..., 0, 0] + 0.25)
    large = [i for i, s in enumerate(scenes) if s.size == "large" and s.shape == "circle"]
    assert len(large) > 2
    for i in large:
        deep = inside[i, 0] == 1
        paper = (outline[i] - 0.96).abs().amax(0) < 1e-3
        line = (outline[i] - colour[i]).abs().amax(0) < 1e-3
        assert (paper & deep).sum() > 20
        assert (line & deep).sum() > 10
        spread = hatched[i][:, deep].std(1).max()
        assert spread > 0.1  # strokes
        assert plain[i][:, deep].std(1).max() < 1e-3


@pytest.mark.parametrize(
    ("style", "message"),
    [
        ("tiny:outlin", r"data\.style = 'tiny:outlin': unknown style.*did you mean 'outline'"),
        ("tiny:xyzzy", "known: emoji:ink, emoji:outline, hatched, outline, pastel"),
        ("/nowhere", "is not a folder"),
    ],
)
def test_unknown_styles_are_named(unit_config, style, message):
    unit_config.data.references, unit_config.data.style = "", style
    with pytest.raises(UserError, match=message):
        Sources.read(unit_config)


def test_300_shared_images_go_through_the_adversary_once(unit_config, tmp_path, monkeypatch):
    """Although the prompts are prefetched before anything is stored."""
    unit_config.data.references, unit_config.data.style = "", "tiny:outline"
    sources = Sources.read(unit_config)
    adversary = build_adversary(unit_config.adversary, device=torch.device("cpu"), seed=unit_config.seed)
    seen, real = [], adversary.features
    monkeypatch.setattr(
        adversary, "features", lambda images, prompts: seen.append(len(images)) or real(images, prompts)
    )
    features = ReferenceFeatures(sources.references, adversary, tmp_path / "features")
    features.prefetch(sources.prompts)
    picked = features.pick(sources.prompts, torch.linspace(0, 0.99, len(sources.prompts)))
    assert sum(seen) == 300
    assert len(picked) == len(sources.prompts)


@pytest.mark.parametrize("style", STYLES)
def test_the_styles_presets(style):
    settings = config.load(f"tiny-style-{style}")
    config.check(settings, 1)
    assert settings.data.style == f"tiny:{style}"
    sources = Sources.read(settings)
    assert {len(sources.references.files(prompt)) for prompt in sources.prompts + sources.held_out} == {300}
