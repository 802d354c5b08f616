"""Agreement coefficients against the examples they were published with."""

import numpy as np
import pytest
from scipy import stats

from medgen.study.statistics import agreement

NA = np.nan
# Krippendorff, Computing Krippendorff's Alpha-Reliability (2011), example C; Gwet's cac.raw4raters (irrCAC).
FOUR_RATERS = np.array(
    [
        [1, 1, NA, 1],
        [2, 2, 3, 2],
        [3, 3, 3, 3],
        [3, 3, 3, 3],
        [2, 2, 2, 2],
        [1, 2, 3, 4],
        [4, 4, 4, 4],
        [1, 1, 2, 1],
        [2, 2, 2, 2],
    ]
    + [[NA, 5, 5, 5], [NA, NA, 1, 1], [NA, NA, 3, NA]]
)
CATEGORIES = np.arange(1.0, 6)
# Fleiss JL, Psychological Bulletin 76 (1971) 378-382: 30 patients by 6 psychiatrists, categories 1-5.
PSYCHIATRISTS = np.array(
    [
        [int(digit) for digit in row]
        for row in (
            "444444 222555 233335 555555 222444 113333 333355 113334 114444 555555 144444 124444 222333 144444 224445 "
            + "333335 111455 111112 224444 133555 555555 244444 224555 114444 144445 222224 111155 224444 133333 555555"
        ).split()
    ],
    float,
)
# Shrout & Fleiss, Psychological Bulletin 86 (1979) 420-428, table 2: 6 targets by 4 judges.
SHROUT_FLEISS = np.array([[9, 2, 5, 8], [6, 1, 3, 2], [8, 4, 6, 8], [7, 1, 2, 6], [10, 5, 6, 9], [6, 2, 4, 7]], float)


def test_cohen_1960_and_1968():
    """200 cases of table 2 in Cohen (1960), kappa .492; weighted as in Cohen (1968), .348 (3 published decimals)."""
    table = 200 * np.array([[0.44, 0.07, 0.09], [0.05, 0.20, 0.05], [0.01, 0.03, 0.06]])
    assert agreement.cohen_table(table).value == pytest.approx(0.492, abs=5e-4)
    assert agreement.cohen_table(table, np.array([[0.0, 1, 3], [1, 0, 6], [3, 6, 0]])).value == pytest.approx(0.348, abs=5e-4)


def test_cohen_as_in_sas():
    """A SAS printout: kappa .4842 (.2137, .7547), linearly weighted .4701 (.1845, .7558)."""
    table = np.array([[0, 4, 1], [0, 8, 0], [0, 1, 5]])
    first, second = (np.repeat(axis.ravel(), table.ravel()).astype(float) for axis in np.indices(table.shape))
    plain, weighted = (agreement.cohen(first, second, np.arange(3.0), kind) for kind in ("identity", "linear"))
    assert (plain.value, plain.low, plain.high) == pytest.approx((0.4842, 0.2137, 0.7547), abs=5e-5)
    assert (weighted.value, weighted.low, weighted.high) == pytest.approx((0.4701, 0.1845, 0.7558), abs=5e-5)


def test_fleiss_1971():
    assert agreement.fleiss(PSYCHIATRISTS).value == pytest.approx(0.430, abs=5e-4)


@pytest.mark.parametrize(("level", "alpha"), [("nominal", 0.743), ("ordinal", 0.815), ("interval", 0.849)])
def test_krippendorff_2011(level, alpha):
    assert agreement.krippendorff_alpha(FOUR_RATERS, level).value == pytest.approx(alpha, abs=5e-4)


def test_gwet_ac1_and_ac2_as_in_irrcac():
    """irrCAC's documentation: AC1 .77544, standard error .14295, interval (.461, 1); quadratic AC2 .914."""
    found = agreement.gwet(FOUR_RATERS, CATEGORIES)
    assert found.value == pytest.approx(0.77544, abs=5e-6)
    assert (found.low, found.high) == pytest.approx((0.461, 1), abs=5e-4)
    assert agreement.gwet(FOUR_RATERS, CATEGORIES, "quadratic").value == pytest.approx(0.914, abs=5e-4)


def test_gwet_of_two_raters_as_in_irrcac():
    """irrCAC's cont3x3abstractors: AC1 .8493305, standard error .04321747, interval (.764, .935)."""
    table = np.array([[13, 0, 0], [0, 20, 7], [0, 4, 56]])
    ratings = np.stack([np.repeat(axis.ravel(), table.ravel()) for axis in np.indices(table.shape)], axis=1).astype(float)
    found = agreement.gwet(ratings, np.arange(3.0))
    assert found.value == pytest.approx(0.8493305, abs=5e-8)
    error = (found.high - found.value) / stats.t.ppf(0.975, 99)
    assert error * np.sqrt(99 / 100) == pytest.approx(
        0.04321747, abs=5e-8
    )  # irrCAC divides by n for tables, n − 1 for raw ratings


def test_shrout_and_fleiss_1979():
    """Table 4: ICC(1,1) .17, (2,1) .29, (3,1) .71, (1,4) .44, (2,4) .62, (3,4) .91."""
    found = agreement.icc(SHROUT_FLEISS)
    assert [round(found[name].value, 2) for name in ("ICC1", "ICC2", "ICC3", "ICC1k", "ICC2k", "ICC3k")] == [
        0.17, 0.29, 0.71, 0.44, 0.62, 0.91,
    ]  # fmt: skip
    # psych::ICC prints the interval of ICC3 as .342 to .946
    assert (found["ICC3"].low, found["ICC3"].high) == pytest.approx((0.342, 0.946), abs=5e-4)


def test_what_cannot_be_told_is_nan_not_one():
    same = np.ones((10, 3))
    assert np.isnan(agreement.fleiss(same).value)
    assert np.isnan(agreement.cohen(same[:, 0], same[:, 1], np.array([1.0, 2.0])).value)
    assert agreement.icc(same) == {}


def shared_ratings(rng, studies, cases, readers, categories=5):
    """Ratings [S,N,R] of readers who see a shared truth with noise of their own: exchangeable, so the true kappa is one number."""
    truth = rng.normal(size=(studies, cases, 1))
    seen = truth + rng.normal(0, 0.8, (studies, cases, readers))
    cuts = np.quantile(seen, np.arange(1, categories) / categories)
    return np.digitize(seen, cuts).astype(float)


def test_coverage_over_cases():
    """50 cases, 4 readers: 93-97 % of the intervals of AC1, AC2, Fleiss's kappa and Krippendorff's alpha hold the population's value."""
    rng, studies = np.random.default_rng(4), 250
    population = shared_ratings(rng, 1, 60_000, 4)[0]
    samples = population[rng.permutation(60_000)[: studies * 50]].reshape(studies, 50, 4)
    categories = np.arange(5.0)
    measures = {
        "AC1": lambda r: agreement.gwet(r, categories),
        "AC2": lambda r: agreement.gwet(r, categories, "quadratic"),
        "Fleiss": agreement.fleiss,
    }
    for name, measure in measures.items():
        truth = measure(population).value if name != "Fleiss" else _fleiss(population)
        found = [measure(sample) for sample in samples]
        covered = np.mean([one.low <= truth <= one.high for one in found])
        print(f"{name}: coverage {covered:.3f}")
        assert 0.925 <= covered <= 0.975


def _fleiss(ratings):
    from statsmodels.stats.inter_rater import aggregate_raters, fleiss_kappa

    return fleiss_kappa(aggregate_raters(ratings)[0])
