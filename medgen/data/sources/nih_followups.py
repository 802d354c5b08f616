"""Films of patients who came back: NIH ChestX-ray14 in the order of "Follow-up #", or PadChest dated by `StudyDate_DICOM`.

```
ROOT/Data_Entry_2017*.csv, [test_list*.txt,] **/*.png          NIH; ages such as "058Y" and, by mistake, "414"
ROOT/PADCHEST_chest_x_ray_images_labels_160K*.csv[.gz], **/*.png      PadChest; years of birth such as "1930.0", reports in Spanish
```
NIH has no dates: times are its follow-up numbers (time unit "order"), whose gaps are visits that the set does not show.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from medgen.data.records import Split
from medgen.data.report_text import labels_to_text
from medgen.data.sources.base import (
    Quarantined,
    Records,
    SourceError,
    SourceOptions,
    as_age,
    as_id,
    as_number,
    as_sex,
    as_view,
    hashed_split,
    read_rows,
)
from medgen.data.sources.chexpert_csv import nih_labels
from medgen.data.sources.visits import as_moment, covariates, days_since, in_order
from medgen.data.visit_records import Visit, VisitSeries

Rows = dict[str, list[dict[str, str]]]


def records(root: Path, options: SourceOptions) -> Records:
    """One series per patient. A film that is not there leaves its visit without an image and is quarantined by name."""
    nih, padchest = sorted(root.glob("Data_Entry_*.csv")), sorted(root.glob("PADCHEST*.csv*"))
    if not nih and not padchest:
        raise SourceError(
            f"{root} holds neither NIH's Data_Entry_*.csv nor PadChest's PADCHEST_chest_x_ray_images_labels_160K*.csv"
        )
    places = {path.name: path.relative_to(root).as_posix() for path in sorted(root.glob("**/*.png"))}
    if nih:
        yield from _nih(root, nih[0], places, options)
    else:
        yield from _padchest(padchest[0], places, options)


def _by_patient(table: Path, needed: list[str], patient: str) -> Rows:
    rows: Rows = defaultdict(list)
    for row in read_rows(table, needed):
        rows[row[patient]].append(row)
    return rows


def _nih(root: Path, table: Path, places: dict[str, str], options: SourceOptions) -> Iterator[VisitSeries | Quarantined]:
    needed = ["Image Index", "Finding Labels", "Follow-up #", "Patient ID", "Patient Age", "View Position"]
    official = {name.split("_")[0] for path in root.glob("test_list*.txt") for name in path.read_text().split()}
    for number, rows in _by_patient(table, needed, "Patient ID").items():
        patient = number.zfill(8)
        visits = []
        for row in rows:
            name = row["Image Index"]
            order = as_number(row["Follow-up #"])
            if (view := as_view(row["View Position"])) not in options.views:
                continue
            if order is None:
                yield Quarantined(f"{patient}/{Path(name).stem}", f"undated: Follow-up # {row['Follow-up #']!r}")
                continue
            if name not in places:
                yield Quarantined(f"{patient}/{Path(name).stem}", f"no image at {name} below {root.name}/")
            visits.append(
                Visit(
                    visit_id=as_id(Path(name).stem),
                    time=order,
                    image=places.get(name),
                    view=view,
                    report=labels_to_text(nih_labels(row["Finding Labels"])),
                    extra={"text": "from labels", "finding_labels": row["Finding Labels"], "age": as_age(row["Patient Age"])},
                )
            )
        ordered, held = in_order(patient, visits)
        yield from held
        if not ordered:
            continue
        split: Split = hashed_split(patient, options)
        if official:
            split = "test" if patient in official else "train" if split == "test" else split
        sex = as_sex(rows[0].get("Patient Gender") or rows[0].get("Patient Sex") or "")
        known = covariates({"age": next((a for v in ordered if (a := v.extra["age"]) is not None), None), "sex": sex})
        yield VisitSeries(patient, patient, patient, ordered, "cxr", 2, "order", split, covariates=known)


def _padchest(table: Path, places: dict[str, str], options: SourceOptions) -> Iterator[VisitSeries | Quarantined]:
    needed = ["ImageID", "StudyDate_DICOM", "StudyID", "PatientID", "PatientBirth", "PatientSex_DICOM", "Projection", "Report"]
    for patient, rows in _by_patient(table, needed, "PatientID").items():
        series = as_id(patient)
        dated = []
        for row in rows:
            if as_view(row["Projection"]) not in options.views:
                continue
            moment = as_moment(row["StudyDate_DICOM"])
            if moment is None:
                name = f"{series}/{as_id(Path(row['ImageID']).stem)}"
                yield Quarantined(name, f"undated: StudyDate_DICOM {row['StudyDate_DICOM']!r}")
                continue
            dated.append((moment, row))
        first = min((moment for moment, _ in dated), default=None)
        visits: list[Visit] = []
        for moment, row in sorted(dated, key=lambda item: as_view(item[1]["Projection"]) != "PA"):
            name = row["ImageID"]
            if name not in places:
                yield Quarantined(f"{series}/{as_id(Path(name).stem)}", f"no image at {name}")
            study = as_id(row["StudyID"])
            # one film per study, PA first; a second one only where the first is not there
            taken = next((visit for visit in visits if visit.visit_id == study), None)
            if taken is not None and (taken.image is not None or name not in places):
                continue
            if taken is not None:
                visits.remove(taken)
            assert first is not None
            visits.append(
                Visit(
                    visit_id=study,
                    time=days_since(first, moment),
                    image=places.get(name),
                    date=moment.date().isoformat(),
                    view=as_view(row["Projection"]),
                    report=row["Report"],
                    extra={"labels": re.findall(r"'([^']+)'", row.get("Labels", ""))},
                )
            )
        ordered, held = in_order(series, visits)  # two studies of one day cannot be ordered: PadChest gives no time
        yield from held
        if first is not None and ordered:
            born = as_number(rows[0]["PatientBirth"])
            age = None if born is None or not 0 <= first.year - born <= 130 else first.year - born
            known = covariates({"age": age, "sex": as_sex(rows[0]["PatientSex_DICOM"])})
            yield VisitSeries(
                series, patient, series, ordered, "cxr", 2, "days", hashed_split(patient, options), covariates=known
            )
