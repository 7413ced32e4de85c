"""What the fused forwards of diffusers' transformer blocks share, one file per family beside this one.

A fused forward does not call norms, attention, feed-forward and GELU of its block as modules, and the fused layers have
no gradient for norm weights, gates, shifts and scales. So a block runs its own forward while one of those parts has a
hook (so that it fires), while one of those parameters trains, or where the block is built otherwise than the fused
forward covers. Whether a parameter trains is read from the parameter, never from the gradient mode, so that a model
samples and learns by the same forward and the first policy ratio stays what it was.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import FunctionType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import module as torch_module

from ..ops.gated_residual import gated_residual
from ..ops.gelu import gelu
from ..ops.qk_rms_norm import qk_rms_norm
from . import _patching
from ._self_check import Case, Outputs, Tolerance

logger = logging.getLogger("advgrpo_kernels.integrations")

Rotary = Sequence[torch.Tensor]


class Fused(NamedTuple):
    """A class of modules and what can take the place of its forward."""

    name: str
    module: str  # where diffusers defines it
    variants: tuple[FunctionType, ...]  # forwards, one per shape that diffusers' releases gave it
    cases: Callable[[Callable, Any], Iterable[Case]]
    misfit: Callable[[Any], str | None]  # what of an instance is built otherwise, None where all fits
    about: Callable[[Any], str]  # what of an instance is fused, for the log

    @property
    def target(self) -> _patching.Target:
        return _patching.Target(f"{self.name}.forward", (self.module,), self.variants, self.cases)


# When a block runs its own forward.


def stock(module: nn.Module) -> Callable:
    """The forward of the module's class as diffusers has it."""
    own = type(module).forward
    return _patching.original_of(own) or own


def runs_stock(module: nn.Module, bypassed: Iterator[nn.Module], frozen: Iterator[nn.Module], misfit: Any) -> bool:
    """Whether the fused forward of `module` must leave it to the class's own.

    Args:
        bypassed: the modules in it that the fused forward does not call.
        frozen: the modules whose parameters get no gradient from fused layers.
        misfit: `Fused.misfit` of the module, true where it is built otherwise.
    """
    why = misfit
    if not why and (torch_module._has_any_global_hook() or any(map(_is_hooked, bypassed))):
        why = "a part of it has a hook"
    if not why and (_trains(module._parameters.values()) or any(_trains(part.parameters()) for part in frozen)):
        why = "its norms or modulation train (inference: model.requires_grad_(False))"
    if why and not torch.compiler.is_compiling():
        _say_stock(type(module).__name__, str(why))
    return bool(why)


def _is_hooked(part: nn.Module) -> bool:
    return bool(
        part._forward_hooks
        or part._forward_pre_hooks
        or part._backward_hooks
        or part._backward_pre_hooks
        or "forward" in vars(part)
    )


def _trains(parameters: Iterable[torch.Tensor | None]) -> bool:
    """Of FSDP's first version a block's own parameters are the flat one of all that is in it."""
    return any(parameter is not None and parameter.requires_grad for parameter in parameters)


@functools.cache
def _say_stock(kind: str, why: str) -> None:
    logger.warning("%s: such modules run their own forward, not the fused one: %s", kind, why)


# How a module can be built otherwise.


def norm_misfit(*norms: Any) -> str | None:
    for norm in norms:
        if not isinstance(norm, nn.LayerNorm) or norm.elementwise_affine:
            return f"its norms must be LayerNorm without affine parameters, got {norm}"
    return None


def feed_forward_misfit(*layers: Any) -> str | None:
    for ff in layers:
        if getattr(ff.net[0], "approximate", None) != "tanh":
            return f"its feed-forward layers must use GELU with tanh, got {ff.net[0]}"
    return None


def qk_norms(attn: Any) -> list[Any]:
    """The norms of q and k that the attention has."""
    norms = (getattr(attn, f"norm_{name}", None) for name in ("q", "k", "added_q", "added_k"))
    return [norm for norm in norms if norm is not None]


def is_fusible(attn: Any, processors: tuple[str, ...]) -> bool:
    """Whether q and k are RMS-normalised with a weight, by one of diffusers' `processors`, on one device."""
    if attn is None or type(attn.processor).__name__ not in processors or getattr(attn, "fused_projections", False):
        return False
    if getattr(attn.processor, "_parallel_config", None) is not None:  # shares of the tokens, another order of them
        return False
    norms = qk_norms(attn)
    return len(norms) == (2 if attn.added_kv_proj_dim is None else 4) and all(
        "RMSNorm" in type(norm).__name__
        and norm.weight is not None
        and getattr(norm, "bias", None) is None
        and norm.eps == norms[0].eps is not None
        for norm in norms
    )


def about_block(processors: tuple[str, ...], block: Any) -> str:
    """`Fused.about` of a block with one attention or two."""
    fused = [name for name in ("attn", "attn2") if is_fusible(getattr(block, name, None), processors)]
    return f"fused norms, residuals and GELU; q and k norms of {', '.join(fused) or 'no attention'}"


def parts_of_attention(attn: Any) -> Iterator[nn.Module]:
    if attn is not None:
        yield attn
        yield from qk_norms(attn)


# What is fused.


def feed_forward(ff: Any, x: torch.Tensor) -> torch.Tensor:
    x = gelu(ff.net[0].proj(x))
    for layer in ff.net[1:]:
        x = layer(x)
    return x


def rest_of_stream(x: torch.Tensor, out: torch.Tensor, emb: list[Any], norm: Any, ff: Any) -> torch.Tensor:
    """One stream of a block behind its attention, which gave `out`; `emb`: gate, then shift and scale of the norm, and
    the feed-forward's gate."""
    gate, shift, scale, gate_mlp = emb
    x, normed = gated_residual(x, out, gate, shift=shift, scale=scale, eps=norm.eps)
    return gated_residual(x, feed_forward(ff, normed), gate_mlp)


def modulation(emb: torch.Tensor, images: int, parts: int) -> list[Any]:
    """`parts` tensors [B, C] of the output of a modulation's linear, which may be one row for all images."""
    return list((emb if emb.shape[0] == images else emb.expand(images, -1)).chunk(parts, dim=-1))


def within_float16(x: torch.Tensor) -> torch.Tensor:
    """diffusers' clip of what left the range of float16."""
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x


def image_heads(attn: Any, x: torch.Tensor) -> list[torch.Tensor]:
    """q, k and v of image tokens, or of all, [B, T, H, D]; heads are counted: of a sharded linear there are fewer."""
    return _heads(attn, (attn.to_q, attn.to_k, attn.to_v), x)


def text_heads(attn: Any, context: torch.Tensor) -> list[torch.Tensor]:
    """The same of text tokens by linears of their own."""
    return _heads(attn, (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj), context)


def _heads(attn: Any, linears: Iterable[nn.Module], tokens: torch.Tensor) -> list[torch.Tensor]:
    return [linear(tokens).unflatten(-1, (-1, attn.norm_q.weight.shape[-1])) for linear in linears]


def joint_attention(
    attn: Any, x: torch.Tensor, context: torch.Tensor | None, rotary: Rotary | None, mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention over text and image tokens in diffusers' order, text first: (image, text), before the output's linears.

    Args:
        x: [B, T, C] image tokens, or all of them.
        context: [B, S, C] text tokens with linears and norms of their own, or None.
        rotary: (cos, sin), [S + T, D/2] float32, or None.
        mask: broadcasts to [B, H, S + T, S + T]; true where a token is attended to.
    """
    weights = (attn.norm_q.weight, attn.norm_k.weight)
    qkv = image_heads(attn, x)
    if context is None:
        inputs = qk_rms_norm(qkv, weights, rotary=rotary, eps=attn.norm_q.eps)
    else:
        text = text_heads(attn, context)
        text_weights = (attn.norm_added_q.weight, attn.norm_added_k.weight)
        # The op's first stream comes first: here the text.
        inputs = qk_rms_norm(
            text, text_weights, txt_qkv=qkv, txt_weights=weights, rotary=rotary, eps=attn.norm_added_q.eps
        )
    out = _attend(*inputs, mask, getattr(attn.processor, "_attention_backend", None)).flatten(2)
    if context is None:
        return out, None
    text_out, image = out.split([context.shape[1], x.shape[1]], dim=1)
    return image, text_out


_dispatch: Any = None  # diffusers' choice of an attention, False where it has none


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, backend: Any) -> torch.Tensor:
    """Attention of [B, H, tokens, D] as the stock processor chooses it: [B, tokens, H, D]."""
    global _dispatch
    if _dispatch is None:
        try:
            _dispatch = importlib.import_module("diffusers.models.attention_dispatch").dispatch_attention_fn
        except ImportError:  # before 0.35
            _dispatch = False
    if not _dispatch:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return _dispatch(query, key, value, attn_mask=mask, backend=backend)


# The check of a forward against the class's own, on small blocks.

WIDTH, HEADS = 32, 2
IMAGE, TEXT = 6, 3  # tokens
_HALF = "half precision: the original rounds in between"


def block_cases(make: Callable[[], Any], call: Callable[..., tuple[torch.Tensor | None, ...]]) -> Iterator[Case]:
    """A random block in float32, and in the half-precision dtypes, with the gradients of its activations.

    Args:
        make: a block of WIDTH and HEADS.
        call: calls a forward (first argument) on (block, image [2, IMAGE, WIDTH], text [2, TEXT, WIDTH],
            temb [2, WIDTH]) and gives its outputs.
    """
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        tolerance = 8 * torch.finfo(dtype).eps
        names = ("image", "text", "gradient of image", "gradient of text")
        kept = {} if dtype == torch.float32 else dict.fromkeys(names, Tolerance(tolerance, tolerance, _HALF))
        yield Case(str(dtype).removeprefix("torch."), functools.partial(_run_block, make, call, dtype), kept)


def _run_block(make: Callable, call: Callable, dtype: torch.dtype, function: Callable) -> Outputs:
    torch.default_generator.manual_seed(0)
    block = make()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    block = block.requires_grad_(False).to(dtype)
    image, text, temb = (torch.randn(2, *shape).to(dtype) for shape in ((IMAGE, WIDTH), (TEXT, WIDTH), (WIDTH,)))
    activations = {"image": image.requires_grad_(), "text": text.requires_grad_()}
    outputs = [output for output in call(function, block, image, text, temb) if output is not None]
    loss = torch.stack([(output.float() * torch.randn(output.shape)).mean() for output in outputs]).sum()
    grads = torch.autograd.grad(loss, list(activations.values()), allow_unused=True)
    named = dict(zip(("image", "text"), outputs))
    return named | {f"gradient of {name}": grad for name, grad in zip(activations, grads)}
