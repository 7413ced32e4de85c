"""The embedded worlds: tiny SD3 pipelines, a tiny DINOv2 and references, shipped with the package.

"tiny" draws shapes and is the default everywhere; "tiny:words" draws short words, for text rendering (`words.py`);
"tiny:emoji" draws things in the manner of several artists and has a judge that is not ours (`emoji/`).

The paths work in stock diffusers and transformers:

    StableDiffusion3Pipeline.from_pretrained(pipeline_dir())
    Dinov2Model.from_pretrained(backbone_dir())
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path

from advgrpo.errors import UserError

_ASSETS = Path(__file__).parent / "assets"


@dataclass(frozen=True)
class World:
    """A shipped SD3 pipeline, its prompts and their references."""

    pipeline: Path
    prompts: Path
    held_out_prompts: Path
    references: Path
    max_sequence_length: int  # tokens of its T5
    image_size: int

    @classmethod
    def of(cls, folder: Path, max_sequence_length: int, image_size: int) -> World:
        lists = (folder / "prompts.txt", folder / "held_out_prompts.txt")
        return cls(folder / "pipeline", *lists, folder / "references", max_sequence_length, image_size)


# by the name that stands for them in model.path, data.prompts, data.held_out_prompts and data.references
WORLDS = {
    "tiny": World.of(_ASSETS, 12, 32),
    "tiny:words": World.of(_ASSETS / "words", 16, 32),
    "tiny:emoji": World.of(_ASSETS / "emoji", 8, 48),
}
# folders of Dinov2Models and of CLIPModels in PickScore's layout by the names that stand for them in a path
BACKBONES = {"tiny": _ASSETS / "backbone", "tiny:emoji": _ASSETS / "emoji" / "backbone"}
PREFERENCE_MODELS = {"tiny": _ASSETS / "preference", "tiny:emoji": _ASSETS / "emoji" / "preference"}


def pipeline_dir() -> Path:
    """Folder of the tiny SD3 pipeline in diffusers format."""
    return WORLDS["tiny"].pipeline


def backbone_dir() -> Path:
    """Folder of the tiny Dinov2Model."""
    return BACKBONES["tiny"]


def preference_dir() -> Path:
    """Folder of the tiny preference model, a CLIPModel in PickScore's layout that over-rates strong colours."""
    return PREFERENCE_MODELS["tiny"]


def reference_dir() -> Path:
    """Folder of crisp reference images with references.json: {prompt: [files]} for all prompt lists."""
    return WORLDS["tiny"].references


def _styles() -> dict[str, Path]:
    folders = {"": _ASSETS / "styles", "emoji:": _ASSETS / "emoji" / "styles"}
    return {f"{world}{style.name}": style for world, folder in folders.items() for style in folder.iterdir()}


def style_names() -> list[str]:
    """The shipped styles, each a folder of images without prompts; those of the emoji world begin with "emoji:"."""
    return sorted(_styles())


def style_dir(name: str) -> Path:
    """Folder of the style's 300 images; UserError naming the nearest style for an unknown one."""
    known = _styles()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(known))}"
        raise UserError(f"unknown style of the tiny world {name!r}; {hint}")
    return known[name]


def prompts_file() -> Path:
    """Training prompts, one per line."""
    return WORLDS["tiny"].prompts


def held_out_prompts_file() -> Path:
    """Evaluation prompts, one per line: combinations that are not among the training prompts."""
    return WORLDS["tiny"].held_out_prompts


def report_prompts_file() -> Path:
    """Prompts of reported results, one per line: in neither other list, so nothing was chosen while looking at them."""
    return _ASSETS / "report_prompts.txt"


def other_prompts() -> dict[str, Path]:
    """Prompt files beside the worlds' two, by the names that stand for them: in no other list.

    "tuning" is for choosing settings; "report" and "names" (of things that no other list names) are for reported
    results, so that nothing was chosen while looking at them.
    """
    files = {"tuning": "tuning_prompts", "report": "report_prompts", "names": "held_out_names"}
    emoji = {f"tiny:emoji:{name}": _ASSETS / "emoji" / f"{file}.txt" for name, file in files.items()}
    return {"tiny:report": report_prompts_file(), **emoji}
