"""Any diffusers text-to-image pipeline as the `draw` of `ReferenceBuilder`."""

from __future__ import annotations

import difflib
import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from advgrpo.data.prompt_lengths import CutPrompts, cut_prompts
from advgrpo.errors import UserError
from advgrpo.policy.model_files import pipeline_variant
from advgrpo.policy.pipelines import QWEN_NEGATIVE_PROMPT, behind_a_gate
from advgrpo.references.builder import Recipe
from advgrpo.runtime.fingerprint import folder_fingerprint
from advgrpo.tiny import WORLDS

_TINY = {"num_inference_steps": 10, "guidance_scale": 2.0}
_QWEN = {"negative_prompt": QWEN_NEGATIVE_PROMPT}
_T5_TOKENS = 512  # what a T5 was trained with, where a pipeline's call has no limit
_OURS = {"prompt", "num_images_per_prompt", "generator", "output_type", "return_dict"}


@dataclass(frozen=True)
class DrawSettings:
    """How to draw; zeros and None leave the pipeline's own default."""

    model: str
    seed: int
    batch_size: int
    num_steps: int = 0
    guidance_scale: float | None = None
    height: int = 0
    width: int = 0
    arguments: dict[str, Any] = field(default_factory=dict)  # further ones of the pipeline call

    def check(self) -> None:
        """UserError for what can be known to be wrong before a model is loaded."""
        for name, low in (("batch_size", 1), ("num_steps", 0), ("height", 0), ("width", 0)):
            if getattr(self, name) < low:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)}: want at least {low}")
        for key in self.arguments:
            if key in _OURS:
                raise UserError(f"--arguments: {key!r} is set by this command; leave it out")


def open_pipeline(settings: DrawSettings, device: str) -> tuple[Recipe, Callable[[str, list[int]], np.ndarray]]:
    """Load the pipeline in bfloat16 on a GPU and in float32 elsewhere ("tiny" always); returns (recipe, draw).

    Raises:
        UserError: no such model, not a text-to-image pipeline, or an argument its call does not have.
    """
    from diffusers import DiffusionPipeline  # seconds; not before the options are known to be right

    folder = _model_folder(settings.model)
    dtype = torch.bfloat16 if torch.device(device).type == "cuda" and settings.model not in WORLDS else torch.float32
    try:
        variant = pipeline_variant(folder, f"--model {settings.model}")
        pipe = DiffusionPipeline.from_pretrained(folder, dtype=dtype, use_safetensors=True, variant=variant).to(device)
    except (OSError, ValueError, ImportError, AttributeError) as error:
        raise UserError(f"--model {settings.model}: diffusers cannot load it ({error})") from error
    pipe.set_progress_bar_config(disable=True)
    arguments = call_arguments(pipe, settings)
    recipe = Recipe(
        model=settings.model,
        model_fingerprint=folder_fingerprint(folder, (".",)),
        pipeline=type(pipe).__name__,
        seed=settings.seed,
        batch_size=settings.batch_size,
        dtype=str(dtype).removeprefix("torch."),
        arguments=arguments,
    )
    return recipe, lambda prompt, seeds: _draw(pipe, arguments, prompt, seeds)


def cut_by(recipe: Recipe, prompts: list[str]) -> list[CutPrompts]:
    """The prompts that the text encoders of an opened pipeline do not read to their end."""
    import diffusers

    known = inspect.signature(getattr(diffusers, recipe.pipeline).__call__).parameters
    own = known["max_sequence_length"].default if "max_sequence_length" in known else _T5_TOKENS
    return cut_prompts(_model_folder(recipe.model), prompts, recipe.arguments.get("max_sequence_length", own))


def _model_folder(model: str) -> Path:
    if model in WORLDS:
        folder = WORLDS[model].pipeline
    elif Path(model).expanduser().is_dir():
        folder = Path(model).expanduser()
    else:
        from diffusers import DiffusionPipeline

        try:
            folder = Path(DiffusionPipeline.download(model, use_safetensors=True))
        except Exception as error:
            other = f"neither a folder nor a hub model that can be downloaded ({error})"
            raise UserError(f"--model {model}: {behind_a_gate(error, model) or other}") from error
    if not (folder / "model_index.json").is_file():
        raise UserError(f"--model {model}: {folder / 'model_index.json'} is missing; want a diffusers pipeline folder")
    return folder


def call_arguments(pipe: Any, settings: DrawSettings) -> dict[str, Any]:
    """What the pipeline is called with beside prompt and noise: family defaults, then the settings, then `arguments`.

    Raises:
        UserError: the pipeline does not draw from text alone, or has no such argument (the nearest is named).
    """
    known = inspect.signature(pipe.__call__).parameters
    kind = type(pipe).__name__
    needed = [name for name, p in known.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    if not {"prompt", "generator", "num_images_per_prompt", "output_type"} <= set(known) or set(needed) - {"prompt"}:
        raise UserError(f"--model {settings.model}: {kind} is no text-to-image pipeline")
    arguments: dict[str, Any] = dict(_QWEN) if kind.startswith("QwenImage") else {}
    if settings.model in WORLDS:
        world = WORLDS[settings.model]
        arguments = {**_TINY, "height": world.image_size, "width": world.image_size}
        arguments["max_sequence_length"] = world.max_sequence_length
    guidance = "true_cfg_scale" if kind.startswith("QwenImage") else "guidance_scale"
    chosen = {
        "num_inference_steps": settings.num_steps or None,
        guidance: settings.guidance_scale,
        "height": settings.height or None,
        "width": settings.width or None,
    }
    arguments |= {key: value for key, value in chosen.items() if value is not None}
    arguments |= settings.arguments
    for key in arguments:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise UserError(f"--model {settings.model}: the call of {kind} has no argument {key!r}{hint}")
    return arguments


@torch.no_grad()
def _draw(pipe: Any, arguments: dict[str, Any], prompt: str, seeds: list[int]) -> np.ndarray:
    # CPU generators give the same noise on every device.
    noise = [torch.Generator().manual_seed(seed) for seed in seeds]
    images = pipe(
        prompt=prompt, num_images_per_prompt=len(seeds), generator=noise, output_type="np", **arguments
    ).images
    wanted = (arguments.get("height"), arguments.get("width"))
    got = np.shape(images)[1:3]
    if any(want is not None and want != have for want, have in zip(wanted, got)):
        raise UserError(f"--height {wanted[0]}, --width {wanted[1]}: the model draws {got[0]} x {got[1]}; ask for that")
    return images


def parse_arguments(text: str) -> dict[str, Any]:
    """The JSON object of `--arguments`; UserError for anything else."""
    try:
        arguments = json.loads(text)
    except ValueError as error:
        raise UserError(f"--arguments {text!r} is not JSON ({error})") from None
    if not isinstance(arguments, dict):
        raise UserError(f"--arguments {text!r} is not a JSON object of keyword arguments")
    return arguments
