"""References ahead of time and one per image: the same bits as one at a time, and errors in their own words.

Bugs planted in a copy, each seen red: the first prompt's start used for all; a draw rounded instead of floored; prompts
of one set of references gathered from twice; the prompt left out of the key of a text-dependent adversary; prefetch
that loads when asked instead of ahead; an error of the thread dropped.
"""

import threading
from pathlib import Path

import pytest
import torch

from advgrpo.adversary.augmentation import Augmentation
from advgrpo.adversary.reference_features import ReferenceFeatures, reference_draws
from advgrpo.config import AdversarySection
from advgrpo.types import Features


class Images:
    """A reference set whose images are numbers: `files` of a prompt name what `load_images` returns."""

    def __init__(self, files: dict[str, list[Path]]):
        self._files = files

    def files(self, prompt: str) -> list[Path]:
        return self._files[prompt]

    def content_key(self, file: Path) -> str:
        return str(file)

    def load_images(self, files: list[Path]) -> torch.Tensor:
        return torch.stack([torch.full((3, 2, 2), float(file.name)) for file in files])


class Adversary:
    config, seed, device, cache_key = AdversarySection(), 0, torch.device("cpu"), "key"

    def __init__(self, text_dependent: bool = False):
        self.text_dependent = text_dependent
        self.calls = 0

    def features(self, images: torch.Tensor, prompts: list[str]) -> Features:
        self.calls += 1
        text = torch.tensor([float(len(p)) if self.text_dependent else 0.0 for p in prompts])
        return Features({"mean": images.mean((1, 2, 3)), "grid": images[:, 0] + text[:, None, None]})

    def cached_features(self, features: Features) -> Features:
        return features


FILES = {
    "one": [Path("1")],
    "three": [Path(str(n)) for n in (10, 11, 12)],
    "same": [Path(str(n)) for n in (10, 11, 12)],
    "eight": [Path(str(n)) for n in range(20, 28)],
}


@pytest.fixture
def make(tmp_path):
    return lambda adversary: ReferenceFeatures(Images(FILES), adversary, tmp_path)


def one_at_a_time(references: ReferenceFeatures, prompts: list[str], draws: torch.Tensor) -> Features:
    """As the definition reads."""
    rows = []
    for prompt, draw in zip(prompts, draws):
        candidates = references.prompt(prompt)
        rows.append(candidates.rows(torch.tensor([int(draw * len(candidates))])))
    return Features.cat(rows)


@pytest.mark.parametrize("prefetched", [False, True])
def test_picking_for_all_images_at_once_equals_one_at_a_time(make, prefetched):
    prompts = ["eight", "three", "one", "same", "eight", "three", "eight", "one"] * 30
    draws = torch.rand(len(prompts), generator=torch.Generator().manual_seed(0))
    draws[:3] = torch.tensor([1 - 2**-24, 0.0, 1 - 2**-24])
    expected = one_at_a_time(make(Adversary()), prompts, draws)
    references = make(Adversary())
    if prefetched:
        references.prefetch(prompts)
    got = references.pick(prompts, draws)
    assert got.tensors.keys() == {"mean", "grid"}
    for name, tensor in expected.tensors.items():
        assert torch.equal(got[name], tensor)


def test_references_shared_by_many_prompts_are_gathered_from_where_they_lie(make, monkeypatch):
    """A style set of hundreds of images serves every prompt: copying it per prompt would fill the GPU."""
    references = make(Adversary())
    joined = []
    monkeypatch.setattr(Features, "cat", lambda parts: joined.append(parts))
    monkeypatch.setattr(references, "_compute", lambda prompt: {"x": torch.arange(3.0)})
    got = references.pick(["three", "same", "three"], torch.tensor([0.0, 0.5, 0.9]))
    assert got["x"].tolist() == [0.0, 1.0, 2.0]
    assert not joined


def test_features_that_depend_on_the_text_are_kept_per_prompt(make):
    for text_dependent in (False, True):
        references = make(Adversary(text_dependent))
        three, same = references._stored("three"), references._stored("same")
        assert (three is same) == (not text_dependent)
        three, same = references.prompt("three"), references.prompt("same")
    assert torch.equal(same["grid"], three["grid"] + (len("same") - len("three")))


def test_what_bfloat16_holds_exactly_is_kept_in_it_and_comes_back_as_it_was(make):
    """And images of a prompt where it does not are picked beside those of one where it does."""
    adversary, own = Adversary(), Adversary.features

    def features(images, prompts):
        found = own(adversary, images, prompts)
        tail = {"half": found["mean"].bfloat16(), "never": found["mean"] + 2**-12}
        return Features({**found.tensors, **tail})

    adversary.features = features
    references = make(adversary)
    stored = {name: tensor.dtype for name, tensor in references._stored("eight").items()}
    half, full = torch.bfloat16, torch.float32
    assert stored == {"mean:float32": half, "grid:float32": half, "half": half, "never": full}
    for again in (references, make(adversary)):  # from memory, and from the disk
        found, fresh = again.prompt("eight"), features(references.references.load_images(FILES["eight"]), [""] * 8)
        assert {name: t.dtype for name, t in found.tensors.items()} == {n: t.dtype for n, t in fresh.tensors.items()}
        assert all(torch.equal(found[name], tensor) for name, tensor in fresh.tensors.items())
    FILES["odd"] = [Path("300.5"), Path("301.25")]  # more digits than bfloat16 has
    try:
        picked = references.pick(["eight", "odd"], torch.tensor([0.0, 0.9]))
    finally:
        del FILES["odd"]
    assert picked["mean"].tolist() == [20.0, 301.25]


def test_prefetch_loads_in_the_background_and_computes_nothing(make, monkeypatch):
    filled = make(Adversary())
    for prompt in ("three", "eight"):
        filled.prompt(prompt)
    adversary = Adversary()
    references, loaded, done = make(adversary), [], threading.Event()
    real = references.tensors.load

    def load(key):
        loaded.append(threading.current_thread() is threading.main_thread())
        if len(loaded) == 3:
            done.set()
        return real(key)

    monkeypatch.setattr(references.tensors, "load", load)
    references.prefetch(["three", "eight", "one", "three"])
    assert done.wait(10)  # before anyone asked
    assert adversary.calls == 0
    assert torch.equal(references.prompt("eight")["mean"], filled.prompt("eight")["mean"])
    assert adversary.calls == 1  # the first entry of another process is proven
    references.prompt("three")
    assert loaded == [False] * 3
    assert adversary.calls == 1
    references.prompt("one")  # was on nobody's disk
    assert adversary.calls == 2


def test_an_error_in_the_thread_surfaces_once_with_its_own_message(make, monkeypatch):
    references = make(Adversary())
    references.prompt("one")
    real = references.tensors.load

    def fails(key):
        if threading.current_thread() is threading.main_thread():
            return real(key)
        raise OSError(5, "Input/output error", "cache/ab.safetensors")

    monkeypatch.setattr(references.tensors, "load", fails)
    references.prefetch(["one"])
    with pytest.raises(OSError, match=r"Input/output error: 'cache/ab\.safetensors'"):
        references.pick(["one"], torch.zeros(1))
    assert references.pick(["one"], torch.zeros(1))["mean"].tolist() == [1.0]


SPOTS = {"spots": [Path(str(n)) for n in (3, 4, 5)]}


class Spots(Images):
    """Images of 16 x 24 whose pixels are numbered, each file's on a level of its own."""

    def load_images(self, files: list[Path]) -> torch.Tensor:
        pixels = torch.arange(16 * 24.0).view(1, 16, 24).expand(3, -1, -1)
        return torch.stack([pixels + 1000 * float(file.name) for file in files])


def test_of_every_reference_there_are_four_crops_next_to_each_other_and_one_is_drawn(tmp_path):
    judge = Adversary()
    judge.config = AdversarySection(augment="crop_flip")
    made = ReferenceFeatures(Spots(SPOTS), judge, tmp_path)
    grids = made.prompt("spots")["grid"]
    assert grids.shape == (12, 14, 21)
    assert (grids[:, 0, 0] // 1000).tolist() == [3.0] * 4 + [4.0] * 4 + [5.0] * 4
    crops = {tuple((grid % 1000).flatten().tolist()) for grid in grids}
    assert len(crops) > 6, "crops differ, of one reference and of two"
    again = ReferenceFeatures(Spots(SPOTS), judge, tmp_path).prompt("spots")
    assert torch.equal(again["grid"], grids)
    whole = ReferenceFeatures(Spots(SPOTS), Adversary(), tmp_path)
    assert whole.prompt("spots")["grid"].shape == (3, 16, 24), "the cache tells them apart"
    places, ids = torch.arange(64) % 5, torch.arange(64)
    settings = {"total": 64, "seed": 1, "views": made.augmentation.views}
    for choice in ("in_turn", "random"):
        draws = reference_draws(choice, Spots(SPOTS), ["spots"] * 64, ids, places, iteration=2, **settings)
        picked = made.pick(["spots"] * 64, draws)["grid"]
        owners = (picked[:, 0, 0] // 1000).tolist()
        if choice == "in_turn":
            assert owners == [3.0 + place % 3 for place in places.tolist()]
        assert len({tuple(grid.flatten().tolist()) for grid in picked}) > 8, "any of its crops"


def test_a_crop_is_a_window_of_seven_eighths_that_may_be_mirrored():
    """Pixels carry their numbers, so that where they come from can be read."""
    images = torch.arange(32 * 40.0).view(1, 1, 32, 40).expand(200, 3, -1, -1)
    ids = torch.arange(200) * 7
    crops = Augmentation("crop_flip", 5).generated(images, ids, 3)
    assert crops.shape == (200, 3, 28, 35)
    assert torch.equal(crops[:, 0], crops[:, 2])
    rows, columns = crops[:, 0] // 40, crops[:, 0] % 40
    assert torch.equal(rows - rows[:, :1], torch.arange(28.0)[:, None].expand(200, 28, 35))
    mirrored = columns[:, 0, 0] > columns[:, 0, 1]
    straight = torch.where(mirrored[:, None, None], columns.flip(2), columns)
    assert torch.equal(straight - straight[:, :, :1], torch.arange(35.0).expand(200, 28, 35))
    assert 70 < mirrored.sum() < 130
    assert set(rows[:, 0, 0].tolist()) == set(range(5)), "every offset"
    assert set(straight[:, 0, 0].tolist()) == set(range(6))
    assert not Augmentation("crop", 5).generated(images, ids, 3)[:, 0].diff(dim=2).lt(0).any()
    one = Augmentation("crop_flip", 5).generated(images[:2], ids[8:10], 3)
    assert torch.equal(one, crops[8:10]), "whatever the batch"
    for other in (
        Augmentation("crop_flip", 5).generated(images, ids, 4),
        Augmentation("crop_flip", 6).generated(images, ids, 3),
    ):
        assert not torch.equal(other, crops)
    assert Augmentation("none", 5).generated(images, ids, 3) is images
