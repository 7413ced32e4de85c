"""Which of a rollout's images the update is computed of: those whose advantages have something to say.

The gradient is a mean over images of terms that are proportional to their advantages (docs/method.md 5.4), so terms of
0 can be left out without changing it, and small ones at little loss. What is left is cut into micro-batches of the
rollout's own shape, one prompt each, because the update must repeat the rollout's log-probabilities to the last bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby

import torch

from advgrpo.runtime.transfer import to_device
from advgrpo.types import MicroBatchRollout, WindowStep


def without_dead(micro_batches: Sequence[MicroBatchRollout], advantages: torch.Tensor) -> list[MicroBatchRollout]:
    """Those in which somebody has an advantage; `advantages` are [G] on the host, by image number."""
    return [each for each in micro_batches if bool(advantages[each.micro_batch.image_ids].any())]


def most_informative(
    micro_batches: Sequence[MicroBatchRollout], advantages: torch.Tensor, group_size: int, kept: int
) -> list[MicroBatchRollout]:
    """The `kept` images of every group with the largest |advantage|, of equals the first, in order of image number.

    Args:
        micro_batches: of one prompt each, with whole groups, which lie next to each other.
        advantages: [G] on the host, by image number.
        kept: a multiple of the micro-batches' size.
    """

    def of_group(each: MicroBatchRollout) -> tuple[int, int]:
        return each.micro_batch.minibatch, int(each.micro_batch.prompt_groups[0])

    found: list[MicroBatchRollout] = []
    for (_, group), members in groupby(micro_batches, key=of_group):
        own = advantages[group * group_size : (group + 1) * group_size]
        places = own.abs().argsort(descending=True, stable=True)[:kept].sort().values
        found += _cut(list(members), places)
    return found


def _cut(members: list[MicroBatchRollout], places: torch.Tensor) -> Iterator[MicroBatchRollout]:
    """Micro-batches of the images at `places`, int64 on the host, of a group's micro-batches."""
    first = members[0]
    size = len(first.micro_batch.image_ids)
    for part in places.split(size):
        rows = to_device(part, first.images.device)
        ids = torch.cat([each.micro_batch.image_ids for each in members])[part]
        draws = torch.cat([each.micro_batch.draws for each in members])[part]
        micro_batch = replace(first.micro_batch, image_ids=ids, chosen=draws)
        steps = [_rows(together, rows) for together in zip(*(each.steps for each in members), strict=True)]
        yield replace(first, micro_batch=micro_batch, steps=steps, images=first.images[:0], clean=None)


def _rows(parts: Sequence[WindowStep], rows: torch.Tensor) -> WindowStep:
    """One step of the images at `rows`, int64 [M] on the device, of a group's micro-batches."""

    def of(name: str) -> torch.Tensor | None:
        values = [getattr(part, name) for part in parts]
        return None if values[0] is None else torch.cat(values).index_select(0, rows)

    first = parts[0]
    return replace(
        first,
        latents=first.latents if first.shared else of("latents"),
        next_latents=of("next_latents"),
        log_prob=of("log_prob"),
        weight=of("weight"),
        mean=of("mean"),
    )
