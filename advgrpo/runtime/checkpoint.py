"""Checkpoints that are whole or absent: safetensors and JSON in a folder, written aside and renamed into place.

    root/iteration-000123/tensors.safetensors   every tensor
                          state.json            everything else
                          manifest.json         format, version, and the size and SHA-256 of the two files above
                          shard-….safetensors   tensors that lie in parts on several processes (checkpoint_parts.py)

A run that is killed while writing leaves a hidden folder that `latest_checkpoint` ignores and the next save removes.
A read that fails (a server that does not answer, a lost handle) is no damage: it is tried again, and then an error.
Nothing here is ever unpickled.
"""

import errno
import json
import math
import os
import re
import shutil
import stat
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from advgrpo.errors import UserError
from advgrpo.runtime.atomic import SUFFIX, clean, remove, write_folder_atomically
from advgrpo.runtime.checkpoint_parts import PART, Cut, described_file, read_parts, sha256_of
from advgrpo.runtime.reading import (
    RepeatedKeyError,
    UnreadableError,
    failed_read,
    parse_json,
    read_text,
    unique_keys,
)

FORMAT = "advgrpo-checkpoint"
VERSION = 1
TENSORS, STATE, MANIFEST = "tensors.safetensors", "state.json", "manifest.json"
_NAME = re.compile(r"iteration-(\d{6,})")
_WAITS = (0.5, 1.0, 2.0)  # seconds between the attempts to read
_Read = TypeVar("_Read")
_ASIDE = re.compile(rf"\.(iteration-\d{{6,}})\.old{re.escape(SUFFIX)}")
_NO_ROOM = {
    errno.ENOSPC: "the disk is full ({free:.0f} MiB free): make room on it",
    errno.EDQUOT: "the disk quota is used up: make room, or have it raised",
    errno.EFBIG: "it is larger than this process may write: raise the limit on file sizes (ulimit -f)",
}


class CheckpointError(UserError):
    """A checkpoint that cannot be continued; the message ends with the flag that goes on without it.

    Args:
        path: its folder.
        reason: what is wrong, with the file's name.
    """

    def __init__(self, path: Path, reason: str):
        super().__init__(f"{reason}; {remedy(path)}")
        self.reason = reason


def folder_of(root: str | Path, iteration: int) -> Path:
    """Where the checkpoint after `iteration` iterations is kept."""
    return Path(root) / f"iteration-{iteration:06d}"


def save_checkpoint(
    root: Path,
    iteration: int,
    tensors: dict[str, Tensor],
    state: dict[str, Any],
    keep: int,
    *,
    write_parts: Callable[[Path], dict[str, dict[str, Any]]] | None = None,
) -> Path:
    """Write `root/iteration-NNNNNN` atomically and durably, then prune to the newest `keep` checkpoints.

    Checkpoints of later iterations are removed too: they belong to a run that was since resumed from further back, and
    would otherwise be taken for the newest. Only one process may write to `root`.

    Args:
        tensors: any dtypes, shapes and devices; stored on the CPU, bit for bit.
        state: JSON that reads back equal (string keys, lists, finite floats); see `flatten_state` for anything else.
        keep: how many checkpoints to leave, at least 1.
        write_parts: writes into the folder what lies in parts, all processes together, and returns what the manifest is
            to say of each file.

    Returns:
        The folder of the new checkpoint.

    Raises:
        ValueError: `keep` < 1, a negative iteration, or a `state` that JSON would alter. Nothing has been written.
        UserError: the disk is full or not writable. The half-written folder is gone, older checkpoints are untouched.
    """
    if keep < 1 or iteration < 0:
        raise ValueError(f"keep={keep} must be at least 1 and iteration={iteration} must not be negative")
    state_text = _exact_json(state)
    root, final = Path(root), folder_of(root, iteration)
    try:
        root.mkdir(parents=True, exist_ok=True)
        clean(root)
        write_folder_atomically(final, lambda folder: _write_files(folder, iteration, tensors, state_text, write_parts))
        _prune(root, final, keep)
    except (OSError, SafetensorError) as error:
        raise _write_error(error, final) from error
    return final


def latest_checkpoint(root: Path) -> Path | None:
    """The checkpoint of the highest iteration in `root`, None without one. It is verified only by `load_checkpoint`."""
    found = checkpoints(root)
    return found[-1] if found else None


def load_checkpoint(path: Path, cut: Cut | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a checkpoint folder after verifying its manifest: the (CPU tensors, state) that `save_checkpoint` was given.

    What was written in parts comes back whole.

    Args:
        cut: of tensors in parts, however they were written, this process's rows alone. It verifies its share of the
            files that have parts; the other processes, which call it too, the others.

    Raises:
        UserError: no such folder, not a checkpoint of this program or of a known version, of another iteration than its
            name says, or a file that is missing, truncated, altered, or that its hash fits although it is no such file.
            The message names the file, and the flag that continues from another checkpoint.
        UnreadableError: a file is there and cannot be read, however often that is tried.
    """
    path = Path(path)
    return _patiently(path, lambda: _load(path, cut))


def _load(path: Path, cut: Cut | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    manifest = _read_manifest(path)
    files = manifest["files"]
    parts = sorted(name for name in files if PART.fullmatch(name))
    for name in (TENSORS, *(parts if cut is None else parts[cut.rank :: cut.processes])):
        _verify_file(path, name, files[name])
    state = _read_state(path, manifest)
    if parts or cut is not None:
        try:
            return read_parts(path, [TENSORS, *parts], cut), state
        except ValueError as error:
            raise CheckpointError(path, str(error)) from None
    try:
        tensors = safetensors.torch.load_file(path / TENSORS)
    except Exception as error:  # a header can promise anything, and what then fails is not for us to list
        damaged = CheckpointError(path, f"{path / TENSORS} is no safetensors file ({error})")
        raise failed_read(error) or damaged from None
    return tensors, state


def _patiently(path: Path, read: Callable[[], _Read]) -> _Read:
    """What `read` returns, tried again where reading itself fails.

    Raises:
        UnreadableError: it failed every time. Nothing is known of what `path` holds.
    """
    for wait in (*_WAITS, None):
        try:
            return read()
        except (OSError, UnreadableError) as error:
            if wait is None:
                raise UnreadableError(
                    f"{path} cannot be read ({error}), {len(_WAITS) + 1} times in {sum(_WAITS):g} s; it need not be "
                    "damaged, so no other checkpoint takes its place. Start again when its disk or server answers, or "
                    "name another checkpoint with --resume-from"
                ) from error
            time.sleep(wait)
    raise AssertionError("the last attempt returns or raises")


def load_state(path: Path) -> dict[str, Any]:
    """The state alone, as `load_checkpoint` reads it; the tensors are not looked at."""
    path = Path(path)
    return _patiently(path, lambda: _read_state(path, _read_manifest(path)))


def not_finite(tensors: Mapping[str, Tensor], state: Any = None) -> str | None:
    """The first tensor or number of a nested `state` ("trainer.global_step") that is not finite; None where all are.

    One read per device, whatever the number of tensors.
    """
    flags: dict[torch.device, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            flags.setdefault(tensor.device, {})[name] = tensor.detach().isfinite().all()
    for found in flags.values():
        for name, is_finite in zip(found, torch.stack(list(found.values())).tolist()):
            if not is_finite:
                return name
    return _number_not_finite(state, "")


def _number_not_finite(value: Any, path: str) -> str | None:
    if isinstance(value, float) and not math.isfinite(value):
        return path
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return next((found for key, each in entries if (found := _number_not_finite(each, _join(path, key)))), None)


def _exact_json(state: dict[str, Any]) -> str:
    try:
        text = json.dumps(state, allow_nan=False, indent=1)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the checkpoint's state is not JSON: {error}") from error
    back = json.loads(text)
    if back != state:
        changed = [key for key in state if key not in back or back[key] != state[key]]
        raise ValueError(f"JSON would alter the checkpoint's state at {changed}: use string keys and lists, not tuples")
    return text


def _write_files(
    folder: Path,
    iteration: int,
    tensors: dict[str, Tensor],
    state_text: str,
    write_parts: Callable[[Path], dict[str, dict[str, Any]]] | None,
) -> None:
    parts = write_parts(folder) if write_parts is not None else {}
    safetensors.torch.save_file(_storable(tensors), folder / TENSORS)
    (folder / STATE).write_text(state_text, encoding="utf-8")
    files = {name: described_file(folder / name) for name in (TENSORS, STATE)} | parts
    manifest = {"format": FORMAT, "version": VERSION, "iteration": iteration, "files": files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def _storable(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors in storages of their own: safetensors refuses tied tensors and overlapping views."""
    result, storages = {}, set()
    for name, tensor in tensors.items():
        stored = tensor.detach().to("cpu").contiguous()
        if stored.untyped_storage().data_ptr() in storages:
            stored = stored.clone()
        storages.add(stored.untyped_storage().data_ptr())
        result[name] = stored
    return result


def _write_error(error: OSError | SafetensorError, final: Path) -> UserError:
    failed = failed_read(error) or error
    code = failed.errno if isinstance(failed, OSError) else None
    latest = None
    with suppress(UnreadableError):  # of a disk that fails altogether: what is to be told is the write
        latest = latest_checkpoint(final.parent)
    kept = f"; {latest} is whole, --resume-from continues from it" if latest else ""
    if code in _NO_ROOM:
        free = shutil.disk_usage(_existing_parent(final)).free / 2**20
        return UserError(f"checkpoint {final} cannot be written, {_NO_ROOM[code].format(free=free)}{kept}")
    reason = os.strerror(code) if code else str(error)
    return UserError(f"checkpoint {final} cannot be written ({reason}): choose a writable output directory{kept}")


def _existing_parent(path: Path) -> Path:
    return next(parent for parent in path.absolute().parents if parent.exists())


def checkpoints(root: Path) -> list[Path]:
    """Checkpoint folders in `root` in the order of their iterations, unverified.

    One whose replacement was cut short by a kill is found where it was moved aside.

    Raises:
        UnreadableError: `root` is there and cannot be read, however often that is tried.
    """
    return _patiently(Path(root), lambda: _listed(Path(root)))


def _listed(root: Path) -> list[Path]:
    found: dict[str, Path] = {}
    for path in root.iterdir() if stat.S_ISDIR(_mode(root)) else ():
        if _NAME.fullmatch(path.name) and stat.S_ISDIR(_mode(path)):
            found[path.name] = path
        elif (match := _ASIDE.fullmatch(path.name)) and stat.S_ISDIR(_mode(path)):
            found.setdefault(match[1], path)
    return [found[name] for name in sorted(found, key=lambda name: iteration_of(root / name))]


def _mode(path: Path) -> int:
    """Of what is there, 0 where nothing is; `Path.is_dir` takes any error for that from Python 3.14 on."""
    try:
        return path.stat().st_mode
    except OSError as error:
        if (failed := failed_read(error)) is not None:
            raise failed from error
        return 0
    except ValueError:  # a NUL in the path
        return 0


def iteration_of(path: Path) -> int | None:
    """The number in a checkpoint folder's name; None where it has another name."""
    moved = _ASIDE.fullmatch(path.name)
    found = _NAME.fullmatch(moved[1] if moved else path.name)
    return int(found[1]) if found else None


def set_later_aside(root: Path, iteration: int) -> list[Path]:
    """Hide checkpoints of later iterations than the one a run continues from, until its next save removes them.

    Returns:
        What they were called.
    """
    later = [path for path in checkpoints(root) if iteration_of(path) > iteration]
    for path in later:
        hidden = root / f".iteration-{iteration_of(path):06d}.later{SUFFIX}"
        remove(hidden)
        os.replace(path, hidden)
    return later


def _prune(root: Path, newest: Path, keep: int) -> None:
    found = checkpoints(root)
    position = found.index(newest)
    for path in found[: max(0, position + 1 - keep)] + found[position + 1 :]:
        doomed = path.with_name(f".{path.name}{SUFFIX}")
        os.replace(path, doomed)  # a kill halfway through the removal must not leave half a checkpoint under its name
        with suppress(OSError):  # the next save removes it
            remove(doomed)


def _read_manifest(path: Path) -> dict[str, Any]:
    if not stat.S_ISDIR(_mode(path)):
        raise CheckpointError(path, f"checkpoint {path} does not exist")
    manifest = _read_json(path, MANIFEST)
    if manifest.get("format") != FORMAT:
        raise CheckpointError(path, f"{path / MANIFEST} does not say format {FORMAT!r}: a foreign checkpoint")
    version, iteration = manifest.get("version"), manifest.get("iteration")
    if type(version) is not int or version != VERSION:
        raise CheckpointError(path, f"{path} has checkpoint version {version!r}, this program reads {VERSION}")
    if type(iteration) is not int or iteration != (iteration if iteration_of(path) is None else iteration_of(path)):
        raise CheckpointError(path, f"{path / MANIFEST} says iteration {iteration!r}, unlike its folder")
    files = manifest.get("files")
    if not isinstance(files, dict) or not all(isinstance(files.get(name), dict) for name in (TENSORS, STATE, *files)):
        raise CheckpointError(path, f"{path / MANIFEST} does not list {TENSORS} and {STATE}")
    return manifest


def _read_state(path: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    _verify_file(path, STATE, manifest["files"][STATE])
    return _read_json(path, STATE)


def _read_json(path: Path, name: str) -> dict[str, Any]:
    where = f"checkpoint file {path / name}"
    try:
        text = read_text(path / name, "checkpoint file", "every checkpoint has one")
    except UnreadableError:
        raise
    except UserError as error:
        raise CheckpointError(path, str(error)) from None
    try:
        found = parse_json(text, where, "it is damaged", pairs=unique_keys)
    except UserError as error:
        raise CheckpointError(path, str(error)) from None
    except RepeatedKeyError as error:
        raise CheckpointError(path, f"{where}: the key {error.args[0]!r} stands twice") from None
    if not isinstance(found, dict):
        raise CheckpointError(path, f"{where} holds a {type(found).__name__}, not an object")
    return found


def _verify_file(path: Path, name: str, expected: dict[str, Any]) -> None:
    file = path / name
    if not stat.S_ISREG(_mode(file)):
        raise CheckpointError(path, f"{file} is missing")
    size = file.stat().st_size
    if size != expected.get("size"):
        raise CheckpointError(path, f"{file} is truncated: {size} bytes instead of {expected.get('size')}")
    if sha256_of(file) != expected.get("sha256"):
        raise CheckpointError(path, f"{file} was altered: its SHA-256 is not the manifest's")


def remedy(path: Path) -> str:
    """Which flag goes on without the checkpoint folder `path`."""
    others, number = [other for other in checkpoints(path.parent) if other != path], iteration_of(path)
    earlier = [other for other in others if number is None or iteration_of(other) < number]
    if earlier:
        return f"continue from the one before it with --resume-from {earlier[-1]}"
    return "there is no earlier checkpoint: --resume auto, with the flags of the run, starts it anew"


_TENSOR, _TUPLE, _ITEMS, _FLOAT = "__tensor__", "__tuple__", "__items__", "__float__"
_MARKERS = {_TENSOR, _TUPLE, _ITEMS, _FLOAT}


def flatten_state(state: Any, prefix: str = "") -> tuple[dict[str, Tensor], Any]:
    """Split nested dicts, lists and tuples into tensors named by their path ("adam.state.0.exp_avg") and a JSON rest.

    The rest keeps what JSON lacks under marked objects: tuples, keys that are not strings, non-finite floats, and where
    each tensor belongs. `unflatten_state` gives back an equal structure, bit for bit.

    Raises:
        TypeError: a value that is neither a tensor, a container nor a JSON scalar (numpy scalars included).
        ValueError: two tensors with one path, or a dictionary key that collides with a marker.
    """
    tensors: dict[str, Tensor] = {}
    return tensors, _flatten(state, prefix, tensors)


def _flatten(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        if path in tensors:
            raise ValueError(f"two tensors are named {path!r}")
        tensors[path] = value
        return {_TENSOR: path}
    if isinstance(value, dict):
        return _flatten_dict(value, path, tensors)
    if type(value) in (list, tuple):
        items = [_flatten(item, _join(path, i), tensors) for i, item in enumerate(value)]
        return items if type(value) is list else {_TUPLE: items}
    if type(value) is float and not math.isfinite(value):
        return {_FLOAT: repr(value)}
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise TypeError(f"{path or 'state'} is a {type(value).__name__}: neither a tensor, a container nor a JSON scalar")


def _flatten_dict(value: dict, path: str, tensors: dict[str, Tensor]) -> Any:
    if _MARKERS & value.keys():
        raise ValueError(f"{path or 'state'} uses the reserved key {(_MARKERS & value.keys()).pop()!r}")
    items = [(key, _flatten(item, _join(path, key), tensors)) for key, item in value.items()]
    if all(type(key) is str for key in value):
        return dict(items)
    return {_ITEMS: [[_flatten(key, _join(path, "key"), {}), item] for key, item in items]}


def _join(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)


def unflatten_state(tensors: dict[str, Tensor], rest: Any) -> Any:
    """Undo `flatten_state`; `tensors` may hold others besides.

    Raises:
        UserError: a tensor the rest refers to is missing.
    """
    if isinstance(rest, list):
        return [unflatten_state(tensors, item) for item in rest]
    if not isinstance(rest, dict):
        return rest
    if _TENSOR in rest:
        if rest[_TENSOR] not in tensors:
            raise UserError(f"the checkpoint has no tensor {rest[_TENSOR]!r}: it is not complete, use another one")
        return tensors[rest[_TENSOR]]
    if _TUPLE in rest:
        return tuple(unflatten_state(tensors, item) for item in rest[_TUPLE])
    if _ITEMS in rest:
        return {unflatten_state(tensors, key): unflatten_state(tensors, item) for key, item in rest[_ITEMS]}
    if _FLOAT in rest:
        return float(rest[_FLOAT])
    return {key: unflatten_state(tensors, item) for key, item in rest.items()}


def pack_optimizer(optimizer: torch.optim.Optimizer, prefix: str = "optimizer") -> tuple[dict[str, Tensor], Any]:
    """An optimizer's state as (tensors named `prefix.state.0.exp_avg`, JSON rest), for `unpack_optimizer`."""
    return flatten_state(optimizer.state_dict(), prefix)


def unpack_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], rest: Any) -> None:
    """Load what `pack_optimizer` returned, bit for bit.

    Raises:
        UserError: the checkpoint's optimizer is for other parameters, or its state would be rounded to the parameters'
            dtype (`Optimizer.load_state_dict` casts in silence).
    """
    optimizer.load_state_dict(checked_optimizer(optimizer, tensors, rest))


def checked_optimizer(
    optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], rest: Any, name: str = "optimizer"
) -> dict[str, Any]:
    """The state that `pack_optimizer` took apart, for `load_state_dict` of this optimizer, which is left as it is.

    Raises:
        UserError: as `unpack_optimizer`, also for settings (learning rate, betas) that are not this optimizer's, and
            for content that is no optimizer's state at all; `name` is what it calls it.
    """
    try:
        found = unflatten_state(tensors, rest)
        groups, slots = list(found["param_groups"]), dict(found["state"])
        _check_groups(optimizer.param_groups, groups, name)
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        strange = slots.keys() - range(len(parameters))
        if strange:
            raise UserError(f"the checkpoint's {name} knows a parameter {strange.pop()!r}, this run does not: {_CURE}")
        for index, parameter in enumerate(parameters):
            if slots or getattr(optimizer, "filled_from_start", False):
                _check_slots(f"{name} state", index, dict(slots.get(index, {})), parameter, optimizer)
        _check_settings(optimizer.param_groups, groups, name)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RecursionError) as error:
        raise UserError(f"the checkpoint's {name} is no optimizer's state ({type(error).__name__}: {error})") from error
    # what a newer PyTorch has added to the settings is this run's
    groups = [{**own, **theirs} for own, theirs in zip(optimizer.param_groups, groups)]
    return {"state": slots, "param_groups": groups}


_CURE = "resume with the configuration the checkpoint was written with"
_OF_THE_MACHINE = ("params", "fused", "capturable", "foreach")  # how a step is computed, not what it does
_SECOND_MOMENTS = ("exp_avg_sq", "max_exp_avg_sq")


def _check_groups(own: list[dict], saved: list[dict], name: str) -> None:
    """The same parameters in the same groups."""
    numbers = [index for group in saved for index in group["params"]]
    there, here = len(numbers), sum(len(group["params"]) for group in own)
    if there != here:
        raise UserError(f"the checkpoint's {name} has {there} parameters, this run has {here}: {_CURE}")
    sizes = [[len(group["params"]) for group in groups] for groups in (own, saved)]
    if sizes[0] != sizes[1] or numbers != list(range(here)):
        raise UserError(f"the checkpoint's {name} does not fit this run: groups of {sizes[1]}, not {sizes[0]}: {_CURE}")


def _check_settings(own: list[dict], saved: list[dict], name: str) -> None:
    """The same learning rate and so on."""
    for group, theirs in zip(own, saved):
        for setting, value in theirs.items():
            if setting in _OF_THE_MACHINE:
                continue
            known = type(value) is type(group[setting]) and value == group[setting] if setting in group else None
            if not (known or (known is None and type(value) in (bool, int, float, str))):  # Apex counts steps here
                mine = f", this run {group[setting]!r}" if setting in group else ", which no optimizer has"
                raise UserError(f"the checkpoint's {name} has {setting} = {value!r:.60}{mine}: {_CURE}")


def _check_slots(name: str, index: int, slots: dict, parameter: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """What an optimizer remembers of one parameter."""
    wanted = set(optimizer.state[parameter]) if parameter in optimizer.state else _slots_of(optimizer)
    if wanted is not None and slots.keys() != wanted:
        different = sorted(map(str, slots.keys() ^ wanted))[0]
        raise UserError(f"the checkpoint's {name} of parameter {index}: {different!r} is only in one of the two")
    for slot, value in slots.items():
        what = f"the checkpoint's {name} {slot} of parameter {index}"
        if not isinstance(value, Tensor):
            continue
        if slot == "step":
            if value.numel() != 1 or not float(value) >= 0 or float(value) != int(value):
                raise UserError(f"{what} is {value.tolist()!r:.60}, want a number of steps")
        elif value.shape != parameter.shape or (value.is_floating_point() and value.dtype != parameter.dtype):
            there, here = (f"{t.dtype} {list(t.shape)}" for t in (value, parameter))
            raise UserError(f"{what} is {there}, the parameter is {here}: {_CURE}")
        elif slot in _SECOND_MOMENTS and bool((value < 0).any()):
            raise UserError(f"{what} is negative, which no mean of squares is")


def _slots_of(optimizer: torch.optim.Optimizer) -> set[str] | None:
    """What Adam's family will remember of each parameter; None where only the first step tells."""
    group = optimizer.param_groups[0]
    if "betas" not in group:
        return None
    counted = set() if "bias_correction" in group else {"step"}  # Apex counts steps in the group
    return {"exp_avg", "exp_avg_sq"} | counted | ({"max_exp_avg_sq"} if group.get("amsgrad") else set())
