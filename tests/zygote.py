"""Commands in forks of one process that has imported the trainer, which takes an interpreter of its own six seconds.

    process = Forked("advgrpo.train:main", ["--config", "settings.yaml"])   # as subprocess.Popen
    done = run("advgrpo.train:main", [...], processes=2)                    # as subprocess.run, under torchrun's agent

A fork has the environment, the arguments, the exit code and the signals of a command, and dies of SIGKILL like one.
What it has not: imports of its own, torchrun's command line, and rendered curves (curves.py); test_run.py and
test_distributed.py start the first two for real. The process that forks has neither run an operator nor started a
thread; one serves all tests of a pytest process.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
POLL_SECONDS = 0.02


class Forked:
    """A function of a module, "module:function" of a list of arguments, run as a command.

    Args:
        environment: all of it.
        processes, restarts: more than one process: so many, started by torchrun's agent, and again after a failure.
        merged: standard error goes where standard output goes.
    """

    def __init__(
        self,
        entry: str,
        arguments: Sequence[str],
        *,
        environment: dict[str, str],
        processes: int = 1,
        restarts: int = 0,
        merged: bool = False,
    ):
        self._folder = tempfile.TemporaryDirectory(prefix="forked-")
        out = os.path.join(self._folder.name, "out")
        files = [out, out if merged else os.path.join(self._folder.name, "err")]
        if processes > 1:
            entry, arguments = "tests.zygote:launch", [str(processes), str(restarts), entry, *arguments]
        self.args, self._merged, self.returncode = [entry, *arguments], merged, None
        self.pid = _zygote().fork({"entry": entry, "arguments": [*map(str, arguments)], "env": environment,
                                   "files": files, "folder": os.getcwd()})  # fmt: skip

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def poll(self) -> int | None:
        """The exit code, or less the signal that it died of; None while it runs."""
        if self.returncode is None:
            self.returncode = _zygote().code(self.pid)
        return self.returncode

    def said(self) -> str:
        """What it has written to standard output so far."""
        file = Path(self._folder.name) / "out"
        return file.read_text() if file.exists() else ""

    def communicate(self, timeout: float = 300) -> tuple[str, str]:
        """What it wrote to standard output and standard error, once it has ended; kills it after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                self.send_signal(signal.SIGKILL)
                raise subprocess.TimeoutExpired(self.args, timeout)
            time.sleep(POLL_SECONDS)
        out, err = (Path(self._folder.name, name) for name in ("out", "err"))
        return out.read_text(), "" if self._merged else err.read_text()


def run(entry: str, arguments: Sequence[str], *, timeout: float = 300, **how: Any) -> subprocess.CompletedProcess[str]:
    """`Forked`, to its end."""
    process = Forked(entry, arguments, **how)
    out, err = process.communicate(timeout)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


class _Zygote:
    """The other side of `serve`."""

    def __init__(self) -> None:
        paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
        environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.zygote"], cwd=ROOT, env=environment, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, bufsize=0,
        )  # fmt: skip
        self._codes: dict[int, int] = {}
        self._one = threading.Lock()  # of several threads at the pipes
        atexit.register(self._process.stdin.close)

    def fork(self, what: dict[str, Any]) -> int:
        with self._one:
            self._process.stdin.write(json.dumps(what).encode() + b"\n")
            while "pid" not in (said := self._read()):
                pass
            return said["pid"]

    def code(self, pid: int) -> int | None:
        with self._one:
            while pid not in self._codes and select.select([self._process.stdout], [], [], 0)[0]:
                self._read()
            return self._codes.get(pid)

    def _read(self) -> dict[str, int]:
        line = self._process.stdout.readline()
        assert line, f"the process that forks has ended with {self._process.wait()}"
        said = json.loads(line)
        if "ended" in said:
            self._codes[said["ended"]] = said["code"]
        return said


_MADE = threading.Lock()


def _zygote() -> _Zygote:
    with _MADE:
        return _only()


@functools.cache
def _only() -> _Zygote:
    return _Zygote()


def serve() -> None:
    """Fork for every line of standard input; tell who was born and who has died."""
    requests, answers = os.fdopen(os.dup(0), "rb", buffering=0), os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # what libraries print is no answer
    gc.disable()  # what is imported stays: looking for what does not is a fifth of the time
    importlib.import_module("advgrpo.train")
    importlib.import_module("advgrpo.training.run").draw_curves = importlib.import_module("tests.curves").choose
    gc.freeze()
    gc.enable()
    while True:
        if select.select([requests], [], [], POLL_SECONDS)[0]:
            line = requests.readline()
            if not line:
                gc.unfreeze()  # or extension modules complain of leaks
                return
            pid = os.fork()
            if not pid:
                requests.close()
                answers.close()
                _become(**json.loads(line))
            answers.write(json.dumps({"pid": pid}).encode() + b"\n")
        with contextlib.suppress(ChildProcessError):
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid:
                answers.write(json.dumps({"ended": pid, "code": os.waitstatus_to_exitcode(status)}).encode() + b"\n")


def _become(*, entry: str, arguments: list[str], env: dict[str, str], files: list[str], folder: str) -> None:
    """Be the command; never returns."""
    code = 1
    try:
        for descriptor, file in enumerate(("/dev/null", *files)):
            opened = os.open(file, os.O_RDWR | os.O_APPEND | os.O_CREAT)
            os.dup2(opened, descriptor)
            os.close(opened)
        os.environ.clear()
        os.environ.update(env)
        os.chdir(folder)
        sys.argv = [entry, *arguments]
        code = _code_of(_function(entry), arguments)
    except BaseException:
        traceback.print_exc()
    finally:
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _function(entry: str) -> Any:
    module, name = entry.split(":")
    return getattr(importlib.import_module(module), name)


def _code_of(function: Any, arguments: list[str]) -> int:
    try:
        return int(function(arguments) or 0)
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else int(error.code is not None)


def launch(arguments: list[str]) -> int:
    """[processes, restarts, entry, *arguments]: what `torchrun --standalone` does, but that its processes are forks."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, record
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    processes, restarts, *rest = arguments
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=int(processes), max_restarts=int(restarts), run_id=uuid.uuid4().hex,
        rdzv_backend="c10d", rdzv_endpoint="localhost:0", start_method="fork", monitor_interval=0.1,
    )  # fmt: skip
    try:
        record(elastic_launch(config, _member))(*rest)  # the first error goes into TORCHELASTIC_ERROR_FILE
    except ChildFailedError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _member(entry: str, *arguments: str) -> None:
    """A process of several."""
    sys.exit(_code_of(_function(entry), [*arguments]))


if __name__ == "__main__":
    serve()
