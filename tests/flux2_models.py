"""Untrained FLUX.2 klein pipelines of width 64 with 32-pixel images, in the hub's layout: every part in miniature."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
)
from transformers import Qwen3Config, Qwen3ForCausalLM

from tests import qwen_models

TEXT_WIDTH, LAYERS = 16, 27  # the pipeline takes the hidden states 9, 18 and 27
# What the hub's template does with one message of a user, for a model that is not to think.
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def transformer(*, layers: int = 2, single_layers: int = 2) -> Flux2Transformer2DModel:
    return Flux2Transformer2DModel(
        in_channels=64,
        num_layers=layers,
        num_single_layers=single_layers,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=3 * TEXT_WIDTH,
        timestep_guidance_channels=32,
        axes_dims_rope=(8, 8, 8, 8),
        guidance_embeds=False,
    )


def text_encoder(vocab_size: int) -> Qwen3ForCausalLM:
    sizes = {"hidden_size": TEXT_WIDTH, "intermediate_size": TEXT_WIDTH, "num_hidden_layers": LAYERS, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 256}
    return Qwen3ForCausalLM(Qwen3Config(vocab_size=vocab_size, **sizes, **heads))


def vae() -> AutoencoderKLFlux2:
    """32 pixels are 8 latents; of a batch norm that has seen latents."""
    made = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 16, 16),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=8,
        sample_size=32,
    )
    made.bn.running_mean.copy_(torch.linspace(-0.3, 0.2, 64))
    made.bn.running_var.copy_(torch.linspace(0.5, 2.0, 64))
    return made


def pipeline(*, is_distilled: bool = False) -> Flux2KleinPipeline:
    words = qwen_models.tokenizer()
    words.chat_template = TEMPLATE
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        pipe = Flux2KleinPipeline(
            transformer=transformer(),
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
            vae=vae(),
            text_encoder=text_encoder(len(words)),
            tokenizer=words,
            is_distilled=is_distilled,
        )
        with torch.no_grad():  # away from the start, where some gates and norms are trivial
            for parameter in pipe.transformer.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    return pipe


def save_pipeline(folder: Path, *, is_distilled: bool = False, shard: str = "10GB") -> Path:
    """Write one; `shard` bounds the files of weights, as the hub's large models have several."""
    pipeline(is_distilled=is_distilled).save_pretrained(folder, max_shard_size=shard)
    return folder
