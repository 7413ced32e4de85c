"""The training of the faults' jobs: the tests' untrained models, a few prompts, 4 images an iteration."""

from __future__ import annotations

from pathlib import Path

from advgrpo import config
from tests.conftest import make_unit_backbone, make_unit_config, make_unit_pipeline
from tests.faults.machine import COLLECTIVE_TIMEOUT
from tests.faults.schedule import ITERATIONS


def make_world(folder: Path, checkpoint_every: int = 1) -> list[str]:
    """Writes models, prompts and settings below `folder`; the training's flags, but for --output-dir."""
    models = folder / "models"
    pipeline, backbone = make_unit_pipeline(models / "pipeline"), make_unit_backbone(models / "backbone")
    changes = {
        "iterations": ITERATIONS,
        "collective_timeout": COLLECTIVE_TIMEOUT,
        "data": {"held_out_prompts": ""},
        "rollout": {"micro_batch": 1, "group_size": 2, "num_steps": 3, "guidance_scale": 1.0},
        "adversary": {"batch_size": 4, "replay_capacity": 8},
        "evaluation": {"grid_prompts": 1, "metrics": ["dino_similarity"]},
        "output": {"checkpoint_every": checkpoint_every, "keep_checkpoints": 10},
    }
    base = make_unit_config(pipeline, backbone, folder)
    settings = config.build(config.merge(base.model_dump(), changes), "faults")
    file = folder / "settings.yaml"
    file.write_text(config.dump(settings))
    return ["--config", str(file), "--resume", "auto"]
