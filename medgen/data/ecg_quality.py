"""Whether a lead shows an electrocardiogram, and in which unit: flat, saturated and noisy leads, µV or counts taken for mV."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy.signal import butter, sosfiltfilt

FLAT = 0.02  # mV from the lowest to the highest 0.5 %: less is an electrode that is off
LARGEST = 15.0  # mV; no surface ECG swings more
# Units met in files that say mV, and mV per unit. Counts: 200 per mV is what MIT's and MIMIC's recorders write.
_UNITS = {"mV": 1.0, "uV": 1e-3, "ADC counts of 5 uV": 5e-3, "V": 1e3}


def _swing(row: NDArray[np.float64]) -> float:
    """From the lowest to the highest 0.5 % of the samples."""
    low, high = np.percentile(row, (0.5, 99.5))
    return float(high - low)


def find_unit(signal: NDArray[np.float64]) -> tuple[str, float]:
    """The unit that makes `signal` [L,S] as large as an ECG is, and mV per unit. Sizes that mV can explain stay mV.

    The usual lead swings by 1.6 mV; the limits of "mV" (0.03 to 15) are far from what 1,000 times more or less would give.
    """
    swings = [swing for swing in map(_swing, signal) if swing > 0]
    size = float(np.median(swings)) if swings else 1.0
    if 0.03 <= size <= LARGEST or size < 1e-4:
        return "mV", 1.0
    name = min((n for n in _UNITS if n != "mV"), key=lambda n: abs(np.log(size * _UNITS[n] / 1.6)))
    return (name, _UNITS[name]) if 0.1 <= size * _UNITS[name] <= LARGEST else ("mV", 1.0)


def judge_lead(row: NDArray[np.float64], recorded: NDArray[np.bool_], rate: float) -> str:
    """good, flat, saturated, noisy or absent, for `row` [S] in mV of which the samples `recorded` [S] were measured.

    Absent: less than half was measured. Saturated: stuck at one of its extremes for a fiftieth of the time, or beyond 15 mV. Noisy:
    what is left above 40 Hz (muscle, mains, a loose electrode) is a tenth of the whole, typical sample to full swing.
    """
    if recorded.mean() < 0.5:
        return "absent"
    seen = row[recorded]
    quick = sosfiltfilt(butter(2, 0.5, "highpass", fs=rate, output="sos"), row)[recorded]
    swing = _swing(quick)
    still = np.abs(np.diff(seen)) < 1e-9
    if swing < FLAT or still.mean() > 0.8:
        return "flat"
    stuck = np.concatenate([[False], still])
    if max((stuck & (seen == seen.max())).mean(), (stuck & (seen == seen.min())).mean()) > 0.02 or swing > LARGEST:
        return "saturated"
    fast = sosfiltfilt(butter(3, min(40.0, 0.4 * rate), "highpass", fs=rate, output="sos"), row)[recorded]
    return "noisy" if 1.4826 * float(np.median(np.abs(fast))) > 0.1 * swing else "good"


def constant_stretches(signal: NDArray[np.float64], rate: float) -> NDArray[np.bool_]:
    """Which samples [L,S] of `signal` [L,S] belong to at least 1.5 s without any change: padding, not a heart at rest."""
    out = np.zeros(signal.shape, dtype=bool)
    for row, mask in zip(signal, out):
        edges = np.flatnonzero(np.diff(row, prepend=np.nan, append=np.nan) != 0)
        for first, last in pairwise(edges):
            if last - first >= 1.5 * rate:
                mask[first:last] = True
    return out
