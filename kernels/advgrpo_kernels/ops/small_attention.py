"""Attention over few tokens, softmax(q·kᵀ·scale)·v: an image's head at a time, its keys and values in the first caches.

PyTorch's fused attention on a CPU is made for thousands of tokens: of some dozens, packing and tiles of 32 cost it more
than the products. There is no kernel for a GPU, where FlashAttention and cuDNN serve any number.

Shapes:   B images, H heads, Sq queries, S keys, D head dim. q [B, H, Sq, D], k and v [B, H, S, D] -> [B, H, Sq, D].
Memory:   any strides with dense heads. Heads lie side by side in the result, images and tokens in q's order: a view of
          [B, Sq, H, D], or of [Sq, B, H, D] where q's images are closer than its tokens.
Numerics: float32. Softmax over a whole row; the backward computes it again, and saves nothing but q, k and v.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from .. import _cpu, _runtime
from .._runtime import check_tensors
from ._cpu_layers import address, integers, learns
from ._layers import FLOATS

__all__ = ["small_attention", "small_attention_ref"]

MOST_KEYS = 256  # where `auto` leaves it to PyTorch
WIDEST = 128
LANES = 16  # of cpu/lanes.h


def _like_tokens(q: torch.Tensor, tokens: int) -> torch.Tensor:
    """Uninitialised [B, H, tokens, D], heads side by side, images and tokens in the order of q's."""
    B, H, _, D = q.shape
    if B > 1 and q.shape[2] > 1 and q.stride(0) < q.stride(2):
        return q.new_empty(tokens, B, H, D).permute(1, 2, 0, 3)
    return q.new_empty(B, tokens, H, D).permute(0, 2, 1, 3)


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.stride(3) == 1 else tensor.contiguous()


def _forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    out = _like_tokens(q, q.shape[2])
    _launch("small_attention", (q, k, v, out), scale)
    return out


class _OnCpu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        q, k, v = map(_dense, (q, k, v))
        ctx.scale = scale
        ctx.save_for_backward(q, k, v)
        return _forward(q, k, v, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx, out_grad: torch.Tensor):
        q, k, v = ctx.saved_tensors
        grads = [_like_tokens(q, tensor.shape[2]) for tensor in (q, k, v)]
        _launch("small_attention_backward", (q, k, v, _dense(out_grad), *grads), ctx.scale)
        return *grads, None


def _launch(name: str, tensors: tuple[torch.Tensor, ...], scale: float) -> None:
    q, k = tensors[:2]
    sizes = integers(*q.shape[:3], *k.shape[2:])
    views = integers(*(stride for tensor in tensors for stride in tensor.stride()[:3]))
    launch = getattr(_cpu.library(), f"advgrpo_{name}")
    launch(*map(address, tensors), sizes, views, scale, torch.get_num_threads())


def fits(q: torch.Tensor, k: torch.Tensor) -> bool:
    """Whether the CPU's kernel serves q [B, H, Sq, D] and k [B, H, S, D], and gains by it."""
    return 0 < k.shape[2] <= MOST_KEYS and 0 < q.shape[3] <= WIDEST and q.shape[3] % LANES == 0


def _backend(requested: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> str:
    if requested not in ("auto", "cpu", "torch"):
        raise ValueError(f"backend must be one of ('auto', 'cpu', 'torch'), got {requested!r}")
    if requested == "cpu":
        _cpu.check(q, k, v)
        if not scale > 0:  # its softmax takes the largest product for the largest score
            raise RuntimeError(f"backend='cpu' takes a scale above 0, got {scale}")
        if not fits(q, k):
            raise RuntimeError(
                f"backend='cpu' takes up to {MOST_KEYS} keys and a head dim that is a multiple of {LANES} up to "
                f"{WIDEST}, got q {list(q.shape)} and k {list(k.shape)}"
            )
        return "cpu"
    wanted = scale > 0 and requested == "auto" and _runtime.DEFAULT_BACKEND == "auto"
    return "cpu" if wanted and fits(q, k) and _cpu.takes(q, k, v) else "torch"


def small_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float | None = None, backend: str = "auto"
) -> torch.Tensor:
    """softmax(q·kᵀ·scale)·v [B, H, Sq, D], differentiable in q, k and v.

    Args:
        q: [B, H, Sq, D] float32, float16 or bfloat16.
        k, v: [B, H, S, D] in its dtype.
        scale: 1/sqrt(D) unless given.

    Raises:
        ValueError: names the argument that does not fit.
        RuntimeError: backend="cpu" for tensors that its kernel does not take, or where it cannot be compiled.
    """
    check_tensors(q=q, k=k, v=v)
    if q.dim() != 4 or q.dtype not in FLOATS:
        raise ValueError(f"q must be floating point [B, H, Sq, D], got {q.dtype} {list(q.shape)}")
    for name, tensor in (("k", k), ("v", v)):
        want = (*q.shape[:2], k.shape[-2], q.shape[3]) if k.dim() == 4 else (*q.shape[:2], "S", q.shape[3])
        if tuple(tensor.shape) != want or tensor.dtype != q.dtype or tensor.device != q.device:
            raise ValueError(
                f"{name} must be {q.dtype} {list(want)} on {q.device}, got {tensor.dtype} {list(tensor.shape)} on "
                f"{tensor.device}"
            )
    scale = q.shape[3] ** -0.5 if scale is None else scale
    if _backend(backend, q, k, v, scale) == "cpu":
        return _OnCpu.apply(q, k, v, scale) if learns(q, k, v) else _forward(_dense(q), _dense(k), _dense(v), scale)
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale)


def small_attention_ref(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float | None = None,
    compute_dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Plain PyTorch, differentiable in every input."""
    scale = q.shape[3] ** -0.5 if scale is None else scale
    wide_q, wide_k, wide_v = (t.to(compute_dtype) for t in (q, k, v))
    return (torch.softmax(wide_q @ wide_k.transpose(2, 3) * scale, dim=-1) @ wide_v).to(q.dtype)
