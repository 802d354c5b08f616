"""TOST against R's `equivalence` package and statsmodels; its error at the margin; words that follow from each outcome."""

import numpy as np
import pytest
from scipy import stats

from medgen.study.statistics.equivalence import tost
from medgen.study.statistics.proportions import Mean, reader_mean

# R package "equivalence", tost(x, y, eps = 0.6, paired = TRUE) on the `clinic` data of package "multeq" (also in statsmodels' tests).
FIRST = [2.84, 2.51, 2.41, 2.95, 3.14, 3.79, 4.14, 3.85, 3.02, 3.45, 5.37, 3.81, 4.19, 3.16, 3.84]
SECOND = [2.60, 2.82, 2.18, 3.46, 4.01, 3.04, 3.47, 4.06, 2.91, 3.59, 4.51, 3.16, 3.86, 3.31, 3.02]


def test_agrees_with_r_equivalence_to_1e_9():
    found = tost(reader_mean(np.subtract(FIRST, SECOND)), 0.0, 0.6)
    assert found.value == pytest.approx(0.1646666666666667, abs=1e-9)
    assert found.df == 14
    assert (found.low, found.high) == pytest.approx((-0.0744336620516462, 0.4037669953849797), abs=1e-9)
    assert found.p_equivalence == pytest.approx(0.003166881489265175, abs=1e-9)
    assert found.verdict == "equivalent"


def test_agrees_with_statsmodels_to_1e_12():
    from statsmodels.stats.weightstats import DescrStatsW

    values = np.random.default_rng(3).normal(0.55, 0.1, 12)
    found = tost(reader_mean(values), 0.5, 0.1)
    assert found.p_equivalence == pytest.approx(DescrStatsW(values).ttost_mean(0.4, 0.6)[0], abs=1e-12)


@pytest.mark.parametrize(
    ("value", "error", "verdict"),
    [
        (0.50, 0.02, "equivalent"),
        (0.55, 0.01, "equivalent but different"),
        (0.75, 0.05, "different"),
        (0.55, 0.06, "inconclusive"),
    ],
)
def test_verdicts(value, error, verdict):
    assert tost(Mean(value, error, 9, 10), 0.5, 0.1).verdict == verdict


def test_three_wide_readers_show_nothing_although_p_is_large():
    found = tost(reader_mean([0.35, 0.5, 0.7]), 0.5, 0.1)
    assert found.p_difference > 0.5
    assert found.verdict == "inconclusive"


def test_one_reader_has_no_verdict_and_a_margin_must_be_positive():
    assert tost(reader_mean([0.5]), 0.5, 0.1).verdict == "unknown"
    with pytest.raises(ValueError, match="margin must be above 0"):
        tost(reader_mean([0.5, 0.6]), 0.5, 0)


@pytest.mark.parametrize("readers", [10, 17, 30])
def test_error_at_the_margin(readers):
    """Readers whose mean lies exactly at the margin are called equivalent in 3-7 % of studies where the margin can be resolved at all."""
    rng, count, cases, margin = np.random.default_rng(readers), 20_000, 60, 0.1
    skill = np.clip(rng.normal(0.5 + margin, 0.1, (count, readers)), 0, 1)
    accuracy = rng.binomial(cases, skill) / cases
    error = accuracy.std(1, ddof=1) / np.sqrt(readers)
    upper = stats.t.cdf((accuracy.mean(1) - 0.5 - margin) / error, readers - 1)
    lower = stats.t.sf((accuracy.mean(1) - 0.5 + margin) / error, readers - 1)
    wrong = np.mean(np.maximum(upper, lower) < 0.05)
    print(f"TOST at the margin, {readers} readers: {wrong:.3f}")
    assert 0.03 <= wrong <= 0.07
