"""Rows per program and warps of the layer kernels, swept on this GPU: `python -m bench.tune [--json FILE]`.

Every launch of `SWEEP` is held against float64 on the very inputs that are timed, then timed beside the kernel's own
launch, in turns; a launch that is wrong, or does not compile, has its reason in the report and no time. `--json` is
rewritten after every launch. A launch is proposed where over all cases of its kernel it is faster than the kernel's own
by the lower end of the interval, and by `WORTH` at least.

Nothing is tuned while training runs: `--adopt FILE` writes the proposals of a report into the kernels' committed table
(kernels/advgrpo_kernels/_tuning.py) under the GPU's name.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from advgrpo_kernels import _tuning
from advgrpo_kernels._tuning import Launch
from advgrpo_kernels.ops import _residual_norm, qk_rms_norm
from advgrpo_kernels.ops import gelu as gelu_module  # the module where the package has the function
from advgrpo_kernels.ops import swiglu as swiglu_module

from . import timing
from .agreement import agreement
from .budget import Budget, OutOfTime, Report
from .cases_layers import ada_layer_norm, ada_layer_norm_backward, gated_residual, gelu, swiglu
from .cases_layers import qk_rms_norm as qk_case
from .workload import SD35_MEDIUM_512, TINY, Bench, Workload

SCHEMA = 2
WORTH = 1.02  # a proposal has to be faster by this
REPEATS = {"cuda": 50, "cpu": 3}
TABLE = Path(_tuning.__file__)
ROWS_OF_TABLE = re.compile(r"^TUNED: dict\[str, dict\[str, Launch\]\] = \{(?:\}$|.*?^\}$)", re.M | re.S)

Case = Callable[[Bench], Workload]
CASES: dict[str, dict[str, Case]] = {
    "residual_norm": {
        "gated_residual": gated_residual,
        "ada_layer_norm": ada_layer_norm,
        "ada_layer_norm_backward": ada_layer_norm_backward,
    },
    "qk_rms_norm": {"qk_rms_norm": qk_case},
    "gelu": {"gelu": gelu},
    "swiglu": {"swiglu": swiglu},
}
OWN = {
    "residual_norm": Launch(_residual_norm.ROWS, _residual_norm.WARPS),
    "qk_rms_norm": Launch(qk_rms_norm.ROWS, qk_rms_norm.WARPS),
    "gelu": Launch(gelu_module.ROWS, gelu_module.WARPS),
    "swiglu": Launch(swiglu_module.ROWS, swiglu_module.WARPS),
}
SWEEP = {
    "residual_norm": [Launch(rows, warps) for rows in (1, 2, 4, 8) for warps in (4, 8)],
    "qk_rms_norm": [Launch(rows, warps) for rows in (32, 64, 128) for warps in (4, 8)],
    "gelu": [Launch(rows, warps) for rows in (2, 4, 8) for warps in (4, 8)],
    "swiglu": [Launch(rows, warps) for rows in (1, 2, 4) for warps in (4, 8)],
}


class Sweep:
    """A run: every launch of every kernel that agrees, timed, in `report`."""

    def __init__(self, device: str, repeats: int, budget: Budget, file: Path | None) -> None:
        self.device, self.repeats, self.budget = device, repeats, budget
        self.bench = Bench(SD35_MEDIUM_512 if device == "cuda" else TINY, device)
        facts = timing.environment(device)
        self.report = Report(file, schema=SCHEMA, environment=facts, launches=[], proposals={}, left_out=[], failed={})
        self.report.save()

    def run(self) -> Report:
        """Kernels in turn; within each the launches in the order of `SWEEP`."""
        todo = [(kernel, launch) for kernel in CASES for launch in SWEEP[kernel] if launch != OWN[kernel]]
        for i, (kernel, launch) in enumerate(todo):
            self._launch(kernel, launch, self.budget.share(1 / (len(todo) - i)))
            self.report["proposals"] = proposals(self.report["launches"])
            self.report.save()
        return self.report

    def _launch(self, kernel: str, launch: Launch, budget: Budget) -> None:
        label = f"{kernel}, {launch.rows} rows, {launch.warps} warps"
        cases = CASES[kernel]
        found: dict[str, dict] = {}
        try:
            for name, build in cases.items():
                with _tuning.forced(kernel, launch):
                    verdict = agreement(name, build, self.bench)
                if not verdict.passed:
                    raise ValueError(f"{name}: {verdict.error:.1e} off float64, allowed {verdict.allowed:.1e}")
                found[name] = self._time(kernel, launch, build, budget.share(1 / (len(cases) - len(found))))
        except OutOfTime as error:
            print(f"{label}: left out: {error}")
            self.report["left_out"].append(label)
            return
        except Exception as error:  # a launch that does not compile here is a result
            print(f"{label}: {type(error).__name__}: {error}")
            self.report["failed"][label] = f"{type(error).__name__}: {error}"
            return
        self.report["launches"].append({"kernel": kernel, **launch._asdict(), "cases": found})
        shown = ", ".join(f"{name} {case['over_own']['ratio']:.2f}x" for name, case in found.items())
        print(f"{label}: {shown} over its own")

    def _time(self, kernel: str, launch: Launch, build: Case, budget: Budget) -> dict:
        torch.manual_seed(0)
        workload = build(self.bench)

        def swept() -> object:
            with _tuning.forced(kernel, launch):
                return workload.ours()

        def own() -> object:  # also where the table has another for this GPU
            with _tuning.forced(kernel, OWN[kernel]):
                return workload.ours()

        variants = {"own": own, "swept": swept}
        times = timing.interleave(variants, self.device, repeats=self.repeats, warmup=3, budget=budget)
        gain = timing.ratio(times["own"], times["swept"])
        medians = {f"{name}_us": float(np.median(values)) for name, values in times.items()}
        return {**medians, "over_own": asdict(gain)}


def proposals(launches: list[dict]) -> dict[str, dict[str, int]]:
    """By kernel the launch with the least time over all its cases, where that is worth a row in the table.

    A launch whose interval reaches below 1 in any case is not proposed.
    """
    chosen: dict[str, dict[str, int]] = {}
    best: dict[str, float] = {}
    for entry in launches:
        cases = entry["cases"].values()
        gain = sum(case["own_us"] for case in cases) / sum(case["swept_us"] for case in cases)
        sure = all(case["over_own"]["low"] >= 1 for case in cases)
        if sure and gain >= WORTH and gain > best.get(entry["kernel"], 0.0):
            best[entry["kernel"]] = gain
            chosen[entry["kernel"]] = {"rows": entry["rows"], "warps": entry["warps"]}
    return chosen


def adopt(report: dict, source: str) -> str:
    """The text of `_tuning.py` with the report's proposals under its GPU's name, in place of what stood there for it.

    Raises:
        ValueError: a report of a CPU, or one without proposals.
    """
    gpu = report["environment"].get("gpu")
    if not gpu:
        raise ValueError("the report is of a CPU, where no launch means anything: adopt one of a GPU")
    if not report["proposals"]:
        raise ValueError(f"the report proposes nothing: on {gpu} the kernels' own launches stand")
    table = {**_tuning.TUNED, gpu: {name: Launch(**launch) for name, launch in report["proposals"].items()}}
    rows = ["TUNED: dict[str, dict[str, Launch]] = {"]
    for name, launches in sorted(table.items()):
        rows += [f"    {json.dumps(name)}: {{"]
        rows += [
            f"        {json.dumps(k)}: Launch(rows={v.rows}, warps={v.warps})," for k, v in sorted(launches.items())
        ]
        rows += ["    },"]
    return ROWS_OF_TABLE.sub("\n".join([*rows, "}"]), source, count=1)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.tune", description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every launch, as soon as it is timed")
    parser.add_argument("--repeats", type=int, help="calls of each launch (50 on a GPU)")
    parser.add_argument("--seconds", type=float, help="stop in time: fewer calls, then fewer launches, which are named")
    parser.add_argument("--adopt", type=Path, metavar="FILE", help="write a report's proposals into the kernels' table")
    args = parser.parse_args(argv)
    if args.adopt:
        try:
            text = adopt(json.loads(args.adopt.read_text()), TABLE.read_text())
        except (OSError, ValueError) as error:
            parser.error(f"--adopt {args.adopt}: {error}")
        TABLE.write_text(text)
        print(f"written: {TABLE}")
        return 0
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU")
    sweep = Sweep(args.device, args.repeats or REPEATS[args.device], Budget(args.seconds), args.json)
    report = sweep.run()
    print(f"proposed: {report['proposals'] or 'nothing, the own launches stand'}")
    if args.device == "cpu":
        print("cpu: the PyTorch reference, which no launch changes")
    return 0 if report["launches"] else 1


if __name__ == "__main__":
    sys.exit(main())
