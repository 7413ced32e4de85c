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

from advgrpo.data.references import PICTURE_SUFFIXES, open_picture, read_index
from advgrpo.errors import UserError
from advgrpo.plots import draw_grid

INDEX = "references.json"


@dataclass
class SetReport:
    """Findings of `check_set`; every list is sorted. The first six make a set unusable or poorer than it looks."""

    without_references: list[str] = field(default_factory=list)  # prompts
    missing: list[str] = field(default_factory=list)  # files of the index that do not exist
    unreadable: list[str] = field(default_factory=list)  # "file: why", not RGB included
    too_small: list[str] = field(default_factory=list)  # "file: WxH"
    duplicates: list[str] = field(default_factory=list)  # "file = file": the same pixels twice
    changed: list[str] = field(default_factory=list)  # files whose SHA-256 is not the manifest's
    too_few: list[str] = field(default_factory=list)  # "prompt: n" with fewer than the usual number
    unlisted: list[str] = field(default_factory=list)  # pictures in the folder that the index does not name
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)  # (width, height) -> files
    prompts: int = 0
    files: int = 0

    @property
    def errors(self) -> dict[str, list[str]]:
        return {
            "prompts without references": self.without_references,
            "missing files": self.missing,
            "unreadable files": self.unreadable,
            "too small": self.too_small,
            "duplicates": self.duplicates,
            "changed since they were drawn": self.changed,
        }

    @property
    def warnings(self) -> dict[str, list[str]]:
        return {"prompts with fewer references": self.too_few, "files not in the index": self.unlisted}

    @property
    def ok(self) -> bool:
        return not any(self.errors.values())


def check_set(folder: Path, prompts: list[str] | None = None, *, min_size: int = 16) -> SetReport:
    """Examine every picture of a reference set, or of a style: a folder of pictures without an index.

    Args:
        folder: holds the pictures and, but for a style, references.json.
        prompts: the prompts that need references; None for those of the index, and for a style.
        min_size: the smallest width and height, in pixels, that a picture may have.

    Raises:
        UserError: no folder, or no index that can be read at all.
    """
    entries = _entries(folder, with_prompts=prompts is not None)
    prompts = list(entries) if prompts is None else prompts
    report = SetReport(prompts=sum(bool(prompt) for prompt in prompts))
    report.without_references = sorted(prompt for prompt in prompts if not entries.get(prompt))
    usual = max((len(names) for names in entries.values()), default=0)
    report.too_few = sorted(f"{p}: {len(entries[p])}" for p in prompts if 0 < len(entries.get(p, ())) < usual)
    names = sorted({name for listed in entries.values() for name in listed})
    report.files = len(names)
    hashes = _recorded_hashes(folder / "manifest.json")
    same_pixels: dict[str, list[str]] = defaultdict(list)
    for name in names:
        _check_file(folder, name, min_size, hashes, same_pixels, report)
    listed_twice = [name for listed in entries.values() for name, count in Counter(listed).items() if count > 1]
    report.duplicates = sorted(
        [" = ".join(group) for group in same_pixels.values() if len(group) > 1]
        + [f"{name} = {name} (listed twice)" for name in listed_twice]
    )
    known = {(folder / name).resolve() for name in names}
    report.unlisted = sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.suffix.lower() in PICTURE_SUFFIXES and path.resolve() not in known
    )
    return report


def _entries(folder: Path, *, with_prompts: bool) -> dict[str, list[str]]:
    """The index; {"": all pictures} of a style, which `ReferenceSet.shared` reads."""
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; pass one with pictures")
    pictures = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in PICTURE_SUFFIXES)
    if with_prompts or (folder / INDEX).exists() or not pictures:
        return read_index(folder / INDEX)
    return {"": pictures}


def _check_file(
    folder: Path,
    name: str,
    min_size: int,
    hashes: dict[str, str],
    same_pixels: dict[str, list[str]],
    report: SetReport,
) -> None:
    """Enter what is wrong with one file into `report`, and the file into `same_pixels` under its pixels' hash."""
    path = folder / name
    if not path.is_file():
        report.missing.append(name)
        return
    if name in hashes and hashlib.sha256(path.read_bytes()).hexdigest() != hashes[name]:
        report.changed.append(name)
    try:
        picture = open_picture(path)
    except UserError as error:
        report.unreadable.append(f"{name}: {error}")
        return
    report.sizes[picture.size] += 1
    if min(picture.size) < min_size:
        report.too_small.append(f"{name}: {picture.width}x{picture.height}")
    # Pixels, not bytes: the same picture may be stored with another compression or another comment.
    same_pixels[hashlib.sha256(f"{picture.size}".encode() + picture.tobytes()).hexdigest()].append(name)


def _recorded_hashes(manifest: Path) -> dict[str, str]:
    """{file: SHA-256} of the builder's manifest; empty where there is none, as in sets from elsewhere."""
    if not manifest.is_file():
        return {}
    try:
        pictures = json.loads(manifest.read_text(encoding="utf-8"))["pictures"]
        return {name: entry["sha256"] for name, entry in pictures.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{manifest} is not a manifest ({error!r}); remove it to check without") from None


def draw_contact_sheet(
    folder: Path, path: Path, *, prompts: list[str] | None = None, rows: int = 24, per_row: int = 8, tile: int = 128
) -> int:
    """Draw readable pictures as a grid of thumbnails, spread evenly over the set; returns how many are on it.

    Args:
        path: the PNG to write.
        prompts: the prompts to choose from; None for those of the index, and for a style.
        rows, per_row: at most so many prompts, and pictures of each; a style fills the grid.
        tile: thumbnails are fitted into squares of this many pixels, on white; small pictures are enlarged.

    Raises:
        UserError: no picture at all.
    """
    entries = _entries(folder, with_prompts=prompts is not None)
    if list(entries) == [""]:
        spread = _spread(entries[""], rows * per_row)
        chosen = [("", spread[start : start + per_row]) for start in range(0, len(spread), per_row)]
    else:
        chosen = [(prompt, entries.get(prompt, [])[:per_row]) for prompt in _spread(prompts or list(entries), rows)]
    drawn = []
    for caption, names in chosen:
        found = [picture for name in names if (picture := _thumbnail(folder / name, tile)) is not None]
        if found:
            drawn.append((caption, [("references", torch.stack(found))]))
    if not drawn:
        raise UserError(f"{folder}: none of the chosen prompts has a readable picture; no contact sheet is drawn")
    draw_grid(drawn, path, min_size=tile, max_size=tile)
    return sum(len(blocks[0][1]) for _, blocks in drawn)


def _spread(entries: list[str], count: int) -> list[str]:
    """At most `count` of the entries at even distances."""
    return entries[:: -(-len(entries) // count)] if entries else []


def _thumbnail(path: Path, tile: int) -> torch.Tensor | None:
    try:
        picture = open_picture(path)
    except UserError:  # in the report already
        return None
    scale = tile / max(picture.size)
    how = Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.NEAREST
    fitted = picture.resize([max(1, round(side * scale)) for side in picture.size], how)
    square = Image.new("RGB", (tile, tile), "white")
    square.paste(fitted, ((tile - fitted.width) // 2, (tile - fitted.height) // 2))
    return torch.from_numpy(np.array(square)).permute(2, 0, 1).float() / 255
