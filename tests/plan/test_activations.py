"""What a forward saves and keeps alive, by the formulas of plan/activations.py, against what autograd keeps on the meta
device, at full size.

Bugs planted in a copy, each seen red: attention's output counted once; the first block's dual attention saved; one
float32 copy for stock LoRA missing; boundaries of the image stream only; views counted as new; freed tensors not
subtracted; matrices of the dual attention left out.
"""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from diffusers import (
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
)

from advgrpo import config as configuration
from advgrpo.plan import known_models
from advgrpo.plan.activations import AliveBytes, TransformerShape, decode_bytes
from advgrpo.plan.estimate import Estimate
from advgrpo.policy.adapters import LoraAdapters, target_modules
from advgrpo.policy.fused.decoder import SD3_DECODER
from advgrpo.policy.fused.transformer import FusedTransformer, TransformerConfig
from advgrpo_kernels import _runtime
from tests.plan.counting import MEDIUM, flash, one_of

ROWS = 2


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


@pytest.mark.in_ci(1)
def test_saved_bytes_of_the_fused_forward_follow_the_table(fused, paper):
    shape = Estimate(paper, 8).shape
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
    shape = Estimate(paper, 8).shape
    with torch.device("meta"):
        transformer = SD3Transformer2DModel(**known_models.TRANSFORMERS[MEDIUM]).to(torch.bfloat16)
        LoraAdapters(transformer.requires_grad_(False), paper.model.lora, seed=0)
    latents, text, pooled = meta_inputs(1)
    time = torch.empty(1, device="meta")

    def forward():
        return transformer(latents, text, pooled, time, return_dict=False)

    counted = saved_bytes(forward)
    assert shape.saved_bytes(checkpointing=False) == pytest.approx(counted, rel=0.03)


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
    shape, tokens = Estimate(config, 8).shape, {"dtype": dtype, "device": "meta"}
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
    shape, tokens = Estimate(config, 8).shape, {"dtype": dtype, "device": "meta"}
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


@ways("qwen-image-dino")
def test_saved_bytes_of_qwen_image_follow_the_table(of_rotary):
    """Its blocks are alike but for the last, whose text ends."""
    config, dtype = of_rotary
    shape, tokens = Estimate(config, 8).shape, {"dtype": dtype, "device": "meta"}
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


def test_math_attention_keeps_its_matrix():
    shape = TransformerShape("fused", 64, 2, 3, frozenset({1}), False, 16, 4, 2, 4, 0, math_attention=False)
    matrices = (3 * 20**2 + 16**2) * 2 * 4
    full = TransformerShape(**{**vars(shape), "math_attention": True})
    assert full.saved_bytes(checkpointing=False) - shape.saved_bytes(checkpointing=False) == matrices
