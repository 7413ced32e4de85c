"""Runs commands in forked children of one process that has imported everything: a fiftieth of a second each instead of
ten seconds.

Reads a JSON request per line, {"command", "arguments", "folder", "environment", "seconds"}, and answers with
{"code", "out", "err", "phase", "seconds"}. The phase is how far the command came: "checks", "loading" (a weight was
read) or "work" (it drew, trained or served), where the child is ended with code 77.

A child takes one command after another while they are refused by checks: a fork, and the memory that its first command
touches, take four times what the checks do. Who came further leaves; so does who has had TURNS.
"""

from __future__ import annotations

import functools
import gc
import importlib
import json
import os
import pkgutil
import select
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import advgrpo
from tests.commands import COMMANDS, main_of

WORKED, TOO_LONG = 77, 78
TURNS, POLL_SECONDS = 20, 0.1
REFUSED = 2  # the exit code of bad input
_phase_file: Path | None = None


def reached(phase: str) -> None:
    """Note it; work itself is not done."""
    _phase_file.write_text(phase)
    if phase == "work":
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(WORKED)


def watch(owner: type, name: str, phase: str) -> None:
    """`owner.name` tells the phase before it does what it did; a class method stays one."""
    original = owner.__dict__[name]
    call = original.__func__ if isinstance(original, (classmethod, staticmethod)) else original

    @functools.wraps(call)
    def told(*arguments, **options):
        reached(phase)
        return call(*arguments, **options)

    setattr(owner, name, classmethod(told) if isinstance(original, classmethod) else told)


def prepare(pipeline: str) -> dict[str, object]:
    """Import everything, make what every check of the world's pipeline asks for, and set the watches; {command: main}."""
    import socketserver

    import diffusers
    import transformers

    mains = {name: main_of(name) for name in COMMANDS}
    for module in pkgutil.walk_packages(advgrpo.__path__, "advgrpo."):  # also what a command imports late
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    preflight = importlib.import_module("advgrpo.training.preflight")
    preflight.check_size(
        preflight.check_model(pipeline, "model.path"), 32, model_field="model.path", field="resolution"
    )
    for kind in (diffusers.ModelMixin, diffusers.DiffusionPipeline, transformers.PreTrainedModel):
        watch(kind, "from_pretrained", "loading")
    evaluation = importlib.import_module("advgrpo.evaluation.evaluator")
    watch(evaluation.Evaluator, "images", "work")
    watch(importlib.import_module("advgrpo.training.trainer").Trainer, "iterate", "work")
    watch(importlib.import_module("advgrpo.references.builder").ReferenceBuilder, "build", "work")
    watch(socketserver.BaseServer, "serve_forever", "work")
    for pipeline in ("StableDiffusion3Pipeline", "StableDiffusionPipeline", "StableDiffusionXLPipeline"):
        watch(getattr(diffusers, pipeline), "__call__", "work")
    runs = importlib.import_module("advgrpo.experiments.runs")
    runs.make_all = lambda *_: reached("work")
    return mains


class Child:
    """A fork that takes one command after another."""

    def __init__(self, mains: Mapping[str, Callable], folder: Path):
        (requests, self._ask), (self._answers, answer) = os.pipe(), os.pipe()
        self._pid, self._turns, self._code = os.fork(), 0, None
        if not self._pid:
            os.close(self._ask)  # or it would not see the end of its requests
            with open(requests) as lines:
                for line in lines:
                    os.write(answer, b"%4d" % _run(mains, json.loads(line), folder))
            os._exit(0)
        os.close(requests)
        os.close(answer)

    def run(self, line: str) -> int:
        """The command's exit code, or what the child ended with."""
        self._turns += 1
        os.write(self._ask, line.encode())
        while not select.select([self._answers], [], [], POLL_SECONDS)[0]:
            if self._has_ended():  # and left the pipe to a child of its own
                return self._code
        return int(os.read(self._answers, 4) or self._end())

    def leave(self, code: int, phase: str) -> bool:
        """Whether the next command gets another child, because this one was not refused by checks or had its turns."""
        if self._code is None and code == REFUSED and phase == "checks" and self._turns < TURNS:
            return False
        os.close(self._ask)
        self._end()
        os.close(self._answers)
        return True

    def _has_ended(self, how: int = os.WNOHANG) -> bool:
        if self._code is None and (found := os.waitpid(self._pid, how))[0]:
            self._code = os.waitstatus_to_exitcode(found[1])
        return self._code is not None

    def _end(self) -> int:
        self._has_ended(0)
        return self._code


def _run(mains: Mapping[str, Callable], request: dict, folder: Path) -> int:
    """One command, in a child."""
    for number, name in ((1, "out"), (2, "err")):
        opened = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(opened, number)
        os.close(opened)
    kept = dict(os.environ)
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    signal.signal(signal.SIGALRM, lambda *_: os._exit(TOO_LONG))
    signal.alarm(request["seconds"])
    try:
        code = mains[request["command"]](request["arguments"])
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    signal.alarm(0)
    sys.stdout.flush()
    sys.stderr.flush()
    os.environ.clear()
    os.environ.update(kept)
    return code


def serve(scratch: Path, pipeline: str) -> None:
    global _phase_file
    gc.disable()  # what is imported stays, and a child is short
    mains, _phase_file = prepare(pipeline), scratch / "phase"
    print("ready", flush=True)
    child = None
    for line in sys.stdin:
        _phase_file.write_text("checks")
        started = time.monotonic()
        child = child or Child(mains, scratch)
        code, phase = child.run(line), _phase_file.read_text()
        texts = {name: (scratch / name).read_text(errors="replace") for name in ("out", "err")}
        answer = {"code": code, "phase": phase, "seconds": time.monotonic() - started, **texts}
        print(json.dumps(answer), flush=True)
        if child.leave(code, phase):
            child = None


if __name__ == "__main__":
    serve(Path(sys.argv[1]), sys.argv[2])
