"""Fixed rewards by name. One reward per file; importing this package imports none of them.

What a reward offers is in `base.py`; a reward that learns is an adversary, in `advgrpo/adversary`.
"""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

from advgrpo.errors import UserError

if TYPE_CHECKING:
    import torch

    from advgrpo.rewards.base import Reward

# name -> (module, class)
REWARDS = {
    "aesthetic": ("aesthetic", "Aesthetic"),
    "clip": ("clip_similarity", "ClipSimilarity"),
    "clip_similarity": ("clip_similarity", "ClipSimilarity"),
    "clip_reference_similarity": ("clip_similarity", "ClipReferenceSimilarity"),
    "dino_similarity": ("dino_similarity", "DinoSimilarity"),
    "ocr": ("ocr", "OcrReward"),
    "pickscore": ("pickscore", "PickScore"),
    "remote": ("remote", "RemoteReward"),
    "rule": ("rule", "RuleReward"),
    "vlm_judge": ("vlm_judge", "VlmJudge"),
}


def reward_class(name: str) -> type:
    """The fixed reward registered under `name`; UserError naming the nearest for an unknown one."""
    if name not in REWARDS:
        near = difflib.get_close_matches(name, REWARDS, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(REWARDS))}"
        raise UserError(f"unknown reward {name!r}; {hint}")
    module, class_name = REWARDS[name]
    return getattr(import_module(f".{module}", __name__), class_name)


def prompt_options(name: str, metadata: Mapping[str, Mapping[str, Any]] | None) -> dict[str, Any]:
    """What the prompt file's `metadata`, by prompt, adds to the options of the reward `name`."""
    return {"metadata": metadata} if name == "remote" else {}


def build_reward(
    name: str,
    /,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    owner: str = "",
    **options: Any,
) -> Reward:
    """The reward `name` with its keyword options; `device` and `dtype` go to rewards that run a model.

    Errors call an option `owner`.OPTION, such as rewards.pickscore.path.

    Raises:
        UserError: an unknown reward, an option it does not have, or one it needs and did not get.
    """
    kind = reward_class(name)
    known = inspect.signature(kind).parameters
    for option in options:
        if option not in known:
            raise UserError(f"reward {name} has no option {option!r}; it has {', '.join(known) or 'none'}")
    absent = [key for key, p in known.items() if p.default is p.empty and key not in options]
    if absent:
        raise UserError(f"reward {name} needs the option{'s' * (len(absent) > 1)} {', '.join(absent)}")
    placement = {"device": device, **({} if dtype is None else {"dtype": dtype})}
    try:
        return kind(**{key: value for key, value in placement.items() if key in known}, **options)
    except UserError as error:
        raise UserError(in_section(str(error), options.get("name", name), owner)) from error


def in_section(message: str, name: str, owner: str) -> str:
    """A reward's own message, "pickscore.path = ..." or "reward remote: url = ...", with `owner` for the reward."""
    return re.sub(rf"^(?:reward {name}: |{name}\.)(?=\w+ = )", f"{owner}.", message) if owner else message
