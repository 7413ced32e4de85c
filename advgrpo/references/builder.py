"""Draw a reference set with a text-to-image model: resumable, sharded, and the same images every time.

Image k of a prompt is drawn from noise seeded by (seed, prompt, k), in batches that depend on nothing but the
recipe: which process draws it, after how many interruptions and beside which other prompts makes no difference.
Every PNG carries a stamp (recipe, prompt, k, hash of its pixels), so a resumed run knows a finished image from a
damaged one without any state beside the images. The process that finishes last writes

    references.json    {prompt: [files]}, what `ReferenceSet` reads
    manifest.json      the recipe, library versions, and seed and SHA-256 of every file
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin

from advgrpo.data.references import read_index
from advgrpo.errors import UserError
from advgrpo.runtime.atomic import Content, write_atomically
from advgrpo.runtime.rng import derive_seed

INDEX, MANIFEST = "references.json", "manifest.json"
_STAMP = "advgrpo"  # key of the PNG text chunk

Draw = Callable[[str, list[int]], np.ndarray]
"""(prompt, seeds of n images) -> float [n, H, W, 3] in [0, 1]."""


@dataclass(frozen=True)
class Recipe:
    """Everything an image depends on beside its prompt and number; two sets with one recipe are one set."""

    model: str
    model_fingerprint: str
    pipeline: str  # class name
    seed: int
    batch_size: int  # images of a prompt drawn together; other batch shapes round differently
    dtype: str
    arguments: dict[str, Any] = field(default_factory=dict)  # of the pipeline call

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Shard:
    """Process `index` of `count`; it draws prompts index, index + count, ..."""

    index: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Shard:
        """From "i/n" with i in 0 ... n-1; "" reads torchrun's RANK and WORLD_SIZE.

        Raises:
            UserError: anything else.
        """
        source = f"--shard {text}"
        if not text:
            text = f"{os.environ.get('RANK', '0')}/{os.environ.get('WORLD_SIZE', '1')}"
            source = f"RANK/WORLD_SIZE = {text}"
        index, slash, count = text.partition("/")
        if not (slash and index.isdecimal() and count.isdecimal() and int(index) < int(count)):
            raise UserError(f"{source}: want i/n with i from 0 to n-1, such as 0/4")
        return cls(int(index), int(count))


@dataclass
class Built:
    """What one call of `ReferenceBuilder.build` did."""

    drawn: int = 0
    kept: int = 0  # finished earlier and verified
    redrawn: list[str] = field(default_factory=list)  # files of an earlier run that were damaged
    missing: int = 0  # images of other shards that are not there yet; the index is written when it is 0


def image_name(prompt: str, number: int) -> str:
    """File name of image `number` of `prompt`; it depends on nothing else, so prompt files may change order."""
    return f"{hashlib.sha256(prompt.encode()).hexdigest()[:16]}-{number:02d}.png"


def image_seed(seed: int, prompt: str, number: int) -> int:
    """63-bit seed of the noise of image `number` of `prompt`."""
    prompt_key = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8], "little")
    return derive_seed(seed, "reference", prompt_key, number)


class ReferenceBuilder:
    """Draws what is missing in `out`.

    Args:
        out: folder of the set, made if it does not exist.
        recipe: what `draw` stands for.
        per_prompt: images per prompt.

    Raises:
        UserError: `out` is no folder or holds a set of another recipe.
    """

    def __init__(self, out: Path, recipe: Recipe, draw: Draw, *, per_prompt: int) -> None:
        self.out, self.recipe, self.draw, self.per_prompt = out, recipe, draw, per_prompt
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out {out}: cannot be made a folder ({error.strerror})") from None
        self._check_recipe()

    def build(self, prompts: list[str], shard: Shard | None = None, report: Callable[[str], None] = print) -> Built:
        """Draw the images of this shard that are not finished; write index and manifest when no shard's are missing.

        Args:
            prompts: all prompts of the set, those of other shards included.
            report: takes a line of progress per prompt that had work.

        Raises:
            UserError: the folder cannot be written, or an image came out in a single colour (a safety checker, as a
                rule); the message names the prompts, all other images are finished.
            RuntimeError: the model returned what is no image; names the prompt.
        """
        shard = shard or Shard()
        mine = prompts[shard.index :: shard.count]
        built, blank, started = Built(), [], time.monotonic()
        for position, prompt in enumerate(mine, start=1):
            drawn = built.drawn
            if not self._build_prompt(prompt, built):
                blank.append(prompt)
            if built.drawn > drawn:
                pace = (time.monotonic() - started) / built.drawn
                left = pace * self.per_prompt * (len(mine) - position)
                report(f"{position}/{len(mine)} prompts, {pace:.2f} s an image, about {left / 60:.0f} min left")
        if blank:
            raise UserError(
                f"{len(blank)} prompts have images in a single colour, as safety checkers return them, the first "
                f"{blank[0]!r}; change these prompts or --seed. All other images are finished"
            )
        built.missing = self._finish(prompts)
        return built

    def _build_prompt(self, prompt: str, built: Built) -> bool:
        """False if an image came out blank and was not kept."""
        fine = True
        for first in range(0, self.per_prompt, self.recipe.batch_size):
            numbers = range(first, min(first + self.recipe.batch_size, self.per_prompt))
            states = {number: self._state(prompt, number) for number in numbers}
            missing = [number for number, state in states.items() if state != "finished"]
            built.kept += len(numbers) - len(missing)
            built.redrawn += [image_name(prompt, n) for n, state in states.items() if state == "damaged"]
            if not missing:
                continue
            # The whole batch even where some of it is finished: fewer rows would round differently.
            pixels = self._drawn(prompt, [image_seed(self.recipe.seed, prompt, n) for n in numbers])
            for number in missing:
                image = pixels[number - first]
                if (image == image[0, 0]).all():
                    fine = False
                    continue
                self._write(self._path(prompt, number), image, prompt, number)
                built.drawn += 1
        return fine

    def _drawn(self, prompt: str, seeds: list[int]) -> np.ndarray:
        """uint8 [n, H, W, 3]."""
        images = np.asarray(self.draw(prompt, seeds), dtype=np.float32)
        if images.ndim != 4 or images.shape[0] != len(seeds) or images.shape[3] != 3:
            raise RuntimeError(f"prompt {prompt!r}: want {len(seeds)} images [H, W, 3], got {list(images.shape)}")
        if not np.isfinite(images).all():
            raise RuntimeError(f"prompt {prompt!r}: the model returned an image that is not finite; try another dtype")
        return (images.clip(0, 1) * 255).round().astype(np.uint8)

    def _path(self, prompt: str, number: int) -> Path:
        return self.out / image_name(prompt, number)

    def _stamp(self, prompt: str, number: int, pixels: np.ndarray) -> dict[str, Any]:
        content = hashlib.sha256(str(pixels.shape).encode() + pixels.tobytes()).hexdigest()
        return {"recipe": self.recipe.fingerprint, "prompt": prompt, "number": number, "pixels": content}

    def _state(self, prompt: str, number: int) -> str:
        """ "finished", "damaged" or "missing"; UserError for a sound image of another recipe."""
        path = self._path(prompt, number)
        try:
            with Image.open(path, formats=["PNG"]) as image:
                pixels = np.array(image)
                stamp = json.loads(image.text[_STAMP])
        except FileNotFoundError:
            return "missing"
        except Exception:  # decoders raise OSError, SyntaxError, ValueError, KeyError, EOFError, struct.error, ...
            return "damaged"
        expected = self._stamp(prompt, number, pixels)
        if stamp == expected:
            return "finished"
        if isinstance(stamp, dict) and {**stamp, "recipe": expected["recipe"]} == expected:
            raise UserError(f"--out {self.out}: {path.name} was drawn with other settings; use another folder")
        return "damaged"

    def _write(self, path: Path, pixels: np.ndarray, prompt: str, number: int) -> None:
        notes = PngImagePlugin.PngInfo()
        notes.add_itxt(_STAMP, json.dumps(self._stamp(prompt, number, pixels)))
        write_output(path, lambda file: Image.fromarray(pixels).save(file, "PNG", pnginfo=notes))

    def _check_recipe(self) -> None:
        manifest = self._read_manifest()
        if manifest is None:
            if (self.out / INDEX).exists():
                raise UserError(f"--out {self.out}: holds a {INDEX} that was not made here; use another folder")
            return
        here, there = asdict(self.recipe), manifest["recipe"]
        for key in here:
            if here[key] != there.get(key):
                raise UserError(
                    f"--out {self.out}: its images were drawn with {key} = {there.get(key)!r}, not {here[key]!r}; "
                    "use another folder, or the same settings to continue"
                )

    def _read_manifest(self) -> dict[str, Any] | None:
        path = self.out / MANIFEST
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            return {"recipe": dict(manifest["recipe"]), "images": dict(manifest["images"])}
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is not a manifest ({error!r}); remove it to have it written again") from None

    def _finish(self, prompts: list[str]) -> int:
        """Write index and manifest; the number of images that are not there yet if some are not."""
        files = {prompt: [self._path(prompt, n) for n in range(self.per_prompt)] for prompt in prompts}
        missing = sum(not path.exists() for paths in files.values() for path in paths)
        if missing:
            return missing
        earlier = self._read_manifest() or {"images": {}}
        images = earlier["images"]  # prompts of earlier runs into this folder stay in the set
        for prompt, paths in files.items():
            for number, path in enumerate(paths):
                digest = hashlib.sha256(path.read_bytes()).hexdigest()
                seed = image_seed(self.recipe.seed, prompt, number)
                images[path.name] = {"prompt": prompt, "number": number, "seed": seed, "sha256": digest}
        index = read_index(self.out / INDEX) if (self.out / INDEX).exists() else {}
        index |= {prompt: [path.name for path in paths] for prompt, paths in files.items()}
        listed = {name for names in index.values() for name in names}
        manifest = {
            "format": 1,
            "recipe": asdict(self.recipe),
            "versions": library_versions(),
            "images": {name: entry for name, entry in images.items() if name in listed},
        }
        # The manifest first: a kill in between leaves a folder that this run can finish, not one it must refuse.
        for name, content in ((MANIFEST, manifest), (INDEX, index)):
            write_output(self.out / name, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        for leftover in self.out.glob(".*.png.*"):  # of killed processes; nobody writes images any more
            leftover.unlink(missing_ok=True)
        return 0


def write_output(path: Path, content: Content) -> None:
    """`write_atomically` of a file of --out; UserError where it cannot be written."""
    try:
        write_atomically(path, content)
    except OSError as error:
        raise UserError(f"--out {path.parent}: cannot write {path.name} ({error}); finished images are kept") from None


def library_versions() -> dict[str, str]:
    """Of Python and what the images depend on."""
    versions = {"python": platform.python_version()}
    for package in ("advgrpo", "torch", "diffusers", "transformers", "pillow"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:  # a checkout used through PYTHONPATH
            versions[package] = "not installed"
    return versions
