"""MIMIC-CXR-JPG 2.x (PhysioNet): films as JPEG, tables as .csv.gz, and MIMIC-CXR's own report tree.

```
ROOT/mimic-cxr-2.0.0-{metadata,split,chexpert}.csv.gz
ROOT/files/p10/p10000032/s50414267/<dicom_id>.jpg
ROOT/[mimic-cxr-reports/]files/p10/p10000032/s50414267.txt
```
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medgen.data.records import CXRRecord, FindingLabel, Split
from medgen.data.report_labels import label_text
from medgen.data.report_text import sections
from medgen.data.sources.base import Quarantined, Records, SourceOptions, as_date, as_view, one_file, read_rows
from medgen.data.sources.chexpert_csv import chexpert_labels

SPLITS: Mapping[str, Split] = {"train": "train", "validate": "val", "test": "test"}


def records(root: Path, options: SourceOptions) -> Records:
    """Every film of a wanted view with its study's report; official split, CheXpert's labels with sides and sizes from the text."""
    metadata = one_file(root, "mimic-cxr-2.*-metadata.csv.gz", "mimic-cxr-2.*-metadata.csv")
    split_file = one_file(root, "mimic-cxr-2.*-split.csv.gz", "mimic-cxr-2.*-split.csv")
    splits = {row["dicom_id"]: row["split"] for row in read_rows(split_file, ["dicom_id", "split"])}
    chexpert = chexpert_of(root)
    reports: dict[str, tuple[dict[str, str], tuple[FindingLabel, ...]] | str] = {}
    for row in read_rows(metadata, ["dicom_id", "subject_id", "study_id", "ViewPosition"]):
        view = as_view(row["ViewPosition"])
        if view not in options.views:
            continue
        dicom_id, patient, study = row["dicom_id"], f"p{row['subject_id']}", f"s{row['study_id']}"
        if study not in reports:
            reports.clear()  # rows are grouped by study: keep one
            reports[study] = report_of(root, patient, study, chexpert.get(study))
        report = reports[study]
        if isinstance(report, str):
            yield Quarantined(dicom_id, report)
            continue
        if splits.get(dicom_id) not in SPLITS:
            yield Quarantined(dicom_id, f"no split for {dicom_id} in {split_file.name}")
            continue
        found, labels = report
        extra: dict[str, Any] = {"view_position": row["ViewPosition"], "indication": found.get("indication", "")}
        yield CXRRecord(
            record_id=dicom_id,
            patient_id=patient,
            study_id=study,
            image=f"files/{patient[:3]}/{patient}/{study}/{dicom_id}.jpg",
            view=view,
            findings=found.get("findings", ""),
            impression=found.get("impression", ""),
            split=SPLITS[splits[dicom_id]],
            labels=labels,
            study_date=as_date(row.get("StudyDate", "")),
            extra=extra,
        )


def report_of(
    root: Path, patient: str, study: str, official: tuple[FindingLabel, ...] | None
) -> tuple[dict[str, str], tuple[FindingLabel, ...]] | str:
    """Sections and labels of a study's report, or why there are none."""
    below = f"files/{patient[:3]}/{patient}/{study}.txt"
    for folder in (root / "mimic-cxr-reports", root, root / "reports"):
        path = folder / below
        if path.is_file():
            found = sections(path.read_text(encoding="utf-8", errors="replace"))
            text = label_text("\n\n".join((found.get("findings", ""), found.get("impression", ""))))
            return found, merge_labels(official, text)
    return f"no report at {below} (nor below mimic-cxr-reports/ or reports/)"


def merge_labels(official: tuple[FindingLabel, ...] | None, text: tuple[FindingLabel, ...]) -> tuple[FindingLabel, ...]:
    """The data set's own states where it has any, with side and size from the text; findings it does not know from the text."""
    if official is None:
        return text
    ours = {label.name: label for label in text}
    known = {label.name for label in official}
    merged = [
        FindingLabel(label.name, label.state, ours[label.name].side, ours[label.name].size)
        if label.name in ours and ours[label.name].state == label.state
        else label
        for label in official
    ]
    return (*merged, *(label for label in text if label.name not in known))


def chexpert_of(root: Path) -> dict[str, tuple[FindingLabel, ...]]:
    """The labels of every study in the CheXpert table; nothing if it is not there."""
    tables = [*root.glob("mimic-cxr-2.*-chexpert.csv*")]
    if not tables:
        return {}
    return {f"s{row['study_id']}": chexpert_labels(row) for row in read_rows(sorted(tables)[0], ["study_id", "Pleural Effusion"])}
