"""Reinforcement learning of text-to-image flow models with an adversarial reward.

    from advgrpo import Config, train
    result = train(Config.load("tiny", {"iterations": 20}))

`train`, `evaluate` and `generate` are described in `advgrpo.api`; importing this package imports no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from advgrpo.api import Result, evaluate, generate, train
    from advgrpo.config import Config
    from advgrpo.training.callbacks import Callback

__version__ = "0.1.0"
__all__ = ["Callback", "Config", "Result", "__version__", "evaluate", "generate", "train"]

_HOMES = {"Callback": "advgrpo.training.callbacks", "Config": "advgrpo.config", "Result": "advgrpo.api"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if name in ("evaluate", "generate", "train"):  # modules that are called (runtime/callable_module.py)
        return import_module(f"advgrpo.{name}")
    raise AttributeError(f"module 'advgrpo' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
