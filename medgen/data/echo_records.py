"""What one echocardiogram clip, with the ECG it may have, is on disk: the record that an echo manifest lists."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from pydantic import ConfigDict

from medgen.data.records import Record, Split

EchoView = Literal["A4C", "A2C", "PLAX", "PSAX", "UNKNOWN"]
ECHO_VIEWS: tuple[EchoView, ...] = get_args(EchoView)[:-1]  # those with an index; UNKNOWN is -1
Pairing = Literal["beat_synchronous", "patient", "none"]


@dataclass(frozen=True)
class EchoRecord(Record):
    """One clip. `video`, `ecg` (a WFDB stem or a DICOM waveform) and `annotations` (.npz) are POSIX paths relative to the manifest.

    `fps` is the true frame rate in Hz, `frames` how many there are; `ejection_fraction` is in percent, volumes in mL.
    Frame 0 was taken at second `ecg_offset` of the ECG's own clock, which means something only if `pairing` is "beat_synchronous";
    "patient" says that the ECG is this patient's but shows other heart beats. `truth` and `extra` must be JSON values.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")
    kind = "echo"
    files = ("video", "ecg", "annotations")
    record_id: str
    patient_id: str
    study_id: str
    video: str
    view: EchoView
    fps: float
    frames: int
    split: Split
    ejection_fraction: float | None = None
    edv_ml: float | None = None
    esv_ml: float | None = None
    ecg: str | None = None
    ecg_offset: float = 0.0
    pairing: Pairing = "none"
    annotations: str | None = None
    age: float | None = None
    sex: Literal["F", "M"] | None = None
    truth: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)

    def problems(self) -> Iterable[tuple[str, str]]:
        """Those of every record, and numbers that no clip has."""
        yield from super().problems()
        if not 1 <= self.fps <= 1000:
            yield "fps", "frames per second from 1 to 1000"
        if self.frames < 1:
            yield "frames", "at least 1"
        if self.ejection_fraction is not None and not 0 <= self.ejection_fraction <= 100:
            yield "ejection_fraction", "percent from 0 to 100"
        for column in ("edv_ml", "esv_ml"):
            if (volume := getattr(self, column)) is not None and not 0 < volume < 2000:
                yield column, "millilitres, more than 0"
        if self.edv_ml is not None and self.esv_ml is not None and self.esv_ml > self.edv_ml:
            yield "esv_ml", f"no more than edv_ml ({self.edv_ml:g})"
        if not math.isfinite(self.ecg_offset):
            yield "ecg_offset", "seconds"
        if (self.ecg is None) != (self.pairing == "none"):
            yield "pairing", '"none" without an ECG' if self.ecg is None else '"beat_synchronous" or "patient" with an ECG'
