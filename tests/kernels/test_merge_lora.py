"""Merging LoRA over a list of linears: PyTorch, and the CUDA source run on the CPU and on a GPU.

`cuda_on_cpu/` runs the blocks and threads of csrc/merge_lora.cu as they are written; only the machine code differs.

Planted bugs that turned this file red: scale ignored, also by the reference; ranks past 32 left out; right half of
the columns one lane off; first block of a linear ignored; third of the last odd columns of A not read; row maximum of
one lane only; barrier before the next factors missing; 128-bit reads of unaligned rows (crash); ragged last rows
without a block; the first linear's scale for all, in the table and by the reference; scales or the rank not in the
table's key.
"""

import pytest
import torch

from advgrpo_kernels import Fp8Tensor, merge_lora, merge_lora_ref
from advgrpo_kernels.ops import _csrc
from advgrpo_kernels.ops.merge_lora import _merge_lora_op
from tests.kernels.csrc_builds import cpu_build

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(32, 256, 32), (1, 8, 1), (70, 300, 5), (33, 25, 40)]  # N, K, r: one whole tile; ragged; unaligned rows


@pytest.fixture
def library(monkeypatch, device):
    """The compiled library for the tensors at hand."""
    if device == "cpu":
        monkeypatch.setenv("ADVGRPO_KERNELS_LIBRARY", str(cpu_build()))
    _csrc.library.cache_clear()
    if _csrc.library() is None:
        pytest.skip("built without ADVGRPO_BUILD_CUDA=1")
    yield
    _csrc.library.cache_clear()


def linears(shapes, dtype, device):
    """(bases, a, b, outs, fp8), the outputs filled with NaN."""
    bases = [torch.randn(N, K, device=device).to(dtype) for N, K, _ in shapes]
    a = [torch.randn(r, K, device=device) for _, K, r in shapes]
    b = [torch.randn(N, r, device=device) / r for N, _, r in shapes]
    outs = [torch.full_like(base, float("nan")) for base in bases]
    data = [torch.full(base.shape, float("nan"), device=device).to(torch.float8_e4m3fn) for base in bases]
    return bases, a, b, outs, [Fp8Tensor(d, torch.full((len(d), 1), float("nan"), device=device)) for d in data]


def run_library(bases, a, b, scale, outs=(), fp8=()):
    data, scales = [t.data for t in fp8], [t.scale for t in fp8]
    _merge_lora_op(bases, a, b, [scale] * len(bases), list(outs), data, scales, True)


def gold(bases, a, b, scale):
    return [w.double() + scale * (b_.double() @ a_.double()) for w, a_, b_ in zip(bases, a, b)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_library_is_within_the_error_budget(dtype, device, library):
    bases, a, b, outs, fp8 = linears(SHAPES, dtype, device)
    run_library(bases, a, b, 0.7, outs, fp8)
    eager = [torch.empty_like(out) for out in outs]
    merge_lora_ref(bases, a, b, 0.7, outs=eager)
    for got, reference, true in zip(outs, eager, gold(bases, a, b, 0.7)):
        budget = 2 * (reference.double() - true).abs().max() + 1e-6 * true.abs().max()
        assert (got.double() - true).abs().max() <= budget
    for got, true in zip(fp8, gold(bases, a, b, 0.7)):
        torch.testing.assert_close(got.scale.double(), true.abs().amax(1, keepdim=True) / 448, rtol=1e-5, atol=0)
        half_ulp = 2**-4 * true.abs() * 1.0001 + got.scale * (2**-10 + 1e-4)
        assert ((got.dequantize().double() - true).abs() <= half_ulp).all()


@pytest.mark.parametrize("wanted", ["outs", "fp8"])
def test_either_output_alone_has_the_bits_of_both(wanted, device, library):
    bases, a, b, outs, fp8 = linears(SHAPES, torch.bfloat16, device)
    run_library(bases, a, b, 0.7, outs, fp8)
    *_, outs_alone, fp8_alone = linears(SHAPES, torch.bfloat16, device)
    run_library(bases, a, b, 0.7, **{wanted: outs_alone if wanted == "outs" else fp8_alone})
    pairs = zip(outs, outs_alone) if wanted == "outs" else zip(sum(fp8, ()), sum(fp8_alone, ()))
    assert all(torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in pairs)


def test_a_linear_does_not_depend_on_the_others(device, library):
    bases, a, b, outs, _ = linears(SHAPES, torch.float32, device)
    run_library(bases, a, b, 0.7, outs)
    for i in range(len(SHAPES)):
        alone = torch.full_like(outs[i], float("nan"))
        run_library(bases[i : i + 1], a[i : i + 1], b[i : i + 1], 0.7, [alone])
        assert torch.equal(alone, outs[i])


def test_every_linear_has_its_scale(device, library):
    """As adapters with `alpha_pattern` have. Of the bits of one scale for all, in one launch."""
    bases, a, b, outs, _ = linears(SHAPES, torch.float32, device)
    scale, eager = [0.7, 2.0, -1.0, 0.25], [torch.empty_like(out) for out in outs]
    merge_lora(bases, a, b, scale, outs=eager, backend="torch")
    _merge_lora_op(bases, a, b, scale, outs, [], [], True)
    for i, reference in enumerate(eager):
        alone = torch.full_like(outs[i], float("nan"))
        run_library(bases[i : i + 1], a[i : i + 1], b[i : i + 1], scale[i], [alone])
        assert torch.equal(outs[i], alone)
        torch.testing.assert_close(outs[i], reference, rtol=1e-5, atol=1e-5)
    run_library(bases, a, b, 0.7, outs)  # the same tensors with other scales
    assert not torch.equal(outs[1], eager[1])


def test_merging_again_starts_from_the_base_and_sees_new_adapters(device, library):
    """Same storage, so the table is not rebuilt: values must be read at launch."""
    bases, a, b, outs, _ = linears(SHAPES, torch.float32, device)
    pristine = [base.clone() for base in bases]
    run_library(bases, a, b, 0.7, outs)
    first = [out.clone() for out in outs]
    b[2].mul_(2)
    run_library(bases, a, b, 0.7, outs)
    assert all(torch.equal(base, before) for base, before in zip(bases, pristine))
    assert torch.equal(outs[0], first[0])
    torch.testing.assert_close(outs[2] - bases[2], 2 * (first[2] - bases[2]), rtol=1e-4, atol=1e-4)


def test_another_rank_at_the_same_addresses_has_a_table_of_its_own(device, library):
    """A smaller adapter may be given the storage that a larger one has left."""
    (base,), (a,), (b,), (out,), _ = linears([(32, 64, 8)], torch.float32, device)
    for rank in (8, 3):
        smaller = b.flatten()[: 32 * rank].view(32, rank)
        assert (a[:rank].data_ptr(), smaller.data_ptr()) == (a.data_ptr(), b.data_ptr())
        run_library([base], [a[:rank]], [smaller], 0.7, [out])
        torch.testing.assert_close(out, base + 0.7 * smaller @ a[:rank], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reference_is_what_the_trainer_computes(dtype):
    bases, a, b, outs, fp8 = linears(SHAPES, dtype, "cpu")
    merge_lora(bases, a, b, 2.0, outs=outs, fp8=fp8)
    for base, a_, b_, out, quantised in zip(bases, a, b, outs, fp8):
        merged = torch.addmm(base.float(), b_, a_, alpha=2.0)
        assert torch.equal(out, merged.to(dtype))
        torch.testing.assert_close(quantised.dequantize(), merged, rtol=0.07, atol=1e-2)


def test_zero_adapters_give_the_base_bit_for_bit(device, library):
    bases, a, b, outs, _ = linears(SHAPES, torch.bfloat16, device)
    zeros = [torch.zeros_like(b_) for b_ in b]
    run_library(bases, a, zeros, 2.0, outs)
    assert all(torch.equal(out, base) for out, base in zip(outs, bases))


def test_opcheck_and_compile(device):
    bases, a, b, outs, fp8 = linears([(4, 16, 2)] * 2, torch.float32, device)
    data, scales = [t.data for t in fp8], [t.scale for t in fp8]
    torch.library.opcheck(_merge_lora_op, (bases, a, b, [0.5, 0.5], outs, [], [], False))
    # Of the fp8 lists only the shapes: opcheck's comparison of results has no arithmetic on e4m3.
    torch.library.opcheck(
        _merge_lora_op, (bases, a, b, [0.5, 0.5], outs, data, scales, False), test_utils="test_faketensor"
    )

    def merged(*b):
        merge_lora(bases, a, b, [0.5, 0.5], outs=outs, backend="torch")
        return outs[0] + outs[1]

    got = torch.compile(merged, fullgraph=True, backend="aot_eager")(*b)
    torch.testing.assert_close(got, merged(*b))


@pytest.mark.gpu
def test_full_size_on_a_gpu():
    shapes = [(1536, 1536, 32)] * 12
    bases, a, b, outs, fp8 = linears(shapes, torch.bfloat16, "cuda")
    eager = [torch.empty_like(out) for out in outs]
    merge_lora(bases, a, b, 2.0, outs=outs, fp8=fp8, backend="cuda")
    merge_lora(bases, a, b, 2.0, outs=eager, backend="torch")
    for got, reference, true in zip(outs, eager, gold(bases, a, b, 2.0)):
        assert (got.double() - true).abs().max() <= 2 * (reference.double() - true).abs().max()
    graph = torch.cuda.CUDAGraph()
    expected = [out.clone() for out in outs]
    with torch.cuda.graph(graph):
        merge_lora(bases, a, b, 2.0, outs=outs, fp8=fp8, backend="cuda")
    for out in outs:
        out.zero_()
    graph.replay()
    assert all(torch.equal(out, before) for out, before in zip(outs, expected))


def test_bad_arguments_raise(device):
    bases, a, b, outs, fp8 = linears([(4, 16, 2)] * 2, torch.float32, device)
    with pytest.raises(ValueError, match="want lists of one length"):
        merge_lora(bases, a[:1], b, 1.0, outs=outs)
    with pytest.raises(ValueError, match="want lists of one length, and outs or fp8"):
        merge_lora(bases, a, b, 1.0)
    for bad in ([1.0], [1.0, 2.0, 3.0], [1.0, None], torch.ones(2), "2.0"):
        with pytest.raises(ValueError, match="scale must be a number or a list of 2 numbers, one per linear, got"):
            merge_lora(bases, a, b, bad, outs=outs)
    with pytest.raises(ValueError, match=r"outs\[1\] is the base itself"):
        merge_lora(bases, a, b, 1.0, outs=[outs[0], bases[1]])
    with pytest.raises(ValueError, match=r"b\[0\] must be contiguous torch.float32 \[4, 2\]"):
        merge_lora(bases, a, [b[0].T.contiguous().T, b[1]], 1.0, outs=outs)
    with pytest.raises(ValueError, match=r"fp8 scale\[1\] must be contiguous torch.float32 \[4, 1\]"):
        merge_lora(bases, a, b, 1.0, fp8=[fp8[0], Fp8Tensor(fp8[1].data, fp8[1].scale[:, 0])])
    with pytest.raises(RuntimeError, match="needs CUDA tensors"):
        merge_lora([t.cpu() for t in bases], [t.cpu() for t in a], [t.cpu() for t in b], 1.0,
                   outs=[t.cpu() for t in outs], backend="cuda")  # fmt: skip
