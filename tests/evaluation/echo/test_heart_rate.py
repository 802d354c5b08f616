"""Heart rate beat by beat and by period, and beat-to-beat intervals of irregular rhythms."""

from __future__ import annotations

import numpy as np
import pytest

from medgen.evaluation.echo.heart_rate import ecg_rate, interval_pairs, mean_rate, period_rate, video_rate
from medgen.evaluation.echo.phase import Beats, find_beats

EMPTY = np.empty(0)


@pytest.mark.parametrize("rate", [40, 60, 80, 100, 120, 140])
def test_the_rate_is_that_of_the_ecg_within_two_beats(beating, rate):
    for index in range(3):
        volume, times, r_peaks, _ = beating(index, frames=72 if rate < 80 else 40, rate=rate)
        beats = find_beats(volume, times)
        assert video_rate(beats) == pytest.approx(ecg_rate(r_peaks, beats), abs=2.5)
        assert period_rate(volume, times) == pytest.approx(rate, abs=0.08 * rate)


def test_what_is_too_short_is_not_guessed(beating):
    volume, times, r_peaks, _ = beating(0, frames=14, rate=50)
    beats = find_beats(volume, times)
    assert np.isnan(video_rate(beats))
    assert np.isnan(ecg_rate(r_peaks, beats))
    assert np.isnan(period_rate(volume, times))


def test_the_mean_rate_counts_fractions_of_beats():
    assert mean_rate(np.array([-0.5, 0.5, 1.5, 2.5]), 2.0) == pytest.approx(60)
    assert np.isnan(mean_rate(np.array([0.5]), 2.0))


def test_intervals_of_atrial_fibrillation_are_told_apart(beating):
    pairs = []
    for index in range(8):
        volume, times, r_peaks, _ = beating(index, "af", frames=100)
        pairs += interval_pairs(find_beats(volume, times), r_peaks)
    rr, seen = np.array(pairs).T
    assert len(pairs) > 20
    assert rr.std() > 0.05
    assert np.corrcoef(rr, seen)[0, 1] > 0.97


def test_an_interval_needs_both_of_its_ejections():
    beats = Beats(EMPTY, EMPTY, np.array([0.58, 2.07]), EMPTY, EMPTY)
    assert interval_pairs(beats, np.array([0.5, 1.3, 2.0])) == []
    beats = Beats(EMPTY, EMPTY, np.array([0.58, 1.39, 2.07]), EMPTY, EMPTY)
    assert [round(seen, 2) for _, seen in interval_pairs(beats, np.array([0.5, 1.3, 2.0]))] == [0.81, 0.68]
