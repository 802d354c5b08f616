"""What the builders of visit series share: clocks, typed covariates, and visits in the order of their times."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta

from medgen.data.sources.base import Quarantined, as_number
from medgen.data.visit_records import Visit

UNKNOWN = ("", "n/a", "na", "nan", "none", "null", "unknown", "?")


def as_moment(day: str, clock: str = "") -> datetime | None:
    """When something was, from 21800506, 2180-05-06 or 2180-05-06T10:30[:00], and a DICOM time; None if there is no such day.

    MIMIC's times are DICOM's read as numbers: "80556.875" has lost the zero of 08:05:56. Without a time it is midnight.
    """
    text = day.strip().removesuffix(".0")
    match = re.fullmatch(r"(\d{4})-?(\d{2})-?(\d{2})(?:[T ](\d{2}):(\d{2})(?::(\d{2}(?:\.\d+)?))?(?:Z|[+-]\d{2}:?\d{2})?)?", text)
    if match is None:
        return None
    year, month, date, hour, minute, second = match.groups()
    try:
        moment = datetime(int(year), int(month), int(date), int(hour or 0), int(minute or 0))
    except ValueError:
        return None
    moment += timedelta(seconds=float(second or 0))
    time = re.fullmatch(r"(\d{1,6})(\.\d+)?", clock.strip())
    if time is None:
        return moment
    digits = time.group(1).zfill(6)
    hours, minutes, seconds = int(digits[:2]), int(digits[2:4]), int(digits[4:])
    if hours > 23 or minutes > 59 or seconds > 59:
        return moment
    return moment + timedelta(hours=hours, minutes=minutes, seconds=seconds + float(time.group(2) or 0))


def days_since(first: datetime, moment: datetime) -> float:
    """Days, to a second."""
    return round((moment - first).total_seconds() / 86400, 5)


def as_covariate(text: str | None) -> float | str | None:
    """A number, a word, or None where a table says in any of the usual ways that it does not know."""
    word = (text or "").strip()
    if word.lower() in UNKNOWN:
        return None
    number = as_number(word)
    return word if number is None else number


def covariates(values: Mapping[str, str | float | None]) -> dict[str, float | str]:
    """Those that are known, typed."""
    typed = {name: as_covariate(value) if isinstance(value, str) else value for name, value in values.items()}
    return {name: value for name, value in typed.items() if value is not None}


def in_order(series: str, visits: Iterable[Visit]) -> tuple[tuple[Visit, ...], list[Quarantined]]:
    """Visits by time, one for each: of two at the same time the first given that has an image stays, the other is held by name."""
    kept: dict[float, Visit] = {}
    held: list[Quarantined] = []
    for visit in sorted(visits, key=lambda visit: (visit.time, visit.image is None)):
        if visit.time in kept:
            if visit.image is not None:
                reason = f"same time as visit {kept[visit.time].visit_id}, which stays"
                held.append(Quarantined(f"{series}/{visit.visit_id}", reason))
            continue
        kept[visit.time] = visit
    return tuple(kept.values()), held
