"""The volume curve follows the ECG's events, and the shape has exactly the volume it says."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from medgen.digital.heart import PROFILE_AREA, beat_volumes, draw_heart, mitral_opening, move, profile, volume_curve
from medgen.digital.rhythm import Rhythm, draw_rhythm

TIMES = np.arange(0, 4, 0.002)


def beating(rhythm: str = "sinus", rate: float = 70, ef: float = 60) -> tuple:
    heart = replace(draw_heart(1, 0, rhythm), heart_rate=rate, ejection_fraction=ef)
    return heart, draw_rhythm(3, rhythm, rate, 0, 4, heart.variability)


def inner_beats(rhythm: Rhythm) -> list:
    return [beat for beat in rhythm.beats if beat.r > 0 and beat.r + beat.rr < 4]


@pytest.mark.parametrize("rate", [40, 70, 110, 140])
def test_the_ventricle_is_fullest_at_the_r_peak_and_emptiest_at_the_end_of_the_t_wave(rate: float) -> None:
    heart, rhythm = beating(rate=rate)
    volume = volume_curve(heart, beat_volumes(heart, rhythm), TIMES)
    for beat in inner_beats(rhythm):
        systole = (TIMES > beat.r - 0.1) & (TIMES < beat.r + beat.rr - 0.1)
        assert abs(TIMES[systole][volume[systole].argmax()] - beat.r) < 0.01
        assert abs(TIMES[systole][volume[systole].argmin()] - beat.t_end) < 0.01


def test_the_volume_hardly_changes_while_all_valves_are_shut() -> None:
    heart, rhythm = beating()
    volume = volume_curve(heart, beat_volumes(heart, rhythm), TIMES)
    for beat in inner_beats(rhythm):
        for start, seconds in ((beat.r, heart.contraction_delay), (beat.t_end, heart.relaxation)):
            shut = (TIMES > start) & (TIMES < start + seconds)
            assert np.ptp(volume[shut]) < 0.02 * heart.edv_ml
            assert mitral_opening(heart, beat_volumes(heart, rhythm), TIMES)[shut].max() < 0.35


def test_a_steady_heart_ejects_its_fraction() -> None:
    heart, rhythm = beating(ef=35)
    assert np.mean([b.ejection_fraction for b in beat_volumes(heart, rhythm)]) == pytest.approx(35, abs=1)
    volume = move(heart, rhythm, TIMES).volume_ml
    assert 100 * (1 - volume.min() / volume.max()) == pytest.approx(35, abs=2)


def test_a_premature_beat_ejects_little_and_the_next_one_more() -> None:
    heart, rhythm = beating("pvc", rate=70, ef=50)
    beats = beat_volumes(heart, rhythm)
    early = [i for i, b in enumerate(beats[1:-1], 1) if b.beat.kind == "pvc"]
    assert early
    for i in early:
        assert beats[i].ejection_fraction < 35 < 50 < beats[i + 1].ejection_fraction


def test_atrial_fibrillation_has_no_atrial_kick() -> None:
    """In the last tenth of a second before the R peak a sinus beat fills quickly, a fibrillating one hardly."""

    def last_filling(kind: str) -> float:
        heart, rhythm = beating(kind, rate=60, ef=60)
        beats = beat_volumes(heart, rhythm)
        chosen = [b for b in inner_beats(rhythm) if b.rr > 0.8]
        shares = [np.diff(volume_curve(heart, beats, np.array([b.r + b.rr - 0.11, b.r + b.rr - 0.01])))[0] for b in chosen]
        return float(np.mean(shares)) / heart.edv_ml

    assert last_filling("sinus") > 4 * max(last_filling("af"), 0.002)


def test_the_shape_has_the_volume_by_area_and_length() -> None:
    heart, rhythm = beating("paced", rate=70)
    motion = move(heart, rhythm, TIMES)
    s = (np.arange(4000) + 0.5) / 4000
    area = (motion.septal + motion.lateral) * motion.length * profile(s).mean()
    assert profile(s).mean() == pytest.approx(PROFILE_AREA)
    np.testing.assert_allclose(motion.volume_ml, 8 * area**2 / (3 * np.pi * motion.length) / 1000, rtol=1e-6)
    assert motion.length.max() - motion.length.min() > 5, "the mitral ring must descend"
    assert motion.wall.max() > 1.2 * motion.wall.min(), "the wall must thicken"


def test_times_that_the_rhythm_does_not_cover_are_an_error() -> None:
    heart, rhythm = beating()
    with pytest.raises(ValueError, match="do not cover"):
        volume_curve(heart, beat_volumes(heart, rhythm), np.array([-50.0, 0.0]))
