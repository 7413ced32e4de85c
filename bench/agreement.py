"""Does an op give the right numbers at the very shapes that are timed? One call, no test suite, few kernels to compile.

Ours, and plain PyTorch in the same dtypes, are both held against float64 on the same inputs: ours may be off by at most
`SLACK` times what PyTorch is off, plus `FLOOR` of the largest value.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from .workload import Bench, Workload

SLACK = {"fp8_linear": 4.0}  # the tensor cores' fast accumulation keeps fewer bits than float32
DEFAULT_SLACK = 2.0
FLOOR = 1e-5  # of the largest true value: products in three tf32 parts, sums in another order


@dataclass(frozen=True)
class Agreement:
    """The output of a case that is furthest from float64, relative to its largest value."""

    error: float
    of_pytorch: float  # what plain PyTorch is off there
    allowed: float

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed


def agreement(case: str, build: Callable[[Bench], Workload], bench: Bench) -> Agreement:
    """One call of case `case` against float64; an output that is not finite, or of another shape, is infinitely off."""
    torch.manual_seed(0)
    workload = build(bench)
    ours, plain = tensors(workload.ours()), tensors((workload.same or workload.eager)())
    torch.manual_seed(0)
    exact = build(replace(bench, exact=True))
    true = tensors((exact.same or exact.eager)())
    slack = SLACK.get(case, DEFAULT_SLACK)
    if len(ours) != len(true) or any(a.shape != b.shape for a, b in zip(ours, true)):
        return Agreement(float("inf"), 0.0, FLOOR)
    found = []
    for got, eager, expected in zip(ours, plain, true):
        largest = max(expected.abs().max().item(), 1e-30)
        errors = [_distance(t, expected) / largest for t in (got, eager)]
        found.append(Agreement(*errors, slack * errors[1] + FLOOR))
    return max(found, key=lambda one: one.error / one.allowed)


def tensors(result) -> list[torch.Tensor]:
    """The tensors of a result of an op, in order, in float64."""
    if torch.is_tensor(result):
        return [result.detach().float().double() if result.itemsize == 1 else result.detach().double()]
    return [tensor for part in result for tensor in tensors(part)]


def _distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    furthest = (found - expected).abs().max().item()
    return furthest if furthest == furthest else float("inf")
