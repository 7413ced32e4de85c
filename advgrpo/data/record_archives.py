"""Records of webdataset shards (tar), and the prompts of a folder with metadata.jsonl.

Nothing is unpacked: members are read into memory one at a time, so a name in an archive never becomes a path, and what
is larger than a text or an image can be is refused before it is read.
"""

from __future__ import annotations

import glob
import re
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from advgrpo.data.images import IMAGE_SUFFIXES
from advgrpo.data.record_source import (
    CAPTION_KEYS,
    MAX_IMAGE,
    MAX_TEXT,
    METADATA,
    Record,
    RecordSource,
    listed,
    text_of,
)
from advgrpo.errors import UserError, one_line
from advgrpo.runtime.reading import parse_json, read_text

_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")
_MAX_SHARDS = 100_000


def files_of(source: RecordSource) -> list[Path]:
    """The files that the location names; those that braces name must all exist."""
    names = list(_expanded(source))
    files = []
    for name in names:
        if any(character in name for character in "*?["):
            found = sorted(glob.glob(name))
            if not found:
                raise UserError(f"{source.address}: no file is called {name}")
            files += [Path(each) for each in found]
        else:
            files.append(Path(name))
    for file in files:
        if not file.is_file():
            why = "is no regular file" if file.exists() else "does not exist"
            raise UserError(f"{source.address}: {file} {why}; correct the address or add the file")
    return files


def _expanded(source: RecordSource) -> Iterator[str]:
    """webdataset's {0000..0009}, with as many digits as the first number has."""
    waiting, count = [source.location], 0
    while waiting:
        name = waiting.pop(0)
        found = _BRACES.search(name)
        if found is None:
            yield name
            continue
        first, last = int(found[1]), int(found[2])
        count += last - first + 1
        if first > last or count > _MAX_SHARDS:
            raise UserError(
                f"{source.address}: {found[0]} wants a first and a larger last number, {_MAX_SHARDS:,} apart"
            )
        numbers = (f"{number:0{len(found[1])}d}" for number in range(first, last + 1))
        waiting += [name[: found.start()] + number + name[found.end() :] for number in numbers]


# webdataset: members of one name, up to its first dot, are a sample.


def read_shards(source: RecordSource, texts: bool, images: bool) -> Iterator[Record]:
    for file in files_of(source):
        yield from _shard(source, file, texts, images)


def _shard(source: RecordSource, file: Path, texts: bool, images: bool) -> Iterator[Record]:
    try:
        with tarfile.open(file, "r:") as archive:
            sample: dict[str, tarfile.TarInfo] = {}
            current = None
            for member in archive:
                if member.isdir():
                    continue
                key, extension = _split_name(member, file)
                if key != current and sample:
                    yield _sample(source, archive, file, str(current), sample, texts, images)
                    sample = {}
                if extension in sample:
                    raise UserError(f"{file}, member {member.name}: {key}.{extension} is there twice; remove one")
                current = key
                sample[extension] = member
                archive.members = []  # ty: ignore[missing-attribute]  # kept for seeking back; a shard may have millions
            if sample:
                yield _sample(source, archive, file, str(current), sample, texts, images)
            _check_end(archive, file)
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read as a tar ({one_line(str(error), 200)}); download it again") from None


def _check_end(archive: tarfile.TarFile, file: Path) -> None:
    """A tar ends with two empty blocks; tarfile takes one that was cut off between members for a whole one."""
    if archive.fileobj is None:
        return
    archive.fileobj.seek(archive.offset)
    if file.stat().st_size <= archive.offset or archive.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):
        raise UserError(f"{file} is cut off or damaged after {archive.offset:,} bytes; download it again")


def _split_name(member: tarfile.TarInfo, file: Path) -> tuple[str, str]:
    if not member.isreg():
        raise UserError(f"{file}, member {one_line(member.name, 80)}: a link or a device; want files")
    path = PurePosixPath(member.name)
    stem, _, extension = path.name.partition(".")
    return str(path.parent / stem), extension.lower()


def _sample(
    source: RecordSource,
    archive: tarfile.TarFile,
    file: Path,
    key: str,
    sample: Mapping[str, tarfile.TarInfo],
    texts: bool,
    images: bool,
) -> Record:
    where = f"{file}, member {one_line(key, 80)}"

    def content(extension: str, most: int) -> bytes:
        member = sample[extension]
        if member.size > most:
            raise UserError(f"{where}.{extension} has {member.size:,} bytes; want at most {most:,}")
        opened = archive.extractfile(member)
        assert opened is not None  # a regular file, as _split_name has seen
        return opened.read()

    column = source.options.get("column")
    text = None
    if texts and "txt" in sample and column in (None, "txt"):
        text = text_of(_decoded(content("txt", MAX_TEXT), f"{where}.txt"), f"{where}.txt")
    elif texts and "json" in sample:
        text = _from_object(content("json", MAX_TEXT), f"{where}.json", column)
    found = [extension for extension in sample if f".{extension}" in IMAGE_SUFFIXES]
    if not images:
        return Record(where, text)
    if len(found) != 1:
        have = ", ".join(sorted(sample))
        raise UserError(f"{where}: want one image ({', '.join(IMAGE_SUFFIXES)}), it has {have}")
    return Record(where, text, content(found[0], MAX_IMAGE))


def _decoded(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8 text (byte {error.start}); save it as UTF-8") from None


def _from_object(content: bytes, where: str, column: str | None) -> str | None:
    value = parse_json(_decoded(content, where), where, "write an object with text, prompt or caption")
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected an object with text, prompt or caption, got a {type(value).__name__}")
    return text_of(value.get(_caption_key(value, where, column)), where)


def _caption_key(record: Mapping[str, Any], where: str, column: str | None) -> str:
    keys = [column] if column is not None else [key for key in CAPTION_KEYS if record.get(key) is not None]
    if len(keys) > 1:
        raise UserError(f"{where}: {listed(keys)} may all be the prompt; name it with :column=NAME")
    return keys[0] if keys else CAPTION_KEYS[0]


# A folder with metadata.jsonl.


def read_metadata(source: RecordSource, texts: bool, images: bool) -> Iterator[Record]:
    path = Path(source.location) / METADATA
    lines = read_text(path, "metadata", "write a JSON object per line there").split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        record = parse_json(line, where, "write an object with file_name and text")
        if not isinstance(record, dict):
            raise UserError(f"{where}: expected an object with file_name and text, got {line.strip()[:80]!r}")
        yield Record(where, text_of(record.get(_caption_key(record, where, source.options.get("column"))), where))
