"""Counter-based random numbers: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).

A draw is a pure function of (seed, stream, sample id, step, element): no state, so noise does not depend on how a
batch is split, on the number of ranks or on what was drawn before. The Triton kernels use the same mapping:

    key     = (seed low 32 bits, seed high 32 bits XOR stream)
    counter = (element // 4, step, sample id low 32 bits, sample id high 32 bits)
    element e takes word e % 4 of the four 32-bit words of its counter

Normals come from Box-Muller on the word pairs (0, 1) and (2, 3), cosine and sine both used, so no word is wasted:
`u = w·2⁻³² + 2⁻³³` lies in (0, 1], `sqrt(-2 ln u0)·(cos 2πu1, sin 2πu1)`; the tail ends at sqrt(2·33·ln 2) = 6.76 σ.

Integers agree to the bit between backends. Normals are within 1e-6 of the radius of float64's for the same float32 u0:
on a CPU by PyTorch's log, sine and cosine, in the kernels by polynomials of arguments that need no reduction, since u1
comes as an integer. The library's sine and cosine would range-reduce what is in range: 79 instructions an element of a
whole step without log-prob, now 51, 19 of them the step's own (`tests/kernels/ahead_of_time/budgets.json`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from .. import _cpu, _runtime
from .._runtime import HAS_TRITON, check_tensors
from ._cpu_layers import address, integers

__all__ = ["NOISE_STREAM", "PATCH_STREAM", "philox_integers", "philox_normal", "philox_permutation", "philox_words"]

# Streams separate draws of different purpose under one run seed.
NOISE_STREAM = 0
PATCH_STREAM = 0x50415443

MULTIPLIER_0, MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
WEYL_0, WEYL_1 = 0x9E3779B9, 0xBB67AE85
ROUNDS = 10
_MASK = 0xFFFFFFFF

if HAS_TRITON:
    import triton
    import triton.language as tl

    _ROUNDS: tl.constexpr = tl.constexpr(ROUNDS)
    _MULTIPLIER_0: tl.constexpr = tl.constexpr(MULTIPLIER_0)
    _MULTIPLIER_1: tl.constexpr = tl.constexpr(MULTIPLIER_1)
    _WEYL_0: tl.constexpr = tl.constexpr(WEYL_0)
    _WEYL_1: tl.constexpr = tl.constexpr(WEYL_1)

    @triton.jit
    def philox_block(seed, stream, block, step, sample_id):
        """Four uint32 words for each entry of `block` (int32 tensor); the counter and key of the module docstring.

        `tl.philox` takes both halves of a product from two multiplications, 20 more per block than here.
        """
        zero = (block * 0).to(tl.uint32)
        c0, c1 = block.to(tl.uint32), zero + _low_word(step.to(tl.int64))
        c2, c3 = zero + _low_word(sample_id), zero + _low_word(sample_id >> 32)
        k0, k1 = _low_word(seed.to(tl.int64)), _low_word(seed.to(tl.int64) >> 32) ^ stream
        for _ in tl.static_range(_ROUNDS):
            product_0, product_1 = c0.to(tl.uint64) * _MULTIPLIER_0, c2.to(tl.uint64) * _MULTIPLIER_1
            c0 = (product_1 >> 32).to(tl.uint32) ^ c1 ^ k0
            c2 = (product_0 >> 32).to(tl.uint32) ^ c3 ^ k1
            c1, c3 = product_1.to(tl.uint32), product_0.to(tl.uint32)
            k0, k1 = k0 + _WEYL_0, k1 + _WEYL_1
        return c0, c1, c2, c3

    @triton.jit
    def _low_word(value):
        return (value & 0xFFFFFFFF).to(tl.uint32)

    @triton.jit
    def interleave4(w0, w1, w2, w3):
        """[w0[0], w1[0], w2[0], w3[0], w0[1], ...]."""
        pairs = tl.join(tl.join(w0, w2), tl.join(w1, w3))
        return tl.reshape(pairs, (4 * w0.shape[0],))

    @triton.jit
    def minus_two_log(u):
        """-2 ln u of a normal float32 in (0, 1]: u = 2^k·(1 + f) with 1 + f in [2/3, 4/3).

        Minimax polynomial of ln(1 + f)/f, to 1.7e-7 of it: next to 1, where the result is small, too.
        """
        bits = u.to(tl.int32, bitcast=True)
        exponent = (bits - 0x3F2AAAAB) & -0x800000  # k·2²³; 0x3F2AAAAB is 2/3
        f = (bits - exponent).to(tl.float32, bitcast=True) - 1.0
        p = tl.fma(f, 0.30731383, -0.34222364)
        p = tl.fma(f, p, 0.32840174)
        p = tl.fma(f, p, -0.39590076)
        p = tl.fma(f, p, 0.50015241)
        p = tl.fma(f, p, -0.66675979)
        p = tl.fma(f, p, 0.99999875)
        p = tl.fma(f, p, -1.99999964)
        return tl.fma(exponent.to(tl.float32), -1.6525916589735634e-07, f * p)  # -2 ln 2·2⁻²³

    @triton.jit
    def scaled_half_turn(r):
        """√2·(sin πr, cos πr) for |r| <= 1/2, by minimax polynomials: to 5e-9 and 7e-8 before rounding."""
        z = r * r
        sine = tl.fma(z, 0.10920575, -0.84576362)
        sine = tl.fma(z, sine, 3.6062889)
        sine = tl.fma(z, sine, -7.3082414)
        sine = tl.fma(z, sine, 4.442883)
        cosine = tl.fma(z, 0.31069848, -1.88356316)
        cosine = tl.fma(z, cosine, 5.73946142)
        cosine = tl.fma(z, cosine, -6.97885084)
        cosine = tl.fma(z, cosine, 1.41421354)
        return r * sine, cosine

    @triton.jit
    def box_muller(w0, w1):
        """Two standard normals from two uint32 words.

        cos 2πr = 1 - 2 sin² πr and sin 2πr = 2 sin πr·cos πr, with r = u1 or u1 - 1, the word as a signed integer: no
        quadrants.
        """
        u0 = w0.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10
        radius = tl.sqrt(minus_two_log(u0))
        r = w1.to(tl.int32, bitcast=True).to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10
        sine, cosine = scaled_half_turn(r)
        chord = radius * sine
        return tl.fma(-chord, sine, radius), chord * cosine

    @triton.jit
    def normal_block(seed, step, sample_id, first, COUNT: tl.constexpr):
        """Normals of elements first .. first + COUNT - 1 (first and COUNT multiples of 4), float32 [COUNT]."""
        block = first // 4 + tl.arange(0, COUNT // 4)
        w0, w1, w2, w3 = philox_block(seed, 0, block, step, sample_id)
        z0, z1 = box_muller(w0, w1)
        z2, z3 = box_muller(w2, w3)
        return interleave4(z0, z1, z2, z3)


def philox_normal(
    shape: Sequence[int],
    *,
    seed: int | torch.Tensor,
    sample_ids: torch.Tensor,
    step: int | torch.Tensor = 0,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """Standard normal noise, float32 of `shape` = [B, ...]; row i depends only on (seed, sample_ids[i], step).

    Args:
        shape: sizes including the batch B = len(sample_ids).
        seed: any integer, taken modulo 2⁶⁴, or an int64 tensor of one element.
        sample_ids: int64 [B], e.g. the global index of each image in the iteration.
        step: integer modulo 2³² or a tensor of one element, e.g. the sampler's step.
        device: where the noise is made; default is the device of `sample_ids`.
    """
    check_tensors(sample_ids=sample_ids)
    shape = tuple(shape)
    if not shape or shape[0] != sample_ids.numel():
        raise ValueError(f"shape {shape} must begin with the number of sample_ids, {sample_ids.numel()}")
    sample_ids = sample_ids.to(device or sample_ids.device)
    count = math.prod(shape[1:])
    words = philox_words(count, seed=seed, sample_ids=sample_ids, step=step, stream=NOISE_STREAM)
    uniform = words.to(torch.float32) * 2.0**-32 + 2.0**-33
    u0, u1 = uniform.unflatten(-1, (-1, 2)).unbind(-1)
    radius, angle = torch.sqrt(-2.0 * torch.log(u0)), (2.0 * math.pi) * u1
    normal = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1)
    return normal.flatten(1)[:, :count].reshape(shape)


def philox_permutation(
    population: int,
    count: int,
    *,
    seed: int | torch.Tensor,
    sample_ids: torch.Tensor,
    step: int | torch.Tensor = 0,
    stream: int = PATCH_STREAM,
) -> torch.Tensor:
    """`count` of range(population) without replacement, in random order, per row: int64 [B, count].

    Element j gets the 32-bit word of its counter as a sort key; the `count` smallest keys are taken in order of the
    key, equal keys in order of j. Every ordered subset is equally likely.
    """
    keys = philox_words(population, seed=seed, sample_ids=sample_ids, step=step, stream=stream)[:, :population]
    return torch.argsort(keys, dim=1, stable=True)[:, :count]


def philox_integers(
    population: int,
    count: int,
    *,
    seed: int | torch.Tensor,
    sample_ids: torch.Tensor,
    step: int | torch.Tensor = 0,
    stream: int = PATCH_STREAM,
) -> torch.Tensor:
    """`count` of range(population) with replacement, per row: int64 [B, count].

    floor(word · population / 2³²): two numbers differ in probability by less than population / 2³² of it.
    """
    words = philox_words(count, seed=seed, sample_ids=sample_ids, step=step, stream=stream)[:, :count]
    return (words * population) >> 32


def philox_words(
    count: int,
    *,
    seed: int | torch.Tensor,
    sample_ids: torch.Tensor,
    step: int | torch.Tensor = 0,
    stream: int = NOISE_STREAM,
) -> torch.Tensor:
    """Random 32-bit words as int64 in [0, 2³²): [B, 4·ceil(count/4)], the mapping of the module docstring."""
    check_tensors(sample_ids=sample_ids)
    if sample_ids.dim() != 1 or sample_ids.dtype != torch.int64:
        raise ValueError(f"sample_ids must be int64 [B], got {sample_ids.dtype} {tuple(sample_ids.shape)}")
    device = sample_ids.device
    seed, step, stream = as_int64(seed, device), as_int64(step, device), stream & _MASK
    if _runtime.DEFAULT_BACKEND == "auto" and _cpu.takes(sample_ids, seed, step, dtype=torch.int64):
        return _words_on_cpu((count + 3) // 4, int(seed), sample_ids.contiguous(), int(step), stream)
    block = torch.arange((count + 3) // 4, dtype=torch.int64, device=device).expand(len(sample_ids), -1)
    ids = sample_ids[:, None]
    counter = (block, (step & _MASK).expand_as(block), ids & _MASK, (ids >> 32) & _MASK)
    key = (seed & _MASK, ((seed >> 32) & _MASK) ^ stream)
    return torch.stack(_rounds(counter, key), dim=-1).flatten(1)


def _words_on_cpu(blocks: int, seed: int, sample_ids: torch.Tensor, step: int, stream: int) -> torch.Tensor:
    """The same in one pass, where PyTorch's operators take some two hundred."""
    words = sample_ids.new_empty(len(sample_ids), 4 * blocks)
    draw = integers(len(sample_ids), blocks, seed, step, stream)
    _cpu.library().advgrpo_philox_words(address(sample_ids), address(words), draw, torch.get_num_threads())
    return words


def as_int64(value: int | torch.Tensor, device: torch.device) -> torch.Tensor:
    """A 0-d int64 tensor holding `value` modulo 2⁶⁴; tensors of one element are taken as they are."""
    if isinstance(value, torch.Tensor):
        if value.numel() != 1 or value.is_floating_point():
            raise ValueError(f"seed and step tensors must hold one integer, got {value.dtype} {tuple(value.shape)}")
        return value.reshape(()).to(device=device, dtype=torch.int64)
    return torch.full((), wrap_int64(value), dtype=torch.int64, device=device)


def split_integer(value: int | torch.Tensor | None) -> tuple[torch.Tensor | None, int]:
    """(tensor, 0) or (None, integer): how a custom op takes a number that may live in device memory."""
    if isinstance(value, torch.Tensor):
        return as_int64(value, value.device), 0
    return None, wrap_int64(value or 0)


def wrap_int64(value: int) -> int:
    """`value` modulo 2⁶⁴ in the signed range that an int64 can hold."""
    return ((int(value) + 2**63) % 2**64) - 2**63


def _rounds(counter: tuple[torch.Tensor, ...], key: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Ten Philox rounds on 32-bit values held in int64; products wrap modulo 2⁶⁴, which keeps all their bits."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        product_0, product_1 = c0 * MULTIPLIER_0, c2 * MULTIPLIER_1
        c0 = ((product_1 >> 32) & _MASK) ^ c1 ^ k0
        c2 = ((product_0 >> 32) & _MASK) ^ c3 ^ k1
        c1, c3 = product_1 & _MASK, product_0 & _MASK
        k0, k1 = (k0 + WEYL_0) & _MASK, (k1 + WEYL_1) & _MASK
    return c0, c1, c2, c3
