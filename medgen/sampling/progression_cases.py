"""What a progression case asks for (past visits, wanted times, treatments, one change of them), and its images found and checked."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, Field, model_validator
from torch import Tensor

from medgen.data.dicom import DicomError
from medgen.data.images import ImageError
from medgen.data.visit_images import VisitPreprocessing, load_visit
from medgen.data.visit_records import Event, TimeUnit
from medgen.pipelines.progression import History, ProgressionPipeline
from medgen.sampling.cases import Case, CaseError, Conditions, Text

MOST_TIMES = 100  # two digits number a frame, three a trajectory: file names of two cases never meet
Mode = Literal["joint", "autoregressive"]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Covariates = dict[str, Number | Annotated[str, Field(strict=True)]]


def _iso(text: str) -> str:
    if date.fromisoformat(text).isoformat() != text:
        raise ValueError("expected an ISO date such as 2180-05-06")
    return text


def _increasing(times: tuple[float, ...]) -> tuple[float, ...]:
    for i, (before, after) in enumerate(pairwise(times)):
        if after <= before:
            raise ValueError(f"expected times that increase, but {after:g} (number {i + 2}) follows {before:g}")
    return times


def _in_order(past: tuple[Seen, ...]) -> tuple[Seen, ...]:
    _increasing(tuple(seen.time for seen in past))
    return past


class Seen(Conditions):
    """A visit that is known: its image (PNG, DICOM, NIfTI) at `time`; `date` is ISO where the calendar is known."""

    time: Number
    image: Text
    date: Annotated[str, Field(strict=True), AfterValidator(_iso)] | None = None
    report: str = ""
    view: str | None = None


class Happening(Conditions):
    """A treatment or other event, past or planned."""

    name: Text
    time: Number
    value: Number | None = None

    def __str__(self) -> str:
        return self.name if self.value is None else f"{self.name} {self.value:g}"


class Counterfactual(Conditions):
    """The one change: all `events` as they should have been instead, or the `covariates` that should differ (null: unknown)."""

    events: tuple[Happening, ...] | None = None
    covariates: dict[str, Number | Annotated[str, Field(strict=True)] | None] | None = None

    @model_validator(mode="after")
    def _one(self) -> Counterfactual:
        if (self.events is None) == (not self.covariates):
            raise ValueError("expected either events or covariates: one change, so that what differs is due to it")
        return self


class ProgressionAsked(Conditions):
    """What a future is conditioned on. Times are in the series' own unit, from its own origin.

    `past` may hold visits later than a wanted time: then the frames between are asked for. A wanted time may be that of a known
    visit (a gap of zero). `events` are all treatments, past and planned; of `covariates`, what is unknown is absent.
    """

    past: Annotated[tuple[Seen, ...], Field(min_length=1), AfterValidator(_in_order)]
    times: Annotated[tuple[Number, ...], Field(min_length=1, max_length=MOST_TIMES), AfterValidator(_increasing)]
    events: tuple[Happening, ...] = ()
    covariates: Covariates = Field(default_factory=dict)
    mode: Mode | None = None
    counterfactual: Counterfactual | None = None
    time_unit: TimeUnit | None = None

    def changed(self) -> ProgressionAsked:
        """The same with its counterfactual in place."""
        change = self.counterfactual
        if change is None:
            return self
        if change.events is not None:
            return self.model_copy(update={"events": change.events})
        mixed = {**self.covariates, **(change.covariates or {})}
        return self.model_copy(update={"covariates": {name: value for name, value in mixed.items() if value is not None}})

    def change_in_words(self) -> str:
        """What the counterfactual does, such as "without drainage (day 12)"."""
        change, said = self.counterfactual, list[str]()
        if change is None:
            return ""
        if change.events is not None:
            unit = self.time_unit
            said += [f"without {event} ({moment(event.time, unit)})" for event in self.events if event not in change.events]
            said += [f"with {event} ({moment(event.time, unit)})" for event in change.events if event not in self.events]
        for name, value in (change.covariates or {}).items():
            said.append(f"{name} {_said(value)} instead of {_said(self.covariates.get(name))}")
        return ", ".join(said) or "nothing changed"


ProgressionCase = Case[ProgressionAsked]


@dataclass(frozen=True)
class Reads:
    """What a pipeline reads: images, times in `time_unit`, treatments, covariates by name (None: a number, else its words), reports.

    Of a patient's visits it looks at the `most` nearest (None: at all).
    """

    preprocessing: VisitPreprocessing
    time_unit: TimeUnit
    events: tuple[str, ...]
    covariates: Mapping[str, tuple[str, ...] | None]
    reports: bool
    most: int | None

    @classmethod
    def of(cls, pipeline: ProgressionPipeline) -> Reads:
        """As the configuration of `pipeline` and of its conditioner say."""
        known = pipeline.conditioner.config
        words = {name: tuple(map(str, values)) for name, values in dict(known.words).items()}
        covariates: dict[str, tuple[str, ...] | None] = {**dict.fromkeys(known.numbers), **words}
        unit, most = pipeline.config.time_unit, pipeline.config.max_history
        reads = bool(known.sentence_dim) and pipeline.text_encoder is not None
        return cls(pipeline.preprocessing, unit, tuple(known.events), covariates, reads, most)


@dataclass(frozen=True)
class Inputs:
    """A case whose images were found and read. `past_dates`, `dates`: ISO dates of the known visits and of the wanted times, or None."""

    asked: ProgressionAsked
    reads: Reads
    images: tuple[Path, ...]
    sha256: tuple[str, ...]
    past_dates: tuple[str | None, ...]
    dates: tuple[str | None, ...]
    flags: tuple[str, ...] = ()

    def read_past(self) -> Tensor:
        """[K,1,*S] in [0,1]: the known visits as the pipeline sees them."""
        return torch.stack([(load_visit(path, self.reads.preprocessing) + 1) / 2 for path in self.images])

    def history(self, past: Tensor, changed: bool = False) -> History:
        """What the pipeline is told: images `past` (of `read_past`), and the rest as asked, or with its counterfactual."""
        asked = self.asked.changed() if changed else self.asked
        return History(
            past,
            [seen.time for seen in asked.past],
            [Event(event.name, event.time, event.value) for event in asked.events if event.name in self.reads.events],
            dict(asked.covariates),
            [seen.report for seen in asked.past],
        )

    def facts(self) -> dict[str, Any]:
        """What the metadata say about the inputs."""
        past = [
            {**seen.model_dump(mode="json", exclude_none=True), "date": day, "image_sha256": digest}
            for seen, day, digest in zip(self.asked.past, self.past_dates, self.sha256)
        ]
        return {
            **self.asked.model_dump(mode="json"),
            "past": past,
            "mode": self.asked.mode or "joint",
            "time_unit": self.reads.time_unit,
            "dates": list(self.dates),
            "flags": list(self.flags),
        }


def moment(time: float, unit: TimeUnit | None) -> str:
    """A time in words: "day 30", "visit 3", "phase 0.4"."""
    noun = {"days": "day", "order": "visit", "phase": "phase", None: "time"}[unit]
    return f"{noun} {time:.6g}"


def inspect(case: ProgressionCase, root: Path | None, reads: Reads) -> Inputs:
    """Find, read and check the images of `case`; names that the pipeline does not know are flagged.

    Raises `CaseError` naming case and field.
    """
    asked, name = case.conditions, "time_unit"
    try:
        if asked.time_unit not in (None, reads.time_unit):
            raise CaseError(f"{asked.time_unit!r}, but this pipeline counts time in {reads.time_unit!r}")
        asked = asked.model_copy(update={"time_unit": reads.time_unit})
        images, digests = [], []
        for number, seen in enumerate(asked.past):
            name = f"past.{number}.image"
            images.append(find_image(seen.image, root))
            digests.append(_digest(load_visit(images[-1], reads.preprocessing)))
    except (CaseError, ImageError, DicomError, OSError) as error:
        raise CaseError(f"case {case.case_id!r}, field {name!r}: {error}") from None
    known = [(seen.time, None if seen.date is None else date.fromisoformat(seen.date)) for seen in asked.past]
    calendar = [(time, day) for time, day in known if day is not None and reads.time_unit == "days"]
    past_dates = [seen.date or _date_at(seen.time, calendar) for seen in asked.past]
    flags = [*_unknown(asked, reads), *_odd_times(asked, calendar)]
    dates = [_date_at(time, calendar) for time in asked.times]
    return Inputs(asked, reads, tuple(images), tuple(digests), tuple(past_dates), tuple(dates), tuple(flags))


def find_image(text: str, root: Path | None) -> Path:
    """The image that a case names: below `root`, unless that is None (then any path is the user's own).

    Raises `CaseError` for a path that leaves `root`, also by a link, or leads nowhere.
    """
    path = Path(text) if root is None else root / text
    if root is not None and (Path(text).is_absolute() or not path.resolve().is_relative_to(root.resolve())):
        raise CaseError(f"{text!r} leads out of {root}; the images of a cases file lie below its folder (or below --root)")
    if not path.is_file():
        raise CaseError(f"there is no image {text}" + ("" if root is None else f" below {root}"))
    return path


def _said(value: float | str | None) -> str:
    return "unknown" if value is None else f"{value:g}" if isinstance(value, float) else value


def _digest(image: Tensor) -> str:
    return hashlib.sha256(image.contiguous().numpy().tobytes()).hexdigest()


def _date_at(time: float, calendar: Sequence[tuple[float, date]]) -> str | None:
    """The date of `time`, counted from the last dated visit before it (else the first one)."""
    if not calendar:
        return None
    start, day = next(((t, d) for t, d in reversed(calendar) if t <= time), calendar[0])
    try:
        return (day + timedelta(days=round(time - start))).isoformat()
    except OverflowError:
        return None


def _unknown(asked: ProgressionAsked, reads: Reads) -> list[str]:
    """What the pipeline will not hear of, in words."""
    flags = []
    changed = asked.changed()
    for name in dict.fromkeys(event.name for event in (*asked.events, *changed.events)):
        if name not in reads.events:
            flags.append(f"event {name!r} is not known to this pipeline (it knows {', '.join(reads.events) or 'none'}): ignored")
    for name, value in dict.fromkeys([*asked.covariates.items(), *changed.covariates.items()]):
        if name not in reads.covariates:
            flags.append(f"covariate {name!r} is not known to this pipeline: ignored")
        elif (words := reads.covariates[name]) is None and not isinstance(value, float):
            flags.append(f"covariate {name!r}: {value!r} is no number: counts as unknown")
        elif words is not None and str(value) not in words:
            flags.append(f"covariate {name!r}: {value!r} is none of {', '.join(words)}: counts as unknown")
    if not reads.reports and any(seen.report for seen in asked.past):
        flags.append("this pipeline reads no reports: ignored")
    if reads.most is not None and len(asked.past) > reads.most:
        flags.append(f"of {len(asked.past)} visits this pipeline looks at the {reads.most} nearest")
    return flags


def _odd_times(asked: ProgressionAsked, calendar: Sequence[tuple[float, date]]) -> list[str]:
    """Times that can be sampled but deserve a word."""
    flags = []
    for (start, first), (end, second) in pairwise(calendar):
        apart = (second - first).days
        if abs(apart - (end - start)) > 1:
            flags.append(f"visits {end - start:g} days apart by their times are {apart} by their dates: the times count")
    if early := [time for time in asked.times if time < asked.past[0].time]:
        flags.append(f"{moment(early[0], asked.time_unit)} lies before every known visit: models learn to look forward")
    return flags
