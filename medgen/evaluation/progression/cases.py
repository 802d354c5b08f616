"""The standard forecasting cases of a held-out manifest: what comes next, and the controls that show what a forecast follows.

The folder that is written stands alone: cases.jsonl and the past images (past/) that it names. Nothing of a case lies after the cut
except planned events. Extra fields travel through sampling into metadata.jsonl, where evaluation finds them:
purpose     forecast, zero_gap, longer_gap, treatment, missing, rollout or between
pair_id     cases that share a seed and differ in one thing; `variant` says in which (short and long, off and on, joint and autoregressive)
biomarker, direction    of pairs: what must move and which way (-1, 1), as the simulated futures or the drug say; `truth_change` by how much
record_id, patient_id, removed (how many past visits a `missing` case lacks), last_kept
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medgen.data.records import Split
from medgen.data.visit_records import Event, Visit
from medgen.evaluation.images import EvaluationError
from medgen.evaluation.progression.patients import MOVES, Patient, agreed, primary, read_patients, spreads, truth
from medgen.evaluation.progression.treatments import responses
from medgen.seeds import stable_seed

STEPS = 12  # of a roll-out
STEP = {"days": 30.0, "order": 1.0}  # time from one step of a roll-out to the next
INTERIOR = 5  # frames asked for between two known ends


def write_progression_cases(
    reference: Path,
    out: Path,
    patients: int = 100,
    trajectories: int = 16,
    controls: int = 30,
    pairs: int = 4,
    rollouts: int = 12,
    seed: int = 0,
    split: Split | None = "test",
) -> Path:
    """Write the standard forecasting cases, for `medgen sample progression --cases OUT/cases.jsonl`, with the past images they need.

    The defaults ask for about 2,300 trajectories, most of a few frames: 40 minutes at 1 s each. All but the forecasts take a third of it.

    Args:
        reference: manifest of held-out visit series (digital ones say how else the future could have come).
        out: folder to write: cases.jsonl and past/.
        patients: whose later visits are forecast from what came before the cut; the first ones in an order that the seed draws.
        trajectories: futures of each of them; calibration wants 16 or more.
        controls: patients of every other purpose: zero gap, a longer gap, a treatment on and off, missing visits, both ends known.
        pairs: trajectories of a case in pairs, and of one with visits missing; their median is read.
        rollouts: patients followed for 12 further steps, jointly and step by step.
        seed: of the choice and of the noise.
        split: which split of the manifest; all of it with None.

    Raises `EvaluationError` where no patient can be forecast.
    """
    if min(patients, trajectories, pairs) < 1 or min(controls, rollouts) < 0:
        raise EvaluationError(
            f"patients, trajectories and pairs must be at least 1 (got {patients}, {trajectories}, {pairs}), controls and rollouts "
            f"at least 0 (got {controls}, {rollouts})"
        )
    held = read_patients(reference, split)
    order = np.random.default_rng(stable_seed("progression cases", seed)).permutation(len(held))
    spread = spreads(held)
    held = [held[i] for i in order]
    writer = _Writer(out, seed)
    chosen = held[:patients]
    cases = [
        *(writer.forecast(p, trajectories) for p in chosen),
        *(writer.case("zero_gap", p, [p.past[-1].time]) for p in chosen[:controls]),
        *_longer_gaps(writer, held, spread, controls, pairs),
        *_treatments(writer, held, spread, controls, pairs),
        *_missing(writer, chosen, controls, min(pairs, trajectories), seed),
        *_rollouts(writer, chosen[:rollouts]),
        *_between(writer, held, spread, controls),
    ]
    out.mkdir(parents=True, exist_ok=True)
    (out / "cases.jsonl").write_text("".join(json.dumps(case) + "\n" for case in cases), encoding="utf-8")
    return out / "cases.jsonl"


@dataclass(frozen=True)
class _Writer:
    """Makes case lines and copies the images that they name below `folder`."""

    folder: Path
    seed: int

    def case(self, purpose: str, patient: Patient, times: Sequence[float], **changes: Any) -> dict[str, Any]:
        """A case of `patient`; its seed depends on the patient alone, so that all that asks about them starts from the same noise.

        `changes` replace fields; `past` may be given as visits, `events` as `Event`s, `name` tells cases of one purpose apart.
        """
        series = patient.series
        past, events = changes.pop("past", patient.past), changes.pop("events", series.events)
        name = changes.pop("name", "")
        return {
            "case_id": f"{purpose}-{series.record_id}{'-' if name else ''}{name}",
            "seed": stable_seed("progression case", self.seed, series.record_id) % 2**31,
            "n": 1,
            "past": [self._visit(patient, visit) for visit in past],
            "times": [float(time) for time in times],
            "events": [asdict(event) for event in events],
            "covariates": dict(series.covariates),
            "mode": "joint",
            "purpose": purpose,
            "record_id": series.record_id,
            "patient_id": series.patient_id,
            **changes,
        }

    def forecast(self, patient: Patient, trajectories: int) -> dict[str, Any]:
        """All later visits from all that came before the cut."""
        return self.case("forecast", patient, [visit.time for visit in patient.later], n=trajectories)

    def _visit(self, patient: Patient, visit: Visit) -> dict[str, Any]:
        source = patient.root / str(visit.image)
        target = self.folder / "past" / f"{patient.record_id}-{visit.visit_id}{''.join(source.suffixes[-2:])}"
        if not target.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
        return {"time": visit.time, "image": f"past/{target.name}", "report": visit.report, "view": visit.view}


def _longer_gaps(
    writer: _Writer, held: Sequence[Patient], spread: dict[str, float], count: int, n: int
) -> Iterator[dict[str, Any]]:
    """The same patient and noise at two dates between which the simulated futures move, and agree on where."""
    found = 0
    for patient in held:
        moved = _movement(patient, spread)
        if moved is None or found == count:
            continue
        found += 1
        name, short, long, change = moved
        facts = {"biomarker": name, "direction": int(np.sign(change)), "truth_change": change, "n": n}
        for variant, time in (("short", short), ("long", long)):
            yield writer.case("longer_gap", patient, [time], name=variant, variant=variant, pair_id=patient.record_id, **facts)


def _movement(patient: Patient, spread: dict[str, float]) -> tuple[str, float, float, float] | None:
    """(biomarker, short gap, long gap, mean change) of the largest movement that the futures agree on, in spreads."""
    best: tuple[float, tuple[str, float, float, float]] | None = None
    if patient.futures is None:
        return None
    for name, unit in spread.items():
        last = truth(patient.past[-1], name)
        if name not in patient.futures.values or not np.isfinite(last):
            continue
        values = patient.futures.values[name]
        values = np.column_stack([np.full(len(values), last), values])
        times = [patient.past[-1].time, *patient.futures.times]
        for i in range(len(times)):
            for j in range(i + 1, len(times)):
                change = values[:, j] - values[:, i]
                size = abs(float(change.mean())) / unit
                if agreed(change, unit) and (best is None or size > best[0]):
                    best = size, (name, float(times[i]), float(times[j]), float(change.mean()))
    return None if best is None else best[1]


def _treatments(
    writer: _Writer, held: Sequence[Patient], spread: dict[str, float], count: int, n: int
) -> Iterator[dict[str, Any]]:
    """The same patient and noise, treated on the day after the last visit or not; nothing else is planned in either."""
    found = 0
    for patient in held:
        for response in responses(patient, spread):
            if found == count:
                return
            found += 1
            facts = {
                "biomarker": response.biomarker,
                "direction": response.direction,
                "truth_change": response.change,
                "n": n,
                "pair_id": f"{patient.record_id}-{response.event.name}",
            }
            so_far: tuple[Event, ...] = patient.events_so_far
            for variant, events in (("off", so_far), ("on", (*so_far, response.event))):
                name = f"{response.event.name}-{variant}"
                yield writer.case("treatment", patient, [response.time], name=name, variant=variant, events=events, **facts)


def _missing(writer: _Writer, held: Sequence[Patient], count: int, n: int, seed: int) -> Iterator[dict[str, Any]]:
    """A third of the past visits removed at random, of patients who have at least two; forecasts have the same first `n` noises."""
    enough = [patient for patient in held if len(patient.past) > 1]
    for patient in enough[:count]:
        past = patient.past
        rng = np.random.default_rng(stable_seed("missing visits", seed, patient.record_id))
        gone = set(rng.choice(len(past), size=max(1, round(len(past) / 3)), replace=False).tolist())
        kept = [visit for i, visit in enumerate(past) if i not in gone]
        facts = {"removed": len(gone), "last_kept": len(past) - 1 not in gone, "n": n}
        yield writer.case("missing", patient, [visit.time for visit in patient.later], past=kept, **facts)


def _rollouts(writer: _Writer, held: Sequence[Patient]) -> Iterator[dict[str, Any]]:
    """Twelve steps beyond the last visit with nothing planned: all at once, and each from what was made before."""
    for patient in held:
        step = STEP.get(patient.series.time_unit)
        if step is None:  # a cycle has no beyond
            continue
        times = [patient.past[-1].time + step * (k + 1) for k in range(STEPS)]
        common: dict[str, Any] = {"events": patient.events_so_far, "pair_id": patient.record_id}
        for mode in ("joint", "autoregressive"):
            yield writer.case("rollout", patient, times, name=mode, mode=mode, variant=mode, **common)


def _between(writer: _Writer, held: Sequence[Patient], spread: dict[str, float], count: int) -> Iterator[dict[str, Any]]:
    """Two visits between which a biomarker moves and nothing is done to the patient: the states from one to the other, ends included."""
    found = 0
    for patient in held:
        ends = _ends(patient, spread)
        if ends is None or found == count:
            continue
        found += 1
        name, first, last = ends
        change = truth(last, name) - truth(first, name) if name else float("nan")
        facts = {"biomarker": name, "direction": int(np.sign(change)), "truth_change": change} if name else {}
        times = np.linspace(first.time, last.time, INTERIOR + 2)
        yield writer.case("between", patient, times.tolist(), past=[first, last], **facts)


def _ends(patient: Patient, spread: dict[str, float]) -> tuple[str | None, Visit, Visit] | None:
    """(biomarker, first visit, last visit) of the largest movement without an event in between; unknown biomarkers: the longest gap."""
    visits = patient.series.imaged
    calm = [
        (a, b)
        for i, a in enumerate(visits)
        for b in visits[i + 1 :]
        if not any(a.time < event.time <= b.time for event in patient.series.events)
    ]
    if not calm:
        return None
    if primary(patient, spread) is None:
        return (None, *max(calm, key=lambda pair: pair[1].time - pair[0].time))
    moves = [
        (abs(truth(b, name) - truth(a, name)) / unit, name, a, b)
        for name, unit in spread.items()
        for a, b in calm
        if np.isfinite(truth(a, name)) and np.isfinite(truth(b, name))
    ]
    size, name, a, b = max(moves, key=lambda move: move[0], default=(0.0, "", visits[0], visits[0]))
    return (name, a, b) if size >= MOVES else None
