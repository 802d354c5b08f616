"""The digital pulse wave: one wave per beat, late by the transit time, weak after a short interval."""

from __future__ import annotations

import numpy as np
import pytest

from medgen.digital.ppg import draw_vessels, simulate_ppg
from medgen.digital.rhythm import draw_rhythm


def wave_height(signal: np.ndarray, foot: float, rate: float) -> float:
    first = int(foot * rate)
    return float(signal[first : first + int(0.3 * rate)].max() - signal[first])


@pytest.mark.parametrize("kind", ["sinus", "af", "pvc", "paced"])
def test_every_beat_sends_one_wave_late_by_the_transit_time(kind: str) -> None:
    rhythm = draw_rhythm(3, kind, 75, 0.0, 20.0)  # type: ignore[arg-type]
    signal, feet = simulate_ppg(rhythm, 3, 125.0, 0.0, 20.0)
    assert signal.dtype == np.float32 and signal.shape == (2500,) and np.isfinite(signal).all()
    beats = np.array([beat.r for beat in rhythm.beats])
    delays = feet - beats[np.searchsorted(beats, feet - 0.1) - 1]
    assert abs(len(feet) - sum(0 <= beat.r + 0.23 < 20 for beat in rhythm.beats)) <= 1
    assert 0.12 < np.median(delays) < 0.4


def test_a_premature_beat_sends_a_small_wave() -> None:
    heights: dict[str, list[float]] = {"pvc": [], "sinus": []}
    for seed in range(6):
        rhythm = draw_rhythm(seed, "pvc", 60, 0.0, 20.0)
        signal, feet = simulate_ppg(rhythm, seed, 125.0, 0.0, 20.0, motion=0.0)
        beats = [beat for beat in rhythm.beats if beat.r > 0.5][: len(feet) - 2]
        for beat in beats:
            foot = feet[feet > beat.r + 0.1]
            if len(foot) and foot[0] < 19.5:
                heights[beat.kind].append(wave_height(signal, float(foot[0]), 125.0))
    assert np.median(heights["pvc"]) < 0.6 * np.median(heights["sinus"])


def test_stiff_arteries_are_fast_and_reflect_early() -> None:
    vessels = [draw_vessels(seed) for seed in range(200)]
    transit, reflection = (np.array([getattr(v, name) for v in vessels]) for name in ("transit", "reflection_delay"))
    assert np.corrcoef(transit, reflection)[0, 1] > 0.8


def test_the_same_seed_is_the_same_finger_and_refusals() -> None:
    rhythm = draw_rhythm(0, "sinus", 70, 0.0, 5.0)
    assert np.array_equal(simulate_ppg(rhythm, 1, end=5.0)[0], simulate_ppg(rhythm, 1, end=5.0)[0])
    assert not np.array_equal(simulate_ppg(rhythm, 1, end=5.0)[0], simulate_ppg(rhythm, 2, end=5.0)[0])
    with pytest.raises(ValueError, match="start < end"):
        simulate_ppg(rhythm, 1, start=5.0, end=5.0)
