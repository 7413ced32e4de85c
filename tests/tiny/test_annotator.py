"""The simulated annotator of the tiny world's preference model, on known answers.

Bugs planted in a copy, each seen red: the annotator's probability of the wrong image; chroma left out of his utility;
damage that counts for the image; saturation scaled about black; a changed attribute left as it was; latents led astray
everywhere; a watermark that costs nothing.
"""

import pytest
import torch

from advgrpo.tiny.architecture import TINY, vae
from advgrpo.tiny.scenes import Scene, all_scenes, render
from tools.tiny import annotator, damage
from tools.tiny.damage import chroma, saturate


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sample(count: int, seed: int = 7) -> list[Scene]:
    scenes = all_scenes()
    return [scenes[i] for i in torch.randperm(len(scenes), generator=seeded(seed))[:count].tolist()]


def drawings(count: int) -> torch.Tensor:
    return render(sample(count), ["fluent-emoji-flat"] * count)


@pytest.fixture(scope="module")
def network() -> annotator.AutoencoderKL:
    """An untrained VAE."""
    torch.manual_seed(0)
    return vae(TINY).eval()


@pytest.fixture(scope="module")
def data(network) -> annotator.Drawings:
    return annotator.Drawings.make(network, 48, seeded())


def test_saturation_scales_the_distance_to_grey():
    images = drawings(8) * 0.5 + 0.25
    torch.testing.assert_close(saturate(images, 1.0), images)
    grey = saturate(images, 0.0)
    torch.testing.assert_close(grey, images.mean(1, keepdim=True).expand(-1, 3, -1, -1))
    assert chroma(grey).max() < 1e-6
    torch.testing.assert_close(chroma(saturate(images, 0.5)), chroma(images) / 2)
    red = torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1, 1).expand(1, 3, 4, 4)
    assert chroma(red).item() == 1.0


def test_changed_scenes_differ_in_what_was_changed():
    generator = seeded()
    for scene in sample(60):
        for attribute in annotator.ATTRIBUTES:
            other = annotator.changed(scene, attribute, generator)
            assert annotator.right_attributes([other], [scene]).item() == 2
            assert Scene.parse(other.caption) == other
            differs = {name for name in ("name", "background") if getattr(other, name) != getattr(scene, name)}
            assert differs == ({attribute} & {"name", "background"})


@pytest.mark.parametrize("harm", damage.KINDS)
def test_damage_grows_with_its_strength(harm):
    images = drawings(8)
    changes = []
    for strength in (0.0, 0.5, 1.0):
        broken = harm(images, torch.full((8,), strength), seeded())
        assert broken.shape == images.shape
        assert broken.min() >= 0
        assert broken.max() <= 1
        changes.append((broken - images).abs().mean())
    assert 0 < changes[0] < changes[1] < changes[2]


def test_blur_softens_and_a_ghost_shows_the_other_drawing():
    images = drawings(8)
    steps = lambda x: (x[..., 1:] - x[..., :-1]).abs().mean()  # noqa: E731
    assert steps(damage.blur(images, torch.ones(8), seeded())) < 0.8 * steps(images)
    other = images.roll(1, 0)
    shown = damage.ghost(images, torch.ones(8), seeded())
    low, high = torch.minimum(images, other), torch.maximum(images, other)
    assert ((shown >= low - 1e-5) & (shown <= high + 1e-5)).all()
    assert 0.2 < ((shown - images).abs().sum() / (other - images).abs().sum()) < 0.8


def test_spoilt_drawings_cost_their_harm_and_their_watermark(monkeypatch):
    images = drawings(240)
    kept = images.clone()
    spoilt, cost = annotator.spoil(images, seeded())
    assert torch.equal(images, kept)
    assert ((spoilt - images).abs().amax((1, 2, 3)) > 0).all()
    barred = torch.isclose(cost, torch.tensor(annotator.WATERMARK)) & torch.tensor(
        [torch.equal(own, bars) for own, bars in zip(spoilt, annotator.poor_copies.watermarked(images, 1.0, seeded()))]
    )
    assert 0.2 < barred.float().mean() < 0.45
    assert cost.min() >= annotator.LEAST
    assert 1 < cost.max() <= 1 + annotator.WATERMARK
    monkeypatch.setattr(annotator, "WATERMARK", 0.0)
    cheaper = annotator.spoil(images, seeded())[1]
    less = cost - cheaper
    assert (torch.isclose(less, torch.tensor(0.5)) | (less == 0)).all()
    assert 0.55 < (less > 0).float().mean() < 0.8
    assert torch.equal(cheaper == 0, barred)


def test_latents_go_astray_where_two_drawings_differ_and_the_further_the_stronger():
    own = torch.randn(6, 16, 12, 12, generator=seeded())
    own[:, :, :, :6] = 1.0  # what both show
    other = torch.cat([own[:, :, :, :6], torch.randn(6, 16, 12, 6, generator=seeded(1))], dim=3)
    moved = [annotator.astray(own, other, torch.full((6,), s), seeded()) - own for s in (0.0, 0.5, 1.0)]
    sizes = [change.abs().mean() for change in moved]
    assert 0 < sizes[0] < sizes[1] < sizes[2]
    assert moved[2][:, :, :, :4].abs().max() < 1e-4


def test_decoded_drawings_are_the_vaes(data, network):
    every = len(all_scenes()) * len(annotator.ARTISTS)
    assert len(data) == len(set(zip(data.scenes, data.artists))) == len(data.whole) == every
    assert data.restored.shape == data.spoilt.shape == (48, 3, 48, 48)
    assert data.rows_of(data.scenes[7:9], data.artists[7:9]) == [7, 8]
    with torch.no_grad():
        latents = network.encode(annotator.to_floats(data.whole[:48]) * 2 - 1).latent_dist.mean
        wanted = (network.decode(latents).sample / 2 + 0.5).clamp(0, 1)
    off = [(annotator.to_floats(shown) - wanted).abs().mean() for shown in (data.restored, data.spoilt)]
    assert off[0] < 1 / 255 < off[1]


@pytest.mark.weekly
def test_the_vae_decodes_spoilt_drawings_and_latents_that_went_astray(network, monkeypatch):
    """A third of each alone costs that alone; led nowhere, the third that is not spoilt comes back whole."""
    drawn = [(scene, "noto") for scene in sample(90)]
    images = render([scene for scene, _ in drawn], ["noto"] * 90)
    costs = []
    for harm, led in ((8.0, 0.0), (0.0, 8.0)):
        monkeypatch.setattr(annotator, "spoil", lambda x, g, harm=harm: (x.flip(3), torch.full((len(x),), harm)))
        monkeypatch.setattr(annotator, "LEAST", led)
        with torch.no_grad():
            costs.append(annotator._spoilt_by_vae(network, images, drawn, seeded())[1])
    spoilt, strayed = costs[0] >= 8, costs[1] > 0
    assert (spoilt | strayed).all()
    for share in (spoilt & ~strayed, strayed & ~spoilt, spoilt & strayed):
        assert 0.15 < share.float().mean() < 0.5
    monkeypatch.setattr(annotator, "astray", lambda own, other, strength, generator: own)
    with torch.no_grad():
        made, _ = annotator._spoilt_by_vae(network, images, drawn, seeded())
        whole, mirrored = (
            annotator._decoded(network, annotator._encoded(network, x)) for x in (images, images.flip(3))
        )
    torch.testing.assert_close(made, torch.where(spoilt.view(-1, 1, 1, 1), mirrored, whole))


def test_whole_drawings_are_told_from_harmed_ones(data):
    rows = torch.arange(200)
    harmed = torch.arange(200) % 2 == 1
    images, found = data.show(rows, harmed, seeded())
    assert found[harmed].min() >= annotator.LEAST
    assert set(found[~harmed].tolist()) == {0.0, torch.tensor(annotator.RESTORED).item()}
    whole = annotator.to_floats(data.whole[rows])
    for i in rows[~harmed].tolist():
        shown = annotator.to_floats(data.restored[i]) if found[i] > 0 else whole[i]
        assert torch.equal(images[i], shown)
    assert ((images - whole)[harmed].abs().mean((1, 2, 3)) > 1e-4).all()
    by_vae = [
        i for i in rows[harmed].tolist() if i < 48 and torch.equal(images[i], annotator.to_floats(data.spoilt[i]))
    ]
    assert len(by_vae) > 10
    assert torch.equal(found[by_vae], data.damage[by_vae])


def test_the_annotator_weighs_attributes_damage_and_chroma(data, monkeypatch):
    weights = ("MATCH", "DAMAGE", "CHROMA")

    def logits(**kept: float) -> tuple[torch.Tensor, annotator.Pairs]:
        for name in weights:
            monkeypatch.setattr(annotator, name, kept.get(name, 0.0))
        pairs = annotator.Pairs.draw(data, 300, seeded())
        assert pairs.images.shape == (600, 3, 48, 48)
        return torch.logit(pairs.wins.double()), pairs

    assert (logits()[0] == 0).all()
    found, pairs = logits(MATCH=3.0)
    right = [
        [asked == shown for asked, shown in zip(pairs.asked, half)] for half in (pairs.shown[:300], pairs.shown[300:])
    ]
    difference = torch.tensor(right[0]).double() - torch.tensor(right[1]).double()
    torch.testing.assert_close(found, 3 * difference, atol=1e-4, rtol=0)
    assert 0.06 < (difference > 0).double().mean() < 0.25
    found, pairs = logits(CHROMA=14.0)
    gap = chroma(pairs.images[:300]) - chroma(pairs.images[300:])
    torch.testing.assert_close(found, 14 * gap.double(), atol=1e-3, rtol=1e-3)
    found, pairs = logits(DAMAGE=2.0)
    assert found.abs().max() <= 2 * (2 + annotator.WATERMARK) + 1e-3
    assert 0.5 < (found != 0).double().mean() < 0.95


def test_half_of_the_pairs_are_one_scene_whole_and_damaged_by_any_artist(data, monkeypatch):
    monkeypatch.setattr(annotator, "MATCH", 0.0)
    monkeypatch.setattr(annotator, "CHROMA", 0.0)
    seen, real = [], data.show
    spied = lambda rows, harmed, generator: seen.append((rows, harmed)) or real(rows, harmed, generator)  # noqa: E731
    object.__setattr__(data, "show", spied)
    pairs = annotator.Pairs.draw(data, 300, seeded())
    object.__delattr__(data, "show")
    (first, first_harmed), (second, second_harmed) = seen
    differ = first_harmed != second_harmed
    assert 0.65 < differ.float().mean() < 0.85
    assert ((pairs.wins > 0.5) == second_harmed)[differ].all()
    assert 0.35 < first_harmed[differ].float().mean() < 0.65
    same_scene, same_artist = (
        torch.tensor([every[a] == every[b] for a, b in zip(first.tolist(), second.tolist())])
        for every in (data.scenes, data.artists)
    )
    assert differ[same_scene].float().mean() > 0.8
    assert 0.55 < same_scene.float().mean() < 0.75
    assert 0.55 < same_artist.float().mean() < 0.8
