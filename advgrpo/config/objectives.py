"""What each objective (`update.objective`) asks of a run. A new one is an entry here and a class in `training/`.

Everybody who would ask for an objective's name asks for one of these instead.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ObjectiveTraits:
    """What a run prepares for an objective, and what it must not be given."""

    loss: str  # its metric, which iterations that do not train the generator have not
    described: str = ""  # in a model card; "": by its rewards
    method: str = "GRPO"  # the name of learning from rewards so, in a model card
    uses_rewards: bool = True  # fixed rewards and, where one is set, the adversary are loaded and trained on
    samples_images: bool = True  # the generator draws while it trains, so that there are images to look at
    compares_groups: bool = True  # images of one prompt with each other
    learns_from_references: bool = False  # whatever the rewards are: it cannot do without them, and encodes them
    forward_process: str = ""  # learns from clean latents, noised again, without a window; its section of settings
    old_policy: bool = False  # which draws, beside the one that is trained
    fits_velocity: bool = False  # its loss is a rectified flow's, which other models do not have
    has_window: bool = True  # some of the sampler's steps are stochastic, and trained on by their likelihoods
    not_looked_at: tuple[tuple[str, object], ...] = ()  # settings of section `update`, each with its plain value


# settings of the loss by likelihoods, with what they are where nothing is asked
_OF_WINDOWS = (
    ("trust_region", "ratio"),
    ("step_weights", "uniform"),
    ("policy_weight", 1.0),
    ("kl_space", "latent"),
    ("informative_share", 1.0),
    ("skip_dead_groups", False),
)
_OF_LIKELIHOODS = (*_OF_WINDOWS, ("kl_to", "base"), ("teacher", ""))

OBJECTIVES: dict[str, ObjectiveTraits] = {
    "policy": ObjectiveTraits(loss="policy_loss"),
    "nft": ObjectiveTraits(
        loss="nft_loss",
        method="DiffusionNFT",
        forward_process="nft",
        old_policy=True,
        fits_velocity=True,
        has_window=False,
        not_looked_at=(
            ("old_log_prob", "rollout"),
            ("kl_variance", "step"),
            *_OF_LIKELIHOODS,
        ),
    ),
    "awm": ObjectiveTraits(
        loss="awm_loss",
        method="AWM",
        forward_process="awm",
        fits_velocity=True,
        has_window=False,
        not_looked_at=(
            ("old_log_prob", "rollout"),
            ("kl_variance", "step"),
            *_OF_WINDOWS,
        ),
    ),
    "sft": ObjectiveTraits(
        loss="sft_loss",
        described="supervised fine-tuning on reference images",
        uses_rewards=False,
        samples_images=False,
        compares_groups=False,
        learns_from_references=True,
        fits_velocity=True,
        has_window=False,
        not_looked_at=(
            ("kl_weight", 0.0),
            ("old_log_prob", "rollout"),
            *_OF_LIKELIHOODS,
        ),
    ),
}
