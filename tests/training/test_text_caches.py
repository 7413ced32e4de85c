"""Text embeddings where each machine has a cache of its own: every process finds all, with the same bits.

Processes are threads here, but for the last test. The encoder's bits depend on what is encoded together, as a T5's do.

Bugs planted in a copy, each seen red: what is absent encoded again, by all or by whose cache lacks it, instead of
brought; all of a machine's processes store every file; all files at once; the bits of the first cache, or those of the
lowest or highest number, instead of those of most; of two caches those of the lowest or highest number; holes brought
and other bits left; every process looks into every folder; the files of a cache
that all see opened; a damaged file spread, or one with a damaged header left;
what its sender has encoded again sent; all caches taken for one, or for several; a mark that cannot be left an error,
or one that cannot be removed; the marks left, or those of others; the check in the end left out; prompts or encoders
not compared; prompts announced that a file system only denies.
"""

import errno
import io
import json
import os
import threading
import time
from collections import Counter
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from advgrpo import config
from advgrpo.errors import UserError
from advgrpo.policy.text_cache import TextCache
from advgrpo.reporting.display import Display
from advgrpo.reporting.tracking import load_metrics
from advgrpo.runtime import atomic
from advgrpo.runtime import cache as tensor_cache
from advgrpo.runtime.distributed import Distributed
from advgrpo.training import text_caches
from advgrpo.training.text_caches import encode_prompts, fill_caches
from advgrpo.types import Conditioning
from tests import zygote
from tests.training.test_run import environment

TEXTS = [f"prompt {number}" for number in range(11)]
_MOST_SECONDS = 20  # that a process waits for another one


class Job:
    """Processes that are threads, and what they have done."""

    def __init__(self, folders: list[Path]):
        self.folders, self.slots = folders, [None] * len(folders)
        self.barrier = threading.Barrier(len(folders))
        self.encoded: list[list[str]] = [[] for _ in folders]
        self.stored: Counter = Counter()  # files of other caches, by path
        self.sent: list[int] = []  # how many files at once

    def run(self, texts=lambda rank: TEXTS, fingerprint=lambda rank: "key", spoil=lambda cache, rank: None):
        """`fill_caches` on all; the errors they raise."""
        errors: list[BaseException | None] = [None] * len(self.folders)

        def one(rank: int) -> None:
            cache = TextCache(
                self.folders[rank] / "text", fingerprint(rank), lambda prompts: self.encode(rank, prompts)
            )
            real = cache.tensors.store_file
            cache.tensors.store_file = lambda key, file: (
                self.stored.update([cache.tensors.path(key)]) or real(key, file)
            )
            spoil(cache, rank)
            try:
                display = Display(Console(file=io.StringIO()))
                fill_caches(cache, texts(rank), self.folders[rank], display, Played(rank, self))
            except BaseException as error:
                errors[rank] = error
                self.barrier.abort()

        threads = [threading.Thread(target=one, args=(rank,), daemon=True) for rank in range(len(self.folders))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(_MOST_SECONDS + 10)
        assert not any(thread.is_alive() for thread in threads)
        found = [error for error in errors if error is not None]
        return [error for error in found if not isinstance(error, threading.BrokenBarrierError)] or found

    def encode(self, rank: int, prompts: list[str]):
        for start in range(0, len(prompts), 2):
            part = prompts[start : start + 2]
            self.encoded[rank] += part
            numbers = torch.tensor([float(prompt.split()[1]) for prompt in part])
            bits = numbers + numbers.sum() / 1000
            yield Conditioning(bits.view(-1, 1, 1).expand(-1, 3, 4).clone(), bits.view(-1, 1).clone())

    def all_encoded(self) -> list[str]:
        return sorted(text for own in self.encoded for text in own)


class Played(Distributed):
    """One of them."""

    def __init__(self, rank: int, job: Job):
        super().__init__(rank, len(job.folders), rank, torch.device("cpu"))
        self.job = job

    def _all(self, value):
        self.job.slots[self.rank] = value
        self.job.barrier.wait(_MOST_SECONDS)
        values = list(self.job.slots)
        self.job.barrier.wait(_MOST_SECONDS)
        return values

    def all_gather(self, tensor):
        return torch.cat(self._all(tensor))

    def gather_json(self, value):
        return self._all(json.loads(json.dumps(value)))

    def from_rank(self, source, contents, group=None):
        if self.rank == source:
            self.job.sent.append(len(contents))
        return self._all(contents)[source]

    def temporary_group(self):
        return nullcontext()

    @contextmanager
    def monitored(self, what, *, at_most_seconds=None):
        yield
        assert len(set(self._all(what))) == 1


@pytest.fixture(autouse=True)
def no_power_cuts(monkeypatch):
    monkeypatch.setattr(atomic, "force_to_disk", lambda path: None)


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (folder / "text").rglob("*") if file.is_file()}


def machines(tmp_path, *numbers: int) -> list[Path]:
    """The folders of processes on these machines."""
    return [tmp_path / f"machine{number}" for number in numbers]


@pytest.fixture
def two(tmp_path, monkeypatch):
    """A job of two processes on one machine and one on another, whose caches are filled."""
    monkeypatch.setattr(text_caches, "_FILES", 2)
    job = Job(machines(tmp_path, 0, 0, 1))
    assert job.run() == []
    return job


def test_each_text_is_encoded_once_and_all_caches_hold_the_same_files(two):
    first, second = files_of(two.folders[0]), files_of(two.folders[2])
    assert first == second
    assert len(first) == len(TEXTS)  # nor is anything else left there
    assert two.all_encoded() == sorted(TEXTS)
    assert [len(own) for own in two.encoded] == [4, 4, 3]
    assert set(two.stored.values()) == {1}
    assert len(two.stored) == len(TEXTS)  # what the first machine encoded on the second, and the other way round
    assert max(two.sent) == 2


def test_a_machine_that_joins_gets_what_the_others_have(two, tmp_path):
    later = Job(machines(tmp_path, 0, 1, 2))
    assert later.run() == []
    assert later.all_encoded() == []
    assert files_of(later.folders[2]) == files_of(later.folders[0])
    assert sum(later.sent) == len(TEXTS)


def test_what_a_killed_start_has_brought_is_not_brought_again(two):
    gone = sorted((two.folders[2] / "text").rglob("*.safetensors"))[:5]
    before = files_of(two.folders[0])
    for file in gone:
        file.unlink()
    again = Job(two.folders)
    assert again.run() == []
    assert (sum(again.sent), again.all_encoded()) == (5, [])
    assert files_of(again.folders[2]) == before
    once_more = Job(two.folders)
    assert once_more.run() == []
    assert once_more.sent == []


@pytest.mark.parametrize("odd", [0, 2])
def test_bits_that_most_caches_hold_count(odd, tmp_path):
    """Those of an earlier run, alone on one machine, are other ones."""
    folders = machines(tmp_path, 0, 1, 2)
    alone, others = Job([folders[odd]]), Job([folder for n, folder in enumerate(folders) if n != odd])
    assert alone.run(texts=lambda rank: TEXTS[:5]) == others.run() == []
    kept, lost = files_of(others.folders[0]), files_of(alone.folders[0])
    assert any(kept[name] != content for name, content in lost.items())
    job = Job(folders)
    assert job.run() == []
    assert all(files_of(folder) == kept for folder in folders)
    assert job.all_encoded() == []


def test_a_cache_that_all_see_is_looked_through_once(tmp_path, monkeypatch):
    listed, real = Counter(), tensor_cache.os.listdir
    monkeypatch.setattr(tensor_cache.os, "listdir", lambda path: listed.update([Path(path).name]) or real(path))
    job = Job(machines(tmp_path, 0, 0, 0))
    monkeypatch.setattr(TextCache, "key", lambda self, text: f"{int(text.split()[1]) % 6:02d}{text}")
    assert job.run() == []
    assert (job.sent, job.all_encoded()) == ([], sorted(TEXTS))
    listed.clear()
    assert Job(job.folders).run() == []
    assert listed.pop("text") == 3  # for the others' marks
    assert set(listed) == {f"{number:02d}" for number in range(6)}
    assert sum(listed.values()) <= 6 + 2  # a folder that two shares end in is listed by both


def flip(file: Path, position: int) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)


DAMAGES = {
    "body": lambda file: flip(file, -3),
    "header": lambda file: flip(file, 8),
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:-3]),
    "empty": lambda file: file.write_bytes(b""),
    "no checksum": lambda file: save_file({name: each.clone() for name, each in load_file(file).items()}, file),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("others", [[1], [1, 2]], ids=["one", "two"])
def test_a_damaged_file_counts_as_absent(damage, others, two, tmp_path, caplog):
    """Process 0's, which sends it; machine 1 may have the same one, sound, and the one that joins then gets that."""
    folders = machines(tmp_path, 0, *(others if len(others) > 1 else [2]))
    sound = files_of(folders[0])
    DAMAGES[damage](next((folders[0] / "text").rglob("*.safetensors")))
    later = Job(folders)
    assert later.run() == []
    assert len(later.all_encoded()) == (len(others) == 1)
    found = [files_of(folder) for folder in folders]
    assert all(each == found[0] for each in found)
    assert (found[0] == sound) or len(others) == 1
    assert sum(later.sent) >= len(TEXTS)
    caplog.clear()
    TextCache(folders[-1] / "text", "key", lambda _: pytest.fail("encoded again")).load(TEXTS)
    assert caplog.text == ""


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_in_a_cache_that_all_see_is_found_when_it_is_read(damage, tmp_path, monkeypatch, caplog):
    """A start lists its folders and opens none of their files, of which there are as many as prompts."""
    job = Job(machines(tmp_path, 0, 0))
    assert job.run() == []
    before = files_of(job.folders[0])
    DAMAGES[damage](next((job.folders[0] / "text").rglob("*.safetensors")))
    again = Job(job.folders)
    with monkeypatch.context() as starting:
        starting.setattr(tensor_cache, "safe_open", lambda *_: pytest.fail("opened"))
        assert again.run() == []
    assert again.all_encoded() == []
    reader = TextCache(job.folders[0] / "text", "key", lambda prompts: again.encode(0, prompts))
    found = reader.load(TEXTS)
    assert len(again.all_encoded()) == 1
    assert "is damaged" in caplog.text
    assert found.text.isfinite().all()
    after = files_of(job.folders[0])
    assert after.keys() == before.keys()
    assert sum(after[name] != before[name] for name in before) <= 1  # encoded alone it may have other bits


@pytest.mark.parametrize("first", [0, 1])
def test_of_two_caches_process_0s_bits_count(first, tmp_path):
    folders = machines(tmp_path, first, 1 - first)
    for number, texts in enumerate((TEXTS, TEXTS[:5])):
        assert Job(machines(tmp_path, number)).run(texts=lambda rank, texts=texts: texts) == []
    kept, lost = files_of(folders[0]), files_of(folders[1])
    assert sum(kept[name] != lost[name] for name in kept.keys() & lost.keys()) == 1
    assert Job(folders).run() == []
    found = files_of(folders[0])
    assert found == files_of(folders[1])
    assert {name: found[name] for name in kept} == kept


def refuse(*_):
    raise OSError(errno.EROFS, "Read-only file system")


def test_a_cache_that_is_read_only_will_do_if_it_is_complete(tmp_path, monkeypatch):
    job = Job(machines(tmp_path, 0, 0))
    assert job.run() == []
    monkeypatch.setattr(tensor_cache, "write_atomically", refuse)
    monkeypatch.setattr(text_caches, "remove", refuse)
    again = Job(job.folders)
    assert again.run() == []
    assert (again.sent, again.all_encoded()) == ([], [])
    (error, *_) = Job(job.folders).run(texts=lambda rank: [*TEXTS, "prompt 99"])
    assert isinstance(error, UserError)
    assert "cannot be written" in str(error)


def test_marks_of_killed_processes_are_removed_but_not_those_of_another_job(tmp_path):
    job = Job(machines(tmp_path, 0, 0, 1))
    for folder in set(job.folders):
        (folder / "text").mkdir(parents=True)
        for age, name in ((3600, ".0123456789abcdef-0.tmp"), (25 * 3600, ".0123456789abcdef-1.tmp")):
            (folder / "text" / name).write_bytes(b"")
            os.utime(folder / "text" / name, (time.time() - age,) * 2)
    assert job.run() == []
    for folder in set(job.folders):
        assert [name for name in os.listdir(folder / "text") if name.endswith(".tmp")] == [".0123456789abcdef-0.tmp"]


def test_what_a_file_system_only_denies_is_not_announced(tmp_path, monkeypatch):
    job = Job(machines(tmp_path, 0))
    assert job.run() == []
    monkeypatch.setattr(tensor_cache.TensorCache, "__contains__", lambda self, key: False)
    said, cache = (
        io.StringIO(),
        TextCache(tmp_path / "machine0" / "text", "key", lambda _: pytest.fail("encoded again")),
    )
    encode_prompts(cache, TEXTS, tmp_path, Display(Console(file=said)), Played(0, job))
    assert said.getvalue() == ""


def test_what_is_absent_in_the_end_is_named(tmp_path):
    """As where somebody cleans the folder meanwhile."""

    def spoil(cache, rank):
        if rank == 1:
            cache.tensors.store_file = lambda key, file: None

    errors = Job(machines(tmp_path, 0, 1)).run(spoil=spoil)
    assert {type(error) for error in errors} == {UserError}
    assert all("process 1 does not find 6 of 11 prompts there as they have been" in str(e) for e in errors)


def test_processes_that_read_other_prompts_or_encoders_are_told(tmp_path):
    (error, *_) = Job(machines(tmp_path, 0, 1)).run(texts=lambda rank: TEXTS[: 5 + rank])
    assert str(error) == (
        "data.prompts, data.held_out_prompts: process 1 reads other prompts than process 0; give all machines the same "
        "files"
    )
    (error, *_) = Job(machines(tmp_path, 0, 1)).run(fingerprint=lambda rank: f"key {rank}")
    assert str(error).startswith("model.path: process 1 has other text encoders or tokenizers than process 0")


@pytest.mark.slow
@pytest.mark.weekly
def test_two_machines_with_caches_of_their_own_train_as_with_one(unit_config, tmp_path):
    """The same setting, and the same folder behind it or another one: the LoRA and the rewards, to the bit."""
    unit_config.iterations, unit_config.rollout.micro_batch = 1, 2
    found = {}
    for how, cache in {"shared": str(tmp_path / "cache"), "own": "~/cache"}.items():
        unit_config.data.cache_dir, unit_config.output_dir = cache, str(tmp_path / how)
        settings = tmp_path / f"{how}.yaml"
        settings.write_text(config.dump(unit_config))
        homes = tmp_path / f"homes-{how}"
        homes.mkdir()
        arguments = [str(homes), "--config", str(settings)]
        done = zygote.run("tests.train_worker:run_at_home", arguments, processes=2, environment=environment())
        assert done.returncode == 0, done.stderr
        lora = load_file(next((tmp_path / how / "lora").glob("*.safetensors")))
        rows = load_metrics(tmp_path / how / "metrics.jsonl")
        found[how] = lora, [row["reward_generated"] for row in rows]
    (shared, rewards), (own, own_rewards) = found.values()
    assert shared.keys() == own.keys()
    assert all(torch.equal(shared[name], own[name]) for name in shared)
    assert rewards == own_rewards
    caches = [files_of(tmp_path / "homes-own" / f"home{rank}" / "cache") for rank in range(2)]
    assert caches[0] == caches[1] == files_of(tmp_path / "cache")
    assert len(caches[0]) == 10  # 6 prompts, 3 held out, and the empty one
