"""Flags of commands that draw with a pipeline, and what they mean where they are left at 0."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from advgrpo.config import Options
from advgrpo.errors import UserError
from advgrpo.policy.pipelines import native_guidance, native_resolution
from advgrpo.tiny import WORLDS, World

_RESOLUTION = 512  # what LoRAs are trained at here; less where a pipeline was made for less


@dataclass(frozen=True)
class Drawn:
    """How images are drawn."""

    num_steps: int
    guidance_scale: float
    resolution: int
    max_sequence_length: int


class DrawOptions(Options):
    """What is drawn with, and how."""

    model: Annotated[str, Field(min_length=1)] = "tiny"
    """Diffusers pipeline of SD3, FLUX.1, SD1.5 or SDXL: folder, hub id, "tiny" or "tiny:words"."""
    num_steps: Annotated[int, Field(ge=0, le=1000)] = 0
    """Sampler steps; 0 means 10 for a tiny model, 40 otherwise."""
    guidance_scale: Annotated[float, Field(ge=0, le=100)] = 0.0
    """Classifier-free guidance, 1 switches it off, or FLUX.1-dev's own; 0 means 2 for tiny, 1 for tiny:words and
    FLUX.1-schnell, 3.5 for FLUX.1-dev and 4.5 otherwise."""
    resolution: Annotated[int, Field(ge=0, le=8192)] = 0
    """Pixels of a side; 0 means what the pipeline was made for, at most 512."""
    max_sequence_length: Annotated[int, Field(ge=0, le=512)] = 0
    """T5 tokens; 0 means what a tiny model was trained with, 128 otherwise."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto takes CUDA where there is a GPU."""

    @property
    def world(self) -> World | None:
        """The shipped world that the model is of, by name or by folder."""
        if self.model in WORLDS:
            return WORLDS[self.model]
        folder = Path(self.model).expanduser()
        own = (world for world in WORLDS.values() if folder.is_dir() and folder.samefile(world.pipeline))
        return next(own, None)

    def drawn(self, folder: Path) -> Drawn:
        """The flags, with zeros replaced for the pipeline in this folder; UserError for guidance between 0 and 1."""
        if 0 < self.guidance_scale < 1:
            raise UserError(f"--guidance-scale {self.guidance_scale:g}: want at least 1, or 0 for the model's default")
        world = self.world
        return Drawn(
            num_steps=self.num_steps or (10 if world else 40),
            guidance_scale=self.guidance_scale or (world.guidance_scale if world else native_guidance(folder)),
            resolution=self.resolution or min(native_resolution(folder) or _RESOLUTION, _RESOLUTION),
            max_sequence_length=self.max_sequence_length or (world.max_sequence_length if world else 128),
        )


class ModelOptions(DrawOptions):
    """What commands share that draw many images of several models on the same noise."""

    batch_size: Annotated[int, Field(ge=0, le=65536)] = 0
    """Images drawn at once; 0 means 32 for a tiny model, 8 otherwise."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 42
    """Keys the noise and the resampling; a run's own evaluation uses its seed."""
    grid_prompts: Annotated[int, Field(ge=1, le=1000)] = 6
    """Prompts shown in grid.png."""
    cache_dir: Annotated[str, Field(min_length=1)] = "~/.cache/advgrpo"
    """Where text embeddings are kept."""
