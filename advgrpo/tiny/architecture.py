"""Configurations of the tiny world's models: small, but in every mechanism what SD3.5-medium and DINOv2 are.

MMDiT with RMS-normalised queries and keys and dual attention in the first blocks, a 16-channel VAE, two CLIP text
encoders and a T5 with tokenizers made for the caption vocabulary, flow-matching Euler scheduler with shift 3.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
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

from advgrpo.tiny.shapes import CAPTION_WORDS, IMAGE_SIZE, vocabulary

CLIP_TOKENS = CAPTION_WORDS + 2  # begin and end of text
T5_TOKENS = CAPTION_WORDS + 1  # end of text
TEXT_WIDTH = 128  # the two CLIPs side by side, and the T5


def clip_tokenizer() -> CLIPTokenizer:
    """Byte-pair encoding in which every caption word is one token and any other text still encodes."""
    letters = [*"abcdefghijklmnopqrstuvwxyz", *"0123456789.,!?'\"-"]
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(
        vocab_size=4096, end_of_word_suffix="</w>", initial_alphabet=letters, show_progress=False
    )
    bpe.train_from_iterator([" ".join(vocabulary())] * 2, trainer)
    learned = bpe.get_vocab()
    pieces = sorted(learned, key=learned.get)
    pieces += [f"{c}</w>" for c in letters if f"{c}</w>" not in learned]
    vocab = {piece: i for i, piece in enumerate(["<|startoftext|>", "<|endoftext|>", *pieces])}
    merges = _merges(bpe)
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=CLIP_TOKENS)


def _merges(bpe: Tokenizer) -> list[tuple[str, str]]:
    import json

    merges = json.loads(bpe.to_str())["model"]["merges"]
    return [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in merges]


def t5_tokenizer() -> T5TokenizerFast:
    """Unigram pieces: every caption word whole, single letters for anything else."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,!?'\"-"
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(f"▁{word}", -1.0) for word in vocabulary()]
    pieces += [("▁", -8.0), *((letter, -10.0) for letter in letters)]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=T5_TOKENS)


def clip_text_encoder(vocab_size: int) -> CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        vocab_size=vocab_size,
        hidden_size=TEXT_WIDTH // 2,
        intermediate_size=TEXT_WIDTH,
        projection_dim=TEXT_WIDTH // 2,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=CLIP_TOKENS,
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


def vae() -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 64),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=16,
        sample_size=IMAGE_SIZE,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )


def transformer(*, width: int = 128, layers: int = 6, dual_layers: int = 3) -> SD3Transformer2DModel:
    return SD3Transformer2DModel(
        sample_size=IMAGE_SIZE // 4,
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


def pipeline(*, seed: int, width: int = 128, layers: int = 6, dual_layers: int = 3) -> StableDiffusion3Pipeline:
    """An untrained tiny SD3 pipeline; the same seed gives the same weights."""
    clip, t5 = clip_tokenizer(), t5_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return StableDiffusion3Pipeline(
            transformer=transformer(width=width, layers=layers, dual_layers=dual_layers),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=vae(),
            text_encoder=clip_text_encoder(len(clip)),
            tokenizer=clip,
            text_encoder_2=clip_text_encoder(len(clip)),
            tokenizer_2=clip,
            text_encoder_3=t5_text_encoder(len(t5)),
            tokenizer_3=t5,
        )


def backbone(*, seed: int, width: int = 96, layers: int = 4) -> Dinov2Model:
    """An untrained DINOv2: patches of 4 at 32 px, so 64 patch tokens beside the class token."""
    config = Dinov2Config(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        mlp_ratio=3,
        image_size=IMAGE_SIZE,
        patch_size=4,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Dinov2Model(config)
