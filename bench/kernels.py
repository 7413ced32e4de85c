"""Time the kernels: `python -m bench.kernels [--op NAME] [--json FILE] [--device cpu|cuda] [--check | --tests]`.

An op is timed only if it agrees with float64 at the very shapes that are timed (`bench/agreement.py`); otherwise it is
reported as refused and the exit status is 1. `--check` stops there; `--tests` runs the op's test file first as well,
which on a GPU compiles hundreds of kernels. Every op is timed against eager PyTorch before torch.compile is tried on
any, and `--json` is rewritten after every case, so a run that is cut off keeps the rest.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from . import timing
from .agreement import agreement
from .budget import Budget, OutOfTime, Report
from .registry import REGISTRY, Op, lookup
from .workload import SD35_MEDIUM_512, TINY, Bench, Workload

ROOT = Path(__file__).parents[1]
SCHEMA = 3  # another way to time is another schema: the gate compares within one
REPEATS = {"cuda": 100, "cpu": 15}
WARMUP = {"cuda": 10, "cpu": 2}
BANDWIDTH_BOUND = 50  # FLOPs per byte below which a case is judged against the copy, not the matrix product
HEADER = f"{'case':26}{'ours us':>10}{'p10':>9}{'p90':>9}{'eager x':>9}{'95 %':>14}{'limit':>16}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.kernels", description=__doc__)
    parser.add_argument("--op", action="append", metavar="NAME", help="an op of the registry; repeat for several")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results, for python -m bench.gate")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, help="calls of each variant (100 on a GPU, 15 on a CPU)")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile (always so on a CPU)")
    parser.add_argument("--check", action="store_true", help="compare with float64, time nothing")
    parser.add_argument("--tests", action="store_true", help="the op's test file has to pass as well")
    parser.add_argument("--seconds", type=float, help="stop in time: fewer calls, then fewer cases, which are named")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU")
    try:
        ops = [lookup(name) for name in args.op] if args.op else list(REGISTRY.values())
    except ValueError as error:
        parser.error(str(error))
    session = Session(args.device, args.repeats or REPEATS[args.device], Budget(args.seconds), args.json)
    session.verify(ops, tests=args.tests)
    if not args.check:
        session.time()
        if args.device == "cuda" and not args.no_compile:
            session.time_compiled()
    if args.device == "cpu":
        print("cpu: not a GPU figure (tiny shapes, PyTorch reference)")
    return 1 if session.report["refused"] else 0


@dataclass(frozen=True)
class Case:
    """One case of an op; `build` makes the same workload every time."""

    op: str
    name: str
    build: Callable[[], Workload]


class Session:
    """A run: what agrees, what was refused and why, and the figures, all in `report`."""

    def __init__(self, device: str, repeats: int, budget: Budget, file: Path | None) -> None:
        self.device, self.repeats, self.budget = device, repeats, budget
        self.bench = Bench(SD35_MEDIUM_512 if device == "cuda" else TINY, device)
        facts = timing.environment(device)
        self.report = Report(file, schema=SCHEMA, environment=facts, refused=[], agreement={}, left_out=[], entries=[])
        print("  ".join(f"{name} {value}" for name, value in facts.items()))
        self.agreed: list[Case] = []

    def verify(self, ops: list[Op], *, tests: bool) -> None:
        """Which cases may be timed."""
        verdicts: dict[str, str] = {}
        for op in ops:
            if tests and op.test not in verdicts:
                verdicts[op.test] = failure(op.test, self.device)
            if verdicts.get(op.test):
                self._refuse(op.name, op.name, f"{op.test} fails\n{verdicts[op.test]}")
                continue
            for name, build in op.cases.items():
                self._verify(Case(op.name, name, lambda build=build: self._seeded(build)), build)

    def _verify(self, case: Case, build: Callable[[Bench], Workload]) -> None:
        try:
            found = agreement(case.name, build, self.bench)
        except Exception as error:  # an op of csrc/ that was not built, a kernel this GPU cannot compile or run, ...
            self._refuse(case.op, case.name, f"{type(error).__name__}: {error}\n{traceback.format_exc(limit=-3)}")
            return
        self.report["agreement"][case.name] = asdict(found) | {"passed": found.passed}
        self.report.save()
        figures = f"{found.error:.1e} off float64, PyTorch {found.of_pytorch:.1e}, allowed {found.allowed:.1e}"
        if not found.passed:
            self._refuse(case.op, case.name, figures)
            return
        print(f"{case.name:26}{figures}")
        self.agreed.append(case)

    def _refuse(self, op: str, case: str, why: str) -> None:
        print(f"{case:26}refused: {why}")
        if op not in self.report["refused"]:
            self.report["refused"].append(op)
        self.report.save()

    def time(self) -> None:
        """Every agreed case against eager PyTorch."""
        limits = timing.calibrate(self.device)
        self.report.put("calibration", timing.as_json(limits))
        print(
            f"measured limits: copy {limits.copy_gb_s:.0f} GB/s, matmul {limits.matmul_tflop_s:.2f} TFLOP/s\n{HEADER}"
        )
        for case, budget in self._cases():
            workload = case.build()
            times = self._interleave(case, {"ours": workload.ours, "eager": workload.eager}, budget)
            if times is not None:
                entry = {"op": case.op, "case": case.name, **figures(workload, times, limits)}
                self.report["entries"].append(entry)
                self.report.save()
                print(row(entry))

    def time_compiled(self) -> None:
        """What was timed once more against torch.compile of the same baseline."""
        entries = {entry["case"]: entry for entry in self.report["entries"]}
        print(f"{'case':26}{'over torch.compile':>20}")
        for case, budget in self._cases():
            if case.name not in entries:
                continue
            workload = case.build()
            compiled = compile_or_none(workload.eager)
            times = compiled is not None and self._interleave(
                case, {"ours": workload.ours, "compiled": compiled}, budget
            )
            if times:
                ratio = timing.ratio(times["compiled"], times["ours"])
                compiled_us = timing.as_json(timing.summarise(times["compiled"]))
                entries[case.name] |= {"compiled_us": compiled_us, "over_compiled": timing.as_json(ratio)}
                self.report.save()
                print(f"{case.name:26}{ratio.ratio:13.2f} [{ratio.low:.2f}, {ratio.high:.2f}]")

    def _cases(self) -> Iterator[tuple[Case, Budget]]:
        """Agreed cases, each with an even share of the time that is left."""
        for i, case in enumerate(self.agreed):
            yield case, self.budget.share(1 / (len(self.agreed) - i))
            if self.device == "cuda":
                torch.cuda.empty_cache()

    def _interleave(self, case: Case, variants: dict[str, Callable[[], object]], budget: Budget):
        try:
            return timing.interleave(
                variants, self.device, repeats=self.repeats, warmup=WARMUP[self.device], budget=budget
            )
        except OutOfTime as error:
            print(f"{case.name:26}left out: {error}")
            self.report["left_out"].append(case.name)
            self.report.save()
            return None

    def _seeded(self, build: Callable[[Bench], Workload]) -> Workload:
        torch.manual_seed(0)
        return build(self.bench)


def failure(test: str, device: str) -> str:
    """Empty if the tests in file `test` pass, else the end of their output; a run without tests is a failure too."""
    marks = "not slow" if device == "cuda" else "not gpu and not slow"
    command = [sys.executable, "-m", "pytest", str(ROOT / test), "-q", "-x", "-m", marks, "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return "" if done.returncode == 0 else (done.stdout + done.stderr)[-1500:]


def figures(workload: Workload, times: dict, limits: timing.Calibration) -> dict[str, object]:
    """Times and ratios of one case as JSON values."""
    ours = timing.summarise(times["ours"])
    gb_s, tflop_s = workload.bytes / ours.median / 1e3, workload.flops / ours.median / 1e6
    by_bytes = workload.flops < BANDWIDTH_BOUND * workload.bytes
    return {
        "bytes": workload.bytes,
        "flops": workload.flops,
        "calls": len(times["ours"]),
        "ours_us": timing.as_json(ours),
        "eager_us": timing.as_json(timing.summarise(times["eager"])),
        "compiled_us": None,
        "over_eager": timing.as_json(timing.ratio(times["eager"], times["ours"])),
        "over_compiled": None,
        "limit": "copy" if by_bytes else "matmul",
        "share_of_limit": gb_s / limits.copy_gb_s if by_bytes else tflop_s / limits.matmul_tflop_s,
    }


def compile_or_none(run: Callable[[], object]) -> Callable[[], object] | None:
    """`run` under torch.compile after a first call; None, said aloud, where the compiler cannot take it."""
    compiled = torch.compile(run)
    try:
        compiled()
    except Exception as error:  # dynamo, inductor and triton raise what they like; the baseline is then missing
        print(f"torch.compile cannot take the next case's baseline: {str(error).splitlines()[0]}")
        return None
    return compiled


def row(entry: dict) -> str:
    ours, eager = entry["ours_us"], entry["over_eager"]
    interval = f"{eager['low']:.2f}-{eager['high']:.2f}"
    return (
        f"{entry['case']:26}{ours['median']:10.1f}{ours['p10']:9.1f}{ours['p90']:9.1f}{eager['ratio']:9.2f}{interval:>14}"
        f"{entry['share_of_limit']:8.0%} of {entry['limit']}"
    )


if __name__ == "__main__":
    sys.exit(main())
