"""Any images over time by a plain table (fundus, skin, films of your own): ROOT/visits.csv, one row per visit.

```
patient,[series,]date|day|order,image[,view,report,modality,split][,any covariate ...]
p1,left_eye,2019-03-02,img/a.jpg,,,fundus,,61,F
ROOT/events.csv        patient,[series,]date|day|order,name[,value]       optional
```
`series` tells eyes, lesions or organs of one patient apart (a patient stays in one split); an empty `image` is a visit without one.
Other columns are covariates by their first known value; one that changes is also kept with every visit. Images are PNG, JPEG, TIFF,
DICOM, or NIfTI volumes; all of one manifest are pictures, or all volumes, on one clock.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, cast

from medgen.data.records import SPLITS, Split
from medgen.data.sources.base import (
    Quarantined,
    Records,
    SourceError,
    SourceOptions,
    as_id,
    as_number,
    hashed_split,
    one_file,
    read_rows,
)
from medgen.data.sources.visits import as_covariate, as_moment, days_since, in_order
from medgen.data.visit_records import Event, TimeUnit, Visit, VisitSeries
from medgen.data.volumes import is_volume

_CLOCKS: dict[str, TimeUnit] = {"date": "days", "day": "days", "order": "order"}
_OWN = ("patient", "series", "image", "view", "report", "modality", "split", *_CLOCKS)
When = datetime | float


def records(root: Path, options: SourceOptions) -> Records:
    """One series per patient (and `series`). Rows without a time are quarantined."""
    table = one_file(root, "visits.csv", "visits.csv.gz", "visits.tsv")
    rows = list(read_rows(table, ["patient", "image"]))
    if not rows:
        raise SourceError(f"{table} has no rows")
    clock = next((name for name in _CLOCKS if name in rows[0]), None)
    if clock is None:
        raise SourceError(f"{table} needs a column date, day or order: when each visit was")
    volumes = {is_volume(row["image"]) for row in rows if row["image"]}
    if len(volumes) > 1:
        raise SourceError(f"{table} names pictures and volumes; make one table of each")
    series: dict[tuple[str, str], list[dict[str, str]]] = defaultdict(list)
    for number, row in enumerate(rows, 2):
        if not row["patient"]:
            yield Quarantined(f"{table.name}-line-{number}", "no patient in its row")
            continue
        series[row["patient"], row.get("series", "")].append(row)
    events = _events(root)
    for (patient, part), theirs in series.items():
        yield from _series(patient, part, theirs, clock, 3 if True in volumes else 2, events.get((patient, part), []), options)


def _series(
    patient: str,
    part: str,
    rows: list[dict[str, str]],
    clock: str,
    dim: int,
    events: list[dict[str, str]],
    options: SourceOptions,
) -> Iterator[VisitSeries | Quarantined]:
    name = as_id(f"{patient}_{part}" if part else patient)
    timed: list[tuple[When, dict[str, str]]] = []
    for row in rows:
        if (when := _when(row, clock)) is None:
            yield Quarantined(f"{name}/{as_id(Path(row['image']).stem)}", f"undated: {clock} {row[clock]!r}")
        else:
            timed.append((when, row))
    if not timed:
        return
    first = min(when for when, _ in timed)
    changing = {key for key in rows[0] if key not in _OWN and len({row[key] for _, row in timed} - {""}) > 1}
    visits: list[Visit] = []
    known: dict[str, Any] = {}
    for when, row in sorted(timed, key=lambda item: item[0]):
        facts = {key: value for key in row if key not in _OWN and (value := as_covariate(row[key])) is not None}
        known = {**facts, **known}
        time = _time(when, first)
        visits.append(
            Visit(
                visit_id=as_id(f"{clock}-{row[clock]}"),
                time=time,
                image=row["image"] or None,
                date=when.date().isoformat() if isinstance(when, datetime) else None,
                view=row.get("view") or None,
                report=row.get("report", ""),
                extra={key: value for key, value in facts.items() if key in changing},
            )
        )
    ordered, held = in_order(name, visits)
    yield from held
    given = {row.get("split", "") for _, row in timed} - {""}
    if given - set(SPLITS) or len(given) > 1:
        yield Quarantined(name, f"split says {sorted(given)}; expected one of {', '.join(SPLITS)} for all rows of a patient")
        return
    yield VisitSeries(
        record_id=name,
        patient_id=patient,
        study_id=name,
        visits=ordered,
        modality=next((row["modality"] for _, row in timed if row.get("modality")), "photo" if dim == 2 else "volume"),
        dim=3 if dim == 3 else 2,
        time_unit=_CLOCKS[clock],
        split=cast(Split, given.pop()) if given else hashed_split(patient, options),
        events=tuple(
            Event(event["name"], _time(when, first), as_number(event.get("value")))
            for event in events
            if (when := _when(event, clock)) is not None
        ),
        covariates=known,
    )


def _when(row: dict[str, str], clock: str) -> When | None:
    return as_moment(row.get(clock, "")) if clock == "date" else as_number(row.get(clock))


def _time(when: When, first: When) -> float:
    """Days since the first visit; days and orders of the table's own stay as they are."""
    if isinstance(when, datetime) and isinstance(first, datetime):
        return days_since(first, when)
    return cast(float, when)


def _events(root: Path) -> dict[tuple[str, str], list[dict[str, str]]]:
    found: dict[tuple[str, str], list[dict[str, str]]] = defaultdict(list)
    if (root / "events.csv").is_file():
        for row in read_rows(root / "events.csv", ["patient", "name"]):
            found[row["patient"], row.get("series", "")].append(row)
    return found
