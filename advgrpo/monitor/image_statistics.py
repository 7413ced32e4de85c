"""What can be said of images without any reward model: the monitor's independent witnesses.

Shapes: B images [B, 3, H, W] float in [0, 1]; R of them share a prompt.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from advgrpo.config.judge_checks import IMAGE_STATISTICS
from advgrpo.data.per_reference import PerReference
from advgrpo.runtime.cache import LastUsed
from advgrpo.runtime.distributed import Distributed
from advgrpo.runtime.transfer import to_device
from advgrpo.types import Rollout

_LUMA = (0.2126, 0.7152, 0.0722)  # Rec. 709
_DARK = 0.1  # luma below which a pixel counts as dark
_EDGE = 0.05  # luma per pixel; a step of 0.1 between flat areas has this slope on both sides
REFERENCES_LOOKED_AT = 4  # of a prompt, from the first: a mean is wanted, and decoding them all would cost time
PROMPTS_IN_MEMORY = 65_536  # a few numbers each


def image_statistics(images: torch.Tensor) -> dict[str, torch.Tensor]:
    """Three shares in [0, 1] per image, each [B] float32, computed on the images' device.

    - saturation: mean HSV saturation, (max - min) / max of RGB, 0 where the pixel is black;
    - dark_share: share of pixels whose Rec. 709 luma is below 0.1;
    - edge_density: share of pixels where the luma's Sobel gradient (kernel / 8, so in luma per pixel) exceeds 0.05.

    Raises:
        ValueError: anything but [B, 3, H, W].
    """
    if images.dim() != 4 or images.shape[1] != 3:
        raise ValueError(f"want images [B, 3, H, W], got {list(images.shape)}")
    images = images.float()
    high, low = images.amax(1), images.amin(1)
    saturation = torch.where(high > 0, (high - low) / high.clamp_min(torch.finfo(torch.float32).tiny), 0.0)
    luma = (images * to_device(torch.tensor(_LUMA), images.device).view(1, 3, 1, 1)).sum(1, keepdim=True)
    across = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]]) / 8
    kernels = to_device(torch.stack([across, across.T])[:, None], images.device)
    sobel = F.conv2d(F.pad(luma, (1, 1, 1, 1), mode="replicate"), kernels)
    gradient = torch.hypot(*sobel.unbind(1))  # a norm over two elements takes a CPU dozens of times as long
    return {
        "saturation": saturation.mean((1, 2)),
        "dark_share": (luma < _DARK).float().mean((1, 2, 3)),
        "edge_density": (gradient > _EDGE).float().mean((1, 2)),
    }


def group_diversity(features: torch.Tensor, group_size: int) -> torch.Tensor:
    """Mean cosine distance of all pairs within groups, averaged over groups: a scalar in [0, 2]; 0: all alike.

    For unit vectors u of a group of n, the mean of u_i . u_j over i != j is (|sum u|^2 - n) / (n (n - 1)), so no n x n
    matrix is needed.

    Args:
        features: [groups * group_size, D], groups in succession.

    Raises:
        ValueError: a number of rows that is no multiple of group_size, or groups of one.
    """
    if group_size < 2 or len(features) % group_size:
        raise ValueError(f"{len(features)} rows cannot be cut into groups of {group_size} (at least 2)")
    unit = F.normalize(features.float(), dim=-1).view(-1, group_size, features.shape[-1])
    squares = unit.square().sum((1, 2))  # n, but for rounding: identical rows then have a distance of 0
    cosine = (unit.sum(1).square().sum(1) - squares) / (group_size * (group_size - 1))
    return (squares / group_size - cosine).mean()


@dataclass(frozen=True)
class ImageStatistics:
    """Means over an iteration's images; `reference` weighs every prompt as often as it was drawn."""

    generated: dict[str, float]
    reference: dict[str, float]  # empty in a run without references
    group_diversity: float | None  # None where no DINO looks at the images

    def metrics(self) -> dict[str, float]:
        """As they are logged: monitor_<statistic>, monitor_reference_<statistic>, monitor_group_diversity."""
        return {
            **{f"monitor_{name}": value for name, value in self.generated.items()},
            **{f"monitor_reference_{name}": value for name, value in self.reference.items()},
            "monitor_group_diversity": self.group_diversity,
        }


def reference_statistics() -> PerReference[torch.Tensor]:
    """Mean statistics [len(IMAGE_STATISTICS)] float32 of a prompt's first references, on the CPU."""
    return PerReference(
        lambda batches, prompt: _columns(torch.cat(batches)).mean(0),
        LastUsed(PROMPTS_IN_MEMORY),
        first=REFERENCES_LOOKED_AT,
    )


def measure(
    rollout: Rollout,
    embeddings: torch.Tensor | None,
    of_references: Callable[[str, tuple[int, int]], torch.Tensor] | None,
    group_size: int,
    distributed: Distributed,
) -> ImageStatistics:
    """Statistics of an iteration's images over all processes, the same on each.

    Args:
        rollout: this process's images, which may be none.
        embeddings: [B, D] their DINO class tokens, in the rollout's order, if there is a DINO.
        of_references: (prompt, height and width) -> `reference_statistics` of it, if the run has references.
    """
    none = 0, len(IMAGE_STATISTICS)
    seen = [_columns(micro_batch.images) for micro_batch in rollout.micro_batches]
    columns = torch.cat([torch.zeros(*none, device=distributed.device), *seen])
    if of_references is not None:
        sizes = {
            prompt: each.images.shape[-2:] for each in rollout.micro_batches for prompt in each.micro_batch.prompts
        }
        by_prompt = {prompt: of_references(prompt, tuple(size)) for prompt, size in sizes.items()}
        own = torch.cat([torch.zeros(*none), *(by_prompt[prompt][None] for prompt in rollout.prompts)])
        columns = torch.cat([columns, to_device(own, columns.device)], dim=1)
    order = distributed.all_gather(to_device(rollout.image_ids, columns.device)).argsort()
    means = distributed.all_gather(columns)[order].double().mean(0).tolist()
    count, diversity = len(IMAGE_STATISTICS), None
    if embeddings is not None:
        by_id = distributed.all_gather(embeddings)[order.to(embeddings.device)]
        diversity = group_diversity(by_id, group_size).item()
    return ImageStatistics(
        dict(zip(IMAGE_STATISTICS, means[:count])), dict(zip(IMAGE_STATISTICS, means[count:])), diversity
    )


def _columns(images: torch.Tensor) -> torch.Tensor:
    """[B, len(IMAGE_STATISTICS)]"""
    statistics = image_statistics(images)
    return torch.stack([statistics[name] for name in IMAGE_STATISTICS], dim=1)
