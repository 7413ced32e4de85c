"""diffusers: the fused layer ops in the blocks of an `SD3Transformer2DModel` (SD3, SD3.5), one module at a time.

    from advgrpo_kernels.integrations import diffusers_sd3
    diffusers_sd3.accelerate(pipe.transformer)                        # or filter=lambda name, module: ...
    diffusers_sd3.restore(pipe.transformer)

Only `forward` of the chosen modules is replaced, on the instance: parameters, their names and the state dict stay,
LoRA layers of PEFT are called as they are, checkpoints are interchangeable, and copies and pickles of the model keep
the replacement.

Fused: AdaLN norms (both of a dual-attention block in one pass), gate and residual with the following norm, GELU, and
the norms of q and k with the layout of attention, the last for models with RMS-normalised q and k (SD3.5) and the stock
attention processor; other attentions run as they are. float32 results agree with the original to 1e-5, half-precision
ones round less often than it does.

The fused forward does not call norms, attention, feed-forward and GELU as modules. While one of them has a hook
(`register_forward_hook`, an offloading or casting hook of diffusers or accelerate, a global one), its block runs its
own forward instead, so that the hook fires, and says so once.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import module as torch_module

from ..ops.ada_layer_norm import ada_layer_norm
from ..ops.gated_residual import gated_residual
from ..ops.gelu import gelu
from ..ops.qk_rms_norm import qk_rms_norm

logger = logging.getLogger("advgrpo_kernels.integrations")

MODEL = "SD3Transformer2DModel"
STOCK_ATTENTION = "JointAttnProcessor2_0"
_MARK = "_advgrpo_kernels_forward"  # on each replaced module: what `forward` was set to


def accelerate(model: nn.Module, filter: Callable[[str, nn.Module], bool] | None = None) -> list[str]:
    """Replace the forward of `model`'s transformer blocks and of its last norm; returns the names of those replaced.

    Args:
        model: an SD3Transformer2DModel, also wrapped by PEFT.
        filter: called with (name, module) of each candidate; only those for which it is true are replaced. Default all.

    Raises:
        ValueError: another model, no candidate that the filter lets through, or a chosen module that is built in a way
            the fused forward does not cover.
        RuntimeError: the forward of a chosen module is replaced already, by this or by a hook. Nothing is replaced.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a module such as pipe.transformer, got {type(model).__name__}")
    if not any(_is_a(module, MODEL) for module in model.modules()):
        raise ValueError(f"accelerate() knows {MODEL} (SD3, SD3.5) alone, got {type(model).__name__}")
    candidates = [(name, m, forward) for name, m in model.named_modules() if (forward := _forward_of(m)) is not None]
    # The last block's context norm is a part of that block, which replaces it.
    inside = [f"{name}." for name, _, forward in candidates if forward is _block_forward]
    candidates = [c for c in candidates if not any(c[0].startswith(prefix) for prefix in inside)]
    chosen = [c for c in candidates if filter is None or filter(c[0], c[1])]
    if not chosen:
        raise ValueError(
            f"no module of {type(model).__name__} was replaced: {len(candidates)} candidates (JointTransformerBlock, "
            "AdaLayerNormContinuous), none chosen by the filter"
        )
    for name, module, forward in chosen:
        _check_free(name, module)
        _check_supported(name, module, forward)
    for name, module, forward in chosen:
        module.forward = functools.partial(forward, module)  # unlike a bound method it can be pickled
        vars(module)[_MARK] = module.forward
        logger.info("%s (%s): %s", name, type(module).__name__, _description(module))
    return [name for name, _, _ in chosen]


def restore(model: nn.Module) -> list[str]:
    """Give every replaced module its own forward back; returns their names.

    Raises:
        RuntimeError: no module of `model` is replaced, or a hook was put over a replaced forward. Nothing is restored.
    """
    replaced = [(name, module) for name, module in model.named_modules() if _MARK in vars(module)]
    if not replaced:
        raise RuntimeError(f"no module of {type(model).__name__} is replaced")
    for name, module in replaced:
        if not _is_replaced(module):
            raise RuntimeError(f"{name}: a hook was put over its fused forward: remove that hook, then restore(model)")
    for name, module in replaced:
        del module.forward, vars(module)[_MARK]
        logger.info("%s (%s): original forward restored", name, type(module).__name__)
    return [name for name, _ in replaced]


def _is_replaced(module: nn.Module) -> bool:
    return _MARK in vars(module) and vars(module).get("forward") is vars(module)[_MARK]


def _is_a(module: nn.Module, name: str) -> bool:
    return name in {cls.__name__ for cls in type(module).__mro__}


def _check_free(name: str, module: nn.Module) -> None:
    """That nothing else has taken the place of the module's forward."""
    if _is_replaced(module):
        raise RuntimeError(f"{name}: its forward is replaced already; restore(model) first")
    if "forward" in vars(module):
        raise RuntimeError(
            f"{name}: its forward was replaced by a hook (LayerSkip, offloading, ...) or another patch, which this "
            "would undo: call accelerate(model) before such hooks are added"
        )
    stock: Any = next(
        cls for cls in type(module).__mro__ if cls.__name__ in ("JointTransformerBlock", "AdaLayerNormContinuous")
    )
    if type(module).forward is not stock.forward:
        raise ValueError(f"{name}: {type(module).__name__} has a forward of its own, which would be lost")


def _forward_of(module: nn.Module) -> Callable | None:
    if _is_a(module, "JointTransformerBlock"):
        return _block_forward
    return _continuous_norm_forward if _is_a(module, "AdaLayerNormContinuous") else None


def _check_supported(name: str, module: Any, forward: Callable) -> None:
    norms = [module.norm] if forward is _continuous_norm_forward else [module.norm1.norm, module.norm2]
    if forward is _block_forward:
        norms += [module.norm1_context.norm, *([] if module.context_pre_only else [module.norm2_context])]
    for norm in norms:
        if not isinstance(norm, nn.LayerNorm) or norm.elementwise_affine:
            raise ValueError(f"{name}: its norms must be LayerNorm without affine parameters, got {norm}")
    if forward is _block_forward:
        for ff in (module.ff, *([] if module.context_pre_only else [module.ff_context])):
            if getattr(ff.net[0], "approximate", None) != "tanh":
                raise ValueError(f"{name}: its feed-forward layers must use GELU with tanh, got {ff.net[0]}")


def _description(module: nn.Module) -> str:
    if _forward_of(module) is _continuous_norm_forward:
        return "fused norm and modulation"
    fused = [attention for attention in ("attn", "attn2") if _is_fusible(getattr(module, attention))]
    return f"fused norms, residuals and GELU; q and k norms of {', '.join(fused) or 'no attention'}"


def _is_fusible(attn: Any) -> bool:
    """Whether q and k are RMS-normalised with a weight and nothing was hooked into the attention."""
    if attn is None or type(attn.processor).__name__ != STOCK_ATTENTION:
        return False
    norms = [attn.norm_q, attn.norm_k]
    if attn.added_kv_proj_dim is not None:
        norms += [attn.norm_added_q, attn.norm_added_k]
    return all(
        "RMSNorm" in type(n).__name__ and n.weight is not None and getattr(n, "bias", None) is None for n in norms
    )


def _runs_stock(module: nn.Module, bypassed: Iterator[nn.Module]) -> bool:
    """Whether a module that the fused forward would not call has a hook, or all modules have."""
    hooked = torch_module._has_any_global_hook() or any(
        part._forward_hooks
        or part._forward_pre_hooks
        or part._backward_hooks
        or part._backward_pre_hooks
        or "forward" in vars(part)
        for part in bypassed
    )
    if hooked and not torch.compiler.is_compiling():
        _say_stock(type(module).__name__)
    return hooked


@functools.cache
def _say_stock(kind: str) -> None:
    logger.warning("a part of %s has a hook: such modules run their own forward, not the fused one, while it has", kind)


def _parts_of_block(block: Any) -> Iterator[nn.Module]:
    """The modules in a block that `_block_forward` does not call."""
    for norm in (block.norm1, block.norm1_context):
        yield from (norm, norm.norm)
    yield from (block.norm2, block.ff, block.ff.net[0])
    if not block.context_pre_only:
        yield from (block.norm2_context, block.ff_context, block.ff_context.net[0])
    for attn in (block.attn, block.attn2):
        if attn is not None:
            yield attn
            norms = (getattr(attn, f"norm_{name}", None) for name in ("q", "k", "added_q", "added_k"))
            yield from (norm for norm in norms if norm is not None)


def _attention(attn: Any, x: torch.Tensor, context: torch.Tensor | None = None, **kwargs):
    """What `attn(hidden_states=x, encoder_hidden_states=context)` gives."""
    if kwargs or not _is_fusible(attn):
        if context is None:
            return attn(hidden_states=x, **kwargs)
        return attn(hidden_states=x, encoder_hidden_states=context, **kwargs)
    split = (attn.heads, -1)
    qkv = [linear(x).unflatten(-1, split) for linear in (attn.to_q, attn.to_k, attn.to_v)]
    text, text_weights = None, None
    if context is not None:
        text = [linear(context).unflatten(-1, split) for linear in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)]
        text_weights = (attn.norm_added_q.weight, attn.norm_added_k.weight)
    weights = (attn.norm_q.weight, attn.norm_k.weight)
    inputs = qk_rms_norm(qkv, weights, txt_qkv=text, txt_weights=text_weights, eps=attn.norm_q.eps)
    out = F.scaled_dot_product_attention(*inputs).transpose(1, 2).flatten(2)
    image = attn.to_out[1](attn.to_out[0](out[:, : x.shape[1]]))
    if context is None:
        return image
    text = out[:, x.shape[1] :]
    return image, text if attn.context_pre_only else attn.to_add_out(text)


def _feed_forward(ff: Any, x: torch.Tensor) -> torch.Tensor:
    x = gelu(ff.net[0].proj(x))
    for layer in ff.net[1:]:
        x = layer(x)
    return x


def _block_forward(
    self,
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    temb: torch.Tensor,
    joint_attention_kwargs: dict | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """`JointTransformerBlock.forward`: (encoder_hidden_states, hidden_states)."""
    # Feed-forward in chunks saves memory at the price of speed: not fused.
    if self._chunk_size is not None or _runs_stock(self, _parts_of_block(self)):
        return type(self).forward(self, hidden_states, encoder_hidden_states, temb, joint_attention_kwargs)
    kwargs = joint_attention_kwargs or {}
    emb = self.norm1.linear(self.norm1.silu(temb))
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp, *second = emb.chunk(9 if self.use_dual_attention else 6, dim=1)
    normed = ada_layer_norm(hidden_states, shift, scale, *second[:2], eps=self.norm1.norm.eps)
    normed, *normed2 = normed if self.use_dual_attention else (normed,)
    if self.context_pre_only:
        context = _continuous_norm_forward(self.norm1_context, encoder_hidden_states, temb)
    else:
        text_emb = self.norm1_context.linear(self.norm1_context.silu(temb)).chunk(6, dim=1)
        context = ada_layer_norm(encoder_hidden_states, *text_emb[:2], eps=self.norm1_context.norm.eps)
    out, text_out = _attention(self.attn, normed, context, **kwargs)
    dual = (_attention(self.attn2, *normed2, **kwargs), second[2]) if self.use_dual_attention else ()
    modulation = {"shift": shift_mlp, "scale": scale_mlp, "eps": self.norm2.eps}
    hidden_states, normed = gated_residual(hidden_states, out, gate, *dual, **modulation)
    hidden_states = gated_residual(hidden_states, _feed_forward(self.ff, normed), gate_mlp)
    if self.context_pre_only:
        return None, hidden_states
    _, _, gate, shift_mlp, scale_mlp, gate_mlp = text_emb
    modulation = {"shift": shift_mlp, "scale": scale_mlp, "eps": self.norm2_context.eps}
    text, normed = gated_residual(encoder_hidden_states, text_out, gate, **modulation)
    return gated_residual(text, _feed_forward(self.ff_context, normed), gate_mlp), hidden_states


def _continuous_norm_forward(self, x: torch.Tensor, conditioning_embedding: torch.Tensor) -> torch.Tensor:
    """`AdaLayerNormContinuous.forward`; its linear gives the scale first."""
    if _runs_stock(self, iter((self.norm,))):
        return type(self).forward(self, x, conditioning_embedding)
    scale, shift = self.linear(self.silu(conditioning_embedding).to(x.dtype)).chunk(2, dim=1)
    return ada_layer_norm(x, shift, scale, eps=self.norm.eps)
