"""A plan of what a run will keep in GPU memory before it starts: the fastest knobs that fit, and the table of why."""

from __future__ import annotations

import math
from dataclasses import replace

from rich.table import Table

from advgrpo.config import (
    Config,
    check_micro_batches,
    fits_micro_batches,
    nearest_prompts,
    no_sequence_groups,
    unevenly_sharded,
)
from advgrpo.errors import UserError
from advgrpo.plan.estimate import CONTEXT, GB, SLACK, Component, Estimate, Knobs, MemoryPlan, accepted
from advgrpo.plan.remedies import remedies
from advgrpo.plan.work import micro_batches, sharing

_CLOSE = 1.03  # costs within 3 % count as equal


def plan(config: Config, gpu_gb: float, *, processes: int = 1) -> MemoryPlan:
    """The fastest knobs that fit one GPU of `gpu_gb` (10^9 bytes), with the breakdown.

    `rollout.micro_batch` is the ceiling of the micro-batches tried. Speed is judged by `relative_time`.

    Args:
        processes: GPUs that share an iteration's images.

    Raises:
        UserError: gpu_gb or processes not positive, images that no micro-batch divides, or none that the processes of
            a base in parts share evenly, or a model whose architecture is not known.
    """
    if not (gpu_gb > 0 and math.isfinite(gpu_gb)) or processes < 1:
        raise UserError(f"GPU size {gpu_gb} GB, {processes} processes: want positive numbers")
    cut = config.rollout, config.update.minibatches
    if not micro_batches(*cut):
        check_micro_batches(*cut)  # says which numbers of prompts would divide
    if reason := no_sequence_groups(config, processes):
        raise UserError(reason)
    if not accepted(config, processes):
        raise UserError(unevenly_sharded(config, processes, micro_batch=micro_batches(*cut)[-1]))
    estimate = Estimate(config, processes)
    fitting = [p for p in estimate.plans(gpu_gb) if p.fits]
    if fitting:
        costs = {p: estimate.relative_time(p.knobs) for p in fitting}
        close = [p for p in fitting if costs[p] <= _CLOSE * min(costs.values())]
        chosen = max(close, key=lambda p: p.knobs.micro_batch)
        said = {"decided": _what_decided(chosen, estimate), "shared": _shared(chosen, estimate)}
        return replace(chosen, **said, copy=_copy_that_fits(chosen, estimate))
    least = min(estimate.plans(gpu_gb), key=lambda p: p.peak_gb)
    return replace(least, remedies=tuple(remedies(config, gpu_gb, processes)))


def plan_as_configured(config: Config, gpu_gb: float, *, processes: int = 1) -> MemoryPlan:
    """What the settings as they are would keep, chosen or not; arguments and errors as of `plan`."""
    for refused in (no_sequence_groups, unevenly_sharded):
        if reason := refused(config, processes):
            raise UserError(reason)
    wanted = Knobs(config.rollout.micro_batch, config.model.gradient_checkpointing)
    return next(each for each in Estimate(config, processes).plans(gpu_gb) if each.knobs == wanted)


def peak_with_captured_update(config: Config, *, processes: int = 1) -> float:
    """GB that the settings as they are would keep with the update's steps in CUDA graphs.

    Raises:
        UserError: as of `plan`, or the estimate leaves something out, so that nobody can say whether it fits.
    """
    estimate = Estimate(config, processes)
    if estimate.uncounted:
        raise UserError(f"the memory plan does not count {', '.join(estimate.uncounted)}")
    return estimate.peak_with_captured_update()


def _shared(chosen: MemoryPlan, estimate: Estimate) -> str:
    """What the busiest process computes; empty where there is one."""
    knobs, processes = chosen.knobs, estimate.processes
    how = {"micro_batch": knobs.micro_batch, "checkpointing": knobs.gradient_checkpointing}
    return sharing(estimate.config, processes, **how) if processes > 1 else ""


def _copy_that_fits(chosen: MemoryPlan, estimate: Estimate) -> str:
    """Whether a base in parts could be sampled from a whole copy in FP8; empty where it is, or cannot be."""
    config = estimate.config
    if not (estimate.sharded and config.model.gathers_stock_blocks and estimate.is_ours) or estimate.copied:
        return ""
    rollout = config.rollout.model_copy(update={"precision": "fp8"})
    copied = Estimate(config.model_copy(update={"rollout": rollout}), estimate.processes)
    peak = copied.peak_gb(chosen.knobs)
    if peak > chosen.gpu_gb:
        return ""
    return f"rollout.precision = fp8 fits as well, peak {peak:.1f} GB: ODE steps that gather nothing"


def _what_decided(chosen: MemoryPlan, estimate: Estimate) -> str:
    """Why no larger micro-batch is recommended, where the reason is not memory."""
    rollout, minibatches = estimate.config.rollout, estimate.config.update.minibatches
    group, most, micro = rollout.group_size, rollout.micro_batch, chosen.knobs.micro_batch
    if micro == most:
        return f"rollout.micro_batch = {most}, as set, is the largest tried"
    larger = [m for m in range(micro + 1, most + 1) if group % m == 0 or m % group == 0]
    room = [m for m in larger if estimate.peak_gb(replace(chosen.knobs, micro_batch=m)) <= chosen.gpu_gb]
    if not room:
        return ""
    if fits_micro_batches(rollout, minibatches, micro=room[-1]):
        busiest = estimate.config.balance(estimate.processes, micro_batch=room[-1]).most_images
        return (
            f"speed decided, not memory: rollout.micro_batch = {room[-1]} would fit, and its busiest process compute "
            f"{busiest} images"
        )
    return (
        f"divisibility decided, not memory: rollout.micro_batch = {room[-1]} would fit, but {rollout.images} images "
        "cannot be cut into it; with rollout.prompts_per_iteration = "
        f"{nearest_prompts(rollout, minibatches, room[-1])} they can"
    )


def table(plans: list[MemoryPlan]) -> Table:
    """Components by GPU size, in GB; held in the phase of the peak unless in brackets."""
    result = Table(title="GPU memory in GB, estimated; in brackets: not held at the peak", title_justify="left")
    result.add_column("component")
    for each in plans:
        result.add_column(f"{each.gpu_gb:.4g} GB", justify="right")
    result.add_column("decided by")
    by_name = [{c.name: c for c in each.components} for each in plans]
    for name in dict.fromkeys(name for components in by_name for name in components):
        cells = [_cell(components.get(name), each) for components, each in zip(by_name, plans)]
        decided = dict.fromkeys(c[name].decided_by for c in by_name if name in c)
        result.add_row(name, *cells, " | ".join(decided))
    context = [f"{each.peak_gb - (each.peak_gb - CONTEXT) / (1 + SLACK):.2f}" for each in plans]
    result.add_row("context, workspaces, allocator's slack", *context, f"{CONTEXT} GB and {SLACK:.0%}, an allowance")
    result.add_section()
    if any(each.host_gb for each in plans):
        pinned = (f"({each.host_gb:.2f})" for each in plans)
        result.add_row("pinned memory of the host, for each process", *pinned, "model.offload")
    result.add_row("peak", *(f"{each.peak_gb:.2f}" for each in plans), " | ".join(each.peak_phase for each in plans))
    result.add_row("peak as configured", *(f"{each.configured_gb:.2f}" for each in plans), "settings as they are")
    return result


def _cell(component: Component | None, each: MemoryPlan) -> str:
    if component is None:
        return "-"
    size = f"{component.bytes / GB:.2f}"
    return size if each.peak_phase in component.phases else f"({size})"
