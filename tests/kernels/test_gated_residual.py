"""The gated residual, alone and fused with the next adaptive LayerNorm.

Planted bugs that turned this file red: norm of the unrounded residual; first gate on the second result, and in its
gradient; gate of image 0 for all; gradient through the norm dropped; gradient of h itself dropped; residual gradient
doubled without a norm; rows of another memory order; outs read in their own order; fp8 scales in the order of images.
"""

import pytest
import torch

from advgrpo_kernels import _runtime, ada_layer_norm, gated_residual, gated_residual_ref
from advgrpo_kernels.ops.gated_residual import _gated_residual_op
from advgrpo_kernels.testing import assert_within_budget

gpu_only = pytest.mark.skipif(not torch.cuda.is_available(), reason="the Triton interpreter truncates bf16 stores")
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=gpu_only)]
SHAPES = [(1, 1, 8), (2, 5, 96), (3, 3, 130)]
VECTORS = ("gate", "gate2", "shift", "scale", "shift2", "scale2")


def inputs(shape, dtype, device, outs=2, sets=2):
    """([residual, outs..], frozen vectors by name)."""
    B, T, C = shape
    activations = [torch.randn(B, T, C, device=device).to(dtype).requires_grad_() for _ in range(1 + outs)]
    names = VECTORS[:outs] + VECTORS[2 : 2 + 2 * sets]
    return activations, {name: torch.randn(B, C, device=device).to(dtype) for name in names}


def call(function, vectors, **settings):
    """function(residual, out, out2) returning all results in one tensor."""

    def of_activations(residual, *outs, **more):
        gates = [vectors["gate"], *([vectors["gate2"]] if "gate2" in vectors else [])]
        pairs = [tensor for pair in zip(outs, gates) for tensor in pair]
        norms = {name: vectors[name] for name in VECTORS[2:] if name in vectors}
        results = function(residual, *pairs, **norms, **settings, **more)
        return torch.cat(results, dim=1) if isinstance(results, tuple) else results

    return of_activations


@pytest.mark.every_second("shape", "dtype", "outs")
@pytest.mark.parametrize(("outs", "sets"), [(1, 0), (2, 0), (1, 1), (2, 1), (1, 2)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_and_backward_within_error_budget(shape, dtype, outs, sets, device):
    activations, vectors = inputs(shape, dtype, device, outs, sets)
    dy = torch.randn(shape[0], (1 + sets) * shape[1], shape[2], device=device).to(dtype)
    kernel = call(gated_residual, vectors, backend="triton")
    assert_within_budget(kernel, call(gated_residual_ref, vectors), activations, dy)


@pytest.mark.gpu
def test_full_size_within_error_budget():
    activations, vectors = inputs((2, 1024, 1536), torch.bfloat16, "cuda")
    dy = torch.randn(2, 3 * 1024, 1536, device="cuda").bfloat16()
    kernel = call(gated_residual, vectors, backend="triton")
    assert_within_budget(kernel, call(gated_residual_ref, vectors), activations, dy)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_memory_order_changes_no_bit_and_is_kept(backend, device):
    """A transposed [T, B, C], as a model that keeps its tokens first hands over, with outs in either order."""
    activations, v = inputs((3, 5, 48), torch.float32, device)
    norm = {name: v[name] for name in VECTORS[2:]}

    def of(residual, out, out2):
        results = gated_residual(residual, out, v["gate"], out2, v["gate2"], **norm, backend=backend)
        grads = torch.autograd.grad(sum((r * (i + 1)).square().sum() for i, r in enumerate(results)), activations)
        return [*results, *grads], gated_residual(residual, out, v["gate"], **norm, quantize=True, backend=backend)

    x, out, out2 = activations
    expected, quantised = of(x, out, out2)
    token_first = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in (x, out)]
    found, found_quantised = of(*token_first, out2)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert all(t.transpose(0, 1).is_contiguous() for t in found[:3])
    for got, want in zip(found_quantised[1:], quantised[1:], strict=True):
        assert torch.equal(got.data.float(), want.data.float())
        assert torch.equal(got.scale, want.scale)
        assert got.data.transpose(0, 1).is_contiguous()
        assert got.scale.transpose(0, 1).is_contiguous() or backend == "torch"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_fusing_the_norm_changes_no_bit(dtype, device):
    (x, out, out2), v = inputs((2, 5, 96), dtype, device)
    norm = {name: v[name] for name in VECTORS[2:]}
    hidden, y, y2 = gated_residual(x, out, v["gate"], out2, v["gate2"], **norm, backend="triton")
    assert torch.equal(hidden, gated_residual(x, out, v["gate"], out2, v["gate2"], backend="triton"))
    apart = ada_layer_norm(hidden, **norm, backend="triton")
    assert torch.equal(y, apart[0])
    assert torch.equal(y2, apart[1])


def test_equals_a_block_of_diffusers(device):
    """The residual path of JointTransformerBlock, its two attentions and feed-forward replaced by given tensors."""
    attention = pytest.importorskip("diffusers.models.attention")
    block = attention.JointTransformerBlock(32, 2, 16, qk_norm="rms_norm", use_dual_attention=True).to(device)
    x, txt, temb = (torch.randn(2, n, 32, device=device) for n in (5, 3, 1))
    out, out2, ff = torch.randn(3, 2, 5, 32, device=device).unbind()
    seen = {}

    class Given(torch.nn.Module):
        def __init__(self, name, result):
            super().__init__()
            self.name, self.result = name, result

        def forward(self, *args, hidden_states=None, **_):
            seen[self.name] = args[0] if args else hidden_states
            return self.result

    block.attn, block.attn2, block.ff = Given("attn", (out, txt)), Given("attn2", out2), Given("ff", ff)
    with torch.no_grad():
        _, expected = block(x, txt, temb[:, 0])
        vectors = block.norm1.linear(block.norm1.silu(temb[:, 0])).chunk(9, dim=1)
        _, _, gate, shift_mlp, scale_mlp, gate_mlp, _, _, gate2 = vectors
        hidden, y = gated_residual(x, out, gate, out2, gate2, shift=shift_mlp, scale=scale_mlp, backend="triton")
        got = gated_residual(hidden, ff, gate_mlp, backend="triton")
    torch.testing.assert_close(y, seen["ff"], rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=2e-6)


def test_views_and_mixed_dtypes(device):
    (x, out, out2), v = inputs((2, 6, 16), torch.float32, device)
    emb = torch.cat([v["gate"], v["gate2"]], dim=1).half()
    joint = torch.cat([out, out2], dim=1).half()  # outs as slices of one attention result
    results = []
    for backend in ("triton", "torch"):
        gate, gate2 = emb.chunk(2, dim=1)
        norm = {name: v[name] for name in VECTORS[2:]}
        loss = sum(
            (tensor * weight).sum()
            for weight, tensor in enumerate(
                gated_residual(x, joint[:, :6], gate, joint[:, 6:], gate2, **norm, backend=backend), 1
            )
        )
        results.append((loss, *torch.autograd.grad(loss, (x, out, out2))))
    torch.testing.assert_close(results[0], results[1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("used", [(0,), (1,), (0, 2), (1, 2)], ids=str)
def test_gradient_when_only_some_results_are_used(used, device):
    (x, out), v = inputs((2, 3, 16), torch.float32, device, 1, 2)
    norm, grads = {name: v[name] for name in VECTORS[2:]}, []
    for backend in ("triton", "torch"):
        results = gated_residual(x, out, v["gate"], **norm, backend=backend)
        grads.append(torch.autograd.grad(sum(results[i].sin().sum() * (i + 1) for i in used), (x, out)))
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("outs", "sets"), [pytest.param(1, 0, marks=pytest.mark.weekly), (2, 2)])
def test_opcheck(outs, sets, device):
    (x, *results), v = inputs((2, 3, 16), torch.float32, device, outs, sets)
    gates, shifts, scales = ([v[n] for n in names if n in v] for names in (VECTORS[:2], VECTORS[2::2], VECTORS[3::2]))
    for residual in (x, x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()):
        torch.library.opcheck(_gated_residual_op, (residual, results, gates, shifts, scales, 1e-6))


def test_compiles_without_graph_break(device):
    activations, vectors = inputs((2, 3, 16), torch.float32, device)
    function = call(gated_residual, vectors, backend="triton")
    compiled = torch.compile(lambda *a: function(*a).sin().sum(), fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(*activations), activations)
    torch.testing.assert_close(got, torch.autograd.grad(function(*activations).sin().sum(), activations))


def test_result_does_not_depend_on_the_rest_of_the_batch(device):
    activations, vectors = inputs((4, 5, 32), torch.float32, device)
    whole = call(gated_residual, vectors, backend="triton")(*activations).unflatten(1, (3, 5))
    part_vectors = {name: vector[1:3] for name, vector in vectors.items()}
    part = call(gated_residual, part_vectors, backend="triton")(*(a[1:3, 1:4] for a in activations))
    assert torch.equal(whole[1:3, :, 1:4], part.unflatten(1, (3, 3)))


def test_quantised_norm_has_the_residual_and_scales_of_the_plain_one(device):
    (x, out), v = inputs((2, 3, 48), torch.float32, device, 1, 2)
    args, norm = (x, out, v["gate"]), {name: v[name] for name in VECTORS[2:]}
    hidden, *quantised = gated_residual(*args, **norm, quantize=True, backend="triton")
    plain, *ys = gated_residual(*args, **norm, backend="triton")
    assert torch.equal(hidden, plain)
    for got, y in zip(quantised, ys, strict=True):
        torch.testing.assert_close(got.scale, y.abs().amax(-1, keepdim=True) / 448, rtol=1e-6, atol=0)


def test_bad_arguments_raise(device):
    (x, out, out2), v = inputs((2, 3, 4), torch.float32, device)
    gate, gate2 = v["gate"], v["gate2"]
    with pytest.raises(ValueError, match=r"out must be floating point \[2, 3, 4\]"):
        gated_residual(x, out[:, :2], gate)
    with pytest.raises(ValueError, match=r"gate must be floating point \[2, 4\]"):
        gated_residual(x, out, gate[:1])
    with pytest.raises(ValueError, match="give out2 and gate2 together"):
        gated_residual(x, out, gate, out2)
    with pytest.raises(ValueError, match=r"out2 must be torch.float32 as out"):
        gated_residual(x, out, gate, out2.half(), gate2)
    with pytest.raises(ValueError, match="quantize needs shift and scale"):
        gated_residual(x, out, gate, quantize=True)
    with pytest.raises(RuntimeError, match="has no gradient for"):
        gated_residual(x, out, gate.requires_grad_(), backend="triton")


def test_explicit_backend_never_falls_back(monkeypatch):
    monkeypatch.setattr(_runtime, "INTERPRET", False)
    (x, out), v = inputs((1, 2, 4), torch.float32, "cpu", 1, 0)
    with pytest.raises(RuntimeError, match="needs triton"):
        gated_residual(x, out, v["gate"], backend="triton")
    torch.testing.assert_close(gated_residual(x, out, v["gate"]), gated_residual_ref(x, out, v["gate"]))
