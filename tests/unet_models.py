"""Untrained SD1.5- and SDXL-type pipelines of width 32 with 32-pixel images: every part in miniature."""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextModel

from advgrpo.tiny import architecture
from tests.unit_size import UNIT

NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
SDXL_UNET = {  # unet/config.json of stabilityai/stable-diffusion-xl-base-1.0, as far as it shapes weights
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "use_linear_projection": True,
}


def unet(*, xl: bool) -> UNet2DConditionModel:
    text = architecture.TEXT_WIDTH // 2  # of one CLIP
    settings = {"cross_attention_dim": text}
    if xl:
        settings = {
            "cross_attention_dim": 2 * text,
            "transformer_layers_per_block": (1, 2),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + text,
        }
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        attention_head_dim=8,
        **settings,
    )


def vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 32),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=32,
        scaling_factor=0.4,
    )


def save_pipeline(folder: Path, *, xl: bool) -> Path:
    """Write one with the scheduler that its family ships: PNDM for SD1.5, Euler for SDXL."""
    tokenizer = architecture.clip_tokenizer(UNIT)
    torch.manual_seed(3)
    projecting = architecture.clip_text_encoder(len(tokenizer), UNIT)
    parts = {
        "unet": unet(xl=xl),
        "vae": vae(),
        "text_encoder": CLIPTextModel(projecting.config),
        "tokenizer": tokenizer,
    }
    if xl:
        scheduler = EulerDiscreteScheduler(timestep_spacing="leading", **NOISE)
        pipe = StableDiffusionXLPipeline(
            scheduler=scheduler, text_encoder_2=projecting, tokenizer_2=tokenizer, add_watermarker=False, **parts
        )
    else:
        scheduler = PNDMScheduler(skip_prk_steps=True, **NOISE)
        pipe = StableDiffusionPipeline(
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
            **parts,
        )
    pipe.save_pretrained(folder)
    return folder
