"""Pictures from a base model, a trained LoRA, or both side by side.

python -m advgrpo.generate --lora runs/tiny/lora --base --prompt "a small red star on the left of a blue background"
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch

from . import config as configuration
from .command import run_command
from .config import Options, Repeated
from .errors import UserError
from .tiny import WORLDS


class Generate(Options):
    """Pictures from a base model, a trained LoRA, or both side by side."""

    prompt: Annotated[tuple[str, ...], Repeated] = ()
    """Text to draw; repeat the flag for several."""
    lora: str = ""
    """Folder with pytorch_lora_weights.safetensors, such as OUT/lora; empty draws the base model."""
    base: bool = False
    """Draw the base model's pictures beside the LoRA's, from the same noise."""
    model: str = "tiny"
    """Diffusers pipeline of SD3, SD1.5 or SDXL: folder, hub id, "tiny" or "tiny:words"."""
    output: Path = Path("grid.png")
    """PNG to write."""
    seed: int = 0
    """Picture k of a prompt uses seed + k."""
    images_per_prompt: int = 4
    num_steps: int = 0
    """Sampler steps; 0 means 10 for a tiny model, 40 otherwise."""
    guidance_scale: float = 0.0
    """Classifier-free guidance; 0 means 1 for a tiny model (what its preset trains with), 4.5 otherwise."""
    resolution: int = 0
    """Pixels; 0 means 32 for a tiny model, 512 otherwise."""
    max_sequence_length: int = 0
    """T5 tokens; 0 means what a tiny model was trained with, 128 otherwise."""
    device: str = "auto"


def check(options: Generate) -> None:
    """UserError for anything that would fail after the model is loaded."""
    if not options.prompt or not all(p.strip() for p in options.prompt):
        raise UserError('--prompt: give at least one non-empty prompt, e.g. --prompt "a red star"')
    if options.images_per_prompt < 1:
        raise UserError(f"--images-per-prompt {options.images_per_prompt}: want at least 1")
    if options.lora and not (Path(options.lora) / "pytorch_lora_weights.safetensors").is_file():
        raise UserError(f"--lora {options.lora}: no pytorch_lora_weights.safetensors in this folder")
    if not options.output.parent.is_dir():
        raise UserError(f"--output {options.output}: the folder {options.output.parent} does not exist")


@torch.no_grad()
def draw(pipe, options: Generate, prompt: str) -> torch.Tensor:
    """[n, 3, H, W] in [0, 1] by the stock pipeline."""
    world = WORLDS.get(options.model)
    side = options.resolution or (32 if world else 512)
    text = {}
    if "max_sequence_length" in inspect.signature(pipe.__call__).parameters:  # pipelines with a T5
        text["max_sequence_length"] = options.max_sequence_length or (world.max_sequence_length if world else 128)
    images = pipe(
        prompt,
        num_images_per_prompt=options.images_per_prompt,
        num_inference_steps=options.num_steps or (10 if world else 40),
        guidance_scale=options.guidance_scale or (1.0 if world else 4.5),
        **text,
        height=side,
        width=side,
        generator=[torch.Generator().manual_seed(options.seed + k) for k in range(options.images_per_prompt)],
        output_type="pt",
    ).images
    return images.float().cpu()


def generate(options: Generate) -> None:
    """Draw every prompt and write the grid."""
    from diffusers import DDIMScheduler, DiffusionPipeline, StableDiffusion3Pipeline

    from .plots import draw_grid
    from .policy.adapters import read_lora_for
    from .policy.pipelines import pipeline_folder

    check(options)
    device = options.device if options.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device == "cuda" and options.model not in WORLDS else torch.float32
    folder = pipeline_folder(options.model, field="--model")
    lora = read_lora_for(folder, Path(options.lora), "--lora") if options.lora else None
    pipe = DiffusionPipeline.from_pretrained(folder, dtype=dtype).to(device)
    if not isinstance(pipe, StableDiffusion3Pipeline):  # SD1.5 and SDXL, with the sampler that they are trained with
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    pipe.set_progress_bar_config(disable=True)
    columns: dict[str, list[torch.Tensor]] = {}
    if options.base or not options.lora:
        columns["base"] = [draw(pipe, options, prompt) for prompt in options.prompt]
    if lora is not None:
        pipe.load_lora_weights({f"{lora.component}.{name}": tensor for name, tensor in lora.state_dict().items()})
        columns["lora"] = [draw(pipe, options, prompt) for prompt in options.prompt]
    rows = [
        (prompt, [(name, pictures[i]) for name, pictures in columns.items()]) for i, prompt in enumerate(options.prompt)
    ]
    draw_grid(rows, options.output)
    print(f"wrote {options.output}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit codes of `command.run_command`."""
    return run_command(_generate, arguments)


def _generate(arguments: list[str]) -> int:
    from .train import quiet_libraries

    options = configuration.parse_options(Generate, arguments, program="python -m advgrpo.generate", about=__doc__)
    quiet_libraries()
    generate(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
