"""B0 with the weights of one of our trainers, so that both can be compared on the same inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from advgrpo.config import Config

from .baseline import Baseline
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
            f"B0 adapts the joint attentions' projections: {sorted(own.keys() ^ lora.keys())[0]} does not fit"
        )
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(lora[name])
    return model


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
    shift: float = 3.0,
) -> Baseline:
    """B0 beside a `Policy` and a `FeatureHeadAdversary`; embeddings of `prompts` are copied.

    Args:
        transformer: what `stock_transformer` made of the policy's weights.
        decode: latents to images in float32.
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
        shift=shift,
    )


def stock_config(config: Mapping) -> StockConfig:
    """From the contents of a stock transformer/config.json."""
    known = StockConfig.__dataclass_fields__
    chosen: dict[str, Any] = {name: value for name, value in config.items() if name in known}
    chosen["dual_attention_layers"] = tuple(chosen.get("dual_attention_layers") or ())
    return StockConfig(**chosen)
