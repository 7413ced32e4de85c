"""A bad input: how it is made, which command gets it, and what that must say."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

Content = str | bytes
DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)  # of libyaml, a third of the time
REQUIRED_SILENCE = ("Traceback", "pydantic.dev", "╭", "site-packages")


@dataclass
class World:
    """What all cases share, made once: good models, data, a run and its LoRA."""

    folder: Path
    settings: dict[str, Any]  # of a run that works
    pipeline: Path
    backbone: Path
    clip: Path
    siglip: Path
    unet: Path
    prompts: list[str]
    held_out: list[str]
    references: Path
    run: Path  # one iteration, with a checkpoint
    servers: Mapping[str, str] = field(default_factory=dict)  # behaviour -> url

    @property
    def lora(self) -> Path:
        return self.run / "lora"


@dataclass
class Bench:
    """Where one case is made."""

    world: World
    folder: Path

    def write(self, name: str, content: Content) -> str:
        """A file of the case; its path."""
        file = self.folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(file)

    def copy(self, source: Path, name: str = "") -> Path:
        """A copy of a folder that may be damaged."""
        target = self.folder / (name or source.name)
        shutil.copytree(source, target)
        return target

    def settings(self, change: Mapping[str, Any] | None = None) -> str:
        """A file of good settings with changes laid over; its path."""
        from advgrpo.config import merge

        merged = merge(self.world.settings, dict(change or {}))
        merged["output_dir"] = str(self.folder / "run")
        merged["data"] = {**merged["data"], "cache_dir": str(self.folder / "cache")}
        return self.write("good.yaml", yaml.dump(merged, Dumper=DUMPER))

    def train(self, *flags: str, change: Mapping[str, Any] | None = None) -> list[str]:
        """Arguments of a run that would train but for `flags` or `change`."""
        return ["--config", self.settings(change), *flags]

    def references(self) -> Path:
        """A copy of the good references."""
        return self.copy(self.world.references, "references")

    def index(self, entries: Any) -> list[str]:
        """A run whose references' index holds `entries`; text is written as it is."""
        folder = self.references()
        (folder / "references.json").write_text(entries if isinstance(entries, str) else json.dumps(entries))
        return self.train("--data.references", str(folder))


Make = Callable[[Bench], Sequence[str]]


@dataclass(frozen=True)
class Case:
    group: str
    name: str
    expect: tuple[str, ...]  # all of them stand in the message
    make: Make
    command: str = "train"
    loading: bool = False  # found only while models load
    code: int = 2
    findings: bool = False  # in the command's table (references check), not an error
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def id(self) -> str:
        return f"{self.group}: {self.name}"

    def judge(self, answer: Mapping[str, Any]) -> list[str]:
        """What is wrong with a command's answer; empty for one clear line in time."""
        said = answer["out"] if self.findings else answer["err"]
        wrong = [f"it says {word!r}" for word in REQUIRED_SILENCE if word in answer["out"] + answer["err"]]
        if answer["phase"] == "work":
            return [*wrong, "it went on silently"]
        if answer["code"] != self.code:
            wrong.append(f"exit code {answer['code']}, not {self.code}")
        if not self.findings:
            errors = [line for line in said.splitlines() if line.startswith("error: ")]
            if len(errors) != 1:
                wrong.append(f"{len(errors)} lines begin with error:")
            said = errors[0] if errors else said
        flat = " ".join(said.split())
        wrong += [f"{fragment!r} is not in the message" for fragment in self.expect if fragment not in flat]
        if (answer["phase"] == "loading") != self.loading:
            wrong.append(
                "found before models load, other than it says" if self.loading else "found only while models load"
            )
        return wrong


def flagged(group: str, flags: str | Sequence[str], *expect: str, change: Mapping | None = None, **more: Any) -> Case:
    """Flags on top of a good run."""
    given = flags.split() if isinstance(flags, str) else list(flags)
    return Case(group, " ".join(given), expect, lambda bench: bench.train(*given, change=change), **more)


def changed(group: str, change: Mapping[str, Any], *expect: str, **more: Any) -> Case:
    """Settings of a file on top of a good run."""
    return Case(group, json.dumps(change), expect, lambda bench: bench.train(change=change), **more)


def written(group: str, name: str, content: Content, *expect: str) -> Case:
    """A file of settings that is bad as a whole."""
    return Case(group, name, expect, lambda bench: ["--config", bench.write(name, content)])
