"""Does training run, and in the memory that was planned: `python -m bench.train [--size small|full] [--json FILE]`.

Two runs, their rows written after every iteration, so a command that is cut off keeps them:

* the embedded world (`--world`), from the command's own function: loading, captured graphs, reward, evaluation, LoRA on
  the disk, and with `--lora` in a folder that comes back. Needs diffusers. What it is worth is judged at home, by
  `python -m advgrpo.frontier`: the judge's packages are 17 MB, and nothing of it runs on a GPU;
* SD3.5-medium's exact configuration with random weights (`--size small`: a model of milliseconds): twenty iterations
  whose weights move, with the most memory that was held beside what `python -m advgrpo.plan` says of these settings.

Whatever fails is in the report by name, the other run goes on, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import gc
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch

from advgrpo import config as configuration
from advgrpo.plan.memory import plan_as_configured

from . import timing
from .budget import Budget, Report
from .contenders import SETTINGS, SMALL_SETTINGS, random_trainer
from .random_policy import FULL, SMALL

SCHEMA = 1
ITERATIONS = {"full": 20, "small": 3}
WORLD_ITERATIONS = {"full": 60, "small": 2}
WORLD_SHARE = 0.4  # of the time, at most
UNJUDGED = {"evaluation": {"metrics": ["dino_similarity"]}}
KEPT = (
    "seconds",
    "grad_norm",
    "log_prob_mismatch_max",
    "pre_update_clip_fraction",
    "discriminator_loss",
    "reward_mean",
)
MOVING = configuration.merge(SETTINGS, {"update": {"learning_rate": 1e-4}})
QUICK_WORLD = {
    "rollout": {"prompts_per_iteration": 2, "group_size": 4, "micro_batch": 4},
    "evaluation": {"every": 0, "images_per_prompt": 1, "num_steps": 2, "grid_prompts": 2},
    "adversary": {"updates_per_iteration": 2, "batch_size": 6, "warmup_iterations": 0},
}


def kept(metrics: dict) -> dict[str, float]:
    return {name: metrics[name] for name in KEPT if name in metrics}


def train_world(
    world: str, size: str, device: str, budget: Budget, report: Report, folder: Path, lora: Path | None = None
) -> None:
    """The embedded world as its command trains it, until the iterations or the time are over; its LoRA into `lora`."""
    from advgrpo import Callback, Config, train  # needs diffusers

    rows: list[dict] = []
    report.put("world", {"preset": world, "rows": rows})

    class Records(Callback):
        def on_iteration(self, metrics, flags):
            rows.append(kept(metrics))
            report.save()
            return "the time is over" if budget.left < 2 * metrics["seconds"] else None

    settings = {"iterations": WORLD_ITERATIONS[size], "output_dir": str(folder / "run"), "device": device}
    settings = configuration.merge(settings, UNJUDGED)
    if size == "small":
        settings = configuration.merge(settings, QUICK_WORLD)
    started = time.monotonic()
    result = train(Config.load(world, settings), callbacks=[Records()])
    wanted = ("initial", "final")
    report["world"] |= {
        "seconds": time.monotonic() - started,
        "stopped": result.stopped,
        **{name: result.summary[name] for name in wanted if name in result.summary},
        "lora_bytes": sum(file.stat().st_size for file in _weights(result.lora)),
    }
    report.save()
    if lora is not None:
        lora.mkdir(parents=True, exist_ok=True)
        for file in _weights(result.lora):
            shutil.copy(file, lora)


def _weights(lora: Path | None) -> list[Path]:
    """Files of an exported LoRA; none after a run that exported none."""
    return [] if lora is None else list(lora.glob("*.safetensors"))


def train_random(size: str, device: str, budget: Budget, report: Report, folder: Path) -> None:
    """Random weights; the memory of the whole process beside its plan."""
    built = FULL if size == "full" else SMALL
    changes = configuration.merge(MOVING, SMALL_SETTINGS if size == "small" else {})
    started = time.monotonic()
    config, trainer = random_trainer(folder, device, built, **changes)
    trained = next(parameter for _, parameter in trainer.policy.trainable_parameters())
    before = trained.detach().clone()
    rows: list[dict] = []
    report.put(
        "random", {"building_seconds": time.monotonic() - started, "images": config.images_per_iteration, "rows": rows}
    )
    if size == "full":
        planned = plan_as_configured(config, 141.0)
        report["random"]["planned_gb"] = {
            phase: planned.phase_gb(phase) for phase in ("sample", "decode", "score", "update")
        }
    for _ in range(ITERATIONS[size]):
        if rows and 2 * rows[-1]["seconds"] > budget.left:
            report["random"]["left_out"] = ITERATIONS[size] - len(rows)
            break
        rows.append(kept(trainer.iterate()) | memory(device))
        report.save()
    moved = (trained.detach() - before).norm() / before.norm()
    report["random"]["relative_change_of_lora"] = float(moved)
    report.save()
    if not rows:
        raise RuntimeError("no time was left for a single iteration")
    drift = max(row["log_prob_mismatch_max"] for row in rows)
    if drift != 0 or not moved > 0 or not torch.isfinite(moved):
        raise RuntimeError(f"log-probabilities drifted by {drift:g}, the LoRA moved by {float(moved):g} of its norm")


def memory(device: str) -> dict[str, float]:
    """GB so far: the most that tensors took, and what the process holds of the device, context and graphs included."""
    if device == "cpu":
        return {}
    free, total = torch.cuda.mem_get_info()
    return {"allocated_gb": torch.cuda.max_memory_allocated() / 1e9, "held_gb": (total - free) / 1e9}


def text(report: dict) -> str:
    lines = ["  ".join(f"{name} {value}" for name, value in report["environment"].items())]
    for name in ("world", "random"):
        rows = report.get(name, {}).get("rows", [])
        if rows:
            last = ", ".join(f"{key} {value:.4g}" for key, value in rows[-1].items())
            lines.append(f"{name}: {len(rows)} iterations; the last: {last}")
    if "planned_gb" in report.get("random", {}):
        planned = max(report["random"]["planned_gb"].values())
        lines.append(f"memory: planned {planned:.1f} GB, held {report['random']['rows'][-1].get('held_gb', 0):.1f} GB")
    lines += [f"{name} FAILED: {why}" for name, why in report["failed"].items()]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.train", description=__doc__.split("\n\n")[0])
    parser.add_argument("--size", choices=["small", "full"], default="small")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every row, as soon as it is known")
    parser.add_argument("--lora", type=Path, metavar="FOLDER", help="keep the embedded world's LoRA there")
    parser.add_argument("--seconds", type=float, help="end by then, with fewer iterations")
    parser.add_argument("--world", default="tiny", metavar="PRESET", help="the embedded world's preset")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU")
    if args.size == "full" and args.device == "cpu":
        parser.error("--size full needs a GPU: 2.2 billion parameters at 2.2 TFLOP a sequence")
    budget = Budget(args.seconds)
    report = Report(args.json, schema=SCHEMA, size=args.size, environment=timing.environment(args.device), failed={})
    report.save()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        runs = {
            "world": lambda: train_world(
                args.world, args.size, args.device, budget.share(WORLD_SHARE), report, Path(folder), args.lora
            ),
            "random": lambda: train_random(args.size, args.device, budget, report, Path(folder)),
        }
        for name, run in runs.items():
            try:
                run()
            except Exception as error:  # kept in the report; the exit status tells
                traceback.print_exc()
                report["failed"][name] = f"{type(error).__name__}: {error}"
                report.save()
            gc.collect()  # the other run's model
            if args.device == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
    print(text(report))
    return 1 if report["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
