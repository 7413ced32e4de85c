"""The GPU session rehearsed without a GPU: `python -m bench.rehearsal --python PROGRAM` (make gpu-rehearsal).

What would travel (files that git does not ignore, and .whl/) is copied to an empty folder: 64 MiB at most. There every
command of `COMMANDS` runs as on the machine: as `python3`, which is PROGRAM; with nothing of this shell's but PATH,
HOME and OUT; on a CPU at small size; with shims where the driver's programs would be. Held are: the exit status; the
command's ten minutes and each part's own limit; at most eight files of 16 MiB with plain names; a row per part in
session.json; and that a session that is killed keeps the rows it had. Then `bench.collect` makes tables and pictures of
what came back.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from . import gpu_session

ROOT = Path(__file__).resolve().parents[1]
MOST_TREE = 64 * 2**20  # bytes that travel
LONGEST_COMMAND = 600  # seconds
COMMANDS = (("smoke", "step"), ("profile", "train"), ("kernels", "tune"), ("sanitize", "test"))
EXECUTES = '#!/usr/bin/env bash\nwhile [ $# -gt 0 ]; do case $1 in --*) shift 2 ;; *) exec "$@" ;; esac; done\n'
SHIMS = {
    "nvidia-smi": "#!/usr/bin/env bash\necho 'a rehearsal: no driver'\n",
    "compute-sanitizer": EXECUTES,  # options with a value each, then the program
    "ncu": EXECUTES,
}


class Rehearsal:
    """A copy of the tree, a PATH with the environment's python3 and the shims, and what went wrong."""

    def __init__(self, python: Path, folder: Path, patience: float) -> None:
        self.patience = patience
        self.folder, self.tree, self.problems = folder, folder / "tree", []
        commands = folder / "bin"
        commands.mkdir()
        # A link would lose the environment: Python looks for it beside the name that it was started by.
        for name, text in {**SHIMS, "python3": f'#!/usr/bin/env bash\nexec "{python}" "$@"\n'}.items():
            (commands / name).write_text(text)
            (commands / name).chmod(0o755)
        self.environment = {"PATH": f"{commands}:/usr/bin:/bin", "HOME": str(folder), "OMP_NUM_THREADS": "1"}

    def copy(self) -> None:
        """What travels, and not a byte of what does not."""
        files = travelling(ROOT)
        size = sum((ROOT / name).stat().st_size for name in files)
        print(f"{len(files)} files of {size / 2**20:.1f} MiB travel, {MOST_TREE / 2**20:.0f} may")
        if size > MOST_TREE:
            self.problems.append(f"{size} bytes would travel, {MOST_TREE} may: carry less in .whl/, or ignore more")
        for name in files:
            target = self.tree / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target)

    def start(self, parts: Sequence[str], out: Path) -> subprocess.Popen:
        command = ["python3", "-m", "bench.gpu_session", *parts, "--device", "cpu", "--patience", str(self.patience)]
        environment = self.environment | {"OUT": str(out)}
        return subprocess.Popen(
            command, cwd=self.tree, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT
        )

    def command(self, parts: Sequence[str]) -> Path:
        """One command; returns the folder of what came back."""
        out, begun = self.folder / "-".join(parts), time.monotonic()
        process = self.start(parts, out)
        if not gpu_session.ends_within(process, LONGEST_COMMAND * self.patience):
            self.problems.append(f"{' '.join(parts)}: not over after {LONGEST_COMMAND * self.patience:g} s")
        print(f"{' '.join(parts)}: exit {process.returncode} after {time.monotonic() - begun:.0f} s")
        if process.returncode:
            log = out / "session.log"
            print(log.read_text()[-6000:] if log.exists() else "no log")
            self.problems.append(f"{' '.join(parts)}: exit {process.returncode}")
        self.problems += problems_of(out, parts, self.patience)
        return out

    def killed(self) -> None:
        """`step`, killed as soon as a first row is on the disk."""
        out = self.folder / "killed"
        process = self.start(["step"], out)
        file, last = out / "step.json", time.monotonic() + LONGEST_COMMAND * self.patience
        while process.poll() is None and time.monotonic() < last and "sampler" not in rows_of(file):
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if rows_of(file).get("sampler", {}).get("rounds", 0) < 1:
            self.problems.append("a step that was killed left no row")
        print(f"killed: {len(rows_of(file))} entries are left")

    def collect(self, folders: Sequence[Path]) -> None:
        target = self.folder / "results"
        command = [sys.executable, "-m", "bench.collect", *map(str, folders), "--results", str(target)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        made = {path.name for path in target.rglob("*")} if target.exists() else set()
        if done.returncode or not {"README.md", "step.png"} <= made:
            self.problems.append(f"collect: exit {done.returncode}, made {sorted(made)}\n{done.stderr[-2000:]}")
        print(done.stdout)


def travelling(root: Path) -> list[str]:
    """Files that git does not ignore, and what is carried beside them."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.split("\0")
    carried = [path.relative_to(root).as_posix() for path in (root / ".whl").rglob("*") if path.is_file()]
    return sorted({name for name in (*listed, *carried) if name and (root / name).is_file()})


def rows_of(file: Path) -> dict:
    return json.loads(file.read_text()) if file.exists() else {}


def problems_of(out: Path, parts: Sequence[str], patience: float = 1.0) -> list[str]:
    """What would be lost of these files, and which parts say nothing."""
    problems = gpu_session.cannot_come_back(out)
    names = [path.relative_to(out).as_posix() for path in out.rglob("*")]
    problems += [
        f"{name}: a name that does not come back" for name in names if not re.fullmatch(r"[\w.-]+", name, re.A)
    ]
    session = rows_of(out / "session.json").get("parts", {})
    for name in parts:
        part = gpu_session.PARTS[name]
        took = session.get(name, {}).get("seconds")
        if took is None:
            problems.append(f"{name}: no row in session.json")
        elif took > part.limit * patience + gpu_session.GRACE + 1:
            problems.append(f"{name}: took {took} s, its limit is {part.limit}")
        problems += [f"{name}: no {file}" for file in part.files if not (out / file).exists()]
    return problems


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.rehearsal", description=__doc__.split("\n\n")[0])
    parser.add_argument("--python", type=Path, required=True, metavar="PROGRAM", help="of the machine's versions")
    parser.add_argument(
        "--command", action="append", metavar="PARTS", help="only this one, as 'smoke step'; may be repeated"
    )
    parser.add_argument("--patience", type=float, default=1.0, metavar="X", help="limits times this, on a busy machine")
    args = parser.parse_args(argv)
    commands = [tuple(each.split()) for each in args.command] if args.command else COMMANDS
    if unknown := [name for parts in commands for name in parts if name not in gpu_session.PARTS]:
        parser.error(f"unknown part {unknown[0]}: {', '.join(gpu_session.PARTS)}")
    if not os.access(args.python, os.X_OK):
        parser.error(f"--python {args.python}: no program; make gpu-rehearsal makes one")
    with tempfile.TemporaryDirectory() as folder:
        rehearsal = Rehearsal(args.python.absolute(), Path(folder), args.patience)
        rehearsal.copy()
        folders = [rehearsal.command(parts) for parts in commands]
        if any("step" in parts for parts in commands):
            rehearsal.killed()
            rehearsal.collect(folders)
        for problem in rehearsal.problems:
            print(f"PROBLEM: {problem}")
        print("the session would keep its results" if not rehearsal.problems else f"{len(rehearsal.problems)} problems")
    return 1 if rehearsal.problems else 0


if __name__ == "__main__":
    sys.exit(main())
