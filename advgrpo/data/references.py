"""The reference images of every prompt: the positives the adversary learns from."""

import difflib
import hashlib
import json
import logging
import os
import shlex
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from advgrpo.data.decoding import DecodingWorkers, WorkerError
from advgrpo.data.images import IMAGE_SUFFIXES, Fit, ImageError, in_one_colour, is_square, open_image, to_square
from advgrpo.data.record_source import parse_source
from advgrpo.errors import UserError
from advgrpo.runtime.reading import RepeatedKeyError, parse_json, read_text, unique_keys

_logger = logging.getLogger(__name__)
T = TypeVar("T")
_NAMED = 5  # unusable images that an error names


class ReferenceSet:
    """Reference images in a folder, indexed by a JSON file `{prompt: [files relative to the folder]}`.

    Made by `ReferenceSet.load`, which decodes every image once so that a bad one is found before training starts; each
    of several processes decodes its share. Models see squares: an image that is none is an error, unless `fit` says how
    it becomes one.
    """

    def __init__(
        self, folder: Path, files: dict[str, list[Path]], fit: Fit = "refuse", shared: list[Path] | None = None
    ) -> None:
        self.folder, self.fit = folder, fit
        self._files, self._shared = files, shared
        self._content_keys: dict[Path, str] = {}
        self.workers: DecodingWorkers | None = None
        self._ahead: dict[Path, Future[np.ndarray]] = {}  # what the workers decode or have decoded

    @classmethod
    def load(
        cls,
        folder: str | Path,
        prompts: list[str],
        index: str = "references.json",
        min_size: int = 16,
        fit: Fit = "refuse",
        rank: int = 0,
        world_size: int = 1,
    ) -> "ReferenceSet":
        """Read the index and check the images of `prompts`; other entries of the index are left alone.

        Args:
            folder: holds the index and the images.
            prompts: the prompts that need references.
            index: file name of the index inside `folder`.
            min_size: the smallest width and height, in pixels, that an image may have.
            fit: what happens to images whose sides differ by more than 2 %: refuse, crop the middle, letterbox with
                white bars, or stretch.
            rank, world_size: which of how many processes this is, each of which checks a share of the images. Only
                once none has failed are all checked: the caller lets them meet.

        Raises:
            UserError: missing folder, index or file; an index of another shape; a prompt without references; an image
                of this process's share that is missing, unreadable, truncated, not RGB, animated, too small, too large,
                in a single colour or, with `fit` = refuse, not square.
        """
        folder = Path(folder)
        source = parse_source(folder)
        if source is not None and not (folder / index).exists():
            command = f"python -m advgrpo.references import {shlex.quote(source.address)} --out references/"
            raise UserError(f"references {source.address} must become a reference set first: {command}")
        if not folder.is_dir():
            raise UserError(f"reference folder {folder} does not exist; it must hold the images and {index}")
        entries = read_index(folder / index)
        _check_coverage(entries, prompts, folder / index)
        files = {prompt: [folder / name for name in entries[prompt]] for prompt in prompts}
        distinct = list(dict.fromkeys(file for group in files.values() for file in group))
        _check_images(folder, distinct[rank::world_size], min_size, fit, of=len(distinct))
        return cls(folder, files, fit)

    @classmethod
    def shared(
        cls,
        folder: str | Path,
        prompts: list[str] | None,
        min_size: int = 16,
        fit: Fit = "refuse",
        rank: int = 0,
        world_size: int = 1,
    ) -> "ReferenceSet":
        """Every image in `folder` is a reference of every prompt: a style, which has no prompts.

        Args:
            prompts: those that there are; None: any.
            rank, world_size: as in `load`.

        Raises:
            UserError: missing folder, no image in it, or one that `load` would refuse.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise UserError(f"data.style = {str(folder)!r} is not a folder; give one with the style's images")
        files = sorted(f for f in folder.iterdir() if f.suffix.lower() in IMAGE_SUFFIXES)
        if not files:
            raise UserError(f"data.style = {str(folder)!r} holds no image ({', '.join(IMAGE_SUFFIXES)})")
        _check_images(folder, files[rank::world_size], min_size, fit, of=len(files), style=True)
        if prompts is None:
            return cls(folder, {"": files}, fit, shared=files)
        return cls(folder, dict.fromkeys(prompts, files), fit)

    def files(self, prompt: str) -> list[Path]:
        """The reference files of `prompt`, in the order of the index.

        Raises:
            UserError: `prompt` was not among the prompts given to `load`, so its images were never checked.
        """
        if self._shared is not None:
            return list(self._shared)
        if prompt not in self._files:
            raise UserError(f"no references were loaded for prompt {prompt!r}{_nearest(prompt, self._files)}")
        return list(self._files[prompt])

    def decode_ahead(self, files: Iterable[Path]) -> None:
        """Let the workers decode these, and forget what they have decoded that is not among them; nothing without
        workers. `load_images` then need not decode them."""
        if self.workers is not None:
            before = self._ahead
            self._ahead = {
                file: before[file] if file in before else self.workers.decode(file, self.fit)
                for file in dict.fromkeys(files)
            }

    def _decoded(self, file: Path) -> Tensor:
        """float32 [3, H, W]; UserError where the image can no longer be read."""
        ahead = self._ahead.get(file)
        if ahead is not None:
            try:
                return _to_tensor(ahead.result())
            except WorkerError as error:
                _logger.warning("%s; it is decoded here", error)  # and what is wrong with it is said below
        return _to_tensor(np.array(to_square(open_image(file), self.fit)))

    def load_images(self, files: list[Path], size: tuple[int, int] | None = None) -> Tensor:
        """Decode images to a float32 tensor `[n, 3, H, W]` in [0, 1], on the CPU.

        Args:
            files: at least one image.
            size: (H, W) to resize to (bicubic, antialiased; `fit` has made them squares first). None keeps the
                images' own size, which must then be one.

        Raises:
            UserError: an image can no longer be read.
            ValueError: no files, or images of different sizes without `size`.
        """
        if not files:
            raise ValueError("files is empty; at least one image is needed")
        images = [self._decoded(file) for file in files]
        if size is not None:
            images = [_resize(image, size) for image in images]
        for file, image in zip(files, images):
            if image.shape != images[0].shape:
                raise ValueError(
                    f"{files[0]} is {_size(images[0])} but {file} is {_size(image)}; pass size=(height, width)"
                )
        return torch.stack(images)

    def content_key(self, file: Path) -> str:
        """SHA-256 of the file's bytes in hex, and `fit` where it changes images: the key under which its features may
        be cached. Read once per file."""
        if file not in self._content_keys:
            digest = hashlib.sha256(file.read_bytes()).hexdigest()
            changes = self.fit in ("crop", "letterbox")
            self._content_keys[file] = f"{digest}:{self.fit}" if changes else digest
        return self._content_keys[file]

    def fingerprint(self) -> str:
        """Hash over the prompts and the contents of their images, wherever those lie."""
        distinct = list(dict.fromkeys(file for group in self._files.values() for file in group))
        _map_in_threads(self.content_key, distinct)
        content = {prompt: [self.content_key(file) for file in files] for prompt, files in self._files.items()}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_index(path: Path) -> dict[str, list[str]]:
    """{prompt: [files relative to the index's folder]}; UserError for a missing file or any other content."""
    remedy = "write {prompt: [files]} there as JSON"
    text = read_text(path, "reference index", remedy)
    try:
        entries = parse_json(text, f"reference index {path}", remedy, pairs=unique_keys)
    except RepeatedKeyError as error:
        raise UserError(f"reference index {path}: prompt {error.args[0]!r} appears twice; merge its lists") from None
    if not isinstance(entries, dict):
        raise UserError(f"reference index {path} holds a {type(entries).__name__}; expected {{prompt: [files]}}")
    for prompt, names in entries.items():
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise UserError(
                f"reference index {path}: the value of {prompt!r} must be a list of file names, got {names!r}"
            )
        for name in names:
            pure = PurePosixPath(name)
            if not name or pure.is_absolute() or ".." in pure.parts:
                raise UserError(f"reference index {path}: {name!r} of {prompt!r} must be a path inside {path.parent}")
    return entries


def _check_coverage(entries: dict[str, list[str]], prompts: list[str], index: Path) -> None:
    missing = [prompt for prompt in dict.fromkeys(prompts) if not entries.get(prompt)]
    if missing:
        others = f" ({len(missing) - 1} other prompts have none either)" if len(missing) > 1 else ""
        nearest = _nearest(missing[0], [prompt for prompt, names in entries.items() if names])
        raise UserError(f"prompt {missing[0]!r} has no references in {index}{nearest}{others}; add images for it")


def _nearest(prompt: str, keys: Iterable[str]) -> str:
    close = difflib.get_close_matches(prompt, list(keys), n=1, cutoff=0.6)
    return f"; the nearest prompt there is {close[0]!r}" if close else ""


def _check_images(folder: Path, files: list[Path], min_size: int, fit: Fit, *, of: int, style: bool = False) -> None:
    """UserError for those of the `files` that cannot be references; they are a share of so many images."""

    def complaint(file: Path) -> ImageError | None:
        try:
            check_reference(file, min_size, fit)
        except ImageError as error:
            return error
        return None

    complaints = [error for error in _map_in_threads(complaint, files) if error is not None]
    if complaints:
        checked = f"{len(files)} images" if len(files) == of else f"{len(files)} images of this process's share"
        raise UserError(_unusable(complaints, checked, folder, import_command(folder, style=style)))


def check_reference(file: Path, min_size: int, fit: Fit) -> Image.Image:
    """An image that may be a reference, decoded.

    Raises:
        ImageError: it cannot be read, is not plain RGB, too small, in a single colour, or not square while `fit` is
            "refuse".
    """
    image = open_image(file)
    if min(image.size) < min_size:
        width, height = image.size
        reason = f"is {width}x{height} pixels; the smaller side must be at least {min_size}"
        raise ImageError(str(file), reason, remedy="replace it by a larger one")
    if fit == "refuse" and not is_square(image.size):
        reason = f"is {image.width}x{image.height}, not square, and would be squashed"
        raise ImageError(str(file), reason, importable=True)
    if in_one_colour(image):
        raise ImageError(str(file), "is in a single colour", remedy="remove it from the set, or replace it")
    return image


def import_command(folder: Path, *, style: bool = False) -> str:
    """The command that makes any folder's images usable; a style has no captions."""
    target = folder.with_name(f"{folder.name}-imported")
    command = f"python -m advgrpo.references import {shlex.quote(str(folder))} --out {shlex.quote(str(target))}"
    return command + (" --captions none" if style else "")


def _unusable(errors: list[ImageError], checked: str, folder: Path, command: str) -> str:
    """One error for all: the first in full, the next ones by name, and what mends most of them."""
    first, others = errors[0], errors[1:]
    text = f"reference image {first.name} {first.reason}"
    if others:
        named = ", ".join(str(Path(error.name).relative_to(folder)) for error in others[: _NAMED - 1])
        text += f" ({len(errors)} of {checked} are unusable, also {named}{', ...' * (len(errors) > _NAMED)})"
    remedies = [first.remedy] if first.remedy else []
    if any(error.importable for error in errors):
        remedies.append(f"convert the whole folder: {command}")
    if any("not square" in error.reason for error in errors):
        remedies.append("or set data.fit to crop or letterbox")
    return "; ".join([text, *remedies])


def _map_in_threads(function: Callable[[Path], T], files: list[Path]) -> list[T]:
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:  # Pillow decodes without the GIL
        return list(pool.map(function, files))


def _to_tensor(pixels: np.ndarray) -> Tensor:
    """uint8 [H, W, 3] -> float32 [3, H, W] in [0, 1]."""
    return torch.from_numpy(pixels).permute(2, 0, 1).float().div_(255).contiguous()


def _resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(image.shape[-2:]) == tuple(size):
        return image
    resized = torch.nn.functional.interpolate(image[None], size=tuple(size), mode="bicubic", antialias=True)
    return resized[0].clamp_(0, 1)  # bicubic overshoots at edges


def _size(image: Tensor) -> str:
    return f"{image.shape[-1]}x{image.shape[-2]}"
