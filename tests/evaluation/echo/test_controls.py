"""Shifted ECGs, irregular beats and one condition at a time, on volume curves of digital hearts (no pictures, no network)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from medgen.digital.heart import draw_heart, move
from medgen.digital.rhythm import draw_rhythm
from medgen.evaluation.echo import controls
from medgen.evaluation.echo.function import ejection_fraction
from medgen.evaluation.echo.heart_rate import period_rate, video_rate
from medgen.evaluation.echo.measure import Reading
from medgen.evaluation.echo.phase import find_beats
from medgen.evaluation.echo.videos import Clip


def clip(
    index: int, rate: float = 75.0, fraction: float = 50.0, later: float = 0.0, rhythm: str = "sinus", frames: int = 48, **line
):
    """A clip whose beats come `later` s than those of heart `index` would."""
    heart = draw_heart(5, index, rhythm)
    heart = type(heart)(**{**heart.__dict__, "ejection_fraction": fraction, "heart_rate": rate})
    times = np.arange(frames) / 20
    driven = draw_rhythm(heart.seed, heart.rhythm, rate, -1.0, 4.0, 0.02)
    volume = move(heart, driven, times - later).volume_ml
    beats = find_beats(volume, times)
    values = ejection_fraction(volume, times, beats)
    grey, bend = np.full(frames, 0.3), np.full(frames, 0.01)
    reading = Reading(
        times,
        volume,
        beats,
        *values,
        video_rate(beats),
        period_rate(volume, times),
        np.zeros((frames, 2), np.float32),
        grey,
        bend,
    )
    r, t = (np.array([getattr(b, name) + later for b in driven.beats]) for name in ("r", "t_end"))
    return Clip(f"c{index}", Path("none"), str(index), r, t, fraction, reading, line=line)


def test_a_generator_that_follows_the_shift_passes_and_one_that_ignores_it_fails():
    follow, ignore = [], []
    for index in range(6):
        base = clip(index, pair_id=f"p{index}", purpose="population")
        for delta in (-0.2, 0.25):
            line = {"pair_id": f"p{index}", "shift_s": delta, "purpose": "shift"}
            follow += [base, clip(index, later=delta, **line)]
            ignore += [base, clip(index, **line)]
    good, bad = controls.shift_test(follow), controls.shift_test(ignore)
    assert good.moved.value == 1.0
    assert good.slope == pytest.approx(1, abs=0.05)
    assert good.pairs == 12
    assert bad.moved.value == 0.0
    assert abs(bad.slope) < 0.05
    assert bad.unmoved == 0.0
    assert controls.shift_test([clip(0)]) is None


def test_irregular_beats_correlate_within_clips():
    clips = [clip(index, rate=80 + index, rhythm="af", frames=110) for index in range(5)]
    result = controls.intervals(clips)
    assert result.agreement.r.value > 0.95
    assert result.within > 0.95
    assert result.found > 0.85
    swapped = [
        Clip(c.name, c.path, c.group, other.r_peaks, other.t_ends, c.asked_ef, c.reading)
        for c, other in zip(clips, clips[1:] + clips[:1], strict=True)
    ]
    result = controls.intervals(swapped)
    assert result is None or not result.within > 0.8


def test_one_condition_moves_one_measure():
    clips = []
    for index in range(4):
        pair = {"pair_id": f"o{index}", "purpose": "one"}
        clips += [
            clip(index, variant="base", **pair),
            clip(index, rate=105, variant="heart_rate", **pair),
            clip(index, fraction=30, variant="ejection_fraction", **pair),
            clip(index, later=0.2, variant="ecg_shift", shift_s=0.2, **pair),
        ]
    effects = {(e.variant, e.measure): e for e in controls.one_at_a_time(clips)}
    assert effects["heart_rate", "heart rate (bpm)"].asked == pytest.approx(30, abs=3)
    for (variant, measure), effect in effects.items():
        asked = (variant, measure) in {
            ("heart_rate", "heart rate (bpm)"),
            ("ejection_fraction", "ejection fraction (points)"),
            ("ecg_shift", "ES lag (ms)"),
        }
        assert (effect.asked > 0) == asked
        assert (effect.error if asked else effect.change.value) < effect.tolerance, (variant, measure)
    frozen = [replace(c, reading=clips[4 * (i // 4)].reading) for i, c in enumerate(clips)]  # nothing follows what is asked
    effects = {(e.variant, e.measure): e for e in controls.one_at_a_time(frozen)}
    assert effects["ejection_fraction", "ejection fraction (points)"].error > 15
    assert controls.one_at_a_time([clip(0)]) == ()


def test_phase_against_the_own_ecg_needs_one():
    assert controls.phase([clip(0)], own=True).es is None
    assert controls.phase([clip(i) for i in range(3)]).es.hits.value == 1.0
