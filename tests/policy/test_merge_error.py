"""What merging takes from an adapter while it is young, at SD3.5-medium's width: the figures of docs/decisions.md.

A row of W is rounded by itself, so a part of the rows says what all of them would.
"""

from pathlib import Path

import pytest
import torch

from advgrpo.policy.fused.transformer import merge_error
from advgrpo_kernels import fp8_quantize, merge_lora

ROWS, WIDTH, RANK, SCALE = 64, 1536, 32, 2.0
DECISIONS = (Path(__file__).parents[2] / "docs/decisions.md").read_text()
STEPS = (1, 10, 200)


def adapters(learning_rate: float, *, one_direction: bool):
    """(A, B) after each of `STEPS` of AdamW, from PEFT's gaussian start.

    With `one_direction` W's gradient stays what it is, and the change grows as fast as it can; otherwise gradients are
    noise, and it grows as slowly.
    """
    generator = torch.Generator().manual_seed(0)
    a = torch.nn.Parameter(torch.randn(RANK, WIDTH, generator=generator) / RANK)
    b = torch.nn.Parameter(torch.zeros(ROWS, RANK))
    optimizer = torch.optim.AdamW([a, b], lr=learning_rate)
    gradient = torch.randn(ROWS, WIDTH, generator=generator)
    for step in range(1, STEPS[-1] + 1):
        with torch.no_grad():
            noise = (torch.randn(p.shape, generator=generator) for p in (a, b))
            a.grad, b.grad = (b.T @ gradient, gradient @ a.T) if one_direction else noise
        optimizer.step()
        if step in STEPS:
            yield a.detach(), b.detach()


@pytest.mark.parametrize("learning_rate", [3e-4, pytest.param(1e-4, marks=pytest.mark.weekly)])
def test_what_the_documentation_says_of_merging_young_adapters(learning_rate):
    weight = (0.02 * torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1))).bfloat16()
    errors, through = [], []
    for one_direction in (True, False):
        for a, b in adapters(learning_rate, one_direction=one_direction):
            plain, quantised = weight.clone(), fp8_quantize(weight)
            before = quantised.dequantize()
            merge_lora([weight], [a], [b], SCALE, outs=[plain], fp8=[quantised])
            errors += [merge_error(weight, (a, b), SCALE, merged).item() for merged in (plain, quantised)]
            change = SCALE * (b @ a)
            moved = plain.float() - weight.float(), quantised.dequantize() - before
            through += [((m * change).sum() / change.square().sum()).item() for m in moved]
    fast, slow = torch.tensor(errors).view(2, 3, 2)
    for i, dtype in enumerate(("bfloat16", "e4m3")):
        row = " | ".join(f"{f:.2g} to {s:.2g}" for f, s in zip(fast[:, i], slow[:, i]))
        assert f"| {learning_rate:.0e} | {dtype} | {row} |".replace("e-04", "e-4") in DECISIONS, row
    least = {3e-4: 0.99, 1e-4: 0.75}[learning_rate]  # a first change below half a unit of bfloat16 may vanish
    assert min(through) > least
    assert max(through) < 1.05
    assert min(through[2:6] + through[8:]) > 0.99
