"""Held-out patients: what was known at the cut, what came later, and (digital patients) how else it could have come.

Biomarkers are compared across kinds in units of their spread over the held-out visits. A patient's primary biomarker is the one whose
change after the cut is expected to be largest in these units: expected over the simulated futures, so that what happened to happen
does not choose it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medgen.data.records import Split, read_manifest
from medgen.data.visit_records import BIOMARKERS, Event, Visit, VisitSeries
from medgen.evaluation.images import EvaluationError
from medgen.evaluation.statistics import Floats

MOVES = 0.5  # spreads: an expected change that counts as a movement whose direction can be asked for
AGREED = 0.8  # share of the simulated futures that go the way their mean goes


@dataclass(frozen=True)
class Futures:
    """Simulated continuations from the state at the last visit before the cut: times [T], values [M,T] by biomarker."""

    times: Floats
    values: Mapping[str, Floats]


@dataclass(frozen=True)
class Patient:
    """One held-out series. Its history are the imaged ones of `series.visits[:cut]`; wanted are the imaged ones after."""

    series: VisitSeries
    root: Path
    futures: Futures | None

    @property
    def record_id(self) -> str:
        return self.series.record_id

    @cached_property
    def cut(self) -> int:
        """The series' own `futures_cut`; without one, the first half of the visits is history."""
        own = self.series.extra.get("futures_cut")
        return int(own) if own is not None else max(1, len(self.series.visits) // 2)

    @cached_property
    def past(self) -> tuple[Visit, ...]:
        return tuple(v for v in self.series.visits[: self.cut] if v.image is not None)

    @cached_property
    def later(self) -> tuple[Visit, ...]:
        return tuple(v for v in self.series.visits[self.cut :] if v.image is not None)

    @property
    def events_so_far(self) -> tuple[Event, ...]:
        return tuple(event for event in self.series.events if event.time <= self.past[-1].time)


def read_patients(reference: Path, split: Split | None = "test") -> list[Patient]:
    """The patients of a split of a visit manifest (None: all) that have an image before and after their cut.

    Raises `EvaluationError` where nobody has.
    """
    manifest = read_manifest(reference, split, record=VisitSeries)
    patients = [Patient(record, manifest.root, read_futures(manifest.root, record)) for record in manifest.records]
    patients = [p for p in patients if p.past and p.later]
    if not patients:
        raise EvaluationError(f"{reference}: no patient of split {split!r} has an image before and after the cut")
    return patients


def read_futures(root: Path, series: VisitSeries) -> Futures | None:
    """The simulated continuations that the record names, if it names any."""
    if series.extra.get("futures") is None:
        return None
    with np.load(root / str(series.extra["futures"]), allow_pickle=False) as stored:
        values = np.asarray(stored["values"], dtype=np.float64)
        names = [str(name) for name in stored["names"]]
        return Futures(np.asarray(stored["times"], dtype=np.float64), {name: values[..., i] for i, name in enumerate(names)})


def truth(visit: Visit, name: str) -> float:
    """A biomarker of a visit as the manifest knows it; NaN where it does not."""
    value = visit.truth.get(name)
    return float("nan") if value is None else float(value)


def spreads(patients: Sequence[Patient]) -> dict[str, float]:
    """Standard deviation of each biomarker over all visits of these patients; those unknown or the same everywhere are left out.

    Of volumes, lung air alone is measured.
    """
    visits = [visit for patient in patients for visit in patient.series.visits]
    measured = BIOMARKERS if patients[0].series.dim == 2 else ("aerated_lung_ml",)
    found = {name: float(np.nanstd(v)) for name in measured if np.isfinite(v := _column(visits, name)).sum() > 1}
    return {name: spread for name, spread in found.items() if spread > 0}


def _column(visits: Sequence[Visit], name: str) -> Floats:
    return np.array([truth(visit, name) for visit in visits])


def expected_changes(patient: Patient, spread: Mapping[str, float]) -> dict[str, float]:
    """Mean |change| after the last past visit, in spreads: over the simulated futures, or of what came where none were simulated."""
    changes = {}
    for name, unit in spread.items():
        last = truth(patient.past[-1], name)
        if patient.futures is not None and name in patient.futures.values:
            values = patient.futures.values[name]
        else:
            values = _column(patient.later, name)
        if np.isfinite(last) and np.isfinite(values).any():
            changes[name] = float(np.nanmean(np.abs(values - last)) / unit)
    return changes


def primary(patient: Patient, spread: Mapping[str, float]) -> str | None:
    """The biomarker that is expected to change most; None where none is known."""
    changes = expected_changes(patient, spread)
    return max(changes, key=lambda name: changes[name]) if changes else None


def agreed(change: NDArray[np.floating], unit: float) -> int:
    """Direction (-1, 1) of simulated changes [M] whose mean is at least `MOVES` units and that go the same way; else 0."""
    mean = float(np.mean(change))
    if abs(mean) < MOVES * unit or float(np.mean(np.sign(change) == np.sign(mean))) < AGREED:
        return 0
    return int(np.sign(mean))
