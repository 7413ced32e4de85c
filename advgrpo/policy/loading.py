"""Which policy serves a pipeline."""

from __future__ import annotations

from pathlib import Path

import torch

from advgrpo.config import ModelSection
from advgrpo.policy.diffusers_policy import DiffusersPolicy
from advgrpo.policy.flux import FluxPolicy
from advgrpo.policy.flux2 import Flux2Policy
from advgrpo.policy.fused.sequence import SequenceGroup
from advgrpo.policy.pipelines import pipeline_class
from advgrpo.policy.qwen import QwenPolicy
from advgrpo.policy.sd3 import SD3Policy
from advgrpo.policy.sdxl import UNetPolicy
from advgrpo.policy.sharding import BlockSharding

POLICIES: dict[str, type[DiffusersPolicy]] = {
    "StableDiffusion3Pipeline": SD3Policy,
    "FluxPipeline": FluxPolicy,
    "QwenImagePipeline": QwenPolicy,
    "Flux2KleinPipeline": Flux2Policy,
    "StableDiffusionPipeline": UNetPolicy,
    "StableDiffusionXLPipeline": UNetPolicy,
}


def load_policy(
    model: ModelSection,
    *,
    device: torch.device,
    cache_dir: Path,
    seed: int,
    fused: bool = False,
    precision: str = "model",
    sharding: BlockSharding | None = None,
    sequence: SequenceGroup | None = None,
) -> DiffusersPolicy:
    """The policy for the pipeline class that `model.path` names in its model_index.json.

    Args:
        fused, precision, sequence: see `TransformerPolicy`; no other has a forward of ours (fast.py decides).
        sharding: see there; no other network is sharded.

    Raises:
        UserError: no such model, or a class that no policy serves.
    """
    kind = POLICIES[pipeline_class(model.path)]
    options = {"fused": True, "sequence": sequence} if fused else {}
    if precision != "model":
        options["precision"] = precision
    if sharding is not None:
        options["sharding"] = sharding
    return kind(model, device=device, cache_dir=cache_dir, seed=seed, **options)
