"""Images decoded by other processes, ahead of time: the thread that feeds the GPU has other things to do.

Processes, because threads of this one would take its interpreter; started as commands, because a fork under CUDA is
none to rely on and a spawned process imports the caller's script.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
import subprocess
import sys
import threading
import weakref
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO

import numpy as np

from advgrpo.data.images import Fit

MOST_WORKERS = 8  # of one process, where nobody says how many


class WorkerError(RuntimeError):
    """A worker could not decode an image, or has ended."""


def workers_for(setting: str | int, device_type: str) -> int:
    """`data.decode_workers` as a number. "auto": beside a GPU this process's share of the machine's cores but
    one, at most `MOST_WORKERS`; none elsewhere, where the cores compute."""
    if setting != "auto":
        return int(setting)
    if device_type != "cuda":
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(MOST_WORKERS, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) - 1))


class DecodingWorkers:
    """`count` processes (`decoding_worker`), started with their first image; they end with this object, or this
    process."""

    def __init__(self, count: int):
        self.count = count
        self._processes: list[subprocess.Popen] = []
        self._own = threading.local()  # a thread's process
        self._threads = ThreadPoolExecutor(max_workers=count, thread_name_prefix="decoding")
        self._end = weakref.finalize(self, _end, self._threads, self._processes)

    def decode(self, file: Path, fit: Fit) -> Future[np.ndarray]:
        """uint8 [H, W, 3], later; WorkerError where that fails."""
        return self._threads.submit(self._decode, file, fit)

    def close(self) -> None:
        """End the processes; images that are asked for already are decoded first."""
        self._end()

    def _decode(self, file: Path, fit: Fit) -> np.ndarray:
        process = self._process()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps({"file": str(file), "fit": fit}).encode() + b"\n")
            process.stdin.flush()
            height, width = struct.unpack("<II", _read(process.stdout, 8))
            pixels = _read(process.stdout, 3 * height * width)
        except OSError as error:
            del self._own.process  # the next image starts another
            raise WorkerError(f"the process that decodes {file} has ended ({error})") from error
        if not height:
            raise WorkerError(f"{file} cannot be decoded")
        return np.frombuffer(pixels, np.uint8).reshape(height, width, 3)

    def _process(self) -> subprocess.Popen:
        if not hasattr(self._own, "process"):
            command = [sys.executable, "-m", "advgrpo.data.decoding_worker"]
            places = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
            pipe = subprocess.PIPE
            self._own.process = subprocess.Popen(command, env=places, stdin=pipe, stdout=pipe)
            self._processes.append(self._own.process)
        return self._own.process


def _read(stream: IO[bytes], count: int) -> bytearray:
    """Exactly `count` bytes, which may be written to; OSError where the stream ends before."""
    found = bytearray(stream.read(count))
    if len(found) < count:
        raise OSError("its output ends")
    return found


def _end(threads: ThreadPoolExecutor, processes: list[subprocess.Popen]) -> None:
    threads.shutdown(wait=True)
    for process in processes:
        for stream in filter(None, (process.stdin, process.stdout)):
            with contextlib.suppress(OSError):  # it has ended by itself
                stream.close()
        process.wait()
