"""What a run reads: prompts and reference images, checked before any model is loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from advgrpo import tiny
from advgrpo.config import Config, needs_references
from advgrpo.data.prompts import Prompt, load_prompts
from advgrpo.data.references import ReferenceSet
from advgrpo.errors import UserError
from advgrpo.runtime import rng

_SHIPPED_STYLE = "tiny:"


def shipped_path(field: str, value: str) -> str:
    """The file or folder that data.`field` = `value` means: a shipped one's where "tiny" or "tiny:NAME" names it."""
    shipped = {name: getattr(world, field) for name, world in tiny.WORLDS.items()}
    if field == "held_out_prompts":
        shipped |= tiny.other_prompts()
    return str(shipped.get(value, value))


@dataclass
class Sources:
    """Training and held-out prompts, their references where the run needs any, and what a remote judge is told."""

    prompts: list[str]
    held_out: list[str]
    references: ReferenceSet | None
    metadata: dict[str, Mapping[str, Any]] | None = None

    @classmethod
    def read(
        cls,
        config: Config,
        *,
        check: Callable[[Sources], None] | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> Sources:
        """UserError naming the file, the prompt or the image that is wrong.

        Args:
            check: of the prompts, before their references are looked for: who has to draw those wants to know first
                whether a prompt can be judged. It gets sources without references.
            rank, world_size: of how many processes, which share out the images to check: see `ReferenceSet.load`.
        """
        fields = ("prompts", "held_out_prompts", "references")
        paths = {field: shipped_path(field, getattr(config.data, field)) for field in fields}
        lines = [load_prompts(paths[name]) if paths[name] else [] for name in ("prompts", "held_out_prompts")]
        prompts, held_out = ([p.text for p in part] for part in lines)
        both = set(prompts) & set(held_out)
        if both:
            raise UserError(
                f"data.held_out_prompts shares {len(both)} prompts with data.prompts, first {min(both)!r}; remove "
                "them, or evaluation measures memory"
            )
        metadata = metadata_of([*lines[0], *lines[1]])
        if check is not None:
            check(cls(prompts, held_out, None, metadata))
        references = _references(config, paths["references"], prompts + held_out, rank=rank, world_size=world_size)
        if config.data.reference_count:
            prompts = _within_budget(config, references, prompts)
        if references is not None and not config.data.style:
            _check_variety(references, prompts)
        return cls(prompts, held_out, references, metadata)

    def notes(self, config: Config) -> list[str]:
        """What training does with these prompts and images that nobody asked for, a line each."""
        branches = config.rollout.window.branches  # groups that have one prompt on purpose
        wanted, there, lines = config.rollout.prompts_per_iteration // branches, len(self.prompts), []
        if wanted > there:
            fewest, most = wanted // there, -(-wanted // there)
            times = f"{fewest}" if fewest == most else f"{fewest} or {most}"
            lines.append(
                f"rollout.prompts_per_iteration = {wanted * branches}, but there are {there} training prompts: every "
                f"iteration draws each of them {times} times, as groups of their own"
            )
        alone = [] if self.references is None else [p for p in self.prompts if len(set(self.references.files(p))) == 1]
        if alone:
            lines.append(
                f"{len(alone)} of {there} training prompts have one reference: what the adversary can learn of them is "
                f"that image; more of each are better (first: {alone[0]!r})"
            )
        return lines


def metadata_of(prompts: list[Prompt]) -> dict[str, Mapping[str, Any]] | None:
    """By prompt, those that have any; None where none has."""
    return {p.text: p.metadata for p in prompts if p.metadata} or None


def _references(config: Config, folder: str, prompts: list[str], **share: int) -> ReferenceSet | None:
    rules: dict[str, Any] = {"min_size": config.data.min_reference_size, "fit": config.data.fit, **share}
    if config.data.style:
        return ReferenceSet.shared(_style_folder(config.data.style), prompts, **rules)
    if folder:
        return ReferenceSet.load(folder, prompts, **rules)
    assert not needs_references(config)  # config.check has refused this
    return None


def _check_variety(references: ReferenceSet, prompts: list[str]) -> None:
    """UserError where several prompts have one and the same image, as a slip in making the index gives."""
    files = [set(references.files(prompt)) for prompt in prompts]
    if len(prompts) < 2 or any(len(own) > 1 for own in files):
        return
    first, *others = (file for own in files for file in own)
    if all(references.content_key(file) == references.content_key(first) for file in others):  # reads up to another one
        raise UserError(
            f"data.references = {str(references.folder)!r}: all {len(prompts)} training prompts have one and the same "
            f"image, {next(iter(files[0])).name}; give each prompt its own, or the folder as --data.style"
        )


def _style_folder(style: str) -> str | Path:
    """A folder as it is, or that of a shipped style."""
    if not style.startswith(_SHIPPED_STYLE):
        return style
    try:
        return tiny.style_dir(style.removeprefix(_SHIPPED_STYLE))
    except UserError as error:
        raise UserError(f"data.style = {style!r}: {error}") from None


def _within_budget(config: Config, references: ReferenceSet | None, prompts: list[str]) -> list[str]:
    """The prompts, in a seeded order, whose references make up data.reference_count images."""
    wanted = config.data.reference_count
    if references is None:
        raise UserError(f"data.reference_count = {wanted}: this run has no references; leave it at 0")
    order = torch.randperm(len(prompts), generator=rng.generator(config.seed, "reference_subset")).tolist()
    chosen, count = [], 0
    for number in order:
        if count >= wanted:
            break
        chosen.append(number)
        count += len(references.files(prompts[number]))
    if count < wanted:
        raise UserError(f"data.reference_count = {wanted}: the training prompts have {count} references; 0 takes all")
    return [prompts[number] for number in sorted(chosen)]
