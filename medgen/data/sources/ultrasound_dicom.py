"""A folder of ultrasound cines (DICOM US Multi-frame), at any depth, with or without suffix; facts in an optional labels.csv.

`labels.csv` has SOPInstanceUID or file_name, and any of view, ejection_fraction (percent), edv_ml, esv_ml, ecg (a WFDB stem or DICOM
waveform in this folder). An ECG is beat-synchronous only if both files name the same synchronised clock (PS3.3 C.7.4.2).
Single pictures and other modalities are passed over. Patient ids and UIDs become hashes; names and dates of birth are not read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from pydicom.dataset import Dataset

from medgen.data.dicom import DICOM_SUFFIXES, DicomError, is_dicom, read_header
from medgen.data.echo_join import clock_of
from medgen.data.echo_records import EchoRecord, EchoView, Pairing
from medgen.data.records import Split
from medgen.data.sources.base import (
    Quarantined,
    Records,
    SourceError,
    SourceOptions,
    as_age,
    as_echo_view,
    as_number,
    as_sex,
    as_time,
    hashed_split,
    read_rows,
)
from medgen.data.ultrasound_dicom import frame_count, frame_times, r_waves

_KEYS = ("SOPInstanceUID", "file_name")
_VIEW_WORDS = ("ViewName", "SeriesDescription", "ProtocolName", "ImageComments", "PerformedProtocolCodeMeaning")


def records(root: Path, options: SourceOptions) -> Records:
    """Every cine of a wanted or unnamed view."""
    files = [path for path in sorted(root.rglob("*")) if path.is_file() and _looks_like_dicom(path)]
    if not files:
        raise SourceError(f"{root} holds no DICOM file (.dcm, .dicom, .ima, or marked DICM)")
    labels = _labels(root / "labels.csv")
    for path in files:
        name = path.relative_to(root).as_posix()
        try:
            header = read_header(path)
        except DicomError as error:
            yield Quarantined(_hash("file", name), str(error))
            continue
        if header.get("Modality") != "US" or frame_count(header) < 2:
            continue
        row = labels.get(str(header.get("SOPInstanceUID") or ""), labels.get(name, {}))
        patient = _hash("patient", str(header.get("PatientID") or header.get("StudyInstanceUID") or name))
        record = cine_record(
            header,
            video=name,
            record_id=_hash("clip", str(header.get("SOPInstanceUID") or name)),
            patient_id=patient,
            study_id=_hash("study", str(header.get("StudyInstanceUID") or name)),
            split=hashed_split(patient, options),
            row=row,
        )
        if isinstance(record, EchoRecord) and row.get("ecg"):
            record = _with_ecg(record, header, row["ecg"], root)
        if isinstance(record, Quarantined) or record.view in options.views or record.view == "UNKNOWN":
            yield record


def cine_record(
    header: Dataset,
    *,
    video: str,
    record_id: str,
    patient_id: str,
    study_id: str,
    split: Split,
    row: Mapping[str, str],
    acquired: str | None = None,
) -> EchoRecord | Quarantined:
    """The record of a cine from its header and a table's `row` (view, ejection_fraction, edv_ml, esv_ml), without an ECG.

    `acquired` (ISO) is when frame 0 was taken, where a table knows it better than the header. Quarantined without a frame rate.
    """
    frames = frame_count(header)
    fps, times = frame_times(header, frames)
    if fps is None or not 1 <= fps <= 1000:
        return Quarantined(record_id, f"{video} says no frame time, cine rate or frame time vector")
    extra: dict[str, Any] = {"acquired": acquired or _acquired(header), "clock": clock_of(header), "even_frames": times is None}
    if r_peaks := r_waves(header):
        extra["r_peaks_s"] = list(r_peaks)
    return EchoRecord(
        record_id=record_id,
        patient_id=patient_id,
        study_id=study_id,
        video=video,
        view=as_echo_view(row["view"]) if row.get("view") else _view(header),
        fps=fps,
        frames=frames,
        split=split,
        ejection_fraction=as_number(row.get("ejection_fraction")),
        edv_ml=as_number(row.get("edv_ml")),
        esv_ml=as_number(row.get("esv_ml")),
        age=as_age(str(header.get("PatientAge") or "")),
        sex=as_sex(str(header.get("PatientSex") or "")),
        extra={key: value for key, value in extra.items() if value is not None},
    )


def _with_ecg(record: EchoRecord, header: Dataset, ecg: str, root: Path) -> EchoRecord:
    """The ECG the table names: beat-synchronous if it is a DICOM waveform on the cine's own synchronised clock."""
    offset = 0.0
    pairing: Pairing = "patient"
    path = root / ecg
    if path.is_file() and _looks_like_dicom(path):
        other = read_header(path)
        began, shown = _acquired(other), _acquired(header)
        if began and shown and clock_of(header) is not None and clock_of(other) == clock_of(header):
            offset = (datetime.fromisoformat(shown) - datetime.fromisoformat(began)).total_seconds()
            pairing = "beat_synchronous"
    return replace(record, ecg=ecg, ecg_offset=offset, pairing=pairing)


def _view(header: Dataset) -> EchoView:
    """From the view's code (CID 12226), or else from whatever words describe the series."""
    for item in header.get("ViewCodeSequence") or []:
        if (view := as_echo_view(str(item.get("CodeMeaning") or ""))) != "UNKNOWN":
            return view
    words = (as_echo_view(str(header.get(name) or "")) for name in _VIEW_WORDS)
    return next((view for view in words if view != "UNKNOWN"), "UNKNOWN")


def _acquired(header: Dataset) -> str | None:
    """When frame 0 was taken, ISO: acquisition, or else content, date and time."""
    moments = [str(header.get("AcquisitionDateTime") or "")]
    moments += [f"{header.get(f'{what}Date') or ''}{header.get(f'{what}Time') or ''}" for what in ("Acquisition", "Content")]
    return next((moment for moment in map(as_time, moments) if moment is not None), None)


def _looks_like_dicom(path: Path) -> bool:
    return path.suffix.lower() in DICOM_SUFFIXES or (not path.suffix and path.name != "DICOMDIR" and is_dicom(path))


def _labels(table: Path) -> dict[str, dict[str, str]]:
    """Rows by whichever identifier the table has."""
    if not table.is_file():
        return {}
    found: dict[str, dict[str, str]] = {}
    for row in read_rows(table, []):
        key = next((row[name] for name in _KEYS if row.get(name)), None)
        if key is None:
            raise SourceError(f"{table} needs one of the columns {', '.join(_KEYS)}; it has {', '.join(row)}")
        found[key] = row
    return found


def _hash(kind: str, text: str) -> str:
    return f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
