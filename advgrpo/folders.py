"""Folders that a command writes to."""

from __future__ import annotations

import os
from pathlib import Path

from .errors import UserError


def writable(folder: Path, field: str, *, leave: bool = True) -> None:
    """Create the folder and prove that it can be written to; UserError naming the setting or flag `field`.

    Several processes may do this at once. Without `leave` a folder that was not there is gone again.
    """
    probe = folder / f".writable-{os.getpid()}"
    try:
        existed = folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_text("")
        probe.unlink()
        if not (existed or leave):
            folder.rmdir()
    except OSError as error:
        given = f"{field} {folder}" if field.startswith("--") else f"{field} = {str(folder)!r}"
        raise UserError(f"{given} is not writable: {error.strerror or error}; choose another folder") from error
