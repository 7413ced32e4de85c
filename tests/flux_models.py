"""Untrained FLUX.1 pipelines of width 64 with 32-pixel images, in the hub's layout: every part in miniature."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from transformers import CLIPTextModel

from advgrpo.tiny import architecture
from tests.unit_size import UNIT

# The image tokens of a 32-pixel picture are 16: with these points the shift differs from 1 and moves with the size.
SHIFTING = {"base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 8, "max_image_seq_len": 64, "shift": 3.0}


def transformer(*, guidance_embeds: bool = True, layers: int = 2, single_layers: int = 2) -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
        in_channels=64,
        num_layers=layers,
        num_single_layers=single_layers,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=architecture.TEXT_WIDTH,
        pooled_projection_dim=architecture.TEXT_WIDTH // 2,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(8, 12, 12),
    )


def pipeline(*, guidance_embeds: bool = True) -> FluxPipeline:
    """FLUX.1-dev's kind, or schnell's: without guidance and with a fixed shift."""
    clip, t5 = architecture.clip_tokenizer(UNIT), architecture.t5_tokenizer(UNIT)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        shifting = SHIFTING | {"use_dynamic_shifting": True} if guidance_embeds else {"shift": 1.0}
        pipe = FluxPipeline(
            transformer=transformer(guidance_embeds=guidance_embeds),
            scheduler=FlowMatchEulerDiscreteScheduler(**shifting),
            vae=architecture.vae(UNIT),
            text_encoder=CLIPTextModel(architecture.clip_text_encoder(len(clip), UNIT).config),
            tokenizer=clip,
            text_encoder_2=architecture.t5_text_encoder(len(t5)),
            tokenizer_2=t5,
        )
        pipe.vae.register_to_config(scaling_factor=1.3, shift_factor=0.1)
        with torch.no_grad():  # away from the start, where some gates and norms are trivial
            for parameter in pipe.transformer.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    return pipe


def save_pipeline(folder: Path, *, guidance_embeds: bool = True, shard: str = "10GB") -> Path:
    """Write one; `shard` bounds the files of weights, as the hub's large models have several."""
    pipeline(guidance_embeds=guidance_embeds).save_pretrained(folder, max_shard_size=shard)
    return folder
