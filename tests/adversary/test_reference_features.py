"""References ahead of time and one per image: the same bits as one at a time, and errors in their own words.

Bugs planted in a copy, each seen red: the first prompt's start used for all; a draw rounded instead of floored; prompts
of one set of references gathered from twice; the prompt left out of the key of a text-dependent adversary; prefetch
that loads when asked instead of ahead; an error of the thread dropped.
"""

import threading
from pathlib import Path

import pytest
import torch

from advgrpo.adversary.reference_features import ReferenceFeatures
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
        three, same = references.prompt("three"), references.prompt("same")
        assert (three.tensors is same.tensors) == (not text_dependent)
    assert torch.equal(same["grid"], three["grid"] + (len("same") - len("three")))


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
