"""Where the prompts of a folder of images are: an index, metadata, text files beside the images, folders' names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Literal

from advgrpo.data.references import read_index
from advgrpo.errors import UserError
from advgrpo.runtime.reading import parse_json, read_text

CaptionSource = Literal["auto", "index", "metadata", "txt", "folders", "none"]
INDEX, METADATA = "references.json", "metadata.jsonl"
_CAPTION_KEYS = ("text", "prompt", "caption")
_NAMED = 5

Captions = dict[Path, list[str]]
"""Images, relative to their folder -> prompts; most have one, those of an index may have several."""


def read_captions(folder: Path, files: Sequence[Path], source: CaptionSource) -> tuple[str, Captions]:
    """The prompts of images, each on one line with single spaces.

    Args:
        files: the images, relative to `folder`.
        source: "index", references.json as this program reads it, whose images alone count; "metadata", a
            metadata.jsonl with file_name and text, prompt or caption, as of Hugging Face's imagefolder, in any
            subfolder; "txt", NAME.txt beside NAME.png; "folders", the name of an image's folder, _ for a space;
            "none", no prompts: a style, whose images get the prompt "". "auto" is the first of these that is there,
            and never "none".

    Returns:
        What was read, in words, and the prompts.

    Raises:
        UserError: no such captions, an image without one, or a file that cannot be read.
    """
    if source == "auto":
        source = _find(folder, files)
    words, read = _READERS[source]
    captions = {file: [_one_line(text) for text in texts] for file, texts in read(folder, files).items()}
    blank = [file for file, texts in captions.items() if source != "none" and not all(texts)]
    if blank:
        raise UserError(f"{folder}: {_some(blank)} have blank captions in {words}; write them")
    return words, captions


def _find(folder: Path, files: Sequence[Path]) -> CaptionSource:
    if (folder / INDEX).exists():
        return "index"
    if _metadata_files(folder):
        return "metadata"
    if any((folder / file).with_suffix(".txt").exists() for file in files):
        return "txt"
    if all(len(file.parts) > 1 for file in files):
        return "folders"
    raise UserError(
        f"{folder}: no captions. Wanted are {INDEX}, {METADATA}, a .txt beside each image, or all images in "
        "folders that name them; or pass --captions none for a style, which has no prompts"
    )


def _from_index(folder: Path, files: Sequence[Path]) -> Captions:
    captions: Captions = {}
    for prompt, names in read_index(folder / INDEX).items():
        for name in names:
            captions.setdefault(Path(name), []).append(prompt)
    missing = [file for file in captions if not (folder / file).exists()]
    if missing:
        raise UserError(f"{folder / INDEX} names {_some(missing)}, which do not exist; correct it")
    if not captions:
        raise UserError(f"{folder / INDEX} names no image; list them, or pass another --captions")
    return captions


def _from_metadata(folder: Path, files: Sequence[Path]) -> Captions:
    captions: Captions = {}
    sources = _metadata_files(folder)
    if not sources:
        raise UserError(f"--captions metadata: no {METADATA} in {folder} or its subfolders")
    for path in sources:
        lines = read_text(path, "metadata", "write a JSON object per line there").split("\n")
        for number, line in enumerate(lines, start=1):
            if line.strip():
                file, caption = _metadata_line(line, f"{path}, line {number}")
                captions.setdefault(path.parent.relative_to(folder) / file, []).append(caption)
    unknown = sorted(captions.keys() - set(files))
    if unknown:
        raise UserError(f"{METADATA} names {_some(unknown)}, which are no PNG, JPEG or WebP files of {folder}")
    return _complete(captions, files, METADATA)


def _metadata_line(line: str, where: str) -> tuple[Path, str]:
    record = parse_json(line, where, "write an object with file_name and text")
    name = record.get("file_name") if isinstance(record, dict) else None
    if not isinstance(name, str) or not name:
        raise UserError(f'{where}: expected an object with a string "file_name", got {line.strip()[:80]!r}')
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts:
        raise UserError(f"{where}: file_name {name!r} must be a path inside the folder")
    caption = next((record[key] for key in _CAPTION_KEYS if isinstance(record.get(key), str)), None)
    if caption is None:
        raise UserError(f"{where}: {name} has no caption; give it as {', '.join(_CAPTION_KEYS)}")
    return Path(name), caption


def _metadata_files(folder: Path) -> list[Path]:
    return sorted(folder.rglob(METADATA))


def _from_txt(folder: Path, files: Sequence[Path]) -> Captions:
    texts = {file: (folder / file).with_suffix(".txt") for file in files}
    captions = {file: [read_text(path, "caption", "write it")] for file, path in texts.items() if path.exists()}
    return _complete(captions, files, "a .txt file of the same name")


def _from_folders(folder: Path, files: Sequence[Path]) -> Captions:
    captions = {file: [file.parent.name.replace("_", " ")] for file in files if len(file.parts) > 1}
    return _complete(captions, files, "a folder that names them")


def _from_nothing(folder: Path, files: Sequence[Path]) -> Captions:
    return {file: [""] for file in files}


def _complete(captions: Captions, files: Sequence[Path], where: str) -> Captions:
    """In the order of `files`; UserError where one has no caption."""
    missing = [file for file in files if file not in captions]
    if missing:
        raise UserError(f"{_some(missing)} have no caption: want {where} for all of the {len(files)} images")
    return {file: captions[file] for file in files}


def _some(files: Sequence[Path]) -> str:
    """How many images, and the first names."""
    named = ", ".join(map(str, files[:_NAMED])) + (", ..." if len(files) > _NAMED else "")
    return f"{len(files)} image{'s' * (len(files) > 1)} ({named})"


def _one_line(text: str) -> str:
    return " ".join(text.split())


_READERS: dict[str, tuple[str, Callable[[Path, Sequence[Path]], Captions]]] = {
    "index": (INDEX, _from_index),
    "metadata": (METADATA, _from_metadata),
    "txt": (".txt files beside the images", _from_txt),
    "folders": ("the names of folders", _from_folders),
    "none": ("nowhere: a style", _from_nothing),
}
