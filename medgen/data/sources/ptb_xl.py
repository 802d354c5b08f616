"""PTB-XL (PhysioNet): 10 s twelve-lead WFDB records at 500 and 100 Hz with SCP-ECG statements and recommended folds.

```
ROOT/ptbxl_database.csv    ecg_id,patient_id,age,sex,...,recording_date,report,scp_codes,...,strat_fold,filename_lr,filename_hr
ROOT/scp_statements.csv    (code),description,diagnostic,form,rhythm,diagnostic_class,...      optional
ROOT/records500/00000/00001_hr.{hea,dat}    ROOT/records100/00000/00001_lr.{hea,dat}
```
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Literal

from medgen.data.ecg_records import ECGRecord
from medgen.data.records import Split
from medgen.data.sources.base import Quarantined, Records, SourceOptions, as_age, as_time, one_file, read_rows

_SEX: Mapping[str, Literal["F", "M"]] = {"0": "M", "1": "F"}
_PROBLEMS = ("baseline_drift", "static_noise", "burst_noise", "electrodes_problems", "extra_beats", "pacemaker")
_NEEDED = ("ecg_id", "patient_id", "scp_codes", "strat_fold", "filename_lr", "filename_hr")


def records(root: Path, options: SourceOptions) -> Records:  # noqa: ARG001 (the folds are official)
    """Every recording, at 500 Hz where that file is there and else at 100 Hz; folds 1-8 train, 9 validates, 10 tests."""
    table = one_file(root, "ptbxl_database.csv*", "*/ptbxl_database.csv*")
    home = table.parent
    classes = _classes(home)
    for row in read_rows(table, _NEEDED):
        name = f"ptbxl-{_whole(row['ecg_id']).zfill(5)}"
        paths = [PurePosixPath(row[column].removesuffix(".hea")) for column in ("filename_hr", "filename_lr") if row[column]]
        path = next((p for p in paths if _is_there(home, p)), None)
        fold, patient = _whole(row["strat_fold"]), _whole(row["patient_id"])
        if path is None:
            yield Quarantined(name, f"no record at {' nor '.join(map(str, paths)) or '(no file name)'}")
        elif not fold.isdigit() or not 1 <= int(fold) <= 10 or not patient:
            yield Quarantined(
                name, f"fold {row['strat_fold']!r}, patient {row['patient_id']!r}: expected a fold from 1 to 10 and a patient"
            )
        else:
            split: Split = "test" if int(fold) == 10 else "val" if int(fold) == 9 else "train"
            codes = _codes(row["scp_codes"])
            yield ECGRecord(
                record_id=name,
                patient_id=f"ptbxl-{patient}",
                study_id=name,
                ecg=(home.relative_to(root) / path).as_posix(),
                split=split,
                age=as_age(row.get("age", "")),  # 300 stands for older than 89
                sex=_SEX.get(_whole(row.get("sex", ""))),
                time=as_time(row.get("recording_date", "")),
                extra={
                    "scp_codes": codes,
                    "superclasses": sorted({classes[code] for code in codes if code in classes}),
                    "report": row.get("report", ""),
                    "signal_problems": {column: row[column] for column in _PROBLEMS if row.get(column)},
                },
            )


def _is_there(home: Path, path: PurePosixPath) -> bool:
    inside = not path.is_absolute() and ".." not in path.parts
    return inside and all((home / f"{path}{suffix}").is_file() for suffix in (".hea", ".dat"))


def _whole(text: str) -> str:
    """ "15709" from "15709.0": pandas wrote the table."""
    return text.strip().removesuffix(".0")


def _codes(text: str) -> dict[str, float]:
    """SCP-ECG codes with their likelihood in percent, from a dictionary written as text."""
    try:
        found = ast.literal_eval(text or "{}")
        return {str(code): float(likelihood) for code, likelihood in found.items()}
    except (ValueError, SyntaxError, AttributeError, TypeError):
        return {}


def _classes(home: Path) -> dict[str, str]:
    """Diagnostic superclass (NORM, MI, STTC, CD, HYP) by SCP-ECG code; nothing without its table."""
    tables = sorted(home.glob("scp_statements.csv*"))
    rows = read_rows(tables[0], ["diagnostic_class"]) if tables else ()
    return {next(iter(row.values())): row["diagnostic_class"] for row in rows if row["diagnostic_class"]}
