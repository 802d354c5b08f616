"""Rhythms of the digital heart: rates, irregularity, premature beats, and the order of events within a beat."""

from __future__ import annotations

import numpy as np
import pytest

from medgen.digital.rhythm import KINDS, Rhythm, RhythmError, draw_rhythm


def intervals(rhythm: Rhythm) -> np.ndarray:
    return np.array([beat.rr for beat in rhythm.beats])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("heart_rate", [40, 75, 150])
def test_beats_cover_the_interval_at_the_asked_rate(kind: str, heart_rate: float) -> None:
    rhythm = draw_rhythm(1, kind, heart_rate, 0.0, 60.0)  # type: ignore[arg-type]
    assert rhythm.beats[0].r <= -2 and rhythm.beats[-1].r >= 62
    assert 60 / intervals(rhythm).mean() == pytest.approx(heart_rate, rel=0.08)
    for beat, following in zip(rhythm.beats, rhythm.beats[1:]):
        assert beat.r + beat.rr == pytest.approx(following.r) and following.previous_rr == pytest.approx(beat.rr)
        assert beat.r < beat.t_end < following.r
        assert beat.p is None or beat.p < beat.r


def test_the_same_seed_draws_the_same_rhythm_and_another_seed_another() -> None:
    assert draw_rhythm(3, "af", 80, 0, 5) == draw_rhythm(3, "af", 80, 0, 5) != draw_rhythm(4, "af", 80, 0, 5)


def test_sinus_rhythm_breathes() -> None:
    rhythm = draw_rhythm(5, "sinus", 60, 0, 120, variability=0.06)
    r = np.array([beat.r for beat in rhythm.beats])
    assert intervals(rhythm).std() / intervals(rhythm).mean() == pytest.approx(0.06, abs=0.015)
    assert np.corrcoef(rhythm.respiration(r), intervals(rhythm))[0, 1] < -0.5  # inspiration shortens RR
    steady = draw_rhythm(5, "sinus", 60, 0, 120, variability=0)
    assert intervals(steady).std() < 0.003


def test_atrial_fibrillation_has_no_p_waves_and_no_pattern() -> None:
    rhythm = draw_rhythm(6, "af", 80, 0, 120)
    rr = intervals(rhythm)
    assert all(beat.p is None for beat in rhythm.beats)
    assert rr.std() / rr.mean() > 0.15
    assert abs(np.corrcoef(rr[:-1], rr[1:])[0, 1]) < 0.25


@pytest.mark.parametrize("seed", range(6))
def test_a_premature_beat_comes_early_and_its_pause_compensates(seed: int) -> None:
    rhythm = draw_rhythm(seed, "pvc", 70, 0, 3, variability=0)
    early = [beat for beat in rhythm.beats if beat.kind == "pvc"]
    assert any(0 <= beat.r <= 3 for beat in early)
    for beat in early:
        assert beat.p is None
        assert beat.previous_rr < 0.75 * 60 / 70
        assert beat.previous_rr + beat.rr == pytest.approx(2 * 60 / 70, rel=0.03)


def test_qt_shortens_as_the_heart_quickens() -> None:
    qt = [np.mean([beat.t_end - beat.r for beat in draw_rhythm(7, "sinus", rate, 0, 20).beats]) for rate in (45, 75, 140)]
    assert qt[0] > qt[1] > qt[2] and 0.36 < qt[0] < 0.5 and 0.2 < qt[2] < 0.3


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"kind": "asystole"}, "not one of"),
        ({"heart_rate": 400}, "30 to 200"),
        ({"end": 0.0}, "start < end"),
        ({"variability": 3}, "0.2"),
    ],
)
def test_an_impossible_rhythm_is_refused(change: dict[str, object], said: str) -> None:
    with pytest.raises(RhythmError, match=said):
        draw_rhythm(**{"seed": 1, "kind": "sinus", "heart_rate": 60, "start": 0.0, "end": 5.0} | change)  # type: ignore[arg-type]
