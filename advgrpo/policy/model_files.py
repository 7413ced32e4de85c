"""What a model's files say before any weight is read: their JSON, and the names and shapes in safetensors' headers.

Only local folders are looked at; a hub id is checked when it has been downloaded, which is when it is loaded.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from advgrpo.errors import UserError

Shapes = dict[str, tuple[int, ...]]
_LFS = b"version https://git-lfs"
_MOST_HEADER = 100_000_000  # bytes; safetensors' own limit
_BITS = {"BOOL": 8, "F64": 64, "I64": 64, "U64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16}
_BITS |= {"I16": 16, "U16": 16, "I8": 8, "U8": 8, "F8_E4M3": 8, "F8_E5M2": 8}
DIFFUSERS_STEM, TRANSFORMERS_STEM = "diffusion_pytorch_model", "model"  # of the names of files with weights
_STEMS = {"transformers": TRANSFORMERS_STEM}  # by the library that a part is of; of others it is diffusers'
# STEM.safetensors and STEM.safetensors.index.json, of a variant STEM.VARIANT.safetensors and
# STEM.safetensors.index.VARIANT.json; no shard.
_WEIGHTS = re.compile(
    r"(?P<stem>[^.]+)(\.(?![^.]+-\d{5}-of-\d{5}\.)(?P<whole>[^.]+))?\.safetensors(\.index(\.(?P<index>[^.]+))?\.json)?"
)
_TOKENIZERS = ("tokenizer.json", "vocab.json", "spiece.model", "tokenizer.model", "vocab.txt")


def local_folder(path: str) -> Path | None:
    """The folder that `path` names; None for what may be a hub id."""
    folder = Path(path).expanduser()
    return folder if folder.is_dir() else None


def read_json(file: Path, source: str) -> dict[str, Any]:
    """A JSON object; UserError naming `source` (such as "model.path = 'x'") and the file for anything else."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{source}: {file} is missing; complete the folder, or download the model again") from None
    except (OSError, UnicodeDecodeError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        hint = "a git-lfs pointer; run `git lfs pull`" if _is_pointer(file) else f"not JSON ({reason})"
        raise UserError(f"{source}: {file} is {hint}; download the model again") from None
    if not isinstance(content, dict):
        raise UserError(f"{source}: {file} holds a {type(content).__name__}, not an object; download the model again")
    return content


def weight_variant(parts: Iterable[tuple[Path, str]], source: str) -> str | None:
    """What diffusers and transformers call the `variant` of a model's weights, such as fp16; None for the plain files.

    Plain files are taken where they are, as by these libraries. Where a part has none, the variant that all such parts
    have is the model's: the parts that have it are read by it, the others by their plain files.

    Args:
        parts: (folder, stem of the file's name) of each that has weights.

    Raises:
        UserError: the parts without plain files have no variant in common, or several.
    """
    only = {folder: held for folder, stem in parts if (held := _variants(folder, stem)) and "" not in held}
    if not only:
        return None
    common = set.intersection(*only.values())
    if len(common) == 1:
        return common.pop()
    found = "; ".join(f"{folder} has {', '.join(sorted(held))}" for folder, held in only.items())
    raise UserError(
        f"{source}: its weights are there as variants alone, and not as one that can be chosen ({found}); leave one "
        "variant in the folder, or add the plain files"
    )


def of_variant(folder: Path, stem: str, variant: str | None) -> str | None:
    """`variant` where this part's weights are there as that; None: they are read by their plain files."""
    return variant if variant in _variants(folder, stem) else None


def pipeline_variant(folder: Path, source: str) -> str | None:
    """`weight_variant` of a pipeline's folder, for `DiffusionPipeline.from_pretrained`."""
    index = read_json(folder / "model_index.json", source)
    return weight_variant(((folder / name, stem) for name, _, stem in _parts(index, source) if stem), source)


def _variants(folder: Path, stem: str) -> set[str]:
    """Those that a part's weights are there as, whole or in shards; "" is the plain files'."""
    found = (_WEIGHTS.fullmatch(file.name) for file in (folder.iterdir() if folder.is_dir() else ()))
    return {each["whole"] or each["index"] or "" for each in found if each and each["stem"] == stem}


def weight_shapes(folder: Path, stem: str, source: str, variant: str | None = None) -> Shapes:
    """Shape of every tensor of STEM.safetensors, or of the shards that STEM.safetensors.index.json lists; of a variant
    of STEM.VARIANT.safetensors or STEM.safetensors.index.VARIANT.json.

    Raises:
        UserError: naming the file: there are no weights, or only pickled ones, which run what code they hold; a shard
            is missing, a git-lfs pointer, or a file that is not whole.
    """
    own = f".{variant}" if variant else ""
    single, index = folder / f"{stem}{own}.safetensors", folder / f"{stem}.safetensors.index{own}.json"
    if single.exists():
        return _header(single, source)
    if index.exists():
        listed = read_json(index, source).get("weight_map")
        if not isinstance(listed, dict):
            raise UserError(f"{source}: {index} has no weight_map; download the model again")
        shapes: Shapes = {}
        for shard in sorted(set(map(str, listed.values()))):
            shapes |= _header(folder / shard, source)
        return shapes
    pickled = sorted(file.name for pattern in ("*.bin", "*.ckpt", "*.pt") for file in folder.glob(pattern))
    if pickled:
        raise UserError(
            f"{source}: {folder} has its weights in {pickled[0]} only, a pickle, which may run any code when it is "
            "loaded; take the model's safetensors version, or save it as one with save_pretrained"
        )
    others = sorted(file.name for file in folder.glob("*.safetensors"))
    found = f"; it holds {', '.join(others)}" if others else ""
    raise UserError(f"{source}: {single} is missing{found}; complete the folder, or download the model again")


def _header(file: Path, source: str) -> Shapes:
    """Names and shapes of a safetensors file, whose size must be what its header says."""
    if not file.is_file():
        raise UserError(f"{source}: {file} is missing; complete the folder, or download the model again")
    if _is_pointer(file):
        raise UserError(f"{source}: {file} is a git-lfs pointer, not weights; run `git lfs pull`")
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length)) if length <= min(size, _MOST_HEADER) else None
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        shapes = {name: tuple(entry["shape"]) for name, entry in entries.items()}
        end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        fits = all(_fits(entry) for entry in entries.values()) and size == 8 + length + end
    except (OSError, struct.error, ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError):
        fits, shapes = False, {}
    if not fits:
        raise UserError(
            f"{source}: {file} is no whole safetensors file ({size} bytes; cut short or damaged); download it again"
        )
    return shapes


def _fits(entry: Mapping[str, Any]) -> bool:
    """Whether the entry's bytes are its shape's; types that are not known here are believed."""
    start, end = entry["data_offsets"]
    bits = _BITS.get(entry["dtype"])
    return bits is None or (end - start) * 8 == math.prod(entry["shape"]) * bits


def _is_pointer(file: Path) -> bool:
    try:
        with file.open("rb") as stream:
            return stream.read(len(_LFS)) == _LFS
    except OSError:
        return False


def check_tokenizer(folder: Path, source: str) -> None:
    """UserError unless there is a tokenizer's vocabulary, whole where it is JSON."""
    found = [folder / name for name in _TOKENIZERS if (folder / name).is_file()]
    if not found:
        raise UserError(f"{source}: {folder} has no tokenizer ({', '.join(_TOKENIZERS[:3])}); complete the folder")
    for file in found:
        if file.suffix == ".json":
            read_json(file, source)
        elif _is_pointer(file):
            raise UserError(f"{source}: {file} is a git-lfs pointer; run `git lfs pull`")


def check_pipeline(folder: Path, index: Mapping[str, Any], source: str) -> dict[str, Shapes]:
    """Every part that model_index.json lists is there and whole; shapes of the weights by part.

    Raises:
        UserError: naming the file that is missing, damaged or no JSON.
    """
    weights: dict[str, Shapes] = {}
    variant = weight_variant(((folder / name, stem) for name, _, stem in _parts(index, source) if stem), source)
    for name, kind, stem in _parts(index, source):
        part = folder / name
        if not part.is_dir():
            raise UserError(f"{source}: {part} is missing, but model_index.json lists it; download the model again")
        if "Tokenizer" in kind:
            check_tokenizer(part, source)
        elif "Scheduler" in kind:
            read_json(part / "scheduler_config.json", source)
        elif stem:
            read_json(part / "config.json", source)
            weights[name] = weight_shapes(part, stem, source, of_variant(part, stem, variant))
    return weights


def _parts(index: Mapping[str, Any], source: str) -> Iterator[tuple[str, str, str]]:
    """(name, class, stem of the files' names where it has weights, else "") of what model_index.json lists."""
    for name, entry in index.items():
        if name.startswith("_") or not isinstance(entry, list):
            continue
        if len(entry) != 2 or not all(each is None or isinstance(each, str) for each in entry):
            raise UserError(f"{source}: {name} in model_index.json is {entry!r}; want [library, class]")
        library, kind = entry
        if kind is None:
            continue
        weightless = any(word in kind for word in ("Tokenizer", "Scheduler", "Processor", "FeatureExtractor"))
        yield name, kind, "" if weightless else _STEMS.get(library, DIFFUSERS_STEM)


def check_vision_model(folder: Path, model_types: tuple[str, ...], field: str, path: str) -> dict[str, Any]:
    """config.json of a transformers model of one of these types, whose weights are there; UserError naming `field`."""
    source = f"{field} = {path!r}"
    config = read_json(folder / "config.json", source)
    kind = config.get("model_type")
    if kind not in model_types:
        raise UserError(
            f"{source} is a {kind or 'folder without a model_type in config.json'}; want a {' or '.join(model_types)}"
        )
    weight_shapes(folder, TRANSFORMERS_STEM, source)
    return config
