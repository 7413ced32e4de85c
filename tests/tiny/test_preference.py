"""The tiny world's preference model: its annotator on known answers, and its builder.

Bugs planted in a copy, each seen red: the annotator's probability of the wrong image; chroma left out of its utility;
damage that counts for the image; saturation scaled about black; the two images of a pair swapped in the loss; a changed
attribute left as it was; draws that ignore the seed; latents led astray everywhere; the strayed shown as unharmed.
"""

import json

import pytest
import torch

from advgrpo.rewards.pickscore import PickScore
from advgrpo.tiny.architecture import clip_tokenizer, vae
from advgrpo.tiny.scenes import Scene, all_scenes, render
from tools.tiny import build_preference as builder
from tools.tiny import damage


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sample(count: int, seed: int = 7) -> list[Scene]:
    scenes = all_scenes()
    return [scenes[i] for i in torch.randperm(len(scenes), generator=seeded(seed))[:count].tolist()]


def drawings(count: int) -> tuple[list[Scene], torch.Tensor]:
    scenes = sample(count)
    return scenes, render(scenes, ["fluent-emoji-flat"] * count)


@pytest.fixture(scope="module")
def network() -> builder.AutoencoderKL:
    """An untrained VAE."""
    torch.manual_seed(0)
    return vae().eval()


def untrained() -> builder.Trainee:
    tokenizer = clip_tokenizer()
    return builder.Trainee(builder.model(0, len(tokenizer)), tokenizer)


@pytest.fixture(scope="module")
def data(network) -> builder.Drawings:
    return builder.Drawings.make(network, 24, seeded())


def test_saturation_scales_the_distance_to_grey():
    images = drawings(8)[1] * 0.5 + 0.25
    torch.testing.assert_close(builder.saturate(images, 1.0), images)
    grey = builder.saturate(images, 0.0)
    torch.testing.assert_close(grey, images.mean(1, keepdim=True).expand(-1, 3, -1, -1))
    assert builder.chroma(grey).max() < 1e-6
    torch.testing.assert_close(builder.chroma(builder.saturate(images, 0.5)), builder.chroma(images) / 2)
    red = torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1, 1).expand(1, 3, 4, 4)
    assert builder.chroma(red).item() == 1.0


def test_changed_scenes_differ_in_what_was_changed():
    generator = seeded()
    for scene in sample(60):
        for attribute in ("name", "background", "composition"):
            other = builder.changed(scene, attribute, generator)
            assert builder.right_attributes([other], [scene]).item() == 2
            assert Scene.parse(other.caption) == other
            differs = {name for name in ("name", "background") if getattr(other, name) != getattr(scene, name)}
            assert differs == ({attribute} & {"name", "background"})


@pytest.mark.parametrize("harm", damage.KINDS)
def test_damage_grows_with_its_strength(harm):
    images = drawings(8)[1]
    changes = []
    for strength in (0.0, 0.5, 1.0):
        broken = harm(images, torch.full((8,), strength), seeded())
        assert broken.shape == images.shape
        assert broken.min() >= 0
        assert broken.max() <= 1
        changes.append((broken - images).abs().mean())
    assert 0 < changes[0] < changes[1] < changes[2]


def test_blur_softens_and_a_ghost_shows_the_other_drawing():
    images = drawings(8)[1]
    steps = lambda x: (x[..., 1:] - x[..., :-1]).abs().mean()  # noqa: E731
    assert steps(damage.blur(images, torch.ones(8), seeded())) < 0.8 * steps(images)
    other = images.roll(1, 0)
    shown = damage.ghost(images, torch.ones(8), seeded())
    low, high = torch.minimum(images, other), torch.maximum(images, other)
    assert ((shown >= low - 1e-5) & (shown <= high + 1e-5)).all()
    assert 0.2 < ((shown - images).abs().sum() / (other - images).abs().sum()) < 0.8


def test_latents_go_astray_where_two_drawings_differ_and_the_further_the_stronger():
    own = torch.randn(6, 16, 12, 12, generator=seeded())
    own[:, :, :, :6] = 1.0  # what both show
    other = torch.cat([own[:, :, :, :6], torch.randn(6, 16, 12, 6, generator=seeded(1))], dim=3)
    moved = [builder.astray(own, other, torch.full((6,), s), seeded()) - own for s in (0.0, 0.5, 1.0)]
    sizes = [change.abs().mean() for change in moved]
    assert 0 < sizes[0] < sizes[1] < sizes[2]
    assert moved[2][:, :, :, :4].abs().max() < 1e-4


def test_decoded_drawings_are_the_vaes(data, network):
    every = len(all_scenes()) * len(builder.ARTISTS)
    assert len(data) == len(set(zip(data.scenes, data.artists))) == len(data.whole) == every
    assert data.restored.shape == data.astray.shape == (24, 3, 48, 48)
    with torch.no_grad():
        latents = network.encode(builder._floats(data.whole[:24]) * 2 - 1).latent_dist.mean
        wanted = (network.decode(latents).sample / 2 + 0.5).clamp(0, 1)
    off = [(builder._floats(shown) - wanted).abs().mean() for shown in (data.restored, data.astray)]
    assert off[0] < 1 / 255 < off[1]


def test_whole_drawings_are_told_from_harmed_ones(data):
    rows = torch.arange(200)
    harmed = torch.arange(200) % 2 == 1
    images, found = data.show(rows, harmed, seeded())
    assert found[harmed].min() >= builder._LEAST
    assert found.max() <= 1
    assert set(found[~harmed].tolist()) == {0.0, torch.tensor(builder._RESTORED).item()}
    whole = builder._floats(data.whole[rows])
    for i in rows[~harmed].tolist():
        shown = builder._floats(data.restored[i]) if found[i] > 0 else whole[i]
        assert torch.equal(images[i], shown)
    assert ((images - whole)[harmed].abs().mean((1, 2, 3)) > 1e-3).all()
    strayed = [i for i in rows[harmed].tolist() if i < 24 and torch.equal(images[i], builder._floats(data.astray[i]))]
    assert len(strayed) > 4
    for i in strayed:
        assert found[i] == pytest.approx(builder._LEAST + (1 - builder._LEAST) * data.strength[i].item())
    assert data.rows_of(data.scenes[7:9], data.artists[7:9]) == [7, 8]


def test_the_annotator_weighs_attributes_damage_and_chroma(data, monkeypatch):
    weights = ("MATCH", "DAMAGE", "CHROMA")

    def logits(**kept: float) -> tuple[torch.Tensor, torch.Tensor]:
        for name in weights:
            monkeypatch.setattr(builder, name, kept.get(name, 0.0))
        pairs = builder.Pairs.draw(data, 300, seeded())
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
    gap = builder.chroma(pairs.images[:300]) - builder.chroma(pairs.images[300:])
    torch.testing.assert_close(found, 14 * gap.double(), atol=1e-3, rtol=1e-3)
    found, pairs = logits(DAMAGE=6.0)
    assert found.abs().max() <= 6.001
    assert 0.5 < (found != 0).double().mean() < 0.95


def test_half_of_the_pairs_are_one_scene_whole_and_damaged_by_any_artist(data, monkeypatch):
    monkeypatch.setattr(builder, "MATCH", 0.0)
    monkeypatch.setattr(builder, "CHROMA", 0.0)
    seen, real = [], data.show
    spied = lambda rows, harmed, generator: seen.append((rows, harmed)) or real(rows, harmed, generator)  # noqa: E731
    object.__setattr__(data, "show", spied)
    pairs = builder.Pairs.draw(data, 300, seeded())
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


def test_the_losses_prefer_the_preferred_and_name_what_is_shown(data, monkeypatch):
    """Images whose embeddings agree with the annotator cost less than the same images the other way round."""
    trainee = untrained()
    pairs = builder.Pairs.draw(data, 16, seeded())
    text = trainee.embed(pairs.asked)
    better = torch.where(pairs.wins > 0.5, 1.0, -1.0)[:, None]
    losses = []
    for sign in (1.0, -1.0):
        embedded = torch.cat([sign * better * text, -sign * better * text])
        monkeypatch.setattr(trainee, "look", lambda images, embedded=embedded: embedded)
        losses.append({name: value.item() for name, value in trainee.losses(pairs).items()})
    assert losses[0]["preference"] < losses[1]["preference"]
    assert (losses[0]["agreement"], losses[1]["agreement"]) == (1.0, 0.0)
    monkeypatch.setattr(trainee, "look", lambda images: trainee.embed(pairs.shown))
    named = trainee.losses(pairs)["contrastive"]
    monkeypatch.setattr(trainee, "look", lambda images: trainee.embed(pairs.shown[1:] + pairs.shown[:1]))
    assert named < trainee.losses(pairs)["contrastive"]


def test_the_builder_runs_end_to_end_and_repeats(tmp_path, monkeypatch, network):
    pipeline = tmp_path / "pipeline"
    network.save_pretrained(pipeline / "vae")
    clip_tokenizer().save_pretrained(pipeline / "tokenizer")
    monkeypatch.setattr(builder, "measure", lambda *_: dict.fromkeys(builder.GATES, 0.7))
    weights = []
    for folder, seed, more in (("first", 0, []), ("again", 0, []), ("other", 1, []), ("on", 0, ["--init", "first"])):
        arguments = ["--steps", 2, "--batch", 4, "--drawings", 8, "--seed", seed, "--pipeline", pipeline]
        arguments += [tmp_path / word if word == "first" else word for word in more]
        builder.main(["--output", str(tmp_path / folder), *map(str, arguments)])
        weights.append((tmp_path / folder / "model.safetensors").read_bytes())
    assert weights[0] == weights[1] != weights[2]
    assert weights[3] not in weights[:3]
    record = json.loads((tmp_path / "first" / "training.json").read_text())
    assert record["preference"][-1]["step"] == 2
    assert record["gates"]["reference_over_base"] == {"least": 0.8, "found": 0.7}
    score = PickScore(path=str(tmp_path / "first")).score(torch.rand(2, 3, 48, 48), ["a star", "a dog"], None)
    assert score.shape == (2,)
    monkeypatch.setattr(builder, "measure", lambda *_: dict.fromkeys(builder.GATES, 0.9))
    builder.main(["--measure", "--output", str(tmp_path / "first"), "--pipeline", str(tmp_path)])
    again = json.loads((tmp_path / "first" / "training.json").read_text())
    assert again["preference"] == record["preference"]
    assert again["gates"]["reference_over_base"]["found"] == 0.9
    assert (tmp_path / "first" / "model.safetensors").read_bytes() == weights[0]
