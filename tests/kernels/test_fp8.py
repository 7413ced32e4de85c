"""e4m3 quantisation and the linear layer on it.

In the interpreter only scales are judged: its conversion to e4m3 is wrong. The values are judged on the PyTorch
reference everywhere, and on the kernels under `-m gpu`.

Planted bugs that turned this file red: half of the range; no floor under amax; a floor of 1e-12; maximum of the signed
value; ragged last tile not seen; scale of the first output row for all; bias left out of the product.
"""

import pytest
import torch

from advgrpo_kernels import (
    Fp8Tensor,
    _runtime,
    ada_layer_norm,
    fp8_linear,
    fp8_linear_ref,
    fp8_quantize,
    fp8_quantize_ref,
    gelu,
)
from advgrpo_kernels.ops.fp8 import _fp8_quantize_op

GRANULARITIES = ["row", "tensor"]
SHAPES = [(1, 8), (2, 5, 96), (3, 3001)]  # the last is several tiles of rows, and a ragged one of lanes


@pytest.mark.every_second("shape", "dtype", "granularity")
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_scales_have_the_bits_of_the_reference(shape, dtype, granularity, device):
    x = torch.randn(shape, device=device).to(dtype)
    x.view(-1)[-1] = -50  # the largest magnitude is negative and in the last, ragged tile
    got = fp8_quantize(x, granularity=granularity, backend="triton")
    expected = fp8_quantize_ref(x, granularity=granularity)
    assert torch.equal(got.scale, expected.scale)
    assert got.data.shape == expected.data.shape
    assert got.data.dtype == torch.float8_e4m3fn
    amax = x.float().abs().amax(-1, keepdim=True) if granularity == "row" else x.float().abs().amax()
    assert torch.equal(got.scale, amax * (1 / 448))


def test_a_maximum_that_float32_leaves_above_448_is_448(device):
    """By an ulp, for one row in six; e4m3's next number would be 480, which is its NaN."""
    amax = torch.rand(4096, 1, device=device) + 0.5
    above = amax[amax * (448 / amax) > 448]
    assert len(above) > 400
    x = above[:, None] * torch.tensor([1.0, -1.0, 0.25, 0.0], device=device)
    for backend in ("torch", "triton"):
        data = fp8_quantize(x, backend=backend).data.float()
        assert torch.equal(data, torch.tensor([448.0, -448.0, 112.0, 0.0], device=device).expand_as(data))


@pytest.mark.gpu
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_values_have_the_bits_of_the_reference(granularity):
    x = torch.randn(2, 1024, 1536, device="cuda").bfloat16()
    got, expected = (fp8_quantize(x, granularity=granularity, backend=backend) for backend in ("triton", "torch"))
    assert torch.equal(got.data.view(torch.uint8), expected.data.view(torch.uint8))


@pytest.mark.gpu
def test_fused_values_are_within_an_ulp_of_the_references():
    """Norm and GELU differ in the last float32 bit, which may cross a rounding boundary of e4m3 (ulp 2⁻³)."""
    x, shift, scale = torch.randn(2, 256, 1536, device="cuda").bfloat16(), *torch.randn(2, 2, 1536, device="cuda")
    for got, expected in (
        [ada_layer_norm(x, shift, scale, quantize=True, backend=backend) for backend in ("triton", "torch")],
        [gelu(x, scale[0], quantize=True, backend=backend) for backend in ("triton", "torch")],
    ):
        difference = (got.dequantize() - expected.dequantize()).abs()
        assert (difference <= 0.126 * expected.dequantize().abs() + expected.scale * 2**-9).all()
        assert (difference > 1e-5 * expected.dequantize().abs()).float().mean() < 1e-3


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_reference_is_within_half_an_ulp(granularity):
    x = torch.randn(16, 64) * torch.logspace(-3, 3, 16)[:, None]
    got = fp8_quantize_ref(x, granularity=granularity)
    error = (got.dequantize() - x).abs()
    assert (error <= 2**-4 * x.abs() * 1.0001 + got.scale * 2**-10).all()
    assert got.data.float().abs().max() == 448


def test_zero_rows_and_given_scales(device):
    x = torch.zeros(2, 32, device=device)
    x[1, 3] = 900.0
    for backend in ("triton", "torch"):
        rows = fp8_quantize(x, backend=backend)
        assert rows.scale[0].item() == pytest.approx(1e-30 / 448)
        assert torch.count_nonzero(rows.data[0].float()) == 0
        one = torch.tensor(1.5, device=device)
        static = fp8_quantize(x, granularity="tensor", scale=one, backend=backend)
        assert static.scale == one
    assert static.data[1, 3].float() == 448  # 600 saturates
    assert fp8_quantize_ref(x * -1, granularity="tensor", scale=one).data[1, 3].float() == -448


@pytest.mark.parametrize("size", [1e-8, 1e-15, 1e-20, 1e-26])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_small_gradients_keep_their_relative_precision(granularity, size, device):
    """Gradients of an image's mean over 65,536 elements, through a frozen e4m3 layer, are this small."""
    x = torch.randn(4, 64, device=device) * size
    got, kernel = (fp8_quantize(x, granularity=granularity, backend=backend) for backend in ("torch", "triton"))
    assert got.data.float().abs().max() == 448
    assert (got.dequantize() - x).double().norm() < 0.05 * x.double().norm()
    assert torch.equal(kernel.scale, got.scale)
    weight = fp8_quantize(torch.eye(64, device=device)[:16], granularity=granularity, backend="torch")
    product = fp8_linear(got, weight, out_dtype=torch.bfloat16)
    assert (product - x[:, :16]).double().norm() < 0.06 * x[:, :16].double().norm()


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("biased", [True, False])
def test_linear_is_the_product_of_the_dequantised(granularity, biased, device):
    x, weight = torch.randn(2, 16, 32, device=device), torch.randn(48, 32, device=device)
    bias = torch.randn(48, device=device).bfloat16() if biased else None
    quantised = fp8_quantize(weight, granularity=granularity, backend="torch")
    got = fp8_linear(x.bfloat16(), quantised, bias, backend="torch")
    inputs = fp8_quantize_ref(x.bfloat16(), granularity=granularity)
    gold = fp8_linear_ref(inputs, quantised, bias, out_dtype=torch.float64, compute_dtype=torch.float64)
    eager = fp8_linear_ref(inputs, quantised, bias)
    assert got.dtype == torch.bfloat16
    # The library may add the bias after rounding the product: one more rounding, hence the floor of one ulp.
    budget = 2 * (eager.double() - gold).abs().max() + 2**-8 * gold.abs().max()
    assert (got.double() - gold).abs().max() <= budget
    assert torch.equal(got, fp8_linear(inputs, quantised, bias))
    rows = torch.full((3, 16, 48), 7.0, device=device, dtype=torch.bfloat16)  # of a larger tensor
    assert fp8_linear(inputs, quantised, bias, out=rows[1:]).data_ptr() == rows[1:].data_ptr()
    assert torch.equal(rows[1:], got)
    assert rows[0].eq(7).all()
    # And of the product it stands for: e4m3 errors of 2⁻⁴ average out over K.
    exact = torch.nn.functional.linear(x, weight, None if bias is None else bias.float())
    assert (got - exact).norm() < 0.05 * exact.norm()


def test_opcheck_and_compile(device):
    x = torch.randn(3, 32, device=device)
    for args in ((x, True, None), (x, False, None), (x, False, torch.tensor(0.1, device=device))):
        # Not the comparison of results: the interpreter's e4m3 values hold NaN, which equals nothing.
        torch.library.opcheck(_fp8_quantize_op, args, test_utils=("test_schema", "test_faketensor"))
    weight = fp8_quantize(torch.randn(16, 32, device=device), backend="torch")

    def linear(x):
        return fp8_linear(fp8_quantize(x, backend="triton"), weight)

    assert torch.compile(linear, fullgraph=True, backend="aot_eager")(x).shape == (3, 16)


def test_row_does_not_depend_on_the_rest_of_the_batch(device):
    x = torch.randn(4, 5, 48, device=device)
    whole, part = (fp8_quantize(t, backend="triton") for t in (x, x[1:3, 2:]))
    assert torch.equal(whole.scale[1:3, 2:], part.scale)
    assert torch.equal(whole.data.view(torch.uint8)[1:3, 2:], part.data.view(torch.uint8))


def test_bad_arguments_raise(device):
    x, weight = torch.randn(2, 32, device=device), fp8_quantize(torch.randn(16, 32, device=device), backend="torch")
    with pytest.raises(ValueError, match="granularity must be one of"):
        fp8_quantize(x, granularity="block")
    with pytest.raises(ValueError, match="x must be a non-empty"):
        fp8_quantize(x[:0])
    with pytest.raises(ValueError, match="needs granularity='tensor'"):
        fp8_quantize(x, scale=torch.tensor(1.0, device=device))
    with pytest.raises(ValueError, match=r"x must be float8_e4m3fn \[..., 32\]"):
        fp8_linear(x[:, :16], weight)
    with pytest.raises(ValueError, match="multiples of 16"):
        fp8_linear(x, Fp8Tensor(weight.data[:8], weight.scale[:8]))
    with pytest.raises(ValueError, match="wants one scale per row"):
        fp8_linear(fp8_quantize(x, granularity="tensor", backend="torch"), weight)
    with pytest.raises(ValueError, match=r"bias must be floating point \[16\]"):
        fp8_linear(x, weight, x[0])
    wide = torch.empty(2, 32, device=device, dtype=torch.bfloat16)
    for out in (wide[:, :16], wide[:1, :16], wide.float().view(4, 16)[:2]):
        with pytest.raises(ValueError, match=r"out must be contiguous torch.bfloat16 \[2, 16\]"):
            fp8_linear(x, weight, out=out)


def test_explicit_backend_never_falls_back(monkeypatch):
    monkeypatch.setattr(_runtime, "INTERPRET", False)
    with pytest.raises(RuntimeError, match="needs triton"):
        fp8_quantize(torch.randn(2, 4), backend="triton")
