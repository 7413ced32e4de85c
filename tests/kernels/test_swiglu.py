"""SwiGLU between the linears of a gated feed-forward layer.

Planted bugs that turned this file red: see tests/mutants (kernels-swiglu-*); besides, the halves exchanged, rows of x
taken as dense, a second tile of columns that is never written, NaN taken for the bound, the scale of half a row, a
slope without its second term. 1 - s taken from s is not seen: PyTorch does it too, and the budget is by its error.
"""

import pytest
import torch

from advgrpo_kernels import swiglu, swiglu_ref
from advgrpo_kernels.ops.swiglu import _swiglu_backward_op, _swiglu_fp8_op, _swiglu_op
from advgrpo_kernels.testing import assert_within_budget

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # 1/(1 + inf) = 0 is meant
gpu_only = pytest.mark.skipif(not torch.cuda.is_available(), reason="the Triton interpreter truncates bf16 stores")
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=gpu_only)]
SHAPES = [(2,), (2, 5, 192), (3, 1, 2060)]  # the last has two ragged column tiles, and rows that two do not divide


def triton(x):
    return swiglu(x, backend="triton")


def inputs(shape, dtype, device):
    """x, and an upstream gradient."""
    x, dy = 3 * torch.randn(shape, device=device), torch.randn((*shape[:-1], shape[-1] // 2), device=device)
    return x.to(dtype), dy.to(dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_and_backward_within_error_budget(shape, dtype, device):
    x, dy = inputs(shape, dtype, device)
    assert_within_budget(triton, swiglu_ref, [x], dy)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_full_size_within_error_budget(dtype):
    """Of FLUX.2 klein 4B at 1024 px, whose hidden width is 9216."""
    x, dy = inputs((1, 4608, 18432), dtype, "cuda")
    assert_within_budget(triton, swiglu_ref, [x], dy)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_equals_the_module_of_diffusers(backend, device):
    module = pytest.importorskip("diffusers.models.transformers.transformer_flux2").Flux2SwiGLU()
    x = torch.randn(2, 5, 32, device=device)
    torch.testing.assert_close(swiglu(x, backend=backend), module(x), rtol=1e-5, atol=1e-6)


def test_the_other_order_is_that_of_a_linear_with_its_halves_exchanged(device):
    """As the docstring says of diffusers' `SwiGLU`, whose gate is second."""
    other = pytest.importorskip("diffusers.models.activations").SwiGLU(8, 16).to(device)
    x = torch.randn(3, 8, device=device)
    weight, bias = (torch.cat([p[16:], p[:16]]) for p in (other.proj.weight, other.proj.bias))
    torch.testing.assert_close(triton(torch.nn.functional.linear(x, weight, bias)), other(x), rtol=1e-5, atol=1e-6)


def test_reference_passes_gradcheck():
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: swiglu_ref(x, compute_dtype=torch.float64), x)


def test_far_gates_are_finite_and_keep_their_sign(device):
    """exp(-g) overflows float32 from g = -88.8 down."""
    gates = torch.tensor([-1e30, -1e4, -100.0, -89.0, -87.0, -60.0, -12.0, -1.278, 0.0, 12.0, 60.0, 1e4, 1e30])
    x = torch.stack([gates, torch.linspace(-2, 3, len(gates))], dim=1).to(device).requires_grad_()
    y = triton(x)
    (grad,) = torch.autograd.grad(y.sum(), x)
    double = x.detach().double().requires_grad_()
    expected = swiglu_ref(double, compute_dtype=torch.float64)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-12)
    torch.testing.assert_close(grad.double(), torch.autograd.grad(expected.sum(), double)[0], rtol=1e-5, atol=1e-7)


def test_what_is_not_a_number_has_no_gradient_of_zero(device):
    x = torch.tensor([[float("nan"), 1.0], [1.0, float("nan")], [1.0, 1.0]], device=device, requires_grad=True)
    y = triton(x)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert y.isnan().flatten().tolist() == [True, True, False]
    assert grad.isnan().tolist() == [[True, True], [True, False], [False, False]]


@pytest.mark.parametrize(
    "view",
    [
        lambda wide: wide[..., 8:40],  # a part of a wider product, as in FLUX.2's blocks of one stream
        lambda wide: wide.transpose(0, 1)[:, ::2, :32],
        lambda wide: wide[..., ::2],  # elements apart: copied
        lambda wide: wide[:1, :1].expand(2, 3, -1),
    ],
    ids=["part", "transposed", "apart", "expanded"],
)
def test_views(view, device):
    """Of x and of the gradient of y, against the same numbers side by side."""
    x = view(torch.randn(4, 6, 64, device=device)).detach().requires_grad_()
    dense = x.detach().contiguous().requires_grad_()
    upstream = torch.randn(*x.shape[:-1], x.shape[-1], device=device)[..., x.shape[-1] // 2 :]
    y, expected = triton(x), triton(dense)
    assert y.is_contiguous()
    assert torch.equal(y, expected)
    (grad,), (dense_grad,) = torch.autograd.grad(y, x, upstream), torch.autograd.grad(expected, dense, upstream.clone())
    assert torch.equal(grad, dense_grad)
    torch.testing.assert_close(y, swiglu_ref(dense))


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("quantize", [False, True])
def test_of_no_rows(backend, quantize, device):
    x = torch.zeros(2, 0, 8, device=device, requires_grad=not quantize)
    y = swiglu(x, quantize=quantize, backend=backend)
    if quantize:
        assert (y.data.shape, y.scale.shape) == ((2, 0, 4), (2, 0, 1))
        return
    assert y.shape == (2, 0, 4)
    assert torch.autograd.grad(y.sum(), x)[0].shape == x.shape


@pytest.mark.parametrize(
    "x",
    [torch.zeros(3, 7), torch.zeros(3, 0), torch.zeros(()), torch.zeros(3, 8, dtype=torch.int64)],
    ids=["odd", "no columns", "scalar", "integers"],
)
def test_what_has_no_halves_is_refused(x):
    with pytest.raises(ValueError, match=r"x must be floating point \[..., 2F\], got torch\.\w+ \["):
        swiglu(x)


def test_there_is_no_kernel_for_the_cpu():
    x = torch.randn(3, 8)
    with pytest.raises(RuntimeError, match="backend='cpu' has no kernel for these arguments: use backend='torch'"):
        swiglu(x, backend="cpu")
    assert torch.equal(swiglu(x), swiglu_ref(x))


@pytest.mark.parametrize("columns", [8, 2060])
def test_quantised_is_the_unrounded_result_with_the_scales_of_whole_rows(columns, device):
    x = torch.randn(3, columns, device=device).half()
    x[:, -1], x[:, columns // 2 - 1] = -50, 50  # the largest of a row is negative and its last
    got, expected = (swiglu(x, quantize=True, backend=backend) for backend in ("triton", "torch"))
    torch.testing.assert_close(got.scale, expected.scale, rtol=1e-6, atol=0)
    difference = (got.dequantize() - expected.dequantize()).abs()
    # An ulp of e4m3, and of its least normal number. The interpreter loses the carry of a rounding into the exponent.
    ulp = 0.126 if device == "cuda" else 0.51
    assert (difference <= ulp * expected.dequantize().abs() + expected.scale * 2**-6).all()


def test_opcheck(device):
    x, dy = inputs((2, 3, 16), torch.float32, device)
    torch.library.opcheck(_swiglu_op, (x.requires_grad_(),))
    without_gradient = ("test_schema", "test_faketensor")
    torch.library.opcheck(_swiglu_op, (torch.randn(2, 3, 40, device=device)[..., 8:24],), test_utils=without_gradient)
    torch.library.opcheck(_swiglu_backward_op, (dy, x.detach()), test_utils=without_gradient)
    torch.library.opcheck(_swiglu_fp8_op, (x.detach(),), test_utils=without_gradient)


def test_compiles_without_graph_break(device):
    x, _ = inputs((2, 3, 16), torch.float32, device)
    x.requires_grad_()
    compiled = torch.compile(lambda x: triton(x).sin(), fullgraph=True, backend="aot_eager")
    expected = triton(x).sin()
    torch.testing.assert_close(compiled(x), expected)
    torch.testing.assert_close(*(torch.autograd.grad(y.sum(), x)[0] for y in (compiled(x), expected)))


def test_result_does_not_depend_on_the_rest_of_the_batch(device):
    x, _ = inputs((4, 6, 64), torch.float32, device)
    assert torch.equal(triton(x)[1:3, 2:], triton(x[1:3, 2:]))
