"""How much work an image is, and how evenly processes share an iteration's: in forwards of a transformer, estimated.

A forward is 1, forward and backward 2.2, and a recomputed forward 1 more (counted FLOPs, bench/counters.py).
"""

from __future__ import annotations

from advgrpo.config import Config, RolloutSection, fits_micro_batches, most_steps_after_window

_WELL_SHARED = 0.9  # efficiency from which a run does not speak of it


def drawn_steps(config: Config) -> int:
    """Sampler steps of an image that is learned from, those of its scouts among them, with the earliest window."""
    rollout = config.rollout
    if not config.objective.has_window:
        return rollout.num_steps if config.objective.samples_images else 0
    after = most_steps_after_window(rollout)

    def steps(tail: int) -> int:
        return rollout.num_steps - after + min(tail or after, after)

    scouted = rollout.scouts * steps(rollout.of_scouts.tail_steps) if rollout.scouts > 1 else 0
    return steps(rollout.tail_steps) + scouted


def learning(config: Config, *, checkpointing: bool) -> float:
    """Work of the update on an image."""
    of_a_step = 2.2 + checkpointing + config.objective.old_policy  # which is one forward more
    return config.trained_steps * of_a_step * config.update.informative_share


def efficiency(
    config: Config, processes: int, *, micro_batch: int | None = None, checkpointing: bool | None = None
) -> float:
    """Mean over most work of a process in an iteration, in (0, 1]: what a run keeps of its processes' speed.

    Args:
        micro_batch, checkpointing: instead of `rollout.micro_batch` and `model.gradient_checkpointing`.
    """
    checkpointing = config.model.gradient_checkpointing if checkpointing is None else checkpointing
    shared = config.balance(processes, micro_batch=micro_batch)
    return shared.efficiency(drawn_steps(config), learning(config, checkpointing=checkpointing))


def sharing(
    config: Config, processes: int, *, micro_batch: int | None = None, checkpointing: bool | None = None
) -> str:
    """What the busiest process computes, in words; arguments as of `efficiency`."""
    shared = config.balance(processes, micro_batch=micro_batch)
    kept = efficiency(config, processes, micro_batch=micro_batch, checkpointing=checkpointing)
    images, of_a_minibatch = config.images_per_iteration, config.images_per_iteration // shared.rounds
    nothing = f", and {shared.idle} none" if shared.idle else ""
    members, sharing = config.model.sequence_parallel, shared.processes
    who = f"{processes} processes" if members == 1 else f"{sharing} sequence group{'s' * (sharing > 1)} of {members}"
    return (
        f"the busiest of {who} computes {shared.most_images} of {images} images (mean "
        f"{images / sharing:.4g}) and {shared.most_of_a_round * shared.images} of a minibatch's {of_a_minibatch} "
        f"(mean {of_a_minibatch / sharing:.4g}){nothing}: {kept:.0%} of their speed is used"
    )


def badly_shared(config: Config, processes: int) -> str:
    """For the user, where much of the processes' speed is lost; empty where it is not."""
    if efficiency(config, processes) >= _WELL_SHARED:
        return ""
    most = config.rollout.micro_batch
    smaller = [m for m in micro_batches(config.rollout, config.update.minibatches) if most % m == 0]
    by_size = {micro: efficiency(config, processes, micro_batch=micro) for micro in smaller}
    best = max(by_size, key=lambda micro: (by_size[micro], micro))
    remedy = "" if best == most else f"; with rollout.micro_batch = {best} it would be {by_size[best]:.0%}"
    return f"{sharing(config, processes)}{remedy}"


def micro_batches(rollout: RolloutSection, minibatches: int) -> list[int]:
    """Micro-batches up to the configured one that training accepts (`config.check_micro_batches`), ascending."""
    sizes = range(1, rollout.micro_batch + 1)
    return [size for size in sizes if fits_micro_batches(rollout, minibatches, micro=size)]
