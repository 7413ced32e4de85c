"""Replace functions and methods of other codebases by ours: found by identity, checked by running both, reversible.

An integration declares `Target`s: what a function is called where it is defined, and in which modules that is.
`replace` looks at the objects a module holds, never at the names it holds them under: `from m import f_new as f` is
f_new. Each original that is found is run beside its replacement first (`_self_check`), and nothing is replaced unless
all agree.

What takes an original's place is a copy of ours of its own, made by that call of `replace` and handed out by it alone,
so that `restore` finds it in every module, also in those that imported it since.
"""

from __future__ import annotations

import gc
import inspect
import logging
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ._self_check import Case, compare

logger = logging.getLogger("advgrpo_kernels.integrations")

_RECORD = "__advgrpo_kernels_replaced__"  # on the patched module: its `_Place`s
_MARK = "__advgrpo_kernels_origin__"  # on each copy of ours: its `Origin`


@dataclass(frozen=True)
class Target:
    """A function, or `Class.method`, of another codebase and what can take its place.

    `modules` are the ends of the names of modules that are known to define it ("sampling_utils" matches that and
    "fastvideo.utils.sampling_utils"); a function of this name that is defined elsewhere is taken for a copy. Of
    `variants` the first whose parameters fit and that passes `cases(original, class or None)` is taken.
    """

    name: str
    modules: tuple[str, ...]
    variants: tuple[types.FunctionType, ...]
    cases: Callable[[Callable, Any], Iterable[Case]]  # of the original and its class, which a function has not: None

    def is_defined_in(self, module_name: str) -> bool:
        return any(f".{module_name}".endswith(f".{known}") for known in self.modules)


class Origin(NamedTuple):
    """Where a copy of ours comes from."""

    original: types.FunctionType
    through: str  # name of the module that was patched


class _Found(NamedTuple):
    target: Target
    original: types.FunctionType
    cls: type | None  # of a method

    @property
    def full_name(self) -> str:
        return f"{(self.cls or self.original).__module__}.{self.original.__qualname__}"


class _Place(NamedTuple):
    owner: Any  # a module or a class
    attribute: str
    original: types.FunctionType
    copy: Callable

    def __str__(self) -> str:
        module = f"{self.owner.__module__}." if isinstance(self.owner, type) else ""
        return f"{module}{_name(self.owner)}.{self.attribute}"

    @property
    def is_ours(self) -> bool:
        return vars(self.owner).get(self.attribute) is self.copy


def replace(module: types.ModuleType, targets: Sequence[Target], everywhere: bool = True) -> list[str]:
    """Put ours in the place of what `module` holds of `targets`; returns the names of those replaced, as declared.

    Functions are replaced under every name the module has for them. Of a function that the module defines, and with
    `everywhere`, all modules that have imported it so far get ours too; what imports it later gets ours anyhow. A class
    is one object wherever it was imported, so its methods are replaced for all. An empty list: the module holds ours
    already, through another one.

    Raises:
        RuntimeError: the module is patched already.
        ValueError: it holds none of the targets; an original takes other parameters than ours, is wrapped by a
            decorator, or gives other values. Nothing is replaced then.
    """
    if _RECORD in vars(module):
        raise RuntimeError(f"{_name(module)} is patched already: unpatch it first")
    found, skipped = _find(module, targets)
    if not found:
        origins = sorted({f"{name} (through {origin.through})" for name, origin in _ours_in(module, targets)})
        if origins:
            logger.info("%s: replaced already through another module: %s", _name(module), ", ".join(origins))
            return []
        names = ", ".join(target.name for target in targets)
        notes = "".join(f"; {note}" for note in skipped)
        raise ValueError(f"{_name(module)} has none of {names}{notes}: pass the module that holds them")
    chosen = [(entry, *_variant_of(entry)) for entry in found]
    places = []
    for entry, variant, agreeing in chosen:
        copy = _copy_of(variant, Origin(entry.original, _name(module)))
        new = [_Place(*where, entry.original, copy) for where in _places(entry, module, everywhere)]
        places += new
        for place in new:
            setattr(place.owner, place.attribute, copy)
            ours = f"{variant.__module__}.{variant.__qualname__}"
            logger.info("%s -> %s (%d cases agree)", place, ours, agreeing)
        _warn_of_others(entry.original, f"{entry.full_name} is replaced", "the original")
    setattr(module, _RECORD, places)
    return list(dict.fromkeys(entry.target.name for entry in found))


def restore(module: types.ModuleType) -> None:
    """Undo `replace`, in all modules that hold what it put in place.

    Raises:
        RuntimeError: the module is not patched itself, or something else was put in the place of a replacement since.
            Nothing is restored then.
    """
    if _RECORD not in vars(module):
        through = sorted({origin.through for _, origin in _ours_in(module)})
        if through:
            raise RuntimeError(f"{_name(module)} holds what was replaced through {', '.join(through)}: unpatch that")
        raise RuntimeError(f"{_name(module)} is not patched")
    places = vars(module)[_RECORD]
    for place in places:
        if not place.is_ours and (place.owner is module or isinstance(place.owner, type)):
            raise RuntimeError(f"{place} was replaced again since it was patched: undo that first")
    originals = {id(place.copy): place.original for place in places}
    holders = [(place.owner, place.attribute) for place in places if place.is_ours]
    holders += [(owner, attribute) for owner, attribute, value in _attributes() if id(value) in originals]
    for owner, attribute in holders:
        value = vars(owner)[attribute]
        if id(value) in originals:  # not yet, through another entry of the list
            setattr(owner, attribute, originals[id(value)])
            logger.info("%s: original restored", _Place(owner, attribute, value, value))
    delattr(module, _RECORD)
    for place in places:
        if originals.pop(id(place.copy), None) is not None:  # each copy once
            name = f"{place.copy.__module__}.{place.copy.__qualname__}"
            _warn_of_others(place.copy, f"{name} is restored", "the replacement")


def holds_any(module: types.ModuleType, targets: Sequence[Target]) -> bool:
    """Whether there is something for `replace` to do in `module`."""
    return bool(_find(module, targets)[0])


def original_of(function: Any) -> types.FunctionType | None:
    """What `function` took the place of; None if it is not one of ours."""
    origin = getattr(function, _MARK, None)
    return origin and origin.original


def original_method(cls: type, attribute: str) -> Callable | None:
    """The method of `cls` or a base class that a replacement took the place of; None where none did."""
    found = (original_of(vars(c).get(attribute)) for c in cls.__mro__)
    return next((original for original in found if original is not None), None)


def _find(module: types.ModuleType, targets: Sequence[Target]) -> tuple[list[_Found], list[str]]:
    """The originals that `module` holds, each once, and notes on functions of such names that are others."""
    found, skipped = {}, []
    for value in list(vars(module).values()):
        for name in dict.fromkeys(target.name for target in targets):
            original = _member(value, name)
            if original is None or original_of(original) is not None or id(original) in found:
                continue
            cls = value if isinstance(value, type) else None
            entries = [_Found(target, original, cls) for target in targets if target.name == name]
            known = [entry for entry in entries if entry.target.is_defined_in(original.__module__)]
            fitting = [entry for entry in entries if _misfit(entry) is None]
            if known or fitting or original.__module__ == module.__name__:
                found[id(original)] = (known or fitting or entries)[0]
            else:  # imported from a module that is not known: another function of that name
                skipped.append(_misfit(entries[0]))
    return list(found.values()), skipped


def _member(value: Any, name: str) -> types.FunctionType | None:
    """The function that is `value`, or is in the class `value`, if it was defined under `name`."""
    cls, _, attribute = name.rpartition(".")
    if cls:
        value = vars(value).get(attribute) if isinstance(value, type) and value.__qualname__ == cls else None
    return value if isinstance(value, types.FunctionType) and value.__qualname__ == name else None


def _misfit(entry: _Found) -> str | None:
    """Why no variant can take the place of this original by its looks."""
    if hasattr(entry.original, "__wrapped__"):
        return f"{entry.full_name} is wrapped by a decorator, which a replacement would lose: patch before decorating"
    if any(_fits(entry.original, variant) for variant in entry.target.variants):
        return None
    ours = " or ".join(map(_signature, entry.target.variants))
    theirs = _signature(entry.original)
    return f"{entry.full_name} takes {theirs}, its replacement {ours}: another version of that codebase"


def _fits(original: Callable, variant: Callable) -> bool:
    """Every parameter of the original must be ours too, in its place and with its default; we may have more."""
    theirs, ours = (list(inspect.signature(f).parameters.values()) for f in (original, variant))
    return len(ours) >= len(theirs) and all(
        (their.name, their.kind, their.default) == (our.name, our.kind, our.default) for their, our in zip(theirs, ours)
    )


def _signature(function: Callable) -> str:
    """Names and defaults."""
    parameters = inspect.signature(function).parameters.values()
    return str(inspect.Signature([p.replace(annotation=inspect.Parameter.empty) for p in parameters]))


def _variant_of(entry: _Found) -> tuple[types.FunctionType, int]:
    """The first variant that fits and agrees in all cases, and how many those are."""
    misfit = _misfit(entry)
    if misfit:
        raise ValueError(f"{misfit}; nothing was replaced")
    reasons = []
    for variant in entry.target.variants:
        if not _fits(entry.original, variant):
            continue
        difference, agreeing = compare(entry.original, variant, entry.target.cases(entry.original, entry.cls))
        if difference is None and agreeing:
            return variant, agreeing
        reasons.append(f"{difference.text} [case {difference.case}]" if difference else "no case to compare them in")
    raise ValueError(
        f"{entry.full_name} and its replacement do not give the same: {'; nor with a variant of it: '.join(reasons)}. "
        "Another version of that codebase? Nothing was replaced"
    )


def _copy_of(function: types.FunctionType, origin: Origin) -> types.FunctionType:
    """`function` as an object of its own that goes by its original's name, so that pickles of either are the same."""
    made = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    made.__kwdefaults__ = function.__kwdefaults__
    made.__annotations__, made.__doc__ = function.__annotations__, function.__doc__
    made.__module__, made.__qualname__ = origin.original.__module__, origin.original.__qualname__
    setattr(made, _MARK, origin)
    return made


def _places(entry: _Found, module: types.ModuleType, everywhere: bool) -> list[tuple[Any, str]]:
    """(owner, attribute) of everything that is to be replaced for one original."""
    if entry.cls is not None:
        return [(entry.cls, entry.target.name.rpartition(".")[2])]
    inside = [(module, attribute) for attribute, value in vars(module).items() if value is entry.original]
    outside = [(owner, name) for owner, name, value in _attributes() if value is entry.original and owner is not module]
    if everywhere and entry.original.__module__ == module.__name__:
        return inside + outside
    if outside:
        others = ", ".join(f"{_name(owner)}.{attribute}" for owner, attribute in outside)
        remedy = f"patch {entry.original.__module__} to reach all"
        logger.warning("%s is replaced in %s, but not as %s: %s", entry.full_name, _name(module), others, remedy)
    return inside


def _warn_of_others(function: Callable, what: str, which: str) -> None:
    """Objects that hold `function` otherwise than as a module's attribute, where nothing can be put in its place."""
    namespaces = {id(vars(module)) for module in list(sys.modules.values()) if isinstance(module, types.ModuleType)}
    known = (_Found, _Place, Origin, types.FrameType)
    kinds = []
    for holder in gc.get_referrers(function):
        if isinstance(holder, known) or id(holder) in namespaces:
            continue
        kinds.append(type(holder).__name__)
    if kinds:
        held = ", ".join(sorted(set(kinds)))
        logger.warning("%s, but an object of type %s holds %s and keeps it", what, held, which)


def _attributes() -> Iterator[tuple[types.ModuleType, str, Any]]:
    """(module, attribute, value) of all imported modules but our own."""
    package = __name__.partition(".")[0]
    seen = set()
    for module in list(sys.modules.values()):
        if not isinstance(module, types.ModuleType) or id(module) in seen:
            continue
        seen.add(id(module))
        if str(vars(module).get("__name__", "")).partition(".")[0] != package:
            yield from ((module, attribute, value) for attribute, value in list(vars(module).items()))


def _ours_in(module: types.ModuleType, targets: Sequence[Target] | None = None) -> Iterator[tuple[str, Origin]]:
    """(name, origin) of what `module` holds that is ours: functions, and classes with a method of ours."""
    names = None if targets is None else {target.name for target in targets}
    for attribute, value in list(vars(module).items()):
        members = list(vars(value).values()) if isinstance(value, type) else [value]
        for member in members:
            origin = getattr(member, _MARK, None) if isinstance(member, types.FunctionType) else None
            if origin is not None and (names is None or member.__qualname__ in names):
                yield attribute, origin


def _name(owner: Any) -> str:
    return getattr(owner, "__name__", type(owner).__name__)
