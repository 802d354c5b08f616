"""Whose film it is, and where a biomarker goes, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from medgen.evaluation.progression.identity import retrieval
from medgen.evaluation.progression.trends import annualised_rate, monotonicity


def test_films_like_their_own_baseline_are_found():
    rng = np.random.default_rng(0)
    patients = [f"p{i}" for i in range(150)]
    baselines = 10 + rng.normal(size=(150, 12))  # what all films share does not count
    near = baselines + 0.1 * rng.normal(size=(150, 12))
    found = retrieval(near, patients, baselines, patients)
    assert found.gallery == 100
    assert found.rank1.mean() == 1
    assert found.cosine.min() > 0.9
    stranger = retrieval(rng.permutation(baselines), patients, baselines, patients)
    assert stranger.rank1.mean() < 0.1
    assert abs(stranger.cosine.mean()) < 0.1


def test_the_gallery_is_drawn_by_lot_and_the_same_again():
    rng = np.random.default_rng(1)
    patients, baselines = [f"p{i}" for i in range(30)], rng.normal(size=(30, 2))
    queries = baselines + 0.5 * rng.normal(size=(30, 2))
    few, again, all_of_them = (retrieval(queries, patients, baselines, patients, most) for most in (3, 3, 100))
    assert few.gallery == 3
    assert all_of_them.gallery == 30
    assert few.rank1.tolist() == again.rank1.tolist()
    assert few.rank1.sum() > all_of_them.rank1.sum()


def test_several_films_of_a_patient_are_one_answer():
    baselines = np.array([[1.0, 0], [0, 1.0], [-1.0, 0], [0, -1.0]])
    found = retrieval([[0.1, 1.0]], ["a"], baselines, ["a", "a", "b", "b"])
    assert found.rank1.tolist() == [1]
    assert found.gallery == 2
    with pytest.raises(ValueError, match="1 of the patients asked for have no baseline, 'c' first"):
        retrieval([[0.1, 1.0]], ["c"], baselines, ["a", "a", "b", "b"])


def test_a_rate_is_per_year_and_leaves_out_what_is_unknown():
    days = np.array([0.0, 365.25, 730.5])
    values = np.array([[1.0, 3.0, 5.0], [1.0, np.nan, 5.0], [2.0, 2.0, 2.0], [np.nan, 1.0, np.nan]])
    assert annualised_rate(days, values).tolist() == pytest.approx([2, 2, 0, np.nan], nan_ok=True)


def test_one_way_and_back():
    times = [0.0, 10.0, 11.0, 50.0]
    found = monotonicity(times, [[1.0, 2, 3, 9], [9.0, 5, 4, 1], [1.0, 3, 2.5, 4], [1.0, 1, 1, 1]])
    assert found.kendall.tolist() == pytest.approx([1, -1, 4 / 6, np.nan], nan_ok=True)  # five pairs agree, one does not
    assert found.spearman.tolist() == pytest.approx([1, -1, 0.8, np.nan], nan_ok=True)
    assert found.violations.tolist() == pytest.approx([0, 0, 1 / 3, 0])
    assert monotonicity(times, [[1.0, 3, 2.5, 4]], noise=0.6).violations.tolist() == [0]
    with pytest.raises(ValueError, match="at least two times"):
        monotonicity([1.0], [[1.0]])
