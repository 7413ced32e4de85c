"""Memory planner: counts against known totals, formulas against what autograd saves, choices, advice, command line.

Everything at full size is on the meta device.

Bugs planted in a copy, each seen red. Bytes: attention's output counted once; the first block's dual attention saved;
one float32 copy for stock LoRA missing; boundaries of the image stream only; views counted as new; freed tensors not
subtracted; matrices of the dual attention left out. Counts: only A of the adapters; every linear of a block stacked;
inner linears missing from FP8 weights; guidance forgotten; model.lora.blocks ignored. Choices: the smallest of equally
fast knobs; checkpointing that saves nothing; processes ignored; a knob that training lacks; remedies not tried; twice
the card's size accepted; an adversary counted for supervised fine-tuning; eight images decoded at once at every
resolution; the gate of the first images forgotten; a stock decoder counted as ours. Advice: order changed; the
smallest micro-batch instead of the next; GiB read as GB; the ceiling not named. Exit code always 0.
"""

import contextlib
import copy
import itertools
import json
import math
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers import (
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
)
from torch.distributed.fsdp import FSDPModule
from torch.testing._internal.distributed.fake_pg import FakeStore

from advgrpo import config as configuration
from advgrpo import tiny
from advgrpo.config import LORA_TARGETS
from advgrpo.errors import UserError
from advgrpo.plan import __main__ as command
from advgrpo.plan import known_models
from advgrpo.plan.activations import AliveBytes, TransformerShape, decode_bytes
from advgrpo.plan.memory import (
    PHASES,
    Knobs,
    _Estimate,
    advice,
    peak_with_captured_update,
    plan,
    plan_as_configured,
    table,
)
from advgrpo.plan.work import drawn_steps, micro_batches
from advgrpo.policy.adapters import LoraAdapters, block_names, target_modules
from advgrpo.policy.fp8_base import quantize, quantized_blocks
from advgrpo.policy.fused.decoder import SD3_DECODER, decoded_at_once
from advgrpo.policy.fused.sequence import SequenceGroup
from advgrpo.policy.fused.transformer import FusedTransformer, TransformerConfig
from advgrpo.policy.merged_copy import MergedCopy
from advgrpo.policy.sharding import BlockSharding
from advgrpo.policy.weights_in_parts import WeightsInParts
from advgrpo_kernels import _runtime

MEDIUM = "stabilityai/stable-diffusion-3.5-medium"
ROWS = 2
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def no_poison(monkeypatch):
    monkeypatch.undo()  # conftest's NaN poisoning would allocate full-size weights


@pytest.fixture
def paper():
    return configuration.load("sd35m-dino-paper")


@pytest.fixture(scope="module")
def medium() -> SD3Transformer2DModel:
    with torch.device("meta"):
        return SD3Transformer2DModel(**known_models.TRANSFORMERS[MEDIUM]).to(torch.bfloat16).requires_grad_(False)


def saved_bytes(forward) -> int:
    """Bytes made by `forward` that its graph keeps alive. Hooks would not see what attention's own hooks pack."""
    with AliveBytes() as alive:
        _kept = forward()
        return alive.alive


def meta_inputs(rows: int):
    """Latents, text and pooled embeddings of 512-pixel images and 77 + 128 tokens."""
    shapes = ((rows, 16, 64, 64), (rows, 205, 4096), (rows, 2048))
    return [torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in shapes]


def flash(query, key, value, **_):
    """What a GPU runs; on meta PyTorch would take the backend that keeps the attention matrix."""
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]


def one_of(processes: int) -> SequenceGroup | None:
    """The first of so many processes that share out tokens, in whose exchanges nothing moves."""
    if processes == 1:
        return None
    group = SequenceGroup.__new__(SequenceGroup)
    group.size, group.rank = processes, 0
    group.exchange = lambda x, found, given, taken: None
    return group


@pytest.fixture(params=[1, 4], ids=["one", "of four"])
def fused(request, medium, paper, monkeypatch) -> FusedTransformer:
    """By one process, or that of a group that has the most tokens."""
    paper.model.sequence_parallel = request.param
    monkeypatch.setattr(_runtime, "DEFAULT_BACKEND", "triton")  # what a GPU runs saves other tensors than the reference
    monkeypatch.setattr(_runtime, "INTERPRET", True)
    tensors = {name: t.detach() for name, t in [*medium.named_parameters(), *medium.named_buffers()]}
    sequence = one_of(request.param)
    model = FusedTransformer(TransformerConfig.from_stock(medium.config), tensors, attention="math", sequence=sequence)
    model._attend = lambda q, k, v: flash(q, k, v).transpose(1, 2).flatten(2)
    targets = set(target_modules(medium, paper.model.lora))
    model.adapt(targets.__contains__, rank=32, alpha=64, init="gaussian", seed=0)
    return model


def test_counts_are_the_known_totals(paper):
    pipeline = known_models.known_pipeline(MEDIUM)
    weights = known_models.count_transformer(pipeline.transformer, paper.model.lora)
    assert (weights.total, weights.lora) == (2_243_171_520, 18_776_064)
    assert weights.stacked == 191 * 1536**2  # docs/method.md section 8: 191 modules, each 1536 x 1536
    assert known_models.count_text_encoders(pipeline) == 123_650_304 + 694_659_840 + 4_762_310_656
    assert known_models.count_decoder(pipeline.decoder) == 49_545_475
    assert known_models.count_vae(pipeline.decoder) == 83_819_683
    assert known_models.count_backbone(known_models.known_backbone("facebook/dinov2-large")) == 304_368_640
    large = known_models.known_pipeline("stabilityai/stable-diffusion-3.5-large")
    assert known_models.count_transformer(large.transformer, paper.model.lora).total == 8_056_627_520


def test_a_float32_decoder_is_counted_as_one(paper):
    counted = {}
    for dtype in ("auto", "bfloat16", "float32"):
        paper.model.decoder_dtype = dtype
        parts = plan(paper, 80).components
        counted[dtype] = {c.name: c.bytes for c in parts if c.name in ("image decoder", "decoding")}
    assert counted["auto"] == counted["bfloat16"]
    assert all(counted["float32"][name] > 1.5 * size for name, size in counted["bfloat16"].items())


@pytest.mark.in_ci(1)
def test_saved_bytes_of_the_fused_forward_follow_the_table(fused, paper):
    shape = _Estimate(paper, 8).shape
    prepared = fused.prepare(*meta_inputs(ROWS)[1:], torch.empty(10, device="meta"))
    step = torch.zeros(1, dtype=torch.int64, device="meta")

    def forward():
        return fused.predict(meta_inputs(ROWS)[0], step, prepared, "adapted")

    adapters = 2 * fused.lora.master.numel()  # their bfloat16 copy, which the plan counts once, not per sequence
    whole, ends = (0.005, 0.06) if shape.processes == 1 else (0.01, 0.1)  # what stands around blocks weighs more
    assert shape.saved_bytes(checkpointing=False) == pytest.approx((saved_bytes(forward) - adapters) / ROWS, rel=whole)
    fused.checkpointing = True
    assert shape.boundary_bytes() == pytest.approx((saved_bytes(forward) - adapters) / ROWS, rel=ends)
    fused.checkpointing = False
    fused.prepare_merged(fp8=False)
    with torch.no_grad(), AliveBytes() as alive:
        fused.predict(meta_inputs(ROWS)[0], step, prepared, "merged")
    assert shape.forward_bytes() == pytest.approx(alive.peak / ROWS, rel=0.05 if shape.processes == 1 else 0.08)
    with AliveBytes() as alive:
        velocity = forward()
        kept = alive.alive
        velocity.backward(torch.empty_like(velocity))
    assert shape.backward_bytes() == pytest.approx((alive.peak - kept) / ROWS, rel=0.1)


@pytest.mark.weekly
def test_saved_bytes_of_the_stock_forward_follow_the_table(paper, monkeypatch):
    monkeypatch.setattr(F, "scaled_dot_product_attention", flash)
    paper.fast = False
    shape = _Estimate(paper, 8).shape
    with torch.device("meta"):
        transformer = SD3Transformer2DModel(**known_models.TRANSFORMERS[MEDIUM]).to(torch.bfloat16)
        LoraAdapters(transformer.requires_grad_(False), paper.model.lora, seed=0)
    latents, text, pooled = meta_inputs(1)
    time = torch.empty(1, device="meta")

    def forward():
        return transformer(latents, text, pooled, time, return_dict=False)

    counted = saved_bytes(forward)
    assert shape.saved_bytes(checkpointing=False) == pytest.approx(counted, rel=0.03)


def test_flux1_dev_is_counted():
    config = configuration.load("flux1-dino")
    pipeline = known_models.known_pipeline(config.model.path)
    weights = known_models.count_transformer(pipeline.transformer, config.model.lora)
    assert (weights.total, weights.lora) == (11_901_408_320, (19 * 8 + 38 * 3) * 32 * 2 * 3072)
    assert known_models.count_text_encoders(pipeline) == 123_060_480 + 4_762_310_656
    assert weights.modulation == 19 * 12 * 3072 + 38 * 3 * 3072 + 2 * 3072
    estimate = _Estimate(config, 8)
    assert (estimate.guided, estimate.fused) == (1, True)  # an image is one row
    assert (estimate.shape.image_tokens, estimate.shape.text_tokens) == (1024, 128)  # CLIP gives no tokens
    config.model.path = "black-forest-labs/FLUX.1-schnell"
    assert _Estimate(config, 8).guided == 2
    config.model.path, config.model.lora.blocks = "black-forest-labs/FLUX.1-dev", 20
    shape = _Estimate(config, 8).shape
    assert shape.first_trained == 19 + 38 - 20
    assert shape.saved_bytes(checkpointing=False) / estimate.shape.saved_bytes(checkpointing=False) == pytest.approx(
        20 * 10 / (19 * 11 + 38 * 10), rel=0.01
    )
    assert plan(configuration.load("flux1-dino"), 48, processes=8).fits
    refused = plan(configuration.load("flux1-dino"), 40, processes=8)
    assert not refused.fits  # 23.8 GB of weights, 5 GB of merged ones, and the text encoders before
    alone = ("model.offload = text_vae", "model.shard_base = blocks", "model.lora.blocks = 2")
    assert refused.remedies == tuple(f"set {change}" for change in alone)


def counted_on_meta(config, inputs, prepared_of, make):
    """(saved, with LoRA alive in a forward without gradients, alive in the backward beside what is saved), in bytes, of
    one sequence through the network that `make` gives.

    Args:
        inputs: the stock network's arguments.
        prepared_of: of our forward.
    """
    fast, lora, dtype = config.fast, config.model.train == "lora", inputs["hidden_states"].dtype
    with torch.device("meta"):
        network = make().to(dtype).requires_grad_(not lora)
        if lora and not fast:
            LoraAdapters(network, config.model.lora, seed=0)

    def fused():
        tensors = {name: p.detach() for name, p in network.named_parameters()}
        sequence = one_of(config.model.sequence_parallel)
        ours = FusedTransformer(
            TransformerConfig.from_stock(network.config), tensors, attention="math", sequence=sequence
        )
        ours._attend, ours.recompute_qk = lambda q, k, v, *mask: flash(q, k, v).transpose(1, 2).flatten(2), True
        targets = set(target_modules(network, config.model.lora))
        ours.adapt(targets.__contains__, rank=32, alpha=64, init="gaussian", seed=0)
        ours.prepare_merged(fp8=False)
        prepared, latents = prepared_of(ours), torch.empty(1, 16, 64, 64, dtype=dtype, device="meta")
        step = torch.zeros(1, dtype=torch.int64, device="meta")
        ours.predict(latents, step, prepared, "base")  # makes the table of rotations
        return ours.lora.master.numel(), lambda weights="adapted": ours.predict(latents, step, prepared, weights)

    adapters, forward = fused() if fast else (0, lambda weights="adapted": network(**inputs, return_dict=False)[0])
    if not lora:
        return saved_bytes(forward), 0, 0
    with torch.no_grad(), AliveBytes() as unsaved:
        forward("merged")
    with AliveBytes() as alive:
        velocity = forward()
        kept = alive.alive
        velocity.backward(torch.empty_like(velocity))
    return kept - 2 * adapters, unsaved.peak, alive.peak - kept  # adapters in bfloat16 are counted once


@pytest.fixture
def of_rotary(request, monkeypatch):
    """(configuration, dtype) of a preset by our forward, of so many processes, or the stock one, with LoRA or all
    weights: `fast`, `lora`."""
    fast, lora, preset, processes = request.param
    monkeypatch.setattr(F, "scaled_dot_product_attention", flash)
    monkeypatch.setattr(_runtime, "DEFAULT_BACKEND", "triton")  # as for the fixture `fused`
    monkeypatch.setattr(_runtime, "INTERPRET", True)
    config = configuration.load(preset)
    config.fast, config.model.sequence_parallel = fast, processes
    if not lora:
        config.model.train, config.model.dtype = "full", "float32"
    return config, torch.bfloat16 if lora else torch.float32


def ways(preset: str):
    kinds = [(True, True, preset, 1), (True, True, preset, 4), (False, True, preset, 1), (False, False, preset, 1)]
    names = ["ours", "ours, of four", "stock", "stock, all weights"]
    return pytest.mark.parametrize("of_rotary", kinds, indirect=True, ids=names)


@ways("flux1-dino")
def test_saved_bytes_of_flux1_follow_the_table(of_rotary):
    """Its 19 and 38 blocks are alike, so what one block more of a kind saves is what the table says of one."""
    config, dtype = of_rotary
    shape, tokens = _Estimate(config, 8).shape, {"dtype": dtype, "device": "meta"}
    inputs = {
        "hidden_states": torch.empty(1, 1024, 64, **tokens),
        "encoder_hidden_states": torch.empty(1, 128, 4096, **tokens),
        "pooled_projections": torch.empty(1, 768, **tokens),
        "timestep": torch.empty(1, device="meta"),
        "guidance": torch.empty(1, device="meta"),
        "img_ids": torch.empty(1024, 3, device="meta"),
        "txt_ids": torch.empty(128, 3, device="meta"),
    }

    def prepared(ours):
        text, pooled = inputs["encoder_hidden_states"], inputs["pooled_projections"]
        return ours.prepare(text, pooled, torch.empty(10, device="meta"), 3.5)

    def counted(layers, single_layers):
        kind = partial(FluxTransformer2DModel, guidance_embeds=True)
        made = partial(kind, num_layers=layers, num_single_layers=single_layers)
        return counted_on_meta(config, inputs, prepared, made)

    (base, peak, backward), double, single = counted(1, 1), counted(2, 1), counted(1, 2)
    saved = (shape._flux_bytes(single=False), shape._flux_bytes(single=True))
    assert saved == pytest.approx((double[0] - base, single[0] - base), rel=0.03)
    if config.model.train == "lora":
        assert shape.forward_bytes() == pytest.approx(peak, rel=0.05)
        assert shape.backward_bytes() == pytest.approx(backward, rel=0.1)


@pytest.mark.weekly
@pytest.mark.parametrize("of_rotary", [(False, lora, "flux2-dino", 1) for lora in (True, False)], indirect=True)
def test_saved_bytes_of_flux2_follow_the_table(of_rotary):
    """diffusers' forward; its 5 and 20 blocks are alike."""
    config, dtype = of_rotary
    shape, tokens = _Estimate(config, 8).shape, {"dtype": dtype, "device": "meta"}
    assert (shape.image_tokens, shape.text_tokens, shape.path) == (1024, 512, "stock")
    inputs = {
        "hidden_states": torch.empty(1, 1024, 128, **tokens),
        "encoder_hidden_states": torch.empty(1, 512, 7680, **tokens),
        "timestep": torch.empty(1, device="meta"),
        "img_ids": torch.empty(1024, 4, device="meta"),
        "txt_ids": torch.empty(512, 4, device="meta"),
    }
    settings = known_models.FLUX2_TRANSFORMERS[config.model.path] | {"num_layers": 1, "num_single_layers": 1}
    settings = {name: value for name, value in settings.items() if not name.startswith("_")}

    def counted(**more):
        return counted_on_meta(config, inputs, None, partial(Flux2Transformer2DModel, **settings | more))

    (base, peak, backward), double, single = counted(), counted(num_layers=2), counted(num_single_layers=2)
    saved = (shape._flux_bytes(single=False), shape._flux_bytes(single=True))
    assert saved == pytest.approx((double[0] - base, single[0] - base), rel=0.03)
    if config.model.train == "lora":
        assert shape.forward_bytes() == pytest.approx(peak, rel=0.05)
        assert shape.backward_bytes() == pytest.approx(backward, rel=0.1)


def test_flux2_klein_is_counted():
    config = configuration.load("flux2-dino")
    pipeline = known_models.known_pipeline(config.model.path)
    weights = known_models.count_transformer(pipeline.transformer, config.model.lora)
    projections = 5 * 8 * 2 * 3072 + 20 * (3072 + 9 * 3072 + 4 * 3072 + 3072)  # q, k, v and a gated feed-forward of 3
    assert (weights.total, weights.lora) == (3_875_544_576, 32 * projections)
    estimate = _Estimate(config, 8)
    assert (estimate.guided, estimate.fused, estimate.own_decoder) == (2, False, False)
    assert plan(config, 48, processes=8).fits


@pytest.mark.parametrize(("preset", "gated"), [("flux2-dino", True), ("flux1-dino", False), ("qwen-image-dino", False)])
def test_gates_are_a_familys_own_whatever_forward_it_has(preset, gated, monkeypatch):
    for name, family in known_models.FAMILIES.items():
        monkeypatch.setitem(known_models.FAMILIES, name, family._replace(own_forward=False))
    assert _Estimate(configuration.load(preset), 8).shape.swiglu == gated


@ways("qwen-image-dino")
def test_saved_bytes_of_qwen_image_follow_the_table(of_rotary):
    """Its blocks are alike but for the last, whose text ends."""
    config, dtype = of_rotary
    shape, tokens = _Estimate(config, 8).shape, {"dtype": dtype, "device": "meta"}
    assert (shape.image_tokens, shape.text_tokens) == (1024, 128)
    inputs = {
        "hidden_states": torch.empty(1, 1024, 64, **tokens),
        "encoder_hidden_states": torch.empty(1, 128, 3584, **tokens),
        "encoder_hidden_states_mask": torch.empty(1, 128, dtype=torch.bool, device="meta"),
        "timestep": torch.empty(1, device="meta"),
        "img_shapes": [[(1, 32, 32)]],
    }

    def prepared(ours):
        text, mask = inputs["encoder_hidden_states"], inputs["encoder_hidden_states_mask"]
        return ours.prepare(text, text.new_empty(1, 0), torch.empty(10, device="meta"), mask=mask)

    def counted(layers):
        return counted_on_meta(config, inputs, prepared, partial(QwenImageTransformer2DModel, num_layers=layers))

    (base, *_), (more, peak, backward) = counted(2), counted(3)
    assert shape._flux_bytes(single=False) == pytest.approx(more - base, rel=0.03)
    if config.model.train == "lora":
        assert shape.forward_bytes() == pytest.approx(peak, rel=0.05)
        assert shape.backward_bytes() == pytest.approx(backward, rel=0.1)


def test_qwen_image_is_counted():
    config = configuration.load("qwen-image-dino")
    pipeline = known_models.known_pipeline(config.model.path)
    weights = known_models.count_transformer(pipeline.transformer, config.model.lora)
    assert (weights.total, weights.lora) == (20_430_401_088, 480 * 32 * 2 * 3072)
    assert weights.modulation == (60 * 12 + 2) * 3072
    assert weights.inner == 58 * (8 + 2 * 8) * 3072**2  # without the modulation, a third of all weights
    assert known_models.count_text_encoders(pipeline) == 8_292_166_656
    assert known_models.count_vae(pipeline.decoder) == 126_892_531
    estimate = _Estimate(config, 8)
    assert (estimate.guided, estimate.fused, estimate.own_decoder) == (2, True, False)
    assert plan(config, 80, processes=8).fits
    refused = plan(config, 70, processes=8)  # weights, merged ones and the text encoder
    assert (refused.fits, refused.peak_phase) == (False, "encode")


def test_alive_bytes_counts_new_tensors_once_while_they_live():
    before = torch.empty(1000, device="meta")
    with AliveBytes() as counted:
        view = before.view(10, 100)
        a = view + 1
        half = a[:5]
        del a
        b = half * 2
        assert counted.alive == 4000 + 2000  # the slice keeps its storage
        del half
        c = b + 1
        assert counted.alive == 4000
    assert counted.peak == 6000
    assert c.shape == b.shape


def test_decoding_is_counted_at_its_widest_layer():
    widest = 3 * 256 * 512 * 512  # input, output and result of the last upsampling, or of the first norm after it
    for dtype in (torch.bfloat16, torch.float32):
        assert decode_bytes(SD3_DECODER, dtype, 64) == pytest.approx(widest * dtype.itemsize, rel=0.02)


def test_more_costs_more(paper):
    estimate = _Estimate(paper, 8)

    def peak(micro, checkpointing, phase):
        held = estimate.components(Knobs(micro, checkpointing))
        return sum(c.bytes for c in held if phase in c.phases)

    for small, large in ((1, 2), (2, 4), (4, 8)):
        assert all(peak(small, False, p) <= peak(large, False, p) for p in PHASES)
        assert peak(small, False, "update") < peak(large, False, "update")
    assert peak(8, True, "update") < 0.55 * peak(8, False, "update")
    times = [estimate.relative_time(Knobs(m, c)) for m, c in ((8, False), (8, True), (1, False))]
    assert times[0] < times[1]
    assert times[0] < times[2]
    last = paper.model_copy(deep=True)
    last.model.lora.blocks = 2
    shape, every = _Estimate(last, 8).shape, estimate.shape
    assert shape.saved_bytes(checkpointing=False) < every.saved_bytes(checkpointing=False) / 10
    last.rollout.precision = "fp8"
    assert _Estimate(last, 8)._merged_bytes() > _Estimate(paper, 8)._merged_bytes()  # every inner linear, not q, k, v


def test_the_settings_as_they_are_are_planned_as_well(paper):
    """Chosen or not: what a run that has begun is compared with."""
    as_set = plan_as_configured(paper, 24.0)
    assert as_set.knobs == Knobs(paper.rollout.micro_batch, paper.model.gradient_checkpointing)
    assert as_set.peak_gb == as_set.configured_gb
    assert not as_set.fits


def test_smaller_gpus_get_smaller_knobs(paper):
    plans = {size: plan(paper, size, processes=8) for size in (24, 40, 80, 141)}
    assert all(p.fits for p in plans.values())
    assert plans[80].knobs == plans[141].knobs == Knobs(8, False)
    assert plans[24].knobs.micro_batch < 8 or plans[24].knobs.gradient_checkpointing
    assert plans[24].peak_gb <= 24 < plans[24].configured_gb == plans[80].peak_gb
    for size in (80, 141):  # the same advice for both, and why
        assert plans[size].line().endswith("; rollout.micro_batch = 8, as set, is the largest tried")
    paper.rollout.micro_batch = 1
    assert plan(paper, 141, processes=8).knobs.micro_batch == 1  # never above what the user set


def test_what_lies_beside_the_weights_is_counted(paper):
    """The paper's preset on 8 GPUs by hand: 33.6 GB, with the table of positions and the stock VAE that stay loaded and
    reference features in bfloat16 (35.8 GB in float32)."""
    found = plan(paper, 80, processes=8)
    sizes = {c.name: c.bytes for c in found.components}
    assert sizes["table of positions"] == 384**2 * 1536 * 2
    assert sizes["stock VAE, float32"] == 83_819_683 * 4
    assert found.peak_gb == pytest.approx(33.6, rel=0.02)
    assert sizes["rows of a discriminator update"] == paper.adversary.batch_size * 4 * 1370 * 1024


@pytest.mark.parametrize(("processes", "images"), [(8, 96), (1, 768)])
def test_the_peak_is_within_5_percent_of_a_count_by_hand(paper, processes, images):
    """From shapes alone, in bytes: 1,369 patches and a class token of ViT-L, 1,024 + 205 tokens, 2 window steps."""
    weights = 2 * (2_243_171_520 + 191 * 1536**2 + 147_456 * 1536 + 304_368_640 + 49_545_475)  # bfloat16, with merged
    weights += 4 * (83_819_683 + 18_776_064 * (1 + 1 + 2 + 1 + 4))  # VAE; LoRA, gradient, moments, average, their copy
    references = 512 * 8 * 257 * 1024 * 2 + images * 257 * 1024 * 4  # bfloat16 in the cache, float32 beside the images
    of_images = images * 4 * (1370 * 1024 + 3 * 512**2 + 2 * 2 * 16 * 64**2)  # features, pixels, window latents
    of_a_block = 1229 * 1536 * 2 * (2 + 1 + 3 + 1 + 4)  # inputs of q k v, norm, q k v, attention, GELU's two of 4 D
    dual = 1024 * 1536 * 2 * 4
    activations = 16 * (24 * of_a_block + 13 * dual)  # 8 images and their unconditional halves
    alive = 16 * 1229 * 1536 * 2 * (7 + 13.3) + 10 * 16 * 499_200 * 2  # of a backward, of the sampler's pool
    total = 1.2e9 + 1.05 * (weights + references + of_images + activations + alive)
    assert plan(paper, 80, processes=processes).peak_gb == pytest.approx(total / 1e9, rel=0.05)


def test_a_captured_update_holds_its_activations_in_every_phase(paper):
    before = plan(paper, 141)
    paper.update.graphs = True
    after = plan(paper, 141)
    saved = next(c.bytes for c in before.components if c.name.startswith("activations saved")) / 1e9
    assert after.phase_gb("decode") > before.phase_gb("decode") + saved
    assert after.peak_gb > before.peak_gb + saved  # a warm-up beside the graphs that there are


def test_the_update_is_captured_by_itself_only_where_that_pays_and_fits(paper):
    """auto: with shared noise, on a GPU that has room for the activations twice; the advice of a full GPU names it."""
    apart = plan_as_configured(paper, 80)  # a noise per image
    paper.rollout.initial_noise = "shared"
    roomy, tight = (plan_as_configured(paper, size) for size in (80, 48))
    names = [{c.name for c in each.components} for each in (apart, roomy, tight)]
    made = "the same, while graphs of the update are made"
    assert [made in each for each in names] == [False, True, False]
    assert tight.fits
    needed = peak_with_captured_update(paper)
    assert needed == roomy.peak_gb > 48 > tight.peak_gb
    full = RuntimeError("out of memory")
    assert "1. update.graphs = false instead of auto; 2. rollout.micro_batch" in advice(full, paper)
    of_48 = RuntimeError("out of memory. GPU 0 has a total capacity of 44.70 GiB of which 1 GiB is left")
    assert "update.graphs" not in advice(of_48, paper)  # it was not captured there
    paper.update.graphs = True
    assert not plan_as_configured(paper, 48).fits
    assert "update.graphs = False instead of True" in advice(full, paper)
    paper.update.graphs = False
    assert plan_as_configured(paper, 80).peak_gb == tight.peak_gb
    assert "update.graphs" not in advice(full, paper)


def test_the_page_says_what_a_captured_update_takes():
    fast, page = configuration.load("sd35m-dino-fast"), (ROOT / "docs" / "performance.md").read_text()
    captured, without = peak_with_captured_update(fast), plan_as_configured(fast, 48).peak_gb
    said = f"`sd35m-dino-fast` on one GPU takes {captured:.0f} GB, and {without:.0f} without"
    assert said in page.replace("\n", " "), said


@pytest.mark.parametrize("preset", ["sd35m-adv-pickscore-fast", "sd35m-tempflow"])
def test_a_model_that_is_not_counted_is_no_reason_to_capture(preset):
    """Nobody knows whether it fits: not by itself, and planned where it is asked for."""
    settings = configuration.load(preset)
    with pytest.raises(UserError, match=r"the memory plan does not count .*pickscore"):
        peak_with_captured_update(settings)
    made = "the same, while graphs of the update are made"
    for graphs in ("auto", True):
        settings.update.graphs = graphs
        assert (made in {c.name for c in plan_as_configured(settings, 141).components}) == (graphs is True)
        assert "update.graphs = false instead of auto" not in advice(RuntimeError("out of memory"), settings)


def test_a_side_stream_keeps_what_decoding_allocates(paper):
    """Images are decoded while the last ones are sampled, and the allocator gives the stream's memory to no other."""
    before = plan_as_configured(paper, 141)
    paper.rollout.decode_stream = "side"
    after = plan_as_configured(paper, 141)
    decoding = next(c.bytes for c in before.components if c.name == "decoding") / 1e9
    assert after.phase_gb("sample") > before.phase_gb("sample") + decoding
    assert after.phase_gb("update") == pytest.approx(before.phase_gb("update") + 1.05 * decoding)
    assert after.phase_gb("decode") == before.phase_gb("decode")


def test_kept_means_and_a_teacher_are_counted(paper):
    """Two steps of 96 images with 16·64·64 float32 each, and a third copy of the adapters."""
    plain = {c.name: c.bytes for c in plan(paper, 80, processes=8).components}
    paper.update.trust_region = "divergence"
    paper.update.kl_to, paper.update.teacher, paper.update.kl_weight = "teacher", "lora", 0.1
    sizes = {c.name: c.bytes for c in plan(paper, 80, processes=8).components}
    window = "images and window latents"
    assert sizes[window] - plain[window] == 96 * 2 * 4 * 16 * 64 * 64
    assert sizes["LoRA of the teacher, float32"] == 4 * 18_776_064
    assert set(sizes) - set(plain) == {"LoRA of the teacher, float32"}


def test_what_the_adversarys_head_looks_at_is_counted(paper):
    def sizes(**changes) -> dict[str, int]:
        config = paper.model_copy(deep=True)
        for name, value in {"replay_capacity": 16, **changes}.items():
            setattr(config.adversary, name, value)
        return {component.name: component.bytes for component in plan(config, 80, processes=8).components}

    plain, images, cached = sizes(), "features of an iteration's images", "reference features in memory, at most"
    assert plain["replay buffer"] == 16 * 4 * 1024 * (64 + 1)
    assert sizes(heads=3)["replay buffer"] == 16 * 4 * 1024 * (3 * 64 + 1)
    assert sizes(feature_layers=(12, 24))[images] == 2 * plain[images]
    assert sizes(augment="crop")[cached] == 4 * plain[cached]


def test_text_encoders_are_on_the_gpu_while_they_encode(paper):
    """Or one of their layers at a time, the table of T5's words at most, with their weights and the VAE's on the host.

    A card that cannot hold them all is told so.
    """
    paper.adversary.kind, paper.rewards.rule.weight, paper.model.resolution = "none", 1.0, 256
    needed = plan(paper, 12, processes=8)
    assert not needed.fits
    assert needed.peak_phase == "encode"
    assert "text encoders, until cached" in {c.name for c in needed.components}
    assert "set model.offload = text_vae" in needed.remedies
    every = 2 * (123_650_304 + 694_659_840 + 4_762_310_656)

    def placed(offload):
        paper.model.offload = offload
        return plan_as_configured(paper, 12, processes=8)

    paper.rollout.micro_batch = 1
    before, after, both = map(placed, ("none", "text", "text_vae"))
    assert not before.fits
    assert after.fits
    table_of_words = 2 * 32_128 * 4_096
    assert before.phase_gb("encode") - after.phase_gb("encode") == pytest.approx(1.05 * (every - table_of_words) / 1e9)
    mib = 2**20  # a power of two for each tensor: 128 for the three of T5's layers that are 80
    t5 = (24 * (4 * 32 + 3 * 128) + 256) * mib
    assert t5 < 1e9 * after.host_gb < t5 + 2 * 2 * (123_650_304 + 694_659_840)
    assert after.host_gb > 1.3 * every / 1e9
    assert "15.3 GB of pinned host memory for each process" in after.line()
    decoder, vae = 2 * 49_545_475, 4 * 83_819_683  # ours in bfloat16, and the stock one that nothing here encodes with
    assert (decoder + vae) / 1e9 < both.host_gb - after.host_gb < 2 * (decoder + vae) / 1e9
    assert after.phase_gb("update") - both.phase_gb("update") == pytest.approx(1.05 * (decoder + vae) / 1e9)
    assert after.phase_gb("decode") - both.phase_gb("decode") == pytest.approx(1.05 * vae / 1e9)


def test_every_knob_is_a_setting_of_training(paper):
    for each in re.findall(r"([\w.]+) = ", str(plan(paper, 80).knobs)):
        value = paper
        for name in each.split("."):
            assert name in type(value).model_fields, each
            value = getattr(value, name)


@pytest.mark.parametrize(
    ("changes", "fast", "images", "dtype"),
    [
        ({}, True, 8, torch.bfloat16),
        ({"resolution": 256}, True, 16, torch.bfloat16),  # 32 would be decoded at once, but a micro-batch has no more
        ({"resolution": 512, "decoder_dtype": "float32"}, True, 8, torch.float32),
        ({"resolution": 1024, "decoder_dtype": "float32"}, True, 2, torch.float32),
        ({"dtype": "float32"}, True, 8, torch.float32),
        ({}, False, 16, torch.float32),  # diffusers' decoder takes the whole micro-batch
        ({"train": "full"}, True, 16, torch.float32),
    ],
)
def test_decoding_is_counted_as_training_decodes(changes, fast, images, dtype, paper):
    paper.rollout.micro_batch, paper.fast = 16, fast
    for name, value in changes.items():
        setattr(paper.model, name, value)
    sizes = {c.name: c.bytes for c in _Estimate(paper, 1).components(Knobs(16, False))}
    assert sizes["decoding"] == images * decode_bytes(SD3_DECODER, dtype, paper.model.resolution // 8)


def test_the_gate_of_a_runs_first_images_is_counted(paper):
    """At 1024 pixels two images are decoded at once in bfloat16, and the first two in float32 as well."""
    paper.model.resolution = 1024
    sizes = {c.name: c.bytes for c in _Estimate(paper, 1).components(Knobs(8, False))}
    weights = 4 * known_models.count_decoder(SD3_DECODER)
    assert sizes["decoding"] == 2 * decode_bytes(SD3_DECODER, torch.float32, 128) + weights


def test_as_many_pixels_are_decoded_at_once_at_every_resolution():
    assert [decoded_at_once(side) for side in (256, 512, 640, 768, 1024, 2048)] == [32, 8, 5, 3, 2, 1]


def test_large_model_on_40_gb_checkpoints(paper):
    paper.model.path = "stabilityai/stable-diffusion-3.5-large"
    chosen = plan(paper, 40, processes=8)
    assert chosen.fits
    assert chosen.knobs.gradient_checkpointing or chosen.knobs.micro_batch < 8
    assert "MemoryPlan" not in chosen.line()
    assert "peak" in chosen.line()
    assert "estimated" in chosen.line()


def test_what_does_not_fit_says_which_setting_would(paper):
    refused = plan(paper, 24)
    assert not refused.fits
    assert "24 GB: does not fit" in refused.line()
    assert "set adversary.cached_patches = 64" in refused.remedies
    paper.adversary.cached_patches = 64
    assert plan(paper, 24).fits
    hopeless = plan(paper, 4)
    assert len(hopeless.remedies) == 1
    assert "no setting makes it fit" in hopeless.remedies[0]
    paper.model.path = "stabilityai/stable-diffusion-3.5-large"
    together = plan(paper, 24)
    assert not together.fits
    assert together.remedies


def test_micro_batches_are_those_the_config_check_accepts(paper):
    paper.data.prompts = paper.data.references = "somewhere"
    for prompts, group, micro in ((48, 16, 8), (48, 12, 24), (48, 16, 32), (4, 16, 16), (3, 16, 16)):
        paper.rollout.prompts_per_iteration = prompts
        paper.rollout.group_size, paper.rollout.micro_batch = group, micro
        accepted = []
        for value in range(1, micro + 1):
            changed = paper.model_copy(deep=True)
            changed.rollout.micro_batch = value
            try:
                configuration.check(changed)
                accepted.append(value)
            except UserError:
                pass
        assert micro_batches(paper.rollout, paper.update.minibatches) == accepted


def test_advice_names_the_knobs_in_order_with_this_runs_values(paper):
    error = torch.cuda.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 1.20 GiB. GPU 0 has a total capacity of 22.03 GiB of which 1 GiB is left"
    )
    text = advice(error, paper, processes=8)
    order = ["1. rollout.micro_batch = 4 instead of 8", "2. model.gradient_checkpointing = true instead of false"]
    order += ["3. model.offload = text_vae instead of none", "4. adversary.cached_patches = 64 instead of 256"]
    order += ["5. rollout.prompts_per_iteration = 12 instead of 48"]
    order += ["model.lora.blocks = 2 instead of all"]
    assert [text.index(part) for part in order] == sorted(text.index(part) for part in order)
    assert "Tried to allocate 1.20 GiB" in text
    assert plan(paper, 22.03 * 2**30 / 1e9, processes=8).line() in text
    paper.rollout.micro_batch, paper.model.gradient_checkpointing = 1, True
    text = advice(torch.cuda.OutOfMemoryError("CUDA out of memory."), paper)
    assert "micro_batch" not in text
    assert "gradient_checkpointing" not in text
    assert "1. model.offload = text_vae instead of none" in text
    assert "python -m advgrpo.plan" in text


def test_local_folders_are_read_and_unknown_names_refused(paper):
    settings = configuration.load("tiny")
    named = plan(settings, 24)
    settings.model.path, settings.adversary.backbone = str(tiny.pipeline_dir()), str(tiny.backbone_dir())
    assert {c.name: c.bytes for c in plan(settings, 24).components} == {c.name: c.bytes for c in named.components}
    assert named.peak_gb < 3
    for name in ("model.path", "adversary.backbone"):
        changed = paper.model_copy(deep=True)
        section, field = name.split(".")
        setattr(getattr(changed, section), field, "someone/unknown")
        with pytest.raises(UserError, match=rf"{name} = 'someone/unknown' is not known without a network"):
            plan(changed, 24)
    with pytest.raises(UserError, match="want positive numbers"):
        plan(paper, 0)


def test_models_that_are_not_counted_are_named(paper):
    assert plan(paper, 80).uncounted == ()
    paper.adversary.kind, paper.rewards.pickscore.weight = "siglip", 1.0
    chosen = plan(paper, 80)
    assert "not counted: adversary.kind = siglip, rewards.pickscore" in chosen.line()
    assert not any("DINO" in c.name for c in chosen.components)
    assert "cached_patches" not in advice(torch.cuda.OutOfMemoryError("CUDA out of memory."), paper)


def test_supervised_fine_tuning_loads_no_adversary(paper):
    paper.update.objective = "sft"
    chosen = plan(paper, 80)
    assert chosen.uncounted == ("the VAE's encoder",)
    assert not any("DINO" in c.name for c in chosen.components)
    assert "dinov2" not in advice(torch.cuda.OutOfMemoryError("CUDA out of memory."), paper)


def test_the_forward_process_keeps_an_old_policy_and_no_window(paper):
    before = {c.name: c.bytes for c in plan(paper, 80).components}
    paper.update.objective = "nft"
    after = {c.name: c.bytes for c in plan(paper, 80).components}
    lora = after["LoRA, float32"]
    assert after["old policy, and the weights that it stands in for"] == 2 * lora
    assert after["copy of the iteration's start"] - before["copy of the iteration's start"] == lora
    latents = 4 * 16 * 64**2
    images, name = paper.images_per_iteration, "images and window latents"
    assert before[name] - after[name] == images * 3 * latents  # two ends of two steps, against the clean ones
    assert after["noise levels of a micro-batch"] == 4 * 9 * 8 * latents


def test_math_attention_keeps_its_matrix():
    shape = TransformerShape("fused", 64, 2, 3, frozenset({1}), False, 16, 4, 2, 4, 0, math_attention=False)
    matrices = (3 * 20**2 + 16**2) * 2 * 4
    full = TransformerShape(**{**vars(shape), "math_attention": True})
    assert full.saved_bytes(checkpointing=False) - shape.saved_bytes(checkpointing=False) == matrices


@pytest.fixture(scope="module")
def first_of_eight():
    """A job of eight processes, of which this one is the first and the others are made up."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    device, collective = torch.device("cpu"), contextlib.nullcontext
    yield SimpleNamespace(device=device, patient_group=dist.new_group, collective=collective)
    dist.destroy_process_group()


FLUX, QWEN = "black-forest-labs/FLUX.1-dev", "Qwen/Qwen-Image"


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
    assert (counted.outside, counted.block) == (sizes[0], max(sizes[1:]))
    assert counted.pair == max(a + b for a, b in itertools.pairwise(sizes[1:]))
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
    whole = sum(t.nbytes for t in tensors.values()) - sum(sizes)
    assert counted.held == whole + sum(p.sharded_param.to_local().nbytes for p in parts)
    assert (counted.outside, counted.block) == (0, max(sizes))
    assert counted.pair == max(a + b for a, b in itertools.pairwise(sizes))
    assert 0 < whole < sum(sizes) / 50, "norms, and what is outside of blocks"


def test_an_only_block_has_none_beside_it():
    config = known_models.known_pipeline(MEDIUM).transformer | {"num_layers": 1}
    counted = known_models.count_share(config, 8, torch.bfloat16, fp8=True)
    assert (counted.pair, counted.largest_fp8) == (counted.block, 0)


def test_a_sharded_base_is_planned(paper):
    """By diffusers' forward, whose activations are larger, and with nothing merged."""
    paper.model.path, paper.fast = "stabilityai/stable-diffusion-3.5-large", False
    knobs = Knobs(2, True)
    whole = {c.name: c.bytes for c in _Estimate(paper, 8).components(knobs)}
    paper.fast, paper.model.shard_base = True, "blocks"
    parts = {c.name: c for c in _Estimate(paper, 8).components(knobs)}
    share = parts.pop("share of the transformer").bytes
    gathered = parts.pop("gathered blocks")
    total = whole.pop("transformer")
    assert total / 8 <= share < 1.001 * total / 8
    assert total / 20 < gathered.bytes < total / 5  # four blocks of 38, and what is outside of them
    assert "encode" not in gathered.phases
    assert {name: c.bytes for name, c in parts.items()} == whole
    assert "transformer" in {c.name for c in _Estimate(paper, 1).components(knobs)}  # one process has all of it


@pytest.mark.weekly
def test_a_base_in_parts_in_fp8_is_planned(paper):
    """Quantised layers take a byte, whole or in parts, and no second form of them is kept."""
    paper.model.shard_base = "blocks"
    name = "share of the transformer"
    plain = {c.name: c.bytes for c in _Estimate(paper, 8).components(Knobs(2, True))}
    paper.model.base_precision = "fp8"
    quantised = {c.name: c.bytes for c in _Estimate(paper, 8).components(Knobs(2, True))}
    inner = _Estimate(paper, 8).weights.inner
    assert plain[name] - quantised[name] == pytest.approx(inner / 8, rel=0.01)
    assert quantised["gathered blocks"] < 0.9 * plain["gathered blocks"], "the first block stays"
    assert quantised.keys() - plain.keys() == {"an FP8 weight in the model's dtype"}
    alone = {c.name: c.bytes for c in _Estimate(paper, 1).components(Knobs(2, True))}
    assert alone["transformer"] == pytest.approx(8 * quantised[name], rel=0.01)
    name = "an FP8 weight in the model's dtype"
    assert alone[name] == quantised[name]


def test_weights_trained_in_parts_are_planned_as_they_lie(paper, first_of_eight):
    """Beside the optimizer's, which has as many elements for each: weights, gradient, base."""
    paper.model.train, paper.model.dtype, paper.model.shard_base = "full", "float32", "blocks"
    planned = {c.name: c.bytes for c in _Estimate(paper, 8).components(Knobs(2, True))}
    config = known_models.known_pipeline(paper.model.path).transformer
    made = WeightsInParts(
        copy.deepcopy(known_models._meta_transformer(json.dumps(config, sort_keys=True))), BlockSharding(first_of_eight)
    )
    trained = dict(made.parameters())
    held = sum(p.nbytes for p in trained.values())
    assert planned["share of the transformer"] == held == sum(p.grad.nbytes for p in trained.values())
    assert planned["frozen base beside the trained weights"] == sum(t.nbytes for t in made._base.values()) == held
    assert planned["gradient, Adam's moments, average, float32"] == 4 * held
    total = known_models.count_transformer(config, paper.model.lora).total
    assert made.parts.elements == total
    assert (
        held / 8 < planned["gradients of gathered blocks"] < 4 * total / 4
    )  # of three blocks of 24, and what is outside


def test_tokens_shared_out_are_planned(paper):
    """What is of tokens by their number, what a group draws by its share of the images, and what is judged by turns."""
    knobs = Knobs(8, False)
    alone = {c.name: c for c in _Estimate(paper, 2).components(knobs)}
    paper.model.sequence_parallel = 4
    shared = {c.name: c for c in _Estimate(paper, 8).components(knobs)}
    name = "activations saved for the backward"
    assert shared[name].bytes == pytest.approx(14 / 13 * alone[name].bytes / 4, rel=0.01)
    assert shared["sampler's forward"].bytes < alone["sampler's forward, in the CUDA graphs' pool"].bytes / 2
    assert shared["sampler's forward"].phases == ("sample",)  # no graph keeps it
    assert shared["transformer"].bytes == alone["transformer"].bytes
    name = "features of an iteration's images"
    assert shared[name].bytes == alone[name].bytes / 4
    with pytest.raises(UserError, match=r"model\.sequence_parallel = 4 puts .* into .* groups of 4, but there are 6"):
        plan(paper, 80, processes=6)


@pytest.mark.weekly
def test_sharding_is_proposed_where_it_can_be_done(paper):
    """By several processes, and not beside what it refuses."""
    paper.model.path = "stabilityai/stable-diffusion-3.5-large"
    remedy = "set model.shard_base = blocks"
    assert remedy in plan(paper, 24, processes=8).remedies
    assert not any("shard_base" in each for each in plan(paper, 24).remedies)
    paper.model.sequence_parallel = 2
    assert remedy in plan(paper, 24, processes=8).remedies
    paper.model.base_precision = "fp8"
    assert remedy not in plan(paper, 24, processes=8).remedies
    paper.model.sequence_parallel = 1
    assert remedy in plan(paper, 24, processes=8).remedies
    paper.rollout.precision = "fp8"  # of which each process would have a copy
    assert remedy not in plan(paper, 24, processes=8).remedies
    paper.model.shard_base = "blocks"
    assert "set rollout.precision = model" in plan(paper, 24, processes=8).remedies


@pytest.mark.weekly
def test_a_whole_copy_beside_a_base_in_parts_is_planned(paper):
    """All of the model once, its inner linears as e4m3, on every process; forwards of ours outside of the window."""
    paper.model.shard_base = "blocks"
    knobs = Knobs(2, True)
    parts = {c.name: c for c in _Estimate(paper, 8).components(knobs)}
    paper.rollout.precision = "fp8"
    copied = {c.name: c for c in _Estimate(paper, 8).components(knobs)}
    copy_of_all = copied.pop("merged weights, whole")
    config = known_models.known_pipeline(paper.model.path).transformer
    network = copy.deepcopy(known_models.meta_transformer(config)).bfloat16()
    adapters = LoraAdapters(network, paper.model.lora.model_copy(update={"blocks": 2}), 0)  # which takes no room here
    made = MergedCopy(network, adapters, lambda module: contextlib.nullcontext(), "math")
    parts_of_rows = [[rows] if isinstance(rows, torch.Tensor) else rows for rows in made._rows.values()]
    held = [*itertools.chain(*parts_of_rows), *(layer.bias for layer in made.transformer.linears())]
    held += [layer.bias for _, layer in made.transformer._modulation]
    shared = "norm_out.linear.weight", "pos_embed.pos_embed"  # a shape alone, and the network's own table
    outside = [tensor for name, tensor in made.transformer._small.items() if name not in shared]
    assert copy_of_all.bytes == pytest.approx(sum(t.nbytes for t in (*held, *outside)), rel=1e-3)
    assert copy_of_all.phases == PHASES
    name = "sampler's forward"
    assert copied[name].bytes > parts[name].bytes  # the modulation of all steps
    assert {n: c.bytes for n, c in copied.items() if n != name} == {n: c.bytes for n, c in parts.items() if n != name}


def test_a_whole_copy_is_proposed_where_it_fits(paper):
    """Beside a base in parts that is not sampled from one already, and that our forward can run."""
    paper.model.path = "stabilityai/stable-diffusion-3.5-large"
    said = "rollout.precision = fp8 fits as well, peak"
    assert said not in plan(paper, 80, processes=8).line()
    paper.model.shard_base = "blocks"
    assert said in plan(paper, 80, processes=8).line()
    assert said not in plan(paper, 24, processes=8).line()
    assert said not in plan(paper, 80).line(), "one process gathers nothing"
    paper.model.lora.targets = ("norm1.linear",)
    assert said not in plan(paper, 80, processes=8).line()
    paper.model.lora.targets, paper.model.sequence_parallel = LORA_TARGETS, 2
    assert said not in plan(paper, 80, processes=8).line(), "a copy computes all tokens"
    paper.model.sequence_parallel, paper.rollout.precision = 1, "fp8"
    assert said not in plan(paper, 80, processes=8).line()


@pytest.fixture
def large_images():
    """Qwen-Image's of 1024 pixels."""
    config = configuration.load("qwen-image-dino")
    config.model.resolution, config.rollout.micro_batch, config.model.offload = 1024, 1, "text_vae"
    return config


def test_sequence_groups_with_blocks_in_parts_are_planned(large_images):
    """By our forward with nothing merged: tokens are divided by a group, weights by all processes."""
    config, knobs = large_images, Knobs(1, False)
    config.model.sequence_parallel = 4
    whole = {c.name: c.bytes for c in _Estimate(config, 8).components(knobs)}
    config.model.shard_base = "blocks"
    parts = {c.name: c.bytes for c in _Estimate(config, 8).components(knobs)}
    share, total = parts.pop("share of the transformer"), whole.pop("transformer")
    assert total / 8 < share < 1.02 * total / 8  # what is outside of blocks is whole
    assert total / 50 < parts.pop("gathered blocks") < total / 10  # two pairs of 60 blocks, without modulation
    assert whole.pop("merged weights") > 0
    assert parts == whole


def test_sequence_groups_are_proposed_where_nothing_less_fits(large_images):
    """Parts alone where they do, both where only both do, and then the fewest processes to an image."""
    config = large_images
    assert plan(config, 24, processes=8).remedies == ("set model.shard_base = blocks",)
    assert plan(config, 22, processes=8).remedies == ("set model.sequence_parallel = 2, model.shard_base = blocks",)
    config.model.shard_base = "blocks"
    remedies = plan(config, 22, processes=8).remedies
    assert "set model.sequence_parallel = 2" in remedies
    assert not any("sequence_parallel = 4" in each for each in remedies), "fewer do"
    config.model.sequence_parallel = 2
    assert plan(config, 22, processes=8).fits
    config.model.sequence_parallel, config.fast = 1, False
    assert not any("sequence_parallel" in each for each in plan(config, 22, processes=8).remedies)


SIZES, BASES, KLEIN = (24, 40, 48, 80, 141), ("model", "fp8"), "black-forest-labs/FLUX.2-klein-base-4B"
FAMILIES = {
    "SD3.5-medium": ("sd35m-dino-paper", MEDIUM),
    "SD3.5-large": ("sd35m-dino-paper", "stabilityai/stable-diffusion-3.5-large"),
    "FLUX.1-dev": ("flux1-dino", "black-forest-labs/FLUX.1-dev"),
    "Qwen-Image": ("qwen-image-dino", "Qwen/Qwen-Image"),
}


def least_gb(
    preset: str,
    path: str,
    way: str,
    processes: int,
    train: str = "lora",
    precision: str = "model",
    sampled: str = "model",
) -> float:
    config = configuration.load(preset)
    config.rollout.precision = sampled
    config.model.base_precision = precision
    config.model.path, config.model.shard_base, config.model.train = path, way, train
    if train == "full":
        config.model.dtype = "float32"
    return min(each.peak_gb for each in _Estimate(config, processes).plans(math.inf))


@pytest.mark.weekly
@pytest.mark.parametrize("processes", [1, 2, 4, 8, 16, 32, 64])
def test_the_documents_say_what_fits(processes):
    page = (ROOT / "docs" / "families.md").read_text()
    assert "| model | GPUs | whole | in parts | in parts, FP8 | " + " | ".join(f"{size} GB" for size in SIZES) in page
    for name, settings in {**FAMILIES, "FLUX.2 klein": ("flux2-dino", KLEIN)}.items():
        ways = {"whole": least_gb(*settings, "none", processes)}
        if name in FAMILIES:  # FLUX.2's base is not shared out
            in_parts = {precision: least_gb(*settings, "blocks", processes, precision=precision) for precision in BASES}
            ways |= {} if processes == 1 else {"in parts": in_parts["model"]}
            ways |= {"FP8": in_parts["fp8"]}
        cells = [next((way for way, gb in ways.items() if gb <= size), "–") for size in SIZES]
        least = [f"{ways[way]:.0f} GB" if way in ways else "" for way in ("whole", "in parts", "FP8")]
        line = "| " + " | ".join([name, str(processes), *least, *cells]) + " |"
        assert line in page, line


@pytest.mark.weekly
def test_the_families_tables_and_the_presets_say_what_the_command_says():
    """Of one GPU where they say no more; a preset's file names the smallest card that 8 of are enough."""
    page = (ROOT / "docs" / "families.md").read_text()
    said = re.findall(r"`python -m advgrpo\.plan --preset (\S+)` says at least (\d+) GB", page)
    assert {preset.split("-")[0] for preset, _ in said} == {"flux1", "flux2", "qwen"}
    for preset, gb in said:
        refused = plan(configuration.load(preset), 10)
        assert f"at least {refused.peak_gb:.1f} GB" in refused.line()
        assert f"{refused.peak_gb:.0f}" == gb, preset
    assert "21 GB on each of 8 GPUs" in page
    assert plan_as_configured(configuration.load("flux2-dino"), 24, processes=8).peak_gb == pytest.approx(21, abs=0.5)
    cards, named = (24, 40, 48, 80, 96, 141), 0
    for preset in configuration.preset_names():
        comment = re.sub(r"\s*\n#\s*", " ", (ROOT / "advgrpo" / "presets" / f"{preset}.yaml").read_text())
        for card in map(int, re.findall(r"(\d+) GB by (?:its|the plan's) estimate", comment)):
            assert plan(configuration.load(preset), card, processes=8).fits, preset
            assert not plan(configuration.load(preset), cards[cards.index(card) - 1], processes=8).fits, preset
            named += 1
    assert named == 4


@pytest.mark.weekly
def test_the_documents_say_what_a_whole_copy_takes():
    page = (ROOT / "docs" / "families.md").read_text()
    assert "| model | the copy | in parts | with the copy | in parts, FP8 | with the copy |" in page
    for name, (preset, path) in FAMILIES.items():
        config = known_models.known_pipeline(path).transformer
        cells = [known_models.count_share(config, 1, torch.bfloat16, fp8=True).held / 1e9]
        for base, sampled in itertools.product(("model", "fp8"), repeat=2):
            cells.append(least_gb(preset, path, "blocks", 8, precision=base, sampled=sampled))
        line = f"| {name} | {cells[0]:.1f} GB | " + " | ".join(f"{gb:.0f} GB" for gb in cells[1:]) + " |"
        assert line in page, line


@pytest.mark.weekly
def test_the_documents_say_where_every_weight_can_be_trained():
    counts = (1, 8, 16, 64)
    heads = " | ".join(f"{count} GPU{'s' * (count > 1)}" for count in counts)
    lines = [f"| model | {heads} |", "|---|" + "---|" * len(counts)]
    for name, settings in FAMILIES.items():
        ways = {count: "none" if count == 1 else "blocks" for count in counts}
        least = [least_gb(*settings, way, count, "full") for count, way in ways.items()]
        lines.append(f"| {name} | " + " | ".join(f"{gb:.0f} GB" for gb in least) + " |")
    text = "\n".join(lines)
    assert text in (ROOT / "docs" / "families.md").read_text(), text


def sent(processes: int) -> tuple[float, int]:
    """(GB that a process sends to others, messages) in a forward of one row of Qwen-Image of 1024 pixels."""
    group, messages = one_of(processes), []
    group.exchange = lambda x, found, given, taken: messages.append(x.nbytes * (sum(given) - given[0]) // sum(given))
    config = known_models.known_pipeline("Qwen/Qwen-Image").transformer
    stock = known_models._meta_transformer(json.dumps(config, sort_keys=True))
    tensors = {name: p.detach().bfloat16() for name, p in stock.named_parameters()}
    ours = FusedTransformer(TransformerConfig.from_stock(stock.config), tensors, attention="math", sequence=group)
    text, none = (torch.empty(1, *shape, dtype=torch.bfloat16, device="meta") for shape in ((128, 3584), (0,)))
    mask = torch.ones(1, 128, dtype=torch.bool, device="meta")
    prepared = ours.prepare(text, none, torch.empty(1, device="meta"), mask=mask)
    step, latents = torch.zeros(1, dtype=torch.int64, device="meta"), text.new_empty(1, 16, 128, 128)
    with torch.no_grad():
        ours.predict(latents, step, prepared, "base")
    return sum(messages) / 1e9, len(messages)


@pytest.mark.weekly
def test_the_documents_say_what_tokens_shared_out_need_and_cost():
    config, lines = configuration.load("qwen-image-dino"), []
    config.model.resolution, config.rollout.micro_batch = 1024, 1
    for members in (1, 2, 4, 8):
        config.model.sequence_parallel = members
        plain, recomputed = (each.phase_gb("update") for each in _Estimate(config, 8).plans(math.inf))
        gb, messages = sent(members) if members > 1 else (0.0, 0)
        lines.append(f"| {members} | {plain:.0f} GB | {recomputed:.0f} GB | {gb:.2f} GB in {messages} |")
    text = "\n".join(lines)
    assert text in (ROOT / "docs" / "families.md").read_text(), text


def received(fused: bool) -> float:
    """GB that a process of 8 gets of Qwen-Image's blocks in a forward."""
    stock = copy.deepcopy(known_models.meta_transformer(known_models.known_pipeline(QWEN).transformer))
    stock, blocks = torch.nn.Module.to(stock, torch.bfloat16), len(block_names(stock))
    units = known_models.fused_units(stock)[:blocks] if fused else known_models.stock_units(stock, fp8=False)[0]
    return 7 * sum(known_models.share_bytes(parameter, 8) for unit in units for parameter in unit) / 1e9


@pytest.mark.weekly
def test_the_documents_say_what_sequence_groups_with_blocks_in_parts_need():
    config, lines = configuration.load("qwen-image-dino"), []
    config.model.resolution, config.rollout.micro_batch, config.model.shard_base = 1024, 1, "blocks"
    for members in (1, 2, 4, 8):
        config.model.sequence_parallel = members
        plain, recomputed = (each.phase_gb("update") for each in _Estimate(config, 8).plans(math.inf))
        moved = received(fused=members > 1)
        lines.append(f"| {members} | {plain:.0f} GB | {recomputed:.0f} GB | {moved:.1f} GB |")
    text = "\n".join(lines)
    assert text in (ROOT / "docs" / "families.md").read_text(), text


def test_command_line(capsys):
    assert command.main(["--preset", "sd35m-dino-paper", "--gpu", "24,80", "--processes", "8"]) == 0
    output = capsys.readouterr().out
    assert "80 GB: rollout.micro_batch = 8, model.gradient_checkpointing = false" in output
    assert "estimated" in output
    assert "merged weights" in output
    assert command.main(["--preset", "sd35m-dino-paper", "--gpu", "4"]) == 1
    assert "does not fit" in capsys.readouterr().out
    for arguments, message in (
        (["--gpu", "big"], "--gpu big: want sizes in GB"),
        (["--gpu", "24", "--preset", "nope"], "unknown preset 'nope'"),
        (["--gpu", "24", "--processes", "0"], "--processes 0: want a whole number from 1"),
        (["--gpu", "inf"], "--gpu inf: want sizes above 0"),
    ):
        assert command.main(arguments) == 2
        assert message in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert command.main(["--gpu", "auto"]) == 2
        assert "no CUDA device" in capsys.readouterr().err


def test_table_shows_every_component(paper):
    plans = [plan(paper, size, processes=8) for size in (24, 80)]
    shown = table(plans)
    names = list(shown.columns[0].cells)
    assert {c.name for p in plans for c in p.components} <= set(names)
    peak = [column._cells[names.index("peak")] for column in shown.columns[1:3]]
    assert peak == [f"{p.peak_gb:.2f}" for p in plans]


def test_cheaper_rollouts_are_planned_as_they_run(paper):
    """Fewer steps and rows, a copy of what is trained on, and only micro-batches that training takes."""
    paper.rollout.window.steps, paper.rollout.window.order = (0, 1), "fixed"
    assert drawn_steps(paper) == 10
    paper.rollout.tail_steps = 4
    assert drawn_steps(paper) == 6
    paper.rollout.scouts, paper.rollout.scout_tail_steps = 2, 1
    assert drawn_steps(paper) == 6 + 2 * 3
    paper.update.informative_share = 0.25
    estimate = _Estimate(paper, 8)
    assert {knobs.micro_batch for knobs in estimate._knobs()} == {1, 2, 4}
    by_name = {c.name: c.bytes for c in estimate.components(Knobs(4, False))}
    latents = 4 * 16 * 64 * 64
    assert by_name["window latents that are trained on"] == 96 // 4 * 2 * 2 * latents


def test_processes_of_a_base_in_parts_share_evenly_or_are_refused(paper):
    """Every forward is a collective: where one process had a micro-batch more, the others would not be there."""
    paper.model.shard_base = "blocks"
    assert configuration.unevenly_sharded(paper, 1) == ""
    assert configuration.unevenly_sharded(paper, 8) == ""
    refused = configuration.unevenly_sharded(paper, 7)
    assert "7 processes run every forward together" in refused
    assert "multiple of 7, take another number of processes, or model.shard_base = none" in refused
    paper.model.sequence_parallel = 2  # whose sequence groups share them
    assert configuration.unevenly_sharded(paper, 16) == ""
    refused = configuration.unevenly_sharded(paper, 14)
    assert "not shared evenly by their 7 sequence groups" in refused
    assert "multiple of 7, take another" in refused
    paper.model.sequence_parallel = 1
    for processes in (32, 64):
        micro = plan(paper, 141, processes=processes).knobs.micro_batch
        assert configuration.unevenly_sharded(paper, processes, micro_batch=micro) == ""
    with pytest.raises(UserError, match="5 processes run every forward together"):
        plan(paper, 141, processes=5)
    paper.model.shard_base = "none"
    assert configuration.unevenly_sharded(paper, 7) == ""


def test_what_is_advised_to_processes_of_a_base_in_parts_is_accepted(paper):
    paper.model.shard_base, paper.update.minibatches, paper.fast = "blocks", 1, False
    rollout = paper.rollout
    rollout.prompts_per_iteration, rollout.group_size, rollout.micro_batch = 16, 3, 3  # 16 micro-batches
    assert not any("prompts_per_iteration" in remedy for remedy in plan(paper, 8, processes=16).remedies)
    rollout.prompts_per_iteration, rollout.group_size, rollout.micro_batch = 1, 12, 6
    said = advice(RuntimeError("out of memory"), paper, processes=2)
    assert "rollout.micro_batch = 3 instead of 6" in said  # 4 would be three pieces
    assert "fast = true" not in said  # diffusers' forward it is
    rollout.prompts_per_iteration, rollout.group_size, rollout.micro_batch = 3, 3, 4
    with pytest.raises(UserError, match="2 processes run every forward together"):
        plan(paper, 80, processes=2)
    rollout.micro_batch = 3
    with pytest.raises(UserError, match="5 processes run every forward together"):
        plan_as_configured(paper, 80, processes=5)
