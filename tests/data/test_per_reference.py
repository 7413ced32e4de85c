"""What is made of references is made once per content, whoever asks.

Bugs planted in a copy, each seen red: the size left out of the key; the prompt always in it, or never; the bound
ignored; images of different sizes in one batch; all references of a prompt instead of the first.
"""

import hashlib
from pathlib import Path

import pytest
import torch

from advgrpo.data.per_reference import PerReference, decoded
from advgrpo.runtime.cache import LastUsed, TensorCache

FILES = {"a": ["1", "2", "3"], "same as a": ["1", "2", "3"], "b": ["4"], "mixed": ["1", "wide"]}


class Images:
    """A reference set whose images are numbers; "wide" is larger than the others."""

    def files(self, prompt: str) -> list[Path]:
        return [Path(name) for name in FILES[prompt]]

    def content_key(self, file: Path) -> str:
        return f"content of {file.name}"

    def load_images(self, files: list[Path], size: tuple[int, int] | None = None) -> torch.Tensor:
        own = [(2, 4) if file.name == "wide" else (2, 2) for file in files]
        values = [9.0 if file.name == "wide" else float(file.name) for file in files]
        return torch.stack([torch.full((3, *(size or each)), value) for each, value in zip(own, values)])


class Sums:
    """Computes and counts: [sum of each image's first pixel, number of batches, length of the prompt]."""

    def __init__(self):
        self.calls = 0

    def __call__(self, batches: list[torch.Tensor], prompt: str) -> torch.Tensor:
        self.calls += 1
        return torch.tensor([sum(float(batch[:, 0, 0, 0].sum()) for batch in batches), len(batches), len(prompt)])


REFERENCES = Images()


def test_prompts_with_the_same_images_share_what_does_not_depend_on_them():
    compute = Sums()
    values = PerReference(compute, LastUsed(8))
    first = values.of_prompt(REFERENCES, "a")
    assert first.tolist() == [6, 1, 1]
    assert values.of_prompt(REFERENCES, "same as a") is first
    assert values.of_prompt(REFERENCES, "b").tolist() == [4, 1, 1]
    assert compute.calls == 2
    of_text = PerReference(compute, LastUsed(8), of_text=True)
    assert [of_text.of_prompt(REFERENCES, prompt)[2] for prompt in ("a", "same as a", "a")] == [1, 9, 1]
    assert compute.calls == 4


def test_sizes_are_kept_apart_and_images_of_one_size_are_one_batch():
    values = PerReference(Sums(), LastUsed(8))
    assert values.of_prompt(REFERENCES, "mixed").tolist() == [10, 2, 5]
    assert values.of_prompt(REFERENCES, "mixed", (8, 8)).tolist() == [10, 1, 5]
    assert values.of_prompt(REFERENCES, "mixed").tolist() == [10, 2, 5]
    (batch,) = decoded(REFERENCES, REFERENCES.files("a"), None)
    assert batch.shape == (3, 3, 2, 2)


def test_the_first_references_are_looked_at_and_single_files_can_be():
    assert PerReference(Sums(), LastUsed(8), first=2).of_prompt(REFERENCES, "a")[0] == 3
    one = PerReference(Sums(), LastUsed(8))
    assert one.of_file(REFERENCES, Path("3")).tolist() == [3, 1, 0]


def test_the_bound_drops_what_was_used_longest_ago():
    compute = Sums()
    values = PerReference(compute, LastUsed(2))
    for prompt in ("a", "b", "a", "mixed", "a", "b"):  # b makes way for mixed
        values.of_prompt(REFERENCES, prompt)
    assert compute.calls == 4
    assert len(values.store) == 2


def test_nothing_is_kept_of_an_error():
    def fails(batches, prompt):
        raise RuntimeError("the model failed")

    values = PerReference(fails, LastUsed(2))
    with pytest.raises(RuntimeError):
        values.of_prompt(REFERENCES, "a")
    values.compute = Sums()
    assert values.of_prompt(REFERENCES, "a")[0] == 6


def test_on_disk_a_value_outlives_its_maker_under_a_key_that_does_not_change(tmp_path):
    """Features in people's caches are found again: the key is part of the format."""

    def named(batches, prompt):
        return {"x": torch.cat(batches)}

    def values(owner):
        return PerReference(named, TensorCache(tmp_path, in_memory=2), owner=owner, of_text=True)

    made = values("weights").of_prompt(REFERENCES, "b")
    key = hashlib.sha256(b"weights\0content of 4\0prompt:b").hexdigest()
    assert values("weights").store.path(key).exists()
    assert torch.equal(values("weights").load(REFERENCES, "b")["x"], made["x"])
    assert values("others").load(REFERENCES, "b") is None
    assert torch.equal(values("others").make(REFERENCES, "b")["x"], made["x"])
    assert values("others").load(REFERENCES, "b") is None  # `make` stores nothing
