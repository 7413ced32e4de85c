"""Images by a pipeline's own sampler, as stock diffusers draws them: for looking, where nothing is trained."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from advgrpo.errors import RunFailure, UserError
from advgrpo.policy.model_files import pipeline_variant
from advgrpo.policy.pipelines import PREDICTION_TYPES, QWEN_NEGATIVE_PROMPT
from advgrpo.sampling.drawing import Drawn

if TYPE_CHECKING:  # diffusers takes seconds; flags are checked first
    from diffusers import DiffusionPipeline

    from advgrpo.policy.lora_file import LoraFile


def open_stock(folder: Path, device: str, dtype: torch.dtype, field: str) -> DiffusionPipeline:
    """The pipeline in a folder, silent; UserError naming `field` where diffusers cannot load it.

    SD1.5 and SDXL get the sampler that they are trained with here.
    """
    from diffusers import DDIMScheduler, DiffusionPipeline

    try:
        variant = pipeline_variant(folder, field)
        pipe = DiffusionPipeline.from_pretrained(folder, dtype=dtype, use_safetensors=True, variant=variant).to(device)
    except (OSError, ValueError, ImportError, AttributeError, TypeError) as error:
        raise UserError(f"{field}: diffusers cannot load it ({error})") from error
    if PREDICTION_TYPES[type(pipe).__name__] == "epsilon":
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def add_lora(pipe: DiffusionPipeline, lora: LoraFile) -> None:
    """Load it into the pipeline at strength 1; `pipe.unload_lora_weights()` takes it out again."""
    pipe.load_lora_weights({f"{lora.component}.{name}": tensor for name, tensor in lora.state_dict().items()})


@torch.no_grad()
def draw_stock(pipe: DiffusionPipeline, drawn: Drawn, prompt: str, seeds: Sequence[int]) -> torch.Tensor:
    """[n, 3, H, W] float32 in [0, 1] on the CPU: one image of the prompt for each of n seeds of its initial noise.

    The generators are the CPU's: a seed is the same noise on every device, and for all models of one latent shape.

    Raises:
        RunFailure: an image is not finite.
    """
    text = {}
    if "max_sequence_length" in inspect.signature(pipe.__call__).parameters:  # pipelines with a T5
        text["max_sequence_length"] = drawn.max_sequence_length
    if type(pipe).__name__ == "FluxPipeline" and not pipe.transformer.config.guidance_embeds:
        guidance = {"true_cfg_scale": drawn.guidance_scale, "negative_prompt": ""}  # schnell ignores guidance_scale
    elif type(pipe).__name__ == "QwenImagePipeline":
        guidance = {"true_cfg_scale": drawn.guidance_scale, "negative_prompt": QWEN_NEGATIVE_PROMPT}
    else:
        guidance = {"guidance_scale": drawn.guidance_scale}
    images = pipe(
        prompt=prompt,  # FLUX.2's takes an image first
        num_images_per_prompt=len(seeds),
        num_inference_steps=drawn.num_steps,
        **guidance,
        **text,
        height=drawn.resolution,
        width=drawn.resolution,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="pt",
    ).images
    if not images.isfinite().all():
        raise RunFailure(
            f"the images of {prompt!r} are not finite at --guidance-scale {drawn.guidance_scale:g} and "
            f"{drawn.num_steps} steps; lower the guidance, or look at the model and the LoRA"
        )
    return images.float().cpu()


@contextmanager
def with_network(pipe: DiffusionPipeline, part: str, folder: Path) -> Iterator[None]:
    """The pipeline with the network of another folder in place of its own, such as a fully trained OUT/transformer.

    Args:
        part: "transformer" or "unet".

    Raises:
        UserError: the folder holds no such network.
    """
    own = getattr(pipe, part, None)
    if own is None:
        raise UserError(f"{folder} is a {part}, which a {type(pipe).__name__} does not have; it is another model's")
    try:
        network = type(own).from_pretrained(folder, torch_dtype=own.dtype, use_safetensors=True).to(own.device)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{folder} cannot be loaded as a {type(own).__name__} ({error})") from error
    setattr(pipe, part, network.eval())
    try:
        yield
    finally:
        setattr(pipe, part, own)
