"""A folder of DX or CR DICOM files, at any depth, with or without suffix; reports in an optional reports.csv.

`reports.csv` has `report` (or `findings` and `impression`) and one of SOPInstanceUID, StudyInstanceUID, AccessionNumber, file_name.
Files of other modalities are passed over; For Processing images are quarantined, because they are not meant to be seen.
Patient ids and UIDs become hashes, names are not read; the files' own names stay in the manifest, so they must name nobody.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from pydicom import Dataset

from medgen.data.dicom import DICOM_SUFFIXES, DicomError, is_dicom, read_header
from medgen.data.records import CXRRecord
from medgen.data.report_labels import label_text
from medgen.data.report_text import sections
from medgen.data.sources.base import (
    Quarantined,
    Records,
    SourceError,
    SourceOptions,
    as_age,
    as_date,
    as_sex,
    as_view,
    hashed_split,
    read_rows,
)

_KEYS = ("SOPInstanceUID", "StudyInstanceUID", "AccessionNumber", "file_name")


def records(root: Path, options: SourceOptions) -> Records:
    """Every readable film of a wanted or unnamed view; without a report for it, Image Comments serve as the impression."""
    files = [path for path in sorted(root.rglob("*")) if path.is_file() and _looks_like_dicom(path)]
    if not files:
        raise SourceError(f"{root} holds no DICOM file (.dcm, .dicom, .ima, or marked DICM)")
    reports = _reports(root / "reports.csv")
    for path in files:
        name = path.relative_to(root).as_posix()
        try:
            header = read_header(path)
        except DicomError as error:
            yield Quarantined(_hash("file", name), str(error))
            continue
        modality = header.get("Modality")
        if not modality:
            yield Quarantined(_hash("file", name), f"{name} says no modality (cut off?)")
        if modality not in ("DX", "CR"):
            continue
        if header.get("PresentationIntentType") == "FOR PROCESSING":
            yield Quarantined(_hash("file", name), f"{name} is For Processing: use the For Presentation image of this series")
            continue
        view = as_view(str(header.get("ViewPosition") or ""))
        if view == "UNKNOWN" or view in options.views:
            yield _record(name, header, reports, options)


def _looks_like_dicom(path: Path) -> bool:
    return path.suffix.lower() in DICOM_SUFFIXES or (not path.suffix and path.name != "DICOMDIR" and is_dicom(path))


def _reports(table: Path) -> dict[str, dict[str, str]]:
    """Report sections by whichever identifier the table has."""
    if not table.is_file():
        return {}
    reports: dict[str, dict[str, str]] = {}
    for row in read_rows(table, []):
        keys = [row[key] for key in _KEYS if row.get(key)]
        if not keys:
            raise SourceError(f"{table} needs one of the columns {', '.join(_KEYS)}; it has {', '.join(row)}")
        found = {name: row.get(name, "") for name in ("findings", "impression")}
        reports[keys[0]] = found if any(found.values()) else sections(row.get("report", ""))
    return reports


def _record(name: str, header: Dataset, reports: dict[str, dict[str, str]], options: SourceOptions) -> CXRRecord:
    identifiers = {key: name if key == "file_name" else str(header.get(key) or "") for key in _KEYS}
    report = next((reports[value] for value in identifiers.values() if value in reports), None)
    if report is None:
        report = {"impression": str(header.get("ImageComments") or "")}
    findings, impression = report.get("findings", ""), report.get("impression", "")
    patient = _hash("patient", str(header.get("PatientID") or header.get("StudyInstanceUID") or name))
    return CXRRecord(
        record_id=_hash("image", identifiers["SOPInstanceUID"] or name),
        patient_id=patient,
        study_id=_hash("study", identifiers["StudyInstanceUID"] or name),
        image=name,
        view=as_view(str(header.get("ViewPosition") or "")),
        findings=findings,
        impression=impression,
        split=hashed_split(patient, options),
        labels=label_text(f"{findings}\n\n{impression}"),
        age=as_age(str(header.get("PatientAge") or "")),
        sex=as_sex(str(header.get("PatientSex") or "")),
        study_date=as_date(str(header.get("StudyDate") or "")),
    )


def _hash(kind: str, text: str) -> str:
    return f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
