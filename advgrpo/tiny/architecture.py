"""Configurations of the tiny world's models: small, but in every mechanism what SD3.5-medium and DINOv2 are.

MMDiT with RMS-normalised queries and keys and dual attention in the first blocks, a 16-channel VAE, two CLIP text
encoders and a T5 with tokenizers made for the caption vocabulary, flow-matching Euler scheduler with shift 3.
"""

from __future__ import annotations

import string
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Dinov2Config,
    Dinov2Model,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from advgrpo.tiny import scenes
from advgrpo.tiny.byte_pairs import END, learn_merges


@dataclass(frozen=True)
class Size:
    """What one world's models are made for."""

    words: tuple[str, ...]  # every word of a caption
    caption_words: int  # pieces of the longest caption
    image_size: int
    dual_layers: int  # first blocks of the transformer with a second attention
    patch_size: int  # of the DINOv2: 64 patch tokens
    capitals: bool = False  # whether the T5 tells capital letters from small ones, as words to be drawn need

    @property
    def clip_tokens(self) -> int:
        return self.caption_words + 2  # begin and end of text

    @property
    def t5_tokens(self) -> int:
        return self.caption_words + 1  # end of text


TINY = Size(tuple(scenes.vocabulary()), scenes.CAPTION_WORDS, scenes.IMAGE_SIZE, dual_layers=2, patch_size=6)
TEXT_WIDTH = 128  # the two CLIPs side by side, and the T5


def clip_tokenizer(size: Size = TINY) -> CLIPTokenizer:
    """Byte-pair encoding in which every caption word is one token and any other text still encodes.

    The same pieces get the same numbers in every process. The pipeline "tiny" is shipped with this tokenizer;
    "tiny:words" and the preference model have others of an earlier version, of which that was not true. Their next
    rebuild takes this one.
    """
    letters = [*"abcdefghijklmnopqrstuvwxyz", *"0123456789.,!?'\"-"]
    merges = learn_merges(size.words)
    pieces = dict.fromkeys([*letters, *(f"{letter}{END}" for letter in letters), *map("".join, merges)])
    vocab = {piece: i for i, piece in enumerate(["<|startoftext|>", "<|endoftext|>", *pieces])}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=size.clip_tokens)


def t5_tokenizer(size: Size = TINY) -> T5TokenizerFast:
    """Unigram pieces: every caption word whole, single letters for anything else."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,!?'\"-" + (string.ascii_uppercase if size.capitals else "")
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(f"▁{word}", -1.0) for word in size.words]
    pieces += [("▁", -8.0), *((letter, -10.0) for letter in letters)]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=size.t5_tokens)


def clip_text_encoder(vocab_size: int, size: Size = TINY) -> CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        vocab_size=vocab_size,
        hidden_size=TEXT_WIDTH // 2,
        intermediate_size=TEXT_WIDTH,
        projection_dim=TEXT_WIDTH // 2,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=size.clip_tokens,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return CLIPTextModelWithProjection(config)


def t5_text_encoder(vocab_size: int) -> T5EncoderModel:
    config = T5Config(
        vocab_size=vocab_size, d_model=TEXT_WIDTH, d_kv=32, d_ff=TEXT_WIDTH, num_layers=1, num_heads=2, dropout_rate=0.0
    )
    return T5EncoderModel(config)


def vae(size: Size = TINY) -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 64),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=16,
        sample_size=size.image_size,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )


def transformer(
    *, width: int = 128, layers: int = 6, dual_layers: int | None = None, size: Size = TINY
) -> SD3Transformer2DModel:
    dual_layers = size.dual_layers if dual_layers is None else dual_layers
    return SD3Transformer2DModel(
        sample_size=size.image_size // 4,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=layers,
        attention_head_dim=32,
        num_attention_heads=width // 32,
        joint_attention_dim=TEXT_WIDTH,
        caption_projection_dim=width,
        pooled_projection_dim=TEXT_WIDTH,
        pos_embed_max_size=16,
        dual_attention_layers=tuple(range(dual_layers)),
        qk_norm="rms_norm",
    )


def pipeline(
    *, seed: int, width: int = 128, layers: int = 6, dual_layers: int | None = None, size: Size = TINY
) -> StableDiffusion3Pipeline:
    """An untrained tiny SD3 pipeline; the same seed gives the same weights."""
    clip, t5 = clip_tokenizer(size), t5_tokenizer(size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return StableDiffusion3Pipeline(
            transformer=transformer(width=width, layers=layers, dual_layers=dual_layers, size=size),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=vae(size),
            text_encoder=clip_text_encoder(len(clip), size),
            tokenizer=clip,
            text_encoder_2=clip_text_encoder(len(clip), size),
            tokenizer_2=clip,
            text_encoder_3=t5_text_encoder(len(t5)),
            tokenizer_3=t5,
        )


def backbone(*, seed: int, width: int = 96, layers: int = 4, size: Size = TINY) -> Dinov2Model:
    """An untrained DINOv2, 64 patch tokens beside the class token."""
    config = Dinov2Config(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        mlp_ratio=3,
        image_size=size.image_size,
        patch_size=size.patch_size,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Dinov2Model(config)
