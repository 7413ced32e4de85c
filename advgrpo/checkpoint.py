"""Checkpoints that are whole or absent: safetensors and JSON in a folder, written aside and renamed into place.

    root/iteration-000123/tensors.safetensors   every tensor
                          state.json            everything else
                          manifest.json         format, version, and the size and SHA-256 of the two files above

A run that is killed while writing leaves a hidden folder that `latest_checkpoint` ignores and the next save removes.
Nothing here is ever unpickled.
"""

import errno
import hashlib
import json
import math
import os
import re
import shutil
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from advgrpo.errors import UserError

FORMAT = "advgrpo-checkpoint"
VERSION = 1
TENSORS, STATE, MANIFEST = "tensors.safetensors", "state.json", "manifest.json"
_NAME = re.compile(r"iteration-(\d{6,})")
_TEMPORARY = ".iteration-*.tmp"
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def save_checkpoint(root: Path, iteration: int, tensors: dict[str, Tensor], state: dict[str, Any], keep: int) -> Path:
    """Write `root/iteration-NNNNNN` atomically and durably, then prune to the newest `keep` checkpoints.

    Checkpoints of later iterations are removed too: they belong to a run that was since resumed from further back, and
    would otherwise be taken for the newest. Only one process may write to `root`.

    Args:
        tensors: any dtypes, shapes and devices; stored on the CPU, bit for bit.
        state: JSON that reads back equal (string keys, lists, finite floats); see `flatten_state` for anything else.
        keep: how many checkpoints to leave, at least 1.

    Returns:
        The folder of the new checkpoint.

    Raises:
        ValueError: `keep` < 1, a negative iteration, or a `state` that JSON would alter. Nothing has been written.
        UserError: the disk is full or not writable. The half-written folder is gone, older checkpoints are untouched.
    """
    if keep < 1 or iteration < 0:
        raise ValueError(f"keep={keep} must be at least 1 and iteration={iteration} must not be negative")
    state_text = _exact_json(state)
    root, final = Path(root), Path(root) / f"iteration-{iteration:06d}"
    temporary = root / f".{final.name}.tmp"
    try:
        root.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(root)
        temporary.mkdir()
        _write_files(temporary, iteration, tensors, state_text)
        _move_into_place(temporary, final)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise _write_error(error, final) from error
    _prune(root, final, keep)
    return final


def latest_checkpoint(root: Path) -> Path | None:
    """The checkpoint of the highest iteration in `root`, None without one. It is verified only by `load_checkpoint`."""
    found = _checkpoints(Path(root))
    return found[-1] if found else None


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a checkpoint folder after verifying its manifest: the (CPU tensors, state) that `save_checkpoint` was given.

    Raises:
        UserError: no such folder, not a checkpoint of this program or of a known version, or a file that is missing,
            truncated or altered. The message names the file and the checkpoint to resume from instead.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"checkpoint {path} does not exist; {_remedy(path)}")
    manifest = _read_manifest(path)
    for name in (TENSORS, STATE):
        _verify_file(path, name, manifest["files"][name])
    return safetensors.torch.load_file(path / TENSORS), json.loads((path / STATE).read_text(encoding="utf-8"))


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


def _write_files(folder: Path, iteration: int, tensors: dict[str, Tensor], state_text: str) -> None:
    safetensors.torch.save_file(_storable(tensors), folder / TENSORS)
    (folder / STATE).write_text(state_text, encoding="utf-8")
    files = {
        name: {"size": (folder / name).stat().st_size, "sha256": _sha256(folder / name)} for name in (TENSORS, STATE)
    }
    manifest = {"format": FORMAT, "version": VERSION, "iteration": iteration, "files": files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    for name in (TENSORS, STATE, MANIFEST):
        (folder / name).chmod(0o644)  # safetensors makes its files readable to the owner only
        _fsync(folder / name)
    _fsync(folder)


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


def _move_into_place(temporary: Path, final: Path) -> None:
    """Rename; an older checkpoint of the same iteration is moved aside first, since folders cannot replace folders."""
    aside = final.with_name(f".{final.name}.old.tmp")
    if final.exists():
        os.replace(final, aside)
    os.replace(temporary, final)
    _fsync(final.parent)  # makes the rename itself survive a power cut
    shutil.rmtree(aside, ignore_errors=True)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_error(error: OSError | SafetensorError, final: Path) -> UserError:
    code = error.errno if isinstance(error, OSError) else _os_error_code(error)
    latest = latest_checkpoint(final.parent)
    kept = f"; {latest.name} is intact, resume from it" if latest else ""
    if code in _DISK_FULL:
        free = shutil.disk_usage(_existing_parent(final)).free / 2**20
        return UserError(f"disk full while writing checkpoint {final} ({free:.0f} MiB free): make room on it{kept}")
    reason = os.strerror(code) if code else str(error)
    return UserError(f"checkpoint {final} cannot be written ({reason}): choose a writable output directory{kept}")


def _os_error_code(error: SafetensorError) -> int | None:
    found = re.search(r"os error (\d+)", str(error))
    return int(found.group(1)) if found else None


def _existing_parent(path: Path) -> Path:
    return next(parent for parent in path.absolute().parents if parent.exists())


def _checkpoints(root: Path) -> list[Path]:
    if not root.is_dir():
        return []
    return sorted((path for path in root.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()), key=_iteration)


def _iteration(path: Path) -> int:
    return int(_NAME.fullmatch(path.name).group(1))


def _remove_leftovers(root: Path) -> None:
    for leftover in root.glob(_TEMPORARY):
        shutil.rmtree(leftover)


def _prune(root: Path, newest: Path, keep: int) -> None:
    found = _checkpoints(root)
    position = found.index(newest)
    for path in found[: max(0, position + 1 - keep)] + found[position + 1 :]:
        doomed = path.with_name(f".{path.name}.tmp")
        os.replace(path, doomed)  # a kill halfway through the removal must not leave half a checkpoint under its name
        shutil.rmtree(doomed)


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path / MANIFEST} cannot be read ({error}): not a checkpoint; {_remedy(path)}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UserError(f"{path / MANIFEST} does not say format {FORMAT!r}: a foreign checkpoint; {_remedy(path)}")
    if manifest.get("version") != VERSION:
        version = manifest.get("version")
        raise UserError(f"{path} has checkpoint version {version!r}, this program reads {VERSION}; {_remedy(path)}")
    files = manifest.get("files")
    if not isinstance(files, dict) or not all(isinstance(files.get(name), dict) for name in (TENSORS, STATE)):
        raise UserError(f"{path / MANIFEST} does not list {TENSORS} and {STATE}; {_remedy(path)}")
    return manifest


def _verify_file(path: Path, name: str, expected: dict[str, Any]) -> None:
    file = path / name
    if not file.is_file():
        raise UserError(f"{file} is missing; {_remedy(path)}")
    size = file.stat().st_size
    if size != expected.get("size"):
        raise UserError(f"{file} is truncated: {size} bytes instead of {expected.get('size')}; {_remedy(path)}")
    if _sha256(file) != expected.get("sha256"):
        raise UserError(f"{file} was altered: its SHA-256 is not the manifest's; {_remedy(path)}")


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        digest = hashlib.sha256()
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _remedy(path: Path) -> str:
    siblings = [other for other in _checkpoints(path.parent) if other != path]
    if _NAME.fullmatch(path.name):
        siblings = [other for other in siblings if _iteration(other) < _iteration(path)]
    return f"resume from {siblings[-1]} instead" if siblings else "there is no earlier checkpoint: start the run anew"


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
    state_dict = unflatten_state(tensors, rest)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    saved = [index for group in state_dict["param_groups"] for index in group["params"]]
    if len(saved) != len(parameters):
        raise UserError(
            f"the checkpoint's optimizer has {len(saved)} parameters, this run has {len(parameters)}: "
            "resume with the configuration the checkpoint was written with"
        )
    for index, parameter in zip(saved, parameters):
        for name, value in state_dict["state"].get(index, {}).items():
            _check_slot(f"{name} of parameter {index}", value, parameter)
    try:
        optimizer.load_state_dict(state_dict)
    except ValueError as error:  # groups of other sizes
        raise UserError(f"the checkpoint's optimizer does not fit this run: {error}") from error


def _check_slot(name: str, value: Any, parameter: Tensor) -> None:
    if not isinstance(value, Tensor) or value.dim() == 0:  # step counters keep their own dtype
        return
    if value.shape != parameter.shape or (value.is_floating_point() and value.dtype != parameter.dtype):
        raise UserError(
            f"the checkpoint's optimizer state {name} is {value.dtype} {list(value.shape)}, the parameter is "
            f"{parameter.dtype} {list(parameter.shape)}: resume with the configuration the checkpoint was written with"
        )
