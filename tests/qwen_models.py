"""Untrained Qwen-Image pipelines of width 64 with 32-pixel images, in the hub's layout: every part in miniature."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from tests.unit_size import UNIT

TEXT_WIDTH = 64
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# Words of the pipeline's chat template, each one token as in the hub's vocabulary: its beginning is then 34 tokens.
TEMPLATE = ["system", "Describe", "user", "assistant"]  # after no space: their letters are joined before others' are
TEMPLATE += ["the", "image", "by", "detailing", "color", "shape", "size", "texture", "quantity", "text", "spatial"]
TEMPLATE += ["relationships", "of", "objects", "and", "background"]
# The image tokens of a 32-pixel picture are 16; the rest as on the hub.
SHIFTING = {
    "base_shift": 0.5, "max_shift": 0.9, "base_image_seq_len": 8, "max_image_seq_len": 64, "shift": 1.0,
    "shift_terminal": 0.02, "use_dynamic_shifting": True, "time_shift_type": "exponential",
}  # fmt: skip


def tokenizer() -> Qwen2Tokenizer:
    """Every word of the template and of the tiny world's captions is one token, by byte pairs from the left."""
    words = list(dict.fromkeys([*TEMPLATE, *UNIT.words]))
    spelled = [*(f"Ġ{word}" for word in words), *words]  # those after a space first: they then lose no letter
    merges = dict.fromkeys((word[:end], word[end]) for word in spelled for end in range(1, len(word)))
    letters = [*map(chr, range(33, 127)), "Ġ", "Ċ"]
    pieces = dict.fromkeys([*SPECIAL, *letters, *("".join(pair) for pair in merges)])
    vocab = {piece: number for number, piece in enumerate(pieces)}
    return Qwen2Tokenizer(vocab=vocab, merges=list(merges), additional_special_tokens=list(SPECIAL[1:]))


def text_encoder(vocab_size: int) -> Qwen2_5_VLForConditionalGeneration:
    text = {
        "vocab_size": vocab_size, "hidden_size": TEXT_WIDTH, "intermediate_size": TEXT_WIDTH, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 256,
        "rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10000.0},
        "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 1, "out_hidden_size": TEXT_WIDTH}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision))


def vae() -> AutoencoderKLQwenImage:
    """A quarter of the hub's reduction less: 32 pixels are 8 latents."""
    return AutoencoderKLQwenImage(
        base_dim=8, z_dim=16, dim_mult=[1, 2, 2], num_res_blocks=1, temperal_downsample=[False, True]
    )


def transformer(*, layers: int = 3) -> QwenImageTransformer2DModel:
    return QwenImageTransformer2DModel(
        in_channels=64,
        out_channels=16,
        num_layers=layers,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=TEXT_WIDTH,
        axes_dims_rope=(8, 12, 12),
    )


def pipeline() -> QwenImagePipeline:
    words = tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        pipe = QwenImagePipeline(
            transformer=transformer(),
            scheduler=FlowMatchEulerDiscreteScheduler(**SHIFTING),
            vae=vae(),
            text_encoder=text_encoder(len(words)),
            tokenizer=words,
        )
        with torch.no_grad():  # away from the start, where some gates and norms are trivial
            for parameter in pipe.transformer.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    return pipe


def save_pipeline(folder: Path, *, shard: str = "10GB") -> Path:
    """Write one; `shard` bounds the files of weights, as the hub's large models have several."""
    pipeline().save_pretrained(folder, max_shard_size=shard)
    return folder
