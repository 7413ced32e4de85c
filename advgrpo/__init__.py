"""Reinforcement learning of text-to-image flow models with an adversarial reward.

    from advgrpo import Config, train
    result = train(Config.load("tiny", {"iterations": 20}))

`evaluate` and `generate` beside it. They do what the commands do, with the same settings, checks and errors, as often
as you like in one process. Importing this package imports no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from advgrpo.config import Config
    from advgrpo.evaluate import evaluate
    from advgrpo.generate import generate
    from advgrpo.train import Result, train
    from advgrpo.training.callbacks import Callback

__version__ = "0.1.0"
__all__ = ["Callback", "Config", "Result", "__version__", "evaluate", "generate", "train"]

_HOMES = {"Callback": "advgrpo.training.callbacks", "Config": "advgrpo.config", "Result": "advgrpo.train"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if name in ("evaluate", "generate", "train"):  # modules that are called (runtime/callable_module.py)
        return import_module(f"advgrpo.{name}")
    raise AttributeError(f"module 'advgrpo' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
