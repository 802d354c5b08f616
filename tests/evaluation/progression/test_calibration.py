"""Scores of samples, against integrals, hand counts and ensembles that are calibrated by construction."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import integrate, stats

from medgen.evaluation.progression.calibration import (
    band,
    covered,
    crps,
    crps_of_futures,
    futures_covered,
    rank_histogram,
    spread_error,
)


def test_crps_is_the_integral_of_the_squared_difference_of_distributions():
    draws, truth = np.array([1.0, 2.0, 4.0, 4.5]), 2.7
    grid = np.linspace(-5, 12, 400_001)
    steps = (draws[:, None] <= grid).mean(0)
    expected = integrate.trapezoid((steps - (grid >= truth)) ** 2, grid)
    assert crps(draws[None], [truth])[0] == pytest.approx(expected, abs=1e-4)


def test_crps_by_hand():
    # E|X − y| = (1 + 1) / 2; ½ E|X − X′| = ½ · (0 + 2 + 2 + 0) / 4
    assert crps([[0.0, 2.0]], [1.0]).tolist() == [0.5]
    assert crps([[3.0]], [1.0]).tolist() == [2.0]  # one draw: the absolute error
    assert crps(np.full((1, 5), 3.0), [1.0]).tolist() == [2.0]


def test_crps_of_many_draws_nears_the_closed_form_of_the_normal():
    draws = stats.norm.ppf((np.arange(4000) + 0.5) / 4000)
    y = 0.4
    closed = y * (2 * stats.norm.cdf(y) - 1) + 2 * stats.norm.pdf(y) - 1 / np.sqrt(np.pi)  # Gneiting & Raftery 2007
    assert crps(draws[None], [y])[0] == pytest.approx(closed, abs=1e-3)


def test_each_future_could_have_come():
    draws = np.array([[0.0, 2.0], [5.0, 5.0]])
    expected = [(crps(draws[:1], [1.0])[0] + crps(draws[:1], [4.0])[0]) / 2, 3.0]
    assert crps_of_futures(draws, [np.array([1.0, 4.0]), np.array([8.0])]).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("level", [0.5, 0.8])
@pytest.mark.parametrize("count", [16, 33])
def test_the_band_holds_one_more_draw_as_often_as_it_says(level, count):
    values = np.random.default_rng(0).gamma(2, size=(20_000, count + 1))
    assert covered(values[:, 1:], values[:, 0], level).mean() == pytest.approx(level, abs=0.012)
    futures = list(np.random.default_rng(1).gamma(2, size=(2000, 64)))
    assert futures_covered(values[:2000, 1:], futures, level).mean() == pytest.approx(level, abs=0.015)


def test_a_band_by_hand():
    draws = np.arange(1.0, 10.0)[None]  # nine draws: positions p · 10
    low, high = band(draws, 0.8)
    assert (low[0], high[0]) == pytest.approx((1.0, 9.0))
    low, high = band(draws, 0.5)
    assert (low[0], high[0]) == pytest.approx((2.5, 7.5))
    assert covered(np.repeat(draws, 3, 0), [2.4, 2.5, 7.6], 0.5).tolist() == [False, True, False]
    assert futures_covered(draws, [[2.4, 5.0, 6.0, 9.0]], 0.5).tolist() == [0.5]
    with pytest.raises(ValueError, match="level must lie between 0 and 1, got 80"):
        band(draws, 80)


def test_ranks_are_counted_and_ties_drawn():
    draws = np.array([[1.0, 2.0, 3.0]] * 4)
    assert rank_histogram(draws, [0.0, 2.5, 9.0, 9.0]).tolist() == [1, 0, 1, 2]
    tied = rank_histogram(np.zeros((4000, 3)), np.zeros(4000))
    assert stats.chisquare(tied).pvalue > 0.001
    values = np.random.default_rng(3).normal(size=(4000, 10))
    assert stats.chisquare(rank_histogram(values[:, 1:], values[:, 0])).pvalue > 0.001


def test_spread_that_follows_the_error_is_seen():
    rng = np.random.default_rng(5)
    size = rng.uniform(0.2, 3, 3000)[:, None]
    values = size * rng.normal(size=(3000, 17))
    found = spread_error(values[:, 1:], values[:, 0])
    assert found.ratio == pytest.approx(1, abs=0.05)
    assert found.spearman > 0.4
    assert spread_error(0.5 * values[:, 1:], values[:, 0]).ratio == pytest.approx(0.5, abs=0.06)
    assert np.isnan(spread_error(values[:, 1:2], values[:, 0]).ratio)


def test_shapes_are_checked():
    with pytest.raises(ValueError, match=r"draws must be \[N,M\] and the truth \[N\], got \[2, 3\] and \[3\]"):
        crps(np.zeros((2, 3)), np.zeros(3))
    with pytest.raises(ValueError, match="2 rows of draws and futures of 1"):
        crps_of_futures(np.zeros((2, 3)), [[1.0]])
