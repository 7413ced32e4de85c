"""The audit of a backbone trains the preset's adversary and reads its reward.

Bugs planted in a copy, each seen red: the two sides swapped; no updates; a margin against the prompt's own name.
"""

import torch

from advgrpo import config
from advgrpo.adversary.feature_head import FeatureHeadAdversary
from advgrpo.tiny.scenes import NAMES, Scene
from advgrpo.types import Features
from tools.tiny import audit_backbone as audit


class Near:
    """A judge that finds the first name .25 nearer than all others, and the second .125."""

    def nearness(self, features, scene):
        near = torch.zeros(len(features), len(NAMES))
        near[:, 0], near[:, 1] = 0.25, 0.125
        return near, near


def drawn(count: int, shift: float) -> Features:
    """Features of which a part is shifted."""
    found = torch.randn(count, 1280)
    found[:, :64] += shift
    return Features({"cls": found, "patches": found[:, None]})


def test_the_presets_adversary_learns_to_tell_the_sides_apart():
    section = audit.adversary_section("judge")
    assert section == config.load(preset="tiny").adversary.model_copy(update={"num_patches": 1})
    assert audit.adversary_section("here").backbone == "here"
    adversary = audit.adversary_on(section, Near(), seed=0)
    assert type(adversary) is FeatureHeadAdversary
    generated, references = drawn(64, -1.0), drawn(64, 1.0)
    before = audit.rewards(adversary, references).mean() - audit.rewards(adversary, generated).mean()
    audit.learn(adversary, generated, references, 40)
    own, theirs = (audit.rewards(adversary, drawn(32, shift)) for shift in (-1.0, 1.0))
    assert (theirs > own).float().mean() > 0.9
    assert theirs.mean() - own.mean() > before + 0.1


def test_a_margin_is_the_lead_over_the_nearest_other_name():
    scenes = [Scene(name, "large", "", "blue") for name in NAMES[:3]]
    assert audit.margins(Near(), torch.zeros(3, 1280), scenes).tolist() == [0.125, -0.125, -0.25]


def test_correlation_is_within_groups():
    level = torch.arange(4.0).repeat_interleave(audit.GROUP) * 100
    inside = torch.arange(audit.GROUP).float().repeat(4)
    assert abs(audit.within_groups(level + inside, -level + inside) - 1) < 1e-4
    assert abs(audit.within_groups(level + inside, level - inside) + 1) < 1e-4
