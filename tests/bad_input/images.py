"""Prompt files, reference images and their index."""

from __future__ import annotations

import io
import json
import os
import shutil
import struct
import zlib
from collections.abc import Callable

import numpy as np
from PIL import Image

from tests.bad_input.case import Bench, Case, Content, flagged
from tests.bad_input.world import SIDE, image

_PROMPTS, _IMAGES = "prompt files", "reference images and index"
_FOREIGN = "is unreadable or truncated (no PNG, JPEG or WEBP)"


def _prompts(
    name: str, content: Content | Callable[[Bench], Content], *expect: str, flags: tuple[str, ...] = ()
) -> Case:
    """A run whose training prompts are this file."""

    def make(bench: Bench) -> list[str]:
        text = content(bench) if callable(content) else content
        return bench.train("--data.prompts", bench.write(name, text), *flags)

    return Case(_PROMPTS, name, expect, make)


def _pipe(bench: Bench) -> list[str]:
    os.mkfifo(bench.folder / "pipe.txt")
    return bench.train("--data.prompts", str(bench.folder / "pipe.txt"))


def _line(**record: object) -> str:
    return json.dumps(record) + "\n"


_TWO = "a small red star\na large green ring\n"
PROMPT_FILES = [
    Case(_PROMPTS, "missing", ("nowhere.txt does not exist",), lambda b: b.train("--data.prompts", "nowhere.txt")),
    Case(_PROMPTS, "folder", ("it is a folder",), lambda b: b.train("--data.prompts", b.write("x.txt/y", "")[:-2])),
    Case(_PROMPTS, "pipe", ("it is a pipe or a device",), _pipe),
    Case(_PROMPTS, "device", ("suffix '' is unknown",), lambda b: b.train("--data.prompts", "/dev/zero")),
    _prompts("empty.txt", "", "is empty; write one prompt per line"),
    _prompts("blank.txt", "  \n \n", "is empty"),
    _prompts("gap.txt", "a small red star\n\na large green ring\n", "line 2: the prompt is blank"),
    _prompts("twice.txt", _TWO + "a small red star\n", "line 3", "repeats line 1"),
    _prompts("twice-spaced.txt", _TWO + "  a small red star \n", "line 3", "repeats line 1"),
    _prompts("prompts.csv", _TWO, "suffix '.csv' is unknown"),
    _prompts("prompts.parquet", _TWO, "prompts.parquet cannot be read as parquet"),
    _prompts("prompts.tar", _TWO, "prompts.tar cannot be read as a tar"),
    Case(_PROMPTS, "hub address without a name", ("want hf:OWNER/NAME",), lambda b: b.train("--data.prompts", "hf:")),
    Case(
        _PROMPTS,
        "hub without network",
        ("hf:o/n cannot be loaded",),
        lambda b: b.train("--data.prompts", "hf:o/n"),
        environment={"HF_HUB_OFFLINE": "1"},
    ),
    Case(
        _PROMPTS,
        "unknown setting of a source",
        ("no setting 'colum'",),
        lambda b: b.train("--data.prompts", "x.parquet:colum=a"),
    ),
    Case(
        _IMAGES,
        "references of the hub",
        ("hf:o/n must become a reference set first: python -m advgrpo.references import hf:o/n",),
        lambda b: b.train("--data.references", "hf:o/n"),
    ),
    _prompts("utf16.txt", _TWO.encode("utf-16"), "is not UTF-8 text"),
    _prompts("latin1.txt", "ein grüner Ring\n".encode("latin-1"), "is not UTF-8 text (byte 6)"),
    _prompts("image.txt", image(0).tobytes(), "is not UTF-8 text"),
    _prompts("broken.jsonl", '{"prompt": "a"\n', "line 1: not JSON"),
    _prompts("array.jsonl", '["a"]\n', 'expected an object with a string "prompt"'),
    _prompts("no-prompt.jsonl", _line(text="a"), 'expected an object with a string "prompt"'),
    _prompts("number.jsonl", _line(prompt=3), 'expected an object with a string "prompt"'),
    _prompts("blank.jsonl", _line(prompt="  "), "line 1: the prompt is blank"),
    _prompts("deep.jsonl", '{"prompt": "a", "x": ' + "[" * 100_000 + "\n", "line 1: JSON nested too deeply"),
    _prompts("digits.jsonl", '{"prompt": "a", "x": ' + "9" * 5000 + "}\n", "line 1: a number has thousands of digits"),
    _prompts("surrogate.jsonl", '{"prompt": "a \\ud800"}\n', "line 1: holds half a character"),
    _prompts("text-in.jsonl", _TWO, "line 1: not JSON"),
    _prompts("uncovered.txt", "a prompt that nobody drew\n", "has no references in"),
    _prompts(
        "held-out-too.txt", lambda bench: "\n".join(bench.world.prompts + bench.world.held_out), "shares 2 prompts"
    ),
    _prompts("unquoted.txt", _TWO, "no text in double quotes", flags=("--rewards.ocr.weight", "1")),
    Case(
        _PROMPTS,
        "cats.txt",
        ("rewards.rule", "judges the tiny world's drawings only"),
        lambda b: b.train("--data.prompts", b.write("cats.txt", "a cat\n"), "--rewards.rule.weight", "1"),
    ),
]


def _png(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def _spoilt(name: str, content: Content | Callable[[], Content], *expect: str, file: str = "0-0.png", **more) -> Case:
    """One of the good references replaced."""

    def make(bench: Bench) -> list[str]:
        folder = bench.references()
        data = content() if callable(content) else content
        (folder / file).write_bytes(data.encode() if isinstance(data, str) else data)
        return bench.train("--data.references", str(folder), *more.get("flags", ()))

    return Case(_IMAGES, name, ("0-0.png", *expect), make)


def _of_mode(mode: str) -> bytes:
    return _png(image(0).convert(mode)) if mode != "CMYK" else _png(image(0).convert(mode), "JPEG")


def _sixteen_bit() -> bytes:
    return _png(Image.fromarray(np.full((SIDE, SIDE), 30_000, np.uint16)))


def _enormous() -> bytes:
    """A PNG whose header promises 100,000 x 100,000 pixels."""
    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def _animated() -> bytes:
    return _png(image(0), save_all=True, append_images=[image(1)], duration=100)


def _transparent_colour() -> bytes:
    return _png(image(0), transparency=(1, 2, 3))


def _without(bench: Bench) -> list[str]:
    folder = bench.references()
    (folder / "0-1.png").unlink()
    return bench.train("--data.references", str(folder))


def _replaced_by(kind: str) -> Callable[[Bench], list[str]]:
    def make(bench: Bench) -> list[str]:
        folder = bench.references()
        (folder / "0-0.png").unlink()
        if kind == "folder":
            (folder / "0-0.png").mkdir()
        elif kind == "pipe":
            os.mkfifo(folder / "0-0.png")
        else:
            (folder / "0-0.png").symlink_to("/dev/zero")
        return bench.train("--data.references", str(folder))

    return make


def _no_index(bench: Bench) -> list[str]:
    folder = bench.references()
    (folder / "references.json").unlink()
    return bench.train("--data.references", str(folder))


def _indexed(name: str, entries: object, *expect: str) -> Case:
    return Case(_IMAGES, f"index: {name}", ("references.json", *expect), lambda bench: bench.index(entries))


def _own(bench: Bench, names: object) -> dict:
    """The good index but for the first prompt's entry."""
    return {**json.loads((bench.world.references / "references.json").read_text()), bench.world.prompts[0]: names}


def _one_for_all(bench: Bench) -> list[str]:
    """Under two names, as copies are."""
    folder = bench.references()
    shutil.copy(folder / "0-0.png", folder / "copy.png")
    everyone = bench.world.prompts + bench.world.held_out
    index = {prompt: [("0-0.png", "copy.png")[number % 2]] for number, prompt in enumerate(everyone)}
    (folder / "references.json").write_text(json.dumps(index))
    return bench.train("--data.references", str(folder))


def _named(name: str, names: object, *expect: str) -> Case:
    """The first prompt's entry of the index."""
    return Case(_IMAGES, f"index: {name}", expect, lambda bench: bench.index(_own(bench, names)))


def _doubled(bench: Bench) -> list[str]:
    entries = json.dumps(_own(bench, ["0-0.png"]))
    return bench.index(entries[:-1] + f', {json.dumps(bench.world.prompts[0])}: ["0-1.png"]}}')


def _style(name: str, content: Content | None, *expect: str) -> Case:
    def make(bench: Bench) -> list[str]:
        if content is not None:
            bench.write(f"style/{name}", content)
        else:
            (bench.folder / "style").mkdir()
        return bench.train("--data.references=", "--data.style", str(bench.folder / "style"))

    return Case(_IMAGES, f"style: {name}", expect, make)


IMAGES = [
    flagged(_IMAGES, "--data.references nowhere", "reference folder nowhere does not exist"),
    Case(_IMAGES, "no index", ("references.json does not exist",), _no_index),
    Case(_IMAGES, "image missing", ("0-1.png", "does not exist"), _without),
    Case(_IMAGES, "image is a folder", ("0-0.png is not a regular file",), _replaced_by("folder")),
    Case(_IMAGES, "image is a pipe", ("0-0.png is not a regular file",), _replaced_by("pipe")),
    Case(_IMAGES, "image is a device", ("0-0.png is not a regular file",), _replaced_by("device")),
    _spoilt("empty", b"", _FOREIGN),
    _spoilt("truncated", lambda: _png(image(0))[:-60], "is unreadable or truncated (image file is truncated"),
    _spoilt("text", "this is no image", _FOREIGN),
    _spoilt("html", "<html><img src=x></html>", _FOREIGN),
    _spoilt("svg", '<svg xmlns="http://www.w3.org/2000/svg" width="32" height="32"/>', _FOREIGN),
    _spoilt("eps", "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\nshowpage\n", _FOREIGN),
    _spoilt("gif", lambda: _png(image(0), "GIF"), _FOREIGN),
    _spoilt("tiff", lambda: _png(image(0), "TIFF"), _FOREIGN),
    _spoilt("bmp", lambda: _png(image(0), "BMP"), _FOREIGN),
    _spoilt("git-lfs pointer", "version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 1\n", _FOREIGN),
    _spoilt("RGBA", lambda: _of_mode("RGBA"), "mode RGBA", "advgrpo.references import"),
    _spoilt("palette", lambda: _of_mode("P"), "mode P"),
    _spoilt("grey", lambda: _of_mode("L"), "mode L"),
    _spoilt("one bit", lambda: _of_mode("1"), "mode 1"),
    _spoilt("CMYK", lambda: _of_mode("CMYK"), "mode CMYK"),
    _spoilt("16 bit", _sixteen_bit, "mode I;16"),
    _spoilt("transparent colour", _transparent_colour, "transparent"),
    _spoilt("animated", _animated, "is animated"),
    _spoilt("enormous", _enormous, "pixels"),
    _spoilt("too small", lambda: _png(image(0, (8, 8))), "at least 16"),
    _spoilt("panorama", lambda: _png(image(0, (400, 32))), "not square"),
    _spoilt("3:2", lambda: _png(image(0, (48, 32))), "not square"),
    _indexed("list", [], "holds a list"),
    _indexed("not JSON", "{", "not JSON"),
    _indexed("deep", '{"a": ' + "[" * 100_000, "nested too deeply"),
    _indexed("digits", '{"a": ' + "9" * 5000 + "}", "thousands of digits"),
    _indexed("empty", {}, "has no references in"),
    _named("text instead of a list", "0-0.png", "must be a list of file names"),
    _named("numbers", [1], "must be a list of file names"),
    _named("no files", [], "has no references in"),
    _named("outside", ["../secret.png"], "must be a path inside"),
    _named("absolute", ["/etc/passwd"], "must be a path inside"),
    _named("unknown file", ["nope.png"], "nope.png", "does not exist"),
    Case(_IMAGES, "one image for all prompts", ("data.references = ", "all 3 training prompts have one and the same image, 0-0.png"), _one_for_all),
    Case(_IMAGES, "index: prompt twice", ("appears twice",), _doubled),
    flagged(_IMAGES, "--data.references= --data.style nowhere", "data.style = 'nowhere' is not a folder"),
    flagged(_IMAGES, "--data.references= --data.style tiny:outlines", "did you mean 'outline'?"),
    _style("empty", None, "holds no image"),
    _style("x.png", "no image", "x.png"),
]  # fmt: skip

CASES = [*PROMPT_FILES, *IMAGES]
