"""Pictures of every side from the same initial noise, drawn once and gone on with.

The noise of picture k of a prompt is keyed by (seed, prompt, k) and by nothing of the side, so that two sides of one
latent shape and dtype begin at the same point. What a picture depends on beside that is its recipe, whose hash names
the folder of a side's pictures: equal settings find what is there, others never meet it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from advgrpo.compare.settings import Compare
from advgrpo.compare.sides import Drawer, Pictures, Side
from advgrpo.data.images import open_image
from advgrpo.errors import UserError
from advgrpo.references.builder import Recipe, ReferenceBuilder, image_name
from advgrpo.reporting.display import Display
from advgrpo.runtime.fingerprint import file_digest, folder_fingerprint
from advgrpo.sampling.stock import add_lora, draw_stock, open_stock, with_network

PICTURES = "pictures"


class Studio:
    """Draws sides one after the other; a pipeline is loaded when the first picture of it is missing.

    Args:
        device: as torch names it.
    """

    def __init__(self, options: Compare, prompts: Sequence[str], device: str, display: Display) -> None:
        self._options, self._prompts, self._device, self._display = options, list(prompts), device, display
        self._opened: tuple[Path, Any] | None = None

    def pictures(self, side: Side) -> list[list[Path]]:
        """Files [prompts, images_per_prompt] of a side, those that are missing drawn.

        Raises:
            UserError: the folder cannot be written, or pictures in a single colour (a safety checker's).
            RunFailure: a picture is not finite.
        """
        if isinstance(side.source, Pictures):
            return side.source.files
        recipe = recipe_of(side.source, self._options)
        folder, count = self._options.out / PICTURES / recipe.fingerprint[:16], self._options.images_per_prompt
        place = {prompt: number for number, prompt in enumerate(self._prompts, start=1)}
        with self._display.steps(f"drawing {side.name}", len(self._prompts)) as tell, self._draw(side.source) as draw:

            def told(prompt: str, seeds: list[int]) -> np.ndarray:
                images = draw(prompt, seeds)
                tell(place[prompt])
                return images

            builder = ReferenceBuilder(folder, recipe, told, per_prompt=count)
            built = builder.build(self._prompts, report=lambda line: None)
        self._display.print_line(f"{side.name}: drew {built.drawn} pictures, kept {built.kept}")
        return [[folder / image_name(prompt, number) for number in range(count)] for prompt in self._prompts]

    @contextmanager
    def _draw(self, source: Drawer) -> Iterator[Callable[[str, list[int]], np.ndarray]]:
        """The `draw` of a `ReferenceBuilder`; the pipeline is as it was at the end, for the next side."""
        with ExitStack() as laid_over:
            ready = None

            def draw(prompt: str, seeds: list[int]) -> np.ndarray:
                nonlocal ready
                if ready is None:
                    ready = laid_over.enter_context(_with_changes(self._pipeline(source), source))
                return draw_stock(ready, source.drawn, prompt, seeds).permute(0, 2, 3, 1).numpy()

            yield draw

    def _pipeline(self, source: Drawer) -> Any:
        if self._opened is None or self._opened[0] != source.folder:
            self._opened = None  # before the next is loaded: memory may hold but one
            dtype = getattr(torch, source.dtype)
            self._opened = source.folder, open_stock(source.folder, self._device, dtype, f"the model {source.model}")
        return self._opened[1]


@contextmanager
def _with_changes(pipe: Any, source: Drawer) -> Iterator[Any]:
    """The pipeline with the side's LoRA or network."""
    if source.network is not None:
        with with_network(pipe, *source.network):
            yield pipe
    elif source.lora is not None:
        add_lora(pipe, source.lora)
        try:
            yield pipe
        finally:
            pipe.unload_lora_weights()
    else:
        yield pipe


def recipe_of(source: Drawer, options: Compare) -> Recipe:
    """All that a side's pictures depend on beside prompt and number."""
    drawn, laid_over = source.drawn, ""
    if source.lora is not None:
        laid_over = file_digest(source.lora.path)
    elif source.network is not None:
        laid_over = folder_fingerprint(source.network[1], (".",))
    return Recipe(
        model=source.folder.name,
        model_fingerprint=folder_fingerprint(source.folder, (".",)),
        pipeline=source.kind,
        seed=options.seed,
        batch_size=options.batch_size,
        dtype=source.dtype,
        arguments={
            "num_steps": drawn.num_steps,
            "guidance_scale": drawn.guidance_scale,
            "resolution": drawn.resolution,
            "max_sequence_length": drawn.max_sequence_length,
            "laid_over": laid_over,
        },
    )


def load_pictures(files: Sequence[list[list[Path]]], sides: Sequence[Side]) -> list[list[list[Image.Image]]]:
    """RGB pictures [sides, prompts, images_per_prompt], those of one place all of one size.

    A larger one is reduced to the smallest of its place: its size would tell which side it is.

    Raises:
        UserError: pictures of different shapes stand in one place.
    """
    loaded = [[[open_image(file) for file in row] for row in side] for side in files]
    for place in _places(loaded):
        pictures = [loaded[side][place[0]][place[1]] for side in range(len(sides))]
        smallest = min((picture.size for picture in pictures), key=lambda size: size[0] * size[1])
        for side, picture in enumerate(pictures):
            if abs(picture.width * smallest[1] - picture.height * smallest[0]) > max(picture.size):
                raise UserError(
                    f"sides = {sides[side].given!r}: a picture of {picture.width} x {picture.height} cannot be "
                    f"compared with one of {smallest[0]} x {smallest[1]}; crop them to one shape"
                )
            if picture.size != smallest:
                loaded[side][place[0]][place[1]] = picture.resize(smallest, Image.Resampling.LANCZOS)
    return loaded


def _places(loaded: Sequence[list[list[Image.Image]]]) -> list[tuple[int, int]]:
    return [(prompt, number) for prompt, row in enumerate(loaded[0]) for number in range(len(row))]


def destroyed(picture: Image.Image, seed: int) -> Image.Image:
    """The picture under noise that leaves a fifth of it: whoever looks sees that it is the worse one."""
    pixels = np.asarray(picture, dtype=np.float32)
    noise = np.random.default_rng(seed).uniform(0, 255, pixels.shape)
    return Image.fromarray((0.2 * pixels + 0.8 * noise).round().astype(np.uint8))
