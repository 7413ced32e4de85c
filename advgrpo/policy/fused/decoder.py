"""The image decoder of the SD3 family: our own forward over the stock weights of diffusers' AutoencoderKL.

Two precisions. float32 is the reference: the same operations as diffusers' `AutoencoderKL.decode`. bfloat16 runs
channels_last, the layout in which tensor-core convolutions need no transposes, with our kernels for GroupNorm and SiLU
on a GPU, whose statistics are in float32: sums over 2 million elements per group lose the image in bfloat16. On a CPU
float32 may lie in channels_last as well, where our kernels serve it too.
`psnr_gate` compares the two.

The module needs no diffusers. Parameter names are those of an AutoencoderKL's state dict (`decoder.*`,
`post_quant_conv.*`), architecture after "High-Resolution Image Synthesis with Latent Diffusion Models" (arXiv
2112.10752): conv_in, a middle of two ResNets around a single-head attention, up blocks of ResNets and
nearest-upsampling convolutions, GroupNorm + SiLU, conv_out.

Shapes: B images, latents [B, C, h, w], pixels [B, 3, H, W] with H = h·2^(levels - 1).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from advgrpo.errors import RunFailure, UserError
from advgrpo.runtime import rng
from advgrpo_kernels import group_norm

MIN_PSNR_DB = 40.0
GATED_IMAGES = 2  # of a run's first micro-batch
_EPS = 1e-6
_DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class DecoderConfig:
    """What of an AutoencoderKL's config.json the decoder depends on; the defaults are SD3's and SD3.5's."""

    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    latent_channels: int = 16
    out_channels: int = 3
    layers_per_block: int = 2
    norm_num_groups: int = 32
    mid_block_add_attention: bool = True
    use_post_quant_conv: bool = False
    scaling_factor: float = 1.5305
    shift_factor: float | None = 0.0609

    @classmethod
    def from_mapping(cls, config: Mapping[str, Any]) -> DecoderConfig:
        """From the contents of vae/config.json; where a key is absent, AutoencoderKL's own default applies.

        Raises:
            UserError: an activation, an up block or a latent normalisation that this decoder does not compute.
        """
        blocks = set(config.get("up_block_types", ()))
        if blocks - {"UpDecoderBlock2D"} or config.get("act_fn", "silu") != "silu":
            raise UserError(
                f"model.path: its VAE has up_block_types {sorted(blocks)} and act_fn {config.get('act_fn')!r}; want "
                "UpDecoderBlock2D and silu, as in the SD3 family"
            )
        if config.get("latents_mean") is not None or config.get("latents_std") is not None:
            raise UserError("model.path: its VAE has latents_mean or latents_std; only scaling and shift are supported")
        stock = {"layers_per_block": 1, "use_post_quant_conv": True, "shift_factor": None, "scaling_factor": 0.18215}
        known = {f.name for f in fields(cls)}
        chosen = stock | {name: value for name, value in config.items() if name in known}
        return cls(**{**chosen, "block_out_channels": tuple(chosen["block_out_channels"])})

    @property
    def scale(self) -> int:
        """Pixels per latent along each side."""
        return 2 ** (len(self.block_out_channels) - 1)


SD3_DECODER = DecoderConfig()


class _Norm(nn.Module):
    def __init__(self, groups: int, channels: int):
        super().__init__()
        self.groups = groups
        self.weight = nn.Parameter(torch.empty(channels))
        self.bias = nn.Parameter(torch.empty(channels))
        self.backend = "auto"

    def forward(self, x: Tensor, *, silu: bool = False) -> Tensor:
        return group_norm(x, self.groups, self.weight, self.bias, eps=_EPS, silu=silu, backend=self.backend)


class _ResNet(nn.Module):
    def __init__(self, inputs: int, outputs: int, groups: int):
        super().__init__()
        self.norm1, self.conv1 = _Norm(groups, inputs), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2, self.conv2 = _Norm(groups, outputs), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv1(self.norm1(x, silu=True))
        hidden = self.conv2(self.norm2(hidden, silu=True))
        return hidden.add_(x if self.conv_shortcut is None else self.conv_shortcut(x))


class _Attention(nn.Module):
    """One head over all pixels, with the residual."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.group_norm = _Norm(groups, channels)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.group_norm(x).flatten(2).transpose(1, 2).unsqueeze(1)  # [B, 1, H·W, C]
        mixed = F.scaled_dot_product_attention(self.to_q(tokens), self.to_k(tokens), self.to_v(tokens))
        return x + self.to_out[0](mixed).squeeze(1).transpose(1, 2).unflatten(2, x.shape[2:])


class _Middle(nn.Module):
    def __init__(self, channels: int, groups: int, attention: bool):
        super().__init__()
        self.resnets = nn.ModuleList(_ResNet(channels, channels, groups) for _ in range(2))
        self.attentions = nn.ModuleList([_Attention(channels, groups)] if attention else [])

    def forward(self, x: Tensor) -> Tensor:
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x)


class _Upsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class _Up(nn.Module):
    def __init__(self, inputs: int, outputs: int, layers: int, groups: int, upsample: bool):
        super().__init__()
        self.resnets = nn.ModuleList(_ResNet(inputs if i == 0 else outputs, outputs, groups) for i in range(layers))
        self.upsamplers = nn.ModuleList([_Upsample(outputs)] if upsample else [])

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.resnets, *self.upsamplers):
            x = layer(x)
        return x


class _Stack(nn.Module):
    """Everything under `decoder.` in the state dict."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = _Middle(widths[0], groups, config.mid_block_add_attention)
        before = (widths[0], *widths[:-1])
        self.up_blocks = nn.ModuleList(
            _Up(before[i], width, config.layers_per_block + 1, groups, upsample=i < len(widths) - 1)
            for i, width in enumerate(widths)
        )
        self.conv_norm_out = _Norm(groups, widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(self.conv_norm_out(x, silu=True))


class Decoder(nn.Module):
    """Latents to images; inference only.

    Args:
        config: the architecture; `SD3_DECODER` is SD3's and SD3.5's.
        dtype: torch.float32 (contiguous, the reference) or torch.bfloat16 (channels_last).
        device: where the weights live; "meta" counts without allocating.
        micro_batch: images decoded at once by `images`, which bounds memory.
        channels_last: memory layout of float32 as well: a quarter faster on a CPU, other rounding than the reference.
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        micro_batch: int = 8,
        channels_last: bool = False,
    ):
        super().__init__()
        if dtype not in _DTYPES:
            raise ValueError(f"dtype = {dtype}: want torch.float32 or torch.bfloat16")
        if micro_batch < 1:
            raise ValueError(f"micro_batch = {micro_batch}: want at least 1")
        self.config, self.micro_batch = config, micro_batch
        with torch.device("meta"):
            self.decoder = _Stack(config)
            channels = config.latent_channels
            self.post_quant_conv = nn.Conv2d(channels, channels, 1) if config.use_post_quant_conv else None
        fast_layout = channels_last or dtype == torch.bfloat16
        self.layout = torch.channels_last if fast_layout else torch.contiguous_format
        self.to(dtype=dtype)
        on_cpu = torch.device(device).type == "cpu"
        ours = dtype == torch.bfloat16 or (fast_layout and on_cpu)  # float32 on a GPU stays PyTorch's, the reference
        for module in self.modules():
            if isinstance(module, _Norm):
                module.float()
                module.backend = "auto" if ours else "torch"
        self.to_empty(device=device)
        self.to(memory_format=self.layout)
        self.requires_grad_(False).eval()

    @classmethod
    def from_state_dict(cls, config: DecoderConfig, state: Mapping[str, Tensor], **options) -> Decoder:
        """With the weights of an AutoencoderKL's state dict, whose encoder is ignored; options as in the constructor.

        Raises:
            UserError: a weight of the decoder is missing, or has another shape than the config says.
        """
        decoder = cls(config, **options)
        own = decoder.state_dict()
        wrong = [name for name, tensor in own.items() if name not in state or state[name].shape != tensor.shape]
        if wrong:
            found = list(state[wrong[0]].shape) if wrong[0] in state else "nothing"
            raise UserError(
                f"model.path: {len(wrong)} weights of its VAE do not match its config.json, first {wrong[0]!r}: want "
                f"{list(own[wrong[0]].shape)}, found {found}"
            )
        decoder.load_state_dict({name: state[name] for name in own})
        return decoder

    @classmethod
    def random(cls, config: DecoderConfig, *, seed: int, **options) -> Decoder:
        """Random weights of unit gain, N(0, 1 / fan-in), drawn on the CPU: pixels spread over most of [0, 1]."""
        decoder = cls(config, **options)
        generator = rng.generator(seed, "decoder_init")
        with torch.no_grad():
            for name, parameter in decoder.named_parameters():
                if parameter.ndim == 1:  # weights of norms are 1, biases 0
                    parameter.fill_(float("norm" in name and name.endswith("weight")))
                else:
                    drawn = torch.randn(parameter.shape, generator=generator)
                    parameter.copy_(drawn.div_(parameter[0].numel() ** 0.5))
        return decoder

    @property
    def dtype(self) -> torch.dtype:
        return self.decoder.conv_in.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.decoder.conv_in.weight.device

    @torch.no_grad()
    def forward(self, latents: Tensor) -> Tensor:
        """What `AutoencoderKL.decode` returns: unscaled latents [B, C, h, w] to pixels [B, 3, H, W] around [-1, 1]."""
        hidden = latents.to(self.device, self.dtype, memory_format=self.layout)
        if self.post_quant_conv is not None:
            hidden = self.post_quant_conv(hidden)
        return self.decoder(hidden)

    @torch.no_grad()
    def images(self, latents: Tensor) -> Tensor:
        """Images of the policy's latents: unscale, decode `micro_batch` at a time, map to [0, 1].

        Args:
            latents: [B, C, h, w] float32, scaled as the transformer sees them.

        Returns:
            [B, 3, H, W] float32, contiguous, in [0, 1].

        Raises:
            ValueError: another rank, dtype or channel count.
        """
        config = self.config
        if latents.ndim != 4 or latents.shape[1] != config.latent_channels or latents.dtype != torch.float32:
            raise ValueError(
                f"latents {list(latents.shape)} {latents.dtype}: want [B, {config.latent_channels}, h, w] float32"
            )
        batch, _, height, width = latents.shape
        shape = (batch, config.out_channels, height * config.scale, width * config.scale)
        images = torch.empty(shape, device=self.device)
        for start in range(0, batch, self.micro_batch):
            part = latents[start : start + self.micro_batch] / config.scaling_factor + (config.shift_factor or 0.0)
            images[start : start + self.micro_batch] = (self(part).float() / 2 + 0.5).clamp_(0, 1)
        return images


def decoded_at_once(resolution: int) -> int:
    """Images per call of a policy's decoder: as many pixels as eight images of 512, one at least."""
    return max(1, 8 * 512**2 // resolution**2)


class ImageQualityError(RunFailure):
    """The fast decoder's images differ from the reference's by more than the gate allows."""


def psnr_gate(fast: Decoder, reference: Decoder, latents: Tensor, *, minimum: float = MIN_PSNR_DB) -> float:
    """The worst image's peak signal-to-noise ratio, 10·log10(1 / MSE) in dB with peak signal 1.

    Args:
        fast, reference: decoders of the same weights.
        latents: [B, C, h, w] float32 as the sampler leaves them, B ≥ 1.
        minimum: dB below which the gate closes.

    Raises:
        ImageQualityError: below `minimum`, or an image that is not finite.
    """
    error = fast.images(latents).to(reference.device) - reference.images(latents)
    mse = error.double().square().mean(dim=(1, 2, 3))
    worst = float((-10 * torch.log10(mse)).min())  # NaN where an image is not finite, which fails the comparison
    if not worst >= minimum:
        raise ImageQualityError(
            f"the {fast.dtype} decoder reaches {worst:.1f} dB against {reference.dtype}, below {minimum:g} dB: its "
            "images would be scored differently. Decode in float32 (--no-fast), and report the GPU and the VAE"
        )
    return worst
