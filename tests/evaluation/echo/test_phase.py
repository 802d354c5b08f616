"""ED at the R peak, ES at the end of T: found between frames, missed beats counted, chance measured."""

from __future__ import annotations

import numpy as np
import pytest

from medgen.evaluation.echo.phase import Timed, cycle_phase, find_beats, smooth_volume, timing, timing_errors


@pytest.mark.parametrize("rhythm", ["sinus", "af", "pvc", "paced"])
@pytest.mark.parametrize("fps", [20.0, 50.0])
def test_beats_lie_where_the_heart_has_them(beating, rhythm, fps):
    errors = {"ed": [], "es": []}
    for index in range(12):
        volume, times, r_peaks, t_ends = beating(index, rhythm, frames=int(3.2 * fps), fps=fps)
        beats = find_beats(volume, times)
        errors["ed"].append(timing_errors(beats.ed, r_peaks, times[-1], "ed"))
        errors["es"].append(timing_errors(beats.es, t_ends, times[-1], "es"))
    for kind, parts in errors.items():
        pooled = np.concatenate(parts)
        assert np.isnan(pooled).mean() < (0.12 if rhythm in ("af", "pvc") else 0.02), kind  # premature beats hardly fill
        limit = 0.06 if rhythm == "paced" else 0.035  # a paced septum contracts late
        assert np.nanmedian(np.abs(pooled)) < limit, kind


def test_every_beat_found_is_one(beating):
    for index in range(10):
        volume, times, r_peaks, t_ends = beating(index)
        beats = find_beats(volume, times)
        assert all(np.abs(r_peaks - t).min() < 0.12 for t in beats.ed)
        assert all(np.abs(t_ends - t).min() < 0.12 for t in beats.es)
        assert (beats.edv > beats.esv.max()).all()


def test_ejection_volumes_are_those_of_the_curve(beating):
    volume, times, *_ = beating(3, noise=0.0)
    beats = find_beats(volume, times)
    assert beats.edv.mean() == pytest.approx(volume.max(), rel=0.03)
    assert beats.esv.mean() == pytest.approx(volume.min(), rel=0.03)


def test_still_or_short_videos_have_no_beats():
    assert len(find_beats(np.full(32, 90.0), np.arange(32) / 20).ed) == 0
    assert len(find_beats(np.array([1.0, 2.0, 1.0]), np.arange(3) / 20).es) == 0
    assert len(find_beats(np.full(32, np.nan), np.arange(32) / 20).es) == 0


def test_a_frame_without_a_ventricle_is_bridged(beating):
    volume, times, *_ = beating(1)
    holed = volume.copy()
    holed[10] = np.nan
    np.testing.assert_allclose(smooth_volume(holed, times), smooth_volume(volume, times), atol=0.12 * np.ptp(volume))


def test_missed_beats_are_counted_and_edges_left_out():
    errors = timing_errors(np.array([0.52, 1.49]), np.array([0.05, 0.5, 1.0, 1.5, 1.95]), 2.0, "ed")
    np.testing.assert_allclose(errors, [0.02, np.nan, -0.01])  # 0.05 and 1.95 are too near to the ends
    assert np.isnan(timing_errors(np.empty(0), np.array([0.5, 1.0]), 2.0, "es")).all()


def test_agreement_is_far_above_chance_only_with_the_right_ecg(beating):
    clips = [beating(index, rate=55 + 5 * index) for index in range(14)]
    found = [find_beats(volume, times).es for volume, times, *_ in clips]

    def timed(references):
        rows = zip(found, references, clips, strict=True)
        return timing([Timed(es, ref, c[1][-1], 0.05, str(i), "es") for i, (es, ref, c) in enumerate(rows)])

    own, other = timed([c[3] for c in clips]), timed([clips[(i + 5) % 14][3] for i in range(14)])
    assert own.hits.value > 0.95
    assert own.chance_hits.high < 0.6
    assert own.bias_ms.value == pytest.approx(20, abs=12)  # of the filter, known and reported
    assert other.hits.low < other.chance_hits.high + 0.05
    assert other.median_ms.value > 3 * own.median_ms.value


def test_phase_counts_beats_and_goes_on_beyond_them():
    np.testing.assert_allclose(cycle_phase(np.array([0.0, 1.0, 1.5]), np.array([-0.5, 0.5, 1.25, 2.0])), [-0.5, 0.5, 1.5, 3.0])
    assert np.isnan(cycle_phase(np.array([1.0]), np.array([1.0]))).all()
