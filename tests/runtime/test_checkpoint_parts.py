"""Tensors in parts: any number of processes reads what any other wrote; what is damaged is refused by its file's name.

Processes are played one after the other; tests/training/test_full_in_parts.py has real ones.
"""

from __future__ import annotations

import errno
import json
import os
import pickle
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from advgrpo.errors import UserError
from advgrpo.policy.parts import Parts
from advgrpo.runtime import checkpoint_parts
from advgrpo.runtime.checkpoint import CheckpointError, latest_checkpoint, load_checkpoint, save_checkpoint
from advgrpo.runtime.checkpoint_parts import Cut, described_file, sha256_of, write_together
from advgrpo.runtime.distributed import Distributed
from advgrpo.training.run import Run
from advgrpo.training.state_in_parts import in_parts, save_in_parts
from advgrpo.training.stopping import SLOWEST_DISK

PARTED = {
    "policy.a": torch.randn(5, 3),
    "policy.one": torch.randn(1),
    "ema.a": torch.randn(5, 3),
    "optimizer.state.0.exp_avg": torch.randn(7, 2, 2),
}
WHOLE = {"optimizer.state.0.step": torch.tensor(3.0), "head.w": torch.arange(4)}
SECOND = "shard-00002-model-00001-of-00001.safetensors"


def cut(rank: int, processes: int) -> Cut:
    return Cut(rank, processes, in_parts)


def rows(name: str, tensor: torch.Tensor, of: Cut) -> torch.Tensor:
    if not in_parts(name):
        return tensor
    own = of.of(len(tensor))
    return tensor[own.start : own.stop]


def save(root: Path, iteration: int, processes: int, *, then=lambda rank: None) -> Path:
    """As so many processes do; `then` is called after the files of each."""

    def write(folder: Path) -> dict[str, dict]:
        described = {}
        for rank in range(processes):
            own = {name: rows(name, tensor, cut(rank, processes)) for name, tensor in PARTED.items()}
            lengths = {name: len(tensor) for name, tensor in PARTED.items()}
            for file in checkpoint_parts._write(folder, own, lengths, cut(rank, processes)):
                described[file.name] = described_file(file)
            then(rank)
        return described

    return save_checkpoint(root, iteration, WHOLE, {"x": 1}, 5, write_parts=write)


@pytest.mark.parametrize("wrote", [1, 2, 3, 6])
def test_any_number_of_processes_reads_what_any_other_wrote(wrote, tmp_path):
    """Among 3 processes the third has no row of a tensor of one, among 6 the sixth none of any but one."""
    path, everything = save(tmp_path, 1, wrote), PARTED | WHOLE
    found, state = load_checkpoint(path)
    assert (state, found.keys()) == ({"x": 1}, everything.keys())
    assert all(torch.equal(found[name], tensor) for name, tensor in everything.items())
    for processes in (2, 3, 6):
        for rank in range(processes):
            own, _ = load_checkpoint(path, cut(rank, processes))
            expected = {name: rows(name, tensor, cut(rank, processes)) for name, tensor in everything.items()}
            assert all(torch.equal(own[name], tensor) for name, tensor in expected.items())


def test_what_one_process_wrote_whole_is_read_in_parts(tmp_path):
    path = save_checkpoint(tmp_path, 1, PARTED | WHOLE, {}, 5)
    own, _ = load_checkpoint(path, cut(1, 2))
    assert torch.equal(own["policy.a"], PARTED["policy.a"][3:])
    assert torch.equal(own["head.w"], WHOLE["head.w"])


def test_nothing_is_unpickled(tmp_path, monkeypatch):
    def refuse(*_arguments, **_keywords):
        raise AssertionError("unpickled")

    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load"), (torch, "save")):
        monkeypatch.setattr(module, name, refuse)
    path = save(tmp_path, 1, 2)
    assert load_checkpoint(path)[0].keys() == (PARTED | WHOLE).keys()
    assert {file.suffix for file in path.iterdir()} == {".safetensors", ".json"}


def truncate(path: Path) -> None:
    (path / SECOND).write_bytes((path / SECOND).read_bytes()[:-8])


def alter(path: Path) -> None:
    content = bytearray((path / SECOND).read_bytes())
    content[-1] ^= 1
    (path / SECOND).write_bytes(content)


def with_hash(path: Path) -> None:
    """The manifest says what is there now."""
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"][SECOND] = described_file(path / SECOND)
    (path / "manifest.json").write_text(json.dumps(manifest))


def no_tensors(path: Path) -> None:
    (path / SECOND).write_bytes(b"nothing of the kind")
    with_hash(path)


def forget(path: Path) -> None:
    """One part is gone without a trace, and so are rows."""
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["files"][SECOND]
    (path / "manifest.json").write_text(json.dumps(manifest))
    (path / SECOND).unlink()


def other_place(path: Path) -> None:
    """Rows of another place than they are of."""
    stored = load_file(path / SECOND)
    offsets = {name: {"saved_offsets": [0] * tensor.dim()} for name, tensor in stored.items()}
    save_file(stored, path / SECOND, {"DCP_SHARDING_INFO": json.dumps(offsets), "format": "pt"})
    with_hash(path)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (truncate, f"{SECOND} is truncated"),
        (alter, f"{SECOND} was altered"),
        (lambda path: (path / SECOND).unlink(), f"{SECOND} is missing"),
        (no_tensors, f"{SECOND} is no safetensors file"),
        (lambda path: (path / SECOND).rename(path / SECOND.replace("2", "9", 1)), f"{SECOND} is missing"),
        (forget, r"rows of .* are in no file"),
        (other_place, r"rows of .* in two"),
        (lambda path: save_file({"policy.a": torch.ones(1)}, path / "shard-00009.safetensors"), "does not list it"),
    ],
    ids=["truncated", "altered", "missing", "no tensors", "renamed", "forgotten", "elsewhere", "stray"],
)
def test_damage_is_refused_by_the_files_name(damage, reason, tmp_path):
    path = save(tmp_path, 1, 3)
    damage(path)
    with pytest.raises(CheckpointError, match=reason):
        load_checkpoint(path)


def test_each_process_verifies_its_share_of_the_files(tmp_path):
    path = save(tmp_path, 1, 3)
    alter(path)
    load_checkpoint(path, cut(0, 2))
    with pytest.raises(CheckpointError, match=f"{SECOND} was altered"):
        load_checkpoint(path, cut(1, 2))


def test_killed_while_parts_are_written_the_last_good_one_stays(tmp_path):
    good = save(tmp_path, 1, 2)
    child = os.fork()
    if child == 0:
        save(tmp_path, 2, 2, then=lambda rank: os._exit(9))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert len(list(tmp_path.iterdir())) == 2  # a hidden folder is left
    assert latest_checkpoint(tmp_path) == good
    assert torch.equal(load_checkpoint(good)[0]["policy.a"], PARTED["policy.a"])
    assert latest_checkpoint(tmp_path) != save(tmp_path, 2, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["iteration-000001", "iteration-000002"]


def test_a_part_that_cannot_be_written_is_named_with_its_folder_and_the_last_good_one_stays(tmp_path, monkeypatch):
    good = save(tmp_path, 1, 1)
    job = Distributed(0, 1, 0, torch.device("cpu"))
    write = partial(write_together, tensors={}, rows={}, cut=cut(0, 1), distributed=job, within_seconds=1.0)

    def full(*_arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as `write` has it: without the file's name

    monkeypatch.setattr(checkpoint_parts, "_write", full)
    with pytest.raises(UserError, match=f"output_dir: process 0 .*{tmp_path}.*No space left.*make room"):
        save_checkpoint(tmp_path, 2, WHOLE, {}, 5, write_parts=write)
    assert list(tmp_path.iterdir()) == [good]


def test_process_0_may_take_as_long_for_the_rest_as_its_tensors_take(tmp_path):
    """Others wait for it then, and would take it for hanging after the timeout of a collective."""
    job, said = Distributed(0, 1, 0, torch.device("cpu")), []
    job.progress = lambda doing, *, within_seconds=None: said.append((doing, within_seconds))
    weight = torch.nn.Parameter(torch.ones(2, 2))
    tensors = {"policy.a": weight.detach(), "replay.x": torch.zeros(10**6)}
    save_in_parts(tmp_path, 1, tensors, {}, 1, Parts(job, {"a": weight}, {"a": weight.shape}))
    doing, within = said[-1]
    assert doing == "finish a checkpoint"
    assert within >= sum(tensor.nbytes for tensor in tensors.values()) / SLOWEST_DISK


def test_a_checkpoint_that_one_process_cannot_take_is_taken_by_none():
    """Otherwise the others would begin anew, or go on with an earlier one, from weights of this one."""
    took = []
    policy = SimpleNamespace(parts=object(), trainable_parameters=dict)
    trainer = SimpleNamespace(policy=policy, checked=lambda *_: "fits here", take=took.append)
    job = SimpleNamespace(gather_json=lambda reason: [reason, "rows of process 1 do not fit"])
    run = SimpleNamespace(trainer=trainer, best=None, distributed=job)
    saved = SimpleNamespace(tensors={}, state={}, path=Path("a"))
    assert Run._misfit(run, saved) == "rows of process 1 do not fit"
    assert not took
    job.gather_json = lambda reason: [reason, ""]
    assert Run._misfit(run, saved) == ""
    assert took == ["fits here"]


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e25])
def test_a_norm_of_parts_is_that_of_the_whole_summed_in_float64(size):
    """Large and small ones beside each other, in pieces. Seen red with squares in float32: 0, inf, or wrong digits."""
    generator = torch.Generator().manual_seed(3)
    whole = [torch.randn(101, 7, generator=generator) * size * scale for scale in (1.0, 1e-4, 300.0)]
    whole.append(torch.full((3000,), 0.1 * size))
    wanted = sum(tensor.double().square().sum() for tensor in whole).sqrt()
    shares = [[list(tensor.chunk(3))[rank] for tensor in whole] for rank in range(3)]
    squares = [sum(tensor.double().square().sum() for tensor in own)[None] for own in shares]
    for rank, own in enumerate(shares):
        others = squares[:rank] + squares[rank + 1 :]
        job = SimpleNamespace(all_gather=lambda square, others=others: torch.cat([square, *others]))
        norm = Parts(job, {}, {}).norm([*own, torch.zeros(0, 7)])
        assert norm.dtype == torch.float32
        assert abs(norm.double() - wanted) <= wanted * 2**-24
    job = SimpleNamespace(all_gather=lambda square: torch.cat([square, torch.tensor([torch.nan]).double()]))
    assert Parts(job, {}, {}).norm(shares[0]).isnan()


def test_hashes_are_those_of_sha256sum(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_of(tmp_path / "a").startswith("ba7816bf8f01cfea")
