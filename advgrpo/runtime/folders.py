"""Folders that a command writes to, and the lock on one that only one run may write to."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import platform
import time
from contextlib import suppress
from pathlib import Path

from advgrpo.errors import UserError

logger = logging.getLogger(__name__)
_POLL_SECONDS = 0.2


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


class FolderLock:
    """FOLDER/.lock, held until `release` or until the process is gone, however it ends.

    Args:
        field: the setting that names the folder.
        patience: seconds to wait for who holds it: where a job is started again, its last start may still be ending.

    Raises:
        UserError: another process holds it; the message says which.
    """

    def __init__(self, folder: Path, field: str, patience: float = 0.0):
        self._descriptor: int | None = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            taken = self._take()
            if patience and not taken:
                logger.warning(
                    "%s is held by %s: waiting for its end, %.0f s at most", folder, self._holder(), patience
                )
                taken = self._take_within(patience)
            if not taken:
                holder = self._holder()
                self.release()
                raise UserError(
                    f"{field} = {str(folder)!r} is in use by {holder or 'another process'}; wait for its end, or "
                    "choose another folder"
                )
        except OSError as error:
            self.release()
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            logger.warning("%s cannot be locked (%s): nothing stops a second run in it", folder, error.strerror)
            return
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, f"process {os.getpid()} on {platform.node()}\n".encode(), 0)

    def _holder(self) -> str:
        """Who holds the folder, as he has left it in the file."""
        return os.pread(self._descriptor, 200, 0).decode(errors="replace").strip()

    def _take(self) -> bool:
        """Whether nobody else holds it: from now on this process does."""
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _take_within(self, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while not (taken := self._take()) and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
        return taken

    def release(self) -> None:
        """May be called twice."""
        if self._descriptor is not None:
            os.close(self._descriptor)
        self._descriptor = None

    def __del__(self) -> None:
        with suppress(OSError, AttributeError):
            self.release()
