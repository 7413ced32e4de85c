"""Whether an engine's steps are ours: one trajectory of its, step by step against the policy's own forward.

From the engine's latents x_k before a step the policy takes that one step itself, to x'_{k+1}, so errors do not add up
on the way, and each step has its own: rms(x_{k+1} - x'_{k+1}) / rms(x'_{k+1} - x_k), of a row. It is what guidance, the
schedule, the text, the adapters, their scale and the frozen weights do to a step.

What rounding explains, with u the unit roundoff of `model.dtype` (2^-9 of bfloat16, 2^-24 of float32):

    allowed = 64 u + u rms(x_k) / rms(x'_{k+1} - x_k)

The first term is of the networks: two correct implementations differ by some u, more with guidance by two predictions
(the tiny world's: up to 20 u in either dtype, at guidance 2 and 4.5). The second is of latents that the engine rounds
to its dtype after a step, as SGLang may in bfloat16: by u at most, of numbers that a short step hardly moves.

Shapes: R rows, T steps, latents [R, T + 1, C, H, W] float32, the last ones the images.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from advgrpo.policy.base import Policy
from advgrpo.runtime.transfer import to_device
from advgrpo.sampling.dynamics import step_table
from advgrpo.sampling.sampler import Sampler

_OF_NETWORK, _OF_LATENTS = 64.0, 1.0


@dataclass(frozen=True)
class Probe:
    """The step that is farthest from what rounding explains."""

    row: int
    step: int
    error: float
    allowed: float

    @property
    def agrees(self) -> bool:
        return self.error <= self.allowed

    def __str__(self) -> str:
        return (
            f"step {self.step} of row {self.row} differs by {self.error:.2g} of its length; allowed {self.allowed:.2g}"
        )


@torch.no_grad()
def compare(
    policy: Policy, prompt: str, latents: torch.Tensor, *, guidance: float, dtype: torch.dtype, tolerance: float = 0.0
) -> Probe:
    """The worst step of a trajectory of `prompt` by the policy's weights as they are, its adapters beside them.

    Args:
        latents: [R, T + 1, C, H, W], the engine's.
        dtype: of the networks.
        tolerance: allowed instead of what the module's docstring says; 0: that.
    """
    device, steps = policy.device, latents.shape[1] - 1
    sampler = Sampler(policy, guidance, "squared_error", share_prefix=False, merged=False, shared_noise=False)
    table, conditioning = step_table(policy, steps), policy.encode([prompt])
    rows = to_device(torch.zeros(len(latents), dtype=torch.int64), device)
    roundoff, all_errors, all_allowed = torch.finfo(dtype).eps / 2, [], []
    for step in range(steps):
        before, after = latents[:, step], latents[:, step + 1]
        initial = to_device(before.contiguous(), device)
        own = sampler.run(replace(table, taken=(step,)), conditioning, initial, rows)[0].cpu()
        length = _rms(own - before).clamp(min=torch.finfo(torch.float32).tiny)
        all_errors.append(_rms(after - own) / length)
        all_allowed.append(_OF_NETWORK * roundoff + _OF_LATENTS * roundoff * _rms(before) / length)
    errors, allowed = torch.stack(all_errors), torch.stack(all_allowed)  # [T, R]
    if tolerance:
        allowed = torch.full_like(errors, tolerance)
    excess = (errors / allowed).nan_to_num(nan=torch.inf)  # a forward that is not finite agrees with nothing
    step, row = divmod(int(excess.argmax()), len(latents))
    return Probe(row, step, float(errors[step, row]), float(allowed[step, row]))


def _rms(rows: torch.Tensor) -> torch.Tensor:
    """[R] of [R, ...]."""
    return rows.double().square().flatten(1).mean(1).sqrt()
