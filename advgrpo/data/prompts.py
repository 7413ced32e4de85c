"""Prompt files, and which prompts an iteration trains on."""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from advgrpo.data.record_source import parse_source
from advgrpo.data.records import read_prompts
from advgrpo.errors import UserError
from advgrpo.runtime.reading import parse_json, read_text


@dataclass(frozen=True)
class Prompt:
    """One prompt with whatever its reward needs to know about it (such as GenEval's objects)."""

    text: str
    metadata: dict[str, Any] = field(default_factory=dict)


def load_prompts(path: str | Path) -> list[Prompt]:
    """Read prompts: `.txt` with one per line, `.jsonl` with `{"prompt": ..., **metadata}` per line, or what
    `parse_source` names (parquet, webdataset shards, a folder with metadata.jsonl, a data set of the hub).

    Surrounding white space is removed; empty lines at the end of the file are ignored. A prompt that several records
    share, as images of one prompt do, is taken once; in a text file, where it can only be a slip, it is an error.

    Returns:
        The prompts in the order of the file, all different and none blank.

    Raises:
        UserError: missing or empty file, unknown suffix, text that is not UTF-8, or a line (named by its number), row
            or member that is blank, or not text; in a text file also one that repeats an earlier prompt.
    """
    source = parse_source(path)
    if source is not None:
        return [Prompt(text) for text in dict.fromkeys(read_prompts(source))]
    path = Path(path)
    parse = {".txt": _parse_text, ".jsonl": _parse_json}.get(path.suffix)
    if parse is None:
        raise UserError(
            f"prompt file {path}: suffix {path.suffix!r} is unknown; use .txt (a prompt per line), .jsonl, .parquet, "
            ".tar, a folder with metadata.jsonl, or hf:OWNER/NAME"
        )
    prompts, first_seen = [], {}
    for number, line in enumerate(_read_lines(path), start=1):
        where = f"{path}, line {number}"
        prompt = parse(line.strip(), where)
        if not prompt.text:
            raise UserError(f"{where}: the prompt is blank; remove the line or write a prompt there")
        if prompt.text in first_seen:
            raise UserError(
                f"{where}: prompt {prompt.text!r} repeats line {first_seen[prompt.text]}; remove one of them"
            )
        first_seen[prompt.text] = number
        prompts.append(prompt)
    return prompts


def _read_lines(path: Path) -> list[str]:
    text = read_text(path, "prompt file", "pass a .txt file with one prompt per line").rstrip()
    if not text:
        raise UserError(f"prompt file {path} is empty; write one prompt per line")
    # Not splitlines(): it also breaks at U+2028 and form feeds, which may stand inside a prompt.
    return text.split("\n")


def _parse_text(line: str, where: str) -> Prompt:
    return Prompt(line)


def _parse_json(line: str, where: str) -> Prompt:
    if not line:
        return Prompt("")
    record = parse_json(line, where, "write one object per line")
    text = record.get("prompt") if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise UserError(f'{where}: expected an object with a string "prompt", got {line[:80]!r}')
    return Prompt(text.strip(), {key: value for key, value in record.items() if key != "prompt"})


class GroupSampler:
    """Which prompts every iteration trains on: a new seeded permutation of all of them per epoch, without replacement.

    A pure function of (seed, iteration): resuming needs the iteration's number and nothing else, and every rank
    computes the same answer. An iteration that crosses the end of an epoch (or is longer than one) can hold a prompt
    twice, so groups are told apart by their position in the returned list, not by the prompt's index. A run whose
    iterations are longer than an epoch says so (`Sources.notes`).

    Raises:
        UserError: no prompts, or fewer than one prompt per iteration.
    """

    def __init__(self, num_prompts: int, prompts_per_iteration: int, seed: int) -> None:
        for name, value in (("num_prompts", num_prompts), ("prompts_per_iteration", prompts_per_iteration)):
            if value < 1:
                raise UserError(f"{name}={value} must be at least 1")
        self.num_prompts = num_prompts
        self.prompts_per_iteration = prompts_per_iteration
        self.seed = seed
        self._epoch: tuple[int, list[int]] | None = None  # the last permutation used; only saves recomputing it

    def next(self, iteration: int) -> list[int]:
        """Indices into the prompt list for `iteration` (from 0): `prompts_per_iteration` of them."""
        if iteration < 0:
            raise ValueError(f"iteration={iteration} must not be negative")
        start = iteration * self.prompts_per_iteration
        positions = (divmod(start + i, self.num_prompts) for i in range(self.prompts_per_iteration))
        return [self._permutation(epoch)[offset] for epoch, offset in positions]

    def _permutation(self, epoch: int) -> list[int]:
        if self._epoch is None or self._epoch[0] != epoch:
            digest = hashlib.sha256(f"prompt order/{self.seed}/{epoch}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
            self._epoch = epoch, torch.randperm(self.num_prompts, generator=generator).tolist()
        return self._epoch[1]
