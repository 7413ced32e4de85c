"""Training runs of the shipped presets, cut to seconds, whose every metric is committed: `make golden` records them.

    python -m tests.golden_runs [NAME ...]     # rewrites tests/golden/losses/NAME.json

A file holds what made it (machine, versions, commit) and one object per iteration. On the machine kind that recorded
it, the numbers are repeated to the last bit; elsewhere another matrix kernel rounds otherwise, and they are compared to
`TOLERANCE`, which still tells another draw, another loss or another order from rounding.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from rich.console import Console

from advgrpo import config
from advgrpo.runtime.distributed import Distributed
from advgrpo.training.run import Run
from advgrpo_kernels import _cpu

FOLDER = Path(__file__).parent / "golden/losses"
TOLERANCE = 1e-3  # relative, after three iterations from the same weights
_SMALL = {
    "iterations": 3,
    "data": {"held_out_prompts": ""},
    "rollout": {"prompts_per_iteration": 2, "group_size": 4, "micro_batch": 4, "num_steps": 6},
    "evaluation": {"every": 0, "metrics": []},
    "output": {"checkpoint_every": 0, "tensorboard": False},
}
_HEAD = {"warmup_iterations": 1, "warmup_updates": 3, "updates_per_iteration": 2, "batch_size": 6}
_PAIRED = {"schedule": "always", "updates_per_iteration": 2, "batch_size": 6}

# One of each family of jobs, and the settings whose draws no other test sees from end to end.
RUNS: dict[str, tuple[str, dict]] = {
    "adv-grpo": ("tiny", {"adversary": _HEAD}),
    "adv-grpo-released": (
        "tiny",
        {
            "adversary": {**_HEAD, "schedule": "fooled_or_generator", "patch_sampling": "with_replacement"},
            "rollout": {"initial_noise": "per_image", "guidance_scale": 1.5},
            "advantage": {"std": "global"},
            "fast": False,
        },
    ),
    "adv-pickscore": ("tiny-adv-pickscore", {"adversary": _PAIRED}),
    "flow-grpo-kl": ("tiny-flow-grpo-pickscore-kl", {}),
    "mixed": ("tiny-adv-rule", {"adversary": _HEAD}),
    "style": ("tiny-style-outline", {"adversary": _HEAD}),
    "sft": ("tiny-sft", {}),
    "nft": ("tiny-nft", {"update": {"kl_weight": 0.01}}),
    "nft-adv": ("tiny-nft-adv", {"adversary": _HEAD}),
    "awm": ("tiny-awm", {}),
    "words": ("tiny-adv-ocr", {}),
}


def run(name: str, folder: Path) -> list[dict]:
    """One object per iteration: all metrics but the times."""
    preset, changes = RUNS[name]
    values = config.merge(config.merge(config.read_preset(preset), _SMALL), changes)
    settings = {"output_dir": str(folder / name), "data": {"cache_dir": str(folder / "cache")}}
    made = config.build(config.merge(values, settings), name)
    trainer = Run(made, Distributed.start("cpu"), resume=False, console=Console(quiet=True)).trainer
    return [
        {key: value for key, value in trainer.iterate().items() if "second" not in key} for _ in range(made.iterations)
    ]


def machine() -> dict[str, str]:
    """What decides the last bits of a float32 product here."""
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    capability = torch.backends.cpu.get_cpu_capability()
    layers = _cpu.why_not() or ("compiled" if _cpu.why_no_products() else "compiled, products too")
    return {"cpu": model, "capability": capability, "torch": torch.__version__, "layers": layers}


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    with tempfile.TemporaryDirectory() as folder:
        for name in names or RUNS:
            rows = run(name, Path(folder))
            made = {"command": f"python -m tests.golden_runs {name}", "after_commit": commit, "machine": machine()}
            path = FOLDER / f"{name}.json"
            path.write_text(json.dumps({**made, "iterations": rows}, indent=1) + "\n")
            print(path)


if __name__ == "__main__":
    main(sys.argv[1:])
