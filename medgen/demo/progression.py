"""The demo's third part, from the past to the next visit: digital patients' futures beside what came, and one treatment taken away."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from medgen.data.records import Manifest, read_manifest
from medgen.data.visit_records import BIOMARKERS, Visit, VisitSeries
from medgen.demo.page import drawing, fan_chart, picture
from medgen.demo.session import Session, read_grey, read_lines
from medgen.digital.progression import write_dataset
from medgen.sampling.progression import sample

_SEED = 20_260  # a population that no shipped model has seen
_JUDGE = "digital_progression_judge"
_MOVES = {"pleural_effusion_ml": 150.0, "consolidation_ml": 150.0, "edema_ml": 100.0, "cardiothoracic_ratio": 0.03}
"""What counts as a change worth showing, by biomarker."""


def forecast(session: Session) -> dict[str, Any]:
    """Follow digital patients, sample their futures from the first half of their visits; the page's part about it."""
    sizes = session.sizes
    with session.step("digital patients, followed over months", "follow_up") as folder:
        if not (folder / "manifest.parquet").exists():
            write_dataset(folder, sizes.followed, seed=_SEED)
        manifest = read_manifest(folder / "manifest.parquet", record=VisitSeries)
        shown = choose(manifest, sizes.shown)
    with session.step("their futures, from their past", "futures") as out:
        cases = session.out / "futures.jsonl"
        lines = [line for series, name in shown for line in write_cases(series, name, sizes.futures)]
        cases.write_text("".join(json.dumps(line) + "\n" for line in lines))
        sample(session.progression, out, cases=cases, root=folder, steps=sizes.progression_steps, judge=_JUDGE)
        drawn = read_lines(out / "metadata.jsonl")
    patients = [describe(manifest, series, name, out, drawn) for series, name in shown]
    changes = [difference(out, line) for line in drawn if line["purpose"] == "change"]
    return {"patients": patients, "changes": changes[:1], "futures": sum(line["purpose"] == "forecast" for line in drawn)}


def choose(manifest: Manifest[VisitSeries], count: int) -> list[tuple[VisitSeries, str]]:
    """The `count` patients whose biomarkers move most between the last known visit and the last one; each with that biomarker.

    No two of one disease, as long as there are others.
    """
    moved: list[tuple[float, VisitSeries, str]] = []
    for series in manifest.records:
        start, end = series.visits[_known(series) - 1].truth, series.visits[-1].truth
        if len(series.visits) > 2:
            moved += [(abs(end[name] - start[name]) / much, series, name) for name, much in _MOVES.items() if name in end]
    moved.sort(key=lambda entry: -entry[0])
    first: dict[str, tuple[VisitSeries, str]] = {}
    for _, series, name in moved:
        if all(series is not other for other, _ in first.values()):
            first.setdefault(name, (series, name))
    return list(first.values())[:count]


def _known(series: VisitSeries) -> int:
    return int(series.extra.get("futures_cut", (len(series.visits) + 1) // 2))


def write_cases(series: VisitSeries, name: str, futures: int) -> list[dict[str, Any]]:
    """The patient's forecast, and the same without the treatments that are still to come, if there are any."""
    known = _known(series)
    past, later = series.visits[:known], series.visits[known:]
    line: dict[str, Any] = {
        "case_id": series.record_id,
        "seed": 7,
        "n": futures,
        "past": [{"time": v.time, "image": v.image, "report": v.report, "date": v.date} for v in past],
        "times": [v.time for v in later],
        "events": [{"name": e.name, "time": e.time, "value": e.value} for e in series.events],
        "covariates": series.covariates,
        "purpose": "forecast",
    }
    lines = [line]
    planned = [e for e in line["events"] if e["time"] >= past[-1].time]
    if planned and "ratio" not in name:
        spared = [e for e in line["events"] if e not in planned]
        lines.append(
            {
                **line,
                "case_id": f"{series.record_id}-untreated",
                "n": 1,
                "purpose": "change",
                "counterfactual": {"events": spared},
            }
        )
    return lines


def describe(
    manifest: Manifest[VisitSeries], series: VisitSeries, name: str, out: Path, drawn: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """One patient of the page: films of past, truth and three futures, and the biomarker's fan over time."""
    known, futures = _known(series), [line for line in drawn if line["case_id"] == series.record_id]
    times = [visit.time for visit in series.visits]
    readings = np.array([[frame["biomarkers"][name] for frame in line["frames"]] for line in futures], dtype=float)
    unit = BIOMARKERS[name]
    rows: list[tuple[str, list[dict[str, Any] | None]]] = [
        (
            "the past, and what came",
            [_film(manifest.path(str(v.image)), v, name, i >= known) for i, v in enumerate(series.visits)],
        )
    ]
    for number, line in enumerate(futures[:3], start=1):
        films: list[dict[str, Any] | None] = [None] * (known - 1) + [
            _film(manifest.path(str(series.visits[known - 1].image)), series.visits[known - 1], name, False)
        ]
        films += [
            {"image": picture(read_grey(out / frame["file_name"])), "label": f"day {frame['time']:.0f}", "kind": "made",
             "value": _value(frame["biomarkers"][name], unit)}
            for frame in line["frames"]
        ]  # fmt: skip
        rows.append((f"future {number}", films))
    return {
        "title": f"{series.covariates.get('sex', '')} {series.covariates.get('age', 0):.0f}: {name.rsplit('_', 1)[0].replace('_', ' ')}",
        "words": ", ".join(f"{e.name} on day {e.time:.0f}" for e in series.events) or "no treatment",
        "rows": rows,
        "columns": len(series.visits),
        "chart": fan_chart(
            times, [v.truth.get(name, 0.0) for v in series.visits], known, readings, [e.time for e in series.events],
            name.rsplit("_", 1)[0].replace("_", " ") + (f", {unit}" if unit else ""),
        ),
    }  # fmt: skip


def _film(path: Path, visit: Visit, name: str, later: bool) -> dict[str, Any]:
    value = _value(visit.truth.get(name, 0.0), BIOMARKERS[name])
    return {
        "image": picture(read_grey(path)),
        "label": f"day {visit.time:.0f}",
        "kind": "came" if later else "past",
        "value": value,
    }


def _value(value: float | None, unit: str) -> str:
    if value is None:
        return "–"
    return f"{value:.0f} {unit}" if unit else f"{value:.2f}"


def difference(out: Path, line: Mapping[str, Any]) -> dict[str, Any]:
    """What taking the planned treatments away does to one future: the model's response."""
    return {"image": drawing(Image.open(out / line["difference"])), "words": line["change"], "means": line["change_means"]}
