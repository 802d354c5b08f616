"""d′ and criterion against Macmillan & Creelman, two alternatives against Hacker & Ratcliff, AUC against scikit-learn."""

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from medgen.study.statistics import signal_detection as sd


def test_d_prime_as_in_macmillan_and_creelman():
    """Detection Theory (2nd ed. 2005), ch. 1: 20 of 25 old faces and 10 of 25 new ones called old: d′ = .842 + .253 = 1.095."""
    found = sd.detection(20, 25, 10, 25, correct=False)
    assert found.d_prime.value == pytest.approx(1.095, abs=5e-4)
    assert found.criterion.value == pytest.approx(-0.294, abs=1e-3)


def test_log_linear_correction_of_hautus_1995():
    """(H + .5) / (n + 1): a perfect reader of 25 + 25 has d′ = 2 z(25.5 / 26), finite."""
    assert sd.detection(25, 25, 0, 25).d_prime.value == pytest.approx(2 * stats.norm.ppf(25.5 / 26), abs=1e-12)


@pytest.mark.parametrize(("share", "d_prime"), [(0.50, 0.00), (0.64, 0.51), (0.76, 1.00), (0.92, 1.99), (0.98, 2.90)])
def test_two_alternatives_as_in_hacker_and_ratcliff_1979(share, d_prime):
    """Table of d′ for m-alternative forced choice, column m = 2 (2 published decimals)."""
    assert sd.d_prime_2afc(share) == pytest.approx(d_prime, abs=0.006)


def test_auc_and_roc_agree_with_scikit_learn():
    rng = np.random.default_rng(0)
    signal = rng.random(60) < 0.5
    ratings = np.clip(np.round(rng.normal(3 + signal, 1.2)), 1, 6)
    assert sd.auc(ratings, signal) == pytest.approx(roc_auc_score(signal, ratings), abs=1e-12)
    alarms, hits = sd.roc(ratings, signal)
    assert np.trapezoid(hits, alarms) == pytest.approx(sd.auc(ratings, signal), abs=1e-12)


def test_what_was_not_answered_is_left_out():
    assert sd.auc(np.array([1.0, np.nan, 2.0]), np.array([False, True, True])) == 1.0
    assert np.isnan(sd.detection(0, 0, 3, 10).d_prime.value)


def test_coverage_of_d_prime_and_criterion():
    """60 + 60 cases, d′ from 0 to 2, criteria −.3 to .3: 93-97 % of intervals hold the truth."""
    rng, n, count = np.random.default_rng(1), 60, 1000
    covered = []
    for d, c in [(0.0, 0.0), (1.0, 0.3), (2.0, -0.3)]:
        hit, alarm = stats.norm.cdf(d / 2 - c), stats.norm.cdf(-d / 2 - c)
        found = [
            sd.detection(h, n, f, n) for h, f in zip(rng.binomial(n, hit, count), rng.binomial(n, alarm, count), strict=True)
        ]
        covered.append(
            (
                np.mean([one.d_prime.low <= d <= one.d_prime.high for one in found]),
                np.mean([one.criterion.low <= c <= one.criterion.high for one in found]),
            )
        )
    print("coverage of d′, c:", covered)
    assert all(0.93 <= share <= 0.97 for pair in covered for share in pair)
