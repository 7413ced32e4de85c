"""diffusers' SD3 transformer with fused layers against itself without.

Planted bugs that turned this file red: the two modulations of a dual block swapped, the second gate taken for the
first, scale and shift swapped in the last norm, text tokens first, the weights of q and k swapped, another processor
ignored, the filter ignored, chunking ignored, a restore that leaves one module, a forward bound to the wrong copy, a
module checked after others were replaced, other models accepted for their last norm, a bound method (no pickle), hooks
of bypassed modules passed over, a forward of one's own lost, a hook's forward taken for ours.
"""

import copy
import functools
import pickle
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from advgrpo_kernels.integrations import _blocks, _sd3_blocks, diffusers_sd3

SETTINGS = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "caption_projection_dim": 32,
    "pooled_projection_dim": 20,
    "pos_embed_max_size": 8,
}


def transformer(**settings):
    """SD3.5's layout with weights that make every branch count: an untrained one has gates of zero."""
    models = pytest.importorskip("diffusers")
    model = models.SD3Transformer2DModel(
        **SETTINGS | {"qk_norm": "rms_norm", "dual_attention_layers": (0, 1)} | settings
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.requires_grad_(False)


def inputs(batch=2):
    generator = torch.Generator().manual_seed(2)
    shapes = {
        "hidden_states": (batch, 4, 8, 8),
        "encoder_hidden_states": (batch, 5, 24),
        "pooled_projections": (batch, 20),
    }
    named = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return named | {"timestep": torch.tensor([900.0, 300.0][:batch])}


def outputs(model, **changes):
    return model(**inputs() | changes, return_dict=False)[0]


@pytest.fixture
def fused_calls(monkeypatch):
    """How often each fused op was called: on a CPU parity can be exact, so equality proves nothing about use."""
    diffusers_sd3.accelerate(transformer())  # its check runs them too, once
    calls = Counter()

    def counting(name, op):
        def counted(*args, **kwargs):
            calls[name] += 1
            return op(*args, **kwargs)

        return counted

    for name in ("ada_layer_norm", "gated_residual", "gelu", "qk_rms_norm"):
        for module in (_blocks, _sd3_blocks):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, counting(name, getattr(module, name)))
    return calls


@pytest.mark.parametrize(
    ("settings", "attentions"),
    [
        ({}, 5),
        ({"qk_norm": None, "dual_attention_layers": ()}, 0),  # SD3-medium
        ({"dual_attention_layers": ()}, 3),  # SD3.5-large
        ({"dual_attention_layers": (0, 1, 2)}, 6),
    ],
    ids=["SD3.5-medium", "SD3-medium", "SD3.5-large", "all dual"],
)
def test_float32_parity(settings, attentions, fused_calls):
    model = transformer(**settings)
    expected = outputs(model)
    assert diffusers_sd3.accelerate(model) == [*(f"transformer_blocks.{i}" for i in range(3)), "norm_out"]
    got = outputs(model)
    assert dict(fused_calls) == {
        "ada_layer_norm": 7,
        "gated_residual": 10,  # two per stream; the last block has one stream
        "gelu": 5,
        **({"qk_rms_norm": attentions} if attentions else {}),
    }
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    diffusers_sd3.restore(model)
    fused_calls.clear()
    assert torch.equal(outputs(model), expected)
    assert not fused_calls


def test_gradients_reach_lora_layers_as_before():
    peft = pytest.importorskip("peft")
    targets = ["attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj", "attn.to_add_out"]
    model = peft.get_peft_model(transformer(), peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False))

    def gradients():
        model.zero_grad()
        outputs(model).square().sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients()
    diffusers_sd3.accelerate(model)
    got = gradients()
    assert got.keys() == expected.keys()
    assert len(got) > 20
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item(), msg=name)


def test_filter_and_log(caplog):
    model = transformer()
    with caplog.at_level("INFO", "advgrpo_kernels.integrations"):
        names = diffusers_sd3.accelerate(model, filter=lambda name, module: name.endswith("blocks.1"))
    assert names == ["transformer_blocks.1"]
    assert "transformer_blocks.1 (JointTransformerBlock)" in caplog.text
    assert "q and k norms of attn, attn2" in caplog.text
    assert "forward" not in vars(model.transformer_blocks[0])
    assert diffusers_sd3.restore(model) == names


def test_checkpoints_stay_stock():
    model = transformer()
    before = copy.deepcopy(model.state_dict())
    diffusers_sd3.accelerate(model)
    after = model.state_dict()
    assert list(after) == list(before)
    fresh = transformer(num_layers=3)
    fresh.load_state_dict(after)
    torch.testing.assert_close(outputs(model), outputs(fresh), rtol=1e-5, atol=1e-5)


def test_a_copy_of_an_accelerated_model_uses_its_own_weights():
    model = transformer()
    diffusers_sd3.accelerate(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert outputs(twin).abs().max() > 0


def test_chunked_feed_forward_and_gradient_checkpointing_still_work(fused_calls):
    model = transformer()
    expected = outputs(model)
    diffusers_sd3.accelerate(model)
    model.enable_forward_chunking(chunk_size=1, dim=1)
    torch.testing.assert_close(outputs(model), expected, rtol=1e-4, atol=1e-5)
    assert dict(fused_calls) == {"ada_layer_norm": 1}  # norm_out: chunked blocks run their own forward
    model.disable_forward_chunking()
    model.enable_gradient_checkpointing()
    model.train()
    hidden = inputs()["hidden_states"].requires_grad_()
    got = outputs(model, hidden_states=hidden)
    torch.testing.assert_close(got.detach(), expected, rtol=1e-5, atol=1e-5)
    got.sum().backward()
    assert hidden.grad.abs().max() > 0


def test_another_attention_processor_is_called():
    model = transformer()
    attn, calls = model.transformer_blocks[0].attn, []
    stock = attn.processor

    class Spy:
        def __call__(self, *args, **kwargs):
            calls.append(1)
            return stock(*args, **kwargs)

    expected = outputs(model)
    attn.set_processor(Spy())
    diffusers_sd3.accelerate(model)
    torch.testing.assert_close(outputs(model), expected, rtol=1e-5, atol=1e-5)
    assert calls == [1]


def test_bad_calls_raise():
    model = transformer()
    with pytest.raises(ValueError, match="none chosen by the filter"):
        diffusers_sd3.accelerate(model, filter=lambda name, module: False)
    with pytest.raises(ValueError, match=r"knows SD3Transformer2DModel \(SD3, SD3.5\), .*alone, got Linear"):
        diffusers_sd3.accelerate(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"a module such as pipe.transformer, got SimpleNamespace"):
        diffusers_sd3.accelerate(SimpleNamespace(transformer=model))
    with pytest.raises(RuntimeError, match="no module of SD3Transformer2DModel is replaced"):
        diffusers_sd3.restore(model)
    diffusers_sd3.accelerate(model)
    with pytest.raises(RuntimeError, match="replaced already"):
        diffusers_sd3.accelerate(model)
    other = transformer()
    other.transformer_blocks[1].norm2 = torch.nn.LayerNorm(32)
    with pytest.raises(ValueError, match="LayerNorm without affine"):
        diffusers_sd3.accelerate(other)
    assert "forward" not in vars(other.transformer_blocks[0])


def test_other_models_are_refused_whole():
    """Many models have the same last norm, which used to be replaced alone."""
    models = pytest.importorskip("diffusers")
    controlnet = models.SD3ControlNetModel.from_transformer(transformer(), num_layers=1)
    with pytest.raises(ValueError, match="alone, got SD3ControlNetModel"):
        diffusers_sd3.accelerate(controlnet)
    assert not [module for module in controlnet.modules() if "forward" in vars(module)]


def test_a_block_with_a_forward_of_its_own_is_refused():
    model = transformer()
    block = model.transformer_blocks[1]
    block.__class__ = type("MyBlock", (type(block),), {"forward": lambda self, *args, **kwargs: None})
    with pytest.raises(ValueError, match=r"blocks.1: MyBlock has a forward of its own, which would be lost"):
        diffusers_sd3.accelerate(model)


def test_an_accelerated_model_is_pickled_saved_and_copied(tmp_path, fused_calls):
    """Ray and spawned processes send models by pickle."""
    model = transformer()
    diffusers_sd3.accelerate(model)
    expected = outputs(model)
    torch.save(model, tmp_path / "model.pt")
    twins = [pickle.loads(pickle.dumps(model)), torch.load(tmp_path / "model.pt", weights_only=False)]
    for parameter in model.parameters():
        parameter.data.zero_()
    for twin in (*twins, copy.deepcopy(twins[0])):
        fused_calls.clear()
        assert torch.equal(outputs(twin), expected)
        assert fused_calls["gated_residual"] == 10
        assert len(diffusers_sd3.restore(twin)) == 4


BYPASSED = [
    "norm1",
    "norm1.norm",
    "norm1_context",
    "norm2",
    "norm2_context",
    "attn",
    "attn.norm_q",
    "attn.norm_added_k",
]
BYPASSED += ["attn2", "attn2.norm_k", "ff", "ff.net.0", "ff_context"]


@pytest.mark.parametrize("part", BYPASSED)
def test_hooks_of_parts_that_the_fused_forward_does_not_call_fire(part, fused_calls, caplog):
    model, fired = transformer(), []
    expected = outputs(model)
    module = model.get_submodule(f"transformer_blocks.0.{part}")
    diffusers_sd3.accelerate(model)
    _blocks._say_stock.cache_clear()
    with caplog.at_level("WARNING", "advgrpo_kernels.integrations"):
        handle = module.register_forward_hook(lambda *_: fired.append(part))
        torch.testing.assert_close(outputs(model), expected, rtol=1e-5, atol=1e-5)
        outputs(model)
    assert fired == [part] * 2
    assert caplog.text.count("JointTransformerBlock: such modules run their own forward") == 1
    assert fused_calls["gated_residual"] == 2 * (10 - 4)  # the other two blocks stay fused
    handle.remove()
    fused_calls.clear()
    outputs(model)
    assert fused_calls["gated_residual"] == 10


def test_pre_hooks_global_hooks_and_replaced_forwards_are_seen(fused_calls):
    model, fired = transformer(), []
    diffusers_sd3.accelerate(model)
    model.norm_out.norm.register_forward_pre_hook(lambda *_: fired.append("last norm"))
    attention = model.transformer_blocks[2].attn
    attention.forward = functools.partial(
        lambda *args, **kwargs: fired.append("attn") or type(attention).forward(*args, **kwargs), attention
    )
    outputs(model)
    assert fired == ["attn", "last norm"]
    assert fused_calls["gated_residual"] == 8
    fused_calls.clear()
    handle = torch.nn.modules.module.register_module_forward_hook(
        lambda module, *_: fired.append(type(module).__name__)
    )
    outputs(model)
    handle.remove()
    assert not fused_calls
    assert fired.count("JointTransformerBlock") == 3
    assert "GELU" in fired


def test_hooks_that_replace_a_block_s_forward_are_named_and_may_come_second(fused_calls):
    """diffusers' LayerSkip, caches and offloading put a forward of theirs on the instance."""
    skip, hooks = (pytest.importorskip(f"diffusers.hooks.{name}") for name in ("layer_skip", "hooks"))
    model = transformer()
    skip.apply_layer_skip(model, skip.LayerSkipConfig(indices=[1], dropout=1.0))
    with pytest.raises(RuntimeError, match=r"blocks.1: .*replaced by a hook .*call accelerate\(model\) before"):
        diffusers_sd3.accelerate(model)
    assert "forward" not in vars(model.transformer_blocks[0])

    model = transformer()
    expected = outputs(model)
    diffusers_sd3.accelerate(model)
    hooks.HookRegistry.check_if_exists_or_initialize(model.transformer_blocks[1]).register_hook(hooks.ModelHook(), "x")
    torch.testing.assert_close(outputs(model), expected, rtol=1e-5, atol=1e-5)
    assert fused_calls["gated_residual"] == 10
    with pytest.raises(RuntimeError, match=r"blocks.1: a hook was put over its fused forward: remove that hook"):
        diffusers_sd3.restore(model)
    with pytest.raises(RuntimeError, match=r"blocks.1: its forward was replaced by a hook"):
        diffusers_sd3.accelerate(model, filter=lambda name, module: name.endswith("blocks.1"))


def test_skipping_the_feed_forward_layers_of_a_block_skips_them():
    """Such hooks sit on modules that the fused forward does not call, before or after accelerate()."""
    hooks = pytest.importorskip("diffusers.hooks.layer_skip")
    configuration = hooks.LayerSkipConfig(indices=[1], dropout=1.0, skip_attention=False)
    stock = transformer()
    whole, before, after = outputs(stock), copy.deepcopy(stock), copy.deepcopy(stock)
    for model in (stock, before):
        hooks.apply_layer_skip(model, configuration)
    diffusers_sd3.accelerate(before)
    diffusers_sd3.accelerate(after)
    hooks.apply_layer_skip(after, configuration)
    expected = outputs(stock)
    assert (expected - whole).abs().max() > 1e-3
    for model in (before, after):
        torch.testing.assert_close(outputs(model), expected, rtol=1e-5, atol=1e-5)


def test_compiles_without_a_graph_break():
    model = transformer(num_layers=2, dual_attention_layers=(0,))
    diffusers_sd3.accelerate(model)
    expected = outputs(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(outputs(compiled), expected)


@pytest.mark.gpu
def test_bf16_is_as_close_to_float32_as_the_original():
    model = transformer().cuda()
    on_gpu = {name: tensor.cuda() for name, tensor in inputs().items()}
    truth = outputs(model, **on_gpu)
    model.bfloat16()
    half = {name: tensor.bfloat16() for name, tensor in on_gpu.items()}
    eager = (outputs(model, **half).float() - truth).norm()
    diffusers_sd3.accelerate(model)
    assert (outputs(model, **half).float() - truth).norm() <= 1.2 * eager
