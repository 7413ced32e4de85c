"""Where an iteration's time goes: `python -m bench.profile [--size tiny|full] [--trace FILE] [--json FILE]`.

Iterations per second and the share of every phase come from plain iterations, timed without a profiler. Then one
trajectory and one iteration run under PyTorch's: on a GPU they give kernels and host syncs per trajectory and the share
of the iteration in which the GPU idles; on a CPU there is nothing to count, and only the trace is written. Open it in
https://ui.perfetto.dev or chrome://tracing: the phases are named ranges (NVTX ranges in Nsight Systems as well).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from . import contenders, timing
from .contenders import Contenders
from .random_policy import FULL

DEVICE_WORK = ("kernel", "gpu_memcpy", "gpu_memset")  # categories of a Kineto trace
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


def record(run: Callable[[], object], file: Path, device: str) -> list[dict]:
    """Run under the profiler; writes a Chrome trace and returns its events."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
    with profile(activities=activities) as profiler:
        run()
        if device == "cuda":
            torch.cuda.synchronize()
    file.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(file))
    return json.loads(file.read_text())["traceEvents"]


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
    """One tile's sampling, from noise to latents, as the trainer calls it."""
    trainer, table = c.trainer, c.table()
    tile = trainer.tiles(0)[0]
    initial = trainer.sampler.initial_latents(1, tile.prompt_groups)
    conditioning = trainer.policy.encode(tile.prompts)
    row, ids = tile.row.to(c.device), tile.image_ids.to(c.device)
    return lambda: trainer.sampler.run(table, conditioning, initial, row, noise_seed=1, image_ids=ids)


def run(size: str, device: str, iterations: int, trace: Path) -> dict[str, object]:
    facts = timing.environment(device)
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        c = contenders.tiny(Path(folder), device) if size == "tiny" else contenders.random(Path(folder), device, FULL)
        report = {"size": size, "environment": facts, **phases(c, iterations), "trace": str(trace)}
        if device == "cuda":
            one = trajectory(c)
            one()
            report["trajectory"] = device_counts(record(one, Path(folder) / "trajectory.json", device))
        events = record(c.trainer.iterate, trace, device)
        if device == "cuda":
            report["idle_share"] = idle_share(events)
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
    return "\n".join([*lines, f"trace: {report['trace']}"])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.profile", description=__doc__.split("\n\n")[0])
    parser.add_argument("--size", choices=["tiny", "full"], default="tiny")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--iterations", type=int, default=3, help="plain iterations that are timed")
    parser.add_argument("--trace", type=Path, default=Path("runs/profile/trace.json"), help="the Chrome trace")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU")
    if args.size == "full" and args.device == "cpu":
        parser.error("--size full needs a GPU: 2.2 billion parameters at 2.2 TFLOP a sequence")
    if args.iterations < 1:
        parser.error(f"--iterations {args.iterations}: want at least 1")
    report = run(args.size, args.device, args.iterations, args.trace)
    print(text(report))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
