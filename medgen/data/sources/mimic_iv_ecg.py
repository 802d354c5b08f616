"""MIMIC-IV-ECG (PhysioNet): 10 s twelve-lead WFDB records with the recorder's own measurements and words.

```
ROOT/record_list.csv             subject_id,study_id,file_name,ecg_time,path
ROOT/machine_measurements.csv    subject_id,study_id,cart_id,ecg_time,report_0..report_17,bandwidth,filtering,rr_interval,p_onset,...
ROOT/files/p1000/p10000032/s40689238/40689238.{hea,dat}
```
The records' leads are in the order I, II, III, aVR, aVF, aVL, V1-V6: only their names say which is which.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from medgen.data.ecg_records import ECGRecord
from medgen.data.sources.base import (
    Quarantined,
    Records,
    SourceOptions,
    as_id,
    as_number,
    as_time,
    hashed_split,
    one_file,
    read_rows,
)

_MEASURED = ("rr_interval", "p_onset", "p_end", "qrs_onset", "qrs_end", "t_end", "p_axis", "qrs_axis", "t_axis")  # ms, degrees
_UNMEASURED = 29999  # what the recorder writes where it found no wave


def records(root: Path, options: SourceOptions) -> Records:
    """Every recording of the list that is there; patients are split by hash, as in `mimic_iv_echo`."""
    table = one_file(root, "record_list.csv*", "*/record_list.csv*")
    home = table.parent
    said = _measurements(home)
    for row in read_rows(table, ["subject_id", "study_id", "ecg_time", "path"]):
        path = PurePosixPath(row["path"].removesuffix(".hea"))
        name = as_id(row["study_id"] or path.name)
        if path.is_absolute() or ".." in path.parts:
            yield Quarantined(name, f"path outside the data set: {row['path']}")
            continue
        absent = [suffix for suffix in (".hea", ".dat") if not (home / f"{path}{suffix}").is_file()]
        if absent:
            yield Quarantined(name, f"no {path}{absent[0]}")
            continue
        patient = f"p{row['subject_id']}"
        yield ECGRecord(
            record_id=name,
            patient_id=patient,
            study_id=f"s{row['study_id']}",
            ecg=(home.relative_to(root) / path).as_posix(),
            split=hashed_split(patient, options),
            time=as_time(row["ecg_time"]),
            extra=said.get(row["study_id"], {}),
        )


def _measurements(home: Path) -> dict[str, dict[str, object]]:
    """The recorder's statements ("machine_report") and numbers ("machine_measurements") by study; nothing without its table."""
    tables = sorted(home.glob("machine_measurements.csv*"))
    found: dict[str, dict[str, object]] = {}
    for row in read_rows(tables[0], ["study_id", "report_0"]) if tables else ():
        report = [text for n in range(18) if (text := row.get(f"report_{n}", ""))]
        numbers = {name: value for name in _MEASURED if (value := as_number(row.get(name))) is not None and value != _UNMEASURED}
        found[row["study_id"]] = {"machine_report": report, "machine_measurements": numbers}
    return found
