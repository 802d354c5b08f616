"""Where each heart beat is in a filtered electrocardiogram: R peaks of all leads together, and the ends of the T waves."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter1d

# QT in heart beats of every rate is near 0.37 s · RR^0.42 counted from R (between Bazett's 1/2 and Fridericia's 1/3).
_QT, _QT_POWER = 0.37, 0.42
_QT_TOLERANCE = 0.06  # seconds by which a beat's T end may differ from what the other beats lead to expect


def find_r_peaks(signal: NDArray[np.float32], rate: float) -> NDArray[np.int64]:
    """Samples [K] at which the QRS vector is largest, from `signal` [L,S] in mV, band-passed to about 0.5-40 Hz.

    neurokit2's detector (Makowski et al. 2021: steep parts against a moving average) runs on the root mean square over the leads: it
    does not care for electrical axis, inverted leads or which leads there are. Waves much smaller and slower than the QRS
    complexes are then dropped, and a gap twice as long as the others is searched again.
    """
    import neurokit2

    size = np.sqrt((signal.astype(np.float64) ** 2).mean(0))
    pad = round(rate)
    if len(size) <= pad or not size.any():
        return np.zeros(0, dtype=np.int64)
    # The detector's shortest RR is 0.3 s as it comes, and a short moving average follows the wide complexes of pacing.
    options = {"gradthreshweight": 1.5, "mindelay": 0.25, "avgwindow": 1.2}
    padded = np.pad(size, pad, mode="reflect")
    found = neurokit2.ecg_findpeaks(padded, sampling_rate=round(rate), method="neurokit", **options)["ECG_R_Peaks"] - pad
    reach = round(0.06 * rate)
    peaks = np.unique([_highest(size, int(p) - reach, int(p) + reach + 1) for p in found if 0 <= p < len(size)]).astype(np.int64)
    if not len(peaks):
        return peaks
    steepness = size * gaussian_filter1d(np.sqrt((np.gradient(signal, axis=1) ** 2).mean(0)), 0.02 * rate)
    heights = np.array([steepness[max(0, p - reach) : p + reach + 1].max() for p in peaks])
    peaks = peaks[heights > 0.16 * np.median(heights)]
    return _search_gaps(peaks, size, steepness, 0.4 * float(np.median(heights)), rate)


def _highest(values: NDArray[np.float64], first: int, last: int) -> int:
    first = max(0, first)
    return first + int(np.argmax(values[first:last]))


def _search_gaps(
    peaks: NDArray[np.int64], size: NDArray[np.float64], steepness: NDArray[np.float64], least: float, rate: float
) -> NDArray[np.int64]:
    """`peaks` and, in each gap of more than 1.7 usual intervals, the steepest wave if it is as steep as QRS complexes are."""
    if len(peaks) < 3:
        return peaks
    usual, apart, reach = float(np.median(np.diff(peaks))), round(0.25 * rate), round(0.06 * rate)
    added = []
    for before, after in pairwise(peaks):
        if after - before > 1.7 * usual and after - before > 2 * apart:
            p = _highest(steepness, before + apart, after - apart)
            if steepness[p] > least:
                added.append(_highest(size, p - reach, p + reach + 1))
    return np.unique([*peaks, *added]).astype(np.int64)


def find_t_ends(signal: NDArray[np.float32], rate: float, r_peaks: NDArray[np.int64]) -> NDArray[np.float64]:
    """Seconds [K] from sample 0 at which each beat's T wave ends, NaN where none is found; `signal` [L,S] in mV, band-passed.

    The tangent method (Lepeschkin & Surawicz 1952): where the steepest tangent after the T peak meets the baseline, on each beat's
    first principal component over the leads. Beats whose QT is out of line with the others' are measured again near where
    theirs would be, and given up (NaN) if that fails.
    """
    r = r_peaks / rate
    if len(r) == 0:
        return np.zeros(0)
    intervals = np.diff(r)
    usual = float(np.median(intervals)) if len(intervals) else 0.8
    following = np.append(intervals, usual)
    scale = (0.5 * np.append(usual, intervals) + 0.5 * usual) ** _QT_POWER
    first = np.array([_t_end(signal, rate, *beat, (0.5, 1.05)) for beat in zip(r, following, _QT * scale)])
    if not np.isfinite(first).any():
        return np.full(len(r), np.nan)
    expected = float(np.nanmedian(first / scale)) * scale
    ends = first.copy()
    for i, (beat, rr) in enumerate(zip(r, following)):
        if not abs(first[i] - expected[i]) <= _QT_TOLERANCE:
            again = _t_end(signal, rate, beat, rr, expected[i], (0.55, 0.95))
            ends[i] = again if abs(again - expected[i]) <= _QT_TOLERANCE else np.nan
    return r + ends


def _t_end(
    signal: NDArray[np.float32], rate: float, r: float, rr: float, expected: float, peak_between: tuple[float, float]
) -> float:
    """Seconds from R to the T end of one beat, or NaN. The T peak is sought at `peak_between` times `expected` seconds after R."""
    begin = r + min(0.09 + 0.04 * min(rr, 1.0), 0.6 * expected)
    first, last = int(begin * rate), int((r + min(1.45 * expected, rr - 0.07)) * rate)
    if first < 0 or last > signal.shape[1] or last - first < 0.08 * rate:
        return np.nan
    tail = max(3, round(0.04 * rate))
    wave = signal[:, first:last] - np.median(signal[:, last - tail : last], axis=1, keepdims=True)
    component = np.linalg.svd(wave, full_matrices=False)[2][0].astype(np.float64)
    component = gaussian_filter1d(component, 0.012 * rate)
    component -= np.median(component[-tail:])
    offset = first / rate - r
    low = max(0, int((peak_between[0] * expected - offset) * rate))
    high = min(len(component) - 3, int((peak_between[1] * expected - offset) * rate) + 1)
    if high - low < 3:
        return np.nan
    peak = low + int(np.argmax(np.abs(component[low:high])))
    component *= np.sign(component[peak])
    slope = np.gradient(component)
    steepest = peak + int(np.argmin(slope[peak : peak + round(0.14 * rate)]))
    if slope[steepest] >= 0:
        return np.nan
    after = component[steepest + round(0.06 * rate) : steepest + round(0.12 * rate)]
    baseline = float(np.median(after)) if len(after) >= 3 else 0.0
    run = (component[steepest] - baseline) / -slope[steepest]
    return (first + steepest + run) / rate - r if 0 <= run < 0.12 * rate else np.nan
