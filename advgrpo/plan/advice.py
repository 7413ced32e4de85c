"""What to change after a GPU has run out of memory."""

from __future__ import annotations

import re

from advgrpo.config import Config
from advgrpo.errors import UserError
from advgrpo.plan.captured import needs_room
from advgrpo.plan.estimate import GB, Estimate, accepted
from advgrpo.plan.memory import plan
from advgrpo.plan.remedies import changes


def advice(error: BaseException, config: Config, *, processes: int = 1) -> str:
    """What to change after torch.cuda.OutOfMemoryError, in this order, with this run's values.

    Graphs of the update first (they change no bit), the micro-batch (no result but rounding), checkpointing (one more
    forward in the update), then what changes the run: fewer cached patches, fewer images, adapters in fewer blocks.

    Args:
        error: the exception; its own text is quoted, and the card's capacity is read from it where it is given.
    """
    rollout, model = config.rollout, config.model
    steps = []
    if needs_room(config) and _captures(config, _capacity_gb(error), processes):
        steps.append("update.graphs = false instead of auto")
    smaller = [micro for micro in accepted(config, processes) if micro < rollout.micro_batch]
    if smaller:
        steps.append(f"rollout.micro_batch = {smaller[-1]} instead of {rollout.micro_batch}")
    if not model.gradient_checkpointing:
        steps.append("model.gradient_checkpointing = true instead of false")
    steps += [f"{name} instead of {_current(config, name)}" for name, _ in changes(config, processes)]
    if not steps:
        steps = ["a GPU with more memory: every knob is at its smallest"]
    order = "; ".join(f"{number}. {step}" for number, step in enumerate(steps, 1))
    return (
        f"out of GPU memory ({_first_sentence(error)}). Try in this order: {order}.{_planned(error, config, processes)}"
    )


def _captures(config: Config, gpu_gb: float | None, processes: int) -> bool:
    """Whether a run captures its update on a GPU of `gpu_gb`; of any size where that is not known."""
    try:
        estimate = Estimate(config, processes)
    except UserError:  # an architecture that is not known is not captured by itself
        return False
    return estimate.captures and (gpu_gb is None or estimate.peak_with_captured_update() <= gpu_gb)


def _current(config: Config, change: str) -> str:
    value = config
    for part in change.split(" = ")[0].split("."):
        value = getattr(value, part)
    return str(value)


def _first_sentence(error: BaseException) -> str:
    sentences = re.split(
        r"(?<=[a-zA-Z])\. ", str(error).strip().splitlines()[0] if str(error).strip() else "no details"
    )
    return ". ".join(sentences[:2]).rstrip(".")


def _capacity_gb(error: BaseException) -> float | None:
    """Of the card that is full, where the error says it."""
    found = re.search(r"total capacity of ([\d.]+) GiB", str(error))
    return float(found[1]) * 2**30 / GB if found else None


def _planned(error: BaseException, config: Config, processes: int) -> str:
    """The plan for this card, where its capacity is known."""
    capacity = _capacity_gb(error)
    if capacity is None:
        return " `python -m advgrpo.plan` shows what fits which GPU"
    try:
        return f" Plan for {plan(config, capacity, processes=processes).line()}"
    except UserError as unknown:
        return f" No plan: {unknown}"
