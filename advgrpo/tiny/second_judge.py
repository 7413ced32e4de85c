"""The tiny world's second judge: a small CNN of our own that names what is drawn.

It learned on drawings by `JUDGE_ARTISTS` alone, who drew neither what the base model was trained on nor the references
(`tools.tiny.build_second_judge`), and no reward, backbone or setting has anything of it. It shares no weight with
the judge of `judge.py` and errs otherwise; what both see is more than either's habit.

An image is cut to the square that its caption gives the drawing, in 32 pixels.

Shapes: B images [B, 3, 48, 48] float32 in [0, 1].
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from advgrpo.tiny.judge import cut
from advgrpo.tiny.scenes import NAMES, Scene

PIXELS = 32  # a side of what the network looks at
_SHIPPED = Path(__file__).parent / "assets" / "second_judge"
_BATCH = 256


def _layer(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.GroupNorm(8, outputs), nn.ReLU()]


def network() -> nn.Sequential:
    """[B, 3, 32, 32] in [0, 1] to logits [B, 64] of NAMES; untrained, 0.2 M parameters."""
    return nn.Sequential(
        *_layer(3, 24, 1), *_layer(24, 48, 2), *_layer(48, 64, 2), *_layer(64, 64, 1), *_layer(64, 96, 2),
        *_layer(96, 96, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(96, len(NAMES)),
    )  # fmt: skip


class SecondJudge:
    """The trained network; its arithmetic is float32 on the CPU.

    Args:
        network: of `network()`; None for the shipped one.
    """

    def __init__(self, network: nn.Module | None = None):
        self.network = (load(_SHIPPED) if network is None else network).eval().requires_grad_(False)

    @torch.no_grad()
    def look(self, images: torch.Tensor, scenes: list[Scene]) -> torch.Tensor:
        """[B] bool: of all 64 names, the network finds the scene's the likeliest."""
        parts = []
        for start in range(0, len(scenes), _BATCH):
            part = slice(start, start + _BATCH)
            parts.append(self.network(cut(images[part].float().cpu(), scenes[part], PIXELS)).argmax(1))
        return torch.cat(parts) == torch.tensor([NAMES.index(scene.name) for scene in scenes])


def load(folder: Path) -> nn.Module:
    """The network that `save` wrote, in float32."""
    loaded = network()
    loaded.load_state_dict({name: value.float() for name, value in load_file(folder / "model.safetensors").items()})
    return loaded


def save(trained: nn.Module, folder: Path) -> None:
    """model.safetensors in fp16, readable by everyone."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "model.safetensors"
    save_file({name: value.half().contiguous() for name, value in trained.state_dict().items()}, path)
    path.chmod(0o644)
