"""An electrocardiogram in mV with named leads: read from WFDB or DICOM, written as WFDB, cut in time, derived by Einthoven's law."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

LEADS = ("I", "II", "III", "aVR", "aVL", "aVF", "V1", "V2", "V3", "V4", "V5", "V6")
# Of I, II, III and the augmented leads any two that differ determine the rest: each row is a lead as (a, b) in a·I + b·II.
_LIMB = {"I": (1.0, 0.0), "II": (0.0, 1.0), "III": (-1.0, 1.0), "aVR": (-0.5, -0.5), "aVL": (1.0, -0.5), "aVF": (-0.5, 1.0)}
_NAMES = {name.upper(): name for name in LEADS}
_TO_MV = {"mv": 1.0, "millivolt": 1.0, "uv": 1e-3, "µv": 1e-3, "μv": 1e-3, "microvolt": 1e-3, "v": 1e3, "volt": 1e3, "nv": 1e-6}
_MAX_SAMPLES = 200_000_000  # all leads together; a header that says more is broken or hostile


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
            raise ECGError(
                f"an ECG of leads {', '.join(self.leads)} needs a signal [{len(self.leads)}, S], got {self.signal.shape}"
            )
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
    """One of LEADS from "ii", "Lead II", "AVF", "MLII", "Lead I (Einthoven)" ...; None for anything else (a monitor's "PLETH")."""
    word = re.sub(r"^(ECG|LEAD|EKG)[\s_:-]*|\(.*\)|\s", "", name.strip().upper())
    return _NAMES.get(word) or (_NAMES.get(word[1:]) if word.startswith("M") else None)  # MLII: a modified lead II


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
    there = [name for name in ecg.leads if name in _LIMB]
    missing = [name for name in LEADS if name in _LIMB and name not in there]
    if len(there) < 2 or not missing:
        return ecg, ()
    basis = np.array([_LIMB[name] for name in there])
    measured = ecg.signal[[ecg.leads.index(name) for name in there]]
    added = np.array([_LIMB[name] for name in missing]) @ np.linalg.pinv(basis) @ measured
    return replace(ecg, signal=np.concatenate([ecg.signal, added.astype(np.float32)]), leads=(*ecg.leads, *missing)), tuple(
        missing
    )
