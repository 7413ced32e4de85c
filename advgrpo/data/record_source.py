"""Addresses of records, prompts or images with captions, and what every reader of them needs.

    prompts.parquet             a parquet file, or a pattern: data/train-*.parquet
    shards/{0000..0009}.tar     webdataset shards: NAME.txt or NAME.json beside NAME.png; the braces expand
    photos/                     a folder with metadata.jsonl (Hugging Face's imagefolder): the prompts of its images
    hf:owner/name               a data set of the Hugging Face hub, or a folder that `datasets` can load

Settings follow the address, each after a colon: `hf:owner/name:split=test:column=caption`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from advgrpo.errors import UserError, one_line

CAPTION_KEYS = ("text", "prompt", "caption")
METADATA = "metadata.jsonl"
HUB = "hf:"
MAX_TEXT = 2**20  # bytes of a caption or of the JSON beside an image
MAX_IMAGE = 2**28  # bytes of an image file: 8192 x 8192 with alpha, uncompressed
_PARQUET, _TAR = ".parquet", ".tar"
_OPTIONS = {
    "hf": ("split", "column", "image", "config", "revision", "stream"),
    "parquet": ("column", "image"),
    "webdataset": ("column",),
    "metadata": ("column",),
}
_OPTION = re.compile(r":([a-z]+)=([^:]*)$")


@dataclass(frozen=True)
class Record:
    """One prompt and, where they are read, its image's bytes."""

    where: str  # "FILE, row 3": what errors and the manifest call it
    text: str | None  # None where nothing stands there
    image: bytes | None = None


@dataclass(frozen=True)
class RecordSource:
    """An address that names records; `parse_source` makes it."""

    address: str  # as it was given
    kind: str  # of _OPTIONS
    location: str  # without the settings
    options: Mapping[str, str] = field(default_factory=dict)


def parse_source(address: str | Path, name: str = "") -> RecordSource | None:
    """What the address means; None where it names none of the kinds above (a text file, say).

    Args:
        name: the setting or flag that it comes from, for errors.

    Raises:
        UserError: a setting that this kind of source does not have, or a hub address without a name.
    """
    text, options = str(address), {}
    while found := _OPTION.search(text):
        options[found[1]] = found[2]
        text = text[: found.start()]
    location, kind = _kind(text)
    if kind is None:
        return None
    source = f"{name} = {str(address)!r}" if name else str(address)
    for key, value in options.items():
        if key not in _OPTIONS[kind]:
            raise UserError(f"{source}: no setting {key!r}; such a source has {', '.join(_OPTIONS[kind])}")
        if not value:
            raise UserError(f"{source}: {key} is empty; leave it out or give it a value")
    if options.get("stream", "true") not in ("true", "false"):
        raise UserError(f"{source}: stream = {options['stream']!r}: want true or false")
    if not location:
        raise UserError(f"{source}: want hf:OWNER/NAME")
    return RecordSource(str(address), kind, location, options)


def _kind(text: str) -> tuple[str, str | None]:
    if text.startswith(HUB):
        return text.removeprefix(HUB), "hf"
    if text.endswith(_PARQUET):
        return text, "parquet"
    if text.endswith(_TAR):
        return text, "webdataset"
    if Path(text).is_dir() and (Path(text) / METADATA).exists():
        return text, "metadata"
    return text, None


def squeezed(text: str) -> str:
    """On one line, with single spaces."""
    return " ".join(text.split())


def text_of(value: Any, where: str) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str):
        raise UserError(f"{where}: the prompt is a {type(value).__name__}, not text; name its column with :column=NAME")
    if len(value) > MAX_TEXT:
        raise UserError(f"{where}: a prompt of {len(value):,} characters; want at most {MAX_TEXT:,}")
    return squeezed(value)


def pick_column(source: RecordSource, option: str, candidates: list[str], columns: list[str], what: str) -> str:
    """The column that is named, or the only one that may be meant."""
    named = source.options.get(option)
    if named is not None:
        if named not in columns:
            raise UserError(f"{source.address}: no column {named!r}; it has {listed(columns)}")
        return named
    if len(candidates) == 1:
        return candidates[0]
    found = f"{listed(candidates)} may all be" if candidates else f"none of its columns ({listed(columns)}) is"
    raise UserError(f"{source.address}: {found} the {what}; name it with :{option}=NAME")


def listed(names: Iterable[str]) -> str:
    names = [one_line(str(name), 40) for name in names]
    return ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
