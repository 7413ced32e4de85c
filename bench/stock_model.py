"""The stock SD3 transformer in plain eager PyTorch, with PEFT-style unmerged LoRA: the model that B0 runs.

Written here, not imported, because the GPU machine has no diffusers. Module names, state dict and the sequence of ATen
operators are those of diffusers' SD3Transformer2DModel (0.42) with a PEFT adapter named "default"; tests compare the
operator traces of the two, forward and backward, and the numbers below are gated (tests/policy/test_stock_model.py).

Architecture: MMDiT, arXiv 2403.03206; dual attention and QK RMSNorm as in Stable Diffusion 3.5.

Shapes: B rows, T image tokens, S text tokens, C channels = heads x head_dim, D head_dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

TIMESTEP_CHANNELS = 256
NORM_EPS = 1e-6
ADAPTER = "default"
LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")


@dataclass(frozen=True)
class StockConfig:
    """The fields of diffusers' config.json that change the network."""

    num_layers: int
    num_attention_heads: int
    pos_embed_max_size: int
    attention_head_dim: int = 64
    joint_attention_dim: int = 4096
    pooled_projection_dim: int = 2048
    sample_size: int = 128
    patch_size: int = 2
    in_channels: int = 16
    out_channels: int = 16
    dual_attention_layers: tuple[int, ...] = ()
    qk_norm: str | None = None

    @property
    def channels(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def caption_projection_dim(self) -> int:
        return self.channels


SD3_MEDIUM = StockConfig(num_layers=24, num_attention_heads=24, pos_embed_max_size=192)
SD35_MEDIUM = StockConfig(
    num_layers=24,
    num_attention_heads=24,
    pos_embed_max_size=384,
    dual_attention_layers=tuple(range(13)),
    qk_norm="rms_norm",
)
SD35_LARGE = StockConfig(num_layers=38, num_attention_heads=38, pos_embed_max_size=192, qk_norm="rms_norm")
# The shipped tiny pipeline's (advgrpo/tiny/architecture.py).
TINY = StockConfig(
    num_layers=6,
    num_attention_heads=4,
    attention_head_dim=32,
    joint_attention_dim=128,
    pooled_projection_dim=128,
    sample_size=12,
    pos_embed_max_size=16,
    dual_attention_layers=(0, 1),
    qk_norm="rms_norm",
)


class RMSNorm(nn.Module):
    """Eight launches in bfloat16: to float32, square, mean, + eps, rsqrt, scale, back, weight."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        mean_square = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
        normalised = x * torch.rsqrt(mean_square + NORM_EPS)
        if self.weight.dtype in (torch.float16, torch.bfloat16):
            normalised = normalised.to(self.weight.dtype)
        return normalised * self.weight


def _layer_norm(channels: int) -> nn.LayerNorm:
    return nn.LayerNorm(channels, eps=NORM_EPS, elementwise_affine=False)


def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale[:, None]) + shift[:, None]


class AdaLayerNormZero(nn.Module):
    """AdaLN-Zero: the modulated input, then the vectors the block still needs."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.silu, self.linear, self.norm = nn.SiLU(), nn.Linear(channels, 6 * channels), _layer_norm(channels)

    def forward(self, x: Tensor, embedding: Tensor) -> tuple[Tensor, ...]:
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.linear(self.silu(embedding)).chunk(6, dim=1)
        return _modulate(self.norm(x), shift, scale), gate, mlp_shift, mlp_scale, mlp_gate


class AdaLayerNormZeroDual(nn.Module):
    """AdaLN-Zero of a dual-attention block: one norm, two modulated inputs."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.silu, self.linear, self.norm = nn.SiLU(), nn.Linear(channels, 9 * channels), _layer_norm(channels)

    def forward(self, x: Tensor, embedding: Tensor) -> tuple[Tensor, ...]:
        vectors = self.linear(self.silu(embedding)).chunk(9, dim=1)
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate, dual_shift, dual_scale, dual_gate = vectors
        normalised = self.norm(x)
        first, second = _modulate(normalised, shift, scale), _modulate(normalised, dual_shift, dual_scale)
        return first, gate, mlp_shift, mlp_scale, mlp_gate, second, dual_gate


class AdaLayerNormContinuous(nn.Module):
    """Norm, scale and shift without gates: the model's output and the last block's text."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.silu, self.linear, self.norm = nn.SiLU(), nn.Linear(channels, 2 * channels), _layer_norm(channels)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        scale, shift = self.linear(self.silu(embedding).to(x.dtype)).chunk(2, dim=1)
        return self.norm(x) * (1 + scale)[:, None, :] + shift[:, None, :]


class Attention(nn.Module):
    """Joint attention over image and text tokens, or the image's own where `joint` is False (the dual attention).

    The last block's text leaves no output (`context_pre_only`), but its queries are computed as diffusers does.
    """

    def __init__(self, config: StockConfig, *, joint: bool, context_pre_only: bool = False) -> None:
        super().__init__()
        channels, head_dim = config.channels, config.attention_head_dim
        normalise = config.qk_norm == "rms_norm"
        if not normalise and config.qk_norm is not None:
            raise ValueError(f"qk_norm must be None or 'rms_norm', got {config.qk_norm!r}")
        self.heads, self.head_dim, self.joint, self.context_pre_only = (
            config.num_attention_heads,
            head_dim,
            joint,
            context_pre_only,
        )
        self.norm_q, self.norm_k = (RMSNorm(head_dim) if normalise else None for _ in range(2))
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        if joint:
            self.add_k_proj, self.add_v_proj, self.add_q_proj = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels), nn.Dropout(0.0)])
        if joint and not context_pre_only:
            self.to_add_out = nn.Linear(channels, channels)
        if joint:
            self.norm_added_q, self.norm_added_k = (RMSNorm(head_dim) if normalise else None for _ in range(2))

    def _split(self, x: Tensor) -> Tensor:
        """[B, T, C] -> [B, heads, T, D]"""
        return x.view(len(x), -1, self.heads, self.head_dim).transpose(1, 2)

    def _qkv(self, x: Tensor, projections, norms) -> list[Tensor]:
        q, k, v = (self._split(projection(x)) for projection in projections)
        norm_q, norm_k = norms
        return [q if norm_q is None else norm_q(q), k if norm_k is None else norm_k(k), v]

    def forward(self, image: Tensor, text: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """image [B, T, C], text [B, S, C] -> the same shapes; text None in a dual attention."""
        qkv = self._qkv(image, (self.to_q, self.to_k, self.to_v), (self.norm_q, self.norm_k))
        if self.joint:
            norms = (self.norm_added_q, self.norm_added_k)
            added = self._qkv(cast(Tensor, text), (self.add_q_proj, self.add_k_proj, self.add_v_proj), norms)
            qkv = [torch.cat([own, other], dim=2) for own, other in zip(qkv, added)]
        q, k, v = qkv
        out = F.scaled_dot_product_attention(q, k, v)
        out = out.transpose(1, 2).reshape(len(image), -1, self.heads * self.head_dim)
        out_text = None
        if self.joint:
            out, out_text = out[:, : image.shape[1]], out[:, image.shape[1] :]
            if not self.context_pre_only:
                out_text = self.to_add_out(out_text)
        return self.to_out[1](self.to_out[0](out)), out_text


class _Gelu(nn.Module):
    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(channels, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x), approximate="tanh")


class FeedForward(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = 4 * channels
        self.net = nn.ModuleList([_Gelu(channels, hidden), nn.Dropout(0.0), nn.Linear(hidden, channels)])

    def forward(self, x: Tensor) -> Tensor:
        for module in self.net:
            x = module(x)
        return x


class JointTransformerBlock(nn.Module):
    def __init__(self, config: StockConfig, *, context_pre_only: bool, dual: bool) -> None:
        super().__init__()
        channels = config.channels
        self.context_pre_only, self.dual = context_pre_only, dual
        self.norm1 = AdaLayerNormZeroDual(channels) if dual else AdaLayerNormZero(channels)
        self.norm1_context = AdaLayerNormContinuous(channels) if context_pre_only else AdaLayerNormZero(channels)
        self.attn = Attention(config, joint=True, context_pre_only=context_pre_only)
        if dual:
            self.attn2 = Attention(config, joint=False)
        self.norm2, self.ff = _layer_norm(channels), FeedForward(channels)
        if not context_pre_only:
            self.norm2_context, self.ff_context = _layer_norm(channels), FeedForward(channels)

    def forward(self, image: Tensor, text: Tensor, embedding: Tensor) -> tuple[Tensor | None, Tensor]:
        """(text [B, S, C] or None after the last block, image [B, T, C])"""
        image_input, gate, mlp_shift, mlp_scale, mlp_gate, *dual = self.norm1(image, embedding)
        if self.context_pre_only:
            text_input = self.norm1_context(text, embedding)
        else:
            text_input, text_gate, text_mlp_shift, text_mlp_scale, text_mlp_gate = self.norm1_context(text, embedding)

        attended, attended_text = self.attn(image_input, text_input)
        image = image + gate.unsqueeze(1) * attended
        if self.dual:
            second_input, second_gate = dual
            image = image + second_gate.unsqueeze(1) * self.attn2(second_input)[0]
        hidden = self.ff(_modulate(self.norm2(image), mlp_shift, mlp_scale))
        image = image + mlp_gate.unsqueeze(1) * hidden
        if self.context_pre_only:
            return None, image

        text = text + text_gate.unsqueeze(1) * attended_text
        hidden = self.ff_context(_modulate(self.norm2_context(text), text_mlp_shift, text_mlp_scale))
        return text + text_mlp_gate.unsqueeze(1) * hidden, image


class PatchEmbed(nn.Module):
    """Patches as tokens plus a crop from the middle of a larger table of 2-D sine positions."""

    pos_embed: Tensor

    def __init__(self, config: StockConfig) -> None:
        super().__init__()
        self.patch_size, self.table_side = config.patch_size, config.pos_embed_max_size
        size = (config.patch_size, config.patch_size)
        self.proj = nn.Conv2d(config.in_channels, config.channels, kernel_size=size, stride=size)
        table = _sine_positions(config.channels, self.table_side, config.sample_size // config.patch_size)
        self.register_buffer("pos_embed", table.float().unsqueeze(0))

    def _crop(self, height: int, width: int) -> Tensor:
        side = self.table_side
        if max(height, width) > side:
            raise ValueError(f"latents of {height} x {width} patches exceed pos_embed_max_size = {side}")
        top, left = (side - height) // 2, (side - width) // 2
        table = self.pos_embed.reshape(1, side, side, -1)[:, top : top + height, left : left + width, :]
        return table.reshape(1, -1, table.shape[-1])

    def forward(self, latents: Tensor) -> Tensor:
        height, width = (size // self.patch_size for size in latents.shape[-2:])
        tokens = self.proj(latents).flatten(2).transpose(1, 2)
        return (tokens + self._crop(height, width)).to(tokens.dtype)


def _sine_positions(channels: int, side: int, base: int) -> Tensor:
    """[side * side, channels] float64: sines and cosines of the column in the first half, of the row in the second."""
    steps = torch.arange(side, dtype=torch.float32) / (side / base)
    rows, columns = torch.meshgrid(steps, steps, indexing="ij")
    quarter = torch.arange(channels // 4, dtype=torch.float64)
    frequencies = 1.0 / 10000 ** (quarter / (channels / 4))
    angles = [torch.outer(axis.reshape(-1), frequencies) for axis in (columns, rows)]
    return torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=1)


class _TwoLinears(nn.Module):
    def __init__(self, inputs: int, channels: int) -> None:
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(inputs, channels), nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class TimeTextEmbed(nn.Module):
    """Timestep and pooled text to one conditioning vector [B, C]."""

    def __init__(self, config: StockConfig) -> None:
        super().__init__()
        self.timestep_embedder = _TwoLinears(TIMESTEP_CHANNELS, config.channels)
        self.text_embedder = _TwoLinears(config.pooled_projection_dim, config.channels)

    def forward(self, timestep: Tensor, pooled: Tensor) -> Tensor:
        waves = _timestep_waves(timestep).to(dtype=pooled.dtype)
        return self.timestep_embedder(waves) + self.text_embedder(pooled)


def _timestep_waves(timestep: Tensor) -> Tensor:
    """[B] -> [B, 256] cosines, then sines; the detours (times one, two concatenations) are diffusers' launches."""
    half = TIMESTEP_CHANNELS // 2
    exponent = -math.log(10000) * torch.arange(0, half, dtype=torch.float32, device=timestep.device)
    frequencies = torch.exp(exponent / half)
    angles = 1 * (timestep[:, None].float() * frequencies[None, :])
    waves = torch.cat([torch.sin(angles), torch.cos(angles)], dim=-1)
    return torch.cat([waves[:, half:], waves[:, :half]], dim=-1)


class StockTransformer(nn.Module):
    """latents [B, in, H, W], text [B, S, joint], pooled [B, E], timestep [B] in 0..1000 -> velocity [B, out, H, W]."""

    def __init__(self, config: StockConfig) -> None:
        super().__init__()
        self.config = config
        channels, last = config.channels, config.num_layers - 1
        self.pos_embed = PatchEmbed(config)
        self.time_text_embed = TimeTextEmbed(config)
        self.context_embedder = nn.Linear(config.joint_attention_dim, config.caption_projection_dim)
        self.transformer_blocks = nn.ModuleList(
            JointTransformerBlock(config, context_pre_only=i == last, dual=i in config.dual_attention_layers)
            for i in range(config.num_layers)
        )
        self.norm_out = AdaLayerNormContinuous(channels)
        self.proj_out = nn.Linear(channels, config.patch_size**2 * config.out_channels)
        self.gradient_checkpointing = False

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, pooled_projections: Tensor, timestep: Tensor
    ) -> Tensor:
        height, width = hidden_states.shape[-2:]
        image = self.pos_embed(hidden_states).contiguous()
        embedding = self.time_text_embed(timestep, pooled_projections)
        text = self.context_embedder(encoder_hidden_states)
        for block in self.transformer_blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                text, image = checkpoint(block, image, text, embedding, use_reentrant=False)
            else:
                text, image = block(image, text, embedding)
        tokens = self.proj_out(self.norm_out(image, embedding))

        patch, out = self.config.patch_size, self.config.out_channels
        grid = tokens.reshape(len(tokens), height // patch, width // patch, patch, patch, out)
        return torch.einsum("nhwpqc->nchpwq", grid).reshape(len(tokens), out, height, width)


class LoraLinear(nn.Module):
    """y = W x + b + (alpha / r) B A x with the module names of a PEFT adapter; A gaussian with std 1/r, B zero.

    `enabled` off leaves the adapter out; `merged` on uses the weight that `merge` has last computed instead.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.base_layer, self.scaling, self.enabled, self.merged = base, alpha / rank, True, False
        self.merged_weight = torch.empty(0)
        options: dict[str, Any] = {"bias": False, "device": base.weight.device, "dtype": base.weight.dtype}
        a, b = nn.Linear(base.in_features, rank, **options), nn.Linear(rank, base.out_features, **options)
        self.lora_A, self.lora_B = nn.ModuleDict({ADAPTER: a}), nn.ModuleDict({ADAPTER: b})
        with torch.no_grad():
            a.weight.normal_(std=1 / rank, generator=generator)
            b.weight.zero_()

    def _adapter(self) -> tuple[nn.Linear, nn.Linear]:
        return cast(nn.Linear, self.lora_A[ADAPTER]), cast(nn.Linear, self.lora_B[ADAPTER])

    @torch.no_grad()
    def merge(self) -> None:
        """W + (alpha / r) B A beside W, which stays as it is: PEFT's own merging and unmerging would let it drift."""
        (a, b), weight = self._adapter(), self.base_layer.weight
        self.merged_weight = torch.addmm(weight, b.weight, a.weight, alpha=self.scaling)

    def forward(self, x: Tensor) -> Tensor:
        if self.merged:
            return F.linear(x, self.merged_weight, self.base_layer.bias)
        result = self.base_layer(x)
        if not self.enabled:
            return result
        a, b = self._adapter()
        added = result + b(a(x.to(a.weight.dtype))) * self.scaling
        return added.to(result.dtype)


def add_lora(
    model: StockTransformer, *, rank: int = 32, alpha: float = 64, generator: torch.Generator | None = None
) -> list[LoraLinear]:
    """Freeze the model and put an adapter on the eight projections of every joint attention.

    Adapters take the weights' dtype, as diffusers' `add_adapter` does. The last block has no text output to adapt.
    """
    model.requires_grad_(False)
    adapters = []
    for block in model.transformer_blocks:
        attn: Any = block.attn
        for target in LORA_TARGETS:
            owner, _, index = target.partition(".")
            if not hasattr(attn, owner):
                continue
            base = attn.get_submodule(target)
            adapters.append(LoraLinear(base, rank, alpha, generator))
            if index:
                attn.to_out[int(index)] = adapters[-1]
            else:
                setattr(attn, owner, adapters[-1])
    return adapters
