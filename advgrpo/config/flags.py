"""Command lines: flags become the same nested settings that files hold, so one validation speaks for both."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from advgrpo.config.base import Options, Positional, Repeated
from advgrpo.config.explain import did_you_mean, explain, flag_of, leaves, wanted
from advgrpo.config.reading import UNREADABLE
from advgrpo.config.renamed import RENAMED
from advgrpo.errors import UserError

Chosen = TypeVar("Chosen", bound=Options)


def read_flags(arguments: Sequence[str], fields: Mapping[str, FieldInfo], sections: Iterable[str] = ()) -> dict:
    """{dotted name: value} of `--name value`, `--name=value`, `--name a b c`, `--switch` and `--no-switch`.

    Values are the texts given, for pydantic to read; lists of them where a field holds several, None for "None" where a
    field admits it. A field marked `Positional` takes what has no flag before it. Hyphens and underscores are one. Of a
    flag given twice the last counts, so that a script's flags can be overridden.

    Raises:
        UserError: an unknown flag (the nearest is named), a flag without its value or with one too many.
    """
    positional = next((name for name, field in fields.items() if _marked(field, Positional)), None)
    found: dict[str, Any] = {}
    queue = list(arguments)
    while queue:
        token = queue.pop(0)
        if not is_flag(token):
            if positional is None or (positional in found and not _many(fields[positional])):
                raise UserError(_stray(token, fields))
            _take(found, positional, token, fields[positional])
            continue
        text, given, value = token.partition("=")
        name, negated = _resolve(text, fields, sections)
        field = fields[name]
        if _switch(field):
            if queue and queue[0].lower() in ("true", "false", "yes", "no"):
                raise UserError(
                    f"{text} takes no value: write {flag_of(name)} or {_negative(name)}, without {queue[0]}"
                )
            if given and negated:
                raise UserError(f"{token}: write {flag_of(name)} or {_negative(name)}")
            _take(found, name, value if given else not negated, field)
            continue
        values = [value] if given else _following(queue, several=_many(field) and not _marked(field, Repeated))
        if not values and not (_many(field) and not _marked(field, Repeated)):
            raise UserError(f"{text}: the value is missing; want {wanted(field.annotation, field.metadata)}")
        for each in values if _marked(field, Repeated) else [values if _many(field) else values[0]]:
            _take(found, name, each, field)
    return found


def parse_options(model: type[Chosen], arguments: Sequence[str], *, program: str, about: str) -> Chosen:
    """The options of a command from its flags.

    Args:
        about: what --help says above the flags; lines with two spaces before them are examples.

    Raises:
        UserError: see `read_flags`, or a value that the field does not take, named as on the command line.
        SystemExit: --help, which is printed.
    """
    from advgrpo.config.help import options_help

    if any(each in ("--help", "-h", "--help-all") for each in arguments):
        print(options_help(model, program, about))
        raise SystemExit(0)
    given = read_flags(arguments, leaves(model))
    try:
        return model.model_validate(given)
    except ValidationError as error:
        raise UserError(explain(error, model, given, dotted=False)) from error


def options_of(model: type[Chosen], given: Mapping[str, Any]) -> Chosen:
    """A command's options from Python's keyword arguments; UserError naming what is wrong, as it is named there."""
    try:
        return model.model_validate(dict(given))
    except ValidationError as error:
        raise UserError(explain(error, model, given)) from error


def parse_command(
    commands: Mapping[str, type[Options]], arguments: Sequence[str], *, program: str, about: str
) -> Options:
    """The options of `PROGRAM COMMAND ...`: an instance of the command's class.

    Raises:
        UserError, SystemExit: as `parse_options`; a missing or unknown command names those there are.
    """
    from advgrpo.config.help import commands_help

    first = arguments[0] if arguments else ""
    if first in commands:
        model = commands[first]
        return parse_options(model, arguments[1:], program=f"{program} {first}", about=model.__doc__ or "")
    if first in ("--help", "-h", "--help-all"):
        print(commands_help(commands, program, about))
        raise SystemExit(0)
    if first and not is_flag(first):
        raise UserError(f"unknown command {first!r}{did_you_mean(first, list(commands))}; --help says more")
    raise UserError(f"the command is missing: write {program} {' or '.join(commands)}; --help says more")


def is_flag(token: str) -> bool:
    """Negative numbers and a lone "-" are values."""
    return (token.startswith("--") and len(token) > 2) or (len(token) == 2 and token[0] == "-" and token[1].isalpha())


def _resolve(text: str, fields: Mapping[str, FieldInfo], sections: Iterable[str]) -> tuple[str, bool]:
    """(name of the field, whether it is switched off); UserError for no flag of ours."""
    name = text.removeprefix("--").replace("-", "_")
    if name in fields:
        return name, False
    front, dot, last = name.rpartition(".")
    for positive in (f"{front}{dot}{last.removeprefix('no_')}", name.removeprefix("no_")):
        if positive != name and positive in fields and _switch(fields[positive]):
            return positive, True
    if name in sections:
        first = next(each for each in fields if each.startswith(f"{name}."))
        raise UserError(f"{text} is a group of settings: set one of its fields, such as {flag_of(first)}")
    if name in RENAMED:
        raise UserError(f"{text} is called {flag_of(RENAMED[name])} now")
    hint = did_you_mean(name, list(fields)).replace("_", "-")
    for each in fields:
        hint = hint.replace(f"'{each.replace('_', '-')}'", flag_of(each))
    raise UserError(f"unknown flag {text}{hint or '; --help lists the flags'}")


def _following(queue: list[str], *, several: bool) -> list[str]:
    """Takes the values of a flag off the queue."""
    taken: list[str] = []
    while queue and not is_flag(queue[0]) and (several or not taken):
        taken.append(queue.pop(0))
    return taken


def _take(found: dict[str, Any], name: str, value: Any, field: FieldInfo) -> None:
    value = _read(value, field)
    if _marked(field, Repeated) or (_marked(field, Positional) and _many(field)):
        found[name] = [*found.get(name, ()), value]
    else:
        found[name] = value


def _read(value: Any, field: FieldInfo) -> Any:
    """The text as it is, None, or YAML where the field holds mappings."""
    if value in ("None", "none", "null") and NoneType in get_args(field.annotation):
        return None
    if isinstance(value, list) and value in (["None"], ["none"], ["null"]) and NoneType in get_args(field.annotation):
        return None
    if _holds_mappings(field.annotation):
        text = value[0] if isinstance(value, list) and len(value) == 1 else value
        try:
            return yaml.safe_load(text) if isinstance(text, str) else text
        except UNREADABLE:
            return value
    return value


def _holds_mappings(annotation: Any) -> bool:
    if annotation is dict or (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
        return True
    return get_origin(annotation) is dict or any(_holds_mappings(each) for each in get_args(annotation))


def _marked(field: FieldInfo, marker: type) -> bool:
    return any(each is marker or isinstance(each, marker) for each in field.metadata)


def _switch(field: FieldInfo) -> bool:
    return field.annotation is bool


def _many(field: FieldInfo) -> bool:
    alternatives = get_args(field.annotation) if get_origin(field.annotation) in (Union, UnionType) else ()
    return any(get_origin(each) in (tuple, list) for each in (field.annotation, *alternatives))


def _negative(name: str) -> str:
    front, dot, last = name.rpartition(".")
    return flag_of(f"{front}{dot}no_{last}")


def _stray(token: str, fields: Mapping[str, FieldInfo]) -> str:
    """The error for a value without a flag, such as iterations=3."""
    name = token.partition("=")[0].replace("-", "_")
    if name in fields:
        return f"unexpected argument {token!r}; did you mean --{token.replace('_', '-')}?"
    return f"unexpected argument {token!r}; flags begin with --, and take their value after a space or ="
