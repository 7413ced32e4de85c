"""Convert a trained LoRA for other programs, write its model card, and publish it on the Hugging Face hub.

python -m advgrpo.export runs/tiny/lora --format kohya --out lora.safetensors
python -m advgrpo.export runs/tiny/lora --push-to me/my-lora --private
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
    out: Path | None = None
    """File to write, .safetensors."""
    format: ExportFormat = "comfyui"
    """kohya is also for web UIs. SD3's fused q, k and v make kohya's file about twice as large."""
    card: bool = False
    """Write the model card, README.md, into the LoRA's folder, of the files of the run that it lies in; a README.md of
    somebody else is left as it is."""
    base_model: str = ""
    """The base model's name on the hub, for the card, where the run was trained from a folder."""
    push_to: str = ""
    """USER/NAME on the hub: write the card, then upload the LoRA's folder there, after listing what."""
    private: bool = False
    """Make that repository private, if it is made."""


def export(options: Export) -> None:
    """Read, convert and write; UserError for anything that is wrong with the files or with the hub."""
    from advgrpo.policy.lora_file import LORA_FILE, convert, read_lora, write_safetensors
    from advgrpo.training.hub import check_repository

    if options.out is None and not (options.card or options.push_to):
        raise UserError("--out is missing: want a file to write, or --card, or --push-to USER/NAME")
    if options.out is not None and (options.out.suffix != ".safetensors" or options.out.is_dir()):
        raise UserError(f"--out {options.out}: want a file name that ends in .safetensors")
    if options.private and not options.push_to:
        raise UserError("--private says how --push-to uploads; give both or neither")
    if options.push_to:
        check_repository(options.push_to, "--push-to")
    file = read_lora(options.lora, "LORA")
    if (options.card or options.push_to) and file.path.name != LORA_FILE:
        raise UserError(f"LORA = {str(options.lora)!r}: a card is of a folder with {LORA_FILE}, such as OUT/lora")
    if options.out is not None:
        if options.out.exists() and options.out.samefile(file.path):
            raise UserError(f"--out {options.out} is the LoRA itself; choose another name")
        write_safetensors(options.out, *convert(file.modules, file.component, options.format))
        print(f"wrote {options.out}: {len(file.modules)} adapters of the {file.component} for {options.format}")
    if options.card or options.push_to:
        _write_card(file.path.parent, options)
    if options.push_to:
        _push(file.path.parent, options)


def _write_card(folder: Path, options: Export) -> None:
    from advgrpo.training.model_card import CARD, RunFacts, newest_grid, write_card

    written = write_card(folder, RunFacts.read(folder, options.base_model), newest_grid(folder.resolve().parent))
    note = f"wrote {written}" if written else f"{folder / CARD} is not of this program and stays as it is"
    print(note)


def _push(folder: Path, options: Export) -> None:
    """Only files that belong to a LoRA; whatever else lies in the folder stays there."""
    from advgrpo.training.hub import upload
    from advgrpo.training.model_card import publishable

    url = upload(folder, publishable(folder), options.push_to, private=options.private, flag="--push-to", say=print)
    print(f"uploaded: {url}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit codes of `command.run_command`."""
    return run_command(_export, arguments)


def _export(arguments: list[str]) -> int:
    export(configuration.parse_options(Export, arguments, program="python -m advgrpo.export", about=__doc__))
    return 0


if __name__ == "__main__":
    sys.exit(main())
