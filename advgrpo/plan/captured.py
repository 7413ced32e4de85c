"""Whether our forward runs a model, and whether the update's steps are captured with it: one answer for a reason in the
trainer's table (training/fast.py) and for the bytes of the plan (estimate.py).

By settings and the pipeline's class alone. What only the machine knows (a CUDA device, room for the graphs) whoever
asks adds.
"""

from __future__ import annotations

from advgrpo.config import Config, ModelSection
from advgrpo.policy.fused.transformer import can_adapt
from advgrpo.policy.pipelines import FAMILIES


def why_not_ours(model: ModelSection, kind: str) -> str:
    """Why our forward cannot run a pipeline of class `kind` with the adapters of its settings, or ""."""
    if FAMILIES[kind].prediction_type != "flow_prediction":
        return f"a {kind} has a UNet; the fused forward is of transformers"
    if not FAMILIES[kind].own_forward:
        return f"a {kind} has blocks that it does not compute"
    if model.train != "lora":
        return "full fine-tuning trains the stock modules"
    outside = [target for target in model.lora.targets if not can_adapt(target)]
    return f"it has no adapters on {outside[0]} (model.lora.targets)" if outside else ""


def why_not_fused(config: Config, kind: str) -> str:
    """Why our forward does not train a pipeline of class `kind`, or ""."""
    model = config.model
    if not config.fast:
        return "--no-fast"
    if model.gathers_stock_blocks and model.train == "lora":
        return f"model.shard_base = {model.shard_base}: diffusers' blocks are gathered one by one"
    return why_not_ours(model, kind)


def why_no_graphs(model: ModelSection) -> str:
    """Why no forward of this model is captured, or ""."""
    members = model.sequence_parallel
    return "" if members == 1 else f"model.sequence_parallel = {members}: exchanges are not captured"


def why_not_captured(config: Config, kind: str) -> str:
    """Why forward and backward of the update's steps of a pipeline of class `kind` are no CUDA graphs, or "": they are
    then on a GPU, that has room for them where `needs_room` says so."""
    why = why_not_fused(config, kind) or why_no_graphs(config.model) or config.why_update_is_not_captured
    if not why and config.update.graphs == "auto" and not FAMILIES[kind].captured_by_itself:
        return f"update.graphs = auto: no test holds captured steps of a {kind} to the eager bits; true captures them"
    return why


def needs_room(config: Config) -> bool:
    """Whether what could be captured is only where the memory plan counts everything and finds room for the graphs."""
    return config.update.graphs == "auto"
