"""Ours against B0 on whole steps: `python -m bench.step [--size tiny|full] [--json FILE] [--png FILE]`.

Times sampler, adversary, update and the whole iteration of our trainer and of B0 in one process, taking turns, after
checking that both compute the same: what fails its check is refused, not timed, and the exit status is 1. Prints where
the sampler's time goes (B0, then one change after the other) and the goals with what this machine can say about them.

`--size tiny` is the shipped model with its weights; `--size full` is SD3.5-medium's exact configuration with random
weights: no downloads and no diffusers, but a GPU. The unit of both is one iteration of `bench/contenders.py`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from advgrpo.policy.attention import choose_attention
from advgrpo.policy.sampler import Sampler
from advgrpo.types import Rollout

from . import step_report, timing
from .contenders import Contenders, random, tiny
from .parity import Check, check_adversary, check_sampler, check_update, tolerance
from .random_policy import FULL

SCHEMA = 1
REPEATS = {"cuda": 7, "cpu": 5}
WARMUP = {"cuda": 3, "cpu": 1}
FORWARD_TFLOP = 35.579400290304  # one B=16 forward of SD3.5-medium (PERFORMANCE section 1)
PEAK_TFLOP_S = 989  # dense bfloat16 of an H100 or H200, for MFU


@dataclass(frozen=True)
class Unit:
    """One thing both sides do, and how much of it a call is."""

    ours: Callable[[], object]
    baseline: Callable[[], object]
    amount: float
    unit: str


def units(c: Contenders) -> dict[str, Unit]:
    """What is timed; rollouts that adversary and update start from are made here, once."""
    trainer, b0, table = c.trainer, c.baseline, c.table()
    rollout = trainer.rollout(table, 0)
    scored = trainer.scorer.score(rollout, 0)
    tiles = b0.rollout(c.prompts, c.window)
    advantages = b0.advantages(b0.score(tiles)[2])

    def our_adversary():
        trainer.train_head(rollout, trainer.scorer.score(rollout, 0), 0)

    def their_adversary():
        generated, reference, *_ = b0.score(tiles)
        b0.adversary(generated, reference, c.config.adversary.updates_per_iteration)
        b0.remember(generated)

    images = "images/s"
    return {
        "sampler": Unit(lambda: trainer.rollout(table, 0), lambda: b0.rollout(c.prompts, c.window), c.images, images),
        "adversary": Unit(our_adversary, their_adversary, c.images, images),
        "update": Unit(
            lambda: trainer.update(rollout, scored, table), lambda: b0.update(tiles, advantages), c.images, images
        ),
        "iteration": Unit(trainer.iterate, lambda: b0.iteration(c.prompts, c.window), 1, "iterations/s"),
    }


def verify(c: Contenders) -> dict[str, Check]:
    """Check of each unit; the iteration stands on all of them."""
    allowed = tolerance(c.trainer.policy.dtype)
    checks = {
        "sampler": check_sampler(c, allowed),
        "adversary": check_adversary(c, allowed),
        "update": check_update(c, allowed),
    }
    failed = [name for name, check in checks.items() if not check.passed]
    checks["iteration"] = Check(float(len(failed)), 0.0, f"{', '.join(failed)} failed" if failed else "its parts agree")
    return checks


def measure(unit: Unit, device: str, repeats: int) -> dict[str, object]:
    """Rates of both sides and their ratio with its interval; above 1, ours is faster."""
    variants = {"ours": unit.ours, "baseline": unit.baseline}
    times = timing.interleave(variants, device, repeats=repeats, warmup=WARMUP[device])
    gain = timing.ratio(times["baseline"], times["ours"])
    rates = {name: unit.amount / (float(np.median(values)) * 1e-6) for name, values in times.items()}
    spread = {f"{name}_seconds": timing.as_json(timing.summarise(values * 1e-6)) for name, values in times.items()}
    low_high = {"ratio": gain.ratio, "ratio_low": gain.low, "ratio_high": gain.high}
    return {**rates, **low_high, "unit": unit.unit, **spread}


def waterfall(c: Contenders, device: str, repeats: int, fp8: Contenders | None) -> list[dict]:
    """Sampler images/s of B0 and after each change in turn; None for what this device does not have."""
    gpu = device == "cuda"
    network = c.trainer.policy.network
    transformer = getattr(network, "transformer", network)  # of a FusedNetwork, or RandomPolicy's own
    chosen = transformer._attend
    table = c.table()

    def ours(contenders: Contenders, *, attention=None, graphs: bool, share: bool) -> Callable[[], object]:
        trainer, own = contenders.trainer, contenders.trainer.sampler
        sampler = Sampler(
            trainer.policy,
            own.guidance_scale,
            own.likelihood,
            share_prefix=share,
            merged=True,
            graphs=own.graphs if graphs else None,
        )

        def run() -> Rollout:
            trainer.sampler, transformer._attend = sampler, attention or chosen
            try:
                return trainer.rollout(table, 0)
            finally:
                trainer.sampler, transformer._attend = own, chosen

        return run

    def merged_baseline() -> object:
        # Merged weights cost what the base weights cost, so adapters are switched off where they would be merged.
        return c.baseline.rollout(c.prompts, c.window, adapters_in_window_only=True)

    _, plain = choose_attention("flash" if gpu else "auto", c.device, c.trainer.policy.dtype)
    rows = {
        "B0": lambda: c.baseline.rollout(c.prompts, c.window),
        "merge": merged_baseline,
        "fuse": ours(c, attention=plain, graphs=False, share=False),
        "attention": ours(c, graphs=False, share=False) if gpu else None,
        "graph": ours(c, graphs=True, share=False) if gpu else None,
        "dedupe": ours(c, graphs=True, share=True),
        "FP8": ours(fp8, graphs=True, share=True) if fp8 else None,
    }
    timed = {name: run for name, run in rows.items() if run is not None}
    times = timing.interleave(timed, device, repeats=repeats, warmup=WARMUP[device])
    rates = {name: c.images / (float(np.median(values)) * 1e-6) for name, values in times.items()}
    return [{"step": name, "images_per_second": rates.get(name)} for name in rows]


def peak_memory(unit: Unit) -> dict[str, float]:
    """GB allocated at most during one call of each side, weights of both included."""
    found = {}
    for name, run in (("ours", unit.ours), ("baseline", unit.baseline)):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        found[name] = torch.cuda.max_memory_allocated() / 1e9
    return found


def forward_over_roofline(fp8: Contenders, limits: timing.Calibration, repeats: int) -> float:
    """Milliseconds of a merged FP8 forward of 16 rows over those of its FLOPs at the measured matrix-product rate."""
    policy, table = fp8.trainer.policy, fp8.table()
    policy.merge()
    latents = torch.randn(8, *policy.latent_shape(), device=fp8.device)
    prepared = policy.prepare(policy.encode([f"prompt {i}" for i in range(8)]), table.timesteps, guided=True)
    with torch.no_grad():
        run = {"forward": lambda: policy.merged_velocity(latents, table.numbers[2], prepared)}
        times = timing.interleave(run, "cuda", repeats=4 * repeats, warmup=10)["forward"]
    return float(np.median(times)) * 1e-6 / (FORWARD_TFLOP / limits.matmul_tflop_s)


def run(size: str, device: str, repeats: int, only: list[str]) -> dict:
    """Verify and time; the report that goes to JSON."""
    facts, limits = timing.environment(device), timing.calibrate(device)
    print("  ".join(f"{name} {value}" for name, value in facts.items()))
    report: dict = {"schema": SCHEMA, "size": size, "environment": facts, "calibration": timing.as_json(limits)}
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        c = tiny(Path(folder), device) if size == "tiny" else random(Path(folder), device, FULL)
        fp8 = random(Path(folder), device, FULL, precision="fp8") if size == "full" else None
        checks = verify(c)
        report["parity"] = {name: vars(check) | {"passed": check.passed} for name, check in checks.items()}
        report["refused"] = [name for name in only if not checks[name].passed]
        every = units(c)
        for name in only:
            if checks[name].passed:
                report[name] = measure(every[name], device, repeats)
            print(step_report.unit_line(name, report.get(name), checks[name]))
        report["waterfall"] = waterfall(c, device, repeats, fp8) if checks["sampler"].passed else []
        metrics = c.trainer.iterate()
        report["on_policy"] = {name: metrics[name] for name in ("log_prob_drift_max", "pre_update_clip_fraction")}
        if device == "cuda":
            report["peak_memory_gb"] = peak_memory(every["iteration"])
        if size == "full" and "sampler" in report:  # FLOPs of the algorithm: 16 rows are 8 guided pictures, 10 steps
            report["sampler_mfu"] = report["sampler"]["ours"] * 10 * FORWARD_TFLOP / 8 / PEAK_TFLOP_S
        if fp8:
            report["fp8_forward_over_roofline"] = forward_over_roofline(fp8, limits, repeats)
    report["goals"] = step_report.goals(report)
    return report


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.step", description=__doc__.split("\n\n")[0])
    parser.add_argument("--size", choices=["tiny", "full"], default="tiny")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw ratios and waterfall")
    parser.add_argument("--repeats", type=int, help="calls of each side (7 on a GPU, 5 on a CPU)")
    parser.add_argument("--unit", action="append", choices=list(step_report.UNITS), help="only this; may be repeated")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU")
    if args.size == "full" and args.device == "cpu":
        parser.error("--size full needs a GPU: 2.2 billion parameters at 2.2 TFLOP a sequence")
    for path in (args.json, args.png):
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
    report = run(args.size, args.device, args.repeats or REPEATS[args.device], args.unit or list(step_report.UNITS))
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    if args.png:
        step_report.draw(report, args.png)
    print(step_report.tables(report))
    return 1 if report["refused"] else 0


if __name__ == "__main__":
    sys.exit(main())
