"""Where an iteration's time goes: `python -m bench.profile [--size tiny|small|full] [--trace FILE.gz] [--json FILE]`.

Iterations per second and the share of every phase come from plain iterations, timed without a profiler. Then one
trajectory and one iteration run under PyTorch's: on a GPU they give kernels and host syncs per trajectory and the share
of the iteration in which the GPU idles; on a CPU there is nothing to count, and only the trace is written. Open it in
https://ui.perfetto.dev or chrome://tracing: the phases are named ranges (NVTX ranges in Nsight Systems as well). The
trace is compressed and at most `TRACE_LIMIT` long: where it would be longer, the host's events are left out, least
telling first, and the figures say which. `--json` is rewritten after every figure.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from . import contenders, timing
from .budget import Report
from .contenders import Contenders
from .random_policy import FULL

DEVICE_WORK = ("kernel", "gpu_memcpy", "gpu_memset")  # categories of a Kineto trace
HOST_WORK = (("cpu_op", "python_function"), ("ac2g", "fwdbwd", "async_cpu"), ("cuda_runtime", "cuda_driver"))
TRACE_LIMIT = 15 * 2**20  # bytes, compressed
WARMUP = {"cuda": 3, "cpu": 1}
CPU_NOTE = "cpu: not a GPU figure; kernels, syncs and idle time unmeasured"


def phases(c: Contenders, iterations: int) -> dict[str, object]:
    """Iterations and images per second, and each phase's share of the time, over plain iterations."""
    for _ in range(WARMUP[c.device.type]):
        c.trainer.iterate()
    rows = [c.trainer.iterate() for _ in range(iterations)]
    seconds = sum(row["seconds"] for row in rows)
    names = [name for name in rows[0] if name.startswith("seconds_")]
    shares = {name.removeprefix("seconds_"): sum(row[name] for row in rows) / seconds for name in names}
    shares["rest"] = 1 - sum(shares.values())
    return {
        "iterations_per_second": iterations / seconds,
        "images_per_second": iterations * c.images / seconds,
        "phase_shares": shares,
    }


def record(run: Callable[[], object], device: str) -> dict:
    """Run under the profiler; its Chrome trace."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
    with profile(activities=activities) as profiler:
        run()
        if device == "cuda":
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        return json.loads(file.read_text())


def write_trace(trace: dict, file: Path, limit: int = TRACE_LIMIT) -> list[str]:
    """Write `trace`, compressed, in at most `limit` bytes; returns the categories of events left out for that.

    Raises:
        ValueError: device work and named ranges alone are larger.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    left_out: list[str] = []
    for more in ((), *HOST_WORK):
        left_out += more
        events = [event for event in trace["traceEvents"] if event.get("cat") not in left_out]
        packed = gzip.compress(json.dumps(trace | {"traceEvents": events}).encode(), compresslevel=6)
        if len(packed) <= limit:
            temporary = file.with_name(f"{file.name}.new")
            temporary.write_bytes(packed)
            os.replace(temporary, file)
            return left_out
    raise ValueError(f"the trace is {len(packed)} bytes without the host's events: more than {limit}")


def device_counts(events: list[dict]) -> dict[str, int]:
    """Kernels on the device and waits of the host for it, from a trace's events."""
    kernels = [event for event in events if event.get("cat") == "kernel"]
    runtime = [event["name"] for event in events if event.get("cat") in ("cuda_runtime", "cuda_driver")]
    return {"kernels": len(kernels), "host_syncs": sum("Synchronize" in name for name in runtime)}


def idle_share(events: list[dict]) -> float:
    """Share of the time between the first and the last device work in which none was running, on any stream."""
    spans = sorted((e["ts"], e["ts"] + e["dur"]) for e in events if e.get("cat") in DEVICE_WORK)
    if not spans:
        raise ValueError("the trace holds no device work")
    busy, reached = 0.0, spans[0][0]
    for begin, end in spans:
        busy += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return 1 - busy / (reached - spans[0][0])


def trajectory(c: Contenders) -> Callable[[], object]:
    """One micro-batch's sampling, from noise to latents, as the trainer calls it."""
    ours, policy, table = c.objective, c.trainer.policy, c.table()
    micro_batch = ours.micro_batches.of(0)[0]
    initial = ours.sampler.initial_latents(1, micro_batch.prompt_groups)
    conditioning = policy.encode(micro_batch.prompts)
    row, ids = micro_batch.row.to(c.device), micro_batch.image_ids.to(c.device)
    return lambda: ours.sampler.run(table, conditioning, initial, row, noise_seed=1, image_ids=ids)


def run(args: argparse.Namespace) -> Report:
    report = Report(args.json, size=args.size, environment=timing.environment(args.device))
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        builders = {"tiny": contenders.tiny, "small": contenders.small, "full": partial(contenders.random, size=FULL)}
        changes: dict[str, Any] = {"model": {"attention": args.attention}} if args.attention else {}
        c = builders[args.size](Path(folder), args.device, **changes)
        report.update(phases(c, args.iterations))
        report.save()
        if args.device == "cuda":
            one = trajectory(c)
            one()
            report.put("trajectory", device_counts(record(one, args.device)["traceEvents"]))
        trace = record(c.trainer.iterate, args.device)
        if args.device == "cuda":
            report.put("idle_share", idle_share(trace["traceEvents"]))
    report.put("trace", str(args.trace))
    report.put("left_out_of_trace", write_trace(trace, args.trace))
    return report


def text(report: dict) -> str:
    lines = ["  ".join(f"{name} {value}" for name, value in report["environment"].items())]
    rates = f"{report['iterations_per_second']:.3f} iterations/s, {report['images_per_second']:.1f} images/s"
    lines.append(f"{report['size']} model: {rates}")
    lines += [f"  {name:10}{share:7.1%}" for name, share in report["phase_shares"].items()]
    if "trajectory" in report:
        counts = report["trajectory"]
        lines.append(f"per trajectory: {counts['kernels']} kernels, {counts['host_syncs']} host syncs")
        lines.append(f"GPU idle over an iteration: {report['idle_share']:.1%}")
    else:
        lines.append(CPU_NOTE)
    without = f", without {', '.join(report['left_out_of_trace'])}" if report["left_out_of_trace"] else ""
    return "\n".join([*lines, f"trace: {report['trace']}{without}"])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.profile", description=__doc__.split("\n\n")[0])
    parser.add_argument("--size", choices=["tiny", "small", "full"], default="tiny")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--iterations", type=int, default=3, help="plain iterations that are timed")
    parser.add_argument("--trace", type=Path, default=Path("runs/profile/trace.json.gz"), help="the Chrome trace")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    parser.add_argument("--attention", metavar="NAME", help="model.attention (default: the preset's)")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU")
    if args.size == "full" and args.device == "cpu":
        parser.error("--size full needs a GPU: 2.2 billion parameters at 2.2 TFLOP a sequence")
    if args.iterations < 1:
        parser.error(f"--iterations {args.iterations}: want at least 1")
    print(text(run(args)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
