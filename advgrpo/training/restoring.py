"""A checkpoint's content against the run that shall continue from it, checked as a whole before anything is taken over.

Hashes tell that files are what somebody wrote, not that they are this run's. PyTorch would broadcast a tensor of
another shape, cast one of another dtype and leave what is missing as it is, in silence: here each is an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from advgrpo.adversary.trainer import DiscriminatorTrainer, ReplayBuffer
from advgrpo.errors import UserError
from advgrpo.monitor.flag_state import FlagState
from advgrpo.monitor.monitor import Monitor
from advgrpo.runtime.checkpoint import checked_optimizer, flatten_state, not_finite, unflatten_state

Tensors = dict[str, torch.Tensor]
_OF_OLDER_PROGRAMS = {"rng.torch"}  # what was saved once and says nothing any more
_REMEDY = "it is another run's, or damaged"


@dataclass
class Restorable:
    """What an objective takes over; nothing, unless it remembers something."""

    @property
    def prefixes(self) -> list[str]:
        """How the names of its tensors begin in a checkpoint."""
        return []


@dataclass
class RestoredHead(Restorable):
    """What a discriminator trainer takes over (`apply`)."""

    weights: Tensors
    optimizer: dict[str, Any]  # for Optimizer.load_state_dict
    replay_counters: dict[str, int]
    replay: Tensors = field(default_factory=dict)

    @property
    def prefixes(self) -> list[str]:
        return ["head.", "head_optimizer.", *(["replay."] if self.replay else [])]

    def apply(self, discriminator_trainer: DiscriminatorTrainer) -> None:
        """Continue from it as if never stopped."""
        discriminator_trainer.adversary.load_state_dict(self.weights)
        discriminator_trainer.adversary.optimizer.load_state_dict(self.optimizer)
        discriminator_trainer.load(self.replay, self.replay_counters)


@dataclass
class Restored:
    """What `Trainer.load` takes over; every tensor has the name, shape and dtype of the run's own, and is finite."""

    iteration: int
    global_step: int
    policy: Tensors
    ema: Tensors
    optimizer: dict[str, Any]  # for Optimizer.load_state_dict
    monitor: dict[str, FlagState]
    objective: Restorable


class Remembers(Protocol):
    """An objective (objective.py), as far as a checkpoint is concerned."""

    def checked(self, tensors: Tensors, state: Mapping[str, Any]) -> Restorable: ...


def check(
    tensors: Tensors,
    state: Mapping[str, Any],
    *,
    parameters: Mapping[str, torch.Tensor],
    optimizer: torch.optim.Optimizer,
    monitor: Monitor,
    objective: Remembers,
) -> Restored:
    """What `Trainer.state()` once returned, for a trainer of these parts, which would return the same names and shapes.

    Args:
        parameters: what the policy trains, by name.

    Raises:
        UserError: a tensor or entry that is missing, one too many, of another shape, dtype or kind, not finite, or
            beyond what it can be. Nothing was changed.
    """
    wrong = not_finite(tensors, dict(state))
    if wrong is not None:
        raise UserError(f"{wrong} is not finite; {_REMEDY}")
    own = entry(state, "trainer", dict)
    restored = Restored(
        iteration=count(own, "iteration"),
        global_step=count(own, "global_step"),
        policy=taken(tensors, "policy.", parameters),
        ema=taken(tensors, "ema.", parameters),
        optimizer=_optimizer(optimizer, tensors, own, "optimizer"),
        monitor=monitor.checked(entry(own, "monitor", dict)),
        objective=objective.checked(tensors, own),
    )
    refuse_others(tensors, ["policy.", "ema.", "optimizer.", *restored.objective.prefixes])
    return restored


def check_head(discriminator_trainer: DiscriminatorTrainer, tensors: Tensors, own: Mapping[str, Any]) -> RestoredHead:
    """What `DiscriminatorTrainer.state()` once returned, for one that would return the same names and shapes.

    Raises:
        UserError: as `check`. Nothing was changed.
    """
    adversary, replay = discriminator_trainer.adversary, discriminator_trainer.replay
    optional = getattr(adversary, "state_added_later", ())
    restored = RestoredHead(
        weights=taken(tensors, "head.", adversary.state_dict(), optional=optional),
        optimizer=_optimizer(adversary.optimizer, tensors, own, "head_optimizer"),
        replay_counters=_replay_counters(replay, entry(own, "replay", dict)),
    )
    if restored.replay_counters["size"]:
        slots = discriminator_trainer.row_of_replay().tensors
        slots = {name: row.expand(replay.capacity, *row.shape[1:]) for name, row in slots.items()}
        restored.replay = taken(tensors, "replay.", slots)
    return restored


def refuse_others(tensors: Tensors, prefixes: list[str]) -> None:
    """UserError for a tensor whose name begins with none of the prefixes."""
    for name in tensors:
        if not name.startswith(tuple(prefixes)) and name not in _OF_OLDER_PROGRAMS:
            raise UserError(f"tensor {name} is none of this run's; {_REMEDY}")


def entry(state: Mapping[str, Any], name: str, kind: type) -> Any:
    """`state[name]`, which must be a `kind` (JSON's: bool is no int)."""
    if name not in state:
        raise UserError(f"{name} is missing in state.json; {_REMEDY}")
    if type(state[name]) is not kind:
        raise UserError(f"{name} in state.json is {_short(state[name])}, want {_KINDS[kind]}; {_REMEDY}")
    return state[name]


_KINDS = {dict: "an object", int: "a whole number", list: "a list"}


def count(state: Mapping[str, Any], name: str, *, below: int = 2**62) -> int:
    """A whole number from 0."""
    value = entry(state, name, int)
    if not 0 <= value < below:
        raise UserError(f"{name} in state.json is {_short(value)}, want 0 or more and below {below}; {_REMEDY}")
    return value


def measured(state: Mapping[str, Any], name: str) -> dict[str, float]:
    """Metrics by name; an empty object where the entry is absent."""
    found = entry(state, name, dict) if name in state else {}
    for metric, value in found.items():
        if type(value) not in (int, float):
            raise UserError(f"{name}.{metric} in state.json is {_short(value)}, want a number; {_REMEDY}")
    wrong = not_finite({}, found)
    if wrong is not None:
        raise UserError(f"{name}.{wrong} in state.json is not finite; {_REMEDY}")
    return found


def taken(tensors: Tensors, prefix: str, own: Mapping[str, torch.Tensor], *, optional: tuple[str, ...] = ()) -> Tensors:
    """The tensors called prefix + name, by name: exactly those of `own`, with its shapes and dtypes."""
    found = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    for name in own:
        if name not in found and name not in optional:
            raise UserError(f"tensor {prefix}{name} is missing; {_REMEDY}")
    for name, tensor in found.items():
        if name not in own:
            raise UserError(f"tensor {prefix}{name} is none of this run's; {_REMEDY}")
        if tensor.shape != own[name].shape or tensor.dtype != own[name].dtype:
            raise UserError(f"tensor {prefix}{name} is {described(tensor)}, this run's is {described(own[name])}")
    return found


def described(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _optimizer(
    optimizer: torch.optim.Optimizer, tensors: Tensors, state: Mapping[str, Any], name: str
) -> dict[str, Any]:
    """A state for `load_state_dict`, made of the tensors called name.… and no others, each in its own place."""
    rest = entry(state, name, dict)
    found = checked_optimizer(optimizer, tensors, rest, name)
    own, again = flatten_state(unflatten_state(tensors, rest), name)
    if again != rest or own.keys() != {each for each in tensors if each.startswith(f"{name}.")}:
        raise UserError(f"{name}: its tensors are not where state.json says; {_REMEDY}")
    return found


def _replay_counters(replay: ReplayBuffer, counters: Mapping[str, Any]) -> dict[str, int]:
    size = count(counters, "size", below=replay.capacity + 1)
    cursor = count(counters, "cursor", below=max(replay.capacity, 1))
    if size < replay.capacity and cursor != size:
        raise UserError(f"replay: {size} of {replay.capacity} slots are filled, but the next is {cursor}; {_REMEDY}")
    return {"size": size, "cursor": cursor}


def _short(value: Any) -> str:
    text = repr(value) if not isinstance(value, (dict, list)) else f"a {type(value).__name__}"
    return text if len(text) < 60 else f"{text[:57]}..."
