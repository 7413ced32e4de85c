"""The stock model of bench/: diffusers' SD3Transformer2DModel with a PEFT adapter, op for op, and B0's counts.

Planted bugs that turned this file red: SD3.5's dual modulation in another order; positions cropped from the corner;
text before image; scale alpha instead of alpha / rank; adapter left on when disabled; RMSNorm by one fused operator;
timestep not multiplied by one; one more operator in the attention; checkpoints that recompute nothing.
"""

from dataclasses import asdict, replace

import pytest
import torch
from diffusers import SD3Transformer2DModel
from peft import LoraConfig

from bench import stock_model
from bench.counters import ElementwiseBytes, Launches, SavedTensors, Trace, flops, on_gpu
from bench.model import STOCK, STOCK_ADAPTED, STOCK_BACKWARD
from bench.stock_model import ADAPTER, LORA_TARGETS, SD35_MEDIUM, StockConfig, StockTransformer, add_lora

SMALL = StockConfig(
    num_layers=3,
    num_attention_heads=2,
    attention_head_dim=16,
    joint_attention_dim=24,
    pooled_projection_dim=20,
    sample_size=16,
    pos_embed_max_size=12,
    dual_attention_layers=(0, 1),
    qk_norm="rms_norm",
)
CONFIGS = {
    "sd3.5-medium": SMALL,
    "sd3.5-large": replace(SMALL, dual_attention_layers=()),
    "sd3-medium": replace(SMALL, dual_attention_layers=(), qk_norm=None),
    "tiny": stock_model.TINY,
}


@pytest.fixture(autouse=True)
def _poison_empty():
    """The root conftest's is off here: it would write to 32 GB that are not there."""


def diffusers_model(config: StockConfig) -> SD3Transformer2DModel:
    settings = asdict(config)
    return SD3Transformer2DModel(**settings, caption_projection_dim=config.caption_projection_dim)


def inputs(config: StockConfig, rows=2, side=8, text=5, device="cpu", dtype=torch.float32):
    shapes = {
        "hidden_states": (rows, config.in_channels, side, side),
        "encoder_hidden_states": (rows, text, config.joint_attention_dim),
        "pooled_projections": (rows, config.pooled_projection_dim),
    }
    made = {name: torch.randn(shape, device=device, dtype=dtype) for name, shape in shapes.items()}
    return {**made, "timestep": torch.full((rows,), 700, device=device, dtype=torch.int64)}


def pair(config: StockConfig, *, lora: bool, dtype=torch.float32):
    """Ours and theirs with the same weights; adapters with a product that is not zero."""
    theirs = diffusers_model(config).to(dtype)
    ours = StockTransformer(config).to(dtype)
    ours.load_state_dict(theirs.state_dict())
    if lora:
        targets = [f"attn.{name}" for name in LORA_TARGETS]
        theirs.add_adapter(LoraConfig(r=4, lora_alpha=8, init_lora_weights="gaussian", target_modules=targets))
        add_lora(ours, rank=4, alpha=8)
        with torch.no_grad():
            for name, parameter in theirs.named_parameters():
                if ".lora_" in name:
                    parameter.normal_(std=0.1)
        ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_parity_with_diffusers_and_peft(config, lora):
    ours, theirs = pair(config, lora=lora)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    batch = inputs(config)
    results = []
    for model in (ours, lambda **kw: theirs(**kw, return_dict=False)[0]):
        results.append(model(**batch))
        results[-1].square().sum().backward()
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
    for (name, own), other in zip(ours.named_parameters(), theirs.parameters()):
        assert own.requires_grad == other.requires_grad, name
        if own.grad is not None:
            torch.testing.assert_close(own.grad, other.grad, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_operators_are_those_of_diffusers_and_peft(config, dtype):
    """Names, shapes, strides, dtypes and scalars, forward and backward: the baseline is not made slower or faster."""
    ours, theirs = pair(config, lora=True, dtype=dtype)
    batch = inputs(config, dtype=dtype)
    traces = []
    for model in (ours, lambda **kw: theirs(**kw, return_dict=False)[0]):
        with Trace() as trace:
            model(**batch).square().sum().backward()
        traces.append(trace.lines)
    assert len(traces[0]) > 300
    assert next((pair for pair in zip(*traces) if pair[0] != pair[1]), None) is None  # a whole diff takes minutes
    assert len(traces[0]) == len(traces[1])


def test_adapters_can_be_switched_off():
    ours, theirs = pair(SMALL, lora=True)
    theirs.disable_adapters()
    for module in ours.modules():
        if isinstance(module, stock_model.LoraLinear):
            module.enabled = False
    batch = inputs(SMALL)
    torch.testing.assert_close(ours(**batch), theirs(**batch, return_dict=False)[0], rtol=1e-5, atol=1e-5)


def test_a_fresh_adapter_changes_nothing_and_is_gaussian():
    model = StockTransformer(SMALL)
    batch = inputs(SMALL)
    before = model(**batch)
    adapters = add_lora(model, rank=16, alpha=8, generator=torch.Generator().manual_seed(3))
    assert torch.equal(model(**batch), before)
    drawn = torch.cat([a.lora_A[ADAPTER].weight.detach().flatten() for a in adapters])
    assert drawn.std().item() == pytest.approx(1 / 16, rel=0.05)


def test_recomputation_gives_the_same_gradients():
    model = StockTransformer(SMALL)
    add_lora(model, rank=4)
    batch, gradients = inputs(SMALL), []
    for recompute in (False, True):
        model.gradient_checkpointing = recompute
        model.zero_grad()
        model(**batch).square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
    assert torch.equal(*gradients)


@pytest.mark.parametrize(
    ("config", "heads", "layers"), [("SD3_MEDIUM", 24, 24), ("SD35_MEDIUM", 24, 24), ("SD35_LARGE", 38, 38)]
)
def test_published_configurations_have_diffusers_names_and_shapes(config, heads, layers):
    chosen = getattr(stock_model, config)
    assert (chosen.num_attention_heads, chosen.num_layers) == (heads, layers)
    with torch.device("meta"):
        ours, theirs = StockTransformer(chosen), diffusers_model(chosen)
    shapes = [{name: t.shape for name, t in model.state_dict().items()} for model in (ours, theirs)]
    assert shapes[0] == shapes[1]


def test_positions_larger_than_the_table_are_refused():
    with pytest.raises(ValueError, match="13 x 4 patches exceed pos_embed_max_size = 12"):
        StockTransformer(SMALL)(**{**inputs(SMALL), "hidden_states": torch.zeros(2, 16, 26, 8)})


def full():
    """SD3.5-medium in bfloat16 without data, 8 images with guidance: 1024 image and 205 text tokens."""
    with torch.device("meta"):
        model = StockTransformer(SD35_MEDIUM).to(torch.bfloat16)
    return model, inputs(SD35_MEDIUM, rows=16, side=64, text=205, device="meta", dtype=torch.bfloat16)


@pytest.mark.weekly
def test_full_size_forward():
    model, batch = full()
    assert sum(p.numel() for p in model.parameters()) == 2_243_171_520
    with on_gpu(), torch.no_grad():
        with Launches() as launches, ElementwiseBytes() as traffic:
            model(**batch)
        assert flops(lambda: model(**batch)) == 35_579_400_290_304
    assert launches.count == 2348
    assert traffic.total == STOCK.bytes  # 139 GB


@pytest.mark.weekly
def test_full_size_forward_and_backward_with_lora():
    model, batch = full()
    adapters = add_lora(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert (len(adapters), sum(p.numel() for p in trained)) == (191, 18_776_064)
    with on_gpu():
        with SavedTensors(model.parameters()) as saved, Launches() as launches, ElementwiseBytes() as traffic:
            velocity = model(**batch)
        assert launches.count == 3112
        assert traffic.total == STOCK_ADAPTED.bytes  # 168 GB
        assert saved.total == pytest.approx(32.4e9, rel=1e-3)
        loss = velocity.square().sum()
        with Launches() as launches, ElementwiseBytes() as traffic:
            assert flops(loss.backward) == 42_755_424_387_072
        assert launches.count == 4090
        assert traffic.total == STOCK_BACKWARD.bytes  # 277 GB

        model.gradient_checkpointing = True
        outputs = []
        assert flops(lambda: outputs.append(model(**batch))) == 35_949_900_988_416
        assert flops(outputs[0].sum().backward) == 78_657_195_737_088
