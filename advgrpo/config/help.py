"""What --help prints, and docs/configuration.md: both read from the settings themselves."""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Mapping

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from advgrpo.config.base import Options, Positional
from advgrpo.config.explain import element_model, flag_of, leaves, wanted

_COLUMN = 26  # where explanations begin
_COMMON = {
    "--help": "Print this and exit.",
    "--version": "Print the version and exit.",
    "--traceback": "Show the whole stack of an error instead of one line (or set ADVGRPO_TRACEBACK=1).",
}


def _width() -> int:
    return max(60, min(shutil.get_terminal_size((80, 24)).columns, 110))


def _paragraph(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(text, _width(), initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)


def _entry(name: str, text: str) -> list[str]:
    """A flag with its explanation beside it, or below where it is long."""
    first = f"  {name}".ljust(_COLUMN)
    lines = textwrap.wrap(text, _width() - _COLUMN, break_on_hyphens=False) or [""]
    if len(first) > _COLUMN or first[-1] != " ":
        return [f"  {name}", *(" " * _COLUMN + line for line in lines)]
    return [first + lines[0], *(" " * _COLUMN + line for line in lines[1:])]


def _about(about: str) -> list[str]:
    """Paragraphs filled to the width; commands on lines of their own."""
    lines: list[str] = []
    paragraph: list[str] = []
    for line in [*about.strip().replace("\\\n", " ").splitlines(), ""]:
        command = line.startswith(("python ", "torchrun "))
        if line.strip() and not command:
            paragraph.append(line.strip())
            continue
        lines += _paragraph(" ".join(paragraph)) if paragraph else []
        paragraph = []
        lines += _command(line) if command else [""]
    return lines


def _command(line: str) -> list[str]:
    """An example as it can be pasted; broken before a flag where it is too long, its comment above it then."""
    if len(line) + 2 <= _width():
        return [f"  {line.rstrip()}"]
    text, _, comment = line.partition("#")
    lines = [f"  # {comment.strip()}"] if comment else []
    here = " "
    for part in re.split(r" (?=--)", " ".join(text.split())):
        if len(here) + len(part) + 3 > _width():
            lines.append(f"{here} \\")
            here = "     "
        here += f" {part}"
    return [*lines, here]


def default_text(field: FieldInfo) -> str:
    """The default as it is written on the command line; empty where there is none."""
    if field.is_required():
        return ""
    value = field.get_default(call_default_factory=True)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (tuple, list)):
        return " ".join(map(str, value))
    return "" if value in (None, {}) else str(value)


def _explained(field: FieldInfo) -> str:
    text = " ".join((field.description or "").split())
    default = default_text(field)
    ending = " Required." if field.is_required() else f" [{default}]" if default else ""
    return text + ending


def options_help(model: type[Options], program: str, about: str) -> str:
    """--help of a command without sections."""
    fields = leaves(model)
    free = [name for name, field in fields.items() if any(each is Positional for each in field.metadata)]
    usage = " ".join([f"usage: {program}", *(name.upper() for name in free), "[flags]"])
    lines = [usage, "", *_about(about), "flags, with their defaults in brackets:"]
    for name, field in fields.items():
        lines += _entry(name.upper() if name in free else flag_of(name), _explained(field))
    for name, text in _COMMON.items():
        lines += _entry(name, text)
    return "\n".join(lines)


def commands_help(commands: Mapping[str, type[Options]], program: str, about: str) -> str:
    """--help of a program with commands."""
    lines = [
        f"usage: {program} {'|'.join(commands)} [flags]",
        "",
        *_about(about),
        "commands (COMMAND --help says more):",
    ]
    for name, model in commands.items():
        lines += _entry(name, " ".join((model.__doc__ or "").split()))
    return "\n".join(lines)


def settings_help(
    model: type[BaseModel], program: str, about: str, first: Mapping[str, FieldInfo], *, every: bool
) -> str:
    """--help of a command whose flags are settings in sections: an overview, or every flag explained.

    Args:
        first: the command's own flags, which stand before the settings.
    """
    lines = [f"usage: {program} [flags]", "", *_about(about), "first of all:"]
    for name, field in first.items():
        lines += _entry(flag_of(name), _explained(field))
    for name, text in _COMMON.items():
        lines += _entry(name, text)
    lines += _entry("--help-all", "Explain every setting (so does docs/configuration.md).")
    lines += ["", "settings, with their defaults in brackets; a preset has values of its own:"]
    for name, field in leaves(model).items():
        if "." not in name:
            lines += _entry(flag_of(name), _explained(field))
    for section, text, fields in sections_of(model):
        lines += ["", *_paragraph(f"{section}: {text}")]
        if every:
            for name, field in fields.items():
                lines += _entry(flag_of(name), _explained(field))
        else:
            lines += _paragraph(" ".join(flag_of(name) for name in fields), "  ")
    return "\n".join(lines)


def sections_of(model: type[BaseModel], prefix: str = "") -> list[tuple[str, str, dict[str, FieldInfo]]]:
    """(dotted name, first line of its docstring, its own fields by dotted name) of every section, nested ones too."""
    found = []
    for name, field in model.model_fields.items():
        inner = field.annotation
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            continue
        path = f"{prefix}{name}"
        own = {full: each for full, each in leaves(inner, f"{path}.").items() if full.count(".") == path.count(".") + 1}
        found.append((path, _first_line(inner), own))
        found += sections_of(inner, f"{path}.")
    return found


def _entries_of(model: type[BaseModel]) -> list[tuple[str, str, dict[str, FieldInfo]]]:
    """As `sections_of`, of the entries of lists: "rewards.custom[]"."""
    found = []
    for name, field in leaves(model).items():
        entry = element_model(field.annotation)
        if entry is not None:
            own = {each.rpartition(".")[2]: inner for each, inner in leaves(entry).items()}
            found.append((f"each of {name}", _first_line(entry), own))
    return found


def _first_line(model: type[BaseModel]) -> str:
    return (model.__doc__ or "").strip().splitlines()[0]


def reference_page(model: type[BaseModel]) -> str:
    """docs/configuration.md: every setting with what it takes, its default and what it means."""
    lines = [
        "# Settings",
        "",
        "Made from the settings themselves by `python -m advgrpo.config > docs/configuration.md`.",
        "",
        "Every setting is a key of a YAML file (`--config FILE`) and a flag of `python -m advgrpo.train`:",
        "`eps: 1.0e-6` under `update:` is `--update.eps 1e-6`. Presets lay their values over these defaults, files",
        "over presets, flags over files; of a flag given twice the last counts. Switches are `--fast` and `--no-fast`;",
        "several values follow one flag: `--update.betas 0.9 0.99`. A number may be inf only where its line says so.",
    ]
    top = {name: field for name, field in leaves(model).items() if "." not in name}
    sections = [("the run", _first_line(model), top), *sections_of(model), *_entries_of(model)]
    for section, text, fields in sections:
        if not fields:
            continue
        lines += ["", f"## {section}", text, "", "| setting | takes | default | |", "|---|---|---|---|"]
        for name, field in fields.items():
            default = "required" if field.is_required() else default_text(field)
            cells = (f"`{name}`", wanted(field.annotation, field.metadata), default, _plain(field))
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def _plain(field: FieldInfo) -> str:
    return " ".join((field.description or "").split())
