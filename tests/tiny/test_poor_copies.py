"""What the base pipeline learns last: drawings of which most are spoilt, alike every time.

Bugs planted, each seen red: fading towards black; the share of good ones taken as that of spoilt ones; every image
spoilt by the same kind; a shrunk image left small in detail; bars on the background too; the builder going on with good
drawings; the folder it went on from named in what it writes.
"""

import json

import pytest
import torch
from safetensors.torch import load_file

from advgrpo import tiny
from advgrpo.tiny.scenes import BASE_ARTISTS, all_scenes, render
from tools.tiny import build_pipeline
from tools.tiny.poor_copies import KINDS, fade, poor_copies, redraw, shrink, watermarked


def drawings(count: int = 48) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    known = all_scenes()
    scenes = [known[i] for i in torch.randint(len(known), (count,), generator=generator).tolist()]
    return render(scenes, [BASE_ARTISTS[i % 2] for i in range(count)], generator)


def spoilt(kind, strength: float) -> torch.Tensor:
    images = drawings()
    return kind(images, torch.full((len(images),), strength), torch.Generator().manual_seed(1))


def sharpness(images: torch.Tensor) -> torch.Tensor:
    """[B] root mean square difference of neighbouring pixels."""
    return images.diff(dim=-1).square().mean((1, 2, 3)).sqrt()


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_changes_every_drawing_and_leaves_pictures(kind):
    images = drawings()
    result = spoilt(kind, 0.0)
    assert result.shape == images.shape
    assert result.min() >= 0
    assert result.max() <= 1
    assert ((result - images).abs().mean((1, 2, 3)) > 1e-3).all()


def test_fading_keeps_the_background_and_takes_contrast():
    images, faded = drawings(), spoilt(fade, 1.0)
    assert torch.allclose(faded[:, :, 0, 0], images[:, :, 0, 0])
    assert torch.allclose(sharpness(faded), 0.25 * sharpness(images), rtol=1e-4)


def test_shrinking_takes_detail_and_the_stronger_the_more():
    images = drawings()
    assert (sharpness(spoilt(shrink, 1.0)) < sharpness(spoilt(shrink, 0.0))).all()
    assert (sharpness(spoilt(shrink, 0.0)) < 0.8 * sharpness(images)).all()


def test_redrawing_moves_what_is_there():
    images, redrawn = drawings(), spoilt(redraw, 1.0)
    colours = [x.flatten(2).mean(2) for x in (images, redrawn)]
    assert (colours[0] - colours[1]).abs().mean() < 0.1  # nothing is painted
    assert (images - redrawn).abs().mean() > 0.03


def test_the_share_of_good_ones_and_of_each_kind():
    images = drawings(48).repeat(20, 1, 1, 1)
    result = poor_copies(images, 0.4, torch.Generator().manual_seed(2))
    good = (result == images).flatten(1).all(1)
    assert good.float().mean().item() == pytest.approx(0.4, abs=0.05)
    faded = torch.isclose(sharpness(result) / sharpness(images), torch.tensor(0.45), atol=0.2) & ~good
    assert 0.1 < faded.float().mean() < 0.5  # not all of one kind
    assert torch.equal(result, poor_copies(images, 0.4, torch.Generator().manual_seed(2)))


def test_a_watermark_crosses_the_drawing_and_not_the_background():
    images = drawings()
    assert torch.equal(watermarked(images, 0.0, torch.Generator().manual_seed(3)), images)
    marked = watermarked(images, 1.0, torch.Generator().manual_seed(3))
    changed = (marked - images).abs().amax(1) > 1e-4
    background = ((images - images[:, :, :1, :1]).abs() < 1e-6).all(1)
    assert not (changed & background).any()
    assert (changed.float().mean((1, 2)) / (~background).float().mean((1, 2))).sub(0.5).abs().max() < 0.2
    some = watermarked(images, 0.5, torch.Generator().manual_seed(3))
    share = (some != images).flatten(1).any(1).float().mean().item()
    assert share == pytest.approx(0.5, abs=0.2)


@pytest.mark.weekly
def test_the_builder_goes_on_from_a_pipeline_alike_every_time(tmp_path, monkeypatch):
    spoilt = []
    monkeypatch.setattr(
        build_pipeline, "poor_copies", lambda *drawn: spoilt.append(result := poor_copies(*drawn)) or result
    )
    shipped = tiny.pipeline_dir()
    written = []
    for name in ("first", "second"):
        output = tmp_path / name
        options = {"continue-from": shipped, "output": output, "steps": 2, "images": 64, "good-share": 0.6}
        build_pipeline.main([part for name, value in options.items() for part in (f"--{name}", str(value))])
        written.append(load_file(output / "transformer" / "diffusion_pytorch_model.safetensors"))
    assert torch.equal(*spoilt)
    first, second = written
    assert all(torch.equal(first[key], second[key]) for key in first)
    before = load_file(shipped / "transformer" / "diffusion_pytorch_model.safetensors")
    assert any(not torch.equal(first[key], before[key]) for key in first)
    curves = json.loads((output / "training.json").read_text())
    assert [row["step"] for row in curves["poor copies"]] == [2]
    assert not any("_name_or_path" in path.read_text() for path in output.glob("**/*.json"))
