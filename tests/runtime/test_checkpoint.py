"""Checkpoints are whole or absent, and come back bit for bit.

Bugs planted in a copy, each seen red: the old checkpoint of an iteration removed before the new one is in place; what
lies aside not looked for, or removed by the next save; a leftover file not removed; the manifest's iteration not
compared; a file-size limit called a full disk.
"""

import errno
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from advgrpo.errors import UserError
from advgrpo.runtime import atomic
from advgrpo.runtime.checkpoint import (
    checkpoints,
    flatten_state,
    latest_checkpoint,
    load_checkpoint,
    pack_optimizer,
    save_checkpoint,
    set_later_aside,
    unflatten_state,
    unpack_optimizer,
)
from advgrpo.runtime.reading import UnreadableError

STATE = {"iteration": 3, "rates": [0.1, 1e-300, -0.0], "nested": {"flag": True, "none": None, "name": "ü"}}


def some_tensors():
    base = torch.randn(6, 4)
    return {
        "float": torch.randn(3, 5),
        "bfloat16": torch.randn(7).bfloat16(),
        "nan": torch.tensor([float("nan"), -0.0, float("inf")]),
        "rng": torch.get_rng_state(),
        "step": torch.tensor(3.0),
        "bool": torch.tensor([True, False]),
        "empty": torch.zeros(0, 4),
        "view": base[1:3],
        "overlapping view": base[2:],
        "transposed view": base.t(),
        "tied": base,
        "parameter": torch.nn.Parameter(torch.randn(2)),
    }


def same_bits(a, b):
    flat = [t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*flat)


def test_round_trip_is_bit_for_bit(tmp_path):
    tensors = some_tensors()
    path = save_checkpoint(tmp_path / "run" / "checkpoints", 123, tensors, STATE, keep=2)
    assert path == tmp_path / "run" / "checkpoints" / "iteration-000123"
    loaded, state = load_checkpoint(path)
    assert loaded.keys() == tensors.keys()
    assert all(same_bits(loaded[name], tensors[name]) for name in tensors)
    assert state == STATE
    assert math.copysign(1, state["rates"][2]) == -1
    assert {file.name for file in path.iterdir()} == {"tensors.safetensors", "state.json", "manifest.json"}
    assert all(file.stat().st_mode & 0o777 == 0o644 for file in path.iterdir())


def test_the_newest_are_kept(tmp_path):
    for iteration in (1, 9, 10, 11):
        save_checkpoint(tmp_path, iteration, {}, {}, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["iteration-000010", "iteration-000011"]
    assert latest_checkpoint(tmp_path) == tmp_path / "iteration-000011"


def test_order_is_numeric_past_six_digits(tmp_path):
    for iteration in (999_999, 1_000_000):
        save_checkpoint(tmp_path, iteration, {}, {}, keep=5)
    assert latest_checkpoint(tmp_path).name == "iteration-1000000"
    assert [path.name for path in checkpoints(tmp_path)] == ["iteration-999999", "iteration-1000000"], "both are kept"


def test_resuming_from_further_back_drops_the_abandoned_future(tmp_path):
    for iteration in (1, 2, 3):
        save_checkpoint(tmp_path, iteration, {}, {"run": "first"}, keep=3)
    save_checkpoint(tmp_path, 2, {}, {"run": "second"}, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["iteration-000002"]
    assert load_checkpoint(latest_checkpoint(tmp_path))[1] == {"run": "second"}


def test_no_checkpoint(tmp_path):
    assert latest_checkpoint(tmp_path / "none") is None
    (tmp_path / ".iteration-000004.tmp").mkdir()
    (tmp_path / "iteration-best").mkdir()
    assert latest_checkpoint(tmp_path) is None


def test_a_leftover_file_is_in_nobodys_way(tmp_path):
    (tmp_path / ".iteration-000004.tmp").write_text("")
    (tmp_path / ".iteration-000003.tmp").write_text("")
    save_checkpoint(tmp_path, 4, {}, {}, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["iteration-000004"]


def test_a_replacement_that_was_cut_short_is_found_and_put_back(tmp_path):
    """Between the two renames of a folder nothing lies under its own name."""
    save_checkpoint(tmp_path, 4, {}, {"run": "old"}, keep=1)
    aside = tmp_path / ".iteration-000004.old.tmp"
    (tmp_path / "iteration-000004").rename(aside)
    assert latest_checkpoint(tmp_path) == aside
    assert load_checkpoint(aside)[1] == {"run": "old"}
    save_checkpoint(tmp_path, 5, {}, {"run": "new"}, keep=2)
    assert [p.name for p in checkpoints(tmp_path)] == ["iteration-000004", "iteration-000005"]


def test_later_checkpoints_are_hidden_until_the_next_save(tmp_path):
    for iteration in (1, 2, 3):
        save_checkpoint(tmp_path, iteration, {}, {}, keep=3)
    assert [p.name for p in set_later_aside(tmp_path, 1)] == ["iteration-000002", "iteration-000003"]
    assert latest_checkpoint(tmp_path) == tmp_path / "iteration-000001"
    assert len(list(tmp_path.iterdir())) == 3
    save_checkpoint(tmp_path, 2, {}, {}, keep=3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["iteration-000001", "iteration-000002"]


def test_leftovers_of_a_kill_are_cleaned_up(tmp_path):
    leftover = tmp_path / ".iteration-000004.tmp"
    leftover.mkdir()
    (leftover / "tensors.safetensors").write_bytes(b"half")
    save_checkpoint(tmp_path, 4, {}, {}, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["iteration-000004"]


@pytest.mark.parametrize("state", [{"a": (1, 2)}, {1: 2}, {"a": float("nan")}, {"a": object()}, {"a": {2: 1}}])
def test_state_that_json_would_alter_is_refused(tmp_path, state):
    with pytest.raises(ValueError, match="state"):
        save_checkpoint(tmp_path / "new", 1, {}, state, keep=1)
    assert not (tmp_path / "new").exists()


def test_bad_arguments(tmp_path):
    with pytest.raises(ValueError, match="keep=0"):
        save_checkpoint(tmp_path, 1, {}, {}, keep=0)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def edit_manifest(**changes):
    def edit(path):
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return edit


@pytest.mark.parametrize(
    ("file", "spoil", "message"),
    [
        ("manifest.json", edit_manifest(iteration=7), "says iteration 7, unlike its folder"),
        ("manifest.json", edit_manifest(iteration="6"), "says iteration '6', unlike its folder"),
        ("manifest.json", edit_manifest(version=True), "version True, this program reads 1"),
        ("manifest.json", lambda path: path.write_text("[" * 100_000), "nested too deeply"),
        ("manifest.json", lambda path: path.write_text('{"format": 1, "format": 2}'), "'format' stands twice"),
        ("manifest.json", lambda path: path.write_bytes(b"\xff\xfe"), "is not UTF-8"),
        ("tensors.safetensors", truncate, "tensors.safetensors is truncated"),
        ("tensors.safetensors", flip, "tensors.safetensors was altered"),
        ("tensors.safetensors", Path.unlink, "tensors.safetensors is missing"),
        ("state.json", truncate, "state.json is truncated"),
        ("manifest.json", truncate, "manifest.json: not JSON"),
        ("manifest.json", Path.unlink, "manifest.json does not exist"),
        ("manifest.json", edit_manifest(format="other"), "foreign checkpoint"),
        ("manifest.json", edit_manifest(version=99), "version 99, this program reads 1"),
        ("manifest.json", edit_manifest(files={}), "does not list"),
        ("manifest.json", lambda path: path.write_text("[]"), "manifest.json holds a list"),
    ],
)
def test_damage_is_found_and_the_previous_checkpoint_named(tmp_path, file, spoil, message):
    for iteration in (5, 6, 7):
        save_checkpoint(tmp_path, iteration, some_tensors(), STATE, keep=3)
    damaged = tmp_path / "iteration-000006"
    spoil(damaged / file)
    with pytest.raises(UserError, match=message) as error:
        load_checkpoint(damaged)
    assert f"--resume-from {tmp_path / 'iteration-000005'}" in str(error.value)
    load_checkpoint(tmp_path / "iteration-000005")


class Faults:
    """Reads of one file fail as those of a server that does not answer, so many times; and nobody waits."""

    def __init__(self, monkeypatch, name: str, times: int):
        self.left, self.waited = times, []
        opened = Path.open

        def fails(path, *args, **kwargs):
            if path.name == name and self.left:
                self.left -= 1
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
            return opened(path, *args, **kwargs)

        monkeypatch.setattr(Path, "open", fails)
        monkeypatch.setattr("advgrpo.runtime.checkpoint.time.sleep", self.waited.append)


@pytest.mark.parametrize("file", ["manifest.json", "state.json", "tensors.safetensors"])
def test_a_read_that_fails_is_tried_again_and_then_named_as_no_damage(tmp_path, file, monkeypatch):
    """Seen red with a failed read taken for damage, or raised as it is at the first attempt."""
    for iteration in (5, 6):
        save_checkpoint(tmp_path, iteration, some_tensors(), STATE, keep=2)
    faults = Faults(monkeypatch, file, times=3)
    assert load_checkpoint(tmp_path / "iteration-000006")[1] == STATE
    assert len(faults.waited) == 3
    faults.left = 4
    with pytest.raises(UnreadableError, match=r"iteration-000006 cannot be read \(.*Stale file handle.*\), 4 times in"):
        load_checkpoint(tmp_path / "iteration-000006")
    assert not faults.left


def test_a_failed_read_inside_safetensors_is_one_too(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, 1, some_tensors(), STATE, keep=1)
    monkeypatch.setattr("advgrpo.runtime.checkpoint.time.sleep", lambda _: None)

    def fails(_):
        raise SafetensorError("I/O error: Input/output error (os error 5)")

    monkeypatch.setattr("safetensors.torch.load_file", fails)
    with pytest.raises(UnreadableError, match="Input/output error"):
        load_checkpoint(tmp_path / "iteration-000001")


def test_a_folder_of_checkpoints_that_cannot_be_listed_is_not_an_empty_one(tmp_path, monkeypatch):
    """Seen red with `Path.is_dir` of Python 3.14, to which it is no folder."""
    save_checkpoint(tmp_path, 1, some_tensors(), STATE, keep=1)
    monkeypatch.setattr("advgrpo.runtime.checkpoint.time.sleep", lambda _: None)
    seen = Path.stat

    def fails(path, **kwargs):
        if path.name == "iteration-000001":
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return seen(path, **kwargs)

    monkeypatch.setattr(Path, "stat", fails)
    monkeypatch.setattr(Path, "is_dir", lambda path: os.path.isdir(path))
    with pytest.raises(UnreadableError, match="Input/output error"):
        checkpoints(tmp_path)


def test_missing_and_foreign_folders(tmp_path):
    with pytest.raises(UserError, match="does not exist; there is no earlier checkpoint"):
        load_checkpoint(tmp_path / "iteration-000001")
    with pytest.raises(UserError, match=r"manifest\.json does not exist"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("code", "cause"), [(errno.ENOSPC, r"disk is full \(\d+ MiB"), (errno.EDQUOT, "quota is used")]
)
def test_full_disk_leaves_the_old_checkpoint(tmp_path, monkeypatch, code, cause):
    tensors = some_tensors()
    save_checkpoint(tmp_path, 1, tensors, STATE, keep=1)

    def full(path):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(atomic, "force_to_disk", full)
    with pytest.raises(UserError, match=rf"iteration-000002 cannot be written, .*{cause}.*iteration-000001 is whole"):
        save_checkpoint(tmp_path, 2, tensors, STATE, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["iteration-000001"]
    assert same_bits(load_checkpoint(tmp_path / "iteration-000001")[0]["float"], tensors["float"])


def test_a_disk_that_fails_altogether_is_told_as_the_write_that_failed(tmp_path, monkeypatch):
    def fails(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(atomic, "force_to_disk", fails)
    monkeypatch.setattr("advgrpo.runtime.checkpoint._listed", fails)
    monkeypatch.setattr("advgrpo.runtime.checkpoint._WAITS", ())
    with pytest.raises(UserError, match="iteration-000002 cannot be written"):
        save_checkpoint(tmp_path, 2, some_tensors(), STATE, keep=1)


def test_no_path_at_all_is_none_that_is_there(tmp_path):
    assert checkpoints(Path(f"{tmp_path}/a\0b")) == []
    with pytest.raises(UserError, match="does not exist"):
        load_checkpoint(Path(f"{tmp_path}/a\0b"))


# RLIMIT_FSIZE makes a real write fail, inside safetensors' own code, without needing a disk to fill.
FULL_DISK = """
import resource, signal, sys, torch
from pathlib import Path
from advgrpo.runtime.checkpoint import save_checkpoint
from advgrpo.errors import UserError
root = Path(sys.argv[1])
save_checkpoint(root, 1, {"a": torch.ones(10)}, {}, keep=1)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
try:
    save_checkpoint(root, 2, {"a": torch.ones(100_000)}, {}, keep=1)
except UserError as error:
    print(error)
"""


def run(program, *args, **kwargs):
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, args)], stdout=subprocess.PIPE, text=True, cwd=Path.cwd(), **kwargs
    )


def test_a_write_that_really_fails(tmp_path):
    output, _ = run(FULL_DISK, tmp_path).communicate(timeout=60)
    assert "larger than this process may write: raise the limit on file sizes (ulimit -f)" in output
    assert "full" not in output
    assert [p.name for p in tmp_path.iterdir()] == ["iteration-000001"]
    load_checkpoint(tmp_path / "iteration-000001")


ENDLESS_SAVES = """
import sys, torch
from pathlib import Path
from advgrpo.runtime.checkpoint import save_checkpoint
for i in range(10**6):
    save_checkpoint(Path(sys.argv[1]), i, {"a": torch.full((100_000,), float(i))}, {"i": i}, keep=2)
    print(i, flush=True)
"""


def test_kill_while_saving_leaves_a_whole_checkpoint(tmp_path):
    process = run(ENDLESS_SAVES, tmp_path)
    assert process.stdout.readline().strip() == "0"
    time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    printed = ["0", *process.stdout.read().split()]
    process.wait()
    tensors, state = load_checkpoint(latest_checkpoint(tmp_path))
    assert state["i"] >= int(printed[-1])
    assert torch.equal(tensors["a"], torch.full((100_000,), float(state["i"])))
    save_checkpoint(tmp_path, state["i"] + 1, {}, {}, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == [f"iteration-{state['i'] + 1:06d}"]


# A child of this process is killed at line number N of the save and of what it calls; the parent looks at what is left.
KILLED_AT_LINES = """
import json, os, shutil, signal, sys, torch
from pathlib import Path
from advgrpo.runtime.checkpoint import checkpoints, latest_checkpoint, load_checkpoint, save_checkpoint

SEEN = tuple(f"{part}.py" for part in ("advgrpo/checkpoint", "advgrpo/atomic", "shutil"))
SCENARIOS = {  # checkpoints there, those then saved, keep
    "first": ((), 1, 1),
    "next": ((1, 2), 3, 2),
    "last one replaced": ((1,), 1, 1),
    "resumed from further back": ((1, 2, 3), 2, 1),
}

def save(root, iteration, keep, run):
    tensors = {"a": torch.full((1000,), float(iteration)), "b": torch.arange(3)}
    save_checkpoint(root, iteration, tensors, {"i": iteration, "run": run}, keep)

def lines_until_done(root, scenario, kill_at):
    before, iteration, keep = SCENARIOS[scenario]
    shutil.rmtree(root, ignore_errors=True)
    for earlier in before:
        save(root, earlier, 9, "before")
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        count = 0
        def trace(frame, event, argument):
            nonlocal count
            if not frame.f_code.co_filename.endswith(SEEN):
                return None
            count += event == "line"
            if count == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return trace
        sys.settrace(trace)
        save(root, iteration, keep, "after")
        sys.settrace(None)
        os.write(write, str(count).encode())
        os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    return int(os.read(read, 99) or 0)

def check(root, scenario):
    before, iteration, keep = SCENARIOS[scenario]
    newest = latest_checkpoint(root)
    if newest is None:
        assert not before, "lost"
    else:
        tensors, state = load_checkpoint(newest)
        assert (state["i"], state["run"]) in [*((i, "before") for i in before), (iteration, "after")]
        assert torch.equal(tensors["a"], torch.full((1000,), float(state["i"])))
    save(root, 10, 1, "later")
    assert [path.name for path in root.iterdir()] == ["iteration-000010"], list(root.iterdir())

root, samples, killed = Path(sys.argv[1]), int(sys.argv[2]), 0
for scenario in SCENARIOS:
    total = lines_until_done(root, scenario, -1)
    for number in range(samples):
        at = 1 + number * (total - 1) // (samples - 1)
        assert lines_until_done(root, scenario, at) == 0, "it was not killed"
        try:
            check(root, scenario)
        except AssertionError as error:
            sys.exit(f"{scenario}, killed at line {at} of {total}: {error}")
        killed += 1
print(killed)
"""


@pytest.mark.parametrize("lines", [12, pytest.param(30, marks=pytest.mark.weekly)])
def test_a_kill_at_any_line_of_a_save_leaves_a_whole_checkpoint(tmp_path, lines):
    """So many of the lines of each of four saves, evenly spread from the first to the last."""
    process = subprocess.run(
        [sys.executable, "-c", KILLED_AT_LINES, str(tmp_path / "root"), str(lines)],
        capture_output=True,
        text=True,
        cwd=Path.cwd(),
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout == f"{4 * lines}\n"


def test_unwritable_root(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        save_checkpoint(tmp_path / "file", 1, {}, {}, keep=1)


def test_nested_state_round_trip():
    tensor = torch.randn(3)
    state = {"a": [1, (2.5, None)], 3: {"t": tensor, "inf": float("-inf")}, "s": "x", "b": True, "empty": {}, "l": []}
    tensors, rest = flatten_state(state, "root")
    assert list(tensors) == ["root.3.t"]
    back = unflatten_state(tensors, json.loads(json.dumps(rest, allow_nan=False)))
    assert back.pop(3) == {"t": tensor, "inf": float("-inf")}
    state.pop(3)
    assert back == state
    assert type(back["a"][1]) is tuple


def test_flatten_refuses_what_it_cannot_give_back():
    with pytest.raises(TypeError, match=r"a\.b is a set"):
        flatten_state({"a": {"b": {1}}})
    with pytest.raises(ValueError, match=r"two tensors are named 'a\.b'"):
        flatten_state({"a.b": torch.ones(1), "a": {"b": torch.ones(1)}})
    with pytest.raises(ValueError, match="reserved key '__tuple__'"):
        flatten_state({"__tuple__": 1})
    with pytest.raises(UserError, match="no tensor 'a'"):
        unflatten_state({}, flatten_state({"a": torch.ones(1)})[1])


def make_model_and_optimizer(kind, width=4):
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(3, width), torch.nn.Linear(width, 1))
    groups = [{"params": model[0].parameters(), "lr": 0.01}, {"params": model[1].parameters(), "lr": 1 / 3}]
    return model, kind(groups)


def step(model, optimizer, seed):
    optimizer.zero_grad()
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(seed))
    model(x).square().mean().backward()
    optimizer.step()


OPTIMIZERS = {
    "adamw": lambda groups: torch.optim.AdamW(groups, betas=(0.5, 0.999), amsgrad=True),
    "adamw fused": lambda groups: torch.optim.AdamW(groups, fused=True),
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_an_optimizer_continues_bit_for_bit(tmp_path, kind):
    model, optimizer = make_model_and_optimizer(OPTIMIZERS[kind])
    for seed in range(3):
        step(model, optimizer, seed)
    tensors, rest = pack_optimizer(optimizer, "opt")
    model_tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    path = save_checkpoint(tmp_path, 3, {**tensors, **model_tensors}, {"opt": rest}, keep=1)

    resumed, fresh = make_model_and_optimizer(OPTIMIZERS[kind])
    loaded, state = load_checkpoint(path)
    resumed.load_state_dict({name: loaded[f"model.{name}"] for name in resumed.state_dict()})
    unpack_optimizer(fresh, loaded, state["opt"])
    assert fresh.param_groups[1]["lr"] == 1 / 3
    for seed in range(3, 6):
        step(model, optimizer, seed)
        step(resumed, fresh, seed)
    assert all(same_bits(a, b) for a, b in zip(model.parameters(), resumed.parameters()))
    assert flatten_state(fresh.state_dict())[1] == flatten_state(optimizer.state_dict())[1]


def test_an_optimizer_of_another_model_is_refused():
    model, optimizer = make_model_and_optimizer(OPTIMIZERS["adamw"])
    step(model, optimizer, 0)
    packed = pack_optimizer(optimizer)
    with pytest.raises(UserError, match=r"the parameter is torch\.float32"):
        unpack_optimizer(make_model_and_optimizer(OPTIMIZERS["adamw"], width=5)[1], *packed)
    with pytest.raises(UserError, match="4 parameters, this run has 2"):
        unpack_optimizer(torch.optim.AdamW(torch.nn.Linear(3, 4).parameters()), *packed)
    with pytest.raises(UserError, match="does not fit"):
        unpack_optimizer(torch.optim.AdamW(model.parameters()), *packed)
    with pytest.raises(UserError, match=r"the parameter is torch\.bfloat16"):
        unpack_optimizer(OPTIMIZERS["adamw"]([{"params": m.bfloat16().parameters()} for m in model]), *packed)


def test_an_optimizer_of_other_settings_is_refused():
    model, optimizer = make_model_and_optimizer(OPTIMIZERS["adamw"])
    step(model, optimizer, 0)
    tensors, rest = pack_optimizer(optimizer)
    other = make_model_and_optimizer(OPTIMIZERS["adamw"])[1]
    other.param_groups[1]["lr"] = 0.5
    with pytest.raises(UserError, match=r"has lr = 0\.333.*this run 0\.5"):
        unpack_optimizer(other, tensors, rest)
    other = make_model_and_optimizer(OPTIMIZERS["adamw"])[1]
    for group in rest["param_groups"]:
        group.pop("amsgrad")  # a setting that PyTorch has added since
    unpack_optimizer(other, tensors, rest)
    assert other.param_groups[0]["amsgrad"] is True


def in_two_groups(first: int) -> torch.optim.Optimizer:
    parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(3)]
    return torch.optim.AdamW([{"params": parameters[:first]}, {"params": parameters[first:]}])


def test_an_optimizer_whose_groups_are_cut_otherwise_is_refused():
    with pytest.raises(UserError, match=r"groups of \[1, 2\], not \[2, 1\]"):
        unpack_optimizer(in_two_groups(2), *pack_optimizer(in_two_groups(1)))


def test_an_optimizer_that_has_not_stepped_yet_is_continued():
    optimizer = in_two_groups(1)
    unpack_optimizer(optimizer, *pack_optimizer(in_two_groups(1)))
    assert not optimizer.state
