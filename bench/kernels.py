"""Time the kernels: `python -m bench.kernels [--op NAME] [--json FILE] [--device cpu|cuda]`.

An op is timed only if its tests pass in this very run; otherwise it is reported as refused and the exit status is 1.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from . import timing
from .registry import REGISTRY, Op, lookup
from .workload import SD35_MEDIUM_512, TINY, Bench, Workload

ROOT = Path(__file__).parents[1]
SCHEMA = 1
REPEATS = {"cuda": 100, "cpu": 15}
BANDWIDTH_BOUND = 50  # FLOPs per byte below which a case is judged against the copy, not the matrix product
HEADER = f"{'case':26}{'ours us':>10}{'p10':>9}{'p90':>9}{'eager x':>9}{'95 %':>14}{'compile x':>10}{'limit':>9}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.kernels", description=__doc__)
    parser.add_argument("--op", action="append", metavar="NAME", help="an op of the registry; repeat for several")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results, for python -m bench.gate")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, help="calls of each variant (100 on a GPU, 15 on a CPU)")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile (always so on a CPU)")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU")
    try:
        ops = [lookup(name) for name in args.op] if args.op else list(REGISTRY.values())
    except ValueError as error:
        parser.error(str(error))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
    with_compile = args.device == "cuda" and not args.no_compile
    report = run(ops, args.device, args.repeats, with_compile=with_compile, file=args.json)
    return 1 if report["refused"] else 0


def run(
    ops: list[Op], device: str, repeats: int | None = None, *, with_compile: bool, file: Path | None = None
) -> dict:
    """Verify and time `ops`, printing a line per case; `file` is rewritten after every op, so a cut keeps the rest."""
    facts, limits = timing.environment(device), timing.calibrate(device)
    print("  ".join(f"{name} {value}" for name, value in facts.items()))
    print(f"measured limits: copy {limits.copy_gb_s:.0f} GB/s, matmul {limits.matmul_tflop_s:.2f} TFLOP/s\n{HEADER}")
    bench, repeats = Bench(SD35_MEDIUM_512 if device == "cuda" else TINY, device), repeats or REPEATS[device]
    entries, refused, verdicts = [], [], {}
    report = {
        "schema": SCHEMA,
        "environment": facts,
        "calibration": timing.as_json(limits),
        "refused": refused,
        "entries": entries,
    }
    for op in ops:
        if op.test not in verdicts:
            verdicts[op.test] = failure(op.test, device)
        if verdicts[op.test]:
            refused.append(op.name)
            print(f"{op.name:26}refused: {op.test} fails\n{verdicts[op.test]}")
        else:
            for name, build in op.cases.items():
                torch.manual_seed(0)
                try:
                    entry = measure(build(bench), device, repeats, limits, with_compile)
                except RuntimeError as error:  # cannot run here, such as an op of csrc/ that was not built
                    refused.append(op.name)
                    print(f"{name:26}refused: {error}")
                    continue
                entries.append({"op": op.name, "case": name, **entry})
                print(row(entries[-1]))
        if file:
            file.write_text(json.dumps(report, indent=1) + "\n")
    if device == "cpu":
        print("cpu: not a GPU figure (tiny shapes, PyTorch reference)")
    return report


def failure(test: str, device: str) -> str:
    """Empty if the tests in file `test` pass, else the end of their output; a run without tests is a failure too."""
    marks = "not slow" if device == "cuda" else "not gpu and not slow"
    command = [sys.executable, "-m", "pytest", str(ROOT / test), "-q", "-x", "-m", marks, "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return "" if done.returncode == 0 else (done.stdout + done.stderr)[-1500:]


def measure(
    workload: Workload, device: str, repeats: int, limits: timing.Calibration, with_compile: bool
) -> dict[str, object]:
    """Times and ratios of one case as JSON values."""
    variants: dict[str, Callable[[], object]] = {"ours": workload.ours, "eager": workload.eager}
    if with_compile and (compiled := compile_or_none(workload.eager)):
        variants["compiled"] = compiled
    times = timing.interleave(variants, device, repeats=repeats, warmup=10 if device == "cuda" else 2)
    ours = timing.summarise(times["ours"])
    gb_s, tflop_s = workload.bytes / ours.median / 1e3, workload.flops / ours.median / 1e6
    by_bytes = workload.flops < BANDWIDTH_BOUND * workload.bytes
    compiled = times.get("compiled")
    return {
        "bytes": workload.bytes,
        "flops": workload.flops,
        "ours_us": timing.as_json(ours),
        "eager_us": timing.as_json(timing.summarise(times["eager"])),
        "compiled_us": None if compiled is None else timing.as_json(timing.summarise(compiled)),
        "over_eager": timing.as_json(timing.ratio(times["eager"], times["ours"])),
        "over_compiled": None if compiled is None else timing.as_json(timing.ratio(compiled, times["ours"])),
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
    ours, eager, compiled = entry["ours_us"], entry["over_eager"], entry["over_compiled"]
    interval = f"{eager['low']:.2f}-{eager['high']:.2f}"
    return (
        f"{entry['case']:26}{ours['median']:10.1f}{ours['p10']:9.1f}{ours['p90']:9.1f}{eager['ratio']:9.2f}{interval:>14}"
        f"{'-' if compiled is None else format(compiled['ratio'], '.2f'):>10}"
        f"{entry['share_of_limit']:8.0%} of {entry['limit']}"
    )


if __name__ == "__main__":
    sys.exit(main())
