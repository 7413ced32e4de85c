"""Statistics of votes against values from the literature, by hand, and of simulated raters."""

import numpy as np
import pytest

from advgrpo.compare.statistics import (
    bradley_terry,
    interval,
    krippendorff_alpha,
    resamples_of,
    strengths,
    weighted_mean,
)

NONE = np.nan
HOW = {"confidence": 0.95, "resamples": 4000, "seed": 0}


def test_alpha_of_the_published_example():
    """Four observers, twelve units, with gaps: interval data of Krippendorff 2011, section C."""
    observers = [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, NONE, NONE, NONE],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, NONE, 3],
        [NONE, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, NONE],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, NONE],
    ]
    assert krippendorff_alpha(np.array(observers).T) == pytest.approx(0.849, abs=5e-4)


def test_alpha_by_hand():
    """Two raters on a win, a tie, and one win against a loss: D_o = 2/6, D_e = 2 · 6 / 5 · var."""
    ratings = np.array([[1, 1], [0.5, 0.5], [1, 0]])
    variance = np.var([1, 1, 0.5, 0.5, 1, 0])
    assert krippendorff_alpha(ratings) == pytest.approx(1 - (2 / 6) / (2 * 6 / 5 * variance))
    assert krippendorff_alpha(np.array([[1, 1], [0, 0], [0.5, 0.5]])) == 1
    assert krippendorff_alpha(np.array([[1, 0], [0, 1]])) == pytest.approx(-0.5)


def test_alpha_is_not_made_up():
    assert krippendorff_alpha(np.array([[1, NONE], [NONE, 0]])) is None
    assert krippendorff_alpha(np.array([[1, 1], [1, 1]])) is None
    assert krippendorff_alpha(np.zeros((0, 2))) is None


def test_strengths_of_two():
    one, other = bradley_terry(np.array([[0, 3], [1, 0]]))
    assert one - other == pytest.approx(np.log(3), abs=0.01)
    assert one + other == pytest.approx(0)


def test_strengths_maximise_the_posterior():
    """At the maximum every side has won as often as expected, but for the prior's pull."""
    wins = np.array([[0, 7, 2.5], [3, 0, 6], [4.5, 1, 0]])
    theta = bradley_terry(wins)
    for i in range(3):
        expected = sum((wins[i, j] + wins[j, i]) / (1 + np.exp(theta[j] - theta[i])) for j in range(3) if j != i)
        assert wins[i].sum() - expected == pytest.approx(0.01 * theta[i], abs=1e-8)


def test_simulated_strengths_are_recovered():
    truth = np.array([1.0, 0.2, -0.3, -0.9])
    random = np.random.default_rng(3)
    first, second = np.array([(i, j) for i in range(4) for j in range(4) if i < j]).repeat(4000, 0).T
    outcome = (random.random(len(first)) < 1 / (1 + np.exp(truth[second] - truth[first]))).astype(float)
    found = strengths(first, second, outcome, 4)(np.ones((1, len(first))))[0]
    assert found == pytest.approx(truth, abs=0.06)


def test_who_has_won_everything_is_finite_and_first():
    theta = bradley_terry(np.array([[0, 20, 20], [0, 0, 5], [0, 5, 0]]))
    assert np.isfinite(theta).all()
    assert theta[0] > 2
    assert theta[1] == pytest.approx(theta[2])


def test_many_fits_at_once_are_those_of_one_at_a_time():
    wins = np.random.default_rng(0).integers(0, 9, (5, 3, 3)).astype(float)
    assert bradley_terry(wins) == pytest.approx(np.stack([bradley_terry(each) for each in wins]), abs=1e-7)


def crossed(raters: int, prompts: int) -> tuple[np.ndarray, np.ndarray]:
    return np.repeat(np.arange(raters), prompts), np.tile(np.arange(prompts), raters)


@pytest.mark.parametrize("of", ["raters", "prompts"])
def test_votes_that_depend_on_one_of_both_have_the_spread_of_that_one(of):
    """12 raters and 30 prompts: were votes resampled one by one, the interval would be a fraction as wide."""
    raters, prompts = crossed(12, 30)
    taste = np.random.default_rng(1).random(12 if of == "raters" else 30)
    values = taste[raters if of == "raters" else prompts]
    (found,) = interval(weighted_mean(values), raters, prompts, **HOW)
    half = 1.96 * taste.std() / np.sqrt(len(taste))
    assert found.value == pytest.approx(taste.mean())
    assert found.high - found.low == pytest.approx(2 * half, rel=0.08)


def test_a_single_rater_is_not_resampled_and_a_single_vote_has_no_interval():
    values = np.random.default_rng(2).random(40)
    (found,) = interval(weighted_mean(values), np.zeros(40), np.arange(40), **HOW)
    assert found.high - found.low == pytest.approx(2 * 1.96 * values.std() / np.sqrt(40), rel=0.08)
    (alone,) = interval(weighted_mean(values[:2]), np.zeros(2), np.zeros(2), **HOW)
    assert (alone.value, alone.low, alone.high) == (pytest.approx(values[:2].mean()), None, None)


def test_intervals_cover_the_truth():
    """Raters and prompts with effects of their own, 20 of each: 95 % intervals hold the mean nine times in ten."""
    random, covered = np.random.default_rng(5), 0
    raters, prompts = crossed(20, 20)
    for trial in range(120):
        values = random.normal(0, 0.3, 20)[raters] + random.normal(0, 0.3, 20)[prompts] + random.normal(0, 0.5, 400)
        how = {"confidence": 0.95, "resamples": 400, "seed": trial}
        (found,) = interval(weighted_mean(values), raters, prompts, **how)
        covered += found.low <= 0 <= found.high
    assert covered >= 108


def test_resamples_are_keyed_and_keep_their_size():
    raters, prompts = np.array(["a", "a", "b"]), np.array([0, 1, 1])
    first, again, other = (
        np.concatenate(list(resamples_of(raters, prompts, resamples=50, seed=seed))) for seed in (0, 0, 1)
    )
    assert (first == again).all()
    assert (first != other).any()
    assert first.shape == (50, 3)
    empty = np.isnan(weighted_mean(np.ones(3))(first)).any(1)
    assert empty.sum() == (first.sum(1) == 0).sum()  # rater a and prompt 1 only ever meet some of the time
