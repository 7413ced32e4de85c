"""Hinge loss of the adversarial head on frozen features (arXiv 2511.20256, eqs. 12-14).

    L = λ_g·½[mean relu(1 - h(ref_cls)) + mean relu(1 + h(gen_cls))]
      + λ_l·½[mean relu(1 - h(ref_j))   + mean relu(1 + h(gen_j))]       j over the chosen patches, a hinge each

References are positives, generations negatives; h is the head of `score_features`, with the same normalisation. With
weights of images the sums are weighted and the divisors stay: rows of weight 0 fill a batch up to a fixed size.

On a GPU: two launches forward, one backward, whose incoming scalar is read from device memory.

Shapes:   B images on each side, n chosen patches, D feature width. cls [B, D], patches [B, n, D].
Numerics: float32 inside; features are constants, gradients go to the head only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

from .._ops import add_op_namespace_prefix
from .._runtime import HAS_TRITON, check_tensors, device_guard, pick_backend
from ._head import COUNTS, Rows, coarse, head_tensors, launch_head_gradients, launch_rows
from .patches import l2_normalize
from .score_features import _head_scores

__all__ = ["HingeHeadLoss", "hinge_head_loss", "hinge_head_loss_ref"]

if HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit(do_not_specialize=(*COUNTS, "count", "count2"))
    def _hinge_kernel(
        scores_ptr,
        score_grads_ptr,
        loss_ptr,
        accuracy_ptr,
        image_weights_ptr,
        B,
        B2,
        n,
        count,
        count2,
        global_weight,
        local_weight,
        TILES: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        losses = tl.zeros((BLOCK,), tl.float32)
        right = tl.zeros((BLOCK,), tl.float32)
        for tile in range(TILES):
            row = tile * BLOCK + tl.arange(0, BLOCK)
            valid = row < (B + B2) * (n + 1)
            generated = row >= B * (n + 1)
            local, images = row - tl.where(generated, B * (n + 1), 0), tl.where(generated, B2, B)
            is_cls = local < images
            sign = tl.where(generated, -1.0, 1.0)
            share = tl.div_rn(0.5, tl.where(generated, count2, count).to(tl.float32))
            if image_weights_ptr is not None:
                image = tl.where(is_cls, local, (local - images) // n) + tl.where(generated, B, 0)
                share = share * tl.load(image_weights_ptr + image, mask=valid, other=0.0)
            weight = share * tl.where(is_cls, global_weight, tl.div_rn(local_weight, n.to(tl.float32)))
            signed = sign * tl.load(scores_ptr + row, mask=valid, other=0.0)
            margin = 1.0 - signed
            losses += tl.where(valid & ((margin > 0.0) | (margin != margin)), margin * weight, 0.0)
            right += tl.where(valid & is_cls & (signed > 0.0), share, 0.0)
            tl.store(score_grads_ptr + row, tl.where(margin > 0.0, -sign * weight, 0.0), mask=valid)
        tl.store(loss_ptr, tl.sum(losses, axis=0))
        tl.store(accuracy_ptr, tl.sum(right, axis=0))


@torch.library.custom_op(add_op_namespace_prefix("hinge_head_loss"), mutates_args=())
def _hinge_head_loss_op(
    reference_cls: torch.Tensor,
    reference_patches: torch.Tensor,
    generated_cls: torch.Tensor,
    generated_patches: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor,
    w2: torch.Tensor,
    b2: torch.Tensor,
    global_weight: float,
    local_weight: float,
    normalize: bool,
    total: int,
    image_weights: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(loss, accuracy; hidden, feature factors and d loss/d score for the backward); total 0 is each side's own, and
    image_weights [B + B2]."""
    rows = _rows(reference_cls, reference_patches, generated_cls, generated_patches)
    head = tuple(tensor.contiguous() for tensor in (w1, b1, w2, b2))
    scores, hidden, inverse_norm = launch_rows(rows, head, normalize=normalize, store_hidden=True)
    B, B2, n, _, _ = rows.sizes()
    score_grads, loss, accuracy = torch.empty_like(scores), scores.new_empty(()), scores.new_empty(())
    with device_guard(w1):
        _hinge_kernel[(1,)](
            *(scores, score_grads, loss, accuracy, image_weights),
            *(B, B2, n, total or B, total or B2, global_weight, local_weight),
            TILES=coarse(triton.cdiv(scores.numel(), 1024)),
            BLOCK=1024,
            num_warps=4,
        )
    return loss, accuracy, hidden, inverse_norm, score_grads


@_hinge_head_loss_op.register_fake
def _(reference_cls, reference_patches, generated_cls, generated_patches, w1, *_):
    R = (reference_cls.shape[0] + generated_cls.shape[0]) * (reference_patches.shape[1] + 1)
    return w1.new_empty(()), w1.new_empty(()), w1.new_empty(R, w1.shape[0]), w1.new_empty(R), w1.new_empty(R)


@torch.library.custom_op(add_op_namespace_prefix("hinge_head_loss_backward"), mutates_args=())
def _hinge_head_loss_backward_op(
    grad_loss: torch.Tensor,
    reference_cls: torch.Tensor,
    reference_patches: torch.Tensor,
    generated_cls: torch.Tensor,
    generated_patches: torch.Tensor,
    w2: torch.Tensor,
    hidden: torch.Tensor,
    inverse_norm: torch.Tensor,
    score_grads: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of w1, b1, w2, b2 in one launch."""
    rows = _rows(reference_cls, reference_patches, generated_cls, generated_patches)
    return launch_head_gradients(rows, w2.contiguous(), hidden, inverse_norm, score_grads, grad_loss.contiguous())


@_hinge_head_loss_backward_op.register_fake
def _(grad_loss, reference_cls, reference_patches, generated_cls, generated_patches, w2, *_):
    H, D = w2.shape[1], reference_cls.shape[1]
    return w2.new_empty(H, D), w2.new_empty(H), w2.new_empty(1, H), w2.new_empty(1)


def _rows(cls: torch.Tensor, patches: torch.Tensor, cls2: torch.Tensor, patches2: torch.Tensor) -> Rows:
    dtype = patches.dtype
    cls, patches, cls2, patches2 = (tensor.to(dtype).contiguous() for tensor in (cls, patches, cls2, patches2))
    return Rows(cls, patches, None, cls2, patches2)


def _setup_context(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:4], inputs[6], *output[2:])


def _backward(ctx, grad_loss, *_):
    grads = _hinge_head_loss_backward_op(grad_loss, *ctx.saved_tensors)
    return *[None] * 4, *grads, *[None] * 5


_hinge_head_loss_op.register_autograd(_backward, setup_context=_setup_context)


class HingeHeadLoss(NamedTuple):
    """Result of `hinge_head_loss`."""

    loss: torch.Tensor  # scalar float32, differentiable in the head
    accuracy: torch.Tensor  # scalar float32, share of cls scores on the right side of 0 (times B / total), detached


def hinge_head_loss(
    reference_cls: torch.Tensor,
    reference_patches: torch.Tensor,
    generated_cls: torch.Tensor,
    generated_patches: torch.Tensor,
    head: Mapping[str, torch.Tensor],
    *,
    weights: tuple[float, float] = (0.7, 0.3),
    normalize: bool = False,
    total: int | None = None,
    image_weights: tuple[torch.Tensor, torch.Tensor] | None = None,
    backend: str = "auto",
) -> HingeHeadLoss:
    """Head loss on chosen patches; see the module docstring.

    Args:
        reference_cls, generated_cls: [B, D] any float dtype.
        reference_patches, generated_patches: [B, n, D], already gathered (`sample_patches`).
        head: mapping with w1 [H, D], b1 [H], w2 [1, H], b2 [1].
        weights: (λ_g, λ_l).
        total: images per side over all processes; means divide by it, so that gradients summed over processes are
            those of the whole batch. Default B.
        image_weights: float32 [B] of the references and of the generations, what an image counts; None: 1.

    Raises:
        ValueError: names the argument that does not fit.
    """
    for name, cls, patches in (
        ("reference", reference_cls, reference_patches),
        ("generated", generated_cls, generated_patches),
    ):
        check_tensors(**{f"{name}_cls": cls, f"{name}_patches": patches})
        if cls.dim() != 2 or patches.dim() != 3 or (patches.shape[0], patches.shape[2]) != cls.shape:
            raise ValueError(
                f"want {name}_cls [B, D] and {name}_patches [B, n, D], "
                f"got {tuple(cls.shape)} and {tuple(patches.shape)}"
            )
    check_tensors(**{f"head[{name!r}]": tensor for name, tensor in head.items()})
    if reference_patches.shape[1] != generated_patches.shape[1]:
        raise ValueError(f"patches per image differ: {reference_patches.shape[1]} and {generated_patches.shape[1]}")
    features = (reference_cls, reference_patches, generated_cls, generated_patches)
    for side, cls, of_images in zip(("references", "generations"), features[::2], image_weights or ()):
        if of_images.shape != cls.shape[:1] or of_images.dtype != torch.float32:
            raise ValueError(
                f"image_weights of the {side} must be float32 [{len(cls)}], got {of_images.dtype} "
                f"{list(of_images.shape)}"
            )
    if pick_backend(backend, *features) == "triton":
        both = None if image_weights is None else torch.cat(image_weights)
        mix = (float(weights[0]), float(weights[1]), normalize, total or 0, both)
        outputs = _hinge_head_loss_op(*(tensor.detach() for tensor in features), *head_tensors(head), *mix)
        return HingeHeadLoss(outputs[0], outputs[1].detach())
    return hinge_head_loss_ref(
        *features, head, weights=weights, normalize=normalize, total=total, image_weights=image_weights
    )


def hinge_head_loss_ref(
    reference_cls: torch.Tensor,
    reference_patches: torch.Tensor,
    generated_cls: torch.Tensor,
    generated_patches: torch.Tensor,
    head: Mapping[str, torch.Tensor],
    *,
    weights: tuple[float, float] = (0.7, 0.3),
    normalize: bool = False,
    total: int | None = None,
    image_weights: tuple[torch.Tensor, torch.Tensor] | None = None,
    compute_dtype: torch.dtype = torch.float32,
) -> HingeHeadLoss:
    """Plain PyTorch, differentiable in the head by autograd; results in `compute_dtype`."""
    sides = ((1.0, reference_cls, reference_patches), (-1.0, generated_cls, generated_patches))
    losses, right = [], []
    for (sign, cls, patches), counts in zip(sides, image_weights or (None, None)):
        features = torch.cat([cls[:, None].to(compute_dtype), patches.to(compute_dtype)], dim=1).detach()
        scores = _head_scores(l2_normalize(features) if normalize else features, head)
        hinge, on_its_side = torch.relu(1 - sign * scores), (sign * scores[:, 0].detach() > 0).to(compute_dtype)
        if counts is not None:
            hinge, on_its_side = hinge * counts[:, None].to(compute_dtype), on_its_side * counts.to(compute_dtype)
        count = 2 * (len(cls) if total is None else total)
        losses.append((weights[0] * hinge[:, 0].sum() + weights[1] * hinge[:, 1:].mean(1).sum()) / count)
        right.append(on_its_side.sum() / count)
    return HingeHeadLoss(losses[0] + losses[1], right[0] + right[1])
