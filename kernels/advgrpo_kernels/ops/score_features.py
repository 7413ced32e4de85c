"""The adversarial reward: a two-layer head on frozen backbone features (arXiv 2511.20256, eqs. 9-11).

    h(f) = w2·gelu(w1·f + b1) + b2         gelu by erf
    global = h(f_cls),  local = mean over the chosen patches of h(f_j),  reward = λ_g·global + λ_l·local

The same function scores images for the reward and trains the head, with the same optional L2 normalisation of the
features, so the two cannot drift apart.

Shapes:   B images, P patches, D feature width, H hidden width. cls [B, D], patches [B, P, D], indices [B, n] int64,
          head w1 [H, D], b1 [H], w2 [1, H], b2 [1] float32 -> reward, global_score, local_score [B] float32.
Numerics: float32 inside; features are constants, gradients go to the head only. On a CPU the matrix product is BLAS,
          whose last bits depend on the batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

from .._ops import add_op_namespace_prefix
from .._runtime import HAS_TRITON, check_tensors, device_guard, pick_backend
from ._head import Rows, head_tensors, launch_head_gradients, launch_rows
from .patches import check_indices, l2_normalize

__all__ = ["FeatureScore", "score_features", "score_features_ref"]

if HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def _mix_kernel(
        scores_ptr, reward_ptr, global_ptr, local_ptr, B, n, global_weight, local_weight, BLOCK: tl.constexpr
    ):
        image = tl.program_id(0)
        i = tl.arange(0, BLOCK)
        patch_scores = tl.load(scores_ptr + B + image * n + i, mask=i < n, other=0.0)
        local_score = tl.div_rn(tl.sum(patch_scores, axis=0), n.to(tl.float32))
        global_score = tl.load(scores_ptr + image)
        tl.store(global_ptr + image, global_score)
        tl.store(local_ptr + image, local_score)
        tl.store(reward_ptr + image, tl.fma(global_score, global_weight, local_score * local_weight))

    @triton.jit
    def _mix_bwd_kernel(
        reward_grad_ptr,
        global_grad_ptr,
        local_grad_ptr,
        score_grads_ptr,
        B,
        n,
        global_weight,
        local_weight,
        BLOCK: tl.constexpr,
    ):
        row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        valid = row < B * (n + 1)
        is_cls = row < B
        image = tl.where(is_cls, row, (row - B) // n)
        of_cls = tl.zeros((BLOCK,), tl.float32)
        of_patch = tl.zeros((BLOCK,), tl.float32)
        if reward_grad_ptr is not None:
            reward_grad = tl.load(reward_grad_ptr + image, mask=valid, other=0.0)
            of_cls, of_patch = reward_grad * global_weight, reward_grad * local_weight
        if global_grad_ptr is not None:
            of_cls += tl.load(global_grad_ptr + image, mask=valid, other=0.0)
        if local_grad_ptr is not None:
            of_patch += tl.load(local_grad_ptr + image, mask=valid, other=0.0)
        tl.store(score_grads_ptr + row, tl.where(is_cls, of_cls, tl.div_rn(of_patch, n.to(tl.float32))), mask=valid)


@torch.library.custom_op(add_op_namespace_prefix("score_features"), mutates_args=())
def _score_features_op(
    cls: torch.Tensor,
    patches: torch.Tensor,
    indices: torch.Tensor | None,
    w1: torch.Tensor,
    b1: torch.Tensor,
    w2: torch.Tensor,
    b2: torch.Tensor,
    global_weight: float,
    local_weight: float,
    normalize: bool,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(reward, global, local [B]; hidden and feature factors for the backward, empty unless `keep`), two launches."""
    rows = _rows(cls, patches, indices)
    head = tuple(tensor.contiguous() for tensor in (w1, b1, w2, b2))
    scores, hidden, inverse_norm = launch_rows(rows, head, normalize=normalize, store_hidden=keep)
    B, _, n, _, _ = rows.sizes()
    reward, of_cls, of_patches = (scores.new_empty(B) for _ in range(3))
    with device_guard(cls):
        _mix_kernel[(B,)](
            *(scores, reward, of_cls, of_patches, B, n, global_weight, local_weight),
            BLOCK=triton.next_power_of_2(n),
            num_warps=4,
        )
    return reward, of_cls, of_patches, hidden, inverse_norm


@_score_features_op.register_fake
def _(cls, patches, indices, w1, b1, w2, b2, global_weight, local_weight, normalize, keep):
    B, n = cls.shape[0], patches.shape[1] if indices is None else indices.shape[1]
    R = B * (n + 1) if keep else 0
    scores = tuple(w1.new_empty(B) for _ in range(3))
    return *scores, w1.new_empty((R, w1.shape[0]) if keep else 0), w1.new_empty(R)


@torch.library.custom_op(add_op_namespace_prefix("score_features_backward"), mutates_args=())
def _score_features_backward_op(
    reward_grad: torch.Tensor | None,
    global_grad: torch.Tensor | None,
    local_grad: torch.Tensor | None,
    cls: torch.Tensor,
    patches: torch.Tensor,
    indices: torch.Tensor | None,
    w2: torch.Tensor,
    hidden: torch.Tensor,
    inverse_norm: torch.Tensor,
    global_weight: float,
    local_weight: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of w1, b1, w2, b2 in two launches."""
    rows = _rows(cls, patches, indices)
    B, _, n, _, _ = rows.sizes()
    score_grads = hidden.new_empty(B * (n + 1))
    grads = tuple(None if grad is None else grad.contiguous() for grad in (reward_grad, global_grad, local_grad))
    with device_guard(cls):
        _mix_bwd_kernel[(triton.cdiv(B * (n + 1), 1024),)](
            *(*grads, score_grads, B, n, global_weight, local_weight), BLOCK=1024, num_warps=4
        )
    return launch_head_gradients(rows, w2.contiguous(), hidden, inverse_norm, score_grads, None)


@_score_features_backward_op.register_fake
def _(reward_grad, global_grad, local_grad, cls, patches, indices, w2, *_):
    H, D = w2.shape[1], cls.shape[1]
    return w2.new_empty(H, D), w2.new_empty(H), w2.new_empty(1, H), w2.new_empty(1)


def _rows(cls: torch.Tensor, patches: torch.Tensor, indices: torch.Tensor | None) -> Rows:
    indices = None if indices is None else indices.contiguous()
    return Rows(cls.to(patches.dtype).contiguous(), patches.contiguous(), indices)


def _setup_context(ctx, inputs, output):
    cls, patches, indices, _, _, w2, _, *ctx.weights, _, keep = inputs
    ctx.set_materialize_grads(False)
    if keep:
        ctx.save_for_backward(cls, patches, indices, w2, *output[3:])


def _backward(ctx, reward_grad, global_grad, local_grad, *_):
    grads = _score_features_backward_op(reward_grad, global_grad, local_grad, *ctx.saved_tensors, *ctx.weights)
    return None, None, None, *grads, *[None] * 4


_score_features_op.register_autograd(_backward, setup_context=_setup_context)


class FeatureScore(NamedTuple):
    """Result of `score_features`."""

    reward: torch.Tensor  # [B] float32
    global_score: torch.Tensor  # [B] float32, of the cls feature
    local_score: torch.Tensor  # [B] float32, mean over the chosen patches


def score_features(
    cls: torch.Tensor,
    patches: torch.Tensor,
    indices: torch.Tensor | None,
    head: Mapping[str, torch.Tensor],
    *,
    weights: tuple[float, float] = (0.7, 0.3),
    normalize: bool = False,
    backend: str = "auto",
) -> FeatureScore:
    """Score images by their features; differentiable in the head.

    Args:
        cls: [B, D] any float dtype.
        patches: [B, P, D] any float dtype.
        indices: [B, n] int64 in [0, P), the patches that count (see `sample_patches`); None takes all P.
        head: mapping with w1 [H, D], b1 [H], w2 [1, H], b2 [1].
        weights: (λ_g, λ_l) of global and local score in the reward.
        normalize: L2-normalise cls and patch features first.

    Raises:
        ValueError: names the argument that does not fit.
    """
    _check(cls, patches, indices, head)
    if pick_backend(backend, cls, patches) == "triton":
        parameters = head_tensors(head)
        keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in parameters)
        scores = _score_features_op(
            cls.detach(), patches.detach(), indices, *parameters, float(weights[0]), float(weights[1]), normalize, keep
        )
        return FeatureScore(*scores[:3])
    return score_features_ref(cls, patches, indices, head, weights=weights, normalize=normalize)


def score_features_ref(
    cls: torch.Tensor,
    patches: torch.Tensor,
    indices: torch.Tensor | None,
    head: Mapping[str, torch.Tensor],
    *,
    weights: tuple[float, float] = (0.7, 0.3),
    normalize: bool = False,
    compute_dtype: torch.dtype = torch.float32,
) -> FeatureScore:
    """Plain PyTorch, differentiable in the head by autograd; results in `compute_dtype`."""
    chosen = patches.detach()
    if indices is not None:
        chosen = chosen.gather(1, indices[:, :, None].expand(-1, -1, patches.shape[2]))
    features = torch.cat([cls.detach()[:, None].to(compute_dtype), chosen.to(compute_dtype)], dim=1)
    scores = _head_scores(l2_normalize(features) if normalize else features, head)
    global_score, local_score = scores[:, 0], scores[:, 1:].mean(1)
    return FeatureScore(weights[0] * global_score + weights[1] * local_score, global_score, local_score)


def _head_scores(features: torch.Tensor, head: Mapping[str, torch.Tensor]) -> torch.Tensor:
    w1, b1, w2, b2 = (head[name].to(features.dtype) for name in ("w1", "b1", "w2", "b2"))
    hidden = torch.nn.functional.gelu(torch.nn.functional.linear(features, w1, b1))
    return torch.nn.functional.linear(hidden, w2, b2).squeeze(-1)


def _check(
    cls: torch.Tensor, patches: torch.Tensor, indices: torch.Tensor | None, head: Mapping[str, torch.Tensor]
) -> None:
    check_tensors(cls=cls, patches=patches, indices=indices)
    if patches.dim() != 3 or patches.numel() == 0 or not patches.is_floating_point():
        raise ValueError(
            f"patches must be non-empty floating point [B, P, D], got {patches.dtype} {tuple(patches.shape)}"
        )
    B, P, D = patches.shape
    if cls.shape != (B, D) or not cls.is_floating_point():
        raise ValueError(f"cls must be floating point [{B}, {D}], got {cls.dtype} {tuple(cls.shape)}")
    if indices is not None:
        check_indices(indices, B, indices.shape[-1] if indices.dim() else 0, P)
    missing = [name for name in ("w1", "b1", "w2", "b2") if name not in head]
    if missing:
        raise ValueError(f"head must have the keys w1, b1, w2, b2; missing {missing}")
    check_tensors(**{f"head[{name!r}]": head[name] for name in ("w1", "b1", "w2", "b2")})
    H = head["w1"].shape[0]
    expected = {"w1": (H, D), "b1": (H,), "w2": (1, H), "b2": (1,)}
    for name, shape in expected.items():
        if head[name].shape != shape or not head[name].is_floating_point():
            raise ValueError(f"head[{name!r}] must be float {shape}, got {head[name].dtype} {tuple(head[name].shape)}")
