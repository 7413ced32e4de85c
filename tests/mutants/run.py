"""Plant every bug of tests/mutants/*.patch in a copy of the tree and watch its tests go red: `make mutants`.

A patch is a bug that somebody could make, written against the code. Above its diff stand

    Bug: what is wrong, in a line
    Harm: why a user would care
    Tests: the test files or folders that must go red, files with or without ::test
    Equivalent: why no test can tell it from the code (only where that is so; it is then left out of the score)

Red is a test that fails, or whose fixtures do. Tests that cannot be collected and a run that does not end are no
verdict: such a mutant counts as not caught, and so does one whose tests are red without the bug. Git's `apply` plants
it, without fuzz.

    python -m tests.mutants.run                  those whose patch, tests or touched files are not those of results.json
    python -m tests.mutants.run --all -j 4       all of them, four at a time
    python -m tests.mutants.run NAME ...         these, whatever the results say
    python -m tests.mutants.run --renew NAME     the working tree's `git diff` becomes that patch, and is taken back

What was found is kept in results.json, from which docs/mutants.md is written.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDER = Path("tests/mutants")
RESULTS = FOLDER / "results.json"
PAGE = Path("docs/mutants.md")
GOAL = 0.95
CAUGHT, SURVIVED, BROKEN, LATE = "caught", "survived", "broken", "timed out"
_FIELDS = ("Bug", "Harm", "Tests")
_SUMMARY = re.compile(r"^(?:FAILED|ERROR) (\S+\.py\S*?::.+?|\S+)(?: - .*)?$", re.MULTILINE)


class MutantError(Exception):
    """A patch that says too little, or no longer fits; the message ends with what to do."""


@dataclass(frozen=True)
class Mutant:
    """A patch and what stands above it."""

    name: str
    bug: str
    harm: str
    tests: tuple[str, ...]
    touched: tuple[str, ...]  # files, relative to the root
    text: str
    equivalent: str = ""

    @classmethod
    def read(cls, path: Path) -> Mutant:
        """MutantError for a patch without a diff or one of the lines above it."""
        text = path.read_text(encoding="utf-8")
        above, diff = re.match(r"(.*?)(^diff --git .*)?\Z", text, re.DOTALL | re.MULTILINE).groups()
        found = {name: " ".join(value.split()) for name, value in re.findall(_entry(), above, re.DOTALL | re.MULTILINE)}
        touched = tuple(re.findall(r"^\+\+\+ b/(.+)$", diff or "", re.MULTILINE))
        missing = [name for name in _FIELDS if not found.get(name)] + ([] if touched else ["a diff"])
        if missing:
            raise MutantError(f"{path.name} has no {', no '.join(missing)}: see the docstring of {FOLDER / 'run.py'}")
        tests, equivalent = tuple(found["Tests"].split()), found.get("Equivalent", "")
        return cls(path.stem, found["Bug"], found["Harm"], tests, touched, text, equivalent)

    @property
    def room(self) -> str:
        """The part of the project that the bug is in: runtime, adversary, kernels, ..."""
        first, *rest = self.touched[0].split("/")
        return rest[0] if first == "advgrpo" and len(rest) > 1 else first

    def test_files(self) -> list[str]:
        return sorted({test.split("::")[0] for test in self.tests})

    def key(self, root: Path) -> str:
        """Hash of what the verdict depends on first: the patch, the tests, the files it touches."""
        digest = hashlib.sha256(self.text.encode())
        for name in [*self.test_files(), *self.touched]:
            path = root / name
            for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
                digest.update(b"\0" + file.read_bytes())
        return digest.hexdigest()[:16]


def _entry() -> str:
    names = "|".join([*_FIELDS, "Equivalent"])
    return rf"^({names}):\s(.*?)(?=^(?:{names}):\s|\Z)"


def read_all(root: Path) -> list[Mutant]:
    """Every patch, by name; MutantError as `Mutant.read`."""
    return [Mutant.read(path) for path in sorted((root / FOLDER).glob("*.patch"))]


@dataclass
class Verdict:
    """What the tests said; `by` is the test that went red, or why there is no verdict."""

    outcome: str
    by: str = ""
    seconds: float = 0.0
    key: str = ""


def git_apply(tree: Path, mutant: Mutant, *options: str) -> None:
    """`git apply` in any folder; MutantError where the patch does not fit."""
    done = subprocess.run(
        ["git", "apply", "--whitespace=nowarn", *options],
        cwd=tree,
        input=mutant.text.encode(),
        capture_output=True,
        env={**os.environ, "GIT_CEILING_DIRECTORIES": str(tree.resolve().parent)},
        check=False,
    )
    if done.returncode:
        raise MutantError(
            f"{mutant.name} no longer applies ({done.stderr.decode().strip().splitlines()[0]}): plant its bug in "
            f"{', '.join(mutant.touched)} by hand, then python -m tests.mutants.run --renew {mutant.name}; or delete "
            "the patch if the code it is about is gone"
        )


class Tree:
    """A copy of what git knows of the repository, in which bugs are planted one at a time."""

    def __init__(self, root: Path, folder: Path, timeout: float) -> None:
        self.folder, self.timeout = folder, timeout
        for name in _files(root):
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(root / name, target)

    def judge(self, mutant: Mutant) -> Verdict:
        """Plant, test, take back."""
        git_apply(self.folder, mutant)
        try:
            self._forget_bytecode(mutant)
            for name in mutant.touched:
                if name.endswith(".py"):
                    ast.parse((self.folder / name).read_text(encoding="utf-8"), name)
            return self.test(mutant.tests, "-x")
        except SyntaxError as error:
            return Verdict(BROKEN, f"the patch makes no Python: {error}")
        finally:
            git_apply(self.folder, mutant, "--reverse")
            self._forget_bytecode(mutant)

    def test(self, tests: Iterable[str], *options: str) -> Verdict:
        """Run tests in a process of their own; CAUGHT where one fails."""
        began = time.monotonic()
        command = [sys.executable, "-m", "pytest", "-q", "-rfE", "--tb=line", "-p", "no:cacheprovider", *options]
        paths = [str(self.folder), str(self.folder / "kernels")]
        process = subprocess.Popen(
            [*command, *tests],
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # tests start processes of their own, which end with it
        )
        try:
            output = process.communicate(timeout=self.timeout)[0].decode(errors="replace")
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            return Verdict(LATE, f"no end within {self.timeout:.0f} s", time.monotonic() - began)
        return _read_output(process.returncode, output, time.monotonic() - began)

    def _forget_bytecode(self, mutant: Mutant) -> None:
        """Python compares sizes and whole seconds, and a bug may have the size of what was right."""
        for name in mutant.touched:
            path = self.folder / name
            for compiled in path.parent.glob(f"__pycache__/{path.stem}.*.pyc"):
                compiled.unlink()


def _read_output(code: int, output: str, seconds: float) -> Verdict:
    found = _SUMMARY.findall(output)
    if code == 0:
        return Verdict(SURVIVED, "", seconds)
    if code == 1 and found:
        return Verdict(CAUGHT, found[0], seconds)
    last = next((line for line in reversed(output.splitlines()) if line.strip()), "no output")
    return Verdict(BROKEN, f"pytest ended with {code}: {', '.join(found) or last}", seconds)


def _files(root: Path) -> list[str]:
    """What git tracks or would; every file of a folder that is no repository."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=root, capture_output=True, check=False)
    if listed.returncode or not (root / ".git").exists():
        return [str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()]
    return [name for name in listed.stdout.decode().split("\0") if name and (root / name).is_file()]


@dataclass
class Session:
    """One call of this program."""

    root: Path
    jobs: int = 1
    timeout: float = 900.0
    trusts: bool = False  # that the tests pass without a bug
    results: dict[str, Verdict] = field(default_factory=dict)

    def read_results(self) -> None:
        path = self.root / RESULTS
        if path.is_file():
            entries = json.loads(path.read_text(encoding="utf-8"))
            self.results = {name: Verdict(**entry) for name, entry in entries.items()}

    def write_results(self) -> None:
        entries = {name: vars(self.results[name]) for name in sorted(self.results)}
        temporary = (self.root / RESULTS).with_suffix(".tmp")
        temporary.write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")
        temporary.replace(self.root / RESULTS)

    def run(self, mutants: list[Mutant]) -> None:
        """Judge `mutants`, a line for each; results are kept one by one, so that a run that is cut short goes on."""
        with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
            trees: queue.SimpleQueue[Tree] = queue.SimpleQueue()
            for number in range(min(self.jobs, len(mutants))):
                trees.put(Tree(self.root, Path(folder) / str(number), self.timeout))
            for mutant in mutants:  # all of them before the first test: a patch that does not fit ends the run
                git_apply(self.root, mutant, "--check")
            red = set() if self.trusts else self._red_without_a_bug(mutants, trees)
            width = max(len(mutant.name) for mutant in mutants)
            with ThreadPoolExecutor(self.jobs) as pool:
                asked = {pool.submit(self._judge, mutant, trees, red): mutant for mutant in mutants}
                for number, done in enumerate(as_completed(asked), 1):
                    mutant, verdict = asked[done], done.result()
                    self.results[mutant.name] = verdict
                    self.write_results()
                    shown = f"{verdict.outcome:9} {mutant.name:{width}} {verdict.seconds:4.0f} s"
                    print(f"[{number}/{len(mutants)}] {shown}  {verdict.by}", flush=True)

    def _red_without_a_bug(self, mutants: list[Mutant], trees: queue.SimpleQueue[Tree]) -> set[str]:
        """Tests that fail in the tree as it is: they would catch anything."""
        tests = sorted({test for mutant in mutants for test in mutant.tests})
        print(f"{len(mutants)} mutants, {len(tests)} selections of tests; first without a bug", flush=True)
        tree, red = trees.get(), set()
        verdict = Tree.test(_patient(tree, len(tests)), tests)
        if verdict.outcome != SURVIVED:  # which of them
            red = {test for test in tests if tree.test([test]).outcome != SURVIVED}
            print(f"red without any bug: {', '.join(sorted(red))}", flush=True)
        trees.put(tree)
        return red

    def _judge(self, mutant: Mutant, trees: queue.SimpleQueue[Tree], red: set[str]) -> Verdict:
        useless = red & set(mutant.tests)
        if useless:
            return Verdict(BROKEN, f"{', '.join(sorted(useless))}: red without the bug")
        tree = trees.get()
        try:
            verdict = tree.judge(mutant)
            verdict.key, verdict.seconds = mutant.key(tree.folder), round(verdict.seconds, 1)  # of what was tested
        finally:
            trees.put(tree)
        return verdict

    def stale(self, mutants: list[Mutant]) -> list[Mutant]:
        """Those without a verdict on the present patch, tests and files."""
        return [m for m in mutants if m.name not in self.results or self.results[m.name].key != m.key(self.root)]


def _patient(tree: Tree, count: int) -> Tree:
    """The same tree with the time that `count` selections may take together."""
    patient = Tree.__new__(Tree)
    patient.folder, patient.timeout = tree.folder, tree.timeout * count
    return patient


def page(mutants: list[Mutant], results: dict[str, Verdict]) -> str:
    """docs/mutants.md."""
    counted = [m for m in mutants if not m.equivalent]
    caught = [m for m in counted if results[m.name].outcome == CAUGHT]
    rooms = sorted({m.room for m in mutants})
    rows = []
    for room in rooms:
        own = [m for m in counted if m.room == room]
        of_room = sum(m.room == room for m in caught)
        missed = ", ".join(m.name for m in own if m not in caught)
        rows.append(f"| {room} | {of_room} of {len(own)} | {missed} |")
    lines = [
        "# Planted bugs",
        "",
        "A test must be able to fail. Each file of `tests/mutants` is a bug: `make mutants` plants one after the",
        "other in a copy of the tree, runs the tests that are named in it, and expects a test to fail. GitHub does so",
        "every week; [CONTRIBUTING](../CONTRIBUTING.md) says when to add one. This page is written by that command.",
        "",
        f"**{len(caught)} of {len(counted)} are caught ({len(caught) / max(1, len(counted)):.1%}); the goal is "
        f"{GOAL:.0%}.**",
        "",
        "| part | caught | not caught |",
        "|---|---|---|",
        *rows,
        "",
        "| bug | harm | seen by |",
        "|---|---|---|",
    ]
    for mutant in counted:
        verdict = results[mutant.name]
        seen = (
            f"`{verdict.by.split('[')[0]}`"
            if verdict.outcome == CAUGHT
            else f"**{verdict.outcome}** {verdict.by}".strip()
        )
        lines.append(f"| {mutant.name}: {_cell(mutant.bug)} | {_cell(mutant.harm)} | {_cell(seen)} |")
    equivalent = [m for m in mutants if m.equivalent]
    if equivalent:
        lines += ["", "## Not counted", "", "What these change no test can see."]
        lines += ["", "| change | why it is no bug |", "|---|---|"]
        lines += [f"| {m.name}: {_cell(m.bug)} | {_cell(m.equivalent)} |" for m in equivalent]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def renew(root: Path, name: str) -> None:
    """Put the working tree's diff below the lines of a patch, and take it out of the tree."""
    path = root / FOLDER / f"{name}.patch"
    above = path.read_text(encoding="utf-8").partition("diff --git ")[0] if path.is_file() else ""
    command = ["git", "diff", "-U2", "--", ".", ":!tests", ":!docs"]
    diff = subprocess.run(command, cwd=root, capture_output=True, check=True)
    if not diff.stdout:
        raise MutantError("git diff is empty but for tests and docs: plant the bug first")
    path.write_text(above + diff.stdout.decode(), encoding="utf-8")
    git_apply(root, Mutant.read(path), "--reverse")


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    """The exit code: 1 where a mutant that was judged is not caught, or the score is below the goal."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], prog="python -m tests.mutants.run")
    parser.add_argument("names", nargs="*", help="patches, without .patch; default: those whose verdict is out of date")
    parser.add_argument("--all", action="store_true", help="all of them, whatever results.json says")
    parser.add_argument("-j", "--jobs", type=int, default=1, help="mutants at a time")
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds that the tests of a mutant may take")
    parser.add_argument("--green", action="store_true", help="the tests have just passed without a bug: do not try")
    parser.add_argument("--renew", metavar="NAME", help="the working tree's git diff becomes this patch")
    wanted = parser.parse_args(arguments)
    try:
        if wanted.renew:
            renew(root, wanted.renew)
            return 0
        return _run(wanted, root)
    except MutantError as error:
        print(error, file=sys.stderr)
        return 2


def _run(wanted: argparse.Namespace, root: Path) -> int:
    mutants = read_all(root)
    unknown = set(wanted.names) - {m.name for m in mutants}
    if unknown:
        raise MutantError(f"no patch of that name in {FOLDER}: {', '.join(sorted(unknown))}")
    session = Session(root, max(1, wanted.jobs), wanted.timeout, wanted.green)
    session.read_results()
    counted = [m for m in mutants if not m.equivalent]
    session.results = {m.name: session.results[m.name] for m in counted if m.name in session.results}
    chosen = [m for m in mutants if m.name in wanted.names] if wanted.names else mutants
    todo = chosen if wanted.all or wanted.names else session.stale(mutants)
    todo = [m for m in todo if not m.equivalent]
    if todo:
        session.run(todo)
    caught = sum(m.name in session.results and session.results[m.name].outcome == CAUGHT for m in counted)
    print(f"{caught} of {len(counted)} mutants are caught ({caught / max(1, len(counted)):.1%})")
    if all(m.name in session.results for m in counted):
        (root / PAGE).parent.mkdir(exist_ok=True)
        (root / PAGE).write_text(page(mutants, session.results), encoding="utf-8")
    missed = [m for m in todo if session.results[m.name].outcome != CAUGHT]
    return int(bool(missed) or caught < GOAL * len(counted))


if __name__ == "__main__":
    sys.exit(main())
