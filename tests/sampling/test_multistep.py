"""`rollout.tail_solver dpm2`: DPM-Solver++ of second order after the window, beside MixGRPO's and an exact solution.

Bugs planted in a copy, each seen red: the correction with the other sign; h and h' swapped; the image seen two steps
before; the last step corrected; the image of one row for another's.
"""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from advgrpo.config import RolloutSection
from advgrpo.sampling import sampler as sampling
from advgrpo.sampling.dynamics import step_table
from advgrpo.sampling.multistep import corrections
from advgrpo.sampling.sampler import Sampler
from tests.sampling.toy import ToyGenerator, bent

GOLDEN = Path(__file__).parents[1] / "golden"
IDS = torch.arange(6)
ROW = torch.tensor([0, 0, 0, 1, 1, 1])


def drawn(policy, rollout, window, *, share=False, whole=False, graphs=None):
    """The latents of six images of two prompts, and their window's steps."""
    steps = len(policy.levels) - 1
    sampler = Sampler(policy, 1.0, "gaussian", share_prefix=share, merged=False, graphs=graphs, whole=whole)
    table = step_table(policy, steps, window, rollout=rollout)
    initial = sampler.initial_latents(3, torch.arange(2))
    return sampler.run(table, policy.encode(["a", "b"]), initial, ROW, noise_seed=5, image_ids=IDS)


def gaussian_flow(std: float):
    """The velocity of a rectified flow between noise and N(0, std²), of which x ∝ sqrt((1-σ)² std² + σ²) is the ODE's
    solution: linear in x."""

    def velocity(latents, sigma):
        return latents * (sigma - (1 - sigma) * std**2) / ((1 - sigma) ** 2 * std**2 + sigma**2)

    return velocity


def spread(sigma: float, std: float) -> float:
    return ((1 - sigma) ** 2 * std**2 + sigma**2) ** 0.5


def errors(solver: str, tails: list[int], std: float = 2.0) -> list[float]:
    """Of the images by so many steps after a window, beside the exact ones from where it ends."""
    steps = 193
    levels = torch.cat([torch.tensor([0.9]), torch.linspace(0.8, 0.0, steps)]).double()
    policy, found = ToyGenerator(levels, gaussian_flow(std)), []
    for tail in tails:
        rollout = RolloutSection(num_steps=steps, dynamics="flow_sde", tail_steps=tail, tail_solver=solver)
        latents, (step,) = drawn(policy, rollout, (0,))
        exact = step.next_latents * spread(0.0, std) / spread(0.8, std)
        found.append(((latents - exact).abs().max() / exact.abs().max()).item())
    return found


def test_the_error_falls_with_the_square_of_the_steps_length_and_eulers_with_the_length():
    tails = [12, 24, 48, 96]
    second, first = errors("dpm2", tails), errors("euler", tails)
    orders = [[np.log2(a / b) for a, b in pairwise(found)] for found in (second, first)]
    assert 1.8 < min(orders[0]) < max(orders[0]) < 2.2, orders
    assert 0.8 < min(orders[1]) < max(orders[1]) < 1.2, orders
    assert all(a < b / 3 for a, b in zip(second, first)), (second, first)


def given_noise(monkeypatch, noise: torch.Tensor) -> None:
    """Stochastic steps take the next of `noise` [steps, ...] instead of drawing."""
    real, left = sampling.gaussian_step, iter(noise)

    def step(*tensors, seed, sample_ids, **settings):
        drawn = {} if seed is None else {"noise": next(left)}
        return real(*tensors, **drawn, **settings)

    monkeypatch.setattr(sampling, "gaussian_step", step)


@pytest.mark.parametrize("solver", ["dpm2", "euler"])
def test_a_rollout_is_mix_grpo_flashs_own(monkeypatch, solver):
    """Window and tail of their code, on their levels: one more lies between any two, so that the tail is short."""
    golden = {name: torch.from_numpy(value) for name, value in np.load(GOLDEN / "flash_mix_grpo.npz").items()}
    window = tuple(golden["window"].tolist())
    before, after = golden["sigmas"][: window[-1] + 1], golden["sigmas"][window[-1] + 1 :]
    between = (after[:-1] + after[1:]) / 2
    levels = torch.cat([before, torch.stack([after[:-1], between], 1).flatten(), after[-1:]])
    policy = ToyGenerator(levels, bent)
    rollout = RolloutSection(
        num_steps=len(levels) - 1,
        dynamics="flow_sde",
        eta=float(golden["eta"]),
        tail_steps=len(after) - 1,
        tail_solver=solver,
    )
    given_noise(monkeypatch, golden["noise"])
    sampler = Sampler(policy, 1.0, "gaussian", share_prefix=False, merged=False, shared_noise=False)
    table = step_table(policy, rollout.num_steps, window, rollout=rollout)
    rows = torch.arange(len(golden["latents"][0]))
    text = policy.encode(["a"] * len(rows))
    latents, steps = sampler.run(table, text, golden["latents"][0], rows, image_ids=rows)
    for step in steps:
        torch.testing.assert_close(step.next_latents, golden["latents"][step.step + 1], rtol=0, atol=2e-6)
    far = (latents - golden["latents"][-1]).abs().max()
    assert far < 5e-6 if solver == "dpm2" else far > 1e-2


def test_a_step_from_pure_noise_and_the_step_to_the_image_are_of_first_order():
    sigma = torch.tensor([1.0, 0.9, 0.7, 0.4, 0.0], dtype=torch.float64)
    assert corrections(1 - sigma, sigma).tolist() == [0, pytest.approx(0.198862, abs=1e-6)]
    policy = ToyGenerator(torch.linspace(1, 0, 9), bent)
    rollout = RolloutSection(num_steps=8, dynamics="flow_sde", tail_steps=3, tail_solver="dpm2")
    table = step_table(policy, 8, (1,), rollout=rollout)
    assert table.taken == (0, 1, 2, 4, 6)
    assert table.second_order.steps == (2, 4)
    assert (table.second_order.corrections > 0).tolist() == [i in (2, 4) for i in range(8)]
    assert step_table(policy, 8, (5,), rollout=rollout).second_order is None, "three steps are left, all of them taken"


def test_of_a_model_that_predicts_noise_the_steps_are_ddims_and_the_solvers():
    """An image that does not change along the way is found exactly; the correction is what the formula says."""
    levels = torch.tensor([0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 0.85, 0.95, 1.0], dtype=torch.float64)
    still = torch.full((2, 3, 3), 0.7)

    def noise_of(latents, level):
        return (latents - level**0.5 * still) / (1 - level) ** 0.5

    rollout = RolloutSection(num_steps=8, dynamics="ddim", eta=0.5, tail_steps=3, tail_solver="dpm2")
    latents, _ = drawn(ToyGenerator(levels, noise_of, prediction_type="epsilon"), rollout, (1,))
    torch.testing.assert_close(latents, still.expand_as(latents), rtol=0, atol=1e-5)
    alpha, sigma = levels.sqrt(), (1 - levels).sqrt()
    table = step_table(ToyGenerator(levels, bent, prediction_type="epsilon"), 8, (1,), rollout=rollout)
    ratio = (alpha / sigma).log()
    h, before = ratio[4] - ratio[2], ratio[2] - ratio[1]
    expected = alpha[4] * (1 - (-h).exp()) * h / (2 * before)
    assert table.second_order.corrections[2].item() == pytest.approx(expected.item(), rel=1e-6)
