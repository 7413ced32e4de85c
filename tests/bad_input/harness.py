"""Runs commands in forked children of one process that has imported everything: half a second each instead of ten.

Reads a JSON request per line, {"command", "arguments", "folder", "environment", "seconds"}, and answers with
{"code", "out", "err", "phase", "seconds"}. The phase is how far the command came: "checks", "loading" (a weight was
read) or "work" (it drew, trained or served), where the child is ended with code 77.
"""

from __future__ import annotations

import functools
import gc
import importlib
import json
import os
import pkgutil
import signal
import sys
import time
from pathlib import Path

import advgrpo
from tests.commands import COMMANDS, main_of

WORKED, TOO_LONG = 77, 78
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


def child(main, request: dict, folder: Path) -> None:
    """Never returns."""
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    signal.signal(signal.SIGALRM, lambda *_: os._exit(TOO_LONG))
    signal.alarm(request["seconds"])
    try:
        code = main(request["arguments"])
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def serve(scratch: Path, pipeline: str) -> None:
    global _phase_file
    gc.disable()  # what is imported stays, and a child is short
    mains, _phase_file = prepare(pipeline), scratch / "phase"
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        _phase_file.write_text("checks")
        started = time.monotonic()
        pid = os.fork()
        if pid == 0:
            child(mains[request["command"]], request, scratch)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        texts = {name: (scratch / name).read_text(errors="replace") for name in ("out", "err")}
        answer = {"code": code, "phase": _phase_file.read_text(), "seconds": time.monotonic() - started, **texts}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve(Path(sys.argv[1]), sys.argv[2])
