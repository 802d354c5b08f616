"""What one electrocardiogram, with the pulse wave it may have, is on disk: the record that an ECG manifest lists."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

from pydantic import ConfigDict

from medgen.data.records import Record, Split


@dataclass(frozen=True)
class ECGRecord(Record):
    """One recording. `ecg` (a WFDB stem or a DICOM waveform) and `ppg` (a WFDB stem) are POSIX paths relative to the manifest.

    Both share a clock: sample 0 of one was taken with sample 0 of the other. A monitor's record holds both and is named twice.
    `time` is when sample 0 was taken (ISO date and time). `truth` and `extra` must be JSON values.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")
    kind = "ecg"
    files = ("ecg", "ppg")
    record_id: str
    patient_id: str
    study_id: str
    ecg: str
    split: Split
    ppg: str | None = None
    time: str | None = None
    age: float | None = None
    sex: Literal["F", "M"] | None = None
    truth: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)

    def problems(self) -> Iterable[tuple[str, str]]:
        """Those of every record, and a time that is no ISO date and time."""
        yield from super().problems()
        if self.time is not None:
            try:
                datetime.fromisoformat(self.time)
            except ValueError:
                yield "time", "an ISO date and time such as 2180-05-06T12:30:00"
