"""The base model or a LoRA of it, loaded to draw images for whoever compares models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from advgrpo import config as configuration
from advgrpo.config import Config
from advgrpo.errors import UserError
from advgrpo.reporting.display import Display
from advgrpo.runtime.allocator import keep_freed_memory
from advgrpo.runtime.distributed import Distributed
from advgrpo.sampling.drawing import ModelOptions

if TYPE_CHECKING:  # diffusers and transformers are loaded once the flags are right and their notices silenced
    from advgrpo.evaluation.evaluator import Evaluator


def settings_of(
    options: ModelOptions, folder: Path, lora: str, device: torch.device, *, flag: str = "--lora"
) -> Config:
    """The configuration that `Evaluator` and the policy read, for the base model or one LoRA."""
    world, drawn = options.world, options.drawn(folder)
    model = {
        "path": options.model,
        "resolution": drawn.resolution,
        "max_sequence_length": drawn.max_sequence_length,
        "dtype": "bfloat16" if device.type == "cuda" and not world else "float32",
    }
    if lora:
        model["lora"] = lora_section(Path(lora).expanduser(), folder, flag).model_dump()
    evaluation = {
        "num_steps": drawn.num_steps,
        "guidance_scale": drawn.guidance_scale,
        "grid_prompts": options.grid_prompts,
    }
    micro_batch = options.batch_size or (32 if world else 8)
    settings = {"seed": options.seed, "model": model, "evaluation": evaluation, "rollout": {"micro_batch": micro_batch}}
    return configuration.build(settings, "command line")


def lora_section(folder: Path, pipeline: Path, field: str = "--lora") -> configuration.LoraSection:
    """Rank, targets and blocks of a LoRA folder, as the policy needs them to load it.

    Raises:
        UserError: no LoRA of the pipeline's network, or adapters of several ranks or in blocks that are not the last.
    """
    from advgrpo.policy.adapters import block_of, read_lora_for, stored_blocks

    file, blocks = read_lora_for(pipeline, folder, field), stored_blocks(pipeline)
    found = {name: block_of(name) for name in file.modules}
    places = [place for place in found.values() if place is not None]
    outside = [name for name, place in found.items() if place is None]
    if outside:
        raise UserError(f"{file.path} adapts {outside[0]}; only layers of transformer blocks can be loaded")
    ranks = sorted({len(a) for a, _ in file.modules.values()})
    if len(ranks) != 1:
        raise UserError(f"{file.path} holds adapters of ranks {ranks}; only one rank can be loaded")
    indices = sorted({blocks.index(block) for block, _ in places})
    count = len(blocks)
    if indices != list(range(count - len(indices), count)):
        raise UserError(f"{file.path} adapts blocks {indices} of {count}; only all blocks or the last N can be loaded")
    return configuration.LoraSection(
        rank=ranks[0],
        alpha=ranks[0],
        targets=tuple(dict.fromkeys(name for _, name in places)),
        blocks="all" if len(indices) == count else len(indices),
        start_from=str(folder),
    )


def load_model(
    options: ModelOptions, settings: Config, prompts: list[str], distributed: Distributed, display: Display
) -> Evaluator:
    """Draws images of the base model, or of it with a LoRA; the prompts are encoded once and cached."""
    from advgrpo.evaluation.evaluator import Evaluator
    from advgrpo.policy.loading import load_policy
    from advgrpo.training.fast import FastPaths
    from advgrpo.training.text_caches import encode_prompts

    device, cache = distributed.device, Path(options.cache_dir).expanduser()
    keep_freed_memory(device)
    policy = load_policy(
        settings.model,
        device=device,
        cache_dir=cache,
        seed=options.seed,
        fused=FastPaths.choose(settings, device).fused,
    )
    encode_prompts(policy.text_cache, [policy.negative_prompt, *prompts], cache, display, distributed)
    evaluator = Evaluator(
        policy,
        None,
        None,
        prompts,
        settings.evaluation,
        settings.rollout.micro_batch,
        settings.seed,
        distributed,
        display,
    )
    return evaluator if settings.model.lora.start_from else evaluator.base()
