"""Prompts that a model does not read to their end: text encoders take so many tokens and drop the rest in silence."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")
_JUDGED = ("CLIP", "T5")  # of other families nobody knows from their files where a pipeline cuts
_QWEN_IMAGE = "QwenImagePipeline"  # its text is the prompt inside a template, cut at max_sequence_length
_SHOWN = 60  # characters of a prompt, and of what it loses


@dataclass(frozen=True)
class CutPrompts:
    """What the tokenizers of a pipeline with one limit do to a list of prompts; at least one is cut."""

    tokenizers: tuple[str, ...]  # folders in the pipeline
    kind: str  # their class, such as CLIPTokenizer
    limit: int  # tokens, those for beginning and end included
    prompts: tuple[str, ...]  # that are longer
    lost: str  # the end of the first of them that is not read

    def describe(self, total: int) -> str:
        """One line for people."""
        first = self.prompts[0]
        shown = repr(first if len(first) <= _SHOWN else first[:_SHOWN] + "…")
        lost = repr(self.lost if len(self.lost) <= _SHOWN else self.lost[:_SHOWN] + "…")
        return (
            f"{len(self.prompts)} of {total} prompts are longer than the {self.limit} tokens of {self.kind} "
            f"({', '.join(self.tokenizers)}), which does not read the rest; the first, {shown}, loses {lost}"
        )


def cut_prompts(pipeline: Path, prompts: Sequence[str], max_sequence_length: int) -> list[CutPrompts]:
    """Which prompts the tokenizers of a diffusers pipeline cut, by tokenizer; loads no model.

    Args:
        pipeline: folder with model_index.json.
        max_sequence_length: tokens of a T5, or of Qwen-Image's prompt and the template's end; CLIPs have their own
            limit. Other tokenizers are not looked at.
    """
    index = json.loads((pipeline / "model_index.json").read_text(encoding="utf-8"))
    found: dict[tuple[str, int, tuple[str, ...], str], list[str]] = {}
    for part in TOKENIZERS:
        library, kind = index.get(part) or (None, "")
        encoder, _ = index.get(part.replace("tokenizer", "text_encoder")) or (None, "")
        qwen = index.get("_class_name") == _QWEN_IMAGE
        if library is None or encoder is None or not prompts or not (qwen or kind.startswith(_JUDGED)):
            continue
        tokenizer = _load(pipeline / part, kind)
        limit = tokenizer.model_max_length if kind.startswith("CLIP") else max_sequence_length
        ids = tokenizer(list(prompts), truncation=False, padding=False)["input_ids"]
        cut = [number for number, tokens in enumerate(ids) if len(tokens) > limit]
        if cut:
            # The last place that is read holds the token that ends the text; Qwen's tokenizer adds none.
            lost = tokenizer.decode(ids[cut[0]][limit - (not qwen) :], skip_special_tokens=True).strip()
            key = kind, limit, tuple(prompts[number] for number in cut), lost
            found.setdefault(key, []).append(part)
    return [CutPrompts(tuple(parts), *key) for key, parts in found.items()]


def _load(folder: Path, kind: str):
    import transformers

    return getattr(transformers, kind).from_pretrained(folder)
