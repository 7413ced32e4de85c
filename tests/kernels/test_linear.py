"""`linear` and `matrix_product` (`cpu/product.cpp`): error budgets in every layout, no bit that depends on other rows,
and where `auto` takes them.

Planted bugs that turned this file red: the bias left out of part of a panel, and added first for a lone row; blocks of
depth written over each other; panels packed for the call before; the last of a transposed depth left out; `out` taken
for dense; the weight transposed in the backward, and its gradient's factors exchanged; the bias without a gradient; x
kept that nothing reads; any vendor; no question whether tensors fit.
"""

import functools
import platform
import time

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

import advgrpo_kernels as k
from advgrpo_kernels import _cpu, _runtime
from advgrpo_kernels.testing import assert_error_within_budget, assert_within_budget

try:
    _cpu.library()
    WHY_NOT = ""
except _cpu.CpuKernelsUnavailable as unavailable:
    if _cpu.MODE == "required":
        raise
    WHY_NOT = str(unavailable)
compiled = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT or "they are there")

LAYOUTS = ["dense", "transposed", "sparse"]
# Whole tiles, parts of tiles in every direction, several blocks of depth, and rows beyond a chunk.
SHAPES = [(1, 1, 1), (6, 16, 64), (5, 17, 33), (13, 300, 70), (250, 64, 130), (31, 700, 129)]


def matrix(rows, columns, layout):
    """Of the shape, row by row, column by column, or in a wider and longer one of which it has every second element."""
    if layout == "transposed":
        return torch.randn(columns, rows).t()
    return torch.randn(rows, columns) if layout == "dense" else torch.randn(2 * rows, 2 * columns)[::2, ::2]


@compiled
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("biased", [True, False])
def test_linear_within_error_budget(shape, biased):
    """The gradients of x and of the weight too, the latter a sum over rows."""
    M, K, N = shape
    arguments = [torch.randn(M, K), torch.randn(N, K), *([torch.randn(N)] if biased else [])]
    assert_within_budget(lambda *a: k.linear(*a, backend="cpu"), k.linear_ref, arguments, torch.randn(M, N))


@compiled
@pytest.mark.parametrize("shape", SHAPES[2:], ids=str)
@pytest.mark.parametrize("left", LAYOUTS)
@pytest.mark.parametrize("right", LAYOUTS)
def test_products_of_any_layout_have_the_bits_of_dense_ones(shape, left, right):
    M, K, N = shape
    a, b, bias = matrix(M, K, left), matrix(K, N, right), torch.randn(N)
    found = k.matrix_product(a, b, bias, backend="cpu")
    true = k.matrix_product_ref(a.double(), b.double(), bias.double(), compute_dtype=torch.float64)
    assert_error_within_budget(found, k.matrix_product_ref(a, b, bias), true, name="product")
    assert torch.equal(found, k.matrix_product(a.contiguous(), b.contiguous(), bias, backend="cpu"))
    assert torch.equal(found, k.linear(a, b.t(), bias, backend="cpu"))


@compiled
@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_out_is_written_where_it_lies_and_nothing_beside_it(backend):
    whole = torch.full((20, 100), 7.0)
    a, b, bias = torch.randn(9, 300), torch.randn(300, 70), torch.randn(70)
    out = whole[3:12, 20:90]
    assert k.matrix_product(a, b, bias, out=out, backend=backend) is out
    assert torch.equal(out, k.matrix_product(a, b, bias, backend=backend))
    assert (whole == 7).sum() == 20 * 100 - 9 * 70


def on_threads(count, call):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        return call()
    finally:
        torch.set_num_threads(before)


@compiled
@pytest.mark.parametrize("K", [96, 600])
def test_no_bit_depends_on_other_rows_or_on_the_number_of_threads(K):
    a, b, bias = torch.randn(500, K), torch.randn(K, 150), torch.randn(150)
    multiply = lambda rows: on_threads(1, lambda: k.matrix_product(rows, b, bias, backend="cpu"))  # noqa: E731
    whole = multiply(a)
    for threads in (2, 3):
        assert torch.equal(whole, on_threads(threads, lambda: k.matrix_product(a, b, bias, backend="cpu")))
    for rows in (slice(0, 1), slice(3, 5), slice(7, 20), slice(1, 300), slice(499, 500)):
        assert torch.equal(whole[rows], multiply(a[rows]))
    columns = slice(17, 117)
    assert torch.equal(whole[:, columns], k.matrix_product(a, b[:, columns], bias[columns], backend="cpu"))


@compiled
@pytest.mark.weekly
@pytest.mark.skipif(platform.machine() != "x86_64", reason="flags of x86-64's compilers")
@pytest.mark.parametrize("narrower", ["-mno-avx512f", "-mno-avx"])
def test_no_bit_depends_on_how_wide_registers_are(narrower, monkeypatch, tmp_path):
    """But for products that are added in one rounding where the CPU can."""
    monkeypatch.setenv("ADVGRPO_KERNELS_CACHE", str(tmp_path))
    given = [(matrix(M, K, "dense"), matrix(K, N, way), torch.randn(N)) for M, K, N in SHAPES for way in LAYOUTS]
    found = []
    for flags in ((), (narrower,)):
        with monkeypatch.context() as patch:
            patch.setattr(_cpu, "FLAGS", (*_cpu.FLAGS, "-ffp-contract=off", *flags))
            patch.setattr(_cpu, "library", functools.cache(_cpu.library.__wrapped__))
            found.append([k.matrix_product(*matrices, backend="cpu") for matrices in given])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@compiled
def test_a_weight_that_is_written_to_is_read_anew():
    x, weight = torch.randn(7, 40), torch.randn(30, 40)
    k.linear(x, weight, backend="cpu")
    weight.neg_()
    torch.testing.assert_close(k.linear(x, weight, backend="cpu"), F.linear(x, weight))


@compiled
def test_a_gradient_changes_no_bit_and_only_what_is_asked_for_is_computed():
    x, weight, bias, dy = torch.randn(2, 5, 40), torch.randn(30, 40), torch.randn(30), torch.randn(2, 5, 30)
    plain = k.linear(x, weight, bias, backend="cpu")
    expected = torch.autograd.grad(F.linear(x.requires_grad_(), weight, bias), x, dy)[0]
    y = k.linear(x, weight, bias, backend="cpu")
    assert torch.equal(y, plain)
    assert y.grad_fn.saved_tensors[0] is None  # x, which the weight's gradient alone reads
    torch.testing.assert_close(torch.autograd.grad(y, x, dy)[0], expected)


@pytest.fixture
def gains(monkeypatch):
    monkeypatch.setattr(_cpu, "gains_by_products", lambda: True)


@compiled
def test_auto_takes_it_where_it_fits_and_nowhere_else(gains, monkeypatch):
    calls, real = [], _cpu.library()
    monkeypatch.setattr(_cpu, "MODE", "auto")
    monkeypatch.setattr(_cpu, "usable", lambda: True)
    monkeypatch.setattr(_cpu, "library", lambda: calls.append(1) or real)
    x, weight = torch.randn(3, 16), torch.randn(8, 16)

    def ran(call):
        calls.clear()
        call()
        return bool(calls)

    assert ran(lambda: k.linear(x, weight))
    assert ran(lambda: k.matrix_product(x, weight.t()))
    assert not ran(lambda: k.linear(x, weight, backend="torch"))
    assert not ran(lambda: k.linear(x.half(), weight.half()))
    assert not ran(lambda: k.linear(x.double(), weight.double()))
    assert not ran(lambda: k.linear(x.to("meta"), weight.to("meta")))
    assert not ran(lambda: k.linear(x[:0], weight))
    assert not ran(lambda: torch.jit.trace(k.linear, (x, weight), check_trace=False))
    assert not ran(lambda: torch.func.vmap(k.linear, (0, None))(x[:, None], weight))
    assert not ran(lambda: torch.func.jvp(k.linear, (x, weight), (x, weight)))
    with forward_ad.dual_level():
        assert not ran(lambda: k.linear(forward_ad.make_dual(x, x), weight))
    with _runtime.reference_only():
        assert not ran(lambda: k.linear(x, weight))
    monkeypatch.setattr(_cpu, "MODE", "off")
    assert not ran(lambda: k.linear(x, weight))
    assert not ran(lambda: k.matrix_product(x, weight.t()))
    monkeypatch.setattr(_cpu, "MODE", "auto")
    monkeypatch.setattr(_cpu, "gains_by_products", lambda: False)
    assert not ran(lambda: k.linear(x, weight))


@compiled
@pytest.mark.weekly
def test_a_compiled_graph_has_pytorch_s_product(gains, monkeypatch):
    monkeypatch.setattr(_cpu, "library", lambda: pytest.fail("a graph cannot hold it"))
    x, weight = torch.randn(3, 16), torch.randn(8, 16)
    found = torch.compile(k.linear, backend="aot_eager", fullgraph=True)(x, weight)
    assert torch.equal(found, F.linear(x, weight))


@pytest.mark.parametrize(
    ("maker", "capability", "mkl", "why"),
    [
        (("AuthenticAMD", 26), "AVX512", True, ""),
        (("AuthenticAMD", 27), "AVX512", True, ""),
        (("AuthenticAMD", 25), "AVX512", True, "AMD's family 25 computes AVX-512 in halves, ours gain on 26"),
        (("AuthenticAMD", 26), "AVX2", True, "PyTorch uses no AVX-512 of this CPU (AVX2)"),
        (("GenuineIntel", 26), "AVX512", True, "MKL has kernels of AVX-512 for Intel's CPUs"),
        (
            ("", 0),
            "AVX512",
            True,
            "ours were measured on AMD's CPUs alone, and this one's maker is not told by the system",
        ),
        (("AuthenticAMD", 26), "AVX512", False, "PyTorch's products are not MKL's here"),
    ],
)
def test_facts_alone_decide_where_it_gains(monkeypatch, maker, capability, mkl, why):
    monkeypatch.setattr(_cpu, "_maker", lambda: maker)
    monkeypatch.setattr(_cpu, "why_not", lambda: "")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: mkl)
    assert _cpu.why_no_products().startswith(why)
    assert _cpu.gains_by_products.__wrapped__() == (not why) == (not _cpu.why_no_products())
    monkeypatch.setattr(_cpu, "why_not", lambda: "ADVGRPO_KERNELS_CPU = off")
    assert _cpu.why_no_products() == "ADVGRPO_KERNELS_CPU = off"


@pytest.mark.skipif((platform.system(), platform.machine()) != ("Linux", "x86_64"), reason="as Linux tells it")
def test_the_maker_of_this_cpu_is_known():
    vendor, family = _cpu._maker()
    assert vendor
    assert family > 0


@compiled
def test_an_explicit_choice_is_honoured_or_raises():
    x, weight = torch.randn(3, 16), torch.randn(8, 16)
    with pytest.raises(RuntimeError, match="backend='cpu' needs float32 tensors on a CPU"):
        k.linear(x.half(), weight.half(), backend="cpu")
    with pytest.raises(RuntimeError, match="no kernel for empty matrices"):
        k.linear(x[:0], weight, backend="cpu")
    with pytest.raises(ValueError, match=r"backend must be one of \('auto', 'cpu', 'torch'\), got 'triton'"):
        k.matrix_product(x, weight.t(), backend="triton")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"b": torch.randn(15, 8)}, r"b must be torch.float32 \[16, 8\] on cpu, got torch.float32 \[15, 8\] on cpu"),
        ({"b": torch.randn(16)}, r"b must be torch.float32 \[16, 16\]"),
        ({"a": torch.randn(16)}, r"a must be floating point \[M, K\], got torch.float32 \[16\]"),
        ({"a": torch.ones(3, 16, dtype=torch.int64)}, r"a must be floating point"),
        ({"bias": torch.randn(7)}, r"bias must be torch.float32 \[8\]"),
        ({"bias": torch.randn(8).double()}, r"bias must be torch.float32 \[8\] on cpu, got torch.float64"),
        ({"out": torch.empty(8, 3)}, r"out must be torch.float32 \[3, 8\]"),
        ({"out": torch.empty(8, 3).t()}, r"out must have dense rows that do not overlap, got strides \[1, 3\]"),
    ],
)
def test_matrices_that_do_not_fit_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        k.matrix_product(**{"a": torch.randn(3, 16), "b": torch.randn(16, 8), **change})


def test_linears_that_do_not_fit_are_named():
    x, weight = torch.randn(3, 16), torch.randn(8, 16)
    with pytest.raises(ValueError, match=r"weight must be torch.float32 \[8, 15\]"):
        k.linear(x[:, 1:], weight)
    with pytest.raises(ValueError, match=r"bias must be torch.float32 \[8\]"):
        k.linear(x, weight, torch.randn(9))
    with pytest.raises(ValueError, match=r"x must be floating point \[..., K\]"):
        k.linear(x.long(), weight)
    with pytest.raises(TypeError, match=r"weight must be a torch\.Tensor"):
        k.linear(x, 3)
    with pytest.raises(RuntimeError, match="matrix_product has no gradient"):
        k.matrix_product(x.requires_grad_(), weight.t())


@compiled
def test_autocast_chooses_the_dtype_as_it_does_of_pytorchs_products(monkeypatch):
    monkeypatch.setattr(_cpu, "gains_by_products", lambda: True)
    x, weight = torch.randn(8, 16), torch.randn(4, 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert k.linear(x, weight).dtype == F.linear(x, weight).dtype == torch.bfloat16
        assert k.matrix_product(x, weight.t()).dtype == torch.bfloat16
        assert k.linear(x.bfloat16(), weight).dtype == torch.bfloat16  # which the checks refuse


@compiled
def test_what_a_backward_needs_cannot_be_overwritten_unseen():
    x, weight = torch.randn(8, 16, requires_grad=True), torch.randn(4, 16)
    out = torch.zeros(8, 4)
    loss = (x[:, :4] * out).sum()
    k.matrix_product(x.detach(), weight.t(), out=out, backend="cpu")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@compiled
def test_a_gradient_that_is_a_view_of_negated_values_keeps_its_sign():
    x, weight = torch.randn(8, 16, requires_grad=True), torch.randn(4, 16, requires_grad=True)
    gradient = torch._neg_view(torch.randn(8, 4))
    assert gradient.is_neg()
    ours = torch.autograd.grad(k.linear(x, weight, backend="cpu"), (x, weight), gradient)
    theirs = torch.autograd.grad(F.linear(x, weight), (x, weight), gradient)
    torch.testing.assert_close(ours, theirs)
    with pytest.raises(RuntimeError, match="call resolve_neg"):
        torch.autograd.grad(k.gelu(x, backend="cpu"), x, torch._neg_view(torch.randn(8, 16)))


def test_rows_of_out_that_overlap_are_refused():
    a, b = torch.randn(3, 4), torch.randn(4, 5)
    with pytest.raises(ValueError, match="dense rows that do not overlap"):
        k.matrix_product(a, b, out=torch.zeros(20).as_strided((3, 5), (4, 1)))


@pytest.mark.weekly
@compiled
@pytest.mark.skipif(bool(_cpu.why_no_products()), reason=_cpu.why_no_products() or "it gains here")
@pytest.mark.parametrize("form", ["forward", "of inputs", "of weights"])
def test_where_auto_takes_it_it_is_not_the_slower_one(form):
    """At the tiny world's shapes, interleaved; 2.2 times on a Zen 5 with units of full width, a laptop's have half."""
    x, weight, dy = torch.randn(576, 128), torch.randn(384, 128), torch.randn(576, 384)
    a, b = {"forward": (x, weight.t()), "of inputs": (dy, weight), "of weights": (dy.t(), x)}[form]
    seconds = {"cpu": [], "torch": []}
    for _ in range(30):
        for backend, taken in seconds.items():
            began = time.thread_time()
            k.matrix_product(a, b, backend=backend)
            taken.append(time.thread_time() - began)
    assert min(seconds["cpu"]) < 1.1 * min(seconds["torch"])
