"""Whether a replacement gives what the original gives, found out by running both on small seeded inputs.

A signature says nothing about dynamics, constants or rounding, and codebases change all three under an old name. So
`differences` runs every case of an integration on the CPU with both functions and compares each output, the gradients
and where the random numbers stand afterwards. An intended difference is a `Tolerance` with its reason, as data.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from .._runtime import reference_only

Outputs = Mapping[str, "torch.Tensor | None"]


class Tolerance(NamedTuple):
    """|ours - theirs| may be at most `absolute` + `relative` · max |theirs|, NaN and infinities in the same places."""

    absolute: float
    relative: float
    why: str = ""

    def __str__(self) -> str:
        return f"{self.absolute:g} + {self.relative:g} of the largest value" + (f" ({self.why})" if self.why else "")


# Float32 originals round every factor, the replacements once per coefficient. On the inputs of `_cases` and all
# codebases of tests/peers that is at most 2e-6 of the largest value; a missing rounding or constant is 1e-4 and more.
FLOAT32 = Tolerance(5e-6, 1e-5)
EXACT = Tolerance(0.0, 0.0)


@dataclass(frozen=True)
class Case:
    """One call of the function: `run(function)` returns its outputs under names."""

    name: str
    run: Callable[[Callable], Outputs]
    tolerances: Mapping[str, Tolerance] = field(default_factory=dict)  # by output; FLOAT32 for those not named


class Difference(NamedTuple):
    """The first output in which two functions disagree."""

    case: str
    text: str


def compare(original: Callable, replacement: Callable, cases: Iterable[Case]) -> tuple[Difference | None, int]:
    """The first difference and the number of cases that agree; torch's global random numbers are left as they were."""
    agreeing = 0
    with _isolated():
        for case in cases:
            text = _difference(original, replacement, case)
            if text is not None:
                return Difference(case.name, text), agreeing
            agreeing += 1
    return None, agreeing


def _difference(original: Callable, replacement: Callable, case: Case) -> str | None:
    answers = []
    for whose, function in (("the original", original), ("its replacement", replacement)):
        try:
            answers.append(case.run(function))
        except Exception as error:
            return f"{whose} fails with {type(error).__name__}: {error}"
    theirs, ours = answers
    if theirs.keys() != ours.keys():
        return f"the original returns {', '.join(theirs)}, its replacement {', '.join(ours)}"
    for name, value in theirs.items():
        text = unequal(value, ours[name], case.tolerances.get(name, FLOAT32))
        if text is not None:
            return f"{name}: {text}"
    return None


def unequal(theirs: torch.Tensor | None, ours: torch.Tensor | None, tolerance: Tolerance) -> str | None:
    """What is wrong with `ours` beside `theirs`; None where they agree."""
    if theirs is None or ours is None:
        return None if theirs is ours else f"the original gives {_form(theirs)}, its replacement {_form(ours)}"
    if theirs.shape != ours.shape or theirs.dtype != ours.dtype:
        return f"the original gives {_form(theirs)}, its replacement {_form(ours)}"
    theirs, ours = theirs.detach().double(), ours.detach().double()
    finite = theirs.isfinite()
    others = [value[~finite].nan_to_num() for value in (theirs, ours)]
    if not torch.equal(finite, ours.isfinite()) or not torch.equal(*others):
        return f"NaN or infinite in other places: {theirs.flatten()[:4].tolist()} against {ours.flatten()[:4].tolist()}"
    if not bool(finite.any()):
        return None
    largest = (ours[finite] - theirs[finite]).abs().max().item()
    if largest <= tolerance.absolute + tolerance.relative * theirs[finite].abs().max().item():
        return None
    return f"largest difference {largest:.3g}, tolerance {tolerance}"


def _form(value: torch.Tensor | None) -> str:
    return "None" if value is None else f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"


@contextlib.contextmanager
def _isolated() -> Generator[None, None, None]:
    """Float32 on the CPU with gradients, whatever the caller has set; its random numbers are put back."""
    generator = torch.default_generator  # not manual_seed(), which also seeds every GPU
    state, dtype, silenced = generator.get_state(), torch.get_default_dtype(), logging.root.manager.disable
    torch.set_default_dtype(torch.float32)
    logging.disable(logging.WARNING)  # a step without a log-prob warns, here of a call that the caller never made
    modes: list[Any] = [torch.device("cpu"), torch.inference_mode(False), torch.enable_grad()]
    modes += [torch.autocast("cpu", enabled=False), reference_only()]
    try:
        with contextlib.ExitStack() as stack:
            for mode in modes:
                stack.enter_context(mode)
            yield
    finally:
        torch.set_default_dtype(dtype)
        logging.disable(silenced)
        generator.set_state(state)
