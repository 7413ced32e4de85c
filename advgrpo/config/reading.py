"""Presets, YAML files and what is laid over what; unknown keys are errors that name the nearest key."""

from __future__ import annotations

import difflib
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from ..errors import UserError
from .sections import Config


def preset_names() -> list[str]:
    folder = resources.files("advgrpo") / "presets"
    return sorted(p.name.removesuffix(".yaml") for p in folder.iterdir() if p.name.endswith(".yaml"))


def _nearest(key: str, known: list[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.3)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping; UserError for a missing file, a syntax error or anything that is not a mapping."""
    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UserError(f"config file {path}: {error.strerror or error}; pass an existing YAML file") from error
    except yaml.YAMLError as error:
        raise UserError(f"config file {path} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"config file {path}: want a mapping of settings, got {type(content).__name__}")
    return content


def read_preset(name: str) -> dict[str, Any]:
    if name not in preset_names():
        raise UserError(f"unknown preset {name!r}{_nearest(name, preset_names())}")
    settings = read_yaml(Path(str(resources.files("advgrpo") / "presets" / f"{name}.yaml")))
    base = settings.pop("preset", None)  # a job is another preset with a few changes
    return merge(read_preset(base), settings) if base else settings


def merge(base: dict[str, Any], override: dict[str, Any]) -> dict[str, Any]:
    """`base` with `override` laid over it, nested mappings merged key by key."""
    merged = dict(base)
    for key, value in override.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def _fields_at(location: tuple) -> list[str]:
    model: Any = Config
    for part in location:
        field = model.model_fields.get(part) if hasattr(model, "model_fields") else None
        model = field.annotation if field else None
    return list(model.model_fields) if hasattr(model, "model_fields") else []


def build(settings: dict[str, Any], source: str) -> Config:
    """A checked Config; UserError naming each wrong field, its value and, for unknown keys, the nearest known one."""
    try:
        return Config.model_validate(settings)
    except ValidationError as error:
        lines = []
        for problem in error.errors():
            location = problem["loc"]
            name = ".".join(str(part) for part in location)
            if problem["type"] == "extra_forbidden":
                lines.append(f"unknown key {name!r}{_nearest(str(location[-1]), _fields_at(location[:-1]))}")
            else:
                lines.append(f"{name} = {problem['input']!r}: {problem['msg']}")
        raise UserError(f"{source}: " + "; ".join(lines)) from error


def load(preset: str | None = None, file: Path | None = None) -> Config:
    """Preset (default "tiny", or the file's own `preset:` key), with the file's settings laid over it."""
    settings = read_yaml(file) if file else {}
    name = preset or settings.pop("preset", "tiny")
    settings.pop("preset", None)
    source = str(file) if file else f"preset {name}"
    return build(merge(read_preset(name), settings), source)


def dump(config: Config) -> str:
    """YAML that `load(file=...)` reads back to an equal config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
