"""Intervals and splits that respect who belongs to whom."""

from __future__ import annotations

import numpy as np
import pytest

from medgen.evaluation.statistics import group_bootstrap, halves, interval, wilson

GROUPS = [f"p{i // 3}" for i in range(60)]


def test_halves_share_no_patient_and_lose_no_image():
    for first, second in halves(GROUPS, seed=1, count=5):
        assert not {GROUPS[i] for i in first} & {GROUPS[i] for i in second}
        assert sorted([*first, *second]) == list(range(60))
        assert len(first) == len(second) == 30


def test_halves_differ_between_draws_and_repeat_with_the_seed():
    draws = [tuple(first) for first, _ in halves(GROUPS, 1, 5)]
    assert len(set(draws)) == 5
    assert draws == [tuple(first) for first, _ in halves(GROUPS, 1, 5)]


def test_related_images_widen_the_interval():
    rng = np.random.default_rng(0)
    values = np.repeat(rng.normal(size=40), 5)  # five equal images of each patient
    (grouped,) = group_bootstrap(lambda rows: np.array([values[rows].mean()]), [f"p{i // 5}" for i in range(200)], 0)
    (single,) = group_bootstrap(lambda rows: np.array([values[rows].mean()]), [str(i) for i in range(200)], 0)
    assert grouped.high - grouped.low > 1.7 * (single.high - single.low)
    assert grouped.high - grouped.low == pytest.approx(2 * 1.96 * values.std() / 40**0.5, rel=0.25)


def test_half_samples_give_the_standard_error_of_the_whole():
    values = np.random.default_rng(1).normal(size=400)
    replicates = [values[first].mean() for first, _ in halves([str(i) for i in range(400)], 0, 400)]
    estimate = interval(values.mean(), replicates, 400)
    assert estimate.high - estimate.low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.2)


def test_intervals_stay_within_bounds_and_say_when_they_cannot_be_given():
    estimate = interval(0.99, [0.9, 1.0, 1.1], 10, (0.0, 1.0))
    assert estimate.high == 1.0
    assert np.isnan(interval(0.5, [0.5], 10).low)


def test_wilson_interval_of_textbook_counts():
    estimate = wilson(81, 263)  # Newcombe 1998, table I
    assert (estimate.low, estimate.high) == (pytest.approx(0.2553, abs=1e-4), pytest.approx(0.3662, abs=1e-4))
    assert np.isnan(wilson(0, 0).value)
