"""Architectures by name, without a network, and their parameters counted on the meta device.

The constants are the values of the hub's config.json files (transformer/, vae/, text_encoder*/ of each pipeline;
config.json of each backbone), without the keys that no weight depends on. A local folder's own files are read instead.
"""

from __future__ import annotations

import copy
import functools
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from advgrpo.config import LoraSection
from advgrpo.errors import UserError
from advgrpo.policy.fused.decoder import SD3_DECODER, Decoder, DecoderConfig
from advgrpo.policy.pipelines import FAMILIES
from advgrpo.runtime.transfer import pinned_bytes
from advgrpo.tiny import WORLDS

if TYPE_CHECKING:  # diffusers takes seconds
    from diffusers import AutoencoderKLQwenImage

_MMDIT: dict[str, Any] = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
}
_SD35_LARGE = _MMDIT | {
    "num_layers": 38,
    "num_attention_heads": 38,
    "caption_projection_dim": 2432,
    "qk_norm": "rms_norm",
}
TRANSFORMERS = {
    "stabilityai/stable-diffusion-3-medium-diffusers": _MMDIT,
    "stabilityai/stable-diffusion-3.5-medium": _MMDIT
    | {"pos_embed_max_size": 384, "dual_attention_layers": list(range(13)), "qk_norm": "rms_norm"},
    "stabilityai/stable-diffusion-3.5-large": _SD35_LARGE,
    "stabilityai/stable-diffusion-3.5-large-turbo": _SD35_LARGE,
}
_FLUX1: dict[str, Any] = {
    "_class_name": "FluxTransformer2DModel",
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "axes_dims_rope": [16, 56, 56],
    "out_channels": None,
}
FLUX_TRANSFORMERS = {
    "black-forest-labs/FLUX.1-dev": _FLUX1 | {"guidance_embeds": True},
    "black-forest-labs/FLUX.1-schnell": _FLUX1 | {"guidance_embeds": False},
}
_KLEIN_4B: dict[str, Any] = {
    "_class_name": "Flux2Transformer2DModel",
    "in_channels": 128,
    "num_layers": 5,
    "num_single_layers": 20,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 7680,
    "timestep_guidance_channels": 256,
    "axes_dims_rope": [32, 32, 32, 32],
    "guidance_embeds": False,
}
FLUX2_TRANSFORMERS = {f"black-forest-labs/FLUX.2-klein-{name}": _KLEIN_4B for name in ("base-4B", "4B")}
QWEN_TRANSFORMERS: dict[str, dict[str, Any]] = {
    "Qwen/Qwen-Image": {
        "_class_name": "QwenImageTransformer2DModel",
        "patch_size": 2,
        "in_channels": 64,
        "out_channels": 16,
        "num_layers": 60,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 3584,
        "guidance_embeds": False,
        "axes_dims_rope": [16, 56, 56],
    },
}
_CLIP_L = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "projection_dim": 768,
    "vocab_size": 49408,
}
_CLIP_G = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_attention_heads": 20,
    "num_hidden_layers": 32,
    "projection_dim": 1280,
    "vocab_size": 49408,
}
_T5_XXL = {
    "d_ff": 10240,
    "d_kv": 64,
    "d_model": 4096,
    "feed_forward_proj": "gated-gelu",
    "num_heads": 64,
    "num_layers": 24,
    "vocab_size": 32128,
    "is_decoder": False,
}
_QWEN25_VL = {
    "text_config": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
    },
    "vision_config": {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 3584,
    },
    "tie_word_embeddings": False,
}
QWEN_TEXT_ENCODERS = (("Qwen2_5_VLForConditionalGeneration", _QWEN25_VL),)
_QWEN3_4B = {
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}
FLUX2_TEXT_ENCODERS = (("Qwen3ForCausalLM", _QWEN3_4B),)
_CLIP_CLASS, _T5_CLASS = "CLIPTextModelWithProjection", "T5EncoderModel"
FLUX_TEXT_ENCODERS = (("CLIPTextModel", _CLIP_L), (_T5_CLASS, _T5_XXL))
TEXT_ENCODERS = ((_CLIP_CLASS, _CLIP_L), (_CLIP_CLASS, _CLIP_G), (_T5_CLASS, _T5_XXL))
KNOWN = (*TRANSFORMERS, *FLUX_TRANSFORMERS, *FLUX2_TRANSFORMERS, *QWEN_TRANSFORMERS)
FLUX2_DECODER = DecoderConfig(latent_channels=32, use_post_quant_conv=True)  # of AutoencoderKLFlux2, AutoencoderKL's
_TEXT_FOLDERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
CLIP_TOKENS = 77
BACKBONES = {
    "facebook/dinov2-small": {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6},
    "facebook/dinov2-base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},
    "facebook/dinov2-large": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16},
    "facebook/dinov2-giant": {
        "hidden_size": 1536,
        "num_hidden_layers": 40,
        "num_attention_heads": 24,
        "use_swiglu_ffn": True,
    },
}
for _backbone in BACKBONES.values():
    _backbone |= {"patch_size": 14, "image_size": 518, "mlp_ratio": 4}


@dataclass(frozen=True)
class VideoVae:
    """What of an AutoencoderKLQwenImage's config.json its size depends on; the defaults are Qwen-Image's."""

    base_dim: int = 96
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temperal_downsample: tuple[bool, ...] = (False, True, True)

    @classmethod
    def from_mapping(cls, config: dict[str, Any]) -> VideoVae:
        """From the contents of vae/config.json."""
        chosen = {field.name: config[field.name] for field in fields(cls) if field.name in config}
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in chosen.items()})

    @property
    def scale(self) -> int:
        """Pixels of a latent's side."""
        return 2 ** len(self.temperal_downsample)

    @property
    def latent_channels(self) -> int:
        return self.z_dim

    def stock(self) -> AutoencoderKLQwenImage:
        """diffusers' module on the meta device."""
        from diffusers import AutoencoderKLQwenImage

        settings = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
        with torch.device("meta"):
            return AutoencoderKLQwenImage(**settings)


Vae = DecoderConfig | VideoVae


@dataclass(frozen=True)
class Pipeline:
    """The architectures of an SD3, FLUX.1, FLUX.2 or Qwen-Image pipeline, as config.json mappings."""

    transformer: dict[str, Any]
    decoder: Vae
    text_encoders: tuple[tuple[str, dict[str, Any]], ...]  # (transformers' class name, config)
    kind: str = "StableDiffusion3Pipeline"

    @property
    def is_flux(self) -> bool:
        """FLUX.1 or FLUX.2: packed latents, blocks of two streams and of one."""
        return self.kind in ("FluxPipeline", "Flux2KleinPipeline")

    @property
    def has_own_forward(self) -> bool:
        return FAMILIES[self.kind].own_forward

    @property
    def captured_by_itself(self) -> bool:
        return FAMILIES[self.kind].captured_by_itself

    @property
    def is_gated(self) -> bool:
        """Whether its feed-forwards are SwiGLU: FLUX.2's."""
        return FAMILIES[self.kind].gated

    @property
    def is_qwen(self) -> bool:
        return self.kind == "QwenImagePipeline"

    @property
    def embeds_guidance(self) -> bool:
        """Whether one row is guided, by an input of the network."""
        return self.is_flux and bool(self.transformer.get("guidance_embeds"))

    @property
    def single_layers(self) -> int:
        """Blocks in which text and image are one stream."""
        return self.transformer["num_single_layers"] if self.is_flux else 0

    @property
    def patch(self) -> int:
        """Latents of an image token's side."""
        return 2 if self.is_flux else self.transformer["patch_size"]  # the first packs before its network

    def text_tokens(self, max_sequence_length: int) -> int:
        """Of a row of the network, padding included: every family pads to this length, beside which SD3 has CLIP's."""
        return self._clip_tokens + max_sequence_length

    @property
    def _clip_tokens(self) -> int:
        """Tokens of the text that a CLIP gives: none for FLUX.1, which takes its pooled vector alone, or Qwen-Image."""
        if self.is_flux or self.is_qwen:
            return 0
        return max((config.get("max_position_embeddings", CLIP_TOKENS) for _, config in self.text_encoders), default=0)


def known_pipeline(path: str) -> Pipeline:
    """The pipeline of a hub id in `KNOWN`, of "tiny", or of a local diffusers folder.

    Raises:
        UserError: any other name, or a folder without transformer/config.json or vae/config.json.
    """
    if path in TRANSFORMERS:
        return Pipeline(TRANSFORMERS[path], SD3_DECODER, TEXT_ENCODERS)
    if path in FLUX_TRANSFORMERS:  # its VAE has the architecture of SD3's
        return Pipeline(FLUX_TRANSFORMERS[path], SD3_DECODER, FLUX_TEXT_ENCODERS, "FluxPipeline")
    if path in FLUX2_TRANSFORMERS:
        return Pipeline(FLUX2_TRANSFORMERS[path], FLUX2_DECODER, FLUX2_TEXT_ENCODERS, "Flux2KleinPipeline")
    if path in QWEN_TRANSFORMERS:
        return Pipeline(QWEN_TRANSFORMERS[path], VideoVae(), QWEN_TEXT_ENCODERS, "QwenImagePipeline")
    folder = WORLDS[path].pipeline if path in WORLDS else Path(path).expanduser()
    if not folder.is_dir():
        raise UserError(
            f"model.path = {path!r} is not known without a network; pass a downloaded pipeline's folder, tiny, or one "
            f"of {', '.join(KNOWN)}"
        )
    encoders = [read_config(folder / name / "config.json") for name in _TEXT_FOLDERS if (folder / name).is_dir()]
    kind = read_config(folder / "model_index.json").get("_class_name", "StableDiffusion3Pipeline")
    vae = VideoVae if kind == "QwenImagePipeline" else DecoderConfig
    return Pipeline(
        read_config(folder / "transformer" / "config.json"),
        vae.from_mapping(read_config(folder / "vae" / "config.json")),
        tuple((config["architectures"][0], config) for config in encoders),
        kind,
    )


def read_config(path: Path) -> dict[str, Any]:
    """A model folder's JSON file; UserError where it cannot be read."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); want a model folder in diffusers' layout") from error


@dataclass(frozen=True)
class TransformerCount:
    """Weights of a transformer by what a run does with them, in elements."""

    total: int
    lora: int  # adapters' A and B
    stacked: int  # linears with an adapter beside them, stacked as the fused forward stacks them
    stacked_ends: int  # those of the first and last block, which never run in FP8
    inner: int  # linears of the blocks between, without modulation: what FP8 quantises
    modulation: int  # outputs of all AdaLN linears


def count_transformer(config: dict[str, Any], lora: LoraSection) -> TransformerCount:
    """Counted on the meta device from diffusers' own module and the run's own choice of LoRA targets."""
    return _count_transformer(json.dumps(config, sort_keys=True), lora.model_dump_json())


@functools.lru_cache(maxsize=16)
def _count_transformer(config: str, lora_json: str) -> TransformerCount:
    from advgrpo.policy.adapters import block_names, block_of, modulates, target_modules

    lora, transformer = LoraSection.model_validate_json(lora_json), _meta_transformer(config)
    targets = target_modules(transformer, lora)
    linears = {n: m for n, m in transformer.named_modules() if isinstance(m, torch.nn.Linear)}
    blocks = block_names(transformer)
    ends = (f"{blocks[0]}.", f"{blocks[-1]}.")
    of_blocks = {n: m.weight.numel() for n, m in linears.items() if block_of(n) is not None}
    plain = {n: size for n, size in of_blocks.items() if not modulates(n)}
    stacks = {_stack(n) for n in targets}
    stacked = {n: size for n, size in plain.items() if _stack(n) in stacks}
    return TransformerCount(
        total=sum(p.numel() for p in transformer.parameters()),
        lora=sum(lora.rank * (linears[n].in_features + linears[n].out_features) for n in targets),
        stacked=sum(stacked.values()),
        stacked_ends=sum(size for n, size in stacked.items() if n.startswith(ends)),
        inner=sum(size for n, size in plain.items() if not n.startswith(ends)),
        modulation=sum(m.out_features for n, m in linears.items() if modulates(n)),
    )


@dataclass(frozen=True)
class ShareCount:
    """Bytes of a transformer that is shared out over processes (policy/sharding.py)."""

    held: int  # by a process at rest, padded to equal shares
    blocks: tuple[int, ...]  # of each block, gathered, in the order in which they run
    prepared: tuple[int, ...]  # of each block's modulation, which our forward gathers before a trajectory
    outside: int  # of blocks, gathered while the network runs; 0 by our forward, which has it whole
    largest_fp8: int  # of the largest weight that is quantised, 0 where none is

    @property
    def block(self) -> int:
        """Of the largest block."""
        return max(self.blocks)


@functools.lru_cache(maxsize=64)
def _count_share(config: str, processes: int, dtype: torch.dtype, fp8: bool, fused: bool) -> ShareCount:
    transformer = torch.nn.Module.to(copy.deepcopy(_meta_transformer(config)), dtype)
    units, largest = (fused_units(transformer), 0) if fused else stock_units(transformer, fp8)
    every = list(itertools.chain.from_iterable(units))
    outside = sum(p.nbytes for p in transformer.parameters()) - sum(p.nbytes for p in every)
    held = sum(share_bytes(p, processes) for p in every)
    if fused:
        held, outside = held + outside, 0
    else:
        held += sum(share_bytes(p, processes) for p in outside_of(transformer, units))
    sizes = [sum(p.nbytes for p in unit) for unit in units]
    blocks = len(sizes) // 2 if fused else len(sizes)  # and the modulation of each
    return ShareCount(held, tuple(sizes[:blocks]), tuple(sizes[blocks:]), outside, largest)


def share_bytes(parameter: torch.Tensor, processes: int) -> int:
    """Of its rows on each of so many processes, padded to the most: what one puts into a gather."""
    return math.ceil(len(parameter) / processes) * (parameter.nbytes // len(parameter))


def stock_units(transformer: Any, fp8: bool) -> tuple[list[list[torch.Tensor]], int]:
    """Parameters of diffusers' blocks, whose inner linear layers are e4m3 with `fp8`, and the largest of these."""
    from advgrpo.policy.adapters import block_names
    from advgrpo.policy.fp8_base import quantize, quantized_blocks

    for name in quantized_blocks(transformer) if fp8 else ():
        quantize(transformer.get_submodule(name), torch.device("meta"))
    units = [list(transformer.get_submodule(name).parameters()) for name in block_names(transformer)]
    quantised = (p.numel() for unit in units for p in unit if p.dtype == torch.float8_e4m3fn)
    return units, max(quantised, default=0)


def outside_of(transformer: Any, units: list[list[torch.Tensor]]) -> list[torch.Tensor]:
    """Parameters that are in none of its `stock_units`."""
    inside = set(itertools.chain.from_iterable(units))
    return [parameter for parameter in transformer.parameters() if parameter not in inside]


class _Units:
    """The `Sharding` (policy/fused/transformer.py) that notes whose weights are to lie in parts."""

    device = torch.device("meta")

    def __init__(self) -> None:
        self.parameters: list[list[torch.Tensor]] = []

    def share_out(self, unit: torch.nn.Module) -> None:
        self.parameters.append(list(unit.parameters()))

    def join(self, network: torch.nn.Module, *runs: Sequence[torch.nn.Module]) -> None:
        """Nothing is gathered."""


def fused_units(transformer: Any) -> list[list[torch.Tensor]]:
    """Parameters of what our forward gathers: the blocks, and then the modulation of each."""
    from advgrpo.policy.fused.transformer import FusedTransformer, TransformerConfig

    noted = _Units()
    tensors = {n: t.detach() for n, t in (*transformer.named_parameters(), *transformer.named_buffers())}
    FusedTransformer(TransformerConfig.from_stock(transformer.config), tensors, attention="math", sharding=noted)
    return noted.parameters


def count_share(
    config: dict[str, Any], processes: int, dtype: torch.dtype, *, fp8: bool = False, fused: bool = False
) -> ShareCount:
    """What each of so many processes has of a transformer of this configuration, counted on the meta device.

    Args:
        dtype: of its weights.
        fp8: whether its inner blocks' linear layers are e4m3 (policy/fp8_base.py); not fused.
        fused: by our forward, which has what is outside of blocks whole.
    """
    return _count_share(json.dumps(config, sort_keys=True), processes, dtype, fp8, fused)


def _stack(name: str) -> str:
    """q, k and v of one stream are one matrix in the fused forward."""
    head, _, tail = name.rpartition(".")
    return {"to_q": f"{head}.qkv", "to_k": f"{head}.qkv", "to_v": f"{head}.qkv"}.get(
        tail, f"{head}.add_qkv" if tail in ("add_q_proj", "add_k_proj", "add_v_proj") else name
    )


def meta_transformer(config: Mapping[str, Any]):
    """The network of a transformer's config.json, frozen, on the meta device; one for all who ask."""
    return _meta_transformer(json.dumps(config, sort_keys=True))


@functools.lru_cache(maxsize=8)
def _meta_transformer(config: str):
    from advgrpo.policy.adapters import network_class

    named = json.loads(config)
    settings = {key: value for key, value in named.items() if not key.startswith("_")}
    if settings.get("dual_attention_layers") is not None:
        settings["dual_attention_layers"] = tuple(settings["dual_attention_layers"])
    with torch.device("meta"):
        return network_class(named)(**settings).requires_grad_(False)


def count_text_encoders(pipeline: Pipeline) -> int:
    """Parameters of all text encoders."""
    return sum(_count_transformers_model(name, json.dumps(config)) for name, config in pipeline.text_encoders)


def count_largest_text_layer(pipeline: Pipeline) -> int:
    """Parameters of the largest of the text encoders' modules that have some of their own, without those below them."""
    return max(_count_largest_layer(name, json.dumps(config)) for name, config in pipeline.text_encoders)


@functools.lru_cache(maxsize=16)
def _count_largest_layer(class_name: str, config: str) -> int:
    modules = meta_transformers_model(class_name, config).modules()
    return max(sum(p.numel() for p in module.parameters(recurse=False)) for module in modules)


@functools.lru_cache(maxsize=8)
def count_decoder(config: Vae) -> int:
    """Parameters of the image decoder."""
    if isinstance(config, VideoVae):
        vae = config.stock()
        return sum(p.numel() for part in (vae.decoder, vae.post_quant_conv) for p in part.parameters())
    return sum(p.numel() for p in Decoder(config, device="meta").parameters())


@functools.lru_cache(maxsize=8)
def count_vae(config: Vae) -> int:
    """Parameters of the whole stock VAE around such a decoder."""
    return sum(p.numel() for p in meta_vae(config).parameters())


@functools.lru_cache(maxsize=8)
def meta_vae(config: Vae) -> torch.nn.Module:
    """The stock VAE on the meta device; one for all who ask."""
    from diffusers import AutoencoderKL

    if isinstance(config, VideoVae):
        return config.stock()
    blocks = len(config.block_out_channels)
    with torch.device("meta"):
        return AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * blocks,
            up_block_types=("UpDecoderBlock2D",) * blocks,
            block_out_channels=config.block_out_channels,
            latent_channels=config.latent_channels,
            out_channels=config.out_channels,
            layers_per_block=config.layers_per_block,
            norm_num_groups=config.norm_num_groups,
            mid_block_add_attention=config.mid_block_add_attention,
            use_post_quant_conv=config.use_post_quant_conv,
            use_quant_conv=config.use_post_quant_conv,
        )


def pinned_text_encoders(pipeline: Pipeline, element: int) -> int:
    """Bytes of pinned memory that all text encoders take, of `element` bytes a weight."""
    return sum(_pinned_encoder(name, json.dumps(config), element) for name, config in pipeline.text_encoders)


@functools.lru_cache(maxsize=16)
def _pinned_encoder(class_name: str, config: str, element: int) -> int:
    return _pinned(meta_transformers_model(class_name, config), element)


@functools.lru_cache(maxsize=16)
def pinned_vae(config: Vae, decoder_element: int | None) -> int:
    """Bytes of pinned memory that the stock VAE takes in float32, and our decoder, of `decoder_element` bytes a weight.

    None: there is no decoder of ours.
    """
    stock = _pinned(meta_vae(config), 4)
    return stock if decoder_element is None else stock + _pinned(Decoder(config, device="meta"), decoder_element)


def _pinned(module: torch.nn.Module, element: int) -> int:
    return sum(pinned_bytes(p.numel() * element) for p in module.parameters())


@functools.lru_cache(maxsize=16)
def _count_transformers_model(class_name: str, config: str) -> int:
    return sum(p.numel() for p in meta_transformers_model(class_name, config).parameters())


@functools.lru_cache(maxsize=16)
def meta_transformers_model(class_name: str, config: str) -> torch.nn.Module:
    """transformers' module of a class on the meta device, by its config.json's text; one for all who ask."""
    import transformers

    kind = getattr(transformers, class_name)
    with torch.device("meta"):
        return kind(kind.config_class(**json.loads(config)))
