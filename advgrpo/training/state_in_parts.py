"""Which tensors of a checkpoint lie in parts on the processes of a job, where what is trained does.

Weights, their averages and what the optimizer remembers of each element do; its counters, a head that learns and its
memory are whole on every process.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from advgrpo.config import Config
from advgrpo.policy.parts import Parts
from advgrpo.runtime.checkpoint import save_checkpoint
from advgrpo.runtime.checkpoint_parts import Cut, write_together
from advgrpo.runtime.distributed import Distributed
from advgrpo.training.stopping import SLOWEST_DISK

_IN_PARTS = re.compile(r"(?:policy|ema|old_policy)\.(.+)|optimizer\.state\.(\d+)\.(?!step$).+")


def in_parts(name: str) -> bool:
    """Whether the tensor of this name is cut as the parameter is that it belongs to."""
    return _IN_PARTS.fullmatch(name) is not None


def rows_of(names: Iterable[str], parts: Parts) -> dict[str, int]:
    """Rows of the whole of each of these tensors that lies in parts, by name."""
    found, parameters = {}, list(parts.shapes)
    for name in names:
        if belongs := _IN_PARTS.fullmatch(name):
            found[name] = parts.shapes[belongs[1] or parameters[int(belongs[2])]][0]
    return found


def cut_of(config: Config, distributed: Distributed) -> Cut | None:
    """Which rows this process reads of a checkpoint; None: it has all of what is trained."""
    if not (config.model.in_parts and config.model.is_sharded(distributed.world_size)):
        return None
    return Cut(distributed.rank, distributed.world_size, in_parts)


def save_in_parts(
    root: Path, iteration: int, tensors: dict[str, Tensor], state: dict[str, Any], keep: int, parts: Parts
) -> None:
    """As `save_checkpoint`, by all processes together, each with its rows of what lies in parts."""
    rows, distributed = rows_of(tensors, parts), parts.distributed
    own = {name: tensors[name] for name in rows}
    write = partial(
        write_together,
        tensors=own,
        rows=rows,
        cut=Cut(distributed.rank, distributed.world_size, in_parts),
        distributed=distributed,
        within_seconds=distributed.timeout_seconds + sum(tensor.nbytes for tensor in tensors.values()) / SLOWEST_DISK,
    )
    if distributed.is_main:
        whole = {name: tensor for name, tensor in tensors.items() if name not in rows}
        save_checkpoint(root, iteration, whole, state, keep, write_parts=write)
    else:
        write(None)
