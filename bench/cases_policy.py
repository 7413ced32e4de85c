"""Workloads of the policy and reward ops. Baselines: the `_ref` beside the kernel, or what the public trainers do."""

from __future__ import annotations

import functools
from typing import Any

import torch

import advgrpo_kernels as k

from .workload import Bench, Workload, nbytes

GUIDANCE = 4.5
LEARNING_CLIP = 1e-5


def _transition(bench: Bench, images: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """latents, both velocities and the coefficients of an early CPS step."""
    shape = (images, *bench.sizes.latent)
    coefficients = torch.tensor([0.10, -0.86, 0.87], device=bench.device)
    x = bench.randn(*shape)
    c, u = (bench.randn(*shape, dtype=bench.dtype) for _ in range(2))
    return x, c, u, coefficients


def gaussian_step(bench: Bench) -> Workload:
    """Guidance, mean, noise, next latents and log-prob of a window step."""
    x, c, u, coefficients = _transition(bench, bench.sizes.rollout)
    settings: dict[str, Any] = {"uncond_velocity": u, "guidance_scale": GUIDANCE, "likelihood": "squared_error"}

    def run(noise: torch.Tensor):
        return k.gaussian_step_ref(x, c, coefficients, noise=noise, compute_dtype=bench.wide, **settings)[:2]

    def drawn() -> torch.Tensor:
        ids = torch.arange(len(x), device=x.device)
        return k.philox_normal(x.shape, seed=1, sample_ids=ids, device=x.device).to(x.dtype)

    return Workload(
        lambda: k.gaussian_step(x, c, coefficients, seed=1, **settings)[:2],
        lambda: run(torch.randn_like(x)),
        nbytes(x, c, u, x),
        same=lambda: run(drawn()),
    )


def gaussian_step_ode(bench: Bench) -> Workload:
    """A step outside the window: no noise, no log-prob."""
    x, c, u, _ = _transition(bench, bench.sizes.rollout)
    coefficients = torch.tensor([1.0, -0.05, 0.0], device=bench.device)
    settings: dict[str, Any] = {"uncond_velocity": u, "guidance_scale": GUIDANCE, "likelihood": None}
    return Workload(
        lambda: k.gaussian_step(x, c, coefficients, **settings).next_latents,
        lambda: k.gaussian_step_ref(x, c, coefficients, compute_dtype=bench.wide, **settings).next_latents,
        nbytes(x, c, u, x),
    )


def gaussian_log_prob(bench: Bench) -> Workload:
    """Log-prob and its gradient by both velocities."""
    x, c, u, coefficients = _transition(bench, bench.sizes.train)
    x_next, upstream = bench.randn(*x.shape), bench.randn(bench.sizes.train)
    c.requires_grad_(), u.requires_grad_()

    def run(op, **options):
        log_prob = op(x, c, x_next, coefficients, uncond_velocity=u, guidance_scale=GUIDANCE, **options)
        return torch.autograd.grad(log_prob, (c, u), upstream)

    moved = 2 * nbytes(x, c, u, x_next) + nbytes(c, u)  # the gradient needs the inputs again
    eager = functools.partial(run, k.gaussian_log_prob_ref, compute_dtype=bench.wide)
    return Workload(lambda: run(k.gaussian_log_prob), eager, moved)


def clipped_policy_loss(bench: Bench) -> Workload:
    """Loss, statistics and gradient by both velocities; ours hands the gradient out without autograd."""
    x, c, u, coefficients = _transition(bench, bench.sizes.train)
    x_next = bench.randn(*x.shape)
    c.requires_grad_(), u.requires_grad_()
    old, advantages = bench.randn(bench.sizes.train) - 1.4, bench.randn(bench.sizes.train)
    settings: dict[str, Any] = {"clip_range": LEARNING_CLIP, "uncond_velocity": u, "guidance_scale": GUIDANCE}

    def ours():
        result = k.clipped_policy_loss(x, c, x_next, coefficients, old, advantages, **settings)
        return result.velocity_grad, result.uncond_velocity_grad

    def eager():
        options: dict[str, Any] = {**settings, "compute_dtype": bench.wide}
        loss = k.clipped_policy_loss_ref(x, c, x_next, coefficients, old, advantages, **options).loss
        return torch.autograd.grad(loss, (c, u))

    return Workload(ours, eager, 2 * nbytes(x, c, u, x_next) + nbytes(c, u))


def group_advantages(bench: Bench) -> Workload:
    """Rewards of an iteration over all ranks; the baseline is unique, index_add and gathers, which synchronises."""
    count = bench.sizes.groups * bench.sizes.group_size
    rewards = bench.randn(count)
    ids = torch.randperm(count, device=bench.device) % bench.sizes.groups

    def eager():
        _, group, size = torch.unique(ids, return_inverse=True, return_counts=True)
        mean = torch.zeros_like(size, dtype=torch.float64).index_add(0, group, rewards.double()) / size
        centred = rewards - mean[group]
        variance = torch.zeros_like(mean).index_add(0, group, centred.square()) / size
        return (centred / (variance[group].sqrt() + 1e-4)).clamp(-5, 5).to(rewards.dtype)

    return Workload(
        lambda: k.group_advantages(rewards, ids).advantages, eager, nbytes(rewards, ids) + 3 * nbytes(rewards)
    )


def _features(bench: Bench, images: int, patches: int) -> tuple[torch.Tensor, torch.Tensor]:
    width = bench.sizes.features
    return bench.randn(images, width, dtype=bench.dtype), bench.randn(images, patches, width, dtype=bench.dtype)


def _head(bench: Bench) -> dict[str, torch.Tensor]:
    H, D = bench.sizes.hidden, bench.sizes.features
    head = {"w1": bench.randn(H, D) / D**0.5, "b1": bench.randn(H), "w2": bench.randn(1, H) / H**0.5}
    return head | {"b2": bench.randn(1)}


def sample_patches(bench: Bench) -> Workload:
    """Draw, gather and normalise the patches of the reward pass."""
    _, patches = _features(bench, bench.sizes.scored, bench.sizes.patches)
    n = bench.sizes.chosen

    def run(order: torch.Tensor):
        return k.sample_patches_ref(patches, order, normalize=True, compute_dtype=bench.wide), order

    return Workload(
        lambda: k.sample_patches(patches, n, seed=1, normalize=True),
        lambda: run(torch.rand(patches.shape[:2], device=patches.device).argsort(1)[:, :n]),
        2 * nbytes(patches[:, :n]) + bench.sizes.scored * n * 8,
        same=lambda: run(_chosen(patches, n)),
    )


def _chosen(patches: torch.Tensor, n: int) -> torch.Tensor:
    """[B, n] what `sample_patches` draws with seed 1."""
    ids = torch.arange(len(patches), device=patches.device)
    return k.philox_permutation(patches.shape[1], n, seed=1, sample_ids=ids)


def score_features(bench: Bench) -> Workload:
    """The reward pass: cls and chosen patches through the head."""
    cls, patches = _features(bench, bench.sizes.scored, bench.sizes.patches)
    head, n = _head(bench), bench.sizes.chosen
    indices = _chosen(patches, n)
    rows = bench.sizes.scored * (n + 1)
    return Workload(
        lambda: k.score_features(cls, patches, indices, head),
        lambda: k.score_features_ref(cls, patches, indices, head, compute_dtype=bench.wide),
        nbytes(cls, patches[:, :n], indices, *head.values()),
        2 * rows * bench.sizes.hidden * bench.sizes.features,
    )


def hinge_head_loss(bench: Bench) -> Workload:
    """A head training step without its optimizer: forward, hinge and gradients of the head."""
    from advgrpo_kernels.ops.hinge_head_loss import hinge_head_loss_ref

    images = bench.sizes.scored // 2
    features = (*_features(bench, images, bench.sizes.chosen), *_features(bench, images, bench.sizes.chosen))
    head = {name: tensor.requires_grad_() for name, tensor in _head(bench).items()}
    parameters = list(head.values())
    rows = 2 * images * (bench.sizes.chosen + 1)
    return Workload(
        lambda: torch.autograd.grad(k.hinge_head_loss(*features, head).loss, parameters),
        lambda: torch.autograd.grad(hinge_head_loss_ref(*features, head, compute_dtype=bench.wide).loss, parameters),
        2 * nbytes(*features) + 2 * nbytes(*parameters),
        2 * 2 * rows * bench.sizes.hidden * bench.sizes.features,  # forward and the gradient of w1
    )
