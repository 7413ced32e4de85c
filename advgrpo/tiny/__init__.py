"""The embedded worlds: tiny SD3 pipelines, a tiny DINOv2 and references, shipped with the package.

"tiny" draws shapes and is the default everywhere; "tiny:words" draws short words, for text rendering (`words.py`).

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
    """A shipped SD3 pipeline of 32-pixel images, its prompts and their references."""

    pipeline: Path
    prompts: Path
    held_out_prompts: Path
    references: Path
    max_sequence_length: int  # tokens of its T5

    @classmethod
    def of(cls, folder: Path, max_sequence_length: int) -> World:
        lists = (folder / "prompts.txt", folder / "held_out_prompts.txt")
        return cls(folder / "pipeline", *lists, folder / "references", max_sequence_length)


# by the name that stands for them in model.path, data.prompts, data.held_out_prompts and data.references
WORLDS = {"tiny": World.of(_ASSETS, 12), "tiny:words": World.of(_ASSETS / "words", 16)}


def pipeline_dir() -> Path:
    """Folder of the tiny SD3 pipeline in diffusers format."""
    return WORLDS["tiny"].pipeline


def backbone_dir() -> Path:
    """Folder of the tiny Dinov2Model."""
    return _ASSETS / "backbone"


def preference_dir() -> Path:
    """Folder of the tiny preference model, a CLIPModel in PickScore's layout that over-rates strong colours."""
    return _ASSETS / "preference"


def reference_dir() -> Path:
    """Folder of crisp reference images with references.json: {prompt: [files]} for all prompt lists."""
    return WORLDS["tiny"].references


def style_names() -> list[str]:
    """The shipped styles, each a folder of images without prompts."""
    return sorted(folder.name for folder in (_ASSETS / "styles").iterdir())


def style_dir(name: str) -> Path:
    """Folder of the style's 300 images; UserError naming the nearest style for an unknown one."""
    known = style_names()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
        raise UserError(f"unknown style of the tiny world {name!r}; {hint}")
    return _ASSETS / "styles" / name


def prompts_file() -> Path:
    """Training prompts, one per line."""
    return WORLDS["tiny"].prompts


def held_out_prompts_file() -> Path:
    """Evaluation prompts, one per line: combinations that are not among the training prompts."""
    return WORLDS["tiny"].held_out_prompts


def report_prompts_file() -> Path:
    """Prompts of reported results, one per line: in neither other list, so nothing was chosen while looking at them."""
    return _ASSETS / "report_prompts.txt"
