"""Which way, and how far, a treatment moves a patient's biomarker: by the patient's own simulator where there is one, else by its aim.

A manifest cannot tell: treatments follow severity, so those who were treated fare differently for other reasons than the treatment.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from medgen.data.visit_records import Event
from medgen.digital.courses import TREATMENTS, Course, State, advance, draw_course
from medgen.digital.patient import draw_patient
from medgen.evaluation.progression.patients import MOVES, Patient, truth
from medgen.seeds import stable_seed

MEASURED_BY = {"pleural_effusion": "pleural_effusion_ml", "consolidation": "consolidation_ml", "edema": "edema_ml"}
DELAY = {"drainage": 3.0, "antibiotic": 14.0, "diuretic": 7.0}  # days from the treatment to the day that is asked for
RECENT = 21.0  # days before the last visit within which the same treatment would still be at work
CONTINUATIONS = 200


@dataclass(frozen=True)
class Response:
    """An event on the day after the last visit, and what it must do to `biomarker` at `time`: direction, and mean change if simulated."""

    event: Event
    time: float
    biomarker: str
    direction: int
    change: float | None


def responses(patient: Patient, spread: Mapping[str, float]) -> Iterator[Response]:
    """Of every treatment that has at least `MOVES` spreads of something to act on, and that was not given lately.

    Simulated responses must be as large, too, in the mean over the continuations.
    """
    if patient.series.time_unit != "days":
        return
    last, course = patient.past[-1], digital_course(patient)
    for treatment, disease in TREATMENTS.items():
        biomarker = MEASURED_BY[disease]
        value, unit = truth(last, biomarker), spread.get(biomarker, np.inf)
        lately = any(e.name == treatment and last.time - RECENT < e.time <= last.time for e in patient.series.events)
        if lately or not value >= MOVES * unit:
            continue
        event, time = Event(treatment, last.time + 1), last.time + 1 + DELAY[treatment]
        change = None if course is None else value * _relative_change(course, patient, event, time)
        if change is None or abs(change) >= MOVES * unit:
            yield Response(event, time, biomarker, -1 if change is None else int(np.sign(change)), change)


def digital_course(patient: Patient) -> Course | None:
    """The course behind a digital patient, drawn again from the id and checked against the manifest; None for anybody else."""
    found = re.fullmatch(r"D(\d+)-(\d+)", patient.series.patient_id)
    if found is None:
        return None
    course = draw_course(draw_patient(int(found[1]), int(found[2])))
    days = [visit.time for visit in patient.series.visits]
    drawn = [day - course.days[0] for day in course.days[: len(days)]]
    same = len(drawn) == len(days) and np.allclose(np.array(days) - days[0], drawn) and course.events == patient.series.events
    return course if same else None


def _relative_change(course: Course, patient: Patient, event: Event, time: float) -> float:
    """Mean severity of the treated disease at `time` with the event minus without, over the severity at the last visit."""
    number = patient.series.visits.index(patient.past[-1])
    now, names = course.states[number], [track.name for track in course.tracks]
    treated = [i for i, name in enumerate(names) if name == TREATMENTS[event.name]]
    start = State(now.time, np.repeat(now.x, CONTINUATIONS, 0), np.repeat(now.regime, CONTINUATIONS, 0))
    seed = stable_seed("treatment response", patient.record_id, event.name)
    ends = [
        advance(course.tracks, start, time, (*patient.events_so_far, *more), np.random.default_rng(seed)).x[:, treated]
        for more in ((), (event,))
    ]
    return float((ends[1].mean(0) - ends[0].mean(0)).sum() / now.x[:, treated].sum())
