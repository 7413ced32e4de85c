"""Our transformer against diffusers': values, LoRA gradients, merged and FP8 weights, memory shared with the stock.

Bugs planted in a copy, each seen red: text rows before image rows; norms of image and text swapped; q and k swapped
when computed again; adapter of one stream on the other; LoRA without its scale, forward or backward; second gate for
the first; GELU in its exact form; patches of the output transposed; every row on the first prompt's modulation; q and k
computed again on a CPU, where it only costs time.
"""

import sys

import pytest
import torch
from diffusers import SD3Transformer2DModel
from peft import LoraConfig
from torch.utils._python_dispatch import TorchDispatchMode

from advgrpo.errors import UserError
from advgrpo.policy.fused import attention, transformer
from advgrpo.policy.fused.attention import choose_attention
from advgrpo.policy.fused.lora import LoraWeights
from advgrpo.policy.fused.transformer import FusedTransformer, TransformerConfig, can_adapt
from advgrpo_kernels import _cpu, _runtime, gelu
from advgrpo_kernels.ops import linear as linear_op
from tests.parts import some_weekly

TARGETS = tuple(
    f".attn.{name}"
    for name in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
)
MODELS = {
    "sd35-medium": {"dual_attention_layers": (0, 1), "qk_norm": "rms_norm"},
    "sd35-large": {"dual_attention_layers": (), "qk_norm": "rms_norm"},
    "sd3-medium": {"dual_attention_layers": (), "qk_norm": None},
}
STEP = torch.tensor([1])
large_weekly = pytest.mark.parametrize("kind", some_weekly(["sd35-medium", "sd35-large"], ["sd35-large"]))


def stock_model(kind: str, device="cpu", layers=3) -> SD3Transformer2DModel:
    """The configuration of a family member at reduced width, with weights that all matter."""
    model = SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=16, out_channels=16, num_layers=layers, attention_head_dim=16,
        num_attention_heads=4, joint_attention_dim=32, caption_projection_dim=64, pooled_projection_dim=24,
        pos_embed_max_size=12, **MODELS[kind],
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model.eval().requires_grad_(False).to(device)


def fused(model, *, targets=TARGETS, rank=4, **options) -> FusedTransformer:
    tensors = {name: t.detach() for name, t in [*model.named_parameters(), *model.named_buffers()]}
    ours = FusedTransformer(TransformerConfig.from_stock(model.config), tensors, stock=model, **options)
    ours.adapt(lambda name: name.endswith(targets), rank=rank, alpha=2 * rank, init="gaussian", seed=0)
    return ours


def inputs(rows=4, dtype=torch.float32, device="cpu") -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    shapes = {"latents": (rows, 16, 8, 12), "text": (rows, 5, 32), "pooled": (rows, 24)}
    made = {name: torch.randn(shape, generator=generator).to(device, dtype) for name, shape in shapes.items()}
    return {**made, "timesteps": torch.tensor([900.0, 500.0, 20.0], device=device)}


def run_stock(model, given) -> torch.Tensor:
    return model(
        hidden_states=given["latents"], timestep=given["timesteps"][1].expand(len(given["latents"])),
        encoder_hidden_states=given["text"], pooled_projections=given["pooled"], return_dict=False,
    )[0]  # fmt: skip


def run_ours(ours: FusedTransformer, given, weights="adapted") -> torch.Tensor:
    prepared = ours.prepare(given["text"], given["pooled"], given["timesteps"])
    return ours.predict(given["latents"], STEP.to(ours.device), prepared, weights)


def train(lora: LoraWeights) -> None:
    with torch.no_grad():
        lora.master.add_(0.1 * torch.randn(lora.master.shape, generator=torch.Generator().manual_seed(3)))


def with_peft(model, ours: FusedTransformer, rank=4) -> dict[str, torch.nn.Parameter]:
    """The same adapters by PEFT beside the stock weights; returns them by their plain names."""
    names = [name for adapter in ours.lora.adapters for name in adapter.names]
    model.add_adapter(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names))
    own = {n.replace(".default.", "."): p for n, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, value in ours.lora.state_dict().items():
            own[name].copy_(value)
    return own


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_values_and_lora_gradients_equal_diffusers_with_peft(kind, checkpointing):
    model, given = stock_model(kind), inputs()
    base = run_stock(model, given)
    ours = fused(model, checkpointing=checkpointing)
    assert (run_ours(ours, given, "base") - base).abs().max() <= 1e-5
    train(ours.lora)
    own = with_peft(model, ours)
    expected, found = run_stock(model, given), run_ours(ours, given)
    assert (found - expected).abs().max() <= 1e-5
    assert (found - base).abs().max() > 1e-2
    upstream = torch.randn(base.shape, generator=torch.Generator().manual_seed(4))
    expected.backward(upstream)
    found.backward(upstream)
    gradients = ours.lora.state_dict(ours.lora.master.grad)
    assert gradients.keys() == own.keys()
    for name, gradient in gradients.items():
        scale = own[name].grad.abs().max().item()
        assert scale > 0 or "2.attn.add_q_proj" in name, name  # nothing reads the last block's text queries
        off = (gradient - own[name].grad).abs().max().item()
        assert off <= 1e-5 * scale, f"{name}: off by {off / scale:.1e} of its largest element"


@pytest.mark.parametrize("targets", [(".attn.to_q", ".attn.to_v"), (".attn2.to_k", ".ff.net.2", ".ff.net.0.proj")])
def test_any_subset_of_the_linears_can_be_adapted(targets):
    model, given = stock_model("sd35-medium"), inputs()
    ours = fused(model, targets=targets)
    train(ours.lora)
    own = with_peft(model, ours)
    expected, found = run_stock(model, given), run_ours(ours, given)
    assert (found - expected).abs().max() <= 1e-5
    expected.square().sum().backward()
    found.square().sum().backward()
    for name, gradient in ours.lora.state_dict(ours.lora.master.grad).items():
        off, scale = (gradient - own[name].grad).abs().max().item(), own[name].grad.abs().max().item()
        assert off <= 1e-5 * scale, f"{name}: off by {off / scale:.1e} of its largest element"


@pytest.mark.parametrize("kind", ["sd35-medium", "sd3-medium"])
def test_gradients_and_recomputed_q_and_k_change_no_bit(kind):
    """The likelihood ratio of the first update is exactly 1: the same values with a graph and without."""
    model, given = stock_model(kind), inputs()
    ours, gradients = fused(model), []
    train(ours.lora)
    with torch.no_grad():
        sampled = run_ours(ours, given)
    for ours.recompute_qk in (True, False):
        velocity = run_ours(ours, given)
        assert torch.equal(velocity, sampled)
        gradients.append(torch.autograd.grad(velocity.square().sum(), ours.lora.master)[0])
    assert torch.equal(*gradients)
    assert gradients[0].abs().max() > 0


@pytest.mark.skipif(bool(_cpu.why_not()), reason=_cpu.why_not() or "they are there")
@pytest.mark.parametrize(("rank", "kind"), [(4, "sd35-medium"), (32, "sd3-medium")], ids=["low-rank", "folded"])
def test_products_of_our_own_train_as_pytorch_s_do(rank, kind, monkeypatch):
    """Ours keep a row's bits whatever rows are beside it, and whether there is a graph."""
    ours, given, results, launches = fused(stock_model(kind), rank=rank), inputs(), [], []
    train(ours.lora)
    ours.prepare_merged(fp8=False)
    ours.merge()
    real = linear_op._product
    monkeypatch.setattr(linear_op, "_product", lambda *args: launches.append(1) or real(*args))
    for own in (False, True):
        monkeypatch.setattr(_cpu, "gains_by_products", lambda own=own: own)
        velocity, merged = run_ours(ours, given), run_ours(ours, given, "merged")
        (gradient,) = torch.autograd.grad(velocity.square().sum(), ours.lora.master)
        results.append((velocity, merged, gradient / gradient.abs().max()))
        assert bool(launches) == own
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
    first = {name: value if name == "timesteps" else value[:1] for name, value in given.items()}
    with torch.no_grad():
        assert torch.equal(run_ours(ours, first), velocity[:1])
        assert torch.equal(run_ours(ours, first, "merged"), merged[:1])


def test_q_and_k_are_computed_again_only_where_that_saves_memory(monkeypatch):
    """Of three blocks two attend twice; before the first one's second attention nothing is trained."""
    ours, calls, real = fused(stock_model("sd35-medium")), [], transformer.qk_rms_norm
    train(ours.lora)
    monkeypatch.setattr(transformer, "qk_rms_norm", lambda *args, **options: calls.append(1) or real(*args, **options))
    for recompute, in_backward in ((ours.recompute_qk, 0), (True, 4)):
        ours.recompute_qk = recompute
        velocity = run_ours(ours, inputs())
        assert len(calls) == 5
        torch.autograd.grad(velocity.square().sum(), ours.lora.master)
        assert len(calls) == 5 + in_backward
        calls.clear()


def test_the_kernels_give_what_their_references_give(device, monkeypatch):
    """A CPU runs the references; here the interpreter runs what a GPU would."""
    model, given = stock_model("sd35-medium", device, layers=2), inputs(rows=2, device=device)
    given["latents"] = given["latents"][:, :, :4, :4].contiguous()
    ours, results = fused(model), []
    train(ours.lora)
    ours.prepare_merged(fp8=False)
    ours.merge()
    for backend in ("triton", "torch"):
        monkeypatch.setattr(_runtime, "DEFAULT_BACKEND", backend)
        velocity = run_ours(ours, given)
        (gradient,) = torch.autograd.grad(velocity.square().sum(), ours.lora.master)
        results.append((velocity, run_ours(ours, given, "merged"), gradient / gradient.abs().max()))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("targets", [TARGETS, (".attn.to_q", ".attn.to_v", ".ff.net.2")])
def test_adapters_folded_into_narrow_weights_train_the_same(targets):
    """At rank 32 a width of 64 makes the low-rank products dearer than the folded one (linear.py)."""
    model, given = stock_model("sd35-medium"), inputs()
    ours = fused(model, targets=targets, rank=32)
    folding = {layer.folds(32) for layer in ours.linears() if layer.adapted and layer.weight.shape[1] == 64}
    assert folding == {True}
    train(ours.lora)
    own = with_peft(model, ours, rank=32)
    expected, found = run_stock(model, given), run_ours(ours, given)
    assert (found - expected).abs().max() <= 2e-5
    expected.square().sum().backward()
    found.square().sum().backward()
    for name, gradient in ours.lora.state_dict(ours.lora.master.grad).items():
        off, scale = (gradient - own[name].grad).abs().max().item(), own[name].grad.abs().max().item()
        assert off <= 1e-5 * scale, f"{name}: off by {off / scale:.1e} of its largest element"


@torch.no_grad()
def test_a_folded_weight_is_kept_for_as_long_as_adapters_are_the_same():
    """And is another tensor once they are not: an earlier forward's graph still reads the one before."""
    ours = fused(stock_model("sd35-medium"), rank=32)
    train(ours.lora)
    layer = next(layer for layer in ours.linears() if layer.adapted and layer.folds(32))

    def fold() -> torch.Tensor:
        return layer.folded(*ours.lora.pairs(torch.float32)[layer.adapter_number], ours.lora.scale)

    def anew() -> torch.Tensor:
        return layer._fold(*ours.lora.pairs(torch.float32)[layer.adapter_number], ours.lora.scale)

    first = fold()
    assert fold() is first
    before, own = first.clone(), ours.lora.master.data
    ours.lora.master.add_(0.1)  # as an optimizer does
    assert torch.equal(fold(), anew())
    assert not torch.equal(fold(), first)
    assert torch.equal(first, before)
    ours.lora.master.data = own + 0.1  # as a KL target's weights are lent (training/kl_target.py)
    assert torch.equal(fold(), anew())
    ours.lora.master.data = own
    assert torch.equal(fold(), anew())


def test_rows_of_a_prompt_use_its_text_and_modulation():
    model, given = stock_model("sd35-medium"), inputs(rows=2)
    ours, row = fused(model), torch.tensor([0, 0, 1])
    prepared = ours.prepare(given["text"], given["pooled"], given["timesteps"])
    kept = row[[2, 0]]
    found = ours.predict(given["latents"], STEP, prepared.rows(row).rows(torch.tensor([2, 0])), "base")
    chosen = {**given, "text": given["text"][kept], "pooled": given["pooled"][kept]}
    assert (found - run_stock(model, chosen)).abs().max() <= 1e-5
    assert (found - run_stock(model, given)).abs().max() > 1e-3


def test_merged_weights_follow_the_adapters_in_place_and_never_accumulate():
    model, given = stock_model("sd35-medium"), inputs()
    ours = fused(model)
    base = run_ours(ours, given, "base")
    ours.prepare_merged(fp8=False)
    buffers = [layer.merged.data_ptr() for layer in ours.linears() if layer.merged is not None]
    ours.merge()
    assert torch.equal(run_ours(ours, given, "merged"), base)  # B starts at zero
    train(ours.lora)
    for _ in range(3):
        ours.merge()
    adapted = run_ours(ours, given)
    assert (run_ours(ours, given, "merged") - adapted).abs().max() <= 1e-5
    assert buffers == [layer.merged.data_ptr() for layer in ours.linears() if layer.merged is not None]
    assert torch.equal(run_ours(ours, given, "base"), base)


@large_weekly
@pytest.mark.parametrize(("dtype", "fp8"), [("bfloat16", False), ("bfloat16", True), ("float32", False)])
def test_what_merging_takes_from_a_young_adapter_is_measured(dtype, fp8, kind):
    """In bfloat16 a change below half a unit in the last place vanishes, in e4m3 the base's own rounding is larger."""
    ours = fused(stock_model(kind, layers=3).to(getattr(torch, dtype)))
    ours.prepare_merged(fp8=fp8)
    ours.merge()
    assert ours.merge_error() == 0  # no change yet
    errors = []
    for size in (1e-4, 1e-1):
        with torch.no_grad():
            ours.lora.master.copy_(size**0.5 * torch.randn(ours.lora.master.shape, generator=torch.Generator()))
        ours.merge()
        errors.append(ours.merge_error().item())
    young, grown = errors
    assert grown < young / 20
    assert (young > 0.3) == (dtype == "bfloat16")
    assert (young > 1) == fp8
    assert grown < (0.5 if fp8 else 0.05)


@large_weekly
def test_fp8_sampling_weights_stay_close_and_leave_the_outer_blocks_alone(kind):
    model, given = stock_model(kind, layers=4), inputs()
    ours = fused(model)
    train(ours.lora)
    ours.prepare_merged(fp8=True)
    ours.merge()
    exact, found = run_ours(ours, given), run_ours(ours, given, "merged")
    error = (found - exact).norm() / exact.norm()
    assert 1e-4 < error < 0.05
    assert [layer.merged_fp8 is not None for layer in ours.linears() if layer.names[0].endswith("attn.to_q")] == [
        False, True, True, False,
    ]  # fmt: skip


@large_weekly
def test_fp8_frozen_weights_train_adapters_along_nearly_the_same_gradient(kind):
    model, given = stock_model(kind, layers=4), inputs()
    ours = fused(model)
    train(ours.lora)
    gradients, values = [], []
    for _ in range(2):
        ours.lora.master.grad = None
        values.append(run_ours(ours, given))
        values[-1].square().sum().backward()
        gradients.append(ours.lora.master.grad)
        ours.prepare_fp8_base()
    assert 1e-4 < (values[0] - values[1]).norm() / values[0].norm() < 0.05
    assert 1e-4 < (gradients[0] - gradients[1]).norm() / gradients[0].norm() < 0.1
    with torch.no_grad():
        assert torch.equal(run_ours(ours, given), values[1])  # repeats to the bit


def test_bfloat16_stays_within_twice_the_stock_error():
    """Both against float64; the stock forward in bfloat16 is the budget."""
    model, given = stock_model("sd35-medium"), inputs()
    double = {k: v.double() if k != "timesteps" else v for k, v in given.items()}
    exact = run_stock(model.double(), double)
    half = {k: v.bfloat16() if k != "timesteps" else v for k, v in given.items()}
    model = stock_model("sd35-medium").bfloat16()
    budget = (run_stock(model, half).double() - exact).abs().mean()
    error = (run_ours(fused(model), half, "base").double() - exact).abs().mean()
    assert error <= 2 * budget


def test_the_stock_module_shares_our_memory():
    model, given = stock_model("sd35-medium"), inputs()
    before = run_stock(model, given)
    ours = fused(model)
    assert torch.equal(run_stock(model, given), before)
    for layer in ours.linears():
        own = {model.get_submodule(name).weight.untyped_storage().data_ptr() for name in layer.names}
        assert own == {layer.weight.untyped_storage().data_ptr()}
    norm = model.transformer_blocks[0].norm1.linear.weight
    assert norm.untyped_storage().data_ptr() == model.norm_out.linear.weight.untyped_storage().data_ptr()


def test_lora_files_round_trip_and_a_wrong_one_is_named():
    ours = fused(stock_model("sd35-medium"))
    train(ours.lora)
    other = fused(stock_model("sd35-medium"))
    other.lora.load_state_dict(ours.lora.state_dict(), "here")
    assert torch.equal(other.lora.master, ours.lora.master)
    state = ours.lora.state_dict()
    missing = sorted(state)[0]
    with pytest.raises(UserError, match=f"here: {missing} is missing"):
        other.lora.load_state_dict({k: v for k, v in state.items() if k != missing}, "here")
    with pytest.raises(UserError, match=r"this run has \[8, 64\]"):
        fused(stock_model("sd35-medium"), rank=8).lora.load_state_dict(state, "here")


def test_elements_of_the_vector_are_named():
    lora = fused(stock_model("sd35-medium")).lora
    for name, (a, b) in lora.modules().items():
        for view in (a, b):
            first = view.storage_offset()
            assert lora.name_at(first) == lora.name_at(first + view.numel() - 1) == name


def test_explicit_attention_is_honoured_or_raises():
    with pytest.raises(UserError, match="flash3"):
        choose_attention("flash3", torch.device("cpu"), torch.float32)
    with pytest.raises(UserError, match="want auto or one of"):
        choose_attention("flsh", torch.device("cpu"), torch.float32)
    q, k, v = (torch.randn(2, 3, n, 16) for n in (5, 7, 7))
    found = {name: choose_attention(name, torch.device("cpu"), torch.float32)[1](q, k, v) for name in ("cpu", "math")}
    assert found["math"].shape == (2, 5, 48)
    torch.testing.assert_close(found["cpu"], found["math"])
    assert choose_attention("auto", torch.device("cpu"), torch.float32)[0] == "cpu"


@pytest.fixture
def hopper(monkeypatch):
    """What a Hopper GPU answers, as far as choosing goes; no product is tried."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr("advgrpo.policy.fused.attention._try", lambda *_: None)
    return torch.device("cuda"), torch.bfloat16


PACKAGES = {
    "for another torch": "raise ImportError('undefined symbol: _ZN3c104cuda9SetDeviceEab')",
    "without the function": "",
    "no module at all": None,  # a namespace package, as FlashAttention-4's wheel leaves behind
}


@pytest.mark.parametrize("source", PACKAGES.values(), ids=PACKAGES)
def test_a_broken_attention_package_is_passed_over_aloud_and_refused_by_name(
    source, hopper, tmp_path, monkeypatch, caplog
):
    package = tmp_path / "flash_attn"
    (package / "cute").mkdir(parents=True)
    if source is not None:
        (package / "__init__.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    attention._say_once.cache_clear()
    for _ in range(2):
        assert choose_attention("auto", *hopper)[0] == "cudnn"
    assert [record.message[:44] for record in caplog.records] == ["model.attention = 'auto' passes over flash2:"]
    with pytest.raises(UserError, match=r"model\.attention = 'flash2': the package flash_attn is there but cannot"):
        choose_attention("flash2", *hopper)
    with pytest.raises(UserError, match="the package flash_attn_interface is not installed"):
        choose_attention("flash3", *hopper)
    sys.modules.pop("flash_attn", None)


def test_a_backend_that_fails_its_first_product_is_passed_over(hopper, monkeypatch, caplog):
    def broken(name, attend, device, dtype, *_):
        if name == "cudnn":
            raise attention._Unusable("a product of 64 tokens fails") from RuntimeError("no kernel image")

    monkeypatch.setattr(attention, "_try", broken)
    attention._say_once.cache_clear()
    assert choose_attention("auto", *hopper)[0] == "flash"
    assert "passes over cudnn" in caplog.text


@pytest.mark.parametrize("name", ["cudnn", "efficient"])
def test_sampler_and_update_ask_for_the_same_attention_kernel(name, hopper):
    """With and without a gradient the logarithms of the sums are wanted: another plan could give other bits."""
    _, attend = choose_attention(name, *hopper)
    asked = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "scaled_dot_product" not in func.__name__:
                return func(*args, **(kwargs or {}))
            names = [argument.name for argument in func._schema.arguments]
            asked.append({**dict(zip(names, args)), **(kwargs or {})}["compute_log_sumexp"])
            kinds = [str(one.type) for one in func._schema.returns]
            return tuple(torch.empty_like(args[0]) if kind == "Tensor" else 64 for kind in kinds)

    q, k, v = torch.zeros(3, 1, 2, 64, 64, device="meta")
    with Watch(), torch.no_grad():
        attend(q, k, v)
    with Watch():
        attend(q.requires_grad_(), k, v)
    assert asked == [True, True]


def test_which_targets_can_be_adapted():
    assert all(can_adapt(target.removeprefix(".")) for target in TARGETS)
    assert can_adapt("to_q")
    assert not can_adapt("norm1.linear")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", MODELS)
def test_on_a_gpu_bfloat16_stays_within_twice_the_stock_error(kind):
    model, given = stock_model(kind, "cuda"), inputs(device="cuda")
    double = {k: v.double() if k != "timesteps" else v for k, v in given.items()}
    exact = run_stock(model.double(), double)
    half = {k: v.bfloat16() if k != "timesteps" else v for k, v in given.items()}
    model = stock_model(kind, "cuda").bfloat16()
    budget = (run_stock(model, half).double() - exact).abs().mean()
    for weights in ("base", "adapted"):
        assert (run_ours(fused(model), half, weights).double() - exact).abs().mean() <= 2 * budget


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_the_epilogue_applies_the_tanh_form(dtype):
    """Against float64, within twice the error of the product and GELU one after the other."""
    layer = fused(stock_model("sd35-medium", "cuda").to(dtype)).blocks[0].image.feed_forward[0]
    layer.weight.mul_(4)
    x = torch.randn(96, 4, 64, device="cuda", dtype=dtype)
    exact = torch.nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double())
    exact = torch.nn.functional.gelu(exact, approximate="tanh")
    budget = (gelu(layer.run_merged(x)) - exact).abs().mean()
    assert (layer.run_merged_gelu(x) - exact).abs().mean() <= 2 * budget
