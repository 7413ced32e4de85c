"""Which preset a run's settings are nearest to, and where they differ from it."""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from advgrpo.config.config import Config, load
from advgrpo.config.explain import leaves
from advgrpo.config.reading import preset_names

# Where a run lies, on what it runs and what it says of itself: settings that are not of the method.
ELSEWHERE = ("output", "monitor", "data", "model.path", "output_dir", "seed", "device", "fast", "collective_timeout")
# What may differ between runs whose curves are compared: it changes neither what is trained nor on what that is judged,
# up to an iteration that both have reached; `fast` and `model.sequence_parallel` change rounding alone.
FREE_OF_CURVES = (
    "iterations",
    "global_steps",
    "seed",
    "output_dir",
    "device",
    "fast",
    "collective_timeout",
    "data.cache_dir",
    "data.decode_workers",
    "model.offload",
    "model.sequence_parallel",
    "rollout.decode_stream",
    "update.graphs",
    "output",
    "monitor",
    "evaluation.every",
    "evaluation.keep_best",
    "evaluation.stop_after",
    "evaluation.grid_prompts",
)


@dataclass(frozen=True)
class Change:
    """A setting with another value than the preset's."""

    name: str
    there: Any  # in the preset
    here: Any


def changes(config: Config, preset: str, *, ignoring: Collection[str] = ELSEWHERE) -> list[Change]:
    """Settings with other values than in the preset, but for those in `ignoring`, names or sections, and tokens."""
    return _differences(compared(config, ignoring), preset)


def nearest_preset(config: Config, *, ignoring: Collection[str] = ELSEWHERE) -> tuple[str, list[Change]]:
    """The preset with the fewest `changes`, the first by name among several, and these."""
    own = compared(config, ignoring)
    found = [(name, _differences(own, name)) for name in preset_names()]
    return min(found, key=lambda each: (len(each[1]), each[0]))


def compared(config: Config, ignoring: Collection[str]) -> dict[str, Any]:
    """The settings, by name, that `changes` looks at; values as JSON has them."""
    parts = tuple(f"{part}." for part in ignoring)
    own = _flat(config)
    return {name: own[name] for name in own if not f"{name}.".startswith(parts) and not name.endswith("token_file")}


def _differences(own: Mapping[str, Any], preset: str) -> list[Change]:
    theirs = _of_preset(preset)
    return [Change(name, theirs[name], value) for name, value in own.items() if value != theirs[name]]


@functools.cache
def _of_preset(name: str) -> dict[str, Any]:
    return _flat(load(preset=name))


@functools.cache
def _names() -> list[list[str]]:
    """Of every setting, part by part."""
    return [name.split(".") for name in leaves(Config)]


def _flat(config: Config) -> dict[str, Any]:
    settings, flat = config.model_dump(mode="json"), {}
    for parts in _names():
        value: Any = settings
        for part in parts:
            value = value[part]
        flat[".".join(parts)] = value
    return flat
