"""Which settings beyond the knobs would make a run fit, what costs least first."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import islice
from typing import Any

from advgrpo.config import Config, fits_micro_batches, not_in_sequence, not_sharded, unevenly_sharded
from advgrpo.plan import known_models
from advgrpo.plan.captured import why_not_ours
from advgrpo.plan.estimate import Estimate, accepted


def changes(config: Config, processes: int) -> Iterator[tuple[str, Callable[[Config], None]]]:
    """Settings beyond the knobs that save memory, as (what to set, change), what costs least first."""

    def setting(name: str, value) -> tuple[str, Callable[[Config], None]]:
        section, field = name.split(".")
        return f"{name} = {value}", lambda c: setattr(getattr(c, section), field, value)

    adversary, model = config.adversary, config.model
    if config.update.graphs is True and not config.why_update_is_not_captured:
        yield setting("update.graphs", False)
    if model.offload != "text_vae":
        yield setting("model.offload", "text_vae")
    if config.has_merged_copy:
        yield setting("rollout.precision", "model")
    if model.base_precision == "fp8" and model.shard_base == "none":  # beside the pristine weights
        yield setting("model.base_precision", "model")
    if not config.fast and model.train == "lora" and model.shard_base == "none":
        yield "fast = true", lambda c: setattr(c, "fast", True)
    dino = adversary.kind == "dino" and config.learns_adversary
    if dino and adversary.cached_patches > adversary.num_patches:
        yield setting("adversary.cached_patches", adversary.num_patches)
    if fewer := _fewer_prompts(config, processes):
        yield setting("rollout.prompts_per_iteration", fewer)
    blocks = config.model_copy(update={"model": model.model_copy(update={"shard_base": "blocks"})})
    if (
        processes > 1
        and model.shard_base == "none"
        and not (not_sharded(blocks) or not_in_sequence(blocks) or unevenly_sharded(blocks, processes))
    ):
        yield setting("model.shard_base", "blocks")
    if model.dtype == "float32" and model.train == "lora":
        yield setting("model.dtype", "bfloat16")
    if dino and adversary.backbone in ("facebook/dinov2-large", "facebook/dinov2-giant"):
        yield setting("adversary.backbone", "facebook/dinov2-base")
    if model.lora.blocks == "all" and model.train == "lora":
        yield "model.lora.blocks = 2", lambda c: setattr(c.model.lora, "blocks", 2)
    if model.resolution >= 512:
        yield setting("model.resolution", model.resolution // 2)
    if model.train == "full":
        yield "model.train = lora", lambda c: setattr(c.model, "train", "lora")


def _groups(config: Config, processes: int) -> Iterator[dict[str, Any]]:
    """Settings of `model` by which processes compute images together that training accepts, few to an image first, and
    then the same with blocks in parts where they are not yet."""
    pipeline, model = known_models.known_pipeline(config.model.path), config.model
    if why_not_ours(model, pipeline.kind) or model.sequence_parallel > 1:
        return
    tokens = min((model.resolution // pipeline.decoder.scale // pipeline.patch) ** 2, model.max_sequence_length)
    heads = pipeline.transformer["num_attention_heads"]
    sizes = [size for size in range(2, min(processes, tokens) + 1) if processes % size == heads % size == 0]
    for besides in ({}, {"shard_base": "blocks"}) if model.shard_base == "none" else ({},):
        for members in sizes:
            own = {"sequence_parallel": members, **besides}
            changed = config.model_copy(update={"model": model.model_copy(update=own)})
            if not (not_sharded(changed) or not_in_sequence(changed)):
                yield own


def _set_model(values: Mapping[str, Any], config: Config) -> None:
    for name, value in values.items():
        setattr(config.model, name, value)


def _fewer_prompts(config: Config, processes: int) -> int:
    """The largest number up to a quarter of `rollout.prompts_per_iteration` that training accepts; 0: there is none."""
    rollout = config.rollout
    for prompts in range(rollout.prompts_per_iteration // 4, 0, -1):
        fewer = config.model_copy(update={"rollout": rollout.model_copy(update={"prompts_per_iteration": prompts})})
        if fits_micro_batches(fewer.rollout, config.update.minibatches) and accepted(fewer, processes):
            return prompts
    return 0


def remedies(config: Config, gpu_gb: float, processes: int) -> Iterator[str]:
    """Every single change that makes it fit, of sequence groups the smallest; else these with blocks in parts; else the
    shortest prefix of all changes that does; else what is needed."""
    found = list(changes(config, processes))
    alone = [name for name, change in found if _least(config, [change], processes) <= gpu_gb]
    groups = list(_groups(config, processes))
    in_parts = [group for group in groups if "shard_base" in group]
    for tried in ([group for group in groups if group not in in_parts], [] if alone else in_parts):
        fitting = (group for group in tried if _least(config, [partial(_set_model, group)], processes) <= gpu_gb)
        alone += [", ".join(f"model.{name} = {value}" for name, value in group.items()) for group in islice(fitting, 1)]
    if alone:
        yield from (f"set {name}" for name in alone)
        return
    least = math.inf
    for count in range(len(found) + 1):
        peak = _least(config, [change for _, change in found[:count]], processes)
        if peak <= gpu_gb:
            yield "set " + ", ".join(name for name, _ in found[:count])
            return
        least = min(least, peak)
    yield f"no setting makes it fit: {config.model.path} needs {least:.1f} GB; take a larger GPU or a smaller model"


def _least(config: Config, changes: list[Callable[[Config], None]], processes: int) -> float:
    """The smallest peak over all knobs with these changes, GB; infinite where they leave no micro-batch."""
    changed = config.model_copy(deep=True)
    for change in changes:
        change(changed)
    return min((p.peak_gb for p in Estimate(changed, processes).plans(0.0)), default=math.inf)
