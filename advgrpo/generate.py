"""Images from a base model, a trained LoRA, or both side by side.

python -m advgrpo.generate --lora runs/tiny/lora --base --prompt "a small fox on blue, left"
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import Field

from advgrpo import config as configuration
from advgrpo.config import Repeated
from advgrpo.errors import UserError
from advgrpo.runtime.callable_module import make_callable
from advgrpo.runtime.command import run_command
from advgrpo.sampling.drawing import DrawOptions
from advgrpo.sampling.stock import add_lora, draw_stock, open_stock

if TYPE_CHECKING:
    from PIL.Image import Image

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


class Generate(DrawOptions):
    """Images from a base model, a trained LoRA, or both side by side."""

    prompt: Annotated[tuple[str, ...], Repeated] = ()
    """Text to draw; repeat the flag for several."""
    lora: str = ""
    """Folder with pytorch_lora_weights.safetensors, such as OUT/lora; empty draws the base model."""
    base: bool = False
    """Draw the base model's images beside the LoRA's, from the same noise."""
    output: Path = Path("grid.png")
    """Image file to write."""
    seed: Annotated[int, Field(ge=0, lt=2**62)] = 0
    """Image k of a prompt uses seed + k."""
    images_per_prompt: Annotated[int, Field(ge=1, le=100)] = 4
    """Images of every prompt, drawn at once."""


def check(options: Generate, *, write: bool = True) -> None:
    """UserError for anything in the flags that would fail after the model is loaded; `write`: `output` is written."""
    if not options.prompt or not all(p.strip() for p in options.prompt):
        raise UserError('--prompt: give at least one non-empty prompt, e.g. --prompt "a large fox on blue"')
    if write:
        _check_output(options.output)


def _check_output(output: Path) -> None:
    if output.suffix.lower() not in _SUFFIXES or output.is_dir():
        raise UserError(f"--output {output}: want the name of an image file, {', '.join(_SUFFIXES)}")
    if not output.parent.is_dir():
        raise UserError(f"--output {output}: the folder {output.parent} does not exist; create it or choose another")
    existed = output.exists()
    try:
        with output.open("ab"):
            pass
    except OSError as error:
        raise UserError(f"--output {output} cannot be written ({error.strerror}); choose another file") from error
    if not existed:
        output.unlink()


def draw_images(options: Generate, *, write: bool = True) -> dict[str, torch.Tensor]:
    """Draw every prompt, and write the grid where `write` says so.

    Returns:
        "base", "lora" or both: [prompts, images_per_prompt, 3, H, W] float32 in [0, 1].
    """
    from advgrpo.data.prompt_lengths import cut_prompts
    from advgrpo.policy.adapters import read_lora_for
    from advgrpo.policy.pipelines import pipeline_folder
    from advgrpo.reporting.plots import draw_grid
    from advgrpo.runtime.distributed import Distributed
    from advgrpo.training.preflight import check_model, check_size

    check(options, write=write)
    check_model(options.model, "--model")
    device = Distributed.start(options.device).device.type
    folder = pipeline_folder(options.model, field="--model")
    drawn = options.drawn(folder)
    check_size(folder, drawn.resolution, model_field="--model", field="--resolution")
    for cut in cut_prompts(folder, options.prompt, drawn.max_sequence_length):
        print(f"note: {cut.describe(len(options.prompt))}")
    lora = read_lora_for(folder, Path(options.lora), "--lora") if options.lora else None
    dtype = torch.bfloat16 if device == "cuda" and not options.world else torch.float32
    pipe = open_stock(folder, device, dtype, f"--model {options.model}")
    seeds = [options.seed + k for k in range(options.images_per_prompt)]
    columns: dict[str, list[torch.Tensor]] = {}
    if options.base or lora is None:
        columns["base"] = [draw_stock(pipe, drawn, prompt, seeds) for prompt in options.prompt]
    if lora is not None:
        add_lora(pipe, lora)
        columns["lora"] = [draw_stock(pipe, drawn, prompt, seeds) for prompt in options.prompt]
    rows = [
        (prompt, [(name, images[i]) for name, images in columns.items()]) for i, prompt in enumerate(options.prompt)
    ]
    if write:
        draw_grid(rows, options.output)
        print(f"wrote {options.output}")
    return {name: torch.stack(images) for name, images in columns.items()}


@dataclass(frozen=True)
class Drawing:
    """Images of some prompts."""

    prompts: list[str]
    images: dict[str, torch.Tensor]  # "base", "lora": [prompts, images_per_prompt, 3, H, W] float32 in [0, 1]

    def grid(self) -> Image:
        """One picture of all of them, a row per prompt."""
        from advgrpo.reporting.plots import grid_image

        return grid_image(
            [(prompt, [(name, of[i]) for name, of in self.images.items()]) for i, prompt in enumerate(self.prompts)]
        )


def generate(
    prompts: str | Sequence[str], *, lora: str | Path = "", output: str | Path | None = None, **options: Any
) -> Drawing:
    """Images of a base model, a trained LoRA, or both from the same noise.

    Args:
        prompts: one, or several.
        lora: folder of a LoRA; "" draws the base model.
        output: image file for the grid; None writes none.
        options: the other flags of `python -m advgrpo.generate`, by name: base, model, seed, images_per_prompt, ...

    Raises:
        UserError: an unknown option, or whatever is wrong with files and models.
        RunFailure: an image is not finite.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    given = {**options, "prompt": tuple(prompts), "lora": str(lora)}
    if output is not None:
        given["output"] = Path(output)
    images = draw_images(configuration.options_of(Generate, given), write=output is not None)
    return Drawing(prompts, images)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit codes of `command.run_command`."""
    return run_command(_generate, arguments)


def _generate(arguments: list[str]) -> int:
    from advgrpo.runtime.libraries import quiet_libraries

    options = configuration.parse_options(Generate, arguments, program="python -m advgrpo.generate", about=__doc__)
    quiet_libraries()
    draw_images(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())

make_callable(__name__)
