"""Files and folders that are whole or absent: written beside their place, forced to the disk, renamed into it.

Everything this package leaves on a disk goes through here, but for what is appended to (metrics.jsonl, logs,
TensorBoard's events); tests/runtime/test_atomic.py looks for others. A killed process leaves a hidden name that ends in
`SUFFIX` beside what was there before.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

SUFFIX = ".tmp"
_OLD = f".old{SUFFIX}"
_SHOWN = 40  # characters of the name in that of the temporary file: the system's limit is near 255 bytes

Content = str | bytes | Callable[[Path], object]


def write_atomically(path: Path, content: Content) -> None:
    """All of the file or nothing; once this returns, a power cut does not lose it either.

    Args:
        path: its folder is made where there is none.
        content: text (written as UTF-8), bytes, or a function that fills the file whose path it is given. That name has
            another suffix, so the function must say which format it means.

    The file may be read by whom the umask lets, whatever the function chose (safetensors: its owner alone).

    Raises:
        OSError: it cannot be written; what was there before is untouched. So it is by any error of the function.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # random: another machine may write the same name in a shared folder
    temporary = path.with_name(f".{path.name[:_SHOWN]}.{secrets.token_hex(4)}{SUFFIX}")
    try:
        mode = _make_file(temporary)
        _fill(temporary, content)
        temporary.chmod(mode)
        force_to_disk(temporary)
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            remove(temporary)
        raise
    force_to_disk(path.parent)  # makes the rename itself survive


def write_folder_atomically(path: Path, fill: Callable[[Path], object]) -> None:
    """The same for a folder: `fill` gets an empty one; what was at `path` is replaced as a whole.

    Folders cannot replace folders, so the old one is moved aside first. `recover` puts it back if a process is killed
    between the two renames. One process at a time may write a folder.

    Raises:
        OSError: as `write_atomically`.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}{SUFFIX}")
    path.parent.mkdir(parents=True, exist_ok=True)
    recover(path)
    remove(temporary)
    temporary.mkdir()
    try:
        mode = _make_file(temporary / f".mode{SUFFIX}")
        remove(temporary / f".mode{SUFFIX}")
        fill(temporary)
        for folder, _, names in os.walk(temporary):
            for name in names:
                Path(folder, name).chmod(mode)
                force_to_disk(Path(folder, name))
            force_to_disk(Path(folder))
        if path.exists():
            os.replace(path, aside(path))
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            recover(path)
            remove(temporary)
        raise
    force_to_disk(path.parent)
    with suppress(OSError):  # the next write removes it
        remove(aside(path))


def aside(path: Path) -> Path:
    """Where a folder is while another takes its place."""
    return path.with_name(f".{path.name}{_OLD}")


def recover(path: Path) -> None:
    """Undo or finish a replacement of the folder `path` that was cut short."""
    if not aside(path).exists():
        return
    if path.exists():
        remove(aside(path))
    else:
        os.replace(aside(path), path)


def remove(path: Path) -> None:
    """A file, a link or a folder with all that is in it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def clean(folder: Path) -> None:
    """Finish or undo what processes that were killed left in a folder that nobody else writes to now."""
    for moved in folder.glob(f".*{_OLD}"):
        recover(folder / moved.name[1 : -len(_OLD)])
    for leftover in folder.glob(f".*{SUFFIX}"):
        with suppress(OSError):  # it is in nobody's way
            remove(leftover)


def move_aside(path: Path) -> Path:
    """Rename `path` to the first free NAME.old-N, which is returned."""
    number = 1
    while (target := path.with_name(f"{path.name}.old-{number}")).exists():
        number += 1
    os.replace(path, target)
    force_to_disk(path.parent)
    return target


def force_to_disk(path: Path) -> None:
    """fsync of a file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _make_file(path: Path) -> int:
    """A new empty file; its permissions, which are the umask's."""
    with open(path, "xb") as file:
        return os.fstat(file.fileno()).st_mode & 0o777


def _fill(path: Path, content: Content) -> None:
    if isinstance(content, str):
        path.write_bytes(content.encode("utf-8"))
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        content(path)
