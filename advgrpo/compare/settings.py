"""The flags of `python -m advgrpo.compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from advgrpo.config import MOST_PER_PROMPT, Options, Positional
from advgrpo.sampling.drawing import DrawOptions


class Compare(DrawOptions):
    """Draw all sides on the same noise and write the page on which people vote."""

    sides: Annotated[tuple[str, ...], Positional] = ()
    """Two or more of: "tiny", a pipeline's folder or hub id, a run's folder, a LoRA's folder, a folder of pictures with
    references.json. A LoRA's folder is drawn on --model, a run on the model that it trained."""
    prompts: Path
    """Prompt file: one a line, or JSONL with a `prompt` key."""
    out: Path
    """Folder for index.html, comparison.json (which side is which) and the pictures, which are not drawn twice."""
    names: tuple[str, ...] = ()
    """What the report calls the sides, in their order; by default, what was given. The page never names them."""
    title: Annotated[str, Field(min_length=1, max_length=120)] = "Which picture is better?"
    """Heading of the page; it should not say what is compared."""
    images_per_prompt: Annotated[int, Field(ge=1, le=MOST_PER_PROMPT)] = 1
    """Pictures of every prompt, each compared."""
    pairs_per_rater: Annotated[int, Field(ge=0, le=100_000)] = 0
    """Pairs that a rater is shown beside the attention checks, chosen anew for each; 0 means all."""
    checks: Annotated[int, Field(ge=0, le=100)] = 4
    """Attention checks hidden among the pairs: in turn the same picture twice, and one destroyed by noise."""
    encoding: Literal["png", "webp"] = "png"
    """How pictures stand in the page: exactly, or at a quarter of the size in WebP of quality 95."""
    batch_size: Annotated[int, Field(ge=1, le=1024)] = 1
    """Pictures of a prompt drawn at once; part of what a picture depends on, since other shapes round differently."""
    seed: Annotated[int, Field(ge=0, lt=2**62)] = 0
    """Keys the noise, the order of pairs and which picture stands left."""


class Serve(Options):
    """Show a comparison's page and append its votes to votes.jsonl."""

    folder: Annotated[Path, Positional]
    """What `--out` was."""
    host: Annotated[str, Field(min_length=1)] = "127.0.0.1"
    """Address to listen on."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """Port to listen on; 0 takes a free one."""
    allow_hosts: tuple[str, ...] = ()
    """Names that browsers may call this server by, beside --host, addresses, localhost and this machine's name."""


class Report(Options):
    """Win rates, strengths and agreement of a comparison's votes."""

    paths: Annotated[tuple[Path, ...], Positional] = ()
    """The comparison's folder, then files of votes that were downloaded, beside its own votes.jsonl."""
    pass_share: Annotated[float, Field(ge=0, le=1)] = 0.75
    """Attention checks that a rater must pass, of those answered; who passes fewer is left out."""
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.95
    """Coverage of the intervals."""
    resamples: Annotated[int, Field(ge=100, le=100_000)] = 2000
    """Bootstrap resamples of raters and prompts."""
    seed: Annotated[int, Field(ge=0, lt=2**62)] = 0
    """Keys the resampling."""
