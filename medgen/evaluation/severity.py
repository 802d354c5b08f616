"""`medgen evaluate severity`: is an edited film untouched outside the ROI, and does the finding inside follow the rounds?

Measured is severity, not time: nothing here says that a patient would look so at any date.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from numpy.typing import NDArray
from scipy.stats import spearmanr
from torch.nn import functional

from medgen import __version__
from medgen.data.images import load_image
from medgen.data.records import FINDINGS
from medgen.evaluation.features import fingerprint, load_judge
from medgen.evaluation.images import EvaluationError, read_metadata
from medgen.evaluation.plots import words
from medgen.evaluation.statistics import Estimate, group_bootstrap
from medgen.evaluation.text_to_cxr import plain
from medgen.models.classifier import SIDED_FINDINGS, FindingClassifier
from medgen.models.film_meter import FilmMeter, load_film_meter

Floats = NDArray[np.float64]
ALLOWED = 1.05  # outside the ROI: times the autoencoder's own error
STEP_BACK = 0.05  # of the whole way: what counts as going backwards between two rounds
METER = "digital_progression_judge"
_BIOMARKER = {"pleural_effusion": "pleural_effusion_ml", "consolidation": "consolidation_ml", "edema": "edema_ml",
              "nodule": "nodule_mm3", "cardiomegaly": "cardiothoracic_ratio"}  # fmt: skip


@dataclass(frozen=True)
class Edit:
    """One edit, measured. Arrays are [R+1], the source first. NaN or None: could not be measured.

    outside: mean absolute change of each round outside the ROI, of the grey range; autoencoder: the same of the source's reconstruction.
    probability, extent: the judge's, of the asked finding on its side; extent is in cells of its map of places. meter: mL, mm³ or ratio.
    others: outputs of the judge, none of them asked for, that crossed its threshold between the source and the last round.
    """

    line: dict[str, Any]
    outside: Floats
    autoencoder: float
    probability: Floats
    extent: Floats
    meter: Floats | None
    threshold: float
    others: tuple[str, ...]

    @property
    def direction(self) -> int:
        return int(self.line["direction"])

    def trend(self, values: Floats | None) -> float:
        """Spearman of the reading with the round, positive in the asked direction; 0 for a reading that does not move."""
        if values is None or self.direction == 0:
            return float("nan")
        return 0.0 if np.ptp(values) == 0 else float(self.direction * spearmanr(np.arange(len(values)), values).statistic)

    def monotone(self, values: Floats | None) -> float:
        """1 if no round goes back by more than `STEP_BACK` of the range and the last one lies ahead of the source, else 0."""
        if values is None or self.direction == 0:
            return float("nan")
        moved = self.direction * np.diff(values)
        return float(moved.sum() > 0 and moved.min() >= -STEP_BACK * np.ptp(values))

    @property
    def arrived(self) -> float:
        """1 if the judge says of the last round what was asked: there (progression) or not there (the target is none)."""
        if self.direction == 0:
            return float("nan")
        wanted = self.line["degrees"][-1] > 0
        return float((self.probability[-1] >= self.threshold) == wanted)


def evaluate(
    generated: Path,
    out: Path,
    classifier: Path | None = None,
    meter: str | None = None,
    seed: int = 0,
) -> Path:
    """Measure severity edits: what changed outside the ROI, and whether the finding inside follows the rounds. Severity, not time.

    Writes metrics.json and report.html, which shows the source films: share it only as those may be shared.

    Args:
        generated: folder that `medgen sample severity` wrote.
        out: folder for metrics.json and report.html.
        classifier: folder of another judge than the shipped one.
        meter: name or folder of a film meter that reads mL; the shipped one, where there is one.
        seed: of the bootstrap over patients.
    """
    lines = read_metadata(generated, ("file_name", "case_id", "frames", "autoencoder_file", "direction", "degrees"))
    judge, ruler = load_judge(classifier, "cpu"), _meter(meter)
    edits = [_measure(line, judge, ruler) for line in lines]
    measures = {name: summarise(part, seed) for name, part in _groups(edits).items()}
    facts = {
        "edits": len(edits),
        "patients": len({_patient(edit) for edit in edits}),
        "models": sorted({str(line.get("model")) for line in lines}),
        "settings": {key: " / ".join(sorted({str(line.get(key)) for line in lines})) for key in _SETTINGS},
        "judge_fingerprint": fingerprint(judge),
        "meter": None if ruler is None else meter or METER,
        "medgen": __version__,
        "says": "severity editing: no time, not a forecast; synthetic",
    }
    result = {"facts": facts, "measures": measures, "edits": [_told(edit) for edit in edits]}
    out.mkdir(parents=True, exist_ok=True)
    (out / "metrics.json").write_text(json.dumps(plain(result), indent=1), encoding="utf-8")
    page = out / "report.html"
    page.write_text(_render(facts, measures, edits), encoding="utf-8")
    return page


_SETTINGS = ("inversion", "strength", "outside", "inside", "guidance_scale", "num_inference_steps", "refinements", "away_from", "chained",
             "paste_back", "recaptioner")  # fmt: skip


def summarise(edits: Sequence[Edit], seed: int = 0) -> dict[str, Estimate]:
    """Every measure over `edits`, with 95 % intervals over patients. Shares and correlations; `outside` is a ratio of means."""
    columns = {
        "extent_spearman": [edit.trend(edit.extent) for edit in edits],
        "extent_monotone": [edit.monotone(edit.extent) for edit in edits],
        "probability_spearman": [edit.trend(edit.probability) for edit in edits],
        "meter_spearman": [edit.trend(edit.meter) for edit in edits],
        "meter_monotone": [edit.monotone(edit.meter) for edit in edits],
        "arrived": [edit.arrived for edit in edits],
        "others_changed": [float(len(edit.others)) for edit in edits],
        "outside_last": [edit.outside[-1] for edit in edits],
        "autoencoder": [edit.autoencoder for edit in edits],
    }
    values = np.array(list(columns.values()), dtype=np.float64)

    def statistic(chosen: NDArray[np.intp]) -> Floats:
        some = values[:, chosen]
        known = np.isfinite(some)
        means = np.where(known.any(1), np.where(known, some, 0).sum(1) / np.maximum(known.sum(1), 1), np.nan)
        return np.append(means, means[-2] / means[-1] if means[-1] > 0 else np.nan)

    estimates = group_bootstrap(statistic, [_patient(edit) for edit in edits], seed)
    return dict(zip([*columns, "outside_ratio"], estimates, strict=True))


def _groups(edits: Sequence[Edit]) -> dict[str, list[Edit]]:
    groups = {"all": list(edits)}
    for name, direction in (("progression", 1), ("resolution", -1)):
        if part := [edit for edit in edits if edit.direction == direction]:
            groups[name] = part
    kinds = sorted({str(edit.line["finding"]) for edit in edits if edit.line.get("finding")})
    return groups | ({words(kind): [e for e in edits if e.line["finding"] == kind] for kind in kinds} if len(kinds) > 1 else {})


def _patient(edit: Edit) -> str:
    return str(edit.line.get("patient_id", edit.line["case_id"]))


def _meter(name: str | None) -> FilmMeter | None:
    try:
        return load_film_meter(name or METER, "cpu")
    except FileNotFoundError as error:
        if name is not None:
            raise EvaluationError(str(error)) from None
        return None


@torch.inference_mode()
def _measure(line: Mapping[str, Any], judge: FindingClassifier, meter: FilmMeter | None) -> Edit:
    folder = line["_path"].parent
    frames = torch.stack([_picture(folder, frame["file_name"]) for frame in line["frames"]])
    change, lost = (frames - frames[:1]).abs() / 2, (_picture(folder, line["autoencoder_file"]) - frames[0]).abs() / 2
    outside = torch.zeros_like(frames[0], dtype=torch.bool)
    if line.get("roi_file"):
        outside = _picture(folder, line["roi_file"]) < 0
    somewhere = bool(outside.any())
    side = judge.config["image_size"]
    seen = functional.interpolate(frames, (side, side), mode="bilinear", antialias=True) if frames.shape[-1] != side else frames
    logits, places = judge.with_places(seen)
    probability = logits.sigmoid()
    finding = line.get("finding")
    output, asked = _output(line, judge), [name for name in judge.outputs if finding and name.startswith(finding)]
    crossed = (probability[0] >= judge.thresholds) != (probability[-1] >= judge.thresholds)
    nothing = np.full(len(frames), np.nan)
    reading = None
    if meter is not None and finding in _BIOMARKER:
        size = int(meter.config["image_size"])
        films = (
            functional.interpolate(frames, (size, size), mode="bilinear", antialias=True) if frames.shape[-1] != size else frames
        )
        reading = meter.measure(films)[_BIOMARKER[finding]].double().numpy()
    return Edit(
        line=dict(line),
        outside=change[:, outside].mean(1).double().numpy() if somewhere else nothing,
        autoencoder=float(lost[outside].mean()) if somewhere else float("nan"),
        probability=nothing if output is None else probability[:, output].double().numpy(),
        extent=nothing if finding is None else _extent(places, line),
        meter=reading,
        threshold=float("nan") if output is None else float(judge.thresholds[output]),
        others=tuple(name for name, moved in zip(judge.outputs, crossed.tolist()) if moved and name not in asked),
    )


def _output(line: Mapping[str, Any], judge: FindingClassifier) -> int | None:
    finding, side = line.get("finding"), line.get("side")
    if finding is None:
        return None
    return judge.outputs.index(f"{finding}_{side}" if finding in SIDED_FINDINGS and side in ("left", "right") else finding)


def _extent(places: torch.Tensor, line: Mapping[str, Any]) -> Floats:
    """Cells of the judge's map in which it sees the finding, on the asked side (the patient's left is the film's right half)."""
    shown = places[:, FINDINGS.index(line["finding"])].sigmoid()
    if line.get("side") in ("left", "right"):
        half = shown.shape[-1] // 2
        shown = shown[..., half:] if line["side"] == "left" else shown[..., :half]
    values: Floats = shown.flatten(1).sum(1).double().numpy()
    return values


def _picture(folder: Path, name: str) -> torch.Tensor:
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()) or not path.is_file():
        raise EvaluationError(f"{folder} lists {name!r}, which is not there; run the same `medgen sample severity` again")
    return load_image(path)


def _told(edit: Edit) -> dict[str, Any]:
    return {
        "case_id": edit.line["case_id"],
        "finding": edit.line.get("finding"),
        "side": edit.line.get("side"),
        "direction": edit.direction,
        "outside": edit.outside.tolist(),
        "autoencoder": edit.autoencoder,
        "probability": edit.probability.tolist(),
        "extent": edit.extent.tolist(),
        "meter": None if edit.meter is None else edit.meter.tolist(),
        "arrived": edit.arrived,
        "others": edit.others,
    }


def _render(facts: dict[str, Any], measures: dict[str, dict[str, Estimate]], edits: Sequence[Edit]) -> str:
    environment = Environment(
        loader=PackageLoader("medgen.evaluation"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["estimate"] = _estimate
    whole = measures["all"]
    rows = [
        (
            "outside the ROI: change ÷ autoencoder's error",
            whole["outside_ratio"],
            f"≤ {ALLOWED}",
            whole["outside_ratio"].value <= ALLOWED,
        ),
        ("inside: Spearman of round and extent (judge)", whole["extent_spearman"], "≥ .9", whole["extent_spearman"].value >= 0.9),
        ("inside: no round goes back (extent)", whole["extent_monotone"], "≥ .9", whole["extent_monotone"].value >= 0.9),
        ("last round shows what was asked (judge)", whole["arrived"], "≥ .9", whole["arrived"].value >= 0.9),
    ]
    backwards = sorted(edits, key=lambda edit: np.nan_to_num(edit.trend(edit.extent), nan=2.0))
    chosen = sorted({*range(0, len(edits), max(1, len(edits) // 8))})
    return environment.get_template("severity.html.j2").render(
        facts=facts,
        measures=measures,
        targets=rows,
        typical=[_card(edits[i]) for i in chosen[:8]],
        worst=[_card(edit) for edit in backwards[:4]],
    )


def _card(edit: Edit) -> dict[str, Any]:
    content = base64.b64encode(edit.line["_path"].read_bytes()).decode()
    numbers = {"extent, cells": edit.extent, "probability": edit.probability}
    if edit.meter is not None:
        numbers[_BIOMARKER[edit.line["finding"]].replace("_", " ")] = edit.meter
    return {
        "source": f"data:image/png;base64,{content}",
        "name": edit.line["case_id"],
        "readings": {
            name: [f"{value:.2f}" if abs(value) < 10 else f"{value:.0f}" for value in row] for name, row in numbers.items()
        },
        "others": [words(name) for name in edit.others],
    }


def _estimate(value: Estimate, digits: int = 2) -> str:
    if not np.isfinite(value.value):
        return "not measured"
    text = f"{value.value:.{digits}f}"
    return text if not np.isfinite(value.low) else f"{text} [{value.low:.{digits}f}, {value.high:.{digits}f}]"
