"""Convert a trained LoRA for other programs: ComfyUI, kohya's scripts and web UIs, or diffusers again.

python -m advgrpo.export runs/tiny/lora --format kohya --out lora.safetensors
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from .config import ExportFormat
from .errors import UserError


@dataclass
class Export:
    """Convert a trained LoRA; its strength is folded into the weights, so every program applies it at 1.0."""

    lora: tyro.conf.Positional[Path]
    """Folder with pytorch_lora_weights.safetensors, such as OUT/lora, or a file in diffusers' format."""
    out: Path
    """File to write, .safetensors."""
    format: ExportFormat = "comfyui"
    """kohya is also for web UIs. SD3's fused q, k and v make kohya's file about twice as large."""


def export(options: Export) -> None:
    """Read, convert and write; UserError for anything that is wrong with either file."""
    from .policy.lora_file import convert, read_lora, write_safetensors

    if options.out.suffix != ".safetensors" or options.out.is_dir():
        raise UserError(f"--out {options.out}: want a file name that ends in .safetensors")
    file = read_lora(options.lora, "LORA")
    if options.out.exists() and options.out.samefile(file.path):
        raise UserError(f"--out {options.out} is the LoRA itself; choose another name")
    write_safetensors(options.out, *convert(file.modules, file.component, options.format))
    print(f"wrote {options.out}: {len(file.modules)} adapters of the {file.component} for {options.format}")


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0, or 2 for bad input."""
    options = tyro.cli(Export, args=arguments, prog="python -m advgrpo.export", description=__doc__)
    try:
        export(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return UserError.EXIT_CODE
    return 0


if __name__ == "__main__":
    sys.exit(main())
