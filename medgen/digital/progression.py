"""Digital follow-ups: chest patients seen at irregular days, written as a manifest of visit series with truth and simulated futures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date, timedelta
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import nibabel as nib
import numpy as np
import torch
from PIL import Image

from medgen.data.visit_records import BIOMARKERS, Visit, VisitSeries
from medgen.digital.anatomy import Anatomy, load_anatomy
from medgen.digital.courses import Course, draw_course, simulate_futures
from medgen.digital.patient import Finding, Patient, Study, draw_patient
from medgen.digital.reports import write_report
from medgen.digital.visit_rendering import (
    BiomarkerTable,
    HabitualBody,
    Rendered,
    base_acquisition,
    biomarker_table,
    findings_at,
    fix_places,
    render_film,
    render_volume,
    visit_acquisition,
)  # fmt: skip
from medgen.digital.writing import split_of, write_patients
from medgen.seeds import stable_seed

SIZES = {2: 128, 3: 64}
"""Pixels or voxels along each axis by default."""


@dataclass(frozen=True)
class FollowUp:
    """A digital patient with a course. `places`: where nodules and consolidations sit for life; `habit`: the body films are taken of."""

    patient: Patient
    course: Course
    habit: HabitualBody
    places: dict[str, tuple[float, float, float]]


def draw_follow_up(seed: int, index: int, size: int, visits: tuple[int, int], anatomy: Anatomy) -> FollowUp:
    """Patient `index` of the population `seed`, whose body has `size` voxels across."""
    patient = draw_patient(seed, index)
    course = draw_course(patient, visits)
    habit = HabitualBody(patient, base_acquisition(patient), size, anatomy)
    placed = any(track.name in ("nodule", "consolidation") for track in course.tracks)
    places = fix_places(habit.body(), course.tracks, course.severities.max(0)) if placed else {}
    return FollowUp(patient, course, habit, places)


def study_at(follow_up: FollowUp, visit: int) -> Study:
    """The study of visit number `visit`: the findings as severe as the course says, the acquisition of that day."""
    patient, course = follow_up.patient, follow_up.course
    findings = findings_at(course.tracks, course.severities[visit], follow_up.places)
    acquisition = visit_acquisition(follow_up.habit.base, patient, visit)
    return Study(patient, f"{patient.patient_id}-v{visit:02d}", findings, (acquisition,))


def write_dataset(
    out: Path,
    n: int,
    seed: int = 0,
    dim: Literal[2, 3] = 2,
    size: int | None = None,
    visits: tuple[int, int] = (2, 12),
    futures: int = 64,
    processes: int | None = None,
) -> Path:
    """Write the follow-ups of `n` digital patients below `out` and return the path of `manifest.parquet`.

    The same command again continues where it stopped. Beside the manifest lie images/ (8-bit PNG) with thickness/ (.npz: mm of heart,
    lungs, effusion, consolidation, nodule, oedema that each ray crosses) or volumes/ (int16 NIfTI in HU), futures/ (.npz: simulated
    continuations of the validation and test patients, whose visits before `extra["futures_cut"]` are the history) and sheet.png.

    Args:
        out: folder to write into.
        n: how many patients.
        seed: of the population; patients of a smaller n are the first of a larger one.
        dim: 2 for chest films, 3 for the CT itself.
        size: pixels or voxels along each axis; default: 128 in 2D, 64 in 3D.
        visits: fewest and most visits of a patient.
        futures: simulated continuations of every validation and test patient.
        processes: how many cores to use; default: all there are.
    """
    size = size or SIZES.get(dim, 128)
    if n < 1 or dim not in SIZES or size < 16 or size % 2 or not 2 <= visits[0] <= visits[1] or futures < 1:
        raise ValueError(
            f"n and futures must be at least 1 (got {n}, {futures}), dim 2 or 3 ({dim}), size even and at least 16 ({size}), "
            f"visits at least 2 and in order ({visits[0]}, {visits[1]})"
        )
    _anatomy(size * (dim - 1))  # before the workers start: they all find the cache
    for name in ("futures", *(("images", "thickness") if dim == 2 else ("volumes",))):
        (out / name).mkdir(parents=True, exist_ok=True)
    settings: dict[str, Any] = {"seed": seed, "dim": dim, "size": size, "visits": list(visits), "futures": futures}
    work = partial(_write_patient, out=str(out), seed=seed, dim=dim, size=size, visits=(visits[0], visits[1]), futures=futures)
    records = write_patients(
        out, n, work, VisitSeries, settings, name="digital-progression", what="patients", processes=processes
    )
    write_sheet(out, records)
    return out / "manifest.parquet"


@lru_cache(maxsize=2)
def _anatomy(size: int) -> Anatomy:
    return load_anatomy(size)


def _write_patient(
    index: int, out: str, seed: int, dim: Literal[2, 3], size: int, visits: tuple[int, int], futures: int
) -> list[VisitSeries]:
    torch.set_num_threads(1)
    folder, anatomy = Path(out), _anatomy(size * (dim - 1))
    record_id = draw_patient(seed, index).patient_id
    split = split_of(record_id)
    follow_up = draw_follow_up(seed, index, size * (dim - 1), visits, anatomy)
    course = follow_up.course
    origin = date(2150, 1, 1) + timedelta(days=stable_seed("first visit", record_id) % 3650)
    written = []
    for visit, day in enumerate(course.days):
        study = study_at(follow_up, visit)
        rendered = render_film(study, follow_up.habit) if dim == 2 else render_volume(study, size, anatomy)
        written.append(_write_visit(folder, study, rendered, course, visit, (origin + timedelta(days=day)).isoformat()))
    extra: dict[str, Any] = {}
    if split != "train":
        table = biomarker_table(follow_up.habit, course.tracks, follow_up.places, size if dim == 3 else None)
        extra = _write_futures(folder, record_id, table, course, futures)
    regimes = np.concatenate([state.regime for state in course.states]).T
    truth = {
        "tracks": [asdict(track) for track in course.tracks],
        "regimes": {track.key: row.tolist() for track, row in zip(course.tracks, regimes, strict=True)},
    }
    return [
        VisitSeries(
            record_id=record_id,
            patient_id=record_id,
            study_id=record_id,
            visits=tuple(written),
            modality="cxr" if dim == 2 else "ct",
            dim=dim,
            time_unit="days",
            split=split,
            events=course.events,
            covariates=dict(course.covariates),
            truth=truth,
            extra=extra,
        )
    ]


def _write_visit(folder: Path, study: Study, rendered: Rendered, course: Course, visit: int, on: str) -> Visit:
    (acquisition,) = study.acquisitions
    extra: dict[str, Any] = {"acquisition": asdict(acquisition)}
    if rendered.thickness is not None:
        image = f"images/{study.study_id}.png"
        Image.fromarray((rendered.image * 255).round().astype(np.uint8)).save(folder / image)
        extra["thickness"] = f"thickness/{study.study_id}.npz"
        np.savez_compressed(folder / extra["thickness"], mm=rendered.thickness)
    else:
        image = f"volumes/{study.study_id}.nii.gz"
        nib.save(nib.Nifti1Image(rendered.image, rendered.affine), folder / image)
    truth = {name: round(value, 4) for name, value in rendered.truth.items()}
    for track, severity in zip(course.tracks, course.severities[visit], strict=True):
        truth[f"{track.key}_severity"] = round(float(severity), 4)
    return Visit(
        study.study_id,
        course.days[visit],
        image,
        on,
        acquisition.view if rendered.affine is None else None,
        _report(study),
        truth,
        extra,
    )


def _report(study: Study) -> str:
    """Findings and impression. A heart within normal limits is not mentioned; what is faint is called mild."""

    def worded(finding: Finding) -> Finding:
        return replace(finding, severity=max(finding.severity, 0.02))

    seen = tuple(worded(f) for f in study.findings if f.name != "cardiomegaly" or f.severity > 0)
    findings, impression, _ = write_report(replace(study, findings=seen))
    return f"{findings} {impression}" if findings != impression else findings


def _write_futures(folder: Path, record_id: str, table: BiomarkerTable, course: Course, m: int) -> dict[str, Any]:
    """Simulated continuations of the course from a visit drawn at random; returns the series' `extra`."""
    cut = futures_cut(record_id, len(course.days))
    severities = simulate_futures(course, cut, m, stable_seed(record_id))
    values = table.biomarkers(severities, np.random.default_rng(stable_seed("future poses", record_id)))
    np.savez_compressed(
        folder / f"futures/{record_id}.npz",
        times=np.array(course.days[cut:], dtype=np.float32),
        values=values.astype(np.float32),
        names=np.array(list(BIOMARKERS)),
    )
    return {"futures": f"futures/{record_id}.npz", "futures_cut": cut}


def futures_cut(record_id: str, visits: int) -> int:
    """How many of a patient's visits are history: at least one is, and at least one is not."""
    return 1 + stable_seed("futures cut", record_id) % (visits - 1)


def write_sheet(out: Path, records: Sequence[VisitSeries], rows: int = 10, columns: int = 7) -> None:
    """The first patients, one per row: films (or coronal slices) with day and biomarkers, and what was done between them."""
    from matplotlib.figure import Figure

    shown = list(records[:rows])
    figure = Figure(figsize=(columns * 1.75, len(shown) * 2.25), layout="constrained")
    axes = figure.subplots(len(shown), columns, squeeze=False)
    for row, record in zip(axes, shown, strict=True):
        for axis in row:
            axis.axis("off")
        for i, (axis, visit) in enumerate(zip(row, record.visits)):
            axis.imshow(_picture(out / str(visit.image)), cmap="gray", vmin=0, vmax=255)
            later = record.visits[i + 1].time if i + 1 < len(record.visits) else visit.time
            done = [f"{e.name} d{e.time:g} >" for e in record.events if visit.time <= e.time < later]
            axis.set_title("\n".join(done), fontsize=6, color="tab:red", loc="right", pad=2)
            axis.text(0.5, -0.03, _caption(visit), fontsize=6, ha="center", va="top", transform=axis.transAxes)
    figure.savefig(out / "sheet.png", dpi=110)


def _picture(path: Path) -> np.ndarray:
    if path.suffix == ".png":
        return np.asarray(Image.open(path))
    volume = np.asarray(nib.load(path).dataobj)
    middle = volume[:, volume.shape[1] // 2]  # [R,S]; a radiologist faces the patient: right on the left, head up
    return np.clip((middle[::-1, ::-1].T + 1000.0) / 1200 * 255, 0, 255)


def _caption(visit: Visit) -> str:
    """Day and what is not normal, short."""
    short = {"pleural_effusion_ml": "eff", "consolidation_ml": "cons", "edema_ml": "edema", "nodule_mm3": "nod"}
    words = [f"{text} {visit.truth[name]:.0f}" for name, text in short.items() if visit.truth[name]]
    lungs = f"CTR {visit.truth['cardiothoracic_ratio']:.2f}  air {visit.truth['aerated_lung_ml']:.0f}"
    return f"day {visit.time:g}\n{lungs}\n{', '.join(words)}"
