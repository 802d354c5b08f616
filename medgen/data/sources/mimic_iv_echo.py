"""MIMIC-IV-ECHO (PhysioNet): DICOM cines with EF and volumes where they were measured, joined with MIMIC-IV-ECG where that lies beside.

```
ROOT/[mimic-iv-echo/[1.0/]]echo-record-list.csv     subject_id,study_id,acquisition_datetime,dicom_filepath
ROOT/[mimic-iv-echo/[1.0/]]echo-study-list.csv      study_id,...,measurement_id          } optional
ROOT/[mimic-iv-echo/[1.0/]]structured-measurement.csv[.gz]  measurement_id,measurement,result }
ROOT/[mimic-iv-ecg/[1.0/]]record_list.csv           subject_id,study_id,file_name,ecg_time,path    optional
```
The two sets share patients and hospital time, not a clock: pairs are "patient". Views are not given; `views.csv` (dicom_filepath,view,
for example a view classifier's) may name them.
"""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from medgen.data.dicom import DicomError, read_header
from medgen.data.echo_join import TimedECG, join_ecgs
from medgen.data.echo_records import EchoRecord
from medgen.data.sources.base import Quarantined, Records, SourceOptions, as_time, hashed_split, one_file, read_rows
from medgen.data.sources.ultrasound_dicom import cine_record
from medgen.data.ultrasound_dicom import frame_count

_RESULTS = {  # the best measurement first
    "ejection_fraction": ("biplane_lvef", "lvef_3d", "lvef"),
    "edv_ml": ("biplane_lvedv",),
    "esv_ml": ("biplane_lvesv",),
}


def records(root: Path, options: SourceOptions) -> Records:
    """Every cine of the list of a wanted or unnamed view; a patient's clips come together, each with the nearest ECG."""
    table = one_file(root, *(f"{above}echo-record-list.csv*" for above in ("", "*/", "*/*/")))
    home = table.parent
    measured, views = _measurements(home), _views(home)
    ecgs = _ecgs(root)
    for row in read_rows(table, ["subject_id", "study_id", "acquisition_datetime", "dicom_filepath"]):
        found = _record(row, home, root, measured, views, options)
        if isinstance(found, EchoRecord):
            if found.view != "UNKNOWN" and found.view not in options.views:
                continue
            there = [ecg for ecg in ecgs.get(found.patient_id, ()) if (root / f"{ecg.ecg}.hea").is_file()]
            (found,), _ = join_ecgs([found], there, options.ecg_hours)
        if found is not None:
            yield found


def _record(
    row: dict[str, str],
    home: Path,
    root: Path,
    measured: dict[str, dict[str, str]],
    views: dict[str, str],
    options: SourceOptions,
) -> EchoRecord | Quarantined | None:
    below, patient = row["dicom_filepath"].lstrip("/"), f"p{row['subject_id']}"
    name = Path(below).stem
    path = next((p for p in (home / below, home / "files" / below) if p.is_file()), None)
    if ".." in Path(below).parts:
        return Quarantined(name, f"path outside the data set: {below}")
    if path is None:
        return Quarantined(name, f"no video at {below} (nor below files/)")
    try:
        header = read_header(path)
    except DicomError as error:
        return Quarantined(name, str(error))
    if frame_count(header) < 2:
        return None  # a still: measurements, Doppler spectra
    facts = measured.get(row["study_id"], {}) | ({"view": views[below]} if below in views else {})
    return cine_record(
        header,
        video=path.relative_to(root).as_posix(),
        record_id=name,
        patient_id=patient,
        study_id=f"s{row['study_id']}",
        split=hashed_split(patient, options),
        row=facts,
        acquired=as_time(row["acquisition_datetime"]),
    )


def _measurements(home: Path) -> dict[str, dict[str, str]]:
    """EF (percent) and volumes (mL) by study."""
    studies, results = sorted(home.glob("echo-study-list.csv*")), sorted(home.glob("structured[-_]measurement.csv*"))
    if not studies or not results:
        return {}
    study_of = {
        row["measurement_id"]: row["study_id"] for row in read_rows(studies[0], ["study_id"]) if row.get("measurement_id")
    }
    wanted = {name for names in _RESULTS.values() for name in names}
    found: dict[str, dict[str, str]] = {}
    for row in read_rows(results[0], ["measurement_id", "measurement", "result"]):
        if row["measurement"] in wanted and row["measurement_id"] in study_of:
            found.setdefault(study_of[row["measurement_id"]], {})[row["measurement"]] = row["result"]
    return {
        study: {column: next((values[name] for name in names if values.get(name)), "") for column, names in _RESULTS.items()}
        for study, values in found.items()
    }


def _views(home: Path) -> dict[str, str]:
    table = home / "views.csv"
    if not table.is_file():
        return {}
    return {row["dicom_filepath"].lstrip("/"): row["view"] for row in read_rows(table, ["dicom_filepath", "view"])}


def _ecgs(root: Path) -> dict[str, list[TimedECG]]:
    """MIMIC-IV-ECG's recordings by patient, paths relative to `root`; nothing if the set is not there."""
    tables = [path for above in ("", "*/", "*/*/") for path in root.glob(f"{above}record_list.csv")]
    found: dict[str, list[TimedECG]] = {}
    for table in sorted(tables)[:1]:
        for row in read_rows(table, ["subject_id", "ecg_time", "path"]):
            if ".." in Path(row["path"]).parts or (time := as_time(row["ecg_time"])) is None:
                continue
            patient, path = f"p{row['subject_id']}", (table.parent / row["path"]).relative_to(root).as_posix()
            found.setdefault(patient, []).append(TimedECG(path, patient, datetime.fromisoformat(time)))
    return found
