"""B0 and B1 with the weights of one of our trainers, so that all can be compared on the same inputs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from advgrpo.config import Config

from .baseline import B0, Baseline, Recipe
from .stock_model import ADAPTER, StockConfig, StockTransformer, add_lora


def stock_transformer(
    config: StockConfig, base: Mapping[str, Tensor], lora: Mapping[str, Tensor], *, rank: int, alpha: float
) -> StockTransformer:
    """The stock model over frozen tensors `base`, which it shares, with its own copy of the adapters `lora`.

    Adapters take the dtype of the weights, as diffusers' `add_adapter` does.

    Args:
        base: by stock name.
        lora: MODULE.lora_A.weight and MODULE.lora_B.weight.

    Raises:
        ValueError: `lora` is not the eight projections of every joint attention.
    """
    with torch.device("meta"):
        model = StockTransformer(config)
    model.load_state_dict(dict(base), assign=True)
    add_lora(model, rank=rank, alpha=alpha)
    own = {name.replace(f".{ADAPTER}.", "."): p for name, p in model.named_parameters() if p.requires_grad}
    if own.keys() != lora.keys():
        raise ValueError(
            f"B0 and B1 adapt the joint attentions' projections: {sorted(own.keys() ^ lora.keys())[0]} does not fit"
        )
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(lora[name])
    return model


def compile_blocks(model: StockTransformer, backend: str = "inductor") -> None:
    """What diffusers' `compile_repeated_blocks` does where a model names its blocks, which its SD3 does not.

    Each kind of block is compiled once for every way it runs (with adapters, merged, with gradients), and shape: more
    often than PyTorch's limit, beyond which it would go on eagerly.
    """
    torch._dynamo.config.recompile_limit = 64  # ty: ignore[invalid-assignment]
    for block in model.transformer_blocks:
        block.compile(fullgraph=True, dynamic=False, backend=backend)


def vae_decoder(vae, *, fast: bool) -> Callable[[Tensor], Tensor]:
    """latents [M, C, h, w] -> images [M, 3, H, W] float32 in [0, 1] by diffusers' own AutoencoderKL.

    Args:
        fast: by a copy of it in channels_last, and on a GPU in bfloat16; on a CPU bfloat16 is slower.
    """
    if fast:
        vae = copy.deepcopy(vae).to(memory_format=torch.channels_last)
        vae = vae.to(torch.bfloat16) if vae.device.type == "cuda" else vae

    def decode(latents: Tensor) -> Tensor:
        unscaled = latents / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
        pixels = vae.decode(unscaled.to(vae.dtype), return_dict=False)[0]
        return (pixels.float() / 2 + 0.5).clamp(0, 1).contiguous()

    return decode


def head_module(head: Mapping[str, Tensor]) -> nn.Sequential:
    """Linear, GELU, Linear with a copy of the weights w1 [H, D], b1, w2 [1, H], b2."""
    (hidden, width), device = head["w1"].shape, head["w1"].device
    module = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, 1)).to(device)
    names = dict(zip(("0.weight", "0.bias", "2.weight", "2.bias"), ("w1", "b1", "w2", "b2")))
    module.load_state_dict({theirs: head[ours].detach().clone() for theirs, ours in names.items()})
    return module


def baseline_of(
    config: Config,
    *,
    transformer: StockTransformer,
    policy,
    decode: Callable[[Tensor], Tensor],
    adversary,
    references: Callable[[str], Tensor],
    prompts: Iterable[str],
    recipe: Recipe = B0,
    shift: float = 3.0,
) -> Baseline:
    """A contender beside a `Policy` and a `FeatureHeadAdversary`; embeddings of `prompts` are copied.

    Args:
        transformer: what `stock_transformer` made of the policy's weights, compiled or not as the recipe says.
        decode: latents to float32 images, as the recipe says.
        references: prompt -> its reference images [n, 3, H, W] in [0, 1].
    """
    prompts = list(dict.fromkeys(prompts))
    texts = {}
    for prompt in ["", *prompts]:
        encoded = policy.encode([prompt])
        texts[prompt] = (encoded.text[0], encoded.pooled[0])
    return Baseline(
        config=config,
        transformer=transformer,
        decode=decode,
        backbone=adversary.backbone.model,
        head=head_module(adversary.head),
        texts=texts,
        references={prompt: references(prompt).to(policy.device) for prompt in prompts},
        device=policy.device,
        latent_shape=policy.latent_shape(),
        recipe=recipe,
        shift=shift,
    )


def stock_config(config: Mapping) -> StockConfig:
    """From the contents of a stock transformer/config.json."""
    known = StockConfig.__dataclass_fields__
    chosen: dict[str, Any] = {name: value for name, value in config.items() if name in known}
    chosen["dual_attention_layers"] = tuple(chosen.get("dual_attention_layers") or ())
    return StockConfig(**chosen)
