"""The policy gradient's iteration: whom an image is compared with, and one optimizer step per minibatch."""

import pytest
import torch

from advgrpo.training.scoring import ReferenceScores, Scored
from tests.sampling.test_rollout import build, changed, rollout_of


class EnoughError(Exception):
    pass


def test_an_image_is_compared_with_the_others_of_its_prompt(unit_config, monkeypatch):
    trainer = build(unit_config).trainer
    rollout, seen = rollout_of(trainer), []
    scored = trainer.objective.scorer.score(rollout, 0)
    scored.rewards = torch.tensor([0.0, 0.0, 0.0, 4.0, 10.0, 10.0, 10.0, 18.0])

    def accumulate(pieces, advantages, table, **settings):
        seen.append(advantages)
        raise EnoughError

    monkeypatch.setattr(trainer.updater, "accumulate", accumulate)
    with pytest.raises(EnoughError):
        trainer.objective.update(rollout, scored, trainer.objective.table(0), trainer.begin(0))
    assert (seen[0] > 0).nonzero().flatten().tolist() == [3, 7], "the best of each prompt, whatever the prompt's level"


def test_every_minibatch_takes_a_step(unit_config):
    """After the first step log-probabilities do move; that calls nothing off."""
    settings = changed(unit_config, micro_batch=2)
    settings.update.minibatches, settings.update.learning_rate = 2, 1e-2
    trainer = build(settings).trainer
    metrics = trainer.iterate()
    assert metrics["log_prob_mismatch_max"] == 0
    assert metrics["ratio_mean"] != 1, "the second minibatch is off-policy"
    assert trainer.ema.global_step == 2


def test_the_spread_that_is_logged_is_the_populations():
    rewards = torch.tensor([0.0, 2.0, 5.0, 5.0])
    scored = Scored(None, None, None, rewards, {"adversary": rewards}, None, None, {})
    assert scored.metrics(2)["reward_std"] == pytest.approx(0.5)


def test_what_references_get_depends_on_the_prompt_where_they_are_shared(tmp_path):
    """A style's images belong to all prompts, and each prompt asks something else of them."""

    class Length:
        def score(self, images, prompts, references):
            return torch.tensor([float(len(prompt)) for prompt in prompts])

    class Shared:
        def files(self, prompt):
            return [tmp_path / "one.png"]

        def content_key(self, file):
            return file.name

        def load_images(self, files, size=None):
            return torch.zeros(len(files), 3, *size)

    scores = ReferenceScores({"length": Length()}, Shared(), torch.device("cpu"))
    assert scores.columns(["a", "abc", "a"], (8, 8))["length"].tolist() == [1.0, 3.0, 1.0]
