"""Fused kernels for reinforcement learning of flow models: Triton on a GPU, the PyTorch reference elsewhere.

Importing touches no CUDA and compiles nothing. Ops are registered under `torch.ops.advgrpo_kernels`.
"""

from .ops.clipped_policy_loss import PolicyLoss, clipped_policy_loss, clipped_policy_loss_ref
from .ops.coefficients import ddim_coefficients, transition_coefficients
from .ops.gaussian_log_prob import gaussian_log_prob, gaussian_log_prob_ref
from .ops.gaussian_step import GaussianStep, gaussian_step, gaussian_step_ref
from .ops.group_advantages import Advantages, group_advantages, group_advantages_ref
from .ops.hinge_head_loss import HingeHeadLoss, hinge_head_loss
from .ops.patches import PatchSample, sample_patches, sample_patches_ref
from .ops.philox import philox_normal, philox_permutation, philox_words
from .ops.score_features import FeatureScore, score_features, score_features_ref

__all__ = [
    "Advantages",
    "FeatureScore",
    "GaussianStep",
    "HingeHeadLoss",
    "PatchSample",
    "PolicyLoss",
    "clipped_policy_loss",
    "clipped_policy_loss_ref",
    "ddim_coefficients",
    "gaussian_log_prob",
    "gaussian_log_prob_ref",
    "gaussian_step",
    "gaussian_step_ref",
    "group_advantages",
    "group_advantages_ref",
    "hinge_head_loss",
    "philox_normal",
    "philox_permutation",
    "philox_words",
    "sample_patches",
    "sample_patches_ref",
    "score_features",
    "score_features_ref",
    "transition_coefficients",
]
__version__ = "0.1.0"
