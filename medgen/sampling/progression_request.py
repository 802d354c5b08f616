"""A progression case from the words of a command line: a record of a manifest, or images with their times, and one change."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medgen.data.records import read_manifest
from medgen.data.visit_records import VisitSeries
from medgen.sampling.cases import CaseError, parse_case
from medgen.sampling.progression_cases import Mode, ProgressionAsked, ProgressionCase, moment


@dataclass(frozen=True)
class Requested:
    """What was asked for besides a file of cases; see `medgen.sampling.progression.sample` for the words."""

    reference: Path | None = None
    record: str | None = None
    until: float | None = None
    past: Sequence[str] = ()
    times: Sequence[str | float] = ()
    events: Sequence[str] = ()
    covariates: Sequence[str] = ()
    mode: Mode | None = None
    without_event: str | None = None
    with_event: str | None = None
    with_covariate: str | None = None

    @property
    def given(self) -> bool:
        """Whether anything was."""
        return self != Requested()

    def case(self, n: int, seed: int) -> tuple[ProgressionCase, Path | None]:
        """The case, and the folder below which its images lie (None: they are the caller's own words, anywhere)."""
        if (self.reference is None) == (not self.past):
            raise CaseError("give --cases FILE, or --reference MANIFEST --record ID, or --past TIME=FILE ...")
        if not self.times:
            raise CaseError("give the wanted --times: in the series' own time (90), or after the last known visit (+30)")
        values, root = (_of_files(self.past), None) if self.reference is None else self._of_record(self.reference)
        last = values["past"][-1]["time"]
        values["times"] = [parse_time(time, last) for time in self.times]
        values["events"] += [parse_event(text, last) for text in self.events]
        values["covariates"] |= dict(parse_covariate(text) for text in self.covariates)
        if (change := self._counterfactual(values, last)) is not None:
            values["counterfactual"] = change
        if self.mode is not None:
            values["mode"] = self.mode
        return parse_case({**values, "n": n, "seed": seed}, ProgressionAsked), root

    def _of_record(self, reference: Path) -> tuple[dict[str, Any], Path]:
        """The record's imaged visits (those not later than `until`), all its events (later ones are plans) and covariates."""
        manifest = read_manifest(reference, record=VisitSeries)
        by_id = {record.record_id: record for record in manifest.records}
        if self.record is None or self.record not in by_id:
            near = difflib.get_close_matches(self.record or "", by_id, 3, 0.4) or list(by_id)[:3]
            said = "give the --record ID" if self.record is None else f"no record {self.record!r}"
            raise CaseError(f"{said}: {reference} has {len(by_id)}, for example {', '.join(near)}")
        record = by_id[self.record]
        visits = [visit for visit in record.imaged if self.until is None or visit.time <= self.until]
        if not visits:
            when = "" if self.until is None else f" up to {moment(self.until, record.time_unit)}"
            raise CaseError(f"record {self.record!r} has no image{when}")
        past = [{"time": v.time, "image": v.image, "date": v.date, "report": v.report, "view": v.view} for v in visits]
        values = {
            "case_id": record.record_id,
            "past": past,
            "events": [{"name": event.name, "time": event.time, "value": event.value} for event in record.events],
            "covariates": dict(record.covariates),
            "time_unit": record.time_unit,
            "patient_id": record.patient_id,
        }
        return values, manifest.root

    def _counterfactual(self, values: Mapping[str, Any], last: float) -> dict[str, Any] | None:
        changes = [change for change in (self.without_event, self.with_event, self.with_covariate) if change is not None]
        if not changes:
            return None
        if len(changes) > 1:
            raise CaseError("give one of --without-event, --with-event, --with-covariate: what differs is then due to it")
        events = values["events"]
        if self.with_event is not None:
            return {"events": [*events, parse_event(self.with_event, last)]}
        if self.with_covariate is not None:
            name, value = parse_covariate(self.with_covariate)
            return {"covariates": {name: None if value == "unknown" else value}}
        kept = [event for event in events if event["name"] != self.without_event]
        if len(kept) == len(events):
            names = ", ".join(dict.fromkeys(event["name"] for event in events)) or "none"
            raise CaseError(f"--without-event {self.without_event}: there is no such event; this patient's are: {names}")
        return {"events": kept}


def parse_time(text: str | float, last: float) -> float:
    """A time of the series, or, of text that starts with "+", that much after `last`."""
    try:
        return last + float(text[1:]) if isinstance(text, str) and text.startswith("+") else float(text)
    except ValueError:
        raise CaseError(f"time {text!r}: expected a number (of the series' own time) or +NUMBER (after the last visit)") from None


def parse_event(text: str, last: float) -> dict[str, Any]:
    """An event from "drainage@40", "drainage@+5" (after the last known visit) or, with its value, "diuretic@+5=40"."""
    name, _, when = text.partition("@")
    when, equals, value = when.partition("=")
    try:
        return {"name": name, "time": parse_time(when, last), "value": float(value) if equals else None}
    except ValueError:
        raise CaseError(f"event {text!r}: expected NAME@TIME, NAME@+TIME or NAME@TIME=VALUE, for example drainage@+5") from None


def parse_covariate(text: str) -> tuple[str, float | str]:
    """("age", 63.0) from "age=63", ("sex", "F") from "sex=F"."""
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise CaseError(f"covariate {text!r}: expected NAME=VALUE, for example age=63 or sex=F")
    try:
        return name, float(value)
    except ValueError:
        return name, value


def _of_files(past: Sequence[str]) -> dict[str, Any]:
    seen = []
    for text in past:
        time, equals, image = text.partition("=")
        try:
            if not (equals and image):
                raise ValueError
            seen.append({"time": float(time), "image": image})
        except ValueError:
            raise CaseError(f"past {text!r}: expected TIME=FILE, for example 0=first.png 40=second.png") from None
    return {"case_id": "patient", "past": seen, "events": [], "covariates": {}}
