"""Workloads of the ops over a list of tensors: every LoRA adapter of the model in one call."""

from __future__ import annotations

from typing import Any

import torch

import advgrpo_kernels as k

from .workload import Bench, Workload, nbytes

RANK = 32


def _backend(bench: Bench) -> str:
    """On a GPU the compiled library or an error: its PyTorch twin is the baseline, not the op."""
    return "cuda" if bench.device == "cuda" else "auto"


def merge_lora(bench: Bench) -> Workload:
    """All adapted linears merged from the pristine base into the buffers of the sampler."""
    C, count = bench.sizes.channels, bench.sizes.adapters
    bases = [bench.randn(C, C, dtype=bench.dtype) for _ in range(count)]
    a, b = ([bench.randn(*shape) for _ in range(count)] for shape in ((RANK, C), (C, RANK)))
    merged, merged_eagerly = ([torch.empty_like(base) for base in bases] for _ in range(2))

    def ours():
        k.merge_lora(bases, a, b, 2.0, outs=merged, backend=_backend(bench))
        return merged

    def eager():
        for i, base in enumerate(bases):
            merged_eagerly[i].copy_(torch.addmm(base.to(bench.wide), b[i], a[i], alpha=2.0))
        return merged_eagerly

    return Workload(ours, eager, 2 * nbytes(*bases) + nbytes(*a, *b), 2 * count * C * C * RANK)


def multi_tensor_adamw(bench: Bench) -> Workload:
    """Gradient clipping, AdamW and the moving average of all adapters; the baseline is torch's own foreach code."""
    C, count = bench.sizes.channels, bench.sizes.adapters
    shapes = [(RANK, C), (C, RANK)] * count
    start, grads = ([bench.randn(*shape) for shape in shapes] for _ in range(2))
    mine, theirs, ema, their_ema = ([tensor.clone() for tensor in start] for _ in range(4))
    moments = [[torch.zeros_like(tensor) for tensor in start] for _ in range(2)]
    step = torch.zeros((), dtype=torch.int64, device=bench.device)
    settings: dict[str, Any] = {"lr": 3e-4, "weight_decay": 1e-4}
    optimizer = torch.optim.AdamW([p.requires_grad_() for p in theirs], foreach=True, **settings)

    for parameter, grad in zip(theirs, grads):
        parameter.grad = grad.clone()  # clipped in place at every call, by a factor of 1 after the first

    def ours():
        extra: dict[str, Any] = {"max_grad_norm": 1.0, "emas": ema, "ema_decay": 0.9, "backend": _backend(bench)}
        k.multi_tensor_adamw(mine, grads, *moments, step, **settings, **extra)
        return [*mine, *ema]

    def eager():
        torch.nn.utils.clip_grad_norm_(theirs, 1.0)
        optimizer.step()
        torch._foreach_lerp_(their_ema, [p.detach() for p in theirs], 0.1)
        return [*(p.detach() for p in theirs), *their_ema]

    # Gradients twice (norm, step), the other four read and written.
    return Workload(ours, eager, 2 * nbytes(*grads) + 8 * nbytes(*start))
