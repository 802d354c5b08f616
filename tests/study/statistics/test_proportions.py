"""Intervals of shares against Newcombe 1998, the t interval against scipy, and how often each holds the truth in simulated studies."""

import numpy as np
import pytest
from scipy import stats

from medgen.study.statistics.proportions import Mean, reader_mean, share


@pytest.mark.parametrize(
    ("successes", "n", "wilson", "exact"),
    [  # Newcombe RG, Statistics in Medicine 17 (1998) 857-872, table I, methods 3 and 5 (4 published decimals)
        (81, 263, (0.2553, 0.3662), (0.2527, 0.3676)),
        (15, 148, (0.0624, 0.1605), (0.0578, 0.1617)),
        (0, 20, (0.0000, 0.1611), (0.0000, 0.1684)),
        (1, 29, (0.0061, 0.1718), (0.0009, 0.1776)),
    ],
)
def test_wilson_and_clopper_pearson_as_in_newcombe_1998(successes, n, wilson, exact):
    found = share(successes, n)
    assert found.wilson == pytest.approx(wilson, abs=5.1e-5)
    assert found.clopper_pearson == pytest.approx(exact, abs=5.1e-5)


def test_an_impossible_count_is_refused():
    with pytest.raises(ValueError, match="0 ≤ right ≤ answered"):
        share(5, 4)


def test_reader_mean_is_the_t_interval_of_the_readers():
    values = [0.61, 0.74, 0.55, 0.80, np.nan, 0.66]
    known = np.array(values)[np.isfinite(values)]
    mean = reader_mean(values)
    reference = stats.t.interval(0.95, 4, known.mean(), stats.sem(known))
    assert (mean.interval().low, mean.interval().high) == pytest.approx(reference, abs=1e-12)
    assert mean.p_value(0.5) == pytest.approx(stats.ttest_1samp(known, 0.5).pvalue, abs=1e-12)


def test_one_reader_says_nothing_of_others():
    assert np.isnan(reader_mean([0.7]).interval().low)
    assert np.isnan(reader_mean([0.7]).p_value(0.5))


@pytest.mark.parametrize(("readers", "half_width"), [(3, 0.39), (5, 0.19), (10, 0.11), (17, 0.08)])
def test_readers_dominate_the_uncertainty(readers, half_width):
    """Between-reader SD of 15.6 points (as in the 17-reader study in Radiology 2026): the half-widths the planner quotes."""
    mean = Mean(0.7, 0.156 / np.sqrt(readers), readers - 1, readers)
    assert mean.interval().high - 0.7 == pytest.approx(half_width, abs=0.005)


def studies(rng, count, readers, cases, mean, sd):
    """Right answers [S,J] of readers whose own skill is normal around `mean`, clipped to [0, 1] far away."""
    return rng.binomial(cases, np.clip(rng.normal(mean, sd, (count, readers)), 0, 1))


@pytest.mark.parametrize("readers", [5, 10, 17])
def test_reader_level_interval_holds_and_the_pooled_test_does_not(readers):
    """Guessing readers with SD 15.6 points, 50 cases each: the reader-level t test errs in 5 %, pooling all answers in about 39 %."""
    count, cases = 20_000, 50
    right = studies(np.random.default_rng(readers), count, readers, cases, 0.5, 0.156)
    accuracy = right / cases
    t = (accuracy.mean(1) - 0.5) / (accuracy.std(1, ddof=1) / np.sqrt(readers))
    reader_level = np.mean(2 * stats.t.sf(np.abs(t), readers - 1) < 0.05)
    total = right.sum(1)
    pooled = np.mean(
        2 * np.minimum(stats.binom.cdf(total, readers * cases, 0.5), stats.binom.sf(total - 1, readers * cases, 0.5)) < 0.05
    )
    print(
        f"{readers} readers: reader-level t rejects {reader_level:.3f}, pooled binomial {pooled:.3f}; t coverage {1 - reader_level:.3f}"
    )
    assert 0.03 <= reader_level <= 0.07
    assert 0.35 <= pooled <= 0.43


def test_coverage_of_one_readers_intervals():
    """Averaged over shares from .2 to .8 with 60 cases: Wilson holds 93-97 %; Clopper-Pearson never less than 95 % (it is exact)."""
    n = 60
    table = [share(k, n) for k in range(n + 1)]
    truths = np.linspace(0.2, 0.8, 61)
    chance = stats.binom.pmf(np.arange(n + 1)[None], n, truths[:, None])
    covered = {}
    for name in ("wilson", "clopper_pearson"):
        ends = np.array([getattr(one, name) for one in table])
        inside = (ends[None, :, 0] <= truths[:, None]) & (truths[:, None] <= ends[None, :, 1])
        covered[name] = (chance * inside).sum(1)
    print({name: f"mean {values.mean():.3f}, least {values.min():.3f}" for name, values in covered.items()})
    assert 0.93 <= covered["wilson"].mean() <= 0.97
    assert covered["clopper_pearson"].min() >= 0.95
