"""Encoding prompts: in parts that are kept at once, with progress.

Bugs planted in a copy, each seen red: all parts collected before the first is stored; the encoders loaded for every
part; nothing told; what is absent asked of `missing`'s memory instead of the folder; a file that a file system denies
once encoded again.
"""

import gc
import io
import os
import weakref

import diffusers
import pytest
import torch
from rich.console import Console

from advgrpo.data.sources import Sources
from advgrpo.evaluate import main as evaluate
from advgrpo.policy import text_cache
from advgrpo.policy.text_cache import TextCache
from advgrpo.reporting.display import Display
from advgrpo.runtime.cache import TensorCache
from advgrpo.runtime.distributed import Distributed
from advgrpo.training.build import build_policy
from advgrpo.training.fast import FastPaths
from advgrpo.types import Conditioning

PROMPTS = [f"prompt {number}" for number in range(7)]
CPU = torch.device("cpu")


class Encoder:
    """Yields embeddings of two prompts at a time; the numbers say whose they are. Fails before part `fails`."""

    def __init__(self, fails: int | None = None):
        self.fails = fails
        self.given: list[str] = []
        self.parts: list[weakref.ref] = []
        self.most = 0  # parts that were alive at once

    def __call__(self, prompts):
        for start in range(0, len(prompts), 2):
            if len(self.parts) == self.fails:
                raise KeyboardInterrupt
            part = prompts[start : start + 2]
            self.given += part
            numbers = torch.tensor([float(prompt.split()[1]) for prompt in part])
            made = Conditioning(numbers.view(-1, 1, 1).expand(-1, 3, 4).clone(), numbers.view(-1, 1).clone())
            self.parts.append(weakref.ref(made.text))
            gc.collect()
            self.most = max(self.most, sum(each() is not None for each in self.parts))
            yield made
            del made


def test_every_part_is_on_disk_before_the_next_is_made(tmp_path):
    told = []
    encoder = Encoder()
    TextCache(tmp_path, "key", encoder).fill(PROMPTS, told.append)
    assert told == [2, 4, 6, 7]
    assert encoder.given == PROMPTS
    assert encoder.most <= 2  # the one being stored, and the next
    again = TextCache(tmp_path, "key", lambda _: pytest.fail("encoded twice"))
    assert again.load(PROMPTS[::-1]).pooled.flatten().tolist() == [6, 5, 4, 3, 2, 1, 0]


def test_of_an_encoding_that_is_killed_the_finished_parts_are_kept(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        TextCache(tmp_path, "key", Encoder(fails=2)).fill(PROMPTS)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 4
    encoder = Encoder()
    TextCache(tmp_path, "key", encoder).fill(PROMPTS)
    assert encoder.given == PROMPTS[4:]


def test_what_stays_in_memory_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(text_cache, "_IN_MEMORY", 3)
    cache = TextCache(tmp_path, "key", Encoder())
    cache.fill(PROMPTS)
    assert len(cache.tensors._memory) == 3


def test_what_is_absent_is_asked_of_the_folder(tmp_path):
    """Not of what this process holds in memory or has seen: another machine may have no such file."""
    cache = TextCache(tmp_path, "key", Encoder())
    assert cache.absent(PROMPTS) == PROMPTS
    cache.fill(PROMPTS)
    assert cache.absent(PROMPTS) == []
    cache.tensors.path(cache.key(PROMPTS[3])).unlink()
    assert cache.missing(PROMPTS) == []
    assert cache.absent(PROMPTS) == [PROMPTS[3]]


def test_a_file_that_a_network_file_system_denies_at_first_is_not_encoded_again(tmp_path, monkeypatch):
    """It remembers for a while that there was none; listing the folder asks the server."""
    TextCache(tmp_path, "key", Encoder()).fill(PROMPTS)
    listed, real, load, there = [], os.listdir, TensorCache.load, TensorCache.__contains__
    monkeypatch.setattr(os, "listdir", lambda folder: listed.append(folder) or real(folder))
    monkeypatch.setattr(TensorCache, "load", lambda self, key: load(self, key) if listed else None)
    monkeypatch.setattr(TensorCache, "__contains__", lambda self, key: bool(listed) and there(self, key))
    again = TextCache(tmp_path, "key", lambda _: pytest.fail("encoded twice"))
    assert again.load(PROMPTS[3:4]).pooled.item() == 3


@pytest.fixture
def encoding(unit_config, monkeypatch):
    """Function that encodes; (policy, lines said, how often the pipeline was loaded)."""
    monkeypatch.setattr("advgrpo.reporting.display._PLAIN_EVERY", 0.0)
    monkeypatch.setattr("advgrpo.policy.diffusers_policy._TEXT_BATCH", 2)
    loaded, real = [], diffusers.DiffusionPipeline.from_pretrained
    monkeypatch.setattr(
        diffusers.DiffusionPipeline, "from_pretrained", lambda *a, **k: loaded.append(a) or real(*a, **k)
    )

    def encode():
        loaded.clear()
        said = io.StringIO()
        fast = FastPaths.choose(unit_config, CPU)
        display = Display(Console(file=said, width=200))
        policy = build_policy(unit_config, Sources.read(unit_config), Distributed.start("cpu"), fast, display)
        return policy, said.getvalue().splitlines(), len(loaded)

    return encode


def test_progress_is_shown_and_the_encoders_are_loaded_once(encoding, unit_config):
    _, said, loaded = encoding()
    assert said[0] == f"encoding 10 prompts into {unit_config.data.cache_dir}"  # 6, 3 held out, and the empty one
    counts = [f"encoding prompts {done}/10" for done in (2, 4, 6, 8, 10)]
    assert [line.split("  ")[0] for line in said[1:]] == counts
    assert loaded == 1
    assert encoding()[1:] == ([], 0)


def test_evaluate_shows_progress_of_encoding_scoring_and_samples(unit_config, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("advgrpo.reporting.display._PLAIN_EVERY", 0.0)
    flags = ["--model", unit_config.model.path, "--prompts", unit_config.data.held_out_prompts, "--metrics", "rule"]
    flags += ["--cache-dir", str(tmp_path / "cache"), "--output", str(tmp_path / "out"), "--resolution", "32"]
    sizes = ["--num-steps", "1", "--images-per-prompt", "1", "--batch-size", "2", "--grid-prompts", "2"]
    assert evaluate([*flags, *sizes, "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    for line in ("encoding prompts 4/4", "drawing and scoring 2/3", "drawing samples of the base model 2/2"):
        assert line in said
