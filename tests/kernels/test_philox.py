"""Philox as a generator (known answers) and its normals as a distribution.

Planted bugs that turned this file red: nine rounds instead of ten; sine replaced by cosine; the angle without 2π; the
high half of the sample id dropped; the high half of the seed dropped; in the kernels: a coefficient of the logarithm,
the sine or the cosine off by a millionth; the mantissa cut at 1 instead of 2/3; the angle's word taken as unsigned.
"""

import itertools
import math

import pytest
import torch

from advgrpo_kernels import philox_integers, philox_normal, philox_permutation, philox_words
from advgrpo_kernels._runtime import HAS_TRITON
from advgrpo_kernels.ops.philox import NOISE_STREAM, PATCH_STREAM, _rounds, as_int64

if HAS_TRITON:
    import triton
    import triton.language as tl

    from advgrpo_kernels.ops.philox import box_muller

    @triton.jit
    def _normals_of_words_kernel(words_ptr, normals_ptr, COUNT: tl.constexpr):
        lane = tl.arange(0, COUNT)
        w0 = tl.load(words_ptr + lane).to(tl.uint32)
        w1 = tl.load(words_ptr + COUNT + lane).to(tl.uint32)
        z0, z1 = box_muller(w0, w1)
        tl.store(normals_ptr + lane, z0)
        tl.store(normals_ptr + COUNT + lane, z1)


# Random123's kat_vectors for philox4x32-10: counter, key, result.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def ids(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


def kolmogorov_distance(sample: torch.Tensor) -> float:
    """sup |F_n - Φ| times sqrt(n): above 1.95 with probability 1e-3 for a true normal sample."""
    ordered = sample.double().flatten().sort().values
    n = len(ordered)
    normal_cdf = 0.5 * (1 + torch.erf(ordered / math.sqrt(2)))
    upper = (torch.arange(1, n + 1, dtype=torch.float64) / n - normal_cdf).max()
    lower = (normal_cdf - torch.arange(n, dtype=torch.float64) / n).max()
    return max(upper.item(), lower.item()) * math.sqrt(n)


def correlation(x: torch.Tensor, y: torch.Tensor) -> float:
    """Sample correlation in units of its standard error 1/sqrt(n)."""
    return (x.double() * y.double()).mean().item() * math.sqrt(x.numel())


def normals_of_words(words: torch.Tensor, device: str) -> torch.Tensor:
    """The kernels' Box-Muller of int64 words [2, COUNT], float64 [2, COUNT]."""
    if not HAS_TRITON:
        pytest.skip("triton is not installed")
    normals = torch.empty(words.shape, dtype=torch.float32, device=device)
    _normals_of_words_kernel[(1,)](words.to(device).contiguous(), normals, COUNT=words.shape[1])
    return normals.double().cpu()


def float64_normals(words: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(normals [2, COUNT], radius [COUNT]) of u0 as float32 has it, next to 1 in steps of 2⁻²⁴, and the exact u1."""
    u0 = (words[0].float() * 2.0**-32 + 2.0**-33).double()
    radius, angle = (-2 * u0.log()).sqrt(), 2 * math.pi * (words[1].double() + 0.5) * 2.0**-32
    return torch.stack((radius * angle.cos(), radius * angle.sin())), radius


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_known_answers(counter, key, expected):
    counter, key = (tuple(torch.tensor(int(word, 16)) for word in text.split()) for text in (counter, key))
    assert " ".join(f"{int(word):08x}" for word in _rounds(counter, key)) == expected


def test_the_mapping_of_elements_and_keys_is_the_documented_one():
    seed, sample, step = 0x299F31D0A4093822, 0x0370734413198A2E, 0x85A308D3
    words = philox_words(12, seed=seed, sample_ids=ids(sample), step=step)
    counter = [torch.tensor(value) for value in (2, step, sample & 0xFFFFFFFF, sample >> 32)]
    block = _rounds(tuple(counter), (torch.tensor(0xA4093822), torch.tensor(0x299F31D0)))
    assert words[0, 8:12].tolist() == [int(word) for word in block]


def test_noise_is_standard_normal():
    noise = philox_normal((4, 50_000), seed=11, sample_ids=ids(0, 1, 2, 3), step=2)
    n = noise.numel()
    for power, moment, variance in [(1, 0.0, 1.0), (2, 1.0, 2.0), (3, 0.0, 15.0), (4, 3.0, 96.0)]:
        z = (noise.double().pow(power).mean().item() - moment) / math.sqrt(variance / n)
        assert abs(z) < 4, f"moment {power} is {z:.1f} standard errors off"
    assert kolmogorov_distance(noise) < 1.95
    assert torch.isfinite(noise).all()


def test_every_word_of_a_block_is_normal_and_independent_of_its_neighbours():
    lanes = philox_normal((2, 80_000), seed=3, sample_ids=ids(5, 6)).unflatten(1, (-1, 4)).flatten(0, 1)
    for i in range(4):
        assert kolmogorov_distance(lanes[:, i]) < 1.95
        for j in range(i):
            assert abs(correlation(lanes[:, i], lanes[:, j])) < 4
            assert abs(correlation(lanes[:, i] ** 2 - 1, lanes[:, j] ** 2 - 1)) < 8  # variance of each factor is 2


def test_ids_steps_and_seeds_are_independent():
    shape = (1, 40_000)
    base = philox_normal(shape, seed=1, sample_ids=ids(1), step=1)
    others = {
        "seed": philox_normal(shape, seed=2, sample_ids=ids(1), step=1),
        "high half of the seed": philox_normal(shape, seed=1 + 2**32, sample_ids=ids(1), step=1),
        "sample id": philox_normal(shape, seed=1, sample_ids=ids(2), step=1),
        "high half of the id": philox_normal(shape, seed=1, sample_ids=ids(1 + 2**32), step=1),
        "step": philox_normal(shape, seed=1, sample_ids=ids(1), step=2),
        "id and step exchanged": philox_normal(shape, seed=1, sample_ids=ids(2), step=0),
        "shifted by one": torch.roll(base, 1),
    }
    for name, other in others.items():
        assert abs(correlation(base, other)) < 4, name


def test_normals_of_the_kernels_are_within_a_millionth_of_the_radius(device):
    """Of float64's, and at most twice as far as PyTorch's own float32 functions: uniform words, words of every
    magnitude, words next to 2³², and the edges of octaves and quadrants with their neighbours."""
    count = 2**18
    generator = torch.Generator().manual_seed(0)
    uniform = torch.randint(0, 2**32, (2, count), generator=generator)
    small = uniform >> torch.randint(0, 32, (2, count), generator=generator)
    edges = (torch.arange(33)[:, None, None] * 2**27 + torch.tensor([1, 3, 4]) * 2**26 // 3).flatten()
    edges = torch.cat((edges, 2 ** torch.arange(32), torch.tensor([0, 2**32])))
    edges = (edges[:, None] + torch.arange(-2, 3)).flatten().clamp(0, 2**32 - 1)
    edges = torch.cartesian_prod(edges, edges)[:count].T
    edges = torch.cat((edges, uniform), 1)[:, :count]
    for words in (uniform, small, 2**32 - 1 - small, edges):
        got, (true, radius) = normals_of_words(words, device), float64_normals(words)
        assert ((got - true).abs() <= 1e-6 * radius).all()
        straight = normals_of_words(words * torch.tensor([[1], [0]]), device)[0]  # at angle 0: the radius
        assert ((straight - radius).abs() <= 2e-7 * radius).all()
        u0, u1 = (words.float() * 2.0**-32 + 2.0**-33).unbind()
        eager = torch.sqrt(-2 * torch.log(u0)) * torch.stack(((2 * math.pi * u1).cos(), (2 * math.pi * u1).sin()))
        assert ((eager - true).abs() <= 1e-6 * radius).all()
        assert (got - true).abs().max() <= 2 * (eager - true).abs().max()


def test_normals_of_the_kernels_have_the_moments_and_tails_of_a_normal(device):
    """Of words in the midst of a grid's cells: what is off is the grid's doing, unless the functions are."""
    radii, angles = ((2 * torch.arange(cells) + 1) * (2**31 // cells) for cells in (2**13, 2**5))
    normals = normals_of_words(torch.cartesian_prod(radii, angles).T, device)
    for power, moment, error in [(1, 0, 1e-6), (2, 1, 1e-4), (3, 0, 1e-6), (4, 3, 2e-3), (6, 15, 0.04)]:
        assert normals.pow(power).mean().item() == pytest.approx(moment, abs=error), power
    assert (normals[0] * normals[1]).mean().item() == pytest.approx(0, abs=1e-6)
    for limit in (1.0, 2.0, 3.0):
        share = (normals.abs() > limit).double().mean().item()
        assert share == pytest.approx(math.erfc(limit / math.sqrt(2)), rel=0.05), limit
    ends = normals_of_words(torch.tensor([[0, 2**32 - 1], [0, 0]]), device)[0]
    assert ends.tolist() == pytest.approx([math.sqrt(66 * math.log(2)), 0.0], rel=1e-6)


@pytest.mark.parametrize("width", [1, 3, 7, 64, 1001])
def test_a_row_does_not_depend_on_the_batch(width):
    whole = philox_normal((5, width), seed=7, sample_ids=ids(9, 4, 2**40, 0, -1), step=3)
    for row, sample in enumerate((9, 4, 2**40, 0, -1)):
        assert torch.equal(whole[row], philox_normal((1, width), seed=7, sample_ids=ids(sample), step=3)[0])
    assert torch.equal(
        whole[:, : width // 2], philox_normal((5, width // 2), seed=7, sample_ids=ids(9, 4, 2**40, 0, -1), step=3)
    )


def test_seed_and_step_may_be_tensors_and_any_integer():
    args = {"sample_ids": ids(0, 1)}
    expected = philox_normal((2, 9), seed=-5, step=2**32 + 3, **args)
    assert torch.equal(expected, philox_normal((2, 9), seed=torch.tensor([-5]), step=torch.tensor(3), **args))
    assert torch.equal(expected, philox_normal((2, 9), seed=2**64 - 5, step=3, **args))


def test_permutation_is_uniform_without_replacement():
    rows, population, count = 4000, 7, 3
    drawn = philox_permutation(population, count, seed=1, sample_ids=torch.arange(rows))
    assert drawn.shape == (rows, count)
    assert all(len(set(row)) == count for row in drawn.tolist())
    cells = torch.bincount(drawn[:, 0] * 49 + drawn[:, 1] * 7 + drawn[:, 2], minlength=343)
    cells = cells[cells > 0]
    assert len(cells) == 7 * 6 * 5  # every ordered triple occurs
    expected = rows / len(cells)
    chi_square = ((cells - expected) ** 2 / expected).sum().item()
    assert abs(chi_square - 209) < 4 * math.sqrt(2 * 209)


def test_integers_are_uniform_with_replacement_and_of_seed_and_sample_id_alone():
    rows, population, count = 4000, 7, 3
    drawn = philox_integers(population, count, seed=1, sample_ids=torch.arange(rows))
    assert drawn.shape == (rows, count)
    cells = torch.bincount(drawn[:, 0] * 49 + drawn[:, 1] * 7 + drawn[:, 2], minlength=343).double()
    chi_square = ((cells - rows / 343) ** 2 / (rows / 343)).sum().item()  # every triple, repetitions included
    assert abs(chi_square - 342) < 4 * math.sqrt(2 * 342)
    assert torch.equal(
        drawn[5:9], philox_integers(population, count, seed=torch.tensor([1]), sample_ids=ids(5, 6, 7, 8))
    )
    assert not torch.equal(drawn, philox_integers(population, count, seed=2, sample_ids=torch.arange(rows)))
    assert philox_integers(1369, 4000, seed=3, sample_ids=ids(0)).max() == 1368


def test_bad_arguments_raise():
    with pytest.raises(ValueError, match="must begin with the number of sample_ids"):
        philox_normal((3, 4), seed=0, sample_ids=ids(0, 1))
    with pytest.raises(ValueError, match="sample_ids must be int64"):
        philox_words(4, seed=0, sample_ids=torch.tensor([1.0]))
    with pytest.raises(ValueError, match="must hold one integer"):
        as_int64(torch.tensor([1, 2]), torch.device("cpu"))


def test_streams_have_nothing_in_common():
    """Else the patches of an image would be chosen by the numbers that made its noise."""
    ids = torch.arange(3)
    streams = (NOISE_STREAM, PATCH_STREAM, PATCH_STREAM + 1)
    words = [philox_words(256, seed=5, sample_ids=ids, step=2, stream=stream) for stream in streams]
    assert not any((one == other).any() for one, other in itertools.combinations(words, 2))
