"""MIMIC-CXR-JPG 2.x as visits: every patient's studies by StudyDate and StudyTime, one frontal film and the report of each.

The layout is `mimic_cxr_jpg`'s. Dates are shifted, but by the same amount for all of a patient, so that gaps are real. MIMIC-IV's
`[hosp/]patients.csv.gz`, if it lies in the folder, gives age and sex.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from medgen.data.records import FindingLabel, View
from medgen.data.report_text import clean_report
from medgen.data.sources.base import (
    Quarantined,
    Records,
    SourceOptions,
    as_number,
    as_sex,
    as_view,
    one_file,
    read_rows,
)
from medgen.data.sources.mimic_cxr_jpg import SPLITS, chexpert_of, report_of
from medgen.data.sources.visits import as_moment, covariates, days_since, in_order
from medgen.data.visit_records import Visit, VisitSeries

_FIRST: dict[View, int] = {"PA": 0, "AP": 1}


class _Film(NamedTuple):
    dicom_id: str
    study: str
    view: View
    day: str
    clock: str
    wanted: bool


def records(root: Path, options: SourceOptions) -> Records:
    """One series per patient, in days since the first dated study; a study without a frontal film is a visit without an image."""
    metadata = one_file(root, "mimic-cxr-2.*-metadata.csv.gz", "mimic-cxr-2.*-metadata.csv")
    split_file = one_file(root, "mimic-cxr-2.*-split.csv.gz", "mimic-cxr-2.*-split.csv")
    splits = {f"p{row['subject_id']}": row["split"] for row in read_rows(split_file, ["subject_id", "split"])}
    films: dict[str, list[_Film]] = defaultdict(list)
    for row in read_rows(metadata, ["dicom_id", "subject_id", "study_id", "ViewPosition", "StudyDate", "StudyTime"]):
        view = as_view(row["ViewPosition"])
        film = _Film(row["dicom_id"], f"s{row['study_id']}", view, row["StudyDate"], row["StudyTime"], view in options.views)
        films[f"p{row['subject_id']}"].append(film)
    chexpert, people = chexpert_of(root), _people(root)
    for patient, theirs in films.items():
        if splits.get(patient) not in SPLITS:
            yield Quarantined(patient, f"no split for {patient} in {split_file.name}")
            continue
        yield from _series(root, patient, theirs, splits[patient], chexpert, people.get(patient, {}))


def _series(
    root: Path,
    patient: str,
    films: Iterable[_Film],
    split: str,
    chexpert: dict[str, tuple[FindingLabel, ...]],
    person: dict[str, str],
) -> Iterator[VisitSeries | Quarantined]:
    studies: dict[str, list[_Film]] = defaultdict(list)
    for film in films:
        studies[film.study].append(film)
    dated: list[tuple[datetime, str, _Film | None]] = []
    for study, theirs in studies.items():
        moment = as_moment(theirs[0].day, theirs[0].clock)
        if moment is None:
            yield Quarantined(f"{patient}/{study}", f"undated: StudyDate {theirs[0].day!r}")
            continue
        dated.append((moment, study, min((f for f in theirs if f.wanted), key=_best, default=None)))
    if not dated:
        return
    first = min(moment for moment, *_ in dated)
    visits = []
    for moment, study, best in dated:
        report = report_of(root, patient, study, chexpert.get(study))
        found, labels = ({}, ()) if isinstance(report, str) else report
        words = " ".join(filter(None, (clean_report(found.get(name, "")) for name in ("findings", "impression"))))
        if best is None and not words:
            continue  # nothing to learn from: laterals of an unread study
        visits.append(
            Visit(
                visit_id=study,
                time=days_since(first, moment),
                image=None if best is None else f"files/{patient[:3]}/{patient}/{study}/{best.dicom_id}.jpg",
                date=moment.date().isoformat(),
                view=None if best is None else best.view,
                report=words,
                extra={"labels": {label.name: label.state for label in labels}},
            )
        )
    ordered, held = in_order(patient, visits)
    yield from held
    if ordered:
        year = as_number(person.get("anchor_year"))
        anchor = as_number(person.get("anchor_age"))
        age = None if year is None or anchor is None else anchor + first.year - year
        known = covariates({"age": age, "sex": as_sex(person.get("gender", ""))})
        yield VisitSeries(patient, patient, patient, ordered, "cxr", 2, "days", SPLITS[split], covariates=known)


def _best(film: _Film) -> tuple[int, str]:
    return _FIRST.get(film.view, 2), film.dicom_id


def _people(root: Path) -> dict[str, dict[str, str]]:
    tables = [path for below in ("", "hosp/") for path in sorted(root.glob(f"{below}patients.csv*"))]
    if not tables:
        return {}
    return {f"p{row['subject_id']}": row for row in read_rows(tables[0], ["subject_id", "gender", "anchor_age", "anchor_year"])}
