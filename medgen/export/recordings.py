"""The ECG that an echo clip was made from, if it may be released: only a simulated or generated recording that says so in its header."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medgen.data.ecg_files import read_ecg
from medgen.data.ecg_leads import ECGError, lead_name
from medgen.export.source import ExportError, Made
from medgen.sampling.case_files import example_ecgs, find_file
from medgen.sampling.cases import CaseError

_MARK = "SYNTHETIC"
MISSING = -32768  # WFDB's invalid sample of 16 bits, and ours in DICOM


@dataclass(frozen=True)
class Recording:
    """`samples` [S,L] int16 as stored (MISSING: not recorded), `microvolts` [L] of one step, `leads`, `rate` in Hz.

    `start`: second of the recording at which the clip begins. `sha256`: of its signal.
    """

    samples: NDArray[np.int16]
    microvolts: tuple[float, ...]
    leads: tuple[str, ...]
    rate: float
    start: float
    sha256: str

    @property
    def millivolts(self) -> NDArray[np.float64]:
        """[L,S], NaN where nothing was recorded."""
        values = np.where(self.samples == MISSING, np.nan, self.samples.astype(np.float64)) * np.array(self.microvolts) / 1000
        return np.ascontiguousarray(values.T)


def recording_of(made: Made, root: Path | None) -> tuple[Recording | None, str]:
    """The recording behind a clip, or None and why it is not released. `root`: the folder below which the cases' recordings lie.

    Raises `ExportError` if it is there but not the one that the clip was made from.
    """
    text = made.line.get("ecg")
    if text is None:
        return None, "the clip was made without an ECG"
    if root is None and text not in example_ecgs():
        return None, "--ecg-root does not say where the cases' recordings lie"
    try:
        path = find_file(str(text), root)
        stem = path.with_suffix("") if path.suffix == ".hea" else path
        if not stem.with_name(stem.name + ".hea").is_file():
            return None, "it is no WFDB record"
        signal = read_ecg(stem).signal
    except (CaseError, ECGError) as error:
        raise ExportError(f"case {made.line['case_id']!r}: its ECG: {error}") from None
    if hashlib.sha256(np.ascontiguousarray(signal).tobytes()).hexdigest() != made.line.get("ecg_sha256"):
        raise ExportError(
            f"case {made.line['case_id']!r}: {text} is not the recording that the clip was made from (another SHA-256)"
        )
    record = _digital(stem)
    if not any(comment.startswith(_MARK) for comment in record.comments):
        return None, f"its header does not say {_MARK} (as medgen's simulated recordings do): it may be a patient's"
    return _recording(record, made), ""


def _digital(stem: Path) -> Any:
    import wfdb

    return wfdb.rdrecord(str(stem), physical=False)


def _recording(record: Any, made: Made) -> Recording:
    kept = [i for i, name in enumerate(record.sig_name) if lead_name(name)]
    samples = np.asarray(record.d_signal)[:, kept].astype(np.int64)
    samples = np.where(samples == MISSING, MISSING, samples - np.array([record.baseline[i] for i in kept]))
    if abs(samples).max() > -MISSING or any(str(record.units[i]).lower() not in ("mv", "uv") for i in kept):
        raise ExportError(f"case {made.line['case_id']!r}: its recording is not of 16 bits in mV or µV")
    unit = [1000.0 if str(record.units[i]).lower() == "mv" else 1.0 for i in kept]
    return Recording(
        samples.astype(np.int16),
        tuple(u / float(record.adc_gain[i]) for u, i in zip(unit, kept, strict=True)),
        tuple(str(lead_name(record.sig_name[i])) for i in kept),
        float(record.fs),
        float(made.line.get("ecg_start") or 0.0),
        str(made.line["ecg_sha256"]),
    )
