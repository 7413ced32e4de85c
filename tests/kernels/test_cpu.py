"""The CPU's kernels (`_cpu.py`, `cpu/*.cpp`): error budgets, no bit that depends on the batch or on threads, and where
there is no compiler.

Planted bugs that turned this file red: the mean not taken off before the squares; GELU's slope without the 3 of its
cube; the text's tokens normed by the image's weights; neighbours turned where halves are pairs; the first head's table
for all; weights of absent keys left at e^0; a row of keys too few in the gradient of v; the second norm's gradient
dropped; a group's variance of one channel; the stream left out of Philox's key; a broken compiler passed over without a
word; sixteen floats as one vector type on a CPU with registers of eight (27 times slower).
"""

import functools
import logging
import platform
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

import advgrpo_kernels as k
from advgrpo_kernels import _cpu, _runtime
from advgrpo_kernels.testing import assert_error_within_budget, assert_within_budget

try:
    REAL, WHY_NOT = Path(_cpu.library()._name).read_bytes(), ""
except _cpu.CpuKernelsUnavailable as unavailable:
    if _cpu.MODE == "required":  # as in CI, where a skip would hide that none of them is tested
        raise
    WHY_NOT = str(unavailable)
compiled = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT or "they are there")


def laid_out(shape, by_token):
    """[B, T, ...], image after image or token after token."""
    B, T, *rest = shape
    return torch.randn(T, B, *rest).transpose(0, 1) if by_token else torch.randn(shape)


def vectors(count, B, C):
    return list(torch.randn(B, count * C).chunk(count, dim=1))  # strided rows, as AdaLN's linear gives them


@compiled
@pytest.mark.parametrize("width", [8, 96, 513])
@pytest.mark.parametrize("biased", [True, False])
def test_gelu_within_error_budget(width, biased):
    x, bias = 3 * torch.randn(5, 7, width), torch.randn(width) if biased else None
    assert_within_budget(
        lambda x: k.gelu(x, bias, backend="cpu"),
        lambda x, **more: k.gelu_ref(x, bias, **more),
        [x],
        torch.randn_like(x),
    )


@compiled
def test_far_tails_of_gelu():
    x = torch.tensor([-1e30, -1e4, -60.0, -12.0, -5.0, 0.0, 12.0, 60.0, 1e4, float("nan")], requires_grad=True)
    y = k.gelu(x, backend="cpu")
    double = x.detach().double()
    torch.testing.assert_close(
        y.double(), k.gelu_ref(double, compute_dtype=torch.float64), rtol=1e-5, atol=1e-12, equal_nan=True
    )
    (grad,) = torch.autograd.grad(y.nansum(), x)
    assert torch.equal(grad[[1, 2, 7, 8]], torch.tensor([0.0, 0.0, 1.0, 1.0]))


@compiled
@pytest.mark.parametrize("by_token", [True, False])
@pytest.mark.parametrize("shape", [(3, 5, 128), (2, 7, 50), (1, 1, 16)], ids=str)
@pytest.mark.parametrize("sets", [1, 2])
def test_ada_layer_norm_within_error_budget(shape, by_token, sets):
    x, modulation = 3 * laid_out(shape, by_token) + 5, vectors(2 * sets, shape[0], shape[2])
    dy = torch.randn(sets, *shape)

    def ours(x, **more):
        y = k.ada_layer_norm(x, *modulation, backend="cpu")
        return torch.stack(y) if sets > 1 else y[None]

    def ref(x, **more):
        y = k.ada_layer_norm_ref(x, *modulation, **more)
        return torch.stack(y) if sets > 1 else y[None]

    assert_within_budget(ours, ref, [x], dy)


@compiled
@pytest.mark.parametrize("by_token", [True, False])
@pytest.mark.parametrize(("outs", "sets"), [(1, 0), (2, 0), (1, 1), (2, 2)])
def test_gated_residual_within_error_budget(outs, sets, by_token):
    shape = 3, 5, 72
    activations = [laid_out(shape, by_token) for _ in range(1 + outs)]
    given = vectors(outs + 2 * sets, shape[0], shape[2])
    gates, sets_given = given[:outs], given[outs:]

    def call(function, activations, **more):
        residual, out, *out2 = activations
        pairs = dict(zip(("shift", "scale", "shift2", "scale2"), sets_given))
        second = {"out2": out2[0], "gate2": gates[1]} if out2 else {}
        found = function(residual, out, gates[0], **second, **pairs, **more)
        return torch.stack(found) if sets else found

    assert_within_budget(
        lambda *a: call(k.gated_residual, a, backend="cpu"),
        lambda *a, **more: call(k.gated_residual_ref, a, **more),
        activations,
        torch.randn(1 + sets, *shape) if sets else torch.randn(shape),
    )


@compiled
@pytest.mark.parametrize("by_token", [True, False])
@pytest.mark.parametrize("head_dim", [32, 20])
@pytest.mark.parametrize(
    ("pairs", "heads"), [(None, []), *((p, h) for p in ("interleaved", "half") for h in ([], [2]))]
)
@pytest.mark.parametrize("text", [0, 4])
def test_qk_rms_norm_within_error_budget(head_dim, by_token, pairs, heads, text):
    qkv = laid_out((3, 9, 3, 2, head_dim), by_token)
    weights = [torch.randn(head_dim) for _ in range(4)]
    angles, more = torch.randn(*heads, 9, head_dim // 2), {}
    if pairs:
        more |= {"rotary": (angles.cos(), angles.sin()), "rotary_pairs": pairs}
    if text:
        more |= {"txt_weights": weights[2:], "txt_tokens": text}

    def ref(qkv, **wide):
        return torch.stack(k.qk_rms_norm_ref(qkv, weights[:2], **more, **wide))

    assert_within_budget(
        lambda qkv: torch.stack(k.qk_rms_norm(qkv, weights[:2], **more, backend="cpu")),
        ref,
        [qkv],
        torch.randn(3, 3, 2, 9, head_dim),
    )


def in_channels_last(*shape):
    return torch.randn(shape).to(memory_format=torch.channels_last)


@compiled
@pytest.mark.parametrize(("channels", "groups"), [(64, 16), (24, 3), (16, 1)])
@pytest.mark.parametrize("silu", [True, False])
def test_group_norm_within_error_budget(channels, groups, silu):
    """Of pixels that are far from zero and no multiple of a stretch's; weight and bias lie apart in memory."""
    x, (weight, bias) = in_channels_last(2, channels, 9, 17) + 20, torch.randn(channels, 2).unbind(1)
    assert x.is_contiguous(memory_format=torch.channels_last)

    def norm(dtype):
        return k.group_norm_ref(x.to(dtype), groups, weight, bias, silu=silu, compute_dtype=dtype)

    ours = k.group_norm(x, groups, weight, bias, silu=silu, backend="cpu")
    assert ours.stride() == x.stride()
    assert_error_within_budget(ours, norm(torch.float32), norm(torch.float64), name="group_norm")


@compiled
def test_words_of_philox_are_the_reference_s(monkeypatch):
    """Of every part of key and counter, and with ids that lie apart in memory."""
    ids = torch.tensor([[0, 9], [1, 9], [2**32 + 1, 9], [-1, 9], [2**63 - 1, 9]])[:, 0]
    cases = [
        {"seed": seed, "step": step, "stream": stream}
        for seed in (0, 1, -(2**40) - 3, torch.tensor([2**62 + 5]))
        for step, stream in ((0, 0), (7, 0x50415443), (torch.tensor(2**33 - 1), 3))
    ]
    found = [k.philox_words(count, sample_ids=ids, **case) for case in cases for count in (1, 6, 20_000)]
    monkeypatch.setattr(_cpu, "MODE", "off")
    expected = [k.philox_words(count, sample_ids=ids, **case) for case in cases for count in (1, 6, 20_000)]
    assert all(map(torch.equal, found, expected))


@compiled
@pytest.mark.parametrize(
    ("queries", "keys", "head_dim"), [(53, 53, 32), (36, 53, 16), (3, 17, 48), (1, 1, 32), (5, 200, 128)]
)
def test_small_attention_within_error_budget(queries, keys, head_dim):
    q = torch.randn(queries, 2, 3, head_dim).permute(1, 2, 0, 3)  # as qk_rms_norm gives them
    key, v = torch.randn(2, 3, keys, head_dim), torch.randn(2, keys, 3, 2, head_dim)[:, :, :, 1].transpose(1, 2)
    assert_within_budget(
        lambda *a: k.small_attention(*a, backend="cpu"),
        k.small_attention_ref,
        [q, key, v],
        torch.randn(2, 3, queries, head_dim),
        slack=3.0,  # a sum over a head dim, one product after the other: the library's is a tree of some
    )
    out = k.small_attention(q, key, v, backend="cpu").transpose(1, 2)
    assert queries == 1 or out.stride(0) < out.stride(1), "images and tokens lie as q's do"


@compiled
def test_scores_far_apart_weigh_as_they_should():
    """A key ahead of the others by 100 and more has all the weight, whichever it is."""
    q = torch.full((1, 1, 1, 16), 10.0)
    key = torch.eye(16)[None, None, :, :].repeat(1, 1, 2, 1)[:, :, :20] * torch.arange(1.0, 21.0)[:, None]
    v = torch.randn(1, 1, 20, 16)
    out = k.small_attention(q, key, v, scale=2.0, backend="cpu")
    torch.testing.assert_close(out[0, 0, 0], v[0, 0, -1], rtol=1e-6, atol=1e-6)


def every_result(x, qkv, bias, given, weights):
    """Results of all ops on [B, T, C] and [B, T, 3, H, D], and the gradients of their sum of squares."""
    x, qkv = x.detach().requires_grad_(), qkv.detach().requires_grad_()
    q, key, v = k.qk_rms_norm(qkv, weights[:2], txt_weights=weights[2:], txt_tokens=3, backend="cpu")
    results = [
        k.gelu(x, bias, backend="cpu"),
        k.ada_layer_norm(x, *given[:2], backend="cpu"),
        *k.gated_residual(x, x.sin(), given[0], shift=given[1], scale=given[2], backend="cpu"),
        k.small_attention(q, key, v, backend="cpu"),
    ]
    pixels = x.detach().transpose(1, 2)[..., None].contiguous(memory_format=torch.channels_last)
    ones, ids = torch.ones(x.shape[2]), (1e6 * x.detach()[:, 0, 0]).long()
    without_gradient = [
        k.group_norm(pixels, 4, ones, ones, silu=True, backend="cpu"),
        k.philox_words(20_000, seed=0, sample_ids=ids),
    ]
    return [*results, *torch.autograd.grad(sum(r.square().sum() for r in results), (x, qkv)), *without_gradient]


def on_threads(count, *arguments):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        return every_result(*arguments)
    finally:
        torch.set_num_threads(before)


@compiled
@pytest.mark.parametrize("by_token", [True, False])
def test_no_bit_depends_on_the_batch_or_on_the_number_of_threads(by_token):
    """Large enough that two threads share every one of them."""
    B, T, C = 6, 61, 256
    x, qkv = laid_out((B, T, C), by_token), laid_out((B, T, 3, 4, 32), by_token)
    bias, given, weights = torch.randn(C), vectors(3, B, C), [torch.randn(32) for _ in range(4)]
    together = on_threads(1, x, qkv, bias, given, weights)
    for result, threaded in zip(together, on_threads(2, x, qkv, bias, given, weights), strict=True):
        assert torch.equal(result, threaded)
    part = on_threads(1, x[1:4], qkv[1:4], bias, [vector[1:4] for vector in given], weights)
    for result, own in zip(together, part, strict=True):
        assert torch.equal(result[1:4], own)


@compiled
@pytest.mark.weekly
@pytest.mark.skipif(platform.machine() != "x86_64", reason="flags of x86-64's compilers")
@pytest.mark.parametrize("narrower", ["-mno-avx512f", "-mno-avx"])
def test_no_bit_depends_on_how_wide_registers_are(narrower, anew, monkeypatch):
    """But for products that are added in one rounding where the CPU can, and which are is the compiler's choice."""
    arguments = (
        torch.randn(3, 21, 100),
        torch.randn(3, 21, 3, 2, 48),
        torch.randn(100),
        vectors(3, 3, 100),
        [torch.randn(48) for _ in range(4)],
    )
    found = []
    for flags in ((), (narrower,)):
        with monkeypatch.context() as patch:
            patch.setattr(_cpu, "FLAGS", (*_cpu.FLAGS, "-ffp-contract=off", *flags))
            library = functools.cache(_cpu.library)
            patch.setattr(_cpu, "library", library)
            found.append(on_threads(1, *arguments))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@compiled
def test_none_is_slower_than_pytorch():
    """On the tiny world's shapes, interleaved. A gross error of the compiler's alone shows: one was 27 times."""
    B, T, H, D = 32, 52, 4, 32
    q, key, v = torch.randn(3, B, T, H, D).transpose(2, 3)
    hidden, x, bias = torch.randn(B, T, H * D), torch.randn(B, T, 4 * H * D), torch.randn(4 * H * D)
    shift, scale = vectors(2, B, H * D)
    modulated = lambda: F.layer_norm(hidden, (H * D,)) * (1 + scale[:, None]) + shift[:, None]  # noqa: E731
    image, weight = in_channels_last(8, H * D, 24, 24), torch.randn(H * D)
    pairs = {
        "group_norm": (
            lambda: k.group_norm(image, 16, weight, weight, silu=True, backend="cpu"),
            lambda: F.silu(F.group_norm(image, 16, weight, weight), inplace=True),
        ),
        "small_attention": (
            lambda: k.small_attention(q, key, v, backend="cpu"),
            lambda: F.scaled_dot_product_attention(q, key, v),
        ),
        "gelu": (lambda: k.gelu(x, bias, backend="cpu"), lambda: F.gelu(x + bias, approximate="tanh")),
        "ada_layer_norm": (lambda: k.ada_layer_norm(hidden, shift, scale, backend="cpu"), modulated),
    }
    for name, both in pairs.items():
        seconds = [[], []]
        for _ in range(15):
            for taken, call in zip(seconds, both):
                began = time.perf_counter()
                call()
                taken.append(time.perf_counter() - began)
        ours, theirs = map(min, seconds)
        assert ours < 2 * theirs, f"{name}: {ours * 1e6:.0f} us, PyTorch {theirs * 1e6:.0f}"


@compiled
def test_a_gradient_changes_no_bit_of_the_forward():
    """Likelihood ratios of exactly 1 need it."""
    qkv = torch.randn(2, 9, 3, 2, 32)
    weights, found = [torch.randn(32) for _ in range(2)], []
    for tracked in (True, False):
        qkv.requires_grad_(tracked)
        q, key, v = k.qk_rms_norm(qkv, weights, backend="cpu")
        found.append([q, key, k.small_attention(q, key, v, backend="cpu"), k.gelu(qkv, backend="cpu")])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@compiled
def test_exp_is_within_an_ulp_and_a_half():
    """By softmax's weights of two keys, whose larger one is 1: e^x = weight / (1 - weight) in float64."""
    x = torch.linspace(-80, 0, 4001)
    q, key = torch.zeros(4001, 1, 1, 16), torch.zeros(4001, 1, 2, 16)
    q[..., 0], key[:, 0, 1, 0] = 1.0, x
    v = torch.zeros(4001, 1, 2, 16)
    v[:, :, 1] = 1.0
    weight = k.small_attention(q, key, v, scale=1.0, backend="cpu")[:, 0, 0, 0].double()
    expected = x.double().exp() / (1 + x.double().exp())
    assert ((weight / expected - 1).abs().max() / 2**-24).item() < 6  # of exp, a sum, a quotient, a product


@compiled
def test_auto_takes_them_where_they_fit_and_nowhere_else(monkeypatch):
    calls, real = [], _cpu.library()
    assert _cpu.usable()
    monkeypatch.setattr(_cpu, "library", lambda: calls.append(1) or real)
    x = torch.randn(2, 3, 16)

    def ran(call):
        calls.clear()
        call()
        return bool(calls)

    image, weight = in_channels_last(2, 16, 3, 3), torch.randn(16)
    assert ran(lambda: k.gelu(x))
    assert ran(lambda: k.group_norm(image, 4, weight, weight))
    assert not ran(lambda: k.group_norm(image.contiguous(), 4, weight, weight))
    assert ran(lambda: k.philox_words(5, seed=1, sample_ids=torch.arange(3)))
    assert not ran(lambda: k.gelu(x, backend="torch"))
    assert not ran(lambda: k.gelu(x.half()))
    assert not ran(lambda: k.gelu(x.double().float().to("meta")))
    assert not ran(lambda: torch.compile(lambda x: k.gelu(x), backend="aot_eager", fullgraph=True)(x))
    assert not ran(lambda: torch.jit.trace(k.gelu, x, check_trace=False))
    assert not ran(lambda: torch.func.vmap(k.gelu)(x))
    assert not ran(lambda: torch.func.jvp(k.gelu, (x,), (x,)))
    with forward_ad.dual_level():
        assert not ran(lambda: k.gelu(forward_ad.make_dual(x, x)))
    negated = torch.view_as_complex(torch.randn(2, 3, 16, 2)).conj().imag
    assert negated.is_neg()
    assert not ran(lambda: k.gelu(negated))
    with _runtime.reference_only():
        assert not ran(lambda: k.gelu(x))
    monkeypatch.setattr(_cpu, "MODE", "off")
    assert not ran(lambda: k.gelu(x))


@compiled
def test_an_explicit_choice_is_honoured_or_raises():
    x = torch.randn(2, 3, 16)
    with pytest.raises(RuntimeError, match=r"backend='cpu' needs float32 tensors on a CPU"):
        k.gelu(x.half(), backend="cpu")
    with pytest.raises(RuntimeError, match="has no kernel for these arguments"):
        k.gelu(x, quantize=True, backend="cpu")
    with pytest.raises(RuntimeError, match="has no kernel for these arguments"):
        k.group_norm(torch.randn(1, 4, 2, 2), 2, torch.ones(4), torch.ones(4), backend="cpu")
    with pytest.raises(RuntimeError, match="has no gradient for"):
        k.gelu(x, torch.zeros(16, requires_grad=True), backend="cpu")
    q = torch.randn(1, 1, 3, 20)
    with pytest.raises(RuntimeError, match="a head dim that is a multiple of 16"):
        k.small_attention(q, q, q, backend="cpu")
    torch.testing.assert_close(k.small_attention(q, q, q), k.small_attention_ref(q, q, q))
    few = torch.randn(1, 1, 8, 16)
    with pytest.raises(RuntimeError, match="a scale above 0"):
        k.small_attention(few, few, few, scale=-1.0, backend="cpu")
    torch.testing.assert_close(
        k.small_attention(few, few, few, scale=-1.0), k.small_attention_ref(few, few, few, scale=-1.0)
    )
    with pytest.raises(ValueError, match=r"backend must be one of \('auto', 'cpu', 'torch'\)"):
        k.small_attention(q, q, q, backend="triton")
    with pytest.raises(ValueError, match=r"k must be torch.float32"):
        k.small_attention(q, q[..., :16], q)


@pytest.fixture
def anew(monkeypatch, tmp_path):
    """The state of a process that has compiled nothing, with an empty cache."""
    monkeypatch.setattr(_cpu, "library", _cpu.library.__wrapped__)
    monkeypatch.setattr(_cpu, "usable", _cpu.usable.__wrapped__)
    monkeypatch.setenv("ADVGRPO_KERNELS_CACHE", str(tmp_path))
    return tmp_path


def test_without_a_compiler_the_reference_runs_and_that_is_said_once(anew, monkeypatch, caplog):
    monkeypatch.setattr(_cpu, "MODE", "auto")
    monkeypatch.setenv("CXX", "no-such-compiler")
    x = torch.randn(2, 3, 16)
    for _ in range(2):
        assert torch.equal(k.gelu(x), k.gelu_ref(x))
    assert _cpu.why_not() == "they could not be compiled"
    assert caplog.text.count("CXX = 'no-such-compiler' is no program: install one, or set ADVGRPO_KERNELS_CPU=off") == 1
    assert caplog.text.count("The PyTorch references run in place of the CPU's kernels") == 1


def test_where_they_are_required_a_compiler_that_fails_is_an_error(anew, monkeypatch, caplog):
    monkeypatch.setenv("CXX", "false")
    monkeypatch.setattr(_cpu, "MODE", "required")
    with pytest.raises(_cpu.CpuKernelsUnavailable, match="false does not compile the CPU's kernels"):
        k.gelu(torch.randn(2, 3, 16))
    assert list(anew.iterdir()) == []
    monkeypatch.setattr(_cpu, "MODE", "off")
    k.gelu(torch.randn(2, 3, 16))
    assert (_cpu.why_not(), caplog.text) == ("ADVGRPO_KERNELS_CPU = off", "")
    monkeypatch.setattr(_cpu, "MODE", "never")
    with pytest.raises(ValueError, match="ADVGRPO_KERNELS_CPU = 'never': want one of auto, required, off"):
        k.gelu(torch.randn(2, 3, 16))


def test_a_build_without_sources_is_one_without_them(anew, monkeypatch, caplog):
    monkeypatch.setattr(_cpu, "MODE", "auto")
    monkeypatch.setattr(_cpu, "SOURCES", anew / "cpu")
    k.gelu(torch.randn(2, 3, 16))
    assert (_cpu.why_not(), caplog.text) == ("this build came without their sources", "")
    with pytest.raises(_cpu.CpuKernelsUnavailable, match="install the package from its sources"):
        k.gelu(torch.randn(2, 3, 16), backend="cpu")


@compiled
def test_a_library_that_does_not_load_is_compiled_again(anew, monkeypatch):
    """Of another system, say, on a home folder that they share."""
    made = []
    monkeypatch.setattr(_cpu, "_compile", lambda compiler, sources, path: made.append(path) or path.write_bytes(REAL))
    path = anew / f"cpu_{_cpu._key(_cpu._compiler())}.so"
    path.write_bytes(REAL[:100])
    assert _cpu.library()._name == str(path)
    assert _cpu.library()._name == str(path)
    assert made == [path]


def test_the_key_changes_with_what_the_machine_code_depends_on(monkeypatch):
    keys = {_cpu._key(sys.executable)}
    monkeypatch.setattr(_cpu, "_cpu_features", lambda: "another CPU")
    keys.add(_cpu._key(sys.executable))
    monkeypatch.setattr(_cpu, "FLAGS", (*_cpu.FLAGS, "-g"))
    keys.add(_cpu._key(sys.executable))
    assert len(keys) == 3


def test_a_cache_that_cannot_be_written_is_named(monkeypatch):
    monkeypatch.setenv("ADVGRPO_KERNELS_CACHE", "/proc/nowhere")
    with pytest.raises(_cpu.CpuKernelsUnavailable, match="ADVGRPO_KERNELS_CACHE = '/proc/nowhere' cannot be written"):
        _cpu._cache_folder()


def test_unused_results_and_the_logger(caplog):
    """A norm that nothing used gives no gradient of its own; and nothing is said where all is as it should be."""
    if WHY_NOT:
        pytest.skip(WHY_NOT)
    with caplog.at_level(logging.WARNING):
        x, out = (torch.randn(2, 3, 16, requires_grad=True) for _ in range(2))
        gate, shift, scale = vectors(3, 2, 16)
        hidden, _ = k.gated_residual(x, out, gate, shift=shift, scale=scale)
        grads = torch.autograd.grad(hidden.sum(), (x, out))
    torch.testing.assert_close(grads[0], torch.ones_like(x))
    assert_error_within_budget(
        grads[1], gate[:, None].expand_as(out), gate.double()[:, None].expand_as(out), name="out"
    )
    assert caplog.text == ""
