"""What --fast switches on here, and why the rest is off."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class FastPath:
    name: str
    on: bool
    why: str  # what it saves when on, why it is off otherwise


@dataclass(frozen=True)
class FastPaths:
    """The decisions the trainer reads, and the table it prints."""

    share_prefix: bool
    merged_lora: bool
    fused_optimizer: bool
    table: tuple[FastPath, ...]

    @classmethod
    def choose(cls, fast: bool, *, device: torch.device, lora: bool) -> FastPaths:
        cuda = device.type == "cuda"
        gpu_only = "" if cuda else "no CUDA device"
        plain = "" if fast else "--no-fast"
        merged_off = plain or ("" if lora else "full fine-tuning has no adapters to merge")
        rows = (
            _row(
                "shared prefix",
                plain,
                "one trajectory per prompt up to the window's first step",
            ),
            _row("merged LoRA", merged_off, "ODE steps run merged weights: no adapter matmuls"),
            _row("fused AdamW", plain, "one call for all parameters"),
            _row("Triton kernels", plain or gpu_only, "fused step, loss, advantages, patches and head"),
            _row("CUDA graphs", plain or gpu_only or "not available in this version", "one launch per trajectory"),
            _row("FP8", plain or gpu_only or "not available in this version", "ODE steps on FP8 tensor cores"),
        )
        return cls(fast, fast and lora, fast, rows)

    def print(self, console: Console) -> None:
        table = Table(title="Fast paths", title_justify="left")
        for column in ("path", "", "why"):
            table.add_column(column)
        for row in self.table:
            table.add_row(row.name, "[green]on[/]" if row.on else "[dim]off[/]", row.why)
        console.print(table)


def _row(name: str, off_because: str, saves: str) -> FastPath:
    return FastPath(name, not off_because, off_because or saves)
