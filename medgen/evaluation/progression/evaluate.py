"""`medgen evaluate progression`: forecasts against the true follow-ups, against simulated futures, and beside every baseline."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from medgen import __version__
from medgen.data import disk_cache
from medgen.data.records import read_manifest
from medgen.data.visit_images import VisitPreprocessing
from medgen.data.visit_records import BIOMARKERS, VisitSeries
from medgen.evaluation.echo.targets import Target
from medgen.evaluation.features import fingerprint
from medgen.evaluation.images import EvaluationError, read_metadata
from medgen.evaluation.progression import controls, scores, sequences
from medgen.evaluation.progression.bands import Calibration, calibration, judge_errors
from medgen.evaluation.progression.collect import Reader, Real, Sampled, read_real, read_sampled
from medgen.evaluation.progression.controls import Directions, Identity, Missing, ZeroGap
from medgen.evaluation.progression.patients import read_patients, spreads
from medgen.evaluation.progression.points import Points, gather, reconstruct
from medgen.evaluation.progression.scores import Biomarkers, Stratum, Table
from medgen.evaluation.progression.sequences import Between, Rollout
from medgen.evaluation.progression.targets import targets
from medgen.evaluation.statistics import Floats
from medgen.evaluation.text_to_cxr import plain
from medgen.models.film_meter import FilmMeter, load_film_meter

READABLE = 0.5  # R² on real images from which the judge counts as able to read a biomarker


@dataclass(frozen=True)
class Evaluation:
    """All that one run measured. Picture tables by method and measure: of all later visits, of those where something changed, the rest.

    judge_fit: R² of the judge on real images by biomarker; what it cannot read (below `READABLE`) is nobody's primary biomarker, and
    no control about it is scored.
    """

    facts: dict[str, Any]
    targets: tuple[Target, ...]
    pictures: Table
    changed_pictures: Table
    unchanged_pictures: Table
    biomarkers: Biomarkers | None
    calibration: Calibration | None
    strata: tuple[Stratum, ...]
    zero_gap: ZeroGap | None
    longer_gap: Directions | None
    treatment: Directions | None
    identity: Identity | None
    missing: Missing | None
    rollout: Rollout | None
    between: Between | None
    judge_fit: dict[str, float]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Material:
    """The images and rows behind the numbers, for pictures and plots. spread: of the biomarkers that the judge can read; fit: how well."""

    cases: tuple[Sampled, ...]
    real: Mapping[str, Real]
    reader: Reader
    points: Points
    spread: Mapping[str, float]
    fit: Mapping[str, float]


def evaluate(
    generated: Path,
    reference: Path,
    out: Path,
    judge: str = "digital_progression_judge",
    regressor: Path | None = None,
    pipeline: str | None = None,
    split: Literal["train", "val", "test", "all"] = "test",
    seed: int = 0,
) -> Path:
    """Measure forecasts: change, biomarkers, calibration, controls, identity, roll-outs. Writes metrics.json and report.html.

    Args:
        generated: folder that `medgen sample progression` wrote, best from the cases of `medgen evaluate progression-cases`.
        reference: the manifest that those cases were made of: held-out patients whose later visits are known.
        out: folder for metrics.json, report.html and the cache of what the judge has read.
        judge: the network that reads biomarkers off films: a shipped one's name or a folder. Volumes are read by their HU instead.
        regressor: folder of the same patients' forecasts by the deterministic regressor (cases with --trajectories 1 --controls 0
            --rollouts 0 will do); without it that baseline is missing.
        pipeline: name or folder of the pipeline whose autoencoder sets the ceiling; without it the ceiling is missing.
        split: which split of the reference; "all" where the whole manifest was held out.
        seed: of resamples and draws.

    Raises `EvaluationError` for folders that do not fit each other.
    """
    patients = read_patients(reference, None if split == "all" else split)
    asked = {str(line["record_id"]) for line in read_metadata(generated, ("file_name", "case_id", "record_id", "frames"))}
    patients = [p for p in patients if p.record_id in asked] or patients
    source = _Source.of(pipeline, generated, patients[0].series)
    reader = Reader(source.preprocessing, _judge(judge, source.preprocessing), out / "readings")
    out.mkdir(parents=True, exist_ok=True)
    _say(f"judging the visits of {len(patients)} patients")
    real = read_real(patients, reader)
    if source.pipeline is not None:
        real = reconstruct(real, source.pipeline.reconstruct)
    _say(f"judging the images of {generated}")
    cases = read_sampled(generated, reader, real)
    others = [] if regressor is None else read_sampled(regressor, reader, real)
    _say("measuring")
    material = _material(cases, real, reader, others)
    parts = _parts(material, seed)
    facts = {
        "generated": generated.name,
        "models": sorted({str(case.line.get("model", "unknown model")) for case in cases}),
        "cases": len(cases),
        "patients": len({case.record_id for case in cases}),
        "later_visits": len(material.points),
        "reference": reference.parent.name,
        "reference_split": split,
        "reference_manifest": read_manifest(reference, record=VisitSeries).sha256,
        "judge": judge if reader.judge is not None else "HU threshold",
        "judge_learned_from": str(reader.judge.config.get("patients") or "unknown") if reader.judge is not None else "nobody",
        "judge_fingerprint": fingerprint(reader.judge) if reader.judge is not None else "none",
        "regressor": regressor.name if regressor else "none",
        "autoencoder_ceiling": pipeline or "none",
        "seed": seed,
        "medgen": __version__,
    }
    evaluation = Evaluation(facts=facts, targets=targets(parts), warnings=_warnings(cases, parts, material), **parts)
    from medgen.evaluation.progression.report import render  # it draws an `Evaluation`

    page = out / "report.html"
    for path, text in ((out / "metrics.json", json.dumps(plain(evaluation), indent=1)), (page, render(evaluation, material))):
        disk_cache.write_atomically(path, lambda file, text=text: file.write(text.encode()))  # type: ignore[misc]
    return page


@dataclass(frozen=True)
class _Source:
    """How images are prepared, and the pipeline whose autoencoder is the ceiling, if one was given."""

    preprocessing: VisitPreprocessing
    pipeline: Any

    @classmethod
    def of(cls, name: str | None, generated: Path, series: VisitSeries) -> _Source:
        if name is None:
            return cls(_as_generated(generated, series), None)
        from medgen.sampling.source import find_pipeline, load_pipeline

        device = "cuda" if torch.cuda.is_available() else "cpu"
        loaded = load_pipeline(find_pipeline(name), torch.float32, device)
        if not hasattr(loaded, "reconstruct"):
            raise EvaluationError(
                f"{name} is a {type(loaded).__name__}, which makes no follow-ups: --pipeline wants the one that was sampled"
            )
        return cls(loaded.preprocessing, loaded)


def _as_generated(folder: Path, series: VisitSeries) -> VisitPreprocessing:
    """Images at the size of the generated ones, grey values as stored."""
    line = read_metadata(folder, ("file_name", "case_id", "frames"))[0]
    path = line["_path"].with_name(str(line["frames"][0]["file_name"]))
    if series.dim == 3:
        from medgen.data.volumes import read_header

        width, height, depth = read_header(path).shape[:3]
        return VisitPreprocessing(dim=3, size=(depth, height, width))
    with Image.open(path) as image:
        return VisitPreprocessing(size=max(image.size))


def _judge(name: str, preprocessing: VisitPreprocessing) -> FilmMeter | None:
    if preprocessing.dim == 3:
        return None
    try:
        return load_film_meter(name)
    except FileNotFoundError as error:
        raise EvaluationError(f"{error}; pass its folder with --judge") from None


def _material(cases: Sequence[Sampled], real: Mapping[str, Real], reader: Reader, others: Sequence[Sampled]) -> Material:
    spread = spreads([one.patient for one in real.values()])
    forecasts = [case for case in cases if case.purpose == "forecast"]
    if not forecasts:
        raise EvaluationError("no case of purpose 'forecast' among those sampled: nothing can be compared with what came")
    regressed = {case.record_id: case for case in others if case.purpose == "forecast"}
    fit = _fit(real, [name for name in spread if name in cases[0].readings])
    readable = {name: spread[name] for name, r2 in fit.items() if r2 >= READABLE} or {name: spread[name] for name in fit}
    points = gather(forecasts, real, reader, regressed, spread, readable)
    return Material(tuple(cases), real, reader, points, readable, fit)


def _fit(real: Mapping[str, Real], names: Sequence[str]) -> dict[str, float]:
    """R² of the judge's readings of the real images against their known truth, by biomarker."""
    truth, seen = _all_visits(real, names)
    found = {}
    for name in names:
        known = np.isfinite(truth[name]) & np.isfinite(seen[name])
        t, s = truth[name][known], seen[name][known]
        found[name] = 1 - float(((s - t) ** 2).sum() / max(((t - t.mean()) ** 2).sum(), 1e-12))
    return found


def _parts(m: Material, seed: int) -> dict[str, Any]:
    """Every field of `Evaluation` that is measured."""
    every = np.ones(len(m.points), dtype=bool)
    truth, seen = _all_visits(m.real, list(m.points.spread))
    return {
        "pictures": scores.pictures(m.points, every, seed),
        "changed_pictures": scores.pictures(m.points, m.points.changed, seed),
        "unchanged_pictures": scores.pictures(m.points, ~m.points.changed, seed),
        "biomarkers": scores.biomarkers(m.points, seed),
        "calibration": calibration(m.points, judge_errors(truth, seen), seed) if m.points.draws_each > 1 else None,
        "strata": scores.strata(m.points, seed),
        "zero_gap": controls.zero_gap(m.cases, m.real, m.reader, seed),
        "longer_gap": controls.directions(m.cases, "longer_gap", ("short", "long"), m.spread),
        "treatment": controls.directions(m.cases, "treatment", ("off", "on"), m.spread),
        "identity": controls.identity(m.cases, m.real, seed),
        "missing": controls.missing(m.cases, m.real, m.spread, seed),
        "rollout": sequences.rollout(m.cases, m.real, m.reader, seed),
        "between": sequences.between(m.cases, m.real, m.reader, _noise(m.real, list(m.spread)), seed),
        "judge_fit": dict(m.fit),
    }


def _all_visits(real: Mapping[str, Real], names: Sequence[str]) -> tuple[dict[str, Floats], dict[str, Floats]]:
    """Truth and the judge's readings of every real image, by biomarker."""
    truth = {name: np.concatenate([one.truth(name) for one in real.values()]) for name in names}
    return truth, {name: np.concatenate([one.readings[name] for one in real.values()]) for name in names}


def _noise(real: Mapping[str, Real], names: Sequence[str]) -> dict[str, float]:
    """By how much the judge's error changes from one visit to the next (a robust standard deviation), where there is something to read."""
    found = {}
    for name in names:
        steps = [np.diff(one.readings[name] - one.truth(name)) for one in real.values()]
        there = [(one.truth(name)[1:] > 0) | (one.truth(name)[:-1] > 0) for one in real.values()]
        pooled = np.concatenate([step[mask] for step, mask in zip(steps, there, strict=True)])
        found[name] = float(1.4826 * np.median(np.abs(pooled))) if len(pooled) else 0.0
    return found


def _warnings(cases: Sequence[Sampled], parts: Mapping[str, Any], m: Material) -> tuple[str, ...]:
    lacking = [
        name
        for name, there in (
            ("a gap of zero", parts["zero_gap"]),
            ("a longer gap", parts["longer_gap"]),
            ("treatments on and off", parts["treatment"]),
            ("visits removed", parts["missing"]),
            ("roll-outs", parts["rollout"]),
            ("both ends known", parts["between"]),
            ("several futures per patient", parts["calibration"]),
            ("the deterministic regressor (--regressor)", "regressor" in m.points.read),
            ("the autoencoder ceiling (--pipeline)", "ceiling" in m.points.read),
        )
        if not there
    ]
    warnings = []
    if lacking:
        warnings.append(f"Not tested, for want of cases or options: {', '.join(lacking)}.")
    if unread := [f"{name} (R² {m.fit[name]:.2f})" for name in m.fit if name not in m.spread]:
        said = f"On real images the judge does not read {', '.join(unread)}"
        warnings.append(f"{said}: nobody's primary biomarker, and no control is scored on it.")
    found, judged = parts["biomarkers"], parts["biomarkers"].judge.get("primary")
    if judged is not None and judged.value > found.normalised["forecast"].value:
        warnings.append("The judge errs more on real images than forecasts differ from what came: it is weak evidence here.")
    if not any(np.isfinite(m.points.truth[name]).any() and (m.points.truth[name] != m.points.real[name]).any() for name in BIOMARKERS
               if name in m.points.truth):  # fmt: skip
        warnings.append("The manifest knows no biomarkers: the judge's readings of the real images stand in for the truth.")
    if not all(case.line.get("synthetic") for case in cases):
        warnings.append("Not every line of metadata.jsonl says that its frames are synthetic.")
    return tuple(warnings)


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
