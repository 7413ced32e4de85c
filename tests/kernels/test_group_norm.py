"""GroupNorm with SiLU behind it.

Planted bugs that turned this file red: variance of the channels' means left out; only the first stretches put together;
sums of x less the first pixel; a stretch's mean taken for the image's; the ragged last stretch counted as a full one.
"""

import pytest
import torch

from advgrpo_kernels import _runtime, group_norm, group_norm_ref
from advgrpo_kernels.ops import group_norm as op
from advgrpo_kernels.testing import assert_error_within_budget

gpu_only = pytest.mark.skipif(not torch.cuda.is_available(), reason="the Triton interpreter truncates bf16 stores")
LAYOUTS = [torch.channels_last, torch.contiguous_format]
# Several stretches of pixels with a ragged last one; groups of twelve channels over two tiles of channels.
STRETCHED, WIDE = ((2, 24, 13, 11), 4), ((1, 132, 3, 5), 11)
weekly = pytest.mark.weekly
CASES = [
    *((*STRETCHED, torch.float32, layout, True) for layout in LAYOUTS),
    (*WIDE, torch.float32, torch.channels_last, True),
    pytest.param(*WIDE, torch.float32, torch.contiguous_format, True, marks=weekly),
    pytest.param(*STRETCHED, torch.float32, torch.channels_last, False, marks=weekly),
    pytest.param(*STRETCHED, torch.float16, torch.channels_last, True, marks=weekly),
    *(pytest.param(*STRETCHED, torch.bfloat16, layout, True, marks=gpu_only) for layout in LAYOUTS),
]


def inputs(shape, dtype, layout, device, offset=2.0):
    """Channels of a group differ in mean and spread."""
    B, C, _, _ = shape
    mean, spread = torch.randn(2, B, C, 1, 1, device=device)
    x = (offset + mean + (0.2 + spread.abs()) * torch.randn(shape, device=device)).to(dtype)
    return x.contiguous(memory_format=layout), torch.randn(C, device=device), torch.randn(C, device=device)


@pytest.fixture(autouse=True)
def _short_stretches(monkeypatch):
    """A shape of a few programs has several stretches then, which are added up in several steps."""
    monkeypatch.setattr(op, "TILES", {True: (16, 128), False: (32, 16)})
    monkeypatch.setattr(op, "TILES_PER_STRETCH", 2)
    monkeypatch.setattr(op, "STRETCHES", 2)


def assert_within_budget(x, groups, weight, bias, silu):
    got = group_norm(x, groups, weight, bias, silu=silu, backend="triton")
    eager = group_norm_ref(x, groups, weight, bias, silu=silu)
    true = group_norm_ref(x.double(), groups, weight, bias, silu=silu, compute_dtype=torch.float64)
    assert got.dtype == x.dtype
    assert got.stride() == x.stride()
    assert_error_within_budget(got, eager, true, name="output")


@pytest.mark.parametrize(("shape", "groups", "dtype", "layout", "silu"), CASES)
def test_forward_within_error_budget(shape, groups, dtype, layout, silu, device):
    x, weight, bias = inputs(shape, dtype, layout, device)
    assert_within_budget(x, groups, weight, bias.to(dtype), silu)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_full_size_within_error_budget(layout, monkeypatch):
    monkeypatch.undo()
    for C, side in ((512, 64), (128, 512)):
        x, weight, bias = inputs((2, C, side, side), torch.bfloat16, layout, "cuda")
        assert_within_budget(x, 32, weight, bias, True)


def test_a_far_mean_does_not_cancel(device):
    """A thousand standard deviations from zero; E[x²] - E[x]² in float32 would have no digit left."""
    x, weight, bias = inputs((1, 8, 16, 16), torch.float32, torch.channels_last, device, offset=0.0)
    x = x + 1000.0
    got = group_norm(x, 1, weight, bias, backend="triton")
    true = group_norm_ref(x.double(), 1, weight, bias, compute_dtype=torch.float64)
    assert (got - true).abs().max() < 2e-3  # the rounding of x·scale, of numbers near 1000


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("pixel", [0, 200 * 201 - 1], ids=["first", "last"])
def test_a_pixel_far_from_all_others_costs_no_digits(pixel, layout, device, monkeypatch):
    """300 standard deviations away. Seen red at 1e-2, with sums of x less the first pixel."""
    monkeypatch.setattr(op, "TILES", {True: (4096, 2), False: (4096, 2)})
    x = torch.randn(1, 2, 200, 201, device=device)
    x.view(1, 2, -1)[:, :, pixel] = 300.0
    x, weight, bias = x.contiguous(memory_format=layout), torch.ones(2, device=device), torch.zeros(2, device=device)
    got = group_norm(x, 1, weight, bias, backend="triton")
    true = group_norm_ref(x.double(), 1, weight, bias, compute_dtype=torch.float64)
    assert ((got - true).abs() <= 8 * 2**-24 * (1 + true.abs())).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_reference_is_the_same_with_and_without_gradients(dtype):
    x, weight, bias = inputs((2, 32, 9, 7), dtype, torch.channels_last, "cpu")
    plain = group_norm_ref(x, 8, weight, bias, silu=True)
    trained = group_norm_ref(x.requires_grad_(), 8, weight, bias, silu=True)
    torch.testing.assert_close(plain, trained, rtol=2 * torch.finfo(dtype).eps, atol=2 * torch.finfo(dtype).eps)
    (grad,) = torch.autograd.grad(trained.float().square().sum(), x)
    assert grad.abs().max() > 0


def test_views_are_made_contiguous(device):
    x, weight, bias = inputs((3, 16, 6, 10), torch.float32, torch.channels_last, device)
    view = x[::2, :, :, 1::3]
    got = group_norm(view, 4, weight[::1], bias.flip(0), silu=True, backend="triton")
    assert got.is_contiguous()
    torch.testing.assert_close(got, group_norm_ref(view, 4, weight, bias.flip(0), silu=True), rtol=1e-5, atol=1e-5)


def test_no_images_and_constant_images(device):
    _, weight, bias = inputs((1, 8, 2, 2), torch.float32, torch.contiguous_format, device)
    assert group_norm(torch.empty(0, 8, 2, 2, device=device), 2, weight, bias, backend="triton").shape == (0, 8, 2, 2)
    flat = group_norm(torch.full((1, 8, 5, 4), 3.0, device=device), 2, weight, bias, backend="triton")
    torch.testing.assert_close(flat, bias.view(1, 8, 1, 1).expand(1, 8, 5, 4), rtol=0, atol=1e-2)


def test_result_does_not_depend_on_the_rest_of_the_batch(device):
    x, weight, bias = inputs((3, 16, 5, 8), torch.float32, torch.channels_last, device)
    whole = group_norm(x, 4, weight, bias, silu=True, backend="triton")
    alone = group_norm(x[1:2], 4, weight, bias, silu=True, backend="triton")
    assert torch.equal(whole[1:2], alone)


@pytest.mark.parametrize("layout", [torch.channels_last, pytest.param(torch.contiguous_format, marks=weekly)], ids=str)
def test_opcheck(layout, device):
    x, weight, bias = inputs((1, 4, 3, 2), torch.float32, layout, device)
    torch.library.opcheck(op._group_norm_op, (x, 1, weight, bias, 1e-6, True))


@weekly
def test_compiles_without_graph_break(device):
    x, weight, bias = inputs((2, 8, 4, 3), torch.float32, torch.channels_last, device)
    compiled = torch.compile(
        lambda x: group_norm(x, 2, weight, bias, silu=True, backend="triton").sin(), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(x), group_norm(x, 2, weight, bias, silu=True, backend="triton").sin())


def test_bad_arguments_raise(device):
    x, weight, bias = inputs((2, 8, 4, 3), torch.float32, torch.channels_last, device)
    with pytest.raises(ValueError, match="groups = 3 must divide the 8 channels of x"):
        group_norm(x, 3, weight, bias)
    with pytest.raises(ValueError, match=r"x must be floating point \[B, C, H, W\], got torch.float32 \[8, 4, 3\]"):
        group_norm(x[0], 2, weight, bias)
    with pytest.raises(ValueError, match=r"bias must be floating point \[8\]"):
        group_norm(x, 2, weight, bias[:4])
    with pytest.raises(RuntimeError, match=r"has no gradient for \['x'\]"):
        group_norm(x.requires_grad_(), 2, weight, bias, backend="triton")


def test_explicit_backend_never_falls_back(monkeypatch):
    monkeypatch.setattr(_runtime, "INTERPRET", False)
    x, weight, bias = inputs((1, 4, 2, 2), torch.float32, torch.channels_last, "cpu")
    with pytest.raises(RuntimeError, match="needs triton"):
        group_norm(x, 2, weight, bias, backend="triton")
    torch.testing.assert_close(group_norm(x, 2, weight, bias), group_norm_ref(x, 2, weight, bias))
