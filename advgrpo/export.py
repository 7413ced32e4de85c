"""Convert a trained LoRA for other programs: ComfyUI, kohya's scripts and web UIs, or diffusers again.

python -m advgrpo.export runs/tiny/lora --format kohya --out lora.safetensors
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from advgrpo import config as configuration
from advgrpo.config import ExportFormat, Options, Positional
from advgrpo.errors import UserError
from advgrpo.runtime.command import run_command


class Export(Options):
    """Convert a trained LoRA; its strength is folded into the weights, so every program applies it at 1.0."""

    lora: Annotated[Path, Positional]
    """Folder with pytorch_lora_weights.safetensors, such as OUT/lora, or a file in diffusers' format."""
    out: Path
    """File to write, .safetensors."""
    format: ExportFormat = "comfyui"
    """kohya is also for web UIs. SD3's fused q, k and v make kohya's file about twice as large."""


def export(options: Export) -> None:
    """Read, convert and write; UserError for anything that is wrong with either file."""
    from advgrpo.policy.lora_file import convert, read_lora, write_safetensors

    if options.out.suffix != ".safetensors" or options.out.is_dir():
        raise UserError(f"--out {options.out}: want a file name that ends in .safetensors")
    file = read_lora(options.lora, "LORA")
    if options.out.exists() and options.out.samefile(file.path):
        raise UserError(f"--out {options.out} is the LoRA itself; choose another name")
    write_safetensors(options.out, *convert(file.modules, file.component, options.format))
    print(f"wrote {options.out}: {len(file.modules)} adapters of the {file.component} for {options.format}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit codes of `command.run_command`."""
    return run_command(_export, arguments)


def _export(arguments: list[str]) -> int:
    export(configuration.parse_options(Export, arguments, program="python -m advgrpo.export", about=__doc__))
    return 0


if __name__ == "__main__":
    sys.exit(main())
