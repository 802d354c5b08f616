"""Steadiness in time, on grey curves that are known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from medgen.evaluation.echo import temporal
from medgen.evaluation.echo.measure import Reading
from medgen.evaluation.echo.phase import Beats
from medgen.evaluation.echo.video_fidelity import describe
from medgen.evaluation.echo.videos import Clip

EMPTY = np.empty(0)


def clip(seed: int, frames: int = 128, bend: float = 0.01, jumps: tuple[int, ...] = (), brighter: float = 0.0, **line) -> Clip:
    """A clip whose flicker is `bend`, tripled at `jumps`, and whose brightness rises by the share `brighter`."""
    rng = np.random.default_rng(seed)
    times = np.arange(frames) / 20
    curve = bend * (1 + 0.1 * rng.standard_normal(frames))
    for place in jumps:
        curve[place - 1 : place + 1] *= 3
    curve[[0, -1]] = np.nan
    grey = 0.3 * (1 + brighter * np.linspace(0, 1, frames))
    volume = 100 + 20 * np.sin(2 * np.pi * times)
    beats = Beats(EMPTY, EMPTY, EMPTY, EMPTY, EMPTY)
    features = rng.normal(seed % 3, 1, (frames, 6)).astype(np.float32)
    reading = Reading(times, volume, beats, 40.0, 120.0, 80.0, 60.0, 60.0, features, grey, curve)
    return Clip(str(seed), Path("none"), str(seed), EMPTY, EMPTY, 40.0, reading, line={"case_id": str(seed), **line})


def test_flicker_is_compared_with_real_clips():
    result = temporal.flicker([clip(i, bend=0.02) for i in range(5)], [clip(i) for i in range(5, 10)])
    assert result.ratio == pytest.approx(2, rel=0.05)
    assert temporal.flicker([clip(0)], [clip(1)]) is None


def test_seams_that_flicker_are_found_and_smooth_ones_are_not():
    places = (32, 64, 96)
    smooth = temporal.seams([clip(i) for i in range(6)], lambda _: places)
    rough = temporal.seams([clip(i, jumps=places) for i in range(6)], lambda _: places)
    assert smooth.image.value == pytest.approx(1, abs=0.05)
    assert rough.image.value == pytest.approx(3, abs=0.15)
    assert rough.seams == 18
    assert temporal.seams([clip(0, frames=32)], lambda _: ()) is None


def test_drift_is_seen_in_long_clips_only():
    result = temporal.drift([*(clip(i, brighter=0.4) for i in range(3)), clip(9, frames=32)], 64)
    assert result.clips == 3
    assert 20 < result.brightness.value < 40
    assert result.volume.value < 3
    assert temporal.drift([clip(0, frames=32)], 64) is None


def test_seeds_that_give_the_same_heart_show():
    real = [clip(i, frames=32) for i in range(12)]
    same = [clip(3, frames=32) for _ in range(3)]
    result = temporal.diversity(same, real)
    assert result.share.value == pytest.approx(0, abs=1e-6)
    assert result.clips == 3
    varied = [clip(i, frames=32, case_id="one") for i in range(6)]
    assert temporal.diversity(varied, real).share.value > 0.5
    assert temporal.diversity(real, real) is None


def test_a_clip_is_described_by_what_it_shows_and_how_it_moves():
    still = np.tile(np.array([[1.0, -2.0]], np.float32), (8, 1))
    np.testing.assert_allclose(describe(still), [1, -2, 0, 0])
    moving = still + np.arange(8, dtype=np.float32)[:, None] % 2
    np.testing.assert_allclose(describe(moving), [1.5, -1.5, 1, 1])
