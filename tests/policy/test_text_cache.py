"""Encoding prompts: in parts that are kept at once, with progress, by all processes into one folder.

Bugs planted in a copy, each seen red: all parts collected before the first is stored; the encoders loaded for every
part; nothing told; the check of the others' prompts left out, or asked of `missing`'s memory instead of the folder.
"""

import gc
import io
import weakref
from pathlib import Path

import diffusers
import pytest
import torch
from rich.console import Console

from advgrpo import config
from advgrpo.data.sources import Sources
from advgrpo.errors import UserError
from advgrpo.evaluate import main as evaluate
from advgrpo.policy import text_cache
from advgrpo.policy.text_cache import TextCache
from advgrpo.reporting.display import Display
from advgrpo.runtime.distributed import Distributed
from advgrpo.training.build import build_policy, check_cache_is_shared
from advgrpo.training.fast import FastPaths
from advgrpo.types import Conditioning
from tests import zygote
from tests.training.test_run import environment

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


def place(rank: int) -> Distributed:
    return Distributed(rank, 2, rank, CPU)


@pytest.fixture
def encoding(unit_config, monkeypatch):
    """Function that encodes as a process of two; (policy, lines said, how often the pipeline was loaded)."""
    monkeypatch.setattr("advgrpo.reporting.display._PLAIN_EVERY", 0.0)
    monkeypatch.setattr("advgrpo.policy.diffusers_policy._TEXT_BATCH", 2)
    loaded, real = [], diffusers.DiffusionPipeline.from_pretrained
    monkeypatch.setattr(
        diffusers.DiffusionPipeline, "from_pretrained", lambda *a, **k: loaded.append(a) or real(*a, **k)
    )

    def encode(distributed: Distributed):
        loaded.clear()
        said = io.StringIO()
        fast = FastPaths.choose(unit_config, CPU)
        display = Display(Console(file=said, width=200))
        policy = build_policy(unit_config, Sources.read(unit_config), distributed, fast, display)
        return policy, said.getvalue().splitlines(), len(loaded)

    return encode


def test_progress_is_shown_and_the_encoders_are_loaded_once(encoding, unit_config):
    _, said, loaded = encoding(Distributed.start("cpu"))
    assert said[0] == f"encoding 10 prompts into {unit_config.data.cache_dir}"  # 6, 3 held out, and the empty one
    counts = [f"encoding prompts {done}/10" for done in (2, 4, 6, 8, 10)]
    assert [line.split("  ")[0] for line in said[1:]] == counts
    assert loaded == 1
    assert encoding(Distributed.start("cpu"))[1:] == ([], 0)


def test_evaluate_shows_progress_of_encoding_scoring_and_samples(unit_config, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("advgrpo.reporting.display._PLAIN_EVERY", 0.0)
    flags = ["--model", unit_config.model.path, "--prompts", unit_config.data.held_out_prompts, "--metrics", "rule"]
    flags += ["--cache-dir", str(tmp_path / "cache"), "--output", str(tmp_path / "out"), "--resolution", "32"]
    sizes = ["--num-steps", "1", "--images-per-prompt", "1", "--batch-size", "2", "--grid-prompts", "2"]
    assert evaluate([*flags, *sizes, "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    for line in ("encoding prompts 4/4", "drawing and scoring 2/3", "drawing samples of the base model 2/2"):
        assert line in said


def test_a_cache_that_processes_do_not_share_is_found_before_training(encoding, unit_config, tmp_path):
    """Each encodes its share; in a folder of its own it lacks the other's."""
    sources = Sources.read(unit_config)
    first, _, _ = encoding(place(0))
    second, _, _ = encoding(place(1))
    for rank, policy in enumerate((first, second)):
        check_cache_is_shared(policy, sources, place(rank), unit_config.data.cache_dir)
    unit_config.data.cache_dir = str(tmp_path / "of another machine")
    alone, _, _ = encoding(place(1))
    with pytest.raises(UserError) as error:
        check_cache_is_shared(alone, sources, place(1), unit_config.data.cache_dir)
    assert str(error.value).startswith(
        f"data.cache_dir = {unit_config.data.cache_dir!r}: process 1 does not find 5 of 10"
    )
    check_cache_is_shared(
        alone, sources, Distributed.start("cpu"), unit_config.data.cache_dir
    )  # one process encodes what it needs


@pytest.mark.slow
@pytest.mark.weekly
def test_two_processes_with_caches_of_their_own_end_in_one_line(unit_config, tmp_path):
    """As on two machines: the same setting, another folder behind it."""
    unit_config.data.cache_dir, unit_config.rollout.micro_batch = "~/cache", 2
    settings = tmp_path / "settings.yaml"
    settings.write_text(config.dump(unit_config))
    arguments = [str(tmp_path), "--config", str(settings)]
    done = zygote.run("tests.train_worker:run_at_home", arguments, processes=2, environment=environment())
    assert done.returncode != 0
    assert "does not find 5 of 10 prompts there that other processes have encoded" in done.stderr
    ours = done.stderr.partition("\n=====")[0]  # without torchrun's report, which has the stack of an error file
    assert "advgrpo/training/run.py" not in ours
    assert not (Path(unit_config.output_dir) / "metrics.jsonl").exists()
