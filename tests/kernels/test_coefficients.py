"""Coefficients against the public implementations and against the marginals they must keep.

Planted bugs that turned this file red: another σ* in the first flow_sde step; sqrt(-dt) dropped from s; std for std² in
flow_cps' r; the drift weighted by the next σ; σ* taken from σ' although sigma_max is given; std of a step for step_std.
"""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from advgrpo_kernels import ddim_coefficients, step_coefficients, step_std, transition_coefficients

GOLDEN = Path(__file__).parents[1] / "golden"
RECORDINGS = {
    "flow_sde": "flow_sde_flow_grpo.npz",
    "flow_cps": "flow_cps_adv_grpo.npz",
    "dance_sde": "dance_sde_flow_factory.npz",
}
SIGMAS = [1.0, 0.9, 0.7, 0.4, 0.0]


@pytest.mark.parametrize("dynamics", RECORDINGS)
def test_mean_of_the_public_implementations(dynamics):
    golden = np.load(GOLDEN / RECORDINGS[dynamics])
    table = transition_coefficients(golden["sigmas"], dynamics=dynamics, noise_level=float(golden["noise_level"]))
    assert table.shape == (10, 3)
    assert table.dtype == torch.float32
    for t, (a, b, s) in enumerate(table):
        mean = a * torch.from_numpy(golden[f"{t}_latents"]) + b * torch.from_numpy(golden[f"{t}_velocity"])
        torch.testing.assert_close(mean, torch.from_numpy(golden[f"{t}_mean"]), rtol=1e-5, atol=2e-6)
        assert golden[f"{t}_sigma"] == golden["sigmas"][t]
        assert golden[f"{t}_sigma_next"] == golden["sigmas"][t + 1]
        if f"{t}_std_dev_t" in golden:
            now, after = float(golden["sigmas"][t]), float(golden["sigmas"][t + 1])
            std = step_std(now, after, dynamics=dynamics, noise_level=float(golden["noise_level"]))
            assert std.item() == pytest.approx(golden[f"{t}_std_dev_t"][0], rel=1e-5, abs=1e-12)
            dt = 1.0 if dynamics == "flow_cps" else float(golden["sigmas"][t] - golden["sigmas"][t + 1])
            assert s.item() == pytest.approx(golden[f"{t}_std_dev_t"][0] * math.sqrt(dt), rel=1e-5)


@pytest.mark.parametrize("dynamics", ["flow_sde", "dance_sde", "flow_cps"])
def test_zero_noise_is_the_ode_step_exactly(dynamics):
    ode = transition_coefficients(SIGMAS, dynamics="ode", noise_level=0.7)
    mixed = transition_coefficients(SIGMAS, dynamics=dynamics, noise_level=[0.0, 0.7, 0.0, 0.0])
    assert torch.equal(mixed[[0, 2, 3]], ode[[0, 2, 3]])
    assert mixed[1, 2] > 0


def test_flow_cps_keeps_the_marginal():
    """Flow-CPS: for x = (1-σ)·x0 + σ·ε and v = ε - x0, a·x + b·v = (1-σ')·x0 + r·ε with r² + s² = σ'²."""
    table = transition_coefficients(SIGMAS, dynamics="flow_cps", noise_level=0.8).double()
    for (a, b, s), now, after in zip(table, SIGMAS, SIGMAS[1:]):
        signal, noise = a * (1 - now) - b, a * now + b
        assert signal.item() == pytest.approx(1 - after, abs=1e-6)
        assert (noise**2 + s**2).item() == pytest.approx(after**2, abs=1e-6)


def test_sequences_and_tensors_give_the_same_table():
    from_list = transition_coefficients(SIGMAS, dynamics="flow_sde", noise_level=0.5)
    sigmas = torch.tensor(SIGMAS, dtype=torch.float64)
    assert torch.equal(
        from_list, transition_coefficients(sigmas, dynamics="flow_sde", noise_level=torch.full((4,), 0.5))
    )


@pytest.mark.parametrize("dynamics", ["ode", "flow_sde", "dance_sde", "flow_cps"])
def test_single_steps_are_rows_of_the_table(dynamics):
    """In any order, each with its own noise level; the schedule they come from is never seen."""
    levels = [0.3, 0.7, 0.0, 0.9]
    table = transition_coefficients(SIGMAS, dynamics=dynamics, noise_level=levels)
    order = [2, 0, 3, 1]
    columns = torch.tensor([SIGMAS[:-1], SIGMAS[1:], levels], dtype=torch.float64)[:, order]
    rows = step_coefficients(columns[0], columns[1], dynamics=dynamics, noise_level=columns[2])
    assert torch.equal(rows, table[order])
    assert step_coefficients(0.7, 0.4, dynamics=dynamics, noise_level=0.5).shape == (3,)


def test_sigma_max_stands_in_where_sigma_is_one():
    """UniRL passes 0.99 whatever the schedule."""
    rows = step_coefficients([1.0, 0.9], [0.9, 0.7], dynamics="flow_sde", noise_level=0.5, sigma_max=0.99)
    std = [0.5 * math.sqrt(1 / 0.01), 0.5 * math.sqrt(0.9 / 0.1)]
    assert rows[:, 2].tolist() == pytest.approx([std[0] * math.sqrt(0.1), std[1] * math.sqrt(0.2)], rel=1e-5)
    got = step_std([1.0, 0.9], [0.9, 0.7], dynamics="flow_sde", noise_level=0.5, sigma_max=0.99)
    assert got.tolist() == pytest.approx(std, rel=1e-5)


def test_standard_deviation_as_flow_grpo_reports_it():
    assert step_std(0.7, 0.4, dynamics="dance_sde", noise_level=0.5).item() == pytest.approx(0.5)
    assert step_std(0.7, 0.4, dynamics="flow_cps", noise_level=1.0).item() == pytest.approx(0.4)
    assert step_std(0.7, 0.4, dynamics="ode", noise_level=1.0).item() == 0.0


def test_steps_outside_the_formulas_are_nan_where_they_have_no_value():
    """Single steps are not looked at: repeated σ give s = 0, inverted ones a mean but no s."""
    rows = step_coefficients([0.7, 0.4], [0.7, 0.7], dynamics="flow_sde", noise_level=0.5)
    assert rows[0].tolist() == [1.0, 0.0, 0.0]
    assert rows[1].isnan().tolist() == [False, False, True]


def test_ddim_recovers_the_clean_and_the_next_marginal():
    """DDIM: x = sqrt(ᾱ)·x0 + sqrt(1-ᾱ)·ε maps to sqrt(ᾱ')·x0 + r·ε with r² + s² = 1-ᾱ'."""
    now, after = torch.tensor([0.1, 0.5, 0.9]).double(), torch.tensor([0.3, 0.8, 1.0]).double()
    a, b, s = ddim_coefficients(now, after, 0.6).double().unbind(-1)
    torch.testing.assert_close(a * now.sqrt(), after.sqrt(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close((a * (1 - now).sqrt() + b) ** 2 + s**2, 1 - after, rtol=1e-5, atol=1e-6)
    assert ddim_coefficients(0.5, 0.8, 0.0).tolist()[2] == 0.0


@pytest.mark.parametrize(
    ("sigmas", "settings", "message"),
    [
        ([1.0, 0.5], {"dynamics": "ode", "noise_level": 0.0}, "to exactly 0"),
        ([1.0, 0.5, 0.5, 0.0], {"dynamics": "ode", "noise_level": 0.0}, "strictly decreasing"),
        (SIGMAS, {"dynamics": "sde", "noise_level": 0.0}, "dynamics must be one of"),
        (SIGMAS, {"dynamics": "flow_sde", "noise_level": [0.1, 0.2]}, "one float per step"),
        (SIGMAS, {"dynamics": "flow_cps", "noise_level": 1.5}, "noise_level must lie in"),
        (SIGMAS, {"dynamics": "flow_sde", "noise_level": float("nan")}, "noise_level must lie in"),
    ],
)
def test_bad_arguments_raise(sigmas, settings, message):
    with pytest.raises(ValueError, match=message):
        transition_coefficients(sigmas, **settings)
    with pytest.raises(ValueError, match="dynamics must be one of"):
        step_coefficients(0.7, 0.4, dynamics="sde", noise_level=0.5)


def test_bad_ddim_arguments_raise():
    with pytest.raises(ValueError, match="towards less noise"):
        ddim_coefficients(0.8, 0.5, 0.0)
    with pytest.raises(ValueError, match="noise_level must lie in"):
        ddim_coefficients(0.5, 0.8, 1.2)
