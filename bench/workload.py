"""What a benchmark case consists of, and the shapes of the model it is about."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Sizes:
    """Shapes of one GPU's share of an iteration."""

    rollout: int  # images per step of the sampler's glue
    train: int  # images per optimizer micro-batch, both guidance branches given
    latent: tuple[int, int, int]  # C, H, W
    batch: int  # rows of a transformer forward: images x 2 for guidance
    tokens: int  # image tokens T
    text: int  # text tokens S
    heads: int
    head_dim: int
    mlp: int  # hidden width of the feed-forward layer
    patches: int  # DINOv2 patches P
    chosen: int  # patches that are scored, n
    features: int  # DINOv2 width D
    hidden: int  # width of the adversarial head
    scored: int  # images per reward pass
    groups: int
    group_size: int
    adapters: int  # linears with LoRA, all [channels, channels]
    decoded: tuple[int, int, int]  # images, channels and side in pixels of the VAE decoder's last blocks

    @property
    def channels(self) -> int:
        return self.heads * self.head_dim


# SD3.5-medium at 512x512 with 205 text tokens, DINOv2 ViT-B/14 at 518, 48 groups of 16.
SD35_MEDIUM_512 = Sizes(
    rollout=128,
    train=8,
    latent=(16, 64, 64),
    batch=16,
    tokens=1024,
    text=205,
    heads=24,
    head_dim=64,
    mlp=6144,
    patches=1369,
    chosen=64,
    features=768,
    hidden=512,
    scored=96,
    groups=48,
    group_size=16,
    adapters=191,
    decoded=(8, 128, 512),
)
# The same cases in milliseconds on a CPU.
TINY = Sizes(
    rollout=4,
    train=2,
    latent=(4, 8, 8),
    batch=2,
    tokens=16,
    text=5,
    heads=2,
    head_dim=16,
    mlp=64,
    patches=20,
    chosen=8,
    features=16,
    hidden=16,
    scored=4,
    groups=4,
    group_size=4,
    adapters=3,
    decoded=(2, 64, 12),
)


@dataclass(frozen=True)
class Workload:
    """Ours and the plain PyTorch an engineer would write, on the same inputs; both run one call."""

    ours: Callable[[], object]
    eager: Callable[[], object]
    bytes: int  # inputs read once and outputs written once: what any implementation has to move
    flops: int = 0  # of the matrix products
    same: Callable[[], object] | None = (
        None  # plain PyTorch with ours' own draws and rounding, where `eager` has others
    )


@dataclass(frozen=True)
class Bench:
    """Where tensors live and what the network computes in.

    `exact` is the same bench in float64: the same draws, rounded to the same dtypes, held and computed on in float64.
    """

    sizes: Sizes
    device: str
    exact: bool = False

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device == "cuda" else torch.float32

    @property
    def wide(self) -> torch.dtype:
        """What baselines accumulate in; `compute_dtype` of the references."""
        return torch.float64 if self.exact else torch.float32

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        rounded = torch.randn(shape, device=self.device, dtype=torch.float32).to(dtype)
        return rounded.double() if self.exact else rounded


def nbytes(*tensors: torch.Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)
