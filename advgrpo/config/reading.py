"""Presets, YAML files and what is laid over what."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
import yaml.composer
import yaml.constructor
import yaml.resolver

from advgrpo.config.explain import did_you_mean
from advgrpo.config.renamed import PRESETS
from advgrpo.errors import UserError

_MOST_BYTES = 1_000_000  # of a file of settings
# What PyYAML raises of text: the last two where a value is not what its tag says (!!bool maybe, !!timestamp soon).
UNREADABLE = (yaml.YAMLError, RecursionError, ValueError, LookupError, AttributeError)


def preset_names() -> list[str]:
    folder = resources.files("advgrpo") / "presets"
    return sorted(p.name.removesuffix(".yaml") for p in folder.iterdir() if p.name.endswith(".yaml"))


class _OneOfEachKey(yaml.constructor.SafeConstructor):
    """A key that stands twice in a mapping is an error, where YAML would let the last one win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"the key {key.value!r} stands twice; leave one out", problem_mark=key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Loader(_OneOfEachKey, yaml.SafeLoader):
    """Plain data only."""


_Quick = _Loader  # where PyYAML has no libyaml
if yaml.__with_libyaml__:

    class _Quick(_OneOfEachKey, yaml.composer.Composer, yaml.cyaml.CParser, yaml.resolver.Resolver):
        """The same with libyaml's parser, five times as fast, which words what is wrong otherwise."""

        def __init__(self, stream: str) -> None:
            yaml.cyaml.CParser.__init__(self, stream)
            yaml.composer.Composer.__init__(self)
            yaml.constructor.SafeConstructor.__init__(self)
            yaml.resolver.Resolver.__init__(self)


def _parsed(text: str) -> Any:
    """What is refused is parsed again by PyYAML, whose words tell where."""
    try:
        return yaml.load(text, _Quick)
    except UNREADABLE:
        return yaml.load(text, _Loader)


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping.

    Raises:
        UserError: a missing or oversized file, bytes that are not UTF-8, a syntax error, a repeated key, nesting too
            deep to read, a value that is not what its tag says, or anything that is not a mapping.
    """
    where = f"config file {path}"
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{where} is not a regular file; pass a YAML file")
        if path.stat().st_size > _MOST_BYTES:
            raise UserError(f"{where} is larger than {_MOST_BYTES} bytes; pass a file of settings")
        content = _parsed(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"{where}: {error.strerror or error}; pass an existing YAML file") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8 text (byte {error.start}); pass a YAML file") from error
    except yaml.YAMLError as error:
        raise UserError(f"{where} is not valid YAML: {_problem(error)}") from error
    except UNREADABLE as error:
        raise UserError(f"{where} cannot be read: {_reason(error)}; correct the file") from error
    if not isinstance(content, dict):
        found = "nothing" if content is None else f"a {type(content).__name__}"
        raise UserError(f"{where}: want a mapping of settings such as 'iterations: 100', got {found}")
    return content


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, ValueError):  # whole numbers of thousands of digits, impossible dates
        return str(error)
    return "a value is not what its tag (!!) says"


def _problem(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    text = getattr(error, "problem", None) or " ".join(str(error).split())
    return f"{text} (line {mark.line + 1}, column {mark.column + 1})" if mark else text


def read_preset(name: Any) -> dict[str, Any]:
    """A preset's settings, laid over those of the preset that it names."""
    if isinstance(name, str) and name in PRESETS:
        raise UserError(f"the preset {name!r} is called {PRESETS[name]!r} now")
    if not isinstance(name, str) or name not in preset_names():
        raise UserError(f"unknown preset {name!r}{did_you_mean(str(name), preset_names(), cutoff=0.3)}")
    settings = copy.deepcopy(_shipped(name))
    base = settings.pop("preset", None)  # a job is another preset with a few changes
    return merge(read_preset(base), settings) if base else settings


@functools.cache
def _shipped(name: str) -> dict[str, Any]:
    """A preset's file, which is read once: a run's report is compared with all of them, whenever it is written."""
    return read_yaml(Path(str(resources.files("advgrpo") / "presets" / f"{name}.yaml")))


def merge(base: dict[str, Any], override: dict[str, Any]) -> dict[str, Any]:
    """`base` with `override` laid over it, nested mappings merged key by key."""
    merged = dict(base)
    for key, value in override.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted names as nested mappings: {"a.b": 1, "a": {"c": 2}} is {"a": {"b": 1, "c": 2}}."""
    tree: dict[str, Any] = {}
    for name, value in settings.items():
        for part in reversed(str(name).split(".")[1:]):
            value = {part: value}
        tree = merge(tree, {str(name).split(".")[0]: value})
    return tree


def read(preset: str | None = None, file: Path | None = None) -> tuple[dict[str, Any], str]:
    """(settings of the preset with the file's laid over them, not yet validated; what to call them in errors).

    Without `preset` it is the one that the file names with `preset:`, else "tiny".
    """
    settings = read_yaml(file) if file else {}
    named = settings.pop("preset", None)
    return merge(read_preset(preset or named or "tiny"), settings), str(file) if file else f"preset {preset or 'tiny'}"
