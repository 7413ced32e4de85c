"""The bias + tanh-GELU epilogue.

Planted bugs that turned this file red: square instead of cube; derivative of the cube without its 3; bias left out;
second tile of columns never written; 0/0 at x = 0; the slope's cube not bounded on the left; NaN taken for the bound.
"""

import pytest
import torch

from advgrpo_kernels import _runtime, gelu, gelu_ref
from advgrpo_kernels.ops.gelu import _gelu_op
from advgrpo_kernels.testing import assert_within_budget

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # 1/(1 + inf) = 0 is meant
gpu_only = pytest.mark.skipif(not torch.cuda.is_available(), reason="the Triton interpreter truncates bf16 stores")
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=gpu_only)]
SHAPES = [(1, 8), (2, 5, 96), (3, 1, 1030)]  # the last has two ragged column tiles


def inputs(shape, dtype, device):
    return (3 * torch.randn(shape, device=device)).to(dtype).requires_grad_(), torch.randn(shape[-1], device=device)


@pytest.mark.every_second("shape", "dtype", "biased")
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_and_backward_within_error_budget(shape, dtype, biased, device):
    x, bias = inputs(shape, dtype, device)
    bias = bias.to(dtype) if biased else None
    dy = torch.randn(shape, device=device).to(dtype)
    assert_within_budget(
        lambda x: gelu(x, bias, backend="triton"), lambda x, **more: gelu_ref(x, bias, **more), [x], dy
    )


@pytest.mark.gpu
def test_full_size_within_error_budget():
    x, bias = inputs((2, 1024, 6144), torch.bfloat16, "cuda")
    dy = torch.randn(x.shape, device="cuda").bfloat16()
    assert_within_budget(
        lambda x: gelu(x, bias, backend="triton"), lambda x, **more: gelu_ref(x, bias, **more), [x], dy
    )


def test_far_tails_are_finite_and_keep_their_sign(device):
    """z passes 80 at x = 12, where exp overflows in float32; x³ times float32's least number is not 0 from 1e12."""
    far = [-1e30, -1e13, -1e12, -1e4, -60.0, -12.0, -5.0, 0.0, 12.0, 60.0, 1e4, 1e12]
    x = torch.tensor(far, device=device, requires_grad=True)
    y = gelu(x, backend="triton")
    (grad,) = torch.autograd.grad(y.sum(), x)
    double = x.detach().double().requires_grad_()
    expected = gelu_ref(double, compute_dtype=torch.float64)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-12)
    torch.testing.assert_close(grad.double(), torch.autograd.grad(expected.sum(), double)[0], rtol=1e-4, atol=1e-6)


def test_what_is_not_a_number_has_no_gradient_of_zero(device):
    x = torch.tensor([float("nan"), 1.0], device=device, requires_grad=True)
    y = gelu(x, backend="triton")
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert y.isnan().tolist() == grad.isnan().tolist() == [True, False]


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_equals_the_module_of_diffusers(backend, device):
    module = pytest.importorskip("diffusers.models.activations").GELU(16, 32, approximate="tanh").to(device)
    x = torch.randn(2, 5, 16, device=device)
    with torch.no_grad():
        got = gelu(x @ module.proj.weight.T, module.proj.bias, backend=backend)
        torch.testing.assert_close(got, module(x), rtol=1e-5, atol=1e-6)


def test_views_and_mixed_dtypes(device):
    x, bias = inputs((6, 4, 32), torch.float16, device)
    view = x.transpose(0, 1)[:, ::2]
    got, expected = (gelu(view, bias, backend=backend) for backend in ("triton", "torch"))
    torch.testing.assert_close(got, expected)
    grads = [torch.autograd.grad(y.float().square().sum(), x)[0] for y in (got, expected)]
    torch.testing.assert_close(*grads)


def test_opcheck(device):
    x, bias = inputs((2, 3, 16), torch.float32, device)
    torch.library.opcheck(_gelu_op, (x, bias))
    torch.library.opcheck(_gelu_op, (x, None))


def test_compiles_without_graph_break(device):
    x, bias = inputs((2, 3, 16), torch.float32, device)
    compiled = torch.compile(lambda x: gelu(x, bias, backend="triton").sin(), fullgraph=True, backend="aot_eager")
    expected = gelu(x, bias, backend="triton").sin()
    torch.testing.assert_close(compiled(x), expected)
    torch.testing.assert_close(*(torch.autograd.grad(y.sum(), x)[0] for y in (compiled(x), expected)))


def test_result_does_not_depend_on_the_rest_of_the_batch(device):
    x, bias = inputs((4, 6, 32), torch.float32, device)
    assert torch.equal(gelu(x, bias, backend="triton")[1:3, 2:], gelu(x[1:3, 2:], bias, backend="triton"))


def test_quantised_scales_are_those_of_the_unrounded_result(device):
    x, bias = inputs((3, 5, 40), torch.float16, device)
    got = gelu(x, bias, quantize=True, backend="triton")
    y = gelu_ref(x.detach().float(), bias)
    assert got.data.dtype == torch.float8_e4m3fn
    torch.testing.assert_close(got.scale, y.abs().amax(-1, keepdim=True) / 448, rtol=1e-6, atol=0)


def test_bad_arguments_raise(device):
    x, bias = inputs((2, 3, 16), torch.float32, device)
    with pytest.raises(ValueError, match=r"bias must be floating point \[16\]"):
        gelu(x, bias[:1])
    with pytest.raises(ValueError, match="x must be floating point"):
        gelu(x.long(), bias)
    with pytest.raises(RuntimeError, match="has no gradient for"):
        gelu(x, bias.requires_grad_(), backend="triton")


def test_explicit_backend_never_falls_back(monkeypatch):
    monkeypatch.setattr(_runtime, "INTERPRET", False)
    x, bias = inputs((2, 4), torch.float32, "cpu")
    with pytest.raises(RuntimeError, match="needs triton"):
        gelu(x, bias, backend="triton")
    torch.testing.assert_close(gelu(x, bias), gelu_ref(x, bias))
