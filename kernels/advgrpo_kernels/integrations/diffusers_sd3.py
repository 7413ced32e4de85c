"""diffusers: the fused layer ops in the blocks of an `SD3Transformer2DModel` (SD3, SD3.5), one module at a time.

    from advgrpo_kernels.integrations import diffusers_sd3
    diffusers_sd3.accelerate(pipe.transformer)                        # or filter=lambda name, module: ...
    diffusers_sd3.restore(pipe.transformer)

Only `forward` of the chosen modules is replaced, on the instance: parameters, their names and the state dict stay, LoRA
layers of PEFT are called as they are, and checkpoints are interchangeable.

Fused: AdaLN norms (both of a dual-attention block in one pass), gate and residual with the following norm, GELU, and
the norms of q and k with the layout of attention, the last for models with RMS-normalised q and k (SD3.5) and the stock
attention processor; other attentions run as they are. float32 results agree with the original to 1e-5, half-precision
ones round less often than it does.
"""

from __future__ import annotations

import logging
import types
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from ..ops.ada_layer_norm import ada_layer_norm
from ..ops.gated_residual import gated_residual
from ..ops.gelu import gelu
from ..ops.qk_rms_norm import qk_rms_norm

logger = logging.getLogger("advgrpo_kernels.integrations")

STOCK_ATTENTION = "JointAttnProcessor2_0"


def accelerate(model: nn.Module, filter: Callable[[str, nn.Module], bool] | None = None) -> list[str]:
    """Replace the forward of `model`'s transformer blocks and of its last norm; returns the names of those replaced.

    Args:
        model: an SD3Transformer2DModel, also wrapped by PEFT.
        filter: called with (name, module) of each candidate; only those for which it is true are replaced. Default all.

    Raises:
        ValueError: no candidate, or none that the filter lets through; a chosen module is built in a way the fused
            forward does not cover.
        RuntimeError: a chosen module is replaced already.
    """
    candidates = [(name, module, _forward_of(module)) for name, module in model.named_modules()]
    # The last block's context norm is a part of that block, which replaces it.
    inside = [f"{name}." for name, _, forward in candidates if forward is _block_forward]
    candidates = [c for c in candidates if c[2] and not any(c[0].startswith(prefix) for prefix in inside)]
    chosen = [c for c in candidates if filter is None or filter(c[0], c[1])]
    if not chosen:
        raise ValueError(
            f"no module of {type(model).__name__} was replaced: {len(candidates)} candidates (JointTransformerBlock, "
            "AdaLayerNormContinuous), none chosen by the filter"
        )
    for name, module, forward in chosen:
        if "forward" in vars(module):
            raise RuntimeError(f"{name}: its forward is replaced already; restore(model) first")
        _check_supported(name, module, forward)
    for name, module, forward in chosen:
        module.forward = types.MethodType(forward, module)
        logger.info("%s (%s): %s", name, type(module).__name__, _description(module))
    return [name for name, _, _ in chosen]


def restore(model: nn.Module) -> list[str]:
    """Give every replaced module its own forward back; returns their names.

    Raises:
        RuntimeError: no module of `model` is replaced.
    """
    ours = (_block_forward, _continuous_norm_forward)
    names = []
    for name, module in model.named_modules():
        if getattr(vars(module).get("forward"), "__func__", None) in ours:
            del module.forward
            names.append(name)
            logger.info("%s (%s): original forward restored", name, type(module).__name__)
    if not names:
        raise RuntimeError(f"no module of {type(model).__name__} is replaced")
    return names


def _forward_of(module: nn.Module) -> Callable | None:
    names = {cls.__name__ for cls in type(module).__mro__}
    if "JointTransformerBlock" in names:
        return _block_forward
    return _continuous_norm_forward if "AdaLayerNormContinuous" in names else None


def _check_supported(name: str, module: nn.Module, forward: Callable) -> None:
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


def _is_fusible(attn: nn.Module | None) -> bool:
    """Whether q and k are RMS-normalised with a weight and nothing was hooked into the attention."""
    if attn is None or type(attn.processor).__name__ != STOCK_ATTENTION:
        return False
    norms = [attn.norm_q, attn.norm_k]
    if attn.added_kv_proj_dim is not None:
        norms += [attn.norm_added_q, attn.norm_added_k]
    return all(
        "RMSNorm" in type(n).__name__ and n.weight is not None and getattr(n, "bias", None) is None for n in norms
    )


def _attention(attn: nn.Module, x: torch.Tensor, context: torch.Tensor | None = None, **kwargs):
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


def _feed_forward(ff: nn.Module, x: torch.Tensor) -> torch.Tensor:
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
    if self._chunk_size is not None:  # feed-forward in chunks saves memory at the price of speed: not fused
        return type(self).forward(self, hidden_states, encoder_hidden_states, temb, joint_attention_kwargs)
    kwargs = joint_attention_kwargs or {}
    emb = self.norm1.linear(self.norm1.silu(temb))
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp, *second = emb.chunk(9 if self.use_dual_attention else 6, dim=1)
    normed = ada_layer_norm(hidden_states, shift, scale, *second[:2], eps=self.norm1.norm.eps)
    normed, normed2 = normed if self.use_dual_attention else (normed, None)
    if self.context_pre_only:
        context = _continuous_norm_forward(self.norm1_context, encoder_hidden_states, temb)
    else:
        text_emb = self.norm1_context.linear(self.norm1_context.silu(temb)).chunk(6, dim=1)
        context = ada_layer_norm(encoder_hidden_states, *text_emb[:2], eps=self.norm1_context.norm.eps)
    out, text_out = _attention(self.attn, normed, context, **kwargs)
    dual = (_attention(self.attn2, normed2, **kwargs), second[2]) if self.use_dual_attention else ()
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
    scale, shift = self.linear(self.silu(conditioning_embedding).to(x.dtype)).chunk(2, dim=1)
    return ada_layer_norm(x, shift, scale, eps=self.norm.eps)
