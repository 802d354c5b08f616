"""What one patient's visits over time are on disk: the record that a longitudinal manifest lists."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from datetime import date
from itertools import pairwise
from typing import Any, ClassVar, Literal, Self

from pydantic import ConfigDict

from medgen.data.records import Record, Split, is_below, is_name

TimeUnit = Literal["days", "order", "phase"]
BIOMARKERS = {
    "pleural_effusion_ml": "mL",
    "consolidation_ml": "mL",
    "edema_ml": "mL",
    "nodule_mm3": "mm³",
    "cardiothoracic_ratio": "",
    "aerated_lung_ml": "mL",
}
"""What is measured of a chest at a visit, with its unit: the names in a digital patient's truth and in a judge's reading."""


@dataclass(frozen=True)
class Visit:
    """One visit. `time` counts from any origin of the series' own, in its `time_unit`; `date` is ISO where the calendar is known.

    `image` (PNG, DICOM, NIfTI; a POSIX path relative to the manifest's folder) is None where nobody took one: the visit still happened.
    `truth` and `extra` are JSON values; digital patients know the truth.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")
    visit_id: str
    time: float
    image: str | None = None
    date: str | None = None
    view: str | None = None
    report: str = ""
    truth: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Event:
    """What was done to the patient, and when: a treatment, an operation. `value` is a dose or size in the event's own unit."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")
    name: str
    time: float
    value: float | None = None


@dataclass(frozen=True)
class VisitSeries(Record):
    """One patient's (or one eye's, lesion's, heart beat's) visits in the order of their times.

    `time_unit`: "days"; "order" where only the sequence is known (times 0, 1, 2, ...); "phase" for frames of one cycle in [0, 1].
    `covariates` are numbers or words at the first visit; what is unknown is absent, never 0. `modality` names what the images are
    ("cxr", "ct", "mr", "fundus", ...), `dim` whether they are pictures (2) or volumes (3).
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")
    kind = "visits"
    files = ()
    record_id: str
    patient_id: str
    study_id: str
    visits: tuple[Visit, ...]
    modality: str
    dim: Literal[2, 3]
    time_unit: TimeUnit
    split: Split
    events: tuple[Event, ...] = ()
    covariates: dict[str, float | str] = field(default_factory=dict)
    truth: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def imaged(self) -> tuple[Visit, ...]:
        """The visits of which there is an image."""
        return tuple(visit for visit in self.visits if visit.image is not None)

    def below(self, prefix: str) -> Self:
        """The same series with its images named from another folder: `prefix` leads from there to the old one."""
        visits = tuple(v if v.image is None else replace(v, image=f"{prefix}{v.image}") for v in self.visits)
        return replace(self, visits=visits)

    def problems(self) -> Iterable[tuple[str, str]]:
        """Those of every record; visits without order or number, and paths that leave the folder."""
        yield from super().problems()
        if not self.visits:
            yield "visits", "at least one visit"
        if len({visit.visit_id for visit in self.visits}) < len(self.visits):
            yield "visits", "visit_ids that differ"
        times = [visit.time for visit in self.visits]
        if not all(map(math.isfinite, times)) or any(b <= a for a, b in pairwise(times)):
            yield "visits", "finite times, each later than the one before (merge two images of one visit or keep one)"
        if self.time_unit == "phase" and any(not 0 <= time <= 1 for time in times):
            yield "visits", "phases from 0 to 1"
        for visit in self.visits:
            if not is_name(visit.visit_id):
                yield "visits", f"visit_ids of letters, digits and . _ - (they become file names), not {visit.visit_id!r}"
            if visit.image is not None and not is_below(visit.image):
                yield "visits", f"images that are POSIX paths below the manifest's folder (visit {visit.visit_id!r})"
            if visit.date is not None and not _is_iso(visit.date):
                yield "visits", f"ISO dates such as 2180-05-06 (visit {visit.visit_id!r})"
        if not all(math.isfinite(event.time) for event in self.events):
            yield "events", "finite times"
        if wrong := [name for name, value in self.covariates.items() if isinstance(value, float) and not math.isfinite(value)]:
            yield "covariates", f"finite numbers or words; leave out what is unknown ({', '.join(wrong)})"


def _is_iso(text: str) -> bool:
    try:
        return date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False
