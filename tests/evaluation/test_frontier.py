"""Models compared at several guidance scales: distances and intervals against known answers."""

import math

import pytest
import torch

from advgrpo.evaluation.frontier import (
    Point,
    Resampled,
    Resamples,
    best_guidance,
    compare,
    diversity,
    kernel_matrix,
    kid,
)

PROMPTS, IMAGES, WIDTH = 30, 2, 16


def features(seed: int, shift: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(PROMPTS, IMAGES, WIDTH, generator=generator) + shift


def plain_kid(x: torch.Tensor, y: torch.Tensor) -> float:
    """KID as its paper states it, over all pairs of different images."""
    kernel = lambda a, b: (a.double() @ b.double().T / a.shape[1] + 1) ** 3  # noqa: E731
    within = lambda k: (k.sum() - k.trace()) / (len(k) * (len(k) - 1))  # noqa: E731
    return 1000 * (within(kernel(x, x)) + within(kernel(y, y)) - 2 * kernel(x, y).mean()).item()


def test_one_image_per_prompt_gives_kid_but_for_the_pairs_within_a_prompt():
    x, y = features(0)[:, :1], features(1, 0.5)[:, :1]
    a, b = x.flatten(0, 1), y.flatten(0, 1)
    kernel = (a.double() @ b.double().T / WIDTH + 1) ** 3
    between = (kernel.sum() - kernel.trace()) / (PROMPTS * (PROMPTS - 1))  # the published one keeps the trace
    expected = plain_kid(a, b) + 2000 * (kernel.mean() - between).item()
    assert kid(kernel_matrix(x, y)).item() == pytest.approx(expected, rel=1e-9)


def test_distance_of_a_distribution_to_itself_is_zero_on_average():
    found = [kid(kernel_matrix(features(2 * i), features(2 * i + 1))).item() for i in range(40)]
    mean, error = sum(found) / 40, torch.tensor(found).std().item() / 40**0.5
    assert abs(mean) < 3 * error


def test_weights_count_prompts_as_repeating_them_does():
    x, y = features(0), features(1, 0.5)
    weights = torch.ones(1, PROMPTS)
    weights[0, 3], weights[0, 4] = 2, 0
    rows = [*range(PROMPTS)]
    rows[4] = 3
    matrix = kernel_matrix(x, y)
    off = matrix[rows][:, rows] * (torch.tensor(rows)[:, None] != torch.tensor(rows))
    pairs = PROMPTS * PROMPTS - (weights.square().sum()).item()
    assert kid(matrix, weights).item() == pytest.approx(1000 * off.sum().item() / pairs)


def test_diversity_of_equal_images_is_zero_and_of_opposite_ones_two():
    one = features(0)[:, :1]
    assert diversity(one.repeat(1, 3, 1)).abs().max() < 1e-9
    balanced = one - one.mean(0)
    assert diversity(torch.cat([balanced, -balanced], 1)).sub(2).abs().max() < 1e-6


def test_a_single_image_has_no_diversity():
    with pytest.raises(ValueError, match="at least 2 images"):
        diversity(features(0)[:, :1])


def point(seed: int, share: float, shift: float) -> Point:
    generator = torch.Generator().manual_seed(seed)
    right = torch.rand(PROMPTS, IMAGES, generator=generator) < share
    return Point.of(right, features(seed, shift), features(99))


def test_comparison_is_the_mean_over_seeds_and_prompts():
    base, models = point(0, 0.3, 1.0), [point(1, 0.7, 0.5), point(2, 0.8, 0.4)]
    found = compare(models, base, (1.0, 1.0))
    own = torch.stack([each.accuracy for each in models]).mean() - base.accuracy.mean()
    assert found.accuracy.mean == pytest.approx(own.item())
    assert found.accuracy.low < own < found.accuracy.high
    distances = [kid(each.kernel).item() for each in models]
    assert found.kid.mean == pytest.approx(sum(distances) / 2 - kid(base.kernel).item())
    assert found.kid.high < 0
    ratio = torch.stack([each.diversity for each in models]).mean() / base.diversity.mean()
    assert found.diversity_ratio.mean == pytest.approx(ratio.item())


def test_resamples_of_a_single_prompt_leave_the_interval_finite():
    """Of three prompts one resample in nine holds one alone."""
    three = [Point(p.accuracy[:3], p.kernel[:3, :3], p.diversity[:3]) for p in (point(0, 0.3, 1.0), point(1, 0.7, 0.5))]
    found = compare(three[1:], three[0], (1.0, 1.0)).kid
    assert found.low <= found.mean <= found.high


def test_intervals_hold_the_seeds_too():
    base = point(0, 0.3, 1.0)
    alike, apart = [point(1, 0.6, 0.5)] * 4, [point(i, share, 0.5) for i, share in enumerate((0.3, 0.9, 0.3, 0.9))]
    width = lambda models: (lambda i: i.high - i.low)(compare(models, base, (1, 1)).accuracy)  # noqa: E731
    assert width(apart) > 1.3 * width(alike)


@pytest.mark.parametrize(
    ("seeds", "of_seed", "of_prompt", "noise"),
    [
        (5, 0.1, 0.2, 0.2),  # a bootstrap over prompts alone would cover about 3 times in 5
        (3, 0.1, 0.0, 1e-4),  # percentiles of the resamples, which end at the lowest and highest seed: 3 in 4
        (2, 0.1, 0.0, 1e-4),  # 1 in 2
    ],
)
def test_interval_covers_the_truth_about_as_often_as_it_says(seeds, of_seed, of_prompt, noise):
    generator = torch.Generator().manual_seed(0)
    one, nothing = torch.eye(PROMPTS, dtype=torch.float64), torch.zeros(PROMPTS, dtype=torch.float64)
    base = Point(nothing, one, nothing + 1)
    covered = 0
    for _ in range(100):
        rows = 0.3 + of_seed * torch.randn(seeds, 1, generator=generator).double()
        rows = rows + of_prompt * torch.randn(1, PROMPTS, generator=generator)
        rows = rows + noise * torch.randn(seeds, PROMPTS, generator=generator)
        found = compare([Point(row, one, base.diversity) for row in rows], base, (1, 1), resamples=400)
        covered += found.accuracy.low <= 0.3 <= found.accuracy.high
    assert 87 <= covered <= 100


def test_the_standard_error_of_a_mean_over_seeds_is_unbiased():
    """Prompts alike: the squared error is s^2 / S, with S - 1 in s."""
    values = torch.tensor([0.1, 0.2, 0.6], dtype=torch.float64)
    found = Resamples.draw(PROMPTS, 3, resamples=40_000, seed=0).mean(values[:, None].expand(3, PROMPTS))
    assert found.error == pytest.approx((values.var() / 3).sqrt().item(), rel=0.02)
    assert found.freedom == pytest.approx(2, rel=0.01)


def test_freedom_lies_between_that_of_seeds_and_of_prompts():
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randn(1, PROMPTS, generator=generator).double()
    apart = torch.randn(3, 1, generator=generator).double()
    drawn = Resamples.draw(PROMPTS, 3, resamples=4000, seed=0)
    of_seeds, of_both, of_prompts = (drawn.mean(prompts + share * apart).freedom for share in (100.0, 0.1, 0.0))
    assert of_seeds == pytest.approx(2, rel=0.05)
    assert 2.2 < of_both < PROMPTS + 1
    assert of_prompts == pytest.approx(PROMPTS - 1)


def test_best_guidance_is_the_most_accurate_and_of_equals_the_lowest():
    points = {2.0: point(0, 0.5, 0), 3.0: point(0, 0.5, 0), 1.0: point(0, 0.1, 0)}
    assert best_guidance(points) == 2.0


def test_points_of_other_prompts_are_refused():
    base = point(0, 0.5, 0)
    short = Point(base.accuracy[:3], base.kernel[:3, :3], base.diversity[:3])
    with pytest.raises(ValueError, match="same prompts"):
        compare([short], base, (1, 1))


def test_p_values_are_those_of_students_t():
    found = Resampled(0.2, 0.1, 4.0, 2000)
    assert found.p_above(0) == pytest.approx(0.0580582, abs=1e-6)  # t = 2 with 4 degrees of freedom
    assert found.p_above(0) + found.p_below(0) == pytest.approx(1)
    assert found.p_above(found.interval.low) == pytest.approx(0.025)
    assert found.p_above(-1e9) == 1 / 2001
    certain = Resampled(0.2, 0.0, math.inf, 2000)
    assert (certain.p_above(0), certain.p_below(0)) == (1 / 2001, 1)
    unknown = Resampled(math.nan, 0.1, 4.0, 2000)
    assert (unknown.p_above(0), unknown.p_below(0)) == (1, 1)


def test_resamples_without_pairs_of_prompts_do_not_count():
    values = torch.tensor([float("nan"), 1.0, 2.0, 3.0], dtype=torch.float64)
    drawn = Resamples(torch.ones(4, PROMPTS).double(), torch.ones(4, 1).double())
    found = drawn.of(lambda prompts, seeds: values[: len(prompts)] if len(prompts) > 1 else values[2:3])
    assert (found.estimate, found.error) == (2.0, pytest.approx((2 / 3) ** 0.5))
