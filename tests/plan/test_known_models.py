"""Architectures by name, and their parameters counted on the meta device: against known totals, and shares of them
against what `fully_shard` leaves.

Bugs planted in a copy, each seen red: only A of the adapters; every linear of a block stacked; inner linears missing
from FP8 weights; guidance forgotten; model.lora.blocks ignored.
"""

import copy
import json

import pytest
import torch
from torch.distributed.fsdp import FSDPModule

from advgrpo import config as configuration
from advgrpo.plan import known_models
from advgrpo.plan.estimate import Estimate
from advgrpo.plan.memory import plan
from advgrpo.policy.fp8_base import quantize, quantized_blocks
from advgrpo.policy.fused.transformer import FusedTransformer, TransformerConfig
from advgrpo.policy.sharding import BlockSharding
from tests.plan.counting import FLUX, MEDIUM, QWEN


def test_counts_are_the_known_totals(paper):
    pipeline = known_models.known_pipeline(MEDIUM)
    weights = known_models.count_transformer(pipeline.transformer, paper.model.lora)
    assert (weights.total, weights.lora) == (2_243_171_520, 18_776_064)
    assert weights.stacked == 191 * 1536**2  # docs/method.md section 8: 191 modules, each 1536 x 1536
    assert known_models.count_text_encoders(pipeline) == 123_650_304 + 694_659_840 + 4_762_310_656
    assert known_models.count_decoder(pipeline.decoder) == 49_545_475
    assert known_models.count_vae(pipeline.decoder) == 83_819_683
    large = known_models.known_pipeline("stabilityai/stable-diffusion-3.5-large")
    assert known_models.count_transformer(large.transformer, paper.model.lora).total == 8_056_627_520


def test_flux1_dev_is_counted():
    config = configuration.load("flux1-dino")
    pipeline = known_models.known_pipeline(config.model.path)
    weights = known_models.count_transformer(pipeline.transformer, config.model.lora)
    assert (weights.total, weights.lora) == (11_901_408_320, (19 * 8 + 38 * 3) * 32 * 2 * 3072)
    assert known_models.count_text_encoders(pipeline) == 123_060_480 + 4_762_310_656
    assert weights.modulation == 19 * 12 * 3072 + 38 * 3 * 3072 + 2 * 3072
    estimate = Estimate(config, 8)
    assert (estimate.guided, estimate.fused) == (1, True)  # an image is one row
    assert (estimate.shape.image_tokens, estimate.shape.text_tokens) == (1024, 128)  # CLIP gives no tokens
    config.model.path = "black-forest-labs/FLUX.1-schnell"
    assert Estimate(config, 8).guided == 2
    config.model.path, config.model.lora.blocks = "black-forest-labs/FLUX.1-dev", 20
    shape = Estimate(config, 8).shape
    assert shape.first_trained == 19 + 38 - 20
    assert shape.saved_bytes(checkpointing=False) / estimate.shape.saved_bytes(checkpointing=False) == pytest.approx(
        20 * 10 / (19 * 11 + 38 * 10), rel=0.01
    )
    assert plan(configuration.load("flux1-dino"), 48, processes=8).fits
    refused = plan(configuration.load("flux1-dino"), 40, processes=8)
    assert not refused.fits  # 23.8 GB of weights, 5 GB of merged ones, and the text encoders before
    alone = ("model.offload = text_vae", "model.shard_base = blocks", "model.lora.blocks = 2")
    assert refused.remedies == tuple(f"set {change}" for change in alone)


def test_flux2_klein_is_counted():
    config = configuration.load("flux2-dino")
    pipeline = known_models.known_pipeline(config.model.path)
    weights = known_models.count_transformer(pipeline.transformer, config.model.lora)
    projections = 5 * 8 * 2 * 3072 + 20 * (3072 + 9 * 3072 + 4 * 3072 + 3072)  # q, k, v and a gated feed-forward of 3
    assert (weights.total, weights.lora) == (3_875_544_576, 32 * projections)
    estimate = Estimate(config, 8)
    assert (estimate.guided, estimate.fused, estimate.own_decoder) == (2, False, False)
    assert plan(config, 48, processes=8).fits


@pytest.mark.parametrize(("preset", "gated"), [("flux2-dino", True), ("flux1-dino", False), ("qwen-image-dino", False)])
def test_gates_are_a_familys_own_whatever_forward_it_has(preset, gated, monkeypatch):
    for name, family in known_models.FAMILIES.items():
        monkeypatch.setitem(known_models.FAMILIES, name, family._replace(own_forward=False))
    assert Estimate(configuration.load(preset), 8).shape.swiglu == gated


def test_qwen_image_is_counted():
    config = configuration.load("qwen-image-dino")
    pipeline = known_models.known_pipeline(config.model.path)
    weights = known_models.count_transformer(pipeline.transformer, config.model.lora)
    assert (weights.total, weights.lora) == (20_430_401_088, 480 * 32 * 2 * 3072)
    assert weights.modulation == (60 * 12 + 2) * 3072
    assert weights.inner == 58 * (8 + 2 * 8) * 3072**2  # without the modulation, a third of all weights
    assert known_models.count_text_encoders(pipeline) == 8_292_166_656
    assert known_models.count_vae(pipeline.decoder) == 126_892_531
    estimate = Estimate(config, 8)
    assert (estimate.guided, estimate.fused, estimate.own_decoder) == (2, True, False)
    assert plan(config, 80, processes=8).fits
    refused = plan(config, 70, processes=8)  # weights, merged ones and the text encoder
    assert (refused.fits, refused.peak_phase) == (False, "encode")


@pytest.mark.parametrize(("path", "fp8"), [(MEDIUM, False), (FLUX, False), (QWEN, False), (FLUX, True)])
@pytest.mark.in_ci(2)
def test_shares_are_what_fully_shard_leaves(path, fp8, first_of_eight):
    config = known_models.known_pipeline(path).transformer
    network = copy.deepcopy(known_models._meta_transformer(json.dumps(config, sort_keys=True)))
    network, device = torch.nn.Module.to(network, torch.bfloat16), torch.device("meta")
    chosen = set(quantized_blocks(network)) if fp8 else set()
    BlockSharding(first_of_eight).shard(
        network, lambda name: quantize(network.get_submodule(name), device) if name in chosen else None
    )
    counted = known_models.count_share(config, 8, torch.bfloat16, fp8=fp8)
    whole = sum(p.nbytes for p in network.parameters())
    assert counted.held == sum(p.to_local().nbytes for p in network.parameters())
    assert whole / 8 <= counted.held < 1.001 * whole / 8
    groups = [m._get_fsdp_state()._fsdp_param_group for m in network.modules() if isinstance(m, FSDPModule)]
    sizes = [sum(p.sharded_param.nbytes for p in group.fsdp_params) for group in groups]
    assert (counted.outside, counted.blocks) == (sizes[0], tuple(sizes[1:]))
    if fp8:  # the scales, biases and what is not quantised are the rest
        inner = known_models.count_transformer(config, configuration.load("flux1-dino").model.lora).inner
        assert 2 * sum(p.numel() for p in known_models.meta_transformer(config).parameters()) - inner == pytest.approx(
            whole, rel=1e-3
        )


@pytest.mark.parametrize("path", [MEDIUM, pytest.param(FLUX, marks=pytest.mark.weekly), QWEN])
def test_shares_of_our_forward_are_what_fully_shard_leaves(path, first_of_eight):
    config, sharding = known_models.known_pipeline(path).transformer, BlockSharding(first_of_eight)
    network, sharding.device = known_models.meta_transformer(config), torch.device("meta")
    tensors = {name: p.detach().bfloat16() for name, p in network.named_parameters()}
    ours = FusedTransformer(TransformerConfig.from_stock(network.config), tensors, attention="math", sharding=sharding)
    counted = known_models.count_share(config, 8, torch.bfloat16, fused=True)
    units = [m for m in ours._network.modules() if isinstance(m, FSDPModule) and m is not ours._network]
    groups = [unit._get_fsdp_state()._fsdp_param_group for unit in units]
    parts = [parameter for group in groups for parameter in group.fsdp_params]
    sizes = [sum(p.sharded_param.nbytes for p in group.fsdp_params) for group in groups]
    blocks = len(sizes) // 2  # and the modulation of each
    whole = sum(t.nbytes for t in tensors.values()) - sum(sizes)
    assert counted.held == whole + sum(p.sharded_param.to_local().nbytes for p in parts)
    assert (counted.outside, counted.blocks, counted.prepared) == (0, *map(tuple, (sizes[:blocks], sizes[blocks:])))
    assert 0 < whole < sum(sizes) / 50, "norms, and what is outside of blocks"


def test_an_only_block_is_never_quantised():
    config = known_models.known_pipeline(MEDIUM).transformer | {"num_layers": 1}
    counted = known_models.count_share(config, 8, torch.bfloat16, fp8=True)
    assert (len(counted.blocks), counted.largest_fp8) == (1, 0)
