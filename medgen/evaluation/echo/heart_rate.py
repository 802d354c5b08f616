"""The heart rate that a video shows, beat by beat and by its period, beside that of the ECG over the very same seconds. bpm."""

from __future__ import annotations

import numpy as np

from medgen.evaluation.echo.phase import Beats, cycle_phase
from medgen.evaluation.statistics import Floats

SLOWEST, FASTEST = 30.0, 220.0


def spans(beats: Beats) -> list[tuple[float, float, int]]:
    """(first event, last event, intervals between) of the ejection onsets and of the end-systoles, where there is an interval."""
    return [(float(e[0]), float(e[-1]), len(e) - 1) for e in (beats.onset, beats.es) if len(e) > 1]


def video_rate(beats: Beats) -> float:
    """Beats per minute from the intervals between ejection onsets and between end-systoles; NaN without a whole interval."""
    found = spans(beats)
    seconds = sum(last - first for first, last, _ in found)
    return 60 * sum(count for *_, count in found) / seconds if seconds > 0 else float("nan")


def ecg_rate(r_peaks: Floats, beats: Beats) -> float:
    """The ECG's rate over exactly the seconds that `video_rate` rests on, so that an irregular rhythm is compared fairly."""
    found = spans(beats)
    seconds = sum(last - first for first, last, _ in found)
    if seconds <= 0 or len(r_peaks) < 2:
        return float("nan")
    passed = sum(float(np.diff(cycle_phase(r_peaks, np.array([first, last])))[0]) for first, last, _ in found)
    return 60 * passed / seconds


def mean_rate(r_peaks: Floats, duration: float) -> float:
    """The ECG's mean rate from frame 0 to `duration` s."""
    phase = cycle_phase(r_peaks, np.array([0.0, duration]))
    return float(60 * (phase[1] - phase[0]) / duration) if duration > 0 else float("nan")


def period_rate(volume: Floats, times: Floats) -> float:
    """Beats per minute from the first peak of the unbiased autocorrelation of `volume` [T]; NaN if the clip holds no whole period twice.

    It needs no single event to be found, so it checks `video_rate` on regular rhythms.
    """
    known = np.isfinite(volume)
    if known.sum() < 8:
        return float("nan")
    step = times[1] - times[0]
    curve = np.interp(times, times[known], volume[known])
    curve = curve - np.polyval(np.polyfit(times, curve, 1), times)
    n, total = len(curve), float((curve**2).mean())
    lags = np.arange(int(60 / FASTEST / step), min(int(60 / SLOWEST / step), n * 2 // 3) + 1)
    if len(lags) < 3 or total <= 0:
        return float("nan")
    similarity = np.array([(curve[lag:] * curve[: n - lag]).mean() / total for lag in lags])
    inner = similarity[1:-1]
    peaks = np.flatnonzero((inner >= similarity[:-2]) & (inner > similarity[2:]) & (inner > 0.4)) + 1
    if not len(peaks):
        return float("nan")
    best = peaks[similarity[peaks] >= similarity[peaks].max() - 0.15][0]  # the shortest of nearly equal ones, not its multiple
    before, here, after = similarity[best - 1 : best + 2]
    bend = before - 2 * here + after
    offset = 0.0 if abs(bend) < 1e-12 else float(np.clip((before - after) / (2 * bend), -0.5, 0.5))
    return float(60 / ((lags[best] + offset) * step))


def interval_pairs(beats: Beats, r_peaks: Floats) -> list[tuple[float, float]]:
    """(RR interval s, interval s between the two ejection onsets that follow its R peaks) for every RR that the clip shows whole.

    An R peak belongs to the first onset within 0.25 s behind it (0.05 s before at most); without one the interval is left out.
    """
    onset_of: dict[int, float] = {}
    for index, r in enumerate(r_peaks):
        behind = beats.onset[(beats.onset >= r - 0.05) & (beats.onset <= r + 0.25)]
        if len(behind):
            onset_of[index] = float(behind[0])
    pairs = zip(range(len(r_peaks) - 1), np.diff(r_peaks), strict=True)
    return [(float(rr), onset_of[i + 1] - onset_of[i]) for i, rr in pairs if i in onset_of and i + 1 in onset_of]
