"""Bootstrap and t-intervals on known distributions: coverage, skewness, pairing, and published quantiles.

Bugs planted in a copy, each seen red: images resampled instead of prompts; paired resampling drawn anew for each
model; a tie counted as a win; n instead of n - 1 degrees of freedom; percentile intervals; one seed for all; a sample
without spread handed to scipy; an interval in results.json that its seeds do not give.
"""

import math

import numpy as np
import pytest
import torch

from advgrpo.evaluation.statistics import bootstrap_mean, holm, paired_bootstrap, t_interval, t_quantile


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def prompts_and_images(repeats=300, prompts=40, images=4):
    """[repeats, prompts, images]: images of a prompt share most of their variance."""
    return normal(repeats, prompts, 1, seed=1) + 0.3 * normal(repeats, prompts, images, seed=2)


def coverage(intervals, truth=0.0):
    return sum(i.low <= truth <= i.high for i in intervals) / len(intervals)


def test_the_interval_covers_the_mean_as_often_as_it_says():
    data = prompts_and_images()
    for confidence in (0.95, 0.8):
        hit = coverage([bootstrap_mean(d, confidence=confidence, resamples=400, seed=i) for i, d in enumerate(data)])
        # 300 repeats: three standard errors; the interval of 40 clusters is a little narrow
        assert hit == pytest.approx(confidence - 0.01, abs=3 * math.sqrt(confidence * (1 - confidence) / 300))


def test_a_prompts_images_are_no_independent_evidence():
    one = prompts_and_images(1)[0]
    by_prompt, by_image = bootstrap_mean(one), bootstrap_mean(one.flatten())
    assert by_prompt.mean == pytest.approx(by_image.mean)
    expected = 2 * 1.96 * one.mean(1).std().item() / math.sqrt(40)
    assert by_prompt.high - by_prompt.low == pytest.approx(expected, rel=0.1)
    assert by_image.high - by_image.low < 0.7 * expected


def test_the_interval_of_skewed_scores_leans_to_the_long_tail():
    """As far as acceleration and bias correction say; a percentile interval of them misses above too often."""
    scores = torch.from_numpy(np.random.default_rng(0).exponential(size=24))
    draws = np.random.default_rng(1).choice(scores.numpy(), size=(20_000, 24)).mean(1)
    low, high = np.percentile(draws, [2.5, 97.5])
    found = bootstrap_mean(scores, resamples=20_000)
    assert found.low > low + 0.02
    assert found.high > high + 0.04
    mirrored = bootstrap_mean(-scores, resamples=20_000)
    assert (-mirrored.high, -mirrored.low) == pytest.approx((found.low, found.high), abs=1e-9)


@pytest.mark.parametrize("scores", [[0.7], [1.0, 1.0, 1.0], [[0.2, 0.4], [0.4, 0.2]]], ids=["one", "equal", "rows"])
def test_scores_without_spread_have_an_interval_of_no_width(scores):
    found = bootstrap_mean(scores)
    assert (found.low, found.high) == (found.mean, found.mean)


def test_few_or_nearly_equal_scores_have_a_finite_interval():
    for count in (2, 3, 5):
        for seed in range(20):
            found = bootstrap_mean(1 + 1e-9 * normal(count, seed=seed), resamples=200)
            assert found.low <= found.mean <= found.high


def test_pairing_removes_what_both_models_share():
    difficulty = 5 * normal(48, 1)
    a = difficulty + 0.2 + 0.1 * normal(48, 4, seed=1)
    b = difficulty + 0.1 * normal(48, 4, seed=2)
    compared = paired_bootstrap(a, b)
    assert compared.difference.mean == pytest.approx((a - b).mean().item())
    assert 0.15 < compared.difference.low < 0.2 < compared.difference.high < 0.25
    assert compared.win_rate.mean == (a > b).double().mean().item() > 0.85
    assert compared.win_rate.low < compared.win_rate.mean < compared.win_rate.high
    alone = bootstrap_mean(a)
    assert alone.high - alone.low > 10 * (compared.difference.high - compared.difference.low)


def test_paired_intervals_cover_a_difference():
    repeats, shared = 200, 3 * normal(200, 40, 1, seed=3)
    a, b = (shared + 0.5 * normal(repeats, 40, 2, seed=s) for s in (4, 5))
    hit = coverage([paired_bootstrap(x + 0.1, y, resamples=400).difference for x, y in zip(a, b)], truth=0.1)
    assert 0.89 < hit < 0.99


def test_ties_are_half_a_win():
    compared = paired_bootstrap([1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 0.0])
    assert compared.win_rate.mean == 0.625
    same = paired_bootstrap([1.0, 2.0], [1.0, 2.0])
    assert (same.difference.low, same.difference.high, same.win_rate.mean) == (0.0, 0.0, 0.5)


def test_the_seed_decides_everything_and_large_inputs_are_cut():
    data = normal(2000)
    assert bootstrap_mean(data, seed=1) == bootstrap_mean(data, seed=1)
    assert bootstrap_mean(data, seed=1) != bootstrap_mean(data, seed=2)
    wide = bootstrap_mean(data)  # 4000 resamples of 2000 exceed one batch
    assert wide.high - wide.low == pytest.approx(2 * 1.96 / math.sqrt(2000), rel=0.1)


@pytest.mark.parametrize(
    ("probability", "freedom", "expected"),
    [(0.975, 1, 12.7062), (0.975, 2, 4.30265), (0.975, 3, 3.18245), (0.95, 10, 1.81246), (0.995, 29, 2.75639),
     (0.975, 1000, 1.96234)],
)  # fmt: skip
def test_t_quantiles_are_those_of_the_tables(probability, freedom, expected):
    assert t_quantile(probability, freedom) == pytest.approx(expected, rel=1e-5)


def test_t_interval_over_three_seeds():
    interval = t_interval([0.047, 0.034, 0.035])
    half = 4.30265 * torch.tensor([0.047, 0.034, 0.035]).double().std().item() / math.sqrt(3)
    assert interval.mean == pytest.approx(0.116 / 3)
    assert (interval.low, interval.high) == pytest.approx((0.116 / 3 - half, 0.116 / 3 + half), rel=1e-4)
    assert coverage([t_interval(row) for row in normal(1000, 3)]) == pytest.approx(0.95, abs=0.02)


def test_holm_by_hand():
    """Sorted .01 x 4, .02 x 3, .03 x 2, .04 x 1, none below a smaller one's, as statsmodels' multipletests."""
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([0.2]) == [0.2]
    assert holm([]) == []


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda: bootstrap_mean([]), "non-empty"),
        (lambda: bootstrap_mean([1.0, float("nan")]), "not finite"),
        (lambda: bootstrap_mean([1.0], confidence=95), "confidence = 95"),
        (lambda: paired_bootstrap([1.0], [1.0, 2.0]), "cannot be paired"),
        (lambda: holm([0.5, 1.2]), r"p-values \[1.2\]"),
        (lambda: t_interval([1.0]), "at least 2"),
        (lambda: t_quantile(0.3, 2), "want 0.5"),
    ],
)
def test_bad_input(call, expected):
    with pytest.raises(ValueError, match=expected):
        call()
