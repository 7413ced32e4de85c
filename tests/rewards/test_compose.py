"""One reward out of several: what a weight weighs, and whose lowest total a barred image gets."""

from pathlib import Path

import numpy as np
import pytest
import torch

from advgrpo.config import RewardSection
from advgrpo.rewards import compose as composing
from advgrpo.rewards.compose import compose
from advgrpo_kernels import group_advantages

GOLDEN = Path(__file__).parents[1] / "golden"


def test_a_weight_is_that_of_the_normalised_reward():
    """Weighted before, a reward would be normalised to what it is without a weight."""
    rewards = {"adversary": torch.tensor([1.0, 3.0, 5.0, 9.0]), "rule": torch.tensor([1.0, 0.0, 0.0, 1.0])}
    sections = {"adversary": RewardSection(weight=3, normalize="group"), "rule": RewardSection(weight=2)}
    expected = torch.tensor([-3.0 + 2, 3.0, -3.0, 3.0 + 2])
    torch.testing.assert_close(compose(rewards, sections, 2), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("barred", range(4))
def test_a_barred_image_gets_the_lowest_total_of_its_own_group(barred):
    rewards = {"rule": torch.tensor([2.0, 1.0, 20.0, 10.0]), "ocr": torch.ones(4)}
    rewards["ocr"][barred] = 0.5
    sections = {"rule": RewardSection(weight=1), "ocr": RewardSection(gate=1.0)}
    expected = rewards["rule"].clone()
    expected[barred] = 1.0 if barred < 2 else 10.0
    assert torch.equal(compose(rewards, sections, 2), expected)


@pytest.mark.parametrize(("eps", "tolerance"), [(1e-12, 1e-5), (1e-4, 1e-2)])
def test_rewards_normalised_by_group_and_advantages_over_the_iteration_are_gdpo(monkeypatch, eps, tolerance):
    """Flow-Factory adds nothing to a standard deviation, here 1e-4 is: of rewards whose spread in a group is .05."""
    golden = {name: torch.from_numpy(value) for name, value in np.load(GOLDEN / "gdpo_flow_factory.npz").items()}
    monkeypatch.setattr(composing, "_EPS", eps)
    rewards = dict(zip("abc", golden["rewards"]))
    sections = {
        name: RewardSection(weight=weight, normalize="group") for name, weight in zip("abc", golden["weights"].tolist())
    }
    total = compose(rewards, sections, 8)
    got = group_advantages(total, golden["groups"], std="global", eps=eps, clip=None).advantages
    expected = golden["advantages"].float()
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
    assert not got[golden["groups"] == 2].any(), "a group that agrees in every reward"
    one_sum = sum(weight * rewards[name] for name, weight in zip("abc", golden["weights"]))
    summed = group_advantages(one_sum, golden["groups"], std="group", clip=None).advantages
    assert (summed - expected).abs().max() > 0.5, "another thing than normalising the sum"
