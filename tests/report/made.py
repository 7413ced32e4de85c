"""Folders of runs as they lie on the disk, made without training."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import numpy as np
from PIL import Image

from advgrpo import config
from advgrpo.reporting.evaluations import EVALUATIONS_FILE, Evaluated, record_evaluation
from advgrpo.reporting.tracking import METRICS_FILE, metrics_line

PROMPTS = 12


def make_run(
    folder: Path,
    *,
    preset: str = "tiny",
    seed: int = 1,
    iterations: int = 40,
    every: int = 10,
    shift: float = 0.0,
    ended: bool = True,
    changes: dict | None = None,
    side: tuple[int, int] = (640, 420),
) -> Path:
    """A run whose held-out dino_similarity saturates and whose pickscore rises and falls, `shift` above or below."""
    own = {"seed": seed, "iterations": iterations, "output_dir": str(folder), "evaluation": {"every": every}}
    settings = config.build(config.merge(config.merge(config.read_preset(preset), own), changes or {}), "test")
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(config.dump(settings))
    draw, rows = random.Random(seed), []
    for i in range(iterations):
        row = {
            "iteration": i,
            "reward_generated": -2 + i / iterations + draw.gauss(0, 0.2),
            "reward_reference": draw.gauss(0, 0.2),
            "discriminator_updates": 10 * (i % 5 == 0),
            "discriminator_accuracy": 0.8,
            "discriminator_paired_accuracy": 0.9,
            "kl": 1e-3 * i,
            "grad_norm": None if i < 3 else 2e-3,
            "clip_fraction": 0.0,
            "seconds": 1.0,
            "seconds_sample": 0.6,
            "seconds_update": 0.3,
            "flags": ["reward_collapse"] if 10 <= i < 20 else ["dead_groups"] if i > 30 else [],
        }
        rows.append(row)
    (folder / METRICS_FILE).write_text("".join(metrics_line(row) for row in rows))
    places = [*range(0, iterations, every), *([iterations] if ended else [])]
    for at in places:
        stage = "base" if not at else "final" if at == iterations else "during"
        means = {"dino_similarity": 0.8 + 0.08 * (1 - math.exp(-at / 15)), "pickscore": 0.5 + 0.2 * math.sin(at / 14)}
        means = {name: mean + shift + draw.gauss(0, 0.001) for name, mean in means.items()}
        found = {f"eval_{name}": mean for name, mean in means.items()}
        found |= {f"eval_{name}_ci95": 0.02 for name in means}
        if stage != "during":
            found |= {f"{name}_first": value for name, value in list(found.items()) if "_ci95" not in name}
            found = {name: value + 0.5 * (not name.endswith(("_first", "_ci95"))) for name, value in found.items()}
        scores = {name: [mean + draw.gauss(0, 0.1) for _ in range(PROMPTS)] for name, mean in means.items()}
        record_evaluation(folder / EVALUATIONS_FILE, Evaluated(stage, at, 1, found, scores, {"reward_generated": -1.0}))
        name = {"base": "base", "final": "final"}.get(stage, f"iteration-{at:06d}")
        (folder / "samples").mkdir(exist_ok=True)
        pixels = np.random.default_rng(at).integers(0, 255, (side[1] // 20, side[0] // 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize(side).save(folder / "samples" / f"{name}.png")
    if ended:
        summary = {"iterations": iterations, "base": {}, "final": {}, "versions": {"torch": "2.13"}, "finished": "now"}
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder
