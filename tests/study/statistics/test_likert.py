"""Cumulative-link models against R's `ordinal` on the wine data of Randall 1989, and their error with readers who differ."""

import numpy as np
import pytest

from medgen.study.statistics.likert import cumulative_link, ordinal_mixed

# Bitterness of wine (Randall 1989) as in table 1 of Christensen's tutorials: rows are bottles 1-8, columns judges 1-9.
WINE = np.array(
    [
        [int(rating) for rating in row]
        for row in ("212323121", "323232122", "313343223", "432232232", "425332233", "435234332", "554535234", "544334344")
    ]
)
WARM, CONTACT = np.repeat([0.0, 1.0], 4), np.tile(np.repeat([0.0, 1.0], 2), 2)
DESIGN = np.stack([WARM, CONTACT], axis=1)


def test_proportional_odds_as_in_r_ordinal():
    """clm(rating ~ temp + contact): 2.5031 and 1.5278, thresholds −1.3444 1.2508 3.4669 5.0064, log-likelihood −86.49192."""
    fit = cumulative_link(WINE.ravel(), np.repeat(DESIGN, 9, axis=0))
    assert [effect.value for effect in fit.effects] == pytest.approx([2.5031, 1.5278], abs=1e-3)
    assert fit.thresholds == pytest.approx((-1.3444, 1.2508, 3.4669, 5.0064), abs=1e-3)
    assert fit.log_likelihood == pytest.approx(-86.49192, abs=1e-5)


def test_mixed_model_as_in_r_ordinal():
    """clmm(rating ~ temp + contact + (1|judge)): 3.063 and 1.835, judge variance 1.29, log-likelihood −81.53 (adaptive quadrature)."""
    counts = np.zeros((9, 8, 5))
    for judge in range(9):
        for bottle in range(8):
            counts[judge, bottle, WINE[bottle, judge] - 1] += 1
    fit = ordinal_mixed(counts, DESIGN)
    print(fit)
    assert [effect.value for effect in fit.effects] == pytest.approx([3.063, 1.835], abs=0.01)
    assert fit.thresholds == pytest.approx((-1.624, 1.513, 4.229, 6.089), abs=0.015)
    assert fit.reader_sd**2 == pytest.approx(1.29, abs=0.03)
    assert fit.log_likelihood == pytest.approx(-81.53, abs=0.03)
    assert fit.converged


def likert_counts(rng, readers, cases, effect, slope_sd, intercept_sd=0.8):
    """Counts [J,2,5] of readers who use the scale differently and differ in how they take the synthetic arm."""
    cuts = np.array([-2.0, -0.7, 0.7, 2.0])
    shift = rng.normal(0, intercept_sd, (readers, 1, 1)) + np.array([0.0, 1.0])[:, None] * (
        effect + rng.normal(0, slope_sd, (readers, 1, 1))
    )
    ratings = (rng.logistic(size=(readers, 2, cases)) + shift)[..., None] > cuts
    return np.stack([(ratings.sum(-1) == k).sum(-1) for k in range(5)], axis=-1).astype(float)


def test_readers_who_differ_are_not_mistaken_for_precision():
    """8 readers, 40 cases an arm, slopes spread by .8: without random slopes a null effect is 'found' far too often."""
    rng = np.random.default_rng(7)
    wrong = {False: 0, True: 0}
    count = 12
    for _ in range(count):
        counts = likert_counts(rng, 8, 40, 0.0, 0.8)
        for slopes in wrong:
            wrong[slopes] += ordinal_mixed(counts, np.array([[0.0], [1.0]]), slopes).p_values[0] < 0.05
    assert wrong[True] < wrong[False]
    assert wrong[True] <= 3


def test_one_category_has_no_odds():
    with pytest.raises(ValueError, match="all ratings are the same"):
        ordinal_mixed(np.ones((3, 2, 1)), np.array([[0.0], [1.0]]))
