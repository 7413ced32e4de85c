"""diffusers' FLUX.1, FLUX.2 and Qwen-Image with fused layers against themselves without; SD3 has its own file.

Planted bugs that turned this file red: see tests/mutants (fused_*); besides, image tokens before text tokens, the mask
of the text ignored, the IP-Adapter's part dropped, a modulation that trains on fused layers, float16 not clipped, the
class's replacement that calls itself where a block is to run its own forward.
"""

import copy
import pickle
from collections import Counter

import pytest
import torch

from advgrpo_kernels import _runtime
from advgrpo_kernels.integrations import (
    _blocks,
    _flux2_blocks,
    _flux_blocks,
    _qwen_blocks,
    _sd3_blocks,
    diffusers_transformers,
)
from tests.kernels import test_launch_counts as counting

diffusers = pytest.importorskip("diffusers")
SIZES = {"attention_head_dim": 16, "num_attention_heads": 2, "in_channels": 8, "joint_attention_dim": 24}
AXES = {"flux": (4, 6, 6), "qwenimage": (4, 6, 6), "flux2": (4, 4, 4, 4)}
MODULES = {name: f"diffusers.models.transformers.transformer_{name}" for name in AXES}


def transformer(family, **settings):
    """Small, with weights that make every branch count: an untrained one has gates near zero."""
    torch.manual_seed(0)
    sizes = SIZES | {"axes_dims_rope": AXES[family]}
    if family == "flux":
        more = {"num_layers": 2, "num_single_layers": 2, "pooled_projection_dim": 20, "guidance_embeds": True}
        model = diffusers.FluxTransformer2DModel(**sizes, **more | settings)
    elif family == "flux2":
        more = {"num_layers": 2, "num_single_layers": 2, "timestep_guidance_channels": 16, "guidance_embeds": False}
        model = diffusers.Flux2Transformer2DModel(**sizes, **more | settings)
    else:
        more = {"num_layers": 3, "out_channels": 2}
        model = diffusers.QwenImageTransformer2DModel(**sizes, **more | settings)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.requires_grad_(False)


def inputs(family, dtype=torch.float32, batch=2):
    generator = torch.Generator().manual_seed(2)
    shapes = {"hidden_states": (batch, 16, 8), "encoder_hidden_states": (batch, 5, 24)}
    if family == "flux":
        shapes["pooled_projections"] = (batch, 20)
    named = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    named["timestep"] = torch.tensor([0.9, 0.3])[:batch].to(dtype)
    if family == "flux2":
        places = torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0), torch.zeros(1))
        return named | {"img_ids": places, "txt_ids": torch.arange(5.0)[:, None] * torch.eye(4)[3]}
    if family == "flux":
        rows = torch.arange(4.0).repeat_interleave(4)
        places = torch.stack([torch.zeros(16), rows, torch.arange(4.0).repeat(4)], dim=1)
        guidance = torch.full([batch], 3.5, dtype=dtype)
        return named | {"img_ids": places, "txt_ids": torch.zeros(5, 3), "guidance": guidance}
    mask = torch.arange(5) < torch.tensor([5, 2])[:batch, None]
    return named | {"encoder_hidden_states_mask": mask, "img_shapes": [[(1, 4, 4)]] * batch}


def outputs(family, model, **changes):
    return model(**inputs(family) | changes, return_dict=False)[0]


@pytest.fixture
def fused_calls(monkeypatch):
    """How often each fused op was called: on a CPU parity can be exact, so equality proves nothing about use."""
    for family in MODULES:
        diffusers_transformers.accelerate(transformer(family))  # the check of the forwards runs them too, once
    calls = Counter()

    def counted(name, op):
        return lambda *args, **kwargs: calls.update([name]) or op(*args, **kwargs)

    for name in ("ada_layer_norm", "gated_residual", "gelu", "qk_rms_norm", "swiglu"):
        for module in (_blocks, _flux2_blocks, _flux_blocks, _qwen_blocks, _sd3_blocks):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, counted(name, getattr(module, name)))
    return calls


NAMES = {
    "flux": [*(f"transformer_blocks.{i}" for i in (0, 1)), *(f"single_transformer_blocks.{i}" for i in (0, 1))],
    "qwenimage": [f"transformer_blocks.{i}" for i in (0, 1, 2)],
    "flux2": [
        *(f"transformer_blocks.{i}.{stream}.act_fn" for i in (0, 1) for stream in ("ff", "ff_context")),
        *(f"single_transformer_blocks.{i}.attn.mlp_act_fn" for i in (0, 1)),
    ],
}
# Blocks of two streams: 2 norms, 4 residuals, 2 feed-forwards, 1 attention; of one: one of each; and the last norm.
CALLS = {
    "flux": {"ada_layer_norm": 4 + 2 + 1, "gated_residual": 8 + 2, "gelu": 4 + 2, "qk_rms_norm": 2 + 2},
    "qwenimage": {"ada_layer_norm": 6 + 1, "gated_residual": 12, "gelu": 6, "qk_rms_norm": 3},
    "flux2": {"ada_layer_norm": 1, "swiglu": 4 + 2},
}
IN_BLOCKS = {"flux": "gated_residual", "qwenimage": "gated_residual", "flux2": "swiglu"}  # an op of all blocks alone


@pytest.mark.parametrize("family", MODULES)
def test_float32_parity_and_undo(family, fused_calls):
    model = transformer(family)
    expected = outputs(family, model)
    assert diffusers_transformers.accelerate(model) == [*NAMES[family], "norm_out"]
    got = outputs(family, model)
    assert dict(fused_calls) == CALLS[family]
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(RuntimeError, match="replaced already"):
        diffusers_transformers.accelerate(model)
    assert diffusers_transformers.restore(model) == [*NAMES[family], "norm_out"]
    fused_calls.clear()
    assert torch.equal(outputs(family, model), expected)
    assert not fused_calls


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "gradient checkpointing"])
@pytest.mark.parametrize("family", MODULES)
def test_gradients_of_lora_and_inputs(family, checkpointing, fused_calls):
    peft = pytest.importorskip("peft")
    targets = ["attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj", "attn.to_add_out"]
    targets += ["proj_mlp", "net.2", "to_qkv_mlp_proj", "linear_in"]
    lora = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    model = peft.get_peft_model(transformer(family), lora).train()
    if checkpointing:
        model.base_model.model.enable_gradient_checkpointing()

    def gradients():
        model.zero_grad()
        hidden = inputs(family)["hidden_states"].requires_grad_()
        outputs(family, model, hidden_states=hidden).square().sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None} | {"x": hidden.grad}

    expected = gradients()
    diffusers_transformers.accelerate(model)
    got = gradients()
    op = IN_BLOCKS[family]
    assert fused_calls[op] == CALLS[family][op] * (2 if checkpointing else 1)
    assert got.keys() == expected.keys()
    assert len(got) > 20
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-5, atol=1e-5 * gradient.abs().max().item(), msg=name)


@pytest.mark.parametrize("how", ["bfloat16", "autocast"])
@pytest.mark.parametrize("family", MODULES)
def test_half_precision_is_no_worse_than_stock_against_float64(family, how, fused_calls):
    """Output and gradient of the input, over models whose rounding differs."""
    model, hidden = transformer(family), inputs(family)["hidden_states"]

    def run(chosen, dtype, autocast=False):
        x = hidden.to(dtype).clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = chosen(**inputs(family, dtype) | {"hidden_states": x}, return_dict=False)[0]
        out.double().square().mean().backward()
        return [out.detach().double(), x.grad.double()]

    truth = run(copy.deepcopy(model).double(), torch.float64)
    dtype = torch.bfloat16 if how == "bfloat16" else torch.float32
    model = model.to(dtype)
    stock = run(model, dtype, how == "autocast")
    diffusers_transformers.accelerate(model)
    fused = run(model, dtype, how == "autocast")
    assert dict(fused_calls) == CALLS[family]
    for exact, theirs, ours in zip(truth, stock, fused, strict=True):
        assert (ours - exact).norm() <= 1.1 * (theirs - exact).norm()


def block_call(family, model, name):
    """(block, its arguments as `model` calls it)."""
    block, kept = model.get_submodule(name), {}
    handle = block.register_forward_pre_hook(lambda module, args, named: kept.update(named), with_kwargs=True)
    outputs(family, model)
    handle.remove()
    return block, kept


@pytest.mark.parametrize(
    ("family", "name", "last"),
    [
        ("flux", "single_transformer_blocks.0", ["proj_out"]),
        ("flux", "transformer_blocks.0", ["ff_context.net.2"]),
        ("qwenimage", "transformer_blocks.0", ["txt_mlp.net.2", "img_mlp.net.2"]),
    ],
)
def test_float16_is_clipped_as_in_stock(family, name, last):
    model = transformer(family)
    block, named = block_call(family, model, name)
    block.half()
    for part in last:
        block.get_submodule(part).bias.fill_(2e4)  # times a gate: within the range, and with 6e4 beyond it
    names = ("hidden_states", "encoder_hidden_states", "temb")
    named |= {key: named[key].half() for key in names}
    named |= {key: torch.full_like(named[key], 6e4) for key in names[:2]}
    theirs = block(**named)
    assert theirs[0].abs().max() == 65504  # the text's; of FLUX's two streams the image's is not clipped
    diffusers_transformers.accelerate(model)
    for ours, part in zip(block(**named), theirs, strict=True):
        assert torch.equal(ours.isfinite(), part.isfinite())
        torch.testing.assert_close(ours, part, rtol=1e-2, atol=1.0)


@pytest.mark.weekly
@pytest.mark.parametrize("family", MODULES)
def test_compiles_without_a_graph_break(family):
    model = transformer(
        family, **({"num_layers": 1} if family == "qwenimage" else {"num_layers": 1, "num_single_layers": 1})
    )
    diffusers_transformers.accelerate(model)
    expected = outputs(family, model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(outputs(family, compiled), expected)


@pytest.mark.parametrize("family", MODULES)
def test_copies_and_pickles_use_their_own_weights(family, fused_calls):
    model = transformer(family)
    diffusers_transformers.accelerate(model)
    expected = outputs(family, model)
    twins = [pickle.loads(pickle.dumps(model)), copy.deepcopy(model)]
    for parameter in model.parameters():
        parameter.data.zero_()
    for twin in twins:
        fused_calls.clear()
        assert torch.equal(outputs(family, twin), expected)
        assert dict(fused_calls) == CALLS[family]


@pytest.mark.parametrize(
    ("family", "trained"),
    [
        ("flux", "transformer_blocks.0.norm1.linear"),
        ("flux", "transformer_blocks.0.attn.norm_added_k"),
        ("flux", "single_transformer_blocks.0.norm.linear"),
        ("qwenimage", "transformer_blocks.0.txt_mod.1"),
        ("qwenimage", "transformer_blocks.0.attn.norm_q"),
    ],
)
def test_a_block_whose_modulation_trains_runs_its_own_forward_in_every_mode(family, trained, fused_calls, caplog):
    """A model samples without gradients and learns with: by another forward its first ratio would not be 1."""
    model = transformer(family)
    expected = outputs(family, model)
    model.get_submodule(trained).requires_grad_(True)
    diffusers_transformers.accelerate(model)
    _blocks._say_stock.cache_clear()
    block = model.get_submodule(trained.split(".attn")[0].split(".norm")[0].split(".txt_mod")[0])
    results = []
    block.register_forward_hook(lambda *args: results.append(args[2]))
    for mode in (torch.no_grad(), torch.enable_grad()):
        with mode:
            torch.testing.assert_close(outputs(family, model), expected, rtol=1e-5, atol=1e-5)
    for without, with_grad in zip(*results, strict=True):
        assert torch.equal(without, with_grad)
    assert caplog.text.count("train (inference: model.requires_grad_(False))") == 1
    per_block = 4 if trained.startswith("transformer_blocks") else 1
    assert fused_calls["gated_residual"] == 2 * (CALLS[family]["gated_residual"] - per_block)


BYPASSED = {
    (
        "flux",
        "transformer_blocks.0",
    ): "norm1 norm1_context.norm norm2 ff attn norm2_context ff_context.net.0 attn.norm_q",
    ("flux", "single_transformer_blocks.0"): "norm norm.norm act_mlp attn.norm_k",
    ("qwenimage", "transformer_blocks.0"): "img_norm1 img_norm2 txt_norm1 txt_norm2 txt_mlp img_mlp.net.0 attn",
    ("flux2", "transformer_blocks.0"): "ff_context.act_fn.gate_fn",
    ("flux2", "single_transformer_blocks.0"): "attn.mlp_act_fn.gate_fn",
}


@pytest.mark.parametrize(
    ("family", "part"),
    [(family, f"{block}.{part}") for (family, block), parts in BYPASSED.items() for part in parts.split()],
)
def test_hooks_of_parts_that_the_fused_forward_does_not_call_fire(family, part, fused_calls):
    model = transformer(family, **({} if family == "qwenimage" else {"num_layers": 1, "num_single_layers": 1}))
    op, fired = IN_BLOCKS[family], []
    expected = outputs(family, model)
    diffusers_transformers.accelerate(model)
    handle = model.get_submodule(part).register_forward_hook(lambda *_: fired.append(part))
    torch.testing.assert_close(outputs(family, model), expected, rtol=1e-5, atol=1e-5)
    assert fired == [part]
    stock = Counter(fused_calls)
    handle.remove()
    outputs(family, model)
    assert fused_calls[op] - stock[op] > stock[op]


def test_other_attentions_and_arguments_run_the_block_s_own_attention(fused_calls):
    class Spy(diffusers.models.transformers.transformer_flux.FluxAttnProcessor):
        """A processor with a name of its own; its third part is as an IP-Adapter's."""

        def __call__(self, attn, hidden_states, *args, **kwargs):
            result = super().__call__(attn, hidden_states, *args, **kwargs)
            return (*result, 0.1 * hidden_states) if isinstance(result, tuple) else result

    model = transformer("flux")
    for block in (model.transformer_blocks[0], model.single_transformer_blocks[1]):
        block.attn.set_processor(Spy())
    expected = outputs("flux", model)
    diffusers_transformers.accelerate(model)
    torch.testing.assert_close(outputs("flux", model), expected, rtol=1e-5, atol=1e-5)
    assert dict(fused_calls) == CALLS["flux"] | {"qk_rms_norm": 2}

    mask = torch.rand(2, 1, 21, 21) > 0.3
    model = transformer("flux")
    expected = outputs("flux", model, joint_attention_kwargs={"attention_mask": mask})
    assert (expected - outputs("flux", model)).abs().max() > 1e-3
    diffusers_transformers.accelerate(model)
    got = outputs("flux", model, joint_attention_kwargs={"attention_mask": mask})
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_the_mask_of_all_tokens_that_the_model_made_before_diffusers_0_38(fused_calls):
    """Then the attention took that one, and passed over the text's."""
    model = transformer("qwenimage")
    block, named = block_call("qwenimage", model, "transformer_blocks.0")
    expected = block(**named)
    mask = torch.cat([named["encoder_hidden_states_mask"], torch.ones(2, 16, dtype=torch.bool)], dim=1)
    named["joint_attention_kwargs"] = {"attention_mask": mask[:, None, None, :]}
    got = _qwen_blocks.maskless_forward(block, **named)
    assert fused_calls["qk_rms_norm"] == 1
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    named["joint_attention_kwargs"] = None
    assert (_qwen_blocks.maskless_forward(block, **named)[1] - expected[1]).abs().max() > 1e-3


def test_fused_projections_and_a_time_for_every_token(fused_calls):
    model = transformer("flux")
    expected = outputs("flux", model)
    diffusers_transformers.accelerate(model)
    model.fuse_qkv_projections()
    model.transformer_blocks[0].attn.to_q.weight.zero_()  # no longer read
    torch.testing.assert_close(outputs("flux", model), expected, rtol=1e-5, atol=1e-5)
    editing = transformer("qwenimage", zero_cond_t=True)
    with pytest.raises(ValueError, match=r"transformer_blocks.0: its time differs by token \(zero_cond_t\)"):
        diffusers_transformers.accelerate(editing)
    assert not [module for module in editing.modules() if "forward" in vars(module)]


def test_a_block_that_is_told_the_time_of_every_token_runs_its_own_forward(fused_calls, caplog):
    model = transformer("qwenimage")
    block, named = block_call("qwenimage", model, "transformer_blocks.0")
    if "modulate_index" not in named:
        pytest.skip("this diffusers has no modulate_index")
    usual = block(**named)
    named["modulate_index"] = torch.arange(16).remainder(2).expand(2, -1)
    expected = block(**named)
    assert (expected[1] - usual[1]).abs().max() > 1e-2
    diffusers_transformers.accelerate(model)
    _blocks._say_stock.cache_clear()
    for forward in (block, _qwen_blocks.maskless_forward.__get__(block)):
        assert all(map(torch.equal, forward(**named), expected))
    assert not fused_calls
    assert "modulate_index" in caplog.text


def run_stock(model):
    """Make every block, or SwiGLU, of `model` run its own forward."""
    model.requires_grad_(True)
    for module in model.modules():
        if hasattr(module, "gate_fn"):
            module.gate_fn.register_forward_hook(lambda *_: None)


@pytest.mark.parametrize("family", MODULES)
def test_a_patched_class_is_fused_in_every_model_and_undone(family, fused_calls):
    module = __import__("importlib").import_module(MODULES[family])
    before = transformer(family)
    expected = outputs(family, before)
    names = diffusers_transformers.patch(module)
    try:
        assert set(names) == {
            f"{fused.name}.forward" for fused in diffusers_transformers.FUSED if fused.module == module.__name__
        }
        fused_calls.clear()
        for model in (before, transformer(family)):
            torch.testing.assert_close(outputs(family, model), expected, rtol=1e-5, atol=1e-5)
        assert fused_calls[IN_BLOCKS[family]] == 2 * CALLS[family][IN_BLOCKS[family]]
        run_stock(before)  # what runs its class's own forward must not find ours there
        fused_calls.clear()
        assert torch.equal(outputs(family, before), expected)
        assert not fused_calls
        model = transformer(family)
        diffusers_transformers.accelerate(model)
        torch.testing.assert_close(outputs(family, model), expected, rtol=1e-5, atol=1e-5)
    finally:
        diffusers_transformers.unpatch(module)
    fused_calls.clear()
    assert torch.equal(outputs(family, transformer(family)), expected)
    assert not fused_calls


def test_a_swiglu_that_gates_by_another_function_is_refused_and_runs_its_own_forward(fused_calls):
    model = transformer("flux2")
    gate = model.transformer_blocks[1].ff.act_fn
    gate.gate_fn = torch.nn.GELU()
    with pytest.raises(ValueError, match=r"transformer_blocks.1.ff.act_fn: its gate_fn must be SiLU, got GELU"):
        diffusers_transformers.accelerate(model)
    assert not [module for module in model.modules() if "forward" in vars(module)]
    x = torch.randn(2, 8)
    assert torch.equal(_flux2_blocks.swiglu_forward(gate, x), gate(x))
    assert not fused_calls


def test_a_release_whose_block_computes_something_else_is_refused_whole(monkeypatch):
    model = transformer("qwenimage")
    cls = type(model.transformer_blocks[0])
    own = cls.forward

    def forward(self, hidden_states, encoder_hidden_states, encoder_hidden_states_mask, temb, image_rotary_emb=None, joint_attention_kwargs=None, modulate_index=None):  # fmt: skip  # noqa: E501
        text, image = own(
            self, hidden_states, encoder_hidden_states, encoder_hidden_states_mask, temb, image_rotary_emb
        )
        return text, 1.01 * image

    forward.__qualname__ = own.__qualname__
    monkeypatch.setattr(cls, "forward", forward)
    with pytest.raises(ValueError, match=r"QwenImageTransformerBlock.forward and its replacement do not give the same"):
        diffusers_transformers.accelerate(model)
    monkeypatch.setattr(cls, "forward", lambda self, tokens: tokens)
    with pytest.raises(
        ValueError, match=r"takes \(self, tokens\), its replacement .* another version of that codebase"
    ):
        diffusers_transformers.accelerate(model)
    assert not [module for module in model.modules() if "forward" in vars(module)]


@pytest.fixture
def launches(interpreted):
    return counting.Launches(interpreted)


# Of one block: Triton launches and every ATen operator that computes or copies, in the forward pass and, with the
# gradient of both streams, in the backward pass. diffusers 0.42 on a CPU; an attention is one operator.
LAUNCHES = {
    ("flux", "transformer_blocks.0"): ((82, 100), (32, 31)),
    ("flux", "single_transformer_blocks.0"): ((39, 53), (16, 20)),
    ("qwenimage", "transformer_blocks.0"): ((81, 104), (37, 31)),
    ("flux2", "transformer_blocks.0"): ((90, 110), (88, 100)),
    ("flux2", "single_transformer_blocks.0"): ((36, 50), (35, 45)),
}


@pytest.mark.parametrize(("family", "name"), LAUNCHES)
def test_launches_of_a_block(family, name, launches, monkeypatch):
    model = transformer(family)
    block, named = block_call(family, model, name)
    streams = [named[key] for key in ("hidden_states", "encoder_hidden_states") if named[key] is not None]
    for stream in streams:
        stream.requires_grad_()

    def counted():
        launches.names.clear()
        with launches:
            out = block(**named)
            forward = len(launches.names)
            outs = out if isinstance(out, tuple) else (out,)
            torch.autograd.grad(outs, streams, [torch.ones_like(part) for part in outs])
        return forward, len(launches.names) - forward

    stock = counted()
    diffusers_transformers.accelerate(model)
    monkeypatch.setattr(_runtime, "DEFAULT_BACKEND", "triton")
    assert (stock, counted()) == LAUNCHES[family, name]
