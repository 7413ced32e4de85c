"""Fused kernels for reinforcement learning of flow models: Triton on a GPU, the PyTorch reference elsewhere.

Importing touches no CUDA and compiles nothing. Ops are registered under `torch.ops.advgrpo_kernels`, in a build for the
Hugging Face hub under a name of its own (`_ops.py`).
"""

from . import layers
from .ops.ada_layer_norm import ada_layer_norm, ada_layer_norm_ref
from .ops.clipped_policy_loss import PolicyLoss, clipped_policy_loss, clipped_policy_loss_ref
from .ops.coefficients import ddim_coefficients, step_coefficients, step_std, transition_coefficients
from .ops.fp8 import Fp8Tensor, fp8_linear, fp8_linear_ref, fp8_quantize, fp8_quantize_ref
from .ops.gated_residual import gated_residual, gated_residual_ref
from .ops.gaussian_log_prob import gaussian_log_prob, gaussian_log_prob_ref
from .ops.gaussian_step import GaussianStep, gaussian_step, gaussian_step_ref
from .ops.gelu import gelu, gelu_ref
from .ops.group_advantages import Advantages, group_advantages, group_advantages_ref
from .ops.group_norm import group_norm, group_norm_ref
from .ops.hinge_head_loss import HingeHeadLoss, hinge_head_loss
from .ops.linear import linear, linear_ref, matrix_product, matrix_product_ref
from .ops.merge_lora import merge_lora, merge_lora_ref
from .ops.multi_tensor_adamw import multi_tensor_adamw, multi_tensor_adamw_ref
from .ops.patches import PatchSample, sample_patches, sample_patches_ref
from .ops.philox import philox_integers, philox_normal, philox_permutation, philox_words
from .ops.qk_rms_norm import AttentionInputs, qk_rms_norm, qk_rms_norm_ref
from .ops.score_features import FeatureScore, score_features, score_features_ref
from .ops.small_attention import small_attention, small_attention_ref
from .ops.swiglu import swiglu, swiglu_ref

__all__ = [
    "Advantages",
    "AttentionInputs",
    "FeatureScore",
    "Fp8Tensor",
    "GaussianStep",
    "HingeHeadLoss",
    "PatchSample",
    "PolicyLoss",
    "ada_layer_norm",
    "ada_layer_norm_ref",
    "clipped_policy_loss",
    "clipped_policy_loss_ref",
    "ddim_coefficients",
    "fp8_linear",
    "fp8_linear_ref",
    "fp8_quantize",
    "fp8_quantize_ref",
    "gated_residual",
    "gated_residual_ref",
    "gaussian_log_prob",
    "gaussian_log_prob_ref",
    "gaussian_step",
    "gaussian_step_ref",
    "gelu",
    "gelu_ref",
    "group_advantages",
    "group_advantages_ref",
    "group_norm",
    "group_norm_ref",
    "hinge_head_loss",
    "layers",
    "linear",
    "linear_ref",
    "matrix_product",
    "matrix_product_ref",
    "merge_lora",
    "merge_lora_ref",
    "multi_tensor_adamw",
    "multi_tensor_adamw_ref",
    "philox_integers",
    "philox_normal",
    "philox_permutation",
    "philox_words",
    "qk_rms_norm",
    "qk_rms_norm_ref",
    "sample_patches",
    "sample_patches_ref",
    "score_features",
    "score_features_ref",
    "small_attention",
    "small_attention_ref",
    "step_coefficients",
    "step_std",
    "swiglu",
    "swiglu_ref",
    "transition_coefficients",
]
__version__ = "0.1.0"
