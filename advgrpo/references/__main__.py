"""Make, import and check sets of reference images, the positives an adversary learns from.

python -m advgrpo.references generate --prompts prompts.txt held_out.txt --out references/
torchrun --nproc-per-node=8 -m advgrpo.references generate --prompts prompts.txt --out references/
python -m advgrpo.references import photos/ --out references/
python -m advgrpo.references import hf:OWNER/NAME:split=train:column=caption --out references/
python -m advgrpo.references check references/ --prompts prompts.txt --sheet sheet.png
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field
from rich.console import Console
from rich.progress import track
from rich.table import Table

from advgrpo import config as configuration
from advgrpo.config import Options, Positional
from advgrpo.data.images import Fit
from advgrpo.data.prompts import load_prompts
from advgrpo.errors import UserError
from advgrpo.references.import_captions import CaptionSource
from advgrpo.runtime.command import plain_console, run_command
from advgrpo.runtime.folders import writable

BAD_SET = 1  # exit code of `check` for a set with errors


class Generate(Options):
    """Draw a reference set with a text-to-image model. Run it again to continue; finished images are verified."""

    prompts: list[Path]
    """Prompt files, .txt or .jsonl, or other sources of prompts (docs/data.md)."""
    out: Path
    """Folder to write; a second run with other prompts adds to it."""
    model: Annotated[str, Field(min_length=1)] = "Qwen/Qwen-Image"
    """Diffusers text-to-image pipeline: folder, hub id, "tiny" or "tiny:words"."""
    per_prompt: Annotated[int, Field(ge=1, le=100)] = 8
    """Images per prompt."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Noise of image k of a prompt is keyed by (seed, prompt, k)."""
    num_steps: Annotated[int, Field(ge=0, le=1000)] = 0
    """Sampler steps; 0 means the pipeline's default."""
    guidance_scale: Annotated[float, Field(ge=0, le=100)] | None = None
    """Classifier-free guidance (Qwen-Image's true_cfg_scale); None means the pipeline's default."""
    height: Annotated[int, Field(ge=0, le=8192)] = 0
    """Pixels; 0 means the pipeline's default."""
    width: Annotated[int, Field(ge=0, le=8192)] = 0
    """Pixels; 0 means the pipeline's default."""
    arguments: str = "{}"
    """Further arguments of the pipeline call, as a JSON object: '{"max_sequence_length": 256}'."""
    batch_size: Annotated[int, Field(ge=1, le=1000)] = 1
    """Images of a prompt drawn at once."""
    shard: str = ""
    """Draw part i of n, "i/n" from "0/n" on; empty reads torchrun's RANK and WORLD_SIZE."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model runs; auto is this process's GPU, or the CPU if there is none."""


class Import(Options):
    """Make a reference set of PNG, JPEG and WebP images, which are only read. Run it again to continue.

    Images become RGB squares: 16 bits are scaled to 8, colour profiles honoured, transparency put on a background,
    EXIF orientation applied, of animations the first frame taken. What was done to how many is printed.
    """

    folder: Annotated[Path, Positional]
    """Folder with images, in subfolders too; or records with captions: FILE.parquet, shards/{0000..0009}.tar
    (webdataset), such as hf:OWNER/NAME:split=S:column=C:image=I:config=C (docs/data.md)."""
    out: Path
    """Folder to write: images/, references.json, prompts.txt, held_out.txt, sheet.png, manifest.json."""
    captions: CaptionSource = "auto"
    """Where prompts are: index (references.json), metadata (metadata.jsonl with file_name and text, prompt or caption),
    txt (NAME.txt beside NAME.png), folders (their names), none (a style); auto is the first that is there."""
    held_out: int = 0
    """Prompts to set aside for evaluation, in held_out.txt; which depends on nothing but their texts."""
    size: int = 512
    """Side of the squares in pixels."""
    fit: Literal["crop", "letterbox"] = "crop"
    """Keep the middle of the longer side, or all of it with bars in the background's colour."""
    background: str = "white"
    """Behind transparent pixels and beside letterboxed ones: a name, or #rrggbb."""
    min_size: int = 64
    """Shorter side that an original must have, in pixels."""
    skip_unusable: bool = False
    """Leave out images that cannot be read, or are too small, too large or in a single colour, instead of stopping at
    the end."""


class Check(Options):
    """Look for everything that is wrong with a reference set; exit code 1 if anything is."""

    folder: Annotated[Path, Positional]
    """Folder with references.json and the images, or a style: a folder of images alone."""
    prompts: list[Path] | None = None
    """Prompt files whose prompts all need references; without, those of the index, or a style."""
    min_size: Annotated[int, Field(ge=1, le=8192)] = 16
    """Smallest width and height in pixels."""
    fit: Fit = "refuse"
    """What training will do with images that are not square: data.fit."""
    sheet: Path | None = None
    """Contact sheet to draw, PNG."""
    sheet_rows: Annotated[int, Field(ge=1, le=1000)] = 24
    """Prompts on it, spread evenly over all; for a style, rows of eight images."""


def generate(options: Generate) -> None:
    """Everything that can be wrong with the options is found before the model is loaded."""
    from advgrpo.references.builder import ReferenceBuilder, Shard
    from advgrpo.references.pipeline import DrawSettings, cut_by, open_pipeline, parse_arguments
    from advgrpo.runtime.libraries import quiet_libraries

    prompts = _load_prompts(options.prompts)
    shard = Shard.parse(options.shard)
    settings = DrawSettings(
        model=options.model,
        seed=options.seed,
        batch_size=options.batch_size,
        num_steps=options.num_steps,
        guidance_scale=options.guidance_scale,
        height=options.height,
        width=options.width,
        arguments=parse_arguments(options.arguments),
    )
    settings.check()
    writable(options.out, "--out", leave=False)
    quiet_libraries()
    recipe, draw = open_pipeline(settings, _device(options.device))
    if shard.index == 0:
        for cut in cut_by(recipe, prompts):
            print(f"note: {cut.describe(len(prompts))}", flush=True)
    builder = ReferenceBuilder(options.out, recipe, draw, per_prompt=options.per_prompt)
    built = builder.build(prompts, shard, report=lambda line: print(line, flush=True))
    print(f"shard {shard.index}/{shard.count}: drew {built.drawn} images, kept {built.kept}")
    if built.redrawn:
        print(f"drawn again because they were damaged: {', '.join(built.redrawn)}")
    if built.missing:
        print(f"{built.missing} images of other shards are missing; the last to finish writes references.json")
    else:
        print(f"{options.out} holds {options.per_prompt} references for each of {len(prompts)} prompts")


def import_images(options: Import, console: Console) -> None:
    """Convert and say what was done."""
    from advgrpo.data.record_source import parse_source
    from advgrpo.references.importing import HELD_OUT, IMAGES, PROMPTS, ImportRecipe, import_folder, import_records

    recipe = ImportRecipe(options.size, options.fit, options.background, options.min_size)
    source = parse_source(options.folder)
    records = source is not None and source.kind != "metadata"  # its images are files, which import_folder reads
    imported = (import_records if records else import_folder)(
        source if records else options.folder,
        options.out,
        recipe,
        options.captions,
        held_out=options.held_out,
        skip_unusable=options.skip_unusable,
        progress=lambda work, total: track(work, "converting", total=total, console=console),
    )
    for notice, files in [*imported.notices.items(), ("skipped", imported.skipped)]:
        if files:
            named = ", ".join(files[:3]) + (", ..." if len(files) > 3 else "")
            console.print(f"{notice}: {len(files)} ({named})", soft_wrap=True)
    images = {name for names in imported.prompts.values() for name in names}
    console.print(f"captions from {imported.captions}", soft_wrap=True)
    console.print(f"made {imported.made} images, kept {imported.kept}")
    if "" in imported.prompts:
        use = f"--data.style {shlex.quote(str(options.out / IMAGES))}"
    else:
        flags = {"prompts": PROMPTS, **({"held-out-prompts": HELD_OUT} if imported.held_out else {}), "references": ""}
        use = shlex.join(part for flag, name in flags.items() for part in (f"--data.{flag}", str(options.out / name)))
    prompts = sum(bool(prompt) for prompt in imported.prompts)
    console.print(f"{options.out}: {len(images)} images of {prompts} prompts; train with {use}", soft_wrap=True)


def check(options: Check, console: Console) -> bool:
    """Print the findings; True for a set without errors."""
    from advgrpo.data.references import import_command
    from advgrpo.references.check import check_set, draw_contact_sheet

    if options.sheet is not None and (options.sheet.suffix.lower() != ".png" or options.sheet.is_dir()):
        raise UserError(f"--sheet {options.sheet}: want the name of a PNG file, such as sheet.png")
    if options.sheet is not None and not options.sheet.parent.is_dir():
        raise UserError(f"--sheet {options.sheet}: the folder {options.sheet.parent} does not exist")
    prompts = None if options.prompts is None else _load_prompts(options.prompts)
    report = check_set(options.folder, prompts, min_size=options.min_size, fit=options.fit)
    table = Table(title=f"{options.folder}: {report.prompts} prompts, {report.files} files", title_justify="left")
    table.add_column("finding")
    table.add_column("count", justify="right")
    table.add_column("first", overflow="fold")
    for kind, findings in (("error", report.errors), ("warning", report.warnings)):
        for name, found in findings.items():
            table.add_row(f"{kind if found else 'ok'}: {name}", str(len(found)), "\n".join(found[:5]))
    for (width, height), count in report.sizes.most_common():
        table.add_row(f"size {width}x{height}", str(count), "")
    console.print(table)
    if report.importable:
        command = import_command(options.folder, style=not report.prompts)
        console.print(f"squares in plain RGB of all of them: {command}", soft_wrap=True)
    if options.sheet is not None:
        count = draw_contact_sheet(options.folder, options.sheet, prompts=prompts, rows=options.sheet_rows)
        console.print(f"wrote {options.sheet} with {count} images")
    return report.ok


def _load_prompts(files: list[Path]) -> list[str]:
    """The prompts of all files, each once; UserError without a file or for a bad one."""
    if not files:
        raise UserError("--prompts: give at least one prompt file")
    return list(dict.fromkeys(prompt.text for file in files for prompt in load_prompts(file)))


def _device(choice: str) -> str:
    import torch

    if choice == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but torch sees no GPU: use --device cpu, or install a CUDA build of torch")
    if choice == "cpu" or not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit codes of `command.run_command`; 1 for a set that `check` finds errors in."""
    return run_command(_references, arguments, interrupted="interrupted; run the same command again to continue")


def _references(arguments: list[str]) -> int:
    commands = {"generate": Generate, "import": Import, "check": Check}
    options = configuration.parse_command(commands, arguments, program="python -m advgrpo.references", about=__doc__)
    if isinstance(options, Check):
        return 0 if check(options, plain_console()) else BAD_SET
    import_images(options, plain_console()) if isinstance(options, Import) else generate(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
