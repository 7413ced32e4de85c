"""What is wrong with a reference set, all of it at once, and how it looks."""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from advgrpo.data.images import (
    IMAGE_SUFFIXES,
    Fit,
    ImageError,
    decode_image,
    in_one_colour,
    is_square,
    open_image,
)
from advgrpo.data.references import read_index
from advgrpo.errors import UserError
from advgrpo.reporting.plots import draw_grid

INDEX = "references.json"
_SHEET = "sheet.png"  # beside the index: no reference that was forgotten
_FITTED = {"crop": "their middle is used", "letterbox": "they get bars", "stretch": "they are squashed"}


@dataclass
class SetReport:
    """Findings of `check_set`; every list is sorted. The errors make a set unusable or poorer than it looks."""

    without_references: list[str] = field(default_factory=list)  # prompts
    missing: list[str] = field(default_factory=list)  # files of the index that do not exist
    unreadable: list[str] = field(default_factory=list)  # "file: why"
    unconverted: list[str] = field(default_factory=list)  # "file: why": sound images that are not plain RGB
    not_square: list[str] = field(default_factory=list)  # "file: WxH"
    too_small: list[str] = field(default_factory=list)  # "file: WxH"
    one_colour: list[str] = field(default_factory=list)  # black ones, and what safety checkers return
    duplicates: list[str] = field(default_factory=list)  # "file = file": the same pixels twice for a prompt
    shared_by_all: list[str] = field(default_factory=list)  # the image, where all prompts have one and the same
    changed: list[str] = field(default_factory=list)  # files whose SHA-256 is not the manifest's
    too_few: list[str] = field(default_factory=list)  # "prompt: n" with fewer than the usual number
    only_one: list[str] = field(default_factory=list)  # prompts with one reference
    unlisted: list[str] = field(default_factory=list)  # images in the folder that the index does not name
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)  # (width, height) -> files
    prompts: int = 0
    files: int = 0
    fit: Fit = "refuse"

    @property
    def errors(self) -> dict[str, list[str]]:
        found = {
            "prompts without references": self.without_references,
            "missing files": self.missing,
            "unreadable files": self.unreadable,
            "not plain RGB, or animated": self.unconverted,
            "too small": self.too_small,
            "in a single colour": self.one_colour,
            "duplicates": self.duplicates,
            "one image for all prompts": self.shared_by_all,
            "changed since they were made": self.changed,
        }
        return found | ({"not square": self.not_square} if self.fit == "refuse" else {})

    @property
    def warnings(self) -> dict[str, list[str]]:
        found = {
            "prompts with fewer references": self.too_few,
            "prompts with one reference": self.only_one,
            "files not in the index": self.unlisted,
        }
        return found | ({f"not square: {_FITTED[self.fit]}": self.not_square} if self.fit != "refuse" else {})

    @property
    def importable(self) -> bool:
        """Whether `advgrpo.references import` mends some of it."""
        return bool(self.unconverted or self.not_square)

    @property
    def ok(self) -> bool:
        return not any(self.errors.values())


def check_set(folder: Path, prompts: list[str] | None = None, *, min_size: int = 16, fit: Fit = "refuse") -> SetReport:
    """Examine every image of a reference set, or of a style: a folder of images without an index.

    Args:
        folder: holds the images and, but for a style, references.json.
        prompts: the prompts that need references; None for those of the index, and for a style.
        min_size: the smallest width and height, in pixels, that an image may have.
        fit: what training does with images that are not square; errors where it refuses them.

    Raises:
        UserError: no folder, or no index that can be read at all.
    """
    entries = _entries(folder, with_prompts=prompts is not None)
    prompts = list(entries) if prompts is None else prompts
    report = SetReport(prompts=sum(bool(prompt) for prompt in prompts), fit=fit)
    report.without_references = sorted(prompt for prompt in prompts if not entries.get(prompt))
    usual = max((len(names) for names in entries.values()), default=0)
    report.too_few = sorted(f"{p}: {len(entries[p])}" for p in prompts if 0 < len(entries.get(p, ())) < usual)
    report.only_one = sorted(prompt for prompt in prompts if prompt and len(entries.get(prompt, ())) == 1)
    names = sorted({name for listed in entries.values() for name in listed})
    report.files = len(names)
    hashes = _recorded_hashes(folder / "manifest.json")
    pixels = {name: _check_file(folder, name, min_size, hashes, report) for name in names}
    listed_twice = [name for listed in entries.values() for name, count in Counter(listed).items() if count > 1]
    report.duplicates = sorted(_equal(pixels) + [f"{name} = {name} (listed twice)" for name in listed_twice])
    report.shared_by_all = _shared_by_all([entries.get(prompt, []) for prompt in prompts], pixels)
    known = {(folder / name).resolve() for name in names}
    report.unlisted = sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.suffix.lower() in IMAGE_SUFFIXES and path.resolve() not in known and path != folder / _SHEET
    )
    return report


def _entries(folder: Path, *, with_prompts: bool) -> dict[str, list[str]]:
    """The index; {"": all images} of a style, which `ReferenceSet.shared` reads."""
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; pass one with images")
    images = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
    if with_prompts or (folder / INDEX).exists() or not images:
        return read_index(folder / INDEX)
    return {"": images}


def _check_file(
    folder: Path,
    name: str,
    min_size: int,
    hashes: dict[str, str],
    report: SetReport,
) -> str | None:
    """Enter what is wrong with one file into `report`; the hash of its pixels, None where they cannot be read."""
    path = folder / name
    if not path.is_file():
        report.missing.append(name)
        return None
    if name in hashes and hashlib.sha256(path.read_bytes()).hexdigest() != hashes[name]:
        report.changed.append(name)
    try:
        image, header = decode_image(path)
    except ImageError as error:
        report.unreadable.append(f"{name}: {error.reason}")
        return None
    size = f"{name}: {image.width}x{image.height}"
    if reason := header.unusable():
        report.unconverted.append(f"{name}: {reason}")
    if not is_square(image.size):
        report.not_square.append(size)
    if min(image.size) < min_size:
        report.too_small.append(size)
    if in_one_colour(image):
        report.one_colour.append(name)
    report.sizes[image.size] += 1
    # Pixels, not bytes: the same image may be stored with another compression or another comment.
    return hashlib.sha256(f"{image.mode}{image.size}".encode() + image.tobytes()).hexdigest()


def _equal(pixels: dict[str, str | None]) -> list[str]:
    """ "file = file" for every group of files with the same pixels."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name, content in pixels.items():
        if content is not None:
            groups[content].append(name)
    return [" = ".join(group) for group in groups.values() if len(group) > 1]


def _shared_by_all(lists: list[list[str]], pixels: dict[str, str | None]) -> list[str]:
    """The one image that all of several prompts have, whatever its files are called; [] where they have others."""
    contents = {frozenset(pixels.get(name) or name for name in names) for names in lists}
    one = len(lists) > 1 and len(contents) == 1 and len(next(iter(contents))) == 1
    return [lists[0][0]] if one else []


def _recorded_hashes(manifest: Path) -> dict[str, str]:
    """{file: SHA-256} of the builder's manifest; empty where there is none, as in sets from elsewhere."""
    if not manifest.is_file():
        return {}
    try:
        images = json.loads(manifest.read_text(encoding="utf-8"))["images"]
        return {name: entry["sha256"] for name, entry in images.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{manifest} is not a manifest ({error!r}); remove it to check without") from None


def draw_contact_sheet(
    folder: Path, path: Path, *, prompts: list[str] | None = None, rows: int = 24, per_row: int = 8, tile: int = 128
) -> int:
    """Draw readable images as a grid of thumbnails, spread evenly over the set; returns how many are on it.

    Args:
        path: the PNG to write.
        prompts: the prompts to choose from; None for those of the index, and for a style.
        rows, per_row: at most so many prompts, and images of each; a style fills the grid.
        tile: thumbnails are fitted into squares of this many pixels, on white; small images are enlarged.

    Raises:
        UserError: no image at all.
    """
    entries = _entries(folder, with_prompts=prompts is not None)
    if list(entries) == [""]:
        spread = _spread(entries[""], rows * per_row)
        chosen = [("", spread[start : start + per_row]) for start in range(0, len(spread), per_row)]
    else:
        chosen = [(prompt, entries.get(prompt, [])[:per_row]) for prompt in _spread(prompts or list(entries), rows)]
    drawn = []
    for caption, names in chosen:
        found = [image for name in names if (image := _thumbnail(folder / name, tile)) is not None]
        if found:
            drawn.append((caption, [("references", torch.stack(found))]))
    if not drawn:
        raise UserError(f"{folder}: none of the chosen prompts has a readable image; no contact sheet is drawn")
    draw_grid(drawn, path, min_size=tile, max_size=tile)
    return sum(len(blocks[0][1]) for _, blocks in drawn)


def _spread(entries: list[str], count: int) -> list[str]:
    """At most `count` of the entries at even distances."""
    return entries[:: -(-len(entries) // count)] if entries else []


def _thumbnail(path: Path, tile: int) -> torch.Tensor | None:
    try:
        image = open_image(path)
    except UserError:  # in the report already
        return None
    scale = tile / max(image.size)
    how = Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.NEAREST
    fitted = image.resize([max(1, round(side * scale)) for side in image.size], how)
    square = Image.new("RGB", (tile, tile), "white")
    square.paste(fitted, ((tile - fitted.width) // 2, (tile - fitted.height) // 2))
    return torch.from_numpy(np.array(square)).permute(2, 0, 1).float() / 255
