"""One language for whatever is wrong with a setting, wherever it was given: name, value, what is wanted instead."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from advgrpo.config.base import Positional
from advgrpo.config.renamed import RENAMED

_MOST_SHOWN = 80  # characters of a value
_HUGE = 1e6  # upper limits from here on are mentioned only to who exceeds them


def flag_of(name: str) -> str:
    """--update.max-grad-norm of "update.max_grad_norm", and --rewards.custom of "rewards.custom[0].weight"."""
    return "--" + name.partition("[")[0].replace("_", "-")


def dotted_name(path: Sequence[Any]) -> str:
    """ "rewards.custom[0].weight" of ("rewards", "custom", 0, "weight")."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")


def nearest(name: str, known: Iterable[str], cutoff: float = 0.5) -> list[str]:
    """Up to three of `known` that `name` may have meant: those that end alike first, the others by spelling."""
    known = list(known)
    last = name.rpartition(".")[2]
    same = [each for each in known if each.rpartition(".")[2] == last]
    if same:
        by_path = difflib.get_close_matches(name, same, n=3, cutoff=0.0)
        return by_path or same[:3]
    whole = difflib.get_close_matches(name, known, n=1, cutoff=cutoff)
    ends: dict[str, list[str]] = {}
    for each in known:
        ends.setdefault(each.rpartition(".")[2], []).append(each)
    close = difflib.get_close_matches(last, ends, n=1, cutoff=max(cutoff, 0.7))
    return list(dict.fromkeys([*(whole if "." in name else ends.get(close[0], []) if close else whole)]))[:3]


def did_you_mean(name: str, known: Sequence[str], cutoff: float = 0.5) -> str:
    """ "; did you mean ...?", or what there is where nothing is near."""
    close = nearest(name, known, cutoff)
    if close:
        return f"; did you mean {' or '.join(repr(each) for each in close)}?"
    return f"; known: {', '.join(known)}" if len(known) <= 40 else ""


def wanted(annotation: Any, metadata: Sequence[Any] = (), *, all_limits: bool = False) -> str:
    """In words, what a field takes: "a number above 0", "one of a, b"."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        inner = [m for each in arguments[1:] for m in (each.metadata if isinstance(each, FieldInfo) else [each])]
        return wanted(arguments[0], [*inner, *metadata], all_limits=all_limits)
    if origin in (Union, UnionType):
        parts = [wanted(each, metadata, all_limits=all_limits) for each in arguments if each is not NoneType]
        return " or ".join([*parts, *(["None"] if NoneType in arguments else [])])
    if origin is Literal:
        return " or ".join(map(str, arguments)) if len(arguments) < 3 else f"one of {', '.join(map(str, arguments))}"
    if origin in (tuple, list, set):
        return _wanted_sequence(origin, arguments, metadata, all_limits)
    if origin is dict or annotation is dict:
        return "a mapping"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"a mapping of settings ({', '.join(annotation.model_fields)})"
    if annotation in (int, float):
        return _wanted_number(annotation, metadata, all_limits)
    names = {bool: "true or false", str: "text", Path: "a path"}
    empty = any(getattr(each, "min_length", 0) for each in metadata)
    return names.get(annotation, getattr(annotation, "__name__", str(annotation))) + (" that is not empty" * empty)


def _wanted_sequence(origin: Any, arguments: tuple, metadata: Sequence[Any], all_limits: bool) -> str:
    if origin is tuple and Ellipsis not in arguments:
        parts = [wanted(each, all_limits=all_limits) for each in arguments]
        if len(set(parts)) > 1:
            return ", then ".join(parts)
        return f"{len(parts)} values, each {parts[0]}"
    element = element_model(arguments[0])
    if element is not None:
        return f"a list of mappings ({', '.join(element.model_fields)}), on the command line as JSON"
    some = "one or more" if any(getattr(each, "min_length", 0) for each in metadata) else "any number of"
    return f"{some} values, each {wanted(arguments[0], all_limits=all_limits)}"


def _wanted_number(kind: type, metadata: Sequence[Any], all_limits: bool) -> str:
    limits = {
        key: value
        for each in metadata
        for key in ("gt", "ge", "lt", "le")
        if (value := getattr(each, key, None)) is not None and (all_limits or key in ("gt", "ge") or abs(value) < _HUGE)
    }
    text = {key: f"{value:g}" if kind is float else str(value) for key, value in limits.items()}
    low = f"above {text['gt']}" if "gt" in text else f"from {text['ge']}" if "ge" in text else ""
    high = (
        f"{'and' if 'gt' in text else 'to'} below {text['lt']}"
        if "lt" in text
        else f"to {text['le']}"
        if "le" in text
        else ""
    )
    if "ge" in text and not high:
        low = f"of at least {text['ge']}"
    joined = " ".join(part for part in (low, high) if part)
    infinite = any(getattr(each, "allow_inf_nan", None) for each in metadata)
    noun = "whole number" if kind is int else "number"
    return f"a {noun} {joined}".rstrip() + (", or inf for no limit" * infinite)


def shown(value: Any) -> str:
    """A value in a message: text in quotes unless it is a number, shortened where it is long."""
    if isinstance(value, (list, tuple)):
        text = "[" + ", ".join(shown(each) for each in value) + "]"
    elif isinstance(value, str):
        text = value if _is_number(value) else repr(value)
    else:
        text = repr(value)
    return text if len(text) <= _MOST_SHOWN else f"{text[: _MOST_SHOWN - 1]}…"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return text.strip() == text != ""


def explain(error: ValidationError, model: type[BaseModel], settings: Mapping[str, Any], *, dotted: bool = True) -> str:
    """Everything that is wrong, in one line; each field once.

    Args:
        settings: what was given; values are quoted from it.
        dotted: name fields as in files, `update.eps = 0: ...`; else as flags, `--num-steps 0: ...`.
    """
    found: dict[str, str] = {}
    for problem in error.errors():
        path, field, rest = _locate(model, problem["loc"])
        if problem["type"] == "extra_forbidden":
            name = dotted_name(problem["loc"])
            known = list(leaves(model))
            at = _model_at(model, path)
            beside = list(at.model_fields) if at else []
            siblings = [dotted_name([*path, each]) for each in beside]
            close = difflib.get_close_matches(str(problem["loc"][-1]), beside, n=1, cutoff=0.6)
            hint = f"; did you mean {dotted_name([*path, close[0]])!r}?" if close else _elsewhere(name, siblings, known)
            moved = f"{name!r} is called {RENAMED[name]!r} now" if name in RENAMED else ""
            found.setdefault(name, moved or f"unknown key {name!r}{hint}")
            continue
        name = dotted_name(path) or "settings"
        found.setdefault(name, _wrong(name, field, _value_at(settings, path), problem, rest, dotted))
    return "; ".join(found.values())


def _elsewhere(name: str, siblings: list[str], known: list[str]) -> str:
    """A key of that name in another section, else the nearest beside it, else all that are beside it."""
    last = name.rpartition(".")[2]
    same = [each for each in known if each.rpartition(".")[2] == last]
    return did_you_mean(name, same or siblings, cutoff=0.4)


def _wrong(name: str, field: FieldInfo | None, value: Any, problem: Any, rest: tuple, dotted: bool) -> str:
    """ "update.eps = inf: not finite; want a number above 0 (--update.eps; default 1e-08)"."""
    free = field is not None and any(each is Positional for each in field.metadata)
    flag = name.upper() if free else flag_of(name)
    if field is None:  # the settings as a whole
        return f"{name}: {problem['msg']}"
    want = wanted(field.annotation, field.metadata, all_limits=problem["type"].startswith("less_than"))
    if problem["type"] == "missing" and not rest:
        return f"{name if dotted else flag} is missing: want {want}"
    reason = ""
    if problem["type"] == "finite_number":
        reason = "not finite; "
    elif problem["type"] == "value_error":
        reason = f"{problem['ctx']['error']}; "
    elif problem["type"] == "literal_error" and isinstance(value, str):
        choices = [str(each) for each in get_args(field.annotation)]
        close = difflib.get_close_matches(value, choices, n=1, cutoff=0.5)
        want += f"; did you mean {close[0]!r}?" if close else ""
    given = f"{name} = {shown(value)}" if dotted else f"{flag} {shown(value)}"
    default = _default(field)
    remedy = [*([flag] if dotted else []), *([f"default {default}"] if default else [])]
    return f"{given}: {reason}want {want}" + (f" ({'; '.join(remedy)})" if remedy else "")


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True) if not field.is_required() else None
    if value in (None, "", (), {}) or isinstance(value, BaseModel):
        return ""
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:g}"
    return shown(list(value)) if isinstance(value, tuple) else str(value)


def leaves(model: type[BaseModel], prefix: str = "") -> dict[str, FieldInfo]:
    """Fields that are not sections, by dotted name."""
    found = {}
    for name, field in model.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            found |= leaves(inner, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = field
    return found


def element_model(annotation: Any) -> type[BaseModel] | None:
    """The model that a field holds, itself or in a list."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for each in get_args(annotation) if (found := element_model(each))), None)


def _locate(model: type[BaseModel], location: tuple) -> tuple[list, FieldInfo | None, tuple]:
    """(path of the field, the field, what is left of the location: an index, or pydantic's names of alternatives)."""
    path, field, here = [], None, model
    for number, part in enumerate(location):
        if here is not None and part in here.model_fields:
            field = here.model_fields[part]
            here = element_model(field.annotation)
        elif not (isinstance(part, int) and here is not None):
            return path, field, location[number:]
        path.append(part)
    return path, field, ()


def _model_at(model: type[BaseModel], path: list) -> type[BaseModel] | None:
    here: type[BaseModel] | None = model
    for part in path:
        if here is not None and part in here.model_fields:
            here = element_model(here.model_fields[part].annotation)
    return here


def _value_at(settings: Any, path: list) -> Any:
    for part in path:
        try:
            settings = settings[part]
        except (KeyError, IndexError, TypeError):
            return None
    return settings


def section_names(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Dotted names of all sections, nested ones too."""
    found = []
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found += [f"{prefix}{name}", *section_names(field.annotation, f"{prefix}{name}.")]
    return found
