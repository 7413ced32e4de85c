"""Records of parquet files and of what the datasets library loads. Only the columns that are wanted are read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from advgrpo.data.record_archives import files_of
from advgrpo.data.record_source import (
    CAPTION_KEYS,
    MAX_IMAGE,
    MAX_TEXT,
    Record,
    RecordSource,
    listed,
    pick_column,
    text_of,
)
from advgrpo.errors import UserError, one_line

_ROWS = 256  # of text read at once; images come one row at a time


# Parquet files.


def read_parquet(source: RecordSource, texts: bool, images: bool) -> Iterator[Record]:
    pyarrow = _pyarrow(source)
    for file in files_of(source):
        try:
            with pyarrow.parquet.ParquetFile(file) as table:
                yield from _rows(source, file, table, texts, images)
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:  # ArrowInvalid is a ValueError too
            raise UserError(f"{file} cannot be read as parquet ({one_line(str(error), 200)})") from None


def _pyarrow(source: RecordSource) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(_missing(source, "pyarrow")) from None
    return pyarrow


def _missing(source: RecordSource, package: str) -> str:
    return f"{source.address} needs {package}, which is not installed: pip install datasets"


def _rows(source: RecordSource, file: Path, table: Any, texts: bool, images: bool) -> Iterator[Record]:
    import pyarrow.types as types

    schema = table.schema_arrow
    column = image = None
    limits = {}
    if texts:
        known = [f.name for f in schema if types.is_string(f.type) or types.is_large_string(f.type)]
        column = pick_column(source, "column", [name for name in CAPTION_KEYS if name in known], schema.names, "prompt")
        limits[column] = MAX_TEXT
    if images:
        image = pick_column(source, "image", [f.name for f in schema if _is_image(f.type)], schema.names, "image")
        limits[image] = MAX_IMAGE
    _check_columns(table, limits, file)
    number = 0
    for batch in table.iter_batches(batch_size=1 if images else _ROWS, columns=list(limits)):
        for row in batch.to_pylist():
            number += 1
            where = f"{file}, row {number}"
            content = _bytes_of(row[image], where) if image else None
            yield Record(where, text_of(row[column], where) if column else None, content)


def _is_image(kind: Any) -> bool:
    """Bytes, or Hugging Face's image: {bytes, path}."""
    import pyarrow.types as types

    if types.is_struct(kind):
        return {"bytes", "path"} <= {kind.field(number).name for number in range(kind.num_fields)}
    return types.is_binary(kind) or types.is_large_binary(kind)


def _check_columns(table: Any, limits: Mapping[str, int], file: Path) -> None:
    """No row group promises more than as many of the largest as it has rows."""
    metadata = table.metadata
    for group in range(metadata.num_row_groups):
        part = metadata.row_group(group)
        for number in range(part.num_columns):
            chunk = part.column(number)
            most = limits.get(chunk.path_in_schema.split(".")[0])
            if most is not None and chunk.total_uncompressed_size > most * max(part.num_rows, 1) + MAX_TEXT:
                size = f"{chunk.total_uncompressed_size:,} bytes in {part.num_rows} rows"
                raise UserError(f"{file}: column {chunk.path_in_schema} has {size}; that is no prompt and no image")


def _bytes_of(value: Any, where: str) -> bytes:
    """Of a binary column or of {bytes, path}; a path alone could name any file of this machine."""
    content = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(content, (bytes, bytearray)):
        raise UserError(f"{where}: the image is not in the file (a path alone is not followed); embed its bytes")
    if len(content) > MAX_IMAGE:
        raise UserError(f"{where}: an image of {len(content):,} bytes; want at most {MAX_IMAGE:,}")
    return bytes(content)


# The datasets library.


def read_dataset(source: RecordSource, texts: bool, images: bool) -> Iterator[Record]:
    try:
        import datasets
    except ImportError:
        raise UserError(_missing(source, "datasets")) from None
    table = _load(datasets, source)
    features = table.features
    if features is None:  # a stream of JSON lines says nothing of its columns before its first row
        features = next(_guarded(iter(table), source), {})
    column = image = None
    if texts:
        known = [name for name in CAPTION_KEYS if name in features]
        column = pick_column(source, "column", known, list(features), "prompt")
    if images:
        found = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
        image = pick_column(source, "image", found, list(features), "image")
        table = table.cast_column(image, datasets.Image(decode=False))
    table = table.select_columns([name for name in dict.fromkeys((column, image)) if name])
    for number, row in enumerate(_guarded(iter(table), source), start=1):
        where = f"{source.address}, row {number}"
        content = _hub_bytes(datasets, source, row[image], where) if image else None
        yield Record(where, text_of(row[column], where) if column else None, content)


def _load(datasets: Any, source: RecordSource) -> Any:
    """One split of the data set: of the hub, or of a folder, also one that `save_to_disk` has written."""
    options, split = source.options, source.options.get("split", "train")
    folder = Path(source.location).expanduser()
    try:
        if (folder / "state.json").is_file():
            return datasets.load_from_disk(str(folder))
        if (folder / "dataset_dict.json").is_file():
            parts = datasets.load_from_disk(str(folder))
            if split not in parts:
                raise UserError(
                    f"{source.address}: no split {split!r}; it has {listed(parts)}; name it with :split=NAME"
                )
            return parts[split]
        return datasets.load_dataset(
            str(folder) if folder.is_dir() else source.location,
            name=options.get("config"),
            split=split,
            revision=options.get("revision"),
            streaming=options.get("stream") == "true",
        )
    except UserError:
        raise
    except Exception as error:  # the library, its builders and the network fail in their own ways
        raise UserError(_unloadable(source, error)) from None


def _guarded(rows: Iterator[Any], source: RecordSource) -> Iterator[Any]:
    """The library's errors while it reads as one line."""
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as error:
            raise UserError(_unloadable(source, error)) from None
        yield row


def _unloadable(source: RecordSource, error: Exception) -> str:
    said = one_line(str(error), 300) or type(error).__name__
    return (
        f"{source.address} cannot be loaded ({type(error).__name__}: {said}); check the name, split and config and the "
        "network, or run hf auth login for one behind a gate"
    )


def _hub_bytes(datasets: Any, source: RecordSource, value: Any, where: str) -> bytes:
    """An undecoded image: its bytes, or the file that the library has downloaded or found in its folder.

    A row may name any path; only those in that folder and in the library's caches are opened.
    """
    if not isinstance(value, dict) or value.get("bytes") is not None or not isinstance(value.get("path"), str):
        return _bytes_of(value, where)
    path, named = Path(value["path"]).resolve(), one_line(value["path"], 200)
    roots = [datasets.config.HF_CACHE_HOME, datasets.config.HF_DATASETS_CACHE, datasets.config.DOWNLOADED_DATASETS_PATH]
    roots += [source.location] if Path(source.location).expanduser().is_dir() else []
    if not any(path.is_relative_to(Path(root).expanduser().resolve()) for root in roots):
        raise UserError(f"{where}: the image is {named}, which is no file of this data set; embed its bytes")
    if not path.is_file():
        raise UserError(f"{where}: the image's file {named} does not exist; without :stream=true it is downloaded")
    if path.stat().st_size > MAX_IMAGE:
        raise UserError(f"{where}: an image of {path.stat().st_size:,} bytes; want at most {MAX_IMAGE:,}")
    return path.read_bytes()
