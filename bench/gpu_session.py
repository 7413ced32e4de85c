"""Minutes with a lent GPU, in commands of ten at most: `python3 -m bench.gpu_session PART... --out DIR`.

    make gpu-carry                                     at home, once: what such a machine lacks, into .whl/ (not in git)
    make gpu-rehearsal                                 at home: every part at small size, in that machine's versions
    python3 -m bench.gpu_session --out DIR             there: smoke and step, 9.5 minutes
    python3 -m bench.gpu_session profile --out DIR --limit 150      at once after it, while the machine is held
    python -m bench.collect DIR                        at home: bench/results/<gpu>/ with tables and pictures

Parts run in the order they are named in, whatever became of those before; each has a predicted time and a limit, which
a watchdog holds it to: an interrupt (pytest then still prints what it has found), five seconds later the end of its
whole process group. What no longer fits into `--limit` is left out and said. Figures are written by the parts
themselves after every measurement, straight into `--out`, so whatever ends the machine loses the row under way.

At most eight files come back, of 16 MiB each: session.log (everything, as it happens), session.json (times and exits of
the parts), logs.tar.gz (the log of every step) and up to five of the parts, whose names are in `PARTS`. Parts that
would leave more are refused together.

The machine has a CUDA GPU, python3 with torch, triton, pytest, numpy, transformers, peft, accelerate, matplotlib and
rich, nvcc, perhaps ncu and compute-sanitizer; no network, no diffusers, no pydantic. `.whl/` brings the rest: wheels,
unpacked into build/gpu/site, and kernels compiled for its GPU, unpacked into Triton's cache. PYTHONPATH is kept.

`--device cpu` rehearses at small size. Only the standard library is imported here: this must run where nothing else
does.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[1]
CARRIED = ROOT / ".whl"
KEPT = ROOT / "build" / "gpu"  # ignored by git: stays there between the commands of a machine that is held
MOST_FILES, MOST_BYTES = 8, 16 * 2**20  # what comes back of a command
OWN_FILES = ("session.log", "session.json", "logs.tar.gz")
LORA = "pytorch_lora_weights.safetensors"  # of the embedded world, to be judged at home
LOG_BYTES = 12 * 2**20  # session.log ends there, the step's own log goes on
LONGEST_PART = 480  # seconds
TO_PACK = 10  # seconds of the limit kept for the end
TO_BEGIN = 5  # fewer are not worth a start
GRACE = 5  # seconds between the interrupt and the end
DEFAULT = ("smoke", "step")
COUNTED = "gaussian|residual|gelu|qk"  # kernels whose hardware counters are read
PROBE = """
import json, platform, torch, triton
gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
print(json.dumps(dict(python=platform.python_version(), torch=torch.__version__, triton=triton.__version__, gpu=gpu)))
"""
CARRIED_PACKAGES = (
    "import importlib.util as i; raise SystemExit(not (i.find_spec('pydantic') and i.find_spec('diffusers')))"
)


@dataclass(frozen=True)
class Step:
    """One process: what follows `python3`, or a program; how much of its part's time it may take at most."""

    name: str
    words: tuple[str, ...]
    share: float = 1.0
    program: bool = False  # `words` name the program themselves


@dataclass(frozen=True)
class Part:
    """predicted, limit: seconds on the GPU, of which `limit` is enforced; files: what it leaves in the folder."""

    predicted: int
    limit: int
    files: tuple[str, ...]
    steps: Callable[[Session, float], Iterator[Step]]


class Session:
    """One command: its parts, its clock, what it has to say about them."""

    def __init__(self, args: argparse.Namespace, work: Path) -> None:
        self.args, self.work = args, work
        self.begun = time.monotonic()
        self.out: Path = args.out.resolve()
        self.out.mkdir(parents=True, exist_ok=True)
        (work / "logs").mkdir()
        self.log = (self.out / "session.log").open("ab", buffering=0)
        self.environment = environment(os.environ, args.device)
        self.python = args.python
        self.facts: dict[str, Any] = {"device": args.device, "limit": args.limit, "parts": {}}
        self.running: subprocess.Popen | None = None

    @property
    def left(self) -> float:
        """Seconds of the command."""
        return self.args.limit * self.args.patience - (time.monotonic() - self.begun)

    @property
    def on_gpu(self) -> bool:
        return self.args.device == "cuda"

    @property
    def size(self) -> str:
        return "full" if self.on_gpu else "small"

    def say(self, text: str) -> None:
        self._write(f"{text}\n".encode())

    def _write(self, text: bytes) -> None:
        with contextlib.suppress(OSError):  # a closed terminal must not end what the log keeps
            sys.stdout.buffer.write(text)
            sys.stdout.buffer.flush()
        if self.log.tell() < LOG_BYTES:
            self.log.write(text)

    def run(self, names: Sequence[str]) -> int:
        """0 if every step of every part ended well."""
        expected = sum(PARTS[name].predicted for name in names) if self.on_gpu else 0
        if expected > self.args.limit:
            self.say(f"predicted: {expected} s, but the limit is {self.args.limit:g}: the last part will be cut short")
        well = self._prepare()
        for name in names if well else ():
            well = self._part(name) and well
        return 0 if self._close() and well else 1

    def _prepare(self) -> bool:
        """Wheels and compiled kernels in their place, the machine described; False where nothing can run."""
        if self.on_gpu:
            self._describe("nvidia-smi", ("nvidia-smi", "-q", "-d", "CLOCK,POWER,PERFORMANCE"))
        unpack_kernels(self)
        if not unpack_wheels(self):
            return False
        self.say(f"{self.python}, PYTHONPATH {self.environment['PYTHONPATH']}")
        said = subprocess.run(
            [self.python, "-c", PROBE], env=self.environment, cwd=ROOT, capture_output=True, text=True
        )
        self.say((said.stdout + said.stderr[-3000:]).strip())
        try:
            self.facts["machine"] = json.loads(said.stdout.splitlines()[-1])
        except (IndexError, ValueError):
            self.say("python3 has no torch and triton that can be imported: nothing can run")
            return False
        if self.on_gpu and self.facts["machine"]["gpu"] is None:
            self.say("torch sees no GPU: --device cpu rehearses without one")
            return False
        return True

    def _describe(self, name: str, command: tuple[str, ...]) -> None:
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            said = subprocess.run(command, capture_output=True, text=True, timeout=20)
            (self.work / "logs" / f"{name}.log").write_text(said.stdout + said.stderr)

    def _part(self, name: str) -> bool:
        part, begun = PARTS[name], time.monotonic()
        limit = min(part.limit * self.args.patience, self.left - TO_PACK)
        row: dict[str, Any] = {"predicted": part.predicted, "limit": round(max(0.0, limit), 1), "steps": []}
        self.facts["parts"][name] = row
        if limit < TO_BEGIN:
            self.say(f"== {name}: left out, {max(0, self.left):.0f} of {self.args.limit:g} s are left")
            row["left_out"] = True
            self._save()
            return False
        self.say(f"== {name}: predicted {part.predicted} s, at most {limit:.0f} s")
        well, end = True, begun + limit
        for step in part.steps(self, limit):
            left = end - time.monotonic()
            if left < TO_BEGIN:
                self.say(f"== {step.name}: left out, {left:.0f} s of the part are left")
                row["steps"].append({"name": step.name, "left_out": True})
                well = False
                continue
            done = self._step(step, min(left, step.share * limit))
            row["steps"].append(done)
            row["seconds"] = round(time.monotonic() - begun, 1)
            well = well and done["exit"] == 0
            self._save()
        row["seconds"] = round(time.monotonic() - begun, 1)
        self.say(f"== {name}: took {row['seconds']} s, predicted {part.predicted}")
        self._save()
        return well

    def _step(self, step: Step, most: float) -> dict[str, object]:
        """Run it under the watchdog, its output to the terminal, session.log and a log of its own."""
        self.say(f"== {step.name}, at most {most:.0f} s")
        command = [*step.words] if step.program else [self.python, *step.words]
        begun = time.monotonic()
        with (self.work / "logs" / f"{step.name}.log").open("ab", buffering=0) as log:
            try:
                process = subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env=self.environment,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    preexec_fn=_begin_as_a_group,
                )
            except OSError as error:
                self.say(f"== {step.name}: {error}")
                return {"name": step.name, "exit": 127, "seconds": 0.0, "limit": round(most, 1)}
            self.running = process
            reader = threading.Thread(target=self._copy, args=(process.stdout, log), daemon=True)
            reader.start()
            late = not ends_within(process, most)
            reader.join(GRACE)
            self.running = None
        code, seconds = process.returncode, round(time.monotonic() - begun, 1)
        self.say(f"== {step.name}: {'stopped' if late else f'exit {code}'} after {seconds} s")
        return {"name": step.name, "exit": 124 if late else code, "seconds": seconds, "limit": round(most, 1)}

    def _copy(self, pipe: IO[bytes], log: IO[bytes]) -> None:
        for chunk in iter(lambda: os.read(pipe.fileno(), 65536), b""):
            log.write(chunk)
            self._write(chunk)

    def _save(self) -> None:
        """Times and logs as far as they are known, whole or not at all."""
        temporary = self.work / "session.json"
        temporary.write_text(json.dumps(self.facts, indent=1) + "\n")
        shutil.copy(temporary, self.out / "session.json.new")
        os.replace(self.out / "session.json.new", self.out / "session.json")
        packed = self.work / "logs.tar.gz"
        with tarfile.open(packed, "w:gz") as archive:
            archive.add(self.work / "logs", "logs")
        shutil.copy(packed, self.out / "logs.tar.gz.new")
        os.replace(self.out / "logs.tar.gz.new", self.out / "logs.tar.gz")

    def _close(self) -> bool:
        """What came of it; False where something cannot come back."""
        self._save()
        for line in times(self.facts["parts"]):
            self.say(line)
        problems = cannot_come_back(self.out)
        for problem in problems:
            self.say(problem)
        return not problems

    def stop(self, signum: int, frame: object) -> None:
        """Asked to end: the step under way is ended, what is known is packed."""
        if self.running is not None:
            end(self.running)
        self.say(f"stopped by {signal.Signals(signum).name}")
        self._save()
        sys.exit(128 + signum)


def environment(outside: Mapping[str, str], device: str) -> dict[str, str]:
    """Of every process: ours first on PYTHONPATH, then what was there; nothing buffered, no network asked."""
    paths = [".", "kernels", *filter(None, [outside.get("PYTHONPATH")])]
    own = {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    found = {**outside, "OMP_WAIT_POLICY": "PASSIVE", **own}
    if device == "cuda":
        found.pop("TRITON_INTERPRET", None)
        found.setdefault("TRITON_CACHE_DIR", str(KEPT / "triton"))
        library = KEPT / "advgrpo_cuda.so"
        found.setdefault("ADVGRPO_KERNELS_LIBRARY", str(library))
    return found


def unpack_wheels(session: Session) -> bool:
    """.whl/*.whl, if the machine lacks what they hold; False where it does and they were not carried."""

    def there() -> bool:
        probe = [session.python, "-c", CARRIED_PACKAGES]
        return subprocess.run(probe, env=session.environment, cwd=ROOT, capture_output=True).returncode == 0

    if there():
        return True
    session.environment["PYTHONPATH"] += f"{os.pathsep}{KEPT / 'site'}"
    if there():  # an earlier command of this machine has unpacked them
        return True
    wheels = sorted(map(str, CARRIED.glob("*.whl")))
    if not wheels:
        session.say("no pydantic or no diffusers here and no .whl/: run make gpu-carry and carry .whl/ along")
        return False
    options = ("-q", "--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--upgrade")
    command = [session.python, "-m", "pip", "install", *options, "--target", str(KEPT / "site"), *wheels]
    done = subprocess.run(command, env=session.environment, cwd=ROOT, capture_output=True, text=True)
    session.say((done.stdout + done.stderr).strip() or f"{len(wheels)} wheels unpacked")
    return done.returncode == 0


def unpack_kernels(session: Session) -> None:
    """Compiled kernels into Triton's cache, where they do not lie yet."""
    archive, cache = CARRIED / "triton-cache.tar.gz", KEPT / "triton"
    if session.on_gpu and archive.exists() and not cache.exists():
        session.say(f"{unpack_cache(archive, cache)} compiled kernels unpacked")


def unpack_cache(archive: Path, cache: Path) -> int:
    """What bench/warm_cache.py has packed into the empty folder `cache`; returns the number of kernels.

    Triton keeps absolute paths beside its binaries: those of this machine are written.
    """
    cache.mkdir(parents=True)
    with tarfile.open(archive) as packed:
        packed.extractall(cache, filter="data")
    groups = list(cache.glob("*/__grp__*.json"))
    for file in groups:
        group = json.loads(file.read_text())
        group["child_paths"] = {name: str(file.parent / name) for name in group["child_paths"]}
        file.write_text(json.dumps(group))
    return len(groups)


def _begin_as_a_group() -> None:
    """In the new process: ended together with what it starts, and with us.

    A step that outlives a killed session would keep the GPU from the next command (Linux: PR_SET_PDEATHSIG).
    """
    os.setpgid(0, 0)
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)


def ends_within(process: subprocess.Popen, seconds: float) -> bool:
    """The watchdog: False if the process had to be ended, with all it has started."""
    try:
        process.wait(seconds)
        return True
    except subprocess.TimeoutExpired:
        end(process)
        return False


def end(process: subprocess.Popen) -> None:
    """As Ctrl-C, so that a test run prints what it has found, then for good."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def cannot_come_back(folder: Path) -> list[str]:
    """What the limits on returned files would cost, in words."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    problems = [
        f"{path.name}: {path.stat().st_size} bytes, {MOST_BYTES} come back"
        for path in files
        if path.stat().st_size > MOST_BYTES
    ]
    if len(files) > MOST_FILES:
        problems.append(f"{len(files)} files, {MOST_FILES} come back: {', '.join(path.name for path in files)}")
    return problems


def times(parts: Mapping[str, dict]) -> Iterator[str]:
    """A line per part: predicted, taken, how its steps ended."""
    yield f"{'part':10}{'predicted s':>12}{'took s':>9}  steps"
    for name, row in parts.items():
        ends = ", ".join(f"{step['name']} {step.get('exit', 'left out')}" for step in row["steps"])
        yield f"{name:10}{row['predicted']:12}{row.get('seconds', 0.0):9.1f}  {ends or 'left out'}"


def _module(name: str, session: Session, *more: str) -> tuple[str, ...]:
    return ("-m", f"bench.{name}", "--device", session.args.device, *more)


def _attention(session: Session) -> tuple[str, ...]:
    return ("--attention", session.args.attention) if session.args.attention else ()


def _csrc(session: Session) -> Iterator[Step]:
    """csrc/ is optional: without it its two ops are refused."""
    target = KEPT / "advgrpo_cuda.so"
    if not session.on_gpu:
        return
    if not shutil.which("nvcc") and "CUDA_HOME" not in os.environ:
        session.say("no nvcc: merge_lora and multi_tensor_adamw of csrc/ are refused")
        session.environment.pop("ADVGRPO_KERNELS_LIBRARY", None)
        return
    newest = max(path.stat().st_mtime for path in (ROOT / "csrc").rglob("*.cu*"))
    if not target.exists() or target.stat().st_mtime < newest:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield Step("build-csrc", ("csrc/build.py", str(target)), 0.35)
    if not target.exists():
        session.environment.pop("ADVGRPO_KERNELS_LIBRARY", None)


def _smoke(session: Session, limit: float) -> Iterator[Step]:
    """At least half of the time is for tests/gpu; then it makes way for the figures."""
    yield from _csrc(session)
    out = str(session.out / "check.json")
    yield Step("check-ops", _module("kernels", session, "--check", "--json", out), 0.5)
    marks = "gpu" if session.on_gpu else "not gpu and not slow"
    yield Step(
        "check-parts", ("-m", "pytest", "tests/gpu", "-v", "-m", marks, "--durations=5", "-p", "no:cacheprovider")
    )


def _figures(name: str, session: Session, limit: float, *more: str) -> Iterator[Step]:
    """A bench that keeps to `--seconds` by itself; 30 s before the watchdog, on a GPU, to build what it times."""
    yield from _csrc(session)
    out, seconds = str(session.out / f"{name}.json"), max(10, int(session.left - TO_PACK - 30))
    seconds = min(seconds, max(10, int(limit) - 30))
    yield Step(name, _module(name, session, "--seconds", str(seconds), "--json", out, *more))


def _train(session: Session, limit: float) -> Iterator[Step]:
    yield from _figures("train", session, limit, "--size", session.size, "--lora", str(session.out))


def _profile(session: Session, limit: float) -> Iterator[Step]:
    yield from _csrc(session)
    out, trace = str(session.out / "profile.json"), str(session.out / "trace.json.gz")
    yield Step(
        "profile",
        _module("profile", session, "--size", session.size, "--json", out, "--trace", trace, *_attention(session)),
        0.75,
    )
    if shutil.which("ncu"):  # counters of one call of the kernels that the tables sell
        what = ("--op", "gaussian_step", "--op", "gated_residual", "--op", "gelu", "--op", "qk_rms_norm")
        full = ("--full",) if session.on_gpu else ()
        ncu = ("ncu", "--clock-control", "none", "--kernel-name", f"regex:.*({COUNTED}).*", "--launch-count", "12")
        yield Step("ncu", (*ncu, session.python, *_module("smoke", session, *full, *what)), program=True)
    else:
        session.say("no ncu on this machine: left out")


def _test(session: Session, limit: float) -> Iterator[Step]:
    """First what takes seconds: of tests/policy the few that need a GPU."""
    yield from _csrc(session)
    only_gpu = ("-m", "gpu") if session.on_gpu else ("-m", "gpu", "--collect-only")  # a rehearsal: do they import?
    policy = ("tests/policy/test_transformer.py", "tests/policy/test_attention.py")
    yield Step("test-policy", ("-m", "pytest", *policy, "-q", *only_gpu, "-p", "no:cacheprovider"), 0.4)
    marks = ("-m", "not slow") if session.on_gpu else only_gpu
    yield Step(
        "test",
        ("-m", "pytest", "tests/kernels", "tests/runtime/test_graphs.py", "-q", *marks, "-p", "no:cacheprovider"),
    )


def _sanitize(session: Session, limit: float) -> Iterator[Step]:
    """PyTorch's caching allocator would hide an access out of bounds."""
    yield from _csrc(session)
    if not shutil.which("compute-sanitizer"):
        session.say("sanitize: no compute-sanitizer on this machine, left out")
        return
    probe = ("import torch; torch.zeros(1, device='cuda')" if session.on_gpu else "pass",)
    done = subprocess.run(
        ["compute-sanitizer", session.python, "-c", *probe], env=session.environment, capture_output=True, text=True
    )
    if done.returncode:
        last = (done.stdout + done.stderr).strip().splitlines()[-1:]
        session.say(f"sanitize: compute-sanitizer cannot use this device (virtualised?), left out: {' '.join(last)}")
        return
    session.environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    for tool in ("memcheck", "racecheck", "initcheck"):
        words = (
            "compute-sanitizer",
            "--tool",
            tool,
            "--error-exitcode",
            "9",
            session.python,
            *_module("smoke", session),
        )
        yield Step(f"sanitizer-{tool}", words, 0.5 if tool == "memcheck" else 1.0, program=True)
    del session.environment["PYTORCH_NO_CUDA_MEMORY_CACHING"]


def _step_part(session: Session, limit: float) -> Iterator[Step]:
    yield from _figures("step", session, limit, "--size", session.size, *_attention(session))


# Most valuable first. Predicted: builds and compiles as timed at home (a third of it on that machine's faster cores),
# and `bench/model.py` for what the GPU computes.
PARTS: dict[str, Part] = {
    "smoke": Part(130, 180, ("check.json",), _smoke),
    "step": Part(420, LONGEST_PART, ("step.json",), _step_part),
    "profile": Part(100, 150, ("profile.json", "trace.json.gz"), _profile),
    "train": Part(240, LONGEST_PART, ("train.json", LORA), _train),
    "kernels": Part(265, LONGEST_PART, ("kernels.json",), lambda s, limit: _figures("kernels", s, limit)),
    "tune": Part(240, LONGEST_PART, ("tune.json",), lambda s, limit: _figures("tune", s, limit)),
    "sanitize": Part(200, 300, (), _sanitize),
    "test": Part(400, LONGEST_PART, (), _test),
}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python3 -m bench.gpu_session", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} (default: {' '.join(DEFAULT)})")
    parser.add_argument(
        "--out", type=Path, default=os.environ.get("OUT"), help="folder for what comes back (default: $OUT)"
    )
    parser.add_argument("--limit", type=float, default=570, metavar="SECONDS", help="of this command (570)")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu rehearses at small size")
    parser.add_argument(
        "--patience", type=float, default=1.0, metavar="X", help="limits times this: a busy CPU rehearses"
    )
    parser.add_argument("--attention", metavar="NAME", help="model.attention of step and profile")
    parser.add_argument("--python", default="python3", metavar="PROGRAM", help="what runs the parts (python3)")
    args = parser.parse_args(argv)
    args.parts = args.parts or list(DEFAULT)
    if unknown := [name for name in args.parts if name not in PARTS]:
        parser.error(f"unknown part {unknown[0]}: {', '.join(PARTS)}")
    if args.patience != 1 and args.device == "cuda":
        parser.error("--patience is for rehearsals: a lent GPU has none")
    if args.out is None:
        parser.error("--out DIR (or OUT) is missing: the folder for what comes back")
    files = [*OWN_FILES, *{file for name in args.parts for file in PARTS[name].files}]
    if len(files) > MOST_FILES:
        parser.error(f"{' '.join(args.parts)}: {len(files)} files, of which {MOST_FILES} come back; name fewer parts")
    args.out = Path(args.out)
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    with tempfile.TemporaryDirectory() as work:
        session = Session(args, Path(work))
        signal.signal(signal.SIGTERM, session.stop)
        signal.signal(signal.SIGINT, session.stop)
        return session.run(args.parts)


if __name__ == "__main__":
    sys.exit(main())
