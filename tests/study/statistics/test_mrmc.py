"""Obuchowski-Rockette against OR-DBM MRMC 2.51 (Iowa) on the Van Dyke study, and simulated coverage and error."""

from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from medgen.study.statistics import mrmc

# Output of OR-DBM MRMC 2.51, "VanDyke trap area jackknife anova", 2020 (shipped with RJafroc's tests); the MRMCaov user guide prints the
# same study. Published digits: 8 decimals of AUCs, mean squares and covariances, 5-8 of the tests.
AUCS = [
    [0.91964573, 0.85877617, 0.90386473, 0.97310789, 0.82979066],
    [0.94782609, 0.90531401, 0.92173913, 0.99935588, 0.92995169],
]


@pytest.fixture(scope="module")
def van_dyke():
    lines = [line for line in Path(__file__).with_name("van_dyke.txt").read_text().splitlines() if not line.startswith("#")]
    ratings = np.array([[[int(digit) for digit in pair] for pair in line.split()] for line in lines], float)  # [J,N,I]
    return ratings.transpose(2, 0, 1), np.arange(114) >= 69


def test_reader_aucs_as_published(van_dyke):
    merit = mrmc.auc_merit(*van_dyke)
    np.testing.assert_allclose(merit.values, AUCS, atol=5e-9)


def test_jackknife_covariances_as_published(van_dyke):
    parts = mrmc.components(mrmc.auc_merit(*van_dyke))
    assert (parts.error, parts.cov1, parts.cov2, parts.cov3) == pytest.approx(
        (0.00080229, 0.00034661, 0.00034407, 0.00023903), abs=5e-9
    )


def test_difference_of_modalities_as_published(van_dyke):
    """F(1, 15.26) = 4.46, p = .0517, difference −.04380 (−.08796, .00036)."""
    mean = mrmc.difference(mrmc.auc_merit(*van_dyke))
    assert mean.value == pytest.approx(-0.04380032, abs=5e-9)
    assert mean.standard_error == pytest.approx(0.02075, abs=5e-6)
    assert mean.df == pytest.approx(15.26, abs=5e-3)
    assert (mean.value / mean.standard_error) ** 2 == pytest.approx(4.46, abs=5e-3)
    assert mean.p_value(0) == pytest.approx(0.0517, abs=5e-5)
    ends = mean.interval()
    assert (ends.low, ends.high) == pytest.approx((-0.08796, 0.00036), abs=5e-6)


@pytest.mark.parametrize(
    ("modality", "value", "error", "df", "low", "high"),
    [
        (0, 0.89703704, 0.03317360, 12.74, 0.82522360, 0.96885048),
        (1, 0.94083736, 0.02156637, 12.71, 0.89413783, 0.98753689),
    ],
)
def test_single_modality_as_published(van_dyke, modality, value, error, df, low, high):
    mean = mrmc.single(mrmc.auc_merit(*van_dyke), modality)
    ends = mean.interval()
    assert (mean.value, mean.standard_error, ends.low, ends.high) == pytest.approx((value, error, low, high), abs=1e-8)
    assert mean.df == pytest.approx(df, abs=5e-3)


def test_delong_is_near_the_jackknife(van_dyke):
    """DeLong (1988) and the jackknife estimate the same covariances; AUCs agree with scikit-learn to 1e-12."""
    ratings, signal = van_dyke
    delong, jackknife = (mrmc.auc_merit(ratings, signal, method) for method in ("delong", "jackknife"))
    np.testing.assert_allclose(delong.covariance, jackknife.covariance, atol=4e-5)
    reference = [[roc_auc_score(signal, reader) for reader in modality] for modality in ratings]
    np.testing.assert_allclose(delong.values, reference, atol=1e-12)


def test_missing_readings_change_only_their_reader(van_dyke):
    ratings, signal = van_dyke
    gaps = ratings.copy()
    gaps[0, 2, [3, 80, 100]] = np.nan
    full, less = mrmc.auc_merit(ratings, signal), mrmc.auc_merit(gaps, signal)
    changed = np.argwhere(full.values != less.values)
    assert changed.tolist() == [[0, 2]]
    assert abs(mrmc.difference(full).standard_error - mrmc.difference(less).standard_error) < 1e-3
    with pytest.raises(ValueError, match="jackknife"):
        mrmc.auc_merit(gaps, signal, "delong")


def roe_metz(rng, studies, modalities, readers, per_kind, separation, reader_sd=0.2):
    """Ratings [S,I,J,N] of Roe & Metz (1997): reader, case and residual effects; reader spread in skill. Returns the true AUC as well."""
    n = 2 * per_kind
    signal = np.arange(n) >= per_kind
    case = rng.normal(0, np.sqrt(0.3), (studies, 1, 1, n))
    by_modality = rng.normal(0, np.sqrt(0.2), (studies, modalities, 1, n))
    by_reader = rng.normal(0, np.sqrt(0.2), (studies, 1, readers, n))
    rest = rng.normal(0, np.sqrt(0.3), (studies, modalities, readers, n))
    skill = (
        separation
        + reader_sd * rng.normal(size=(studies, 1, readers, 1))
        + 0.1 * rng.normal(size=(studies, modalities, readers, 1))
    )
    truth = stats.norm.cdf(separation / np.sqrt(2 + reader_sd**2 + 0.01))
    return case + by_modality + by_reader + rest + skill * signal, signal, truth


@pytest.mark.parametrize("readers", [5, 10])
def test_coverage_and_error_of_the_method(readers, record_property):
    """Roe-Metz studies: 93-97 % of intervals hold the true AUC; the test of no difference errs in 3-7 %."""
    rng = np.random.default_rng(2026)
    held = wrong = 0
    studies = 1000
    ratings, signal, truth = roe_metz(rng, studies, 2, readers, 40, 1.0)
    for one in ratings:
        merit = mrmc.auc_merit(one, signal, "delong")
        ends = mrmc.single(merit).interval()
        held += ends.low <= truth <= ends.high
        wrong += mrmc.difference(merit).p_value(0) < 0.05
    record_property("coverage", float(held / studies))
    record_property("type_1_error", float(wrong / studies))
    print(f"{readers} readers: coverage {held / studies:.3f}, type-I error {wrong / studies:.3f}")
    assert 0.93 <= held / studies <= 0.975
    assert 0.03 <= wrong / studies <= 0.07
