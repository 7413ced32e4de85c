"""Replace functions and methods of an imported module by ours: logged, checked against the original, reversible."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping
from typing import Any

logger = logging.getLogger("advgrpo_kernels.integrations")

_RECORD = "__advgrpo_kernels_replaced__"  # on the patched module: [(owner, attribute, original, replacement), ...]
_originals: dict[tuple[Any, str], Callable] = {}  # the same by (owner, attribute), for replacements that call them


def replace(module: Any, replacements: Mapping[str, Callable]) -> list[str]:
    """Put `replacements` in the place of the module's own functions; returns the names that were replaced.

    A name is that of a function or `Class.method`; names the module does not have are skipped, because a codebase
    spreads them over several modules. A method that was already replaced through another module that imports the same
    class is left as it is.

    Raises:
        RuntimeError: the module is patched already.
        ValueError: it has none of the names, or an original takes other parameters than its replacement (another
            version of that codebase): nothing is replaced then.
    """
    if _RECORD in vars(module):
        raise RuntimeError(f"{_name(module)} is patched already: unpatch it first")
    found = [(name, *_resolve(module, name)) for name in replacements]
    found = [(name, owner, attribute) for name, owner, attribute in found if owner is not None]
    if not found:
        raise ValueError(f"{_name(module)} has none of {', '.join(replacements)}: pass the module that holds them")
    open_names = [entry for entry in found if getattr(entry[1], entry[2]) is not replacements[entry[0]]]
    for name, owner, attribute in open_names:
        _check_signature(f"{_name(module)}.{name}", getattr(owner, attribute), replacements[name])
    record = []
    for name, owner, attribute in open_names:
        record.append((owner, attribute, vars(owner)[attribute], replacements[name]))
        if isinstance(owner, type):
            _originals[owner, attribute] = vars(owner)[attribute]
        setattr(owner, attribute, replacements[name])
        logger.info("%s.%s -> %s.%s", _name(module), name, replacements[name].__module__, replacements[name].__name__)
    for name, _, _ in found:
        if name not in {entry[0] for entry in open_names}:
            logger.info("%s.%s: replaced already through another module", _name(module), name)
    setattr(module, _RECORD, record)
    return [name for name, _, _ in open_names]


def restore(module: Any) -> None:
    """Undo `replace`.

    Raises:
        RuntimeError: the module is not patched, or something else was put in the place of a replacement since.
    """
    if _RECORD not in vars(module):
        raise RuntimeError(f"{_name(module)} is not patched")
    for owner, attribute, _, replacement in vars(module)[_RECORD]:
        if vars(owner).get(attribute) is not replacement:
            raise RuntimeError(f"{_name(owner)}.{attribute} was replaced again since it was patched: undo that first")
    for owner, attribute, original, _ in vars(module)[_RECORD]:
        setattr(owner, attribute, original)
        if isinstance(owner, type):
            del _originals[owner, attribute]
        logger.info("%s.%s: original restored", _name(owner), attribute)
    delattr(module, _RECORD)


def original_method(cls: type, attribute: str) -> Callable | None:
    """The method of `cls` or a base class that a replacement took the place of; None where none did."""
    return next((_originals[c, attribute] for c in cls.__mro__ if (c, attribute) in _originals), None)


def _resolve(module: Any, name: str) -> tuple[Any, str]:
    """(owner, attribute) of `function` or `Class.method`; owner None where the module lacks it."""
    owner, _, attribute = name.rpartition(".")
    holder = vars(module).get(owner) if owner else module
    return (holder, attribute) if holder is not None and attribute in vars(holder) else (None, attribute)


def _check_signature(name: str, original: Callable, replacement: Callable) -> None:
    """Every parameter of the original must be ours too, in its place and with its default; we may have more."""
    theirs, ours = (list(inspect.signature(f).parameters.values()) for f in (original, replacement))
    for their, our in zip(theirs, [*ours, *[None] * len(theirs)]):
        if our is None or their.name != our.name or their.default != our.default:
            raise ValueError(
                f"{name} takes {inspect.signature(original)}, its replacement {inspect.signature(replacement)}: "
                "another version of that codebase; nothing was replaced"
            )


def _name(owner: Any) -> str:
    return getattr(owner, "__name__", type(owner).__name__)
