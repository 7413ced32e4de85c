"""Make a reference set of any images (a folder's, or records of parquet, webdataset or the hub): converted to RGB
squares of one size, captioned and indexed.

Originals are only read. An output image is named after the content of its original and the recipe, so a run that is
interrupted continues where it stopped, and written aside and renamed, so a half one never has its name. The index
comes last: what has no references.json is not finished.

    OUT/images/….png     the squares; a style (no captions) is this folder
    OUT/references.json    {prompt: [files]}, what `ReferenceSet` reads
    OUT/prompts.txt        its prompts, one a line
    OUT/held_out.txt       those set aside for evaluation, if any
    OUT/manifest.json      recipe, library versions, SHA-256 and original of every image
    OUT/sheet.png          what it looks like
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import BinaryIO, Literal

from PIL import Image, ImageColor, ImageOps, PngImagePlugin

from advgrpo.data.images import IMAGE_SUFFIXES, ImageError, decode_image, in_one_colour, read_header, to_rgb
from advgrpo.data.record_source import RecordSource
from advgrpo.data.records import read_images, read_prompts
from advgrpo.errors import UserError
from advgrpo.references.builder import INDEX, MANIFEST, library_versions, write_output
from advgrpo.references.check import draw_contact_sheet
from advgrpo.references.import_captions import CaptionSource, read_captions

IMAGES, PROMPTS, HELD_OUT, SHEET = "images", "prompts.txt", "held_out.txt", "sheet.png"
_STAMP = "advgrpo"  # key of the PNG text chunk: the hash of the pixels
_OTHER_IMAGES = {".avif", ".bmp", ".gif", ".heic", ".heif", ".jxl", ".tif", ".tiff", ".psd", ".svg", ".dng", ".cr2"}
_NAMED = 5
_IN_FLIGHT = 32  # originals in memory


@dataclass(frozen=True)
class ImportRecipe:
    """What becomes of an image; two imports with one recipe make the same files."""

    size: int = 512
    fit: Literal["crop", "letterbox"] = "crop"
    background: str = "white"  # behind transparent pixels and beside letterboxed ones
    min_size: int = 64  # of the shorter side that is kept

    def check(self) -> None:
        """UserError for what no image can be made with."""
        if not 16 <= self.size <= 4096:
            raise UserError(f"--size {self.size}: want 16 to 4096 pixels")
        if self.min_size < 1:
            raise UserError(f"--min-size {self.min_size}: want at least 1")
        try:
            opaque = len(ImageColor.getrgb(self.background)) == 3
        except ValueError:
            opaque = False
        if not opaque:
            raise UserError(f"--background {self.background!r}: want a colour such as white, black or #808080")

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Original:
    """An image as it comes: its name, its prompts, and the file or the bytes."""

    name: str
    texts: tuple[str, ...]
    source: Path | bytes

    def opened(self) -> Path | BinaryIO:
        return io.BytesIO(self.source) if isinstance(self.source, bytes) else self.source

    def sha256(self) -> str:
        return hashlib.sha256(self.source).hexdigest() if isinstance(self.source, bytes) else sha256_of(self.source)


@dataclass
class Imported:
    """What an import did."""

    prompts: dict[str, list[str]]  # {prompt: [files of OUT]}; {"": files} of a style
    captions: str  # where they came from
    made: int = 0
    kept: int = 0  # finished by an earlier run
    notices: dict[str, list[str]] = field(default_factory=dict)  # what was done to which originals
    skipped: list[str] = field(default_factory=list)  # "file: why", with skip_unusable
    held_out: list[str] = field(default_factory=list)  # prompts that are not in prompts.txt


def import_folder(
    folder: Path,
    out: Path,
    recipe: ImportRecipe,
    captions: CaptionSource,
    *,
    held_out: int = 0,
    skip_unusable: bool = False,
    progress: Callable[[Iterable, int | None], Iterable] = lambda work, total: work,
) -> Imported:
    """Convert all PNG, JPEG and WebP images of `folder` and its subfolders into a reference set at `out`.

    Args:
        captions: where the prompts are; see `read_captions`.
        held_out: how many prompts to set aside for evaluation; which depends on nothing but their texts.
        skip_unusable: leave out what cannot be read, is too small or too large, or shows nothing, instead of refusing
            to finish.
        progress: wraps the loop over images, of which it is told the number.

    Raises:
        UserError: no images, no captions, images that cannot be used, or an `out` that holds something else or
            cannot be written. The finished images are kept; `folder` is as it was in any case.
    """
    recipe.check()
    files, notices = _find_images(folder)
    _check_outside(folder, out)
    _check_out(out, recipe)
    source, captioned = read_captions(folder, files, captions)
    originals = (Original(str(file), tuple(texts), folder / file) for file, texts in captioned.items())
    every = [text for texts in captioned.values() for text in texts]
    result = Imported({}, source, notices=notices, held_out=_set_aside(every, held_out))
    return _import(str(folder), originals, len(captioned), out, recipe, result, skip_unusable, progress)


def import_records(
    source: RecordSource,
    out: Path,
    recipe: ImportRecipe,
    captions: CaptionSource,
    *,
    held_out: int = 0,
    skip_unusable: bool = False,
    progress: Callable[[Iterable, int | None], Iterable] = lambda work, total: work,
) -> Imported:
    """As `import_folder`, of records: their texts are all read and checked before the first image is.

    Args:
        captions: "auto", the records' texts, or "none", a style.

    Raises:
        UserError: as `import_folder` and `read_images`; also other `captions`.
    """
    recipe.check()
    if captions not in ("auto", "none"):
        raise UserError(f"--captions {captions}: {source.address} brings its own; want auto, or none for a style")
    _check_out(out, recipe)
    style = captions == "none"
    texts = [] if style else list(read_prompts(source))
    records = read_images(source, texts=not style)
    originals = (Original(each.where, ("" if style else str(each.text),), each.image or b"") for each in records)
    result = Imported({}, "nowhere: a style" if style else source.address, held_out=_set_aside(texts, held_out))
    return _import(source.address, originals, len(texts) or None, out, recipe, result, skip_unusable, progress)


def _import(
    name: str,
    originals: Iterable[Original],
    count: int | None,
    out: Path,
    recipe: ImportRecipe,
    result: Imported,
    skip_unusable: bool,
    progress: Callable[[Iterable, int | None], Iterable],
) -> Imported:
    """Convert `count` originals (None: nobody knows how many) of `name`, and write the set."""
    done: dict[str, _Done] = {}
    unusable: list[str] = []
    pool = ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1))  # Pillow decodes without the GIL
    try:
        for original, attempt in progress(_attempts(pool, originals, out, recipe), count):
            if isinstance(attempt, ImageError):
                unusable.append(f"{original}: {attempt.reason}")
                continue
            done[original] = attempt
            result.made += attempt.made
            result.kept += not attempt.made
            for notice in attempt.notices:
                result.notices.setdefault(notice, []).append(original)
    finally:
        pool.shutdown(cancel_futures=True)  # an interrupt need not wait for thousands of images
    if unusable and not (skip_unusable and done):
        named = "; ".join(unusable[:_NAMED]) + ("; ..." if len(unusable) > _NAMED else "")
        raise UserError(
            f"{name}: {len(unusable)} of {len(unusable) + len(done)} images cannot be used: {named}. Mend or remove "
            "them, or pass --skip-unusable to leave them out; the others are converted already"
        )
    if not done:
        raise UserError(f"{name} holds no image")
    result.skipped = unusable
    _write_set(out, recipe, done, result)
    return result


def _attempts(
    pool: Executor, originals: Iterable[Original], out: Path, recipe: ImportRecipe
) -> Iterator[tuple[str, _Done | ImageError]]:
    """What became of each, in their order; only a few are held in memory, which records' bytes would fill."""
    waiting: deque[tuple[str, Future]] = deque()
    for original in originals:
        waiting.append((original.name, pool.submit(_attempt, original, out, recipe)))
        if len(waiting) >= _IN_FLIGHT:
            name, future = waiting.popleft()
            yield name, future.result()
    while waiting:
        name, future = waiting.popleft()
        yield name, future.result()


def _set_aside(prompts: list[str], count: int) -> list[str]:
    """`count` of the prompts, in an order that depends on each alone."""
    distinct = set(prompts) - {""}
    if count and not 0 < count < len(distinct):
        raise UserError(f"--held-out {count}: want 0, or fewer than the {len(distinct)} prompts")
    return sorted(distinct, key=lambda prompt: hashlib.sha256(prompt.encode()).digest())[:count]


def _find_images(folder: Path) -> tuple[list[Path], dict[str, list[str]]]:
    """Images relative to `folder`, hidden ones left out, and a notice of files in other formats."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give one with images")
    found = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if not path.is_dir()]
    found = [path for path in found if not any(part.startswith(".") for part in path.parts)]
    files = [path for path in found if path.suffix.lower() in IMAGE_SUFFIXES]
    others = [str(path) for path in found if path.suffix.lower() in _OTHER_IMAGES]
    if not files:
        kinds = ", ".join(sorted({Path(name).suffix for name in others}))
        also = f"; {len(others)} are of other kinds ({kinds}): convert them to PNG or JPEG first" if others else ""
        raise UserError(f"{folder} holds no image ({', '.join(IMAGE_SUFFIXES)}){also}")
    return files, {"left out: neither PNG, JPEG nor WebP": others} if others else {}


def _check_outside(folder: Path, out: Path) -> None:
    here, there = folder.resolve(), out.resolve()
    if here == there or here in there.parents or there in here.parents:
        raise UserError(f"--out {out}: must be outside of {folder}, whose images are left as they are")


def _check_out(out: Path, recipe: ImportRecipe) -> None:
    """UserError unless `out` is new, empty, or an import with this recipe; marks it as one."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        holds = sorted(path.name for path in out.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise UserError(f"--out {out}: cannot be made a folder ({error.strerror})") from None
    mark = _manifest(recipe, {})
    if holds:
        try:
            earlier = json.loads((out / MANIFEST).read_text(encoding="utf-8"))["recipe"]
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(f"--out {out}: holds {holds[0]}, which was not imported; use an empty folder") from None
        if earlier != mark["recipe"]:
            raise UserError(f"--out {out}: was made with {earlier}, not {mark['recipe']}; use another folder")
        return
    write_output(out / MANIFEST, _json(mark))


def _manifest(recipe: ImportRecipe, images: dict) -> dict:
    return {"format": 1, "recipe": {"import": asdict(recipe)}, "versions": library_versions(), "images": images}


@dataclass(frozen=True)
class _Done:
    """A converted image."""

    name: str  # relative to OUT
    sha256: str
    made: bool  # now, not by an earlier run
    notices: tuple[str, ...]
    texts: tuple[str, ...]  # its original's


def _attempt(original: Original, out: Path, recipe: ImportRecipe) -> _Done | ImageError:
    try:
        read_header(original.opened(), original.name)  # before anything is read to its end: it may be a pipe
        name = hashlib.sha256(f"{recipe.fingerprint}:{original.sha256()}".encode()).hexdigest()[:16]
        path = out / IMAGES / f"{name}.png"
        notices = _finished(path)
        made = notices is None
        if notices is None:
            square, notices = convert(original.opened(), recipe, original.name)
            _save(path, square, notices)
    except ImageError as error:
        return error
    return _Done(f"{IMAGES}/{path.name}", sha256_of(path), made, tuple(notices), original.texts)


def convert(source: Path | BinaryIO, recipe: ImportRecipe, name: str = "") -> tuple[Image.Image, list[str]]:
    """An original, a file or its content, as an RGB square, and what was done to it that its owner should know.

    Raises:
        ImageError: it cannot be used.
    """
    name = name or str(source)
    image, header = decode_image(source, name)
    if min(image.size) < recipe.min_size:
        reason = f"is {image.width}x{image.height}; the shorter side must have {recipe.min_size} pixels"
        raise ImageError(name, reason)
    rgb, notices = to_rgb(image, recipe.background)
    if header.animated:
        notices.append("animated: the first frame was taken")
    size = (recipe.size, recipe.size)
    if recipe.fit == "crop":
        square, kept = ImageOps.fit(rgb, size, Image.Resampling.LANCZOS), min(rgb.size)
    else:
        square = ImageOps.pad(rgb, size, Image.Resampling.LANCZOS, color=recipe.background)
        kept = max(rgb.size)
    if in_one_colour(rgb) or in_one_colour(square):  # the second where a margin is what cropping left
        what = "is in a single colour" if in_one_colour(rgb) else "is in a single colour where it is cropped"
        raise ImageError(name, what)
    if rgb.width != rgb.height:
        notices.append("cropped to the middle" if recipe.fit == "crop" else f"letterboxed on {recipe.background}")
    if kept < recipe.size:
        notices.append("enlarged")
    return square, notices


def _finished(path: Path) -> list[str] | None:
    """The notices of an image that an earlier run finished; None where there is none, or a damaged one."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            pixels = hashlib.sha256(image.tobytes()).hexdigest()
            stamp = json.loads(image.text[_STAMP])
            whole = stamp["pixels"] == pixels and not in_one_colour(image)  # an older version let those pass
        return stamp["notices"] if whole else None
    except FileNotFoundError:
        return None
    except Exception:  # a damaged file: decoders raise OSError, SyntaxError, ValueError, KeyError, struct.error, ...
        return None


def _save(path: Path, square: Image.Image, notices: list[str]) -> None:
    info = PngImagePlugin.PngInfo()
    stamp = {"pixels": hashlib.sha256(square.tobytes()).hexdigest(), "notices": notices}
    info.add_itxt(_STAMP, json.dumps(stamp))
    write_output(path, lambda file: square.save(file, "PNG", pnginfo=info))


def sha256_of(file: Path) -> str:
    """Of a file's bytes, in hex, without holding all of them."""
    digest = hashlib.sha256()
    try:
        with open(file, "rb") as opened:
            while block := opened.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise ImageError(str(file), f"cannot be read ({error.strerror})") from None
    return digest.hexdigest()


def _write_set(out: Path, recipe: ImportRecipe, done: Mapping[str, _Done], result: Imported) -> None:
    """Index, prompts, manifest and sheet; the index last, for it says that the set is whole."""
    images = {}
    for original, made in done.items():
        for prompt in made.texts:
            listed = result.prompts.setdefault(prompt, [])
            if made.name in listed:
                result.notices.setdefault("left out: the same image twice for a prompt", []).append(original)
                continue
            listed.append(made.name)
        images[made.name] = {"sha256": made.sha256, "source": original}
    write_output(out / MANIFEST, _json(_manifest(recipe, images)))
    if "" in result.prompts:
        draw_contact_sheet(out / IMAGES, out / SHEET)
        return
    result.held_out = [prompt for prompt in result.prompts if prompt in result.held_out]
    lists = {PROMPTS: [prompt for prompt in result.prompts if prompt not in result.held_out]}
    if result.held_out:
        lists[HELD_OUT] = result.held_out
    for name, prompts in lists.items():
        write_output(out / name, "".join(f"{prompt}\n" for prompt in prompts))
    write_output(out / INDEX, _json(result.prompts))
    draw_contact_sheet(out, out / SHEET)


def _json(content: dict) -> str:
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"
