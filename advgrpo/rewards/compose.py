"""One reward out of several: weighted sums (eq. 8's lambda mix), normalised each for itself, with gates.

    R_i = sum_k w_k * norm_k(R_k,i)

`norm` leaves a reward as it is ("none"), or subtracts mean and divides by standard deviation over the prompt's group
("group") or over the iteration ("global"), so that a weight means the same whatever a reward's scale. With "none" and
weights that sum to 1 this is docs/method.md 6.4, R = lambda * R_rule + (1 - lambda) * sim(gen, ref). With "group" for
all and `advantage.std` global it is GDPO (arXiv 2601.05242; X-GenGroup/Flow-Factory at a0b2bc5, `compute_gdpo`, which
bounds deviations at 1e-6 where 1e-4 is added here).

A gate is a bar: an image whose raw reward lies below it gets its group's lowest total, so that nothing else can earn
it a positive advantage.

Shapes: B images of an iteration over all processes, by image number, groups next to each other.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from advgrpo.config import RewardSection

_EPS = 1e-4  # as in the advantages (docs/method.md 4.1): a group that agrees stays at 0


def normalized(reward: torch.Tensor, how: str, group_size: int) -> torch.Tensor:
    """[B] by `RewardSection.normalize`; population standard deviations."""
    if how == "none":
        return reward
    rows = reward.view(-1, group_size) if how == "group" else reward[None]
    spread = rows.std(dim=1, correction=0, keepdim=True)
    return ((rows - rows.mean(dim=1, keepdim=True)) / (spread + _EPS)).view(-1)


def compose(
    components: Mapping[str, torch.Tensor], sections: Mapping[str, RewardSection], group_size: int
) -> torch.Tensor:
    """The total [B] float32 of raw rewards [B] by name; `sections` says how each of them counts."""
    weighted = [
        sections[name].weight * normalized(reward.float(), sections[name].normalize, group_size)
        for name, reward in components.items()
        if sections[name].weight > 0
    ]
    total = torch.stack(weighted).sum(0)
    barred = torch.zeros_like(total, dtype=torch.bool)
    for name, reward in components.items():
        if sections[name].gate is not None:
            barred |= reward < sections[name].gate
    lowest = total.view(-1, group_size).amin(dim=1).repeat_interleave(group_size)
    return torch.where(barred, lowest, total)
