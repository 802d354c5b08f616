"""Data sets of labels without reports: CheXpert (train.csv, valid.csv) and NIH ChestX-ray14 (Data_Entry_2017*.csv).

CheXpert: `Path` begins with the set's own folder ("CheXpert-v1.0-small/train/patient00001/study1/view1_frontal.jpg"), 1 present,
0 absent, -1 uncertain, blank not mentioned. NIH: `Finding Labels` joined by "|", ages such as "058Y", one folder or images_001..012.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import cast

from medgen.data.records import FINDINGS, CXRRecord, Finding, FindingLabel, Split, State
from medgen.data.report_text import labels_to_text
from medgen.data.sources.base import (
    Quarantined,
    Records,
    SourceError,
    SourceOptions,
    as_age,
    as_id,
    as_sex,
    as_view,
    hashed_split,
    read_rows,
)

# The data sets' words for our findings.
COLUMNS: Mapping[str, Finding] = {
    "Pleural Effusion": "pleural_effusion", "Effusion": "pleural_effusion", "Pneumothorax": "pneumothorax",
    "Consolidation": "consolidation", "Pneumonia": "consolidation", "Infiltration": "consolidation", "Lung Lesion": "nodule",
    "Nodule": "nodule", "Mass": "nodule", "Cardiomegaly": "cardiomegaly", "Edema": "edema", "Atelectasis": "atelectasis",
    "Emphysema": "hyperinflation",
}  # fmt: skip
_STATES: Mapping[str, State] = {"1": "present", "0": "absent", "-1": "uncertain"}
_RANK: tuple[State, ...] = ("present", "uncertain", "absent")


def chexpert_labels(row: Mapping[str, str]) -> tuple[FindingLabel, ...]:
    """Labels of a row of CheXpert's columns (also MIMIC-CXR-JPG's); "No Finding" = 1 makes what is not mentioned absent."""
    states: dict[Finding, list[State]] = {}
    for column, name in COLUMNS.items():
        value = row.get(column, "").removesuffix(".0")
        if value in _STATES:
            states.setdefault(name, []).append(_STATES[value])
    if row.get("No Finding", "").removesuffix(".0") == "1":
        for name in set(COLUMNS.values()) - {"hyperinflation"}:
            states.setdefault(name, ["absent"])
    return _labels(states)


def records(root: Path, options: SourceOptions) -> Records:
    """Every film of a wanted view; the impression is written from the labels (`extra.text` says so)."""
    nih = sorted(root.glob("Data_Entry_*.csv"))
    if nih:
        yield from _nih(root, nih[0], options)
        return
    tables = [
        (path, split)
        for name, split in (("train", "train"), ("valid", "val"), ("test", "test"))
        for path in [root / f"{name}.csv"]
    ]
    tables = [(path, split) for path, split in tables if path.is_file()]
    if not tables:
        raise SourceError(f"{root} holds neither CheXpert's train.csv / valid.csv nor NIH's Data_Entry_*.csv")
    for path, split in tables:
        yield from _chexpert(path, cast(Split, split), options)


def _chexpert(table: Path, split: Split, options: SourceOptions) -> Iterator[CXRRecord | Quarantined]:
    for row in read_rows(table, ["Path", "Frontal/Lateral", "AP/PA"]):
        view = as_view(row["AP/PA"] or row["Frontal/Lateral"])
        if row["Frontal/Lateral"] == "Lateral":
            view = "LATERAL"
        if view not in options.views:
            continue
        # The set's name leads the path, and it differs between the full and the small release.
        _, _, image = (
            row["Path"].replace("\\", "/").partition("/") if row["Path"].startswith("CheXpert") else ("", "", row["Path"])
        )
        parts = image.split("/")
        if len(parts) < 3 or not parts[-3].startswith("patient"):
            yield Quarantined(
                as_id(row["Path"]), f"Path {row['Path']!r} in {table.name} is not <set>/<split>/patient.../study.../view....jpg"
            )
            continue
        patient, study = parts[-3], parts[-2]
        labels = chexpert_labels(row)
        yield CXRRecord(
            record_id=as_id(f"{patient}_{study}_{Path(parts[-1]).stem}"),
            patient_id=patient,
            study_id=f"{patient}_{study}",
            image=image,
            view=view,
            findings="",
            impression=labels_to_text(labels) or "No finding is labelled.",
            split=split,
            labels=labels,
            age=as_age(row.get("Age", "")),
            sex=as_sex(row.get("Sex", "")),
            extra={"text": "from labels"},
        )


def _nih(root: Path, table: Path, options: SourceOptions) -> Iterator[CXRRecord | Quarantined]:
    places = {path.name: path.relative_to(root).as_posix() for path in sorted(root.glob("**/*.png"))}
    official = {name for path in root.glob("test_list*.txt") for name in path.read_text().split()}
    test_patients = {name.split("_")[0] for name in official}  # the lists agree by patient
    for row in read_rows(table, ["Image Index", "Finding Labels", "Patient ID", "Patient Age", "View Position"]):
        view = as_view(row["View Position"])
        if view not in options.views:
            continue
        name, patient = row["Image Index"], row["Patient ID"].zfill(8)
        if name not in places:
            yield Quarantined(as_id(Path(name).stem), f"image {name} is missing below {root.name}/")
            continue
        split = hashed_split(patient, options)
        if official:
            split = "test" if patient in test_patients else "train" if split == "test" else split
        labels = nih_labels(row["Finding Labels"])
        yield CXRRecord(
            record_id=as_id(Path(name).stem),
            patient_id=patient,
            study_id=f"{patient}_{row.get('Follow-up #', '') or Path(name).stem}",
            image=places[name],
            view=view,
            findings="",
            impression=labels_to_text(labels),
            split=split,
            labels=labels,
            age=as_age(row["Patient Age"]),
            sex=as_sex(row.get("Patient Gender") or row.get("Patient Sex") or ""),
            extra={"text": "from labels", "finding_labels": row["Finding Labels"]},
        )


def nih_labels(text: str) -> tuple[FindingLabel, ...]:
    """Labels of NIH's "Effusion|Mass": what is named is present, every other finding is absent."""
    named = {COLUMNS[word] for word in text.split("|") if word in COLUMNS}
    return _labels({name: ["present" if name in named else "absent"] for name in cast("tuple[Finding, ...]", FINDINGS)})


def _labels(states: Mapping[Finding, list[State]]) -> tuple[FindingLabel, ...]:
    best = {name: min(found, key=_RANK.index) for name, found in states.items()}
    return tuple(FindingLabel(name, best[name]) for name in cast("tuple[Finding, ...]", FINDINGS) if name in best)
