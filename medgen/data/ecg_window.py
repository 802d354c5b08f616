"""The part of a prepared ECG that a clip sees: twelve rows in a fixed order with masks for what is not there, at real seconds."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medgen.data.ecg import LEADS, PreparedECG

MARGIN_SECONDS = 1.0
"""ECG before the first frame and after the last: the beat that a frame belongs to began earlier."""


@dataclass(frozen=True)
class EcgWindow:
    """`signal` [12,S] mV in LEADS order, 0 where `lead_mask` [12] or `sample_mask` [S] is False.

    `start`: second of sample 0 on the clock of the window's first frame; `rate` in Hz.
    """

    signal: NDArray[np.float32]
    lead_mask: NDArray[np.bool_]
    sample_mask: NDArray[np.bool_]
    start: float
    rate: float


def ecg_window(prepared: PreparedECG, first: float, last: float, margin: float = MARGIN_SECONDS) -> EcgWindow:
    """`prepared` from `margin` seconds before second `first` of its clock to `margin` after `last`: those of first and last frame.

    Always round((last - first + 2 margin) * rate) samples; leads and samples that it does not have are masked.
    """
    count = round((last - first + 2 * margin) * prepared.rate)
    skipped = round((first - margin - prepared.start) * prepared.rate)
    signal, recorded = np.zeros((len(LEADS), count), np.float32), np.zeros((len(LEADS), count), bool)
    inside = slice(max(0, -skipped), max(0, min(count, prepared.signal.shape[1] - skipped)))
    if inside.stop > inside.start:
        for row, name in zip(prepared.signal, prepared.leads):
            part = row[skipped + inside.start : skipped + inside.stop]
            signal[LEADS.index(name), inside] = np.nan_to_num(part)
            recorded[LEADS.index(name), inside] = np.isfinite(part)
    start = prepared.start + skipped / prepared.rate - first  # -margin, to the nearest sample
    return EcgWindow(signal, np.any(recorded, axis=1), np.any(recorded, axis=0), start, prepared.rate)
