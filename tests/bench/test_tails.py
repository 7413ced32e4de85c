"""`bench.tails` on an untrained model: a tail of all steps agrees with itself, a short one costs what its rows say."""

import pytest

from bench import tails
from tests.sampling.test_rollout import changed


def test_tails_are_measured_beside_all_steps_on_the_same_draws(unit_config):
    window = {"order": "fixed", "steps": [0, 1]}
    settings = changed(unit_config, num_steps=8, initial_noise="per_image", window=window)
    settings.data.held_out_prompts = ""
    whole, short = tails.measured(settings, [6, 2], ["euler"], after=0, iterations=3)
    assert (whole.rows, whole.tau.mean) == (1.0, 1.0)
    assert short.rows == pytest.approx(4 / 8)
    assert -1 <= short.tau.low <= short.tau.mean < 1


def test_an_objective_without_a_window_is_refused(unit_config):
    settings = changed(unit_config, initial_noise="per_image")
    settings.update.objective, settings.data.held_out_prompts = "nft", ""
    with pytest.raises(tails.UserError, match=r"update\.objective = nft has no window: want policy"):
        tails.measured(settings, [2], ["euler"], after=0, iterations=1)
