"""The film of a clip: nothing is drawn on the image, the cursor is where the frame's second is, and a browser plays it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from medgen.data.video import write_video
from medgen.sampling.echo_pictures import _CURSOR, _MARK, _PEAK, _TRACE, Strip, film, tile

RATE = 100.0
SECONDS = np.arange(-0.2, 1.8, 1 / RATE)
SIGNAL = 1.2 * np.exp(-(((SECONDS[:, None] - np.array([0.1, 0.9, 1.7])) / 0.015) ** 2)).sum(1)
STRIP = Strip(1.6, "75 bpm   EF 55 % asked", "II", SIGNAL, RATE, -0.2, [0.1, 0.9])
TIMES = np.arange(16) / 10
FRAMES = np.random.default_rng(0).random((16, 40, 50))


def columns(picture: np.ndarray, colour: tuple[int, int, int], tolerance: int = 60) -> np.ndarray:
    """Columns of an RGB picture in which `colour` is there."""
    return np.flatnonzero((np.abs(picture.astype(int) - np.array(colour)).max(-1) < tolerance).any(0))


def test_the_strip_lies_below_the_image_and_nothing_on_it() -> None:
    with_ecg, without = film(FRAMES, TIMES, STRIP), film(FRAMES, TIMES, Strip(1.6, "no ECG"))
    height, width = 40 * 7, 50 * 7
    assert with_ecg.shape == (16, height + 96, width, 3)
    assert with_ecg.shape[1] % 2 == with_ecg.shape[2] % 2 == 0
    assert np.array_equal(with_ecg[:, :height], without[:, :height])
    assert (with_ecg[:, :height].max(-1) == with_ecg[:, :height].min(-1)).all(), "the image stays grey"
    assert np.abs(with_ecg[:, :height, :, 0].mean((1, 2)) / 255 - FRAMES.mean((1, 2))).max() < 0.01


def test_the_cursor_is_at_the_second_of_its_frame() -> None:
    strips = film(FRAMES, TIMES, STRIP)[:, 280:]
    for strip, second in zip(strips, TIMES):
        found = columns(strip[40:], _CURSOR, 12)
        assert abs(found.mean() - second / 1.6 * 350) <= 1.5


def test_r_peaks_are_ticked_where_the_trace_is_highest_and_every_frame_says_synthetic() -> None:
    strips = film(FRAMES, TIMES, STRIP)[:, 280:]
    for peak in STRIP.r_peaks:
        x = peak / 1.6 * 350
        assert np.abs(columns(strips[-1][18:32], _PEAK) - x).min() < 3
        assert np.abs(columns(strips[-1][30:46], _TRACE, 90) - x).min() < 3
    assert all(columns(strip[:18], _MARK)[-1] > 330 for strip in strips)


def test_a_gap_in_the_recording_is_a_gap_in_the_trace() -> None:
    signal = np.where((SECONDS > 0.4) & (SECONDS < 0.8), np.nan, SIGNAL)
    strip = film(FRAMES[:1], TIMES[:1], Strip(1.6, "x", "II", signal, RATE, -0.2))[0, 280:]
    drawn = columns(strip[30:], _TRACE, 90)
    assert not ((drawn > 0.42 / 1.6 * 350) & (drawn < 0.78 / 1.6 * 350)).any()
    assert len(drawn) > 200


def test_a_long_clip_turns_the_page() -> None:
    times = np.array([0.0, 5.9, 6.1, 12.0])
    strips = film(FRAMES[:4], times, Strip(13.0, "no ECG"))[:, 280:]
    assert [round(columns(strip[40:], _CURSOR, 12).mean()) for strip in strips] == pytest.approx(
        [(second % 6.0) / 6.0 * 350 for second in times], abs=3
    )


def test_odd_sizes_become_even_and_large_frames_stay_as_they_are() -> None:
    assert film(np.zeros((1, 33, 321)), np.zeros(1), STRIP).shape == (1, 130, 322, 3)
    assert tile([np.zeros((10, 20), np.uint8)] * 2).size == (384, 96)


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium (Debian's package) is not installed")
def test_a_browser_plays_it(tmp_path: Path) -> None:
    write_video(tmp_path / "clip.mp4", film(FRAMES, TIMES, STRIP), 10.0, "libx264")
    script = """
      const video = document.querySelector("video"), say = () => document.body.dataset.found = JSON.stringify(
        {ready: video.readyState, width: video.videoWidth, height: video.videoHeight, seconds: video.duration, error: video.error});
      video.addEventListener("canplaythrough", say); video.addEventListener("error", say);"""
    (tmp_path / "page.html").write_text(
        f'<body><video src="clip.mp4" muted autoplay loop preload="auto"></video><script>{script}</script></body>'
    )
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    flags += " --disable-component-update --disable-sync --virtual-time-budget=20000"
    command = ["chromium", *flags.split(), f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    shown = subprocess.run([*command, (tmp_path / "page.html").as_uri()], capture_output=True, text=True, timeout=120)
    match = re.search(r'data-found="([^"]*)"', shown.stdout)
    assert match, shown.stdout[-500:]
    found = json.loads(match[1].replace("&quot;", '"'))
    assert found == {"ready": 4, "width": 350, "height": 376, "seconds": 1.6, "error": None}
