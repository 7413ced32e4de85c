"""Adaptive LayerNorm with one and two modulations.

Planted bugs that turned this file red: variance divided by C + 1; lanes past C not masked; shift of the first
modulation in the second; term of the variance missing in the gradient; gradient of the first result dropped; batch
offset missing; stride of the modulation ignored; scale of the first modulation for a lone second result; trained
modulation accepted; fp8 scales of the second result written over the first's.
"""

import pytest
import torch

from advgrpo_kernels import _runtime, ada_layer_norm, ada_layer_norm_ref
from advgrpo_kernels.ops.ada_layer_norm import _ada_layer_norm_op
from advgrpo_kernels.testing import assert_within_budget

gpu_only = pytest.mark.skipif(not torch.cuda.is_available(), reason="the Triton interpreter truncates bf16 stores")
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=gpu_only)]
SHAPES = [(1, 1, 8), (2, 5, 96), (3, 3, 130)]


def inputs(shape, dtype, device, sets=2):
    B, T, C = shape
    x = torch.randn(B, T, C, device=device).to(dtype).requires_grad_()
    return x, [torch.randn(B, C, device=device).to(dtype) for _ in range(2 * sets)]


def joined(function, vectors, **settings):
    """One tensor of all results, as assert_within_budget wants it; the gradient of each result differs."""

    def of_x(x, **more):
        results = function(x, *vectors, **settings, **more)
        return torch.cat(results, dim=1) if isinstance(results, tuple) else results

    return of_x


@pytest.mark.every_second("shape", "dtype", "sets")
@pytest.mark.parametrize("sets", [1, 2])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_and_backward_within_error_budget(shape, dtype, sets, device):
    x, vectors = inputs(shape, dtype, device, sets)
    dy = torch.randn(shape[0], sets * shape[1], shape[2], device=device).to(dtype)
    kernel = joined(ada_layer_norm, vectors, backend="triton")
    assert_within_budget(kernel, joined(ada_layer_norm_ref, vectors), [x], dy)


@pytest.mark.gpu
def test_full_size_within_error_budget():
    x, vectors = inputs((2, 1024, 1536), torch.bfloat16, "cuda")
    dy = torch.randn(2, 2048, 1536, device="cuda").bfloat16()
    kernel = joined(ada_layer_norm, vectors, backend="triton")
    assert_within_budget(kernel, joined(ada_layer_norm_ref, vectors), [x], dy)


def test_equals_the_module_of_diffusers(device):
    normalization = pytest.importorskip("diffusers.models.normalization")
    module = normalization.SD35AdaLayerNormZeroX(32).to(device)
    x, emb = torch.randn(2, 5, 32, device=device), torch.randn(2, 32, device=device)
    with torch.no_grad():
        first, _, _, _, _, second, _ = module(x, emb=emb)
        shift, scale, _, _, _, _, shift2, scale2, _ = module.linear(module.silu(emb)).chunk(9, dim=1)
        for backend in ("torch", "triton"):
            got = ada_layer_norm(x, shift, scale, shift2, scale2, backend=backend)  # vectors are strided views
            torch.testing.assert_close(got, (first, second), rtol=1e-5, atol=2e-6)


def test_large_mean_does_not_cancel(device):
    """A one-pass variance, E[x²] - mean², would lose all digits here."""
    x, vectors = inputs((1, 2, 64), torch.float32, device, 1)
    x = x.detach() + 1000
    expected = ada_layer_norm_ref(x.double(), *vectors, compute_dtype=torch.float64)
    got = ada_layer_norm(x, *vectors, backend="triton")
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-3)


def test_views_and_mixed_dtypes(device):
    x, (shift, scale, shift2, scale2) = inputs((2, 6, 16), torch.float32, device)
    emb = torch.stack([shift, scale], dim=1).half().flatten(1)
    emb2 = torch.stack([shift2, scale2], dim=2)
    args = (x.mT.contiguous().mT, *emb.chunk(2, dim=1), *emb2.unbind(2))
    got, expected = (ada_layer_norm(*args, backend=backend) for backend in ("triton", "torch"))
    torch.testing.assert_close(got, expected)
    grads = [torch.autograd.grad(y[0].sum() - y[1].square().sum(), x)[0] for y in (got, expected)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("used", [0, 1])
def test_gradient_when_only_one_result_is_used(used, device):
    x, vectors = inputs((2, 3, 16), torch.float32, device)
    results = (ada_layer_norm(x, *vectors, backend=backend)[used] for backend in ("triton", "torch"))
    torch.testing.assert_close(*(torch.autograd.grad(y.sin().sum(), x)[0] for y in results))


def test_opcheck(device):
    x, (shift, scale, shift2, scale2) = inputs((2, 3, 16), torch.float32, device)
    torch.library.opcheck(_ada_layer_norm_op, (x, [shift], [scale], 1e-6))
    torch.library.opcheck(_ada_layer_norm_op, (x, [shift, shift2], [scale, scale2], 1e-6))


def test_compiles_without_graph_break(device):
    x, vectors = inputs((2, 3, 16), torch.float32, device)

    def loss(x, *vectors):
        y, y2 = ada_layer_norm(x, *vectors, backend="triton")
        return (y.sin() * y2).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got, expected = (torch.autograd.grad(function(x, *vectors), x)[0] for function in (compiled, loss))
    torch.testing.assert_close(got, expected)


def test_result_does_not_depend_on_the_rest_of_the_batch(device):
    x, vectors = inputs((4, 5, 32), torch.float32, device)
    whole = ada_layer_norm(x, *vectors, backend="triton")
    part = ada_layer_norm(x[1:3, 1:4], *(v[1:3] for v in vectors), backend="triton")
    assert torch.equal(whole[0][1:3, 1:4], part[0])
    assert torch.equal(whole[1][1:3, 1:4], part[1])


def test_quantised_scales_are_those_of_the_unrounded_result(device):
    """The e4m3 values themselves are judged on a GPU, test_fp8.py: the interpreter's conversion is wrong."""
    x, vectors = inputs((2, 3, 48), torch.float16, device)
    for got, y in zip(
        ada_layer_norm(x, *vectors, quantize=True, backend="triton"),
        ada_layer_norm_ref(x.detach().float(), *vectors),
    ):
        assert got.data.dtype == torch.float8_e4m3fn
        torch.testing.assert_close(got.scale, y.abs().amax(-1, keepdim=True) / 448, rtol=1e-5, atol=0)


def test_bad_arguments_raise(device):
    x, (shift, scale, shift2, _) = inputs((2, 3, 4), torch.float32, device)
    with pytest.raises(ValueError, match=r"scale must be floating point \[2, 4\]"):
        ada_layer_norm(x, shift, scale[:1])
    with pytest.raises(ValueError, match="give shift2 and scale2 together"):
        ada_layer_norm(x, shift, scale, shift2)
    with pytest.raises(ValueError, match=r"want floating point \[B, T, C\]"):
        ada_layer_norm(x[0], shift, scale)
    with pytest.raises(ValueError, match="backend must be"):
        ada_layer_norm(x, shift, scale, backend="cuda")


def test_a_trained_modulation_is_never_left_without_gradient(device):
    x, (shift, scale) = inputs((1, 2, 4), torch.float32, device, 1)
    shift.requires_grad_()
    with pytest.raises(RuntimeError, match="has no gradient for"):
        ada_layer_norm(x, shift, scale, backend="triton")
    ada_layer_norm(x, shift, scale).sum().backward()
    torch.testing.assert_close(shift.grad, torch.full_like(shift, 2.0))
    with torch.no_grad():
        ada_layer_norm(x, shift, scale, backend="triton")


def test_explicit_backend_never_falls_back(monkeypatch):
    monkeypatch.setattr(_runtime, "INTERPRET", False)
    x, vectors = inputs((1, 2, 4), torch.float32, "cpu", 1)
    with pytest.raises(RuntimeError, match="needs triton"):
        ada_layer_norm(x, *vectors, backend="triton")
    torch.testing.assert_close(ada_layer_norm(x, *vectors), ada_layer_norm_ref(x, *vectors))
