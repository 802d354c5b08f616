"""An electrocardiogram in mV with named leads: what it is, cutting it in time, and deriving limb leads by Einthoven's law."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

LEADS = ("I", "II", "III", "aVR", "aVL", "aVF", "V1", "V2", "V3", "V4", "V5", "V6")
# Any two of the limb leads determine the rest: each is a lead as (a, b) in a·I + b·II (Einthoven, Goldberger).
LIMB = {"I": (1.0, 0.0), "II": (0.0, 1.0), "III": (-1.0, 1.0), "aVR": (-0.5, -0.5), "aVL": (1.0, -0.5), "aVF": (-0.5, 1.0)}
_NAMES = {name.upper(): name for name in LEADS}


class ECGError(ValueError):
    """An electrocardiogram that cannot be used; the message says which file or lead, why, and what would do."""


@dataclass(frozen=True)
class ECG:
    """`signal` [L,S] float32 in mV (NaN: not recorded), one row per name in `leads`, `rate` in Hz, `start` the second of sample 0."""

    signal: NDArray[np.float32]
    leads: tuple[str, ...]
    rate: float
    start: float = 0.0

    def __post_init__(self) -> None:
        if self.signal.ndim != 2 or self.signal.shape[0] != len(self.leads):
            raise ECGError(f"an ECG of {len(self.leads)} leads needs a signal [{len(self.leads)}, S], got {self.signal.shape}")
        if len(set(self.leads)) != len(self.leads):
            raise ECGError(f"leads {', '.join(self.leads)}: a lead is there twice")
        if not (np.isfinite(self.rate) and self.rate > 0):
            raise ECGError(f"sampling rate {self.rate}: expected a positive number of Hz")

    @property
    def seconds(self) -> float:
        """How long it is."""
        return self.signal.shape[1] / self.rate

    @property
    def times(self) -> NDArray[np.float64]:
        """Second of each sample, [S]."""
        return self.start + np.arange(self.signal.shape[1]) / self.rate


def lead_name(name: str) -> str | None:
    """One of LEADS from "ii", "AVF", "MLII", "Lead I (Einthoven)", "MDC_ECG_LEAD_V3" ...; None for anything else ("PLETH")."""
    word = re.sub(r"\(.*\)|^MDC_|ECG|EKG|LEAD|[\s_:.-]", "", name.strip().upper())
    return _NAMES.get(word) or _NAMES.get(re.sub("^ML?", "", word))  # MLII, MV5: as Holter recorders place them


def cut(ecg: ECG, start: float, seconds: float) -> ECG:
    """The part of `ecg` in [start, start + seconds) of its own clock. What lies outside the recording is absent, not zero.

    Raises `ECGError` if nothing of it was recorded.
    """
    first = max(0, round((start - ecg.start) * ecg.rate))
    last = min(ecg.signal.shape[1], round((start + seconds - ecg.start) * ecg.rate))
    if last <= first:
        end = ecg.start + ecg.seconds
        raise ECGError(
            f"seconds {start:g} to {start + seconds:g} were not recorded: the ECG runs from {ecg.start:g} to {end:g} s"
        )
    return replace(ecg, signal=ecg.signal[:, first:last], start=ecg.start + first / ecg.rate)


def derive_limb_leads(ecg: ECG) -> tuple[ECG, tuple[str, ...]]:
    """All six limb leads where two of them are there, by Einthoven's and Goldberger's laws (exact), and the names of those added."""
    there = [name for name in ecg.leads if name in LIMB]
    missing = tuple(name for name in LIMB if name not in there)
    if len(there) < 2 or not missing:
        return ecg, ()
    measured = ecg.signal[[ecg.leads.index(name) for name in there]]
    weights = np.array([LIMB[name] for name in missing]) @ np.linalg.pinv(np.array([LIMB[name] for name in there]))
    added = (weights @ measured).astype(np.float32)
    return replace(ecg, signal=np.concatenate([ecg.signal, added]), leads=(*ecg.leads, *missing)), missing
