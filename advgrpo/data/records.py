"""Prompts, and images with captions, out of parquet, webdataset shards, image folders and data sets of the hub.

`parse_source` (record_source.py) says what an address means; here its records are read. Texts are decoded by the
readers, images only by `images.py`. A text is taken with its white space as single spaces, as the importer writes
prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from advgrpo.data.record_archives import read_metadata, read_shards
from advgrpo.data.record_source import Record, RecordSource
from advgrpo.data.record_tables import read_dataset, read_parquet
from advgrpo.errors import UserError

MAX_RECORDS = 10**7
_READERS: dict[str, Callable[[RecordSource, bool, bool], Iterator[Record]]] = {
    "hf": read_dataset,
    "parquet": read_parquet,
    "webdataset": read_shards,
    "metadata": read_metadata,
}


def read_images(source: RecordSource, *, texts: bool = True) -> Iterator[Record]:
    """Every record with its image file's bytes, one in memory at a time, in the order of `read_prompts`.

    Args:
        texts: read the texts as well; a style has none.

    Raises:
        UserError: as `read_prompts`; no image, or one of more than `MAX_IMAGE` bytes.
    """
    if source.kind == "metadata":
        raise ValueError("the images of a folder are files; import_folder reads them")
    return _bounded(source, _READERS[source.kind](source, texts, True))


def read_prompts(source: RecordSource) -> Iterator[str]:
    """The text of every record; images are not read.

    Raises:
        UserError: naming the file and the row or member: absent, damaged, no such column, several that may be meant, a
            text that is missing, blank, none or too large; or there are no records.
    """
    number = 0
    for record in _bounded(source, _READERS[source.kind](source, True, False)):
        number += 1
        if not record.text:
            raise UserError(f"{record.where}: no prompt, or a blank one; write it or leave the record out")
        yield record.text
    if not number:
        raise UserError(f"{source.address} holds no prompt")


def _bounded(source: RecordSource, records: Iterable[Record]) -> Iterator[Record]:
    for number, record in enumerate(records):
        if number >= MAX_RECORDS:
            raise UserError(f"{source.address} holds more than {MAX_RECORDS:,} records; split it")
        yield record
