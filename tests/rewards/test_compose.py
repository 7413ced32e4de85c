"""One reward out of several: what a weight weighs, and whose lowest total a barred image gets."""

import pytest
import torch

from advgrpo.config import RewardSection
from advgrpo.rewards.compose import compose


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
