"""What the integration tests share: the schedule of the recordings and the peers' formulas, written out plainly.

The formulas go by the predicted clean image x0 and noise x1, not by the coefficients (a, b, s) of the kernels.
"""

import math
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

GOLDEN = Path(__file__).parents[1] / "golden"


def recording(name: str, t: int) -> SimpleNamespace:
    """Step t of a recording: latents, velocity, next_latents, mean, log_prob, grad_velocity, std_dev_t."""
    golden = np.load(GOLDEN / name)
    values = {key[2:]: torch.from_numpy(golden[key]) for key in golden if key.startswith(f"{t}_")}
    return SimpleNamespace(**values, noise_level=float(golden["noise_level"]))


def sd3_scheduler():
    """diffusers' scheduler as the recordings used it; its sigmas are theirs."""
    pytest.importorskip("diffusers")
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    return scheduler


def module_with(**members) -> ModuleType:
    """A module as a peer's: functions and classes under their names."""
    module = ModuleType("peer")
    vars(module).update(members)
    return module


def flow_mean(x, v, now, after, diffusion):
    """Reverse SDE of a rectified flow in float64: drift v + g²/(2σ)·(score term), g the diffusion coefficient."""
    x, v = x.double(), v.double()
    x1 = x + (1 - now) * v  # the predicted noise; the score is -x1/σ
    return x + (after - now) * (v + diffusion**2 / (2 * now) * x1)


def cps_mean(x, v, now, after, std):
    x, v = x.double(), v.double()
    x0, x1 = x - now * v, x + (1 - now) * v
    return (1 - after) * x0 + math.sqrt(after**2 - std**2) * x1


def gaussian_log_prob(x_next, mean, std):
    normal = torch.distributions.Normal(mean, std)
    return normal.log_prob(x_next.double()).flatten(1).mean(1)


def batch(shape=(3, 4, 6, 6)):
    return torch.randn(shape), torch.randn(shape)


def close(got, expected, **tolerance):
    torch.testing.assert_close(got.double(), expected.double(), **{"rtol": 1e-5, "atol": 4e-6, **tolerance})
