"""From an evaluation of forecasts to one self-contained HTML page: past, truth and futures side by side, then the numbers."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from numpy.typing import NDArray
from PIL import Image

from medgen.data.volumes import middle_coronal
from medgen.evaluation.progression import plots
from medgen.evaluation.progression.collect import Images, Real, Sampled
from medgen.evaluation.progression.evaluate import Evaluation, Material
from medgen.evaluation.progression.patients import expected_changes, primary
from medgen.evaluation.progression.points import METHODS
from medgen.evaluation.report import estimate, percent
from medgen.evaluation.statistics import Estimate

SHOWN_PIXELS = 128
ROWS, FUTURES = 8, 3
CONTROL_ROWS = 2
PICTURES = {"ssim": 3, "psnr_db": 1, "mae": 4, "nrmse": 3}
CHANGES = {"delta_ssim": 3, "relative_error": 3, "rank_error": 3, "auroc": 3}
MEASURES = {
    "ssim": "SSIM ↑",
    "psnr_db": "PSNR, dB ↑",
    "mae": "MAE ↓",
    "nrmse": "NRMSE ↓",
    "delta_ssim": "ΔSSIM ↑",
    "relative_error": "relative error ↓",
    "rank_error": "(1 − Spearman)/2 ↓",
    "auroc": "AUROC of brighter ↑",
}


def render(evaluation: Evaluation, material: Material) -> str:
    """The page."""
    environment = Environment(
        loader=PackageLoader("medgen.evaluation"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"estimate": estimate, "percent": percent, "named": plots.named, "number": _number, "stacked": stacked}
    return environment.get_template("progression.html.j2").render(
        e=evaluation,
        methods={name: label for name, label in METHODS.items() if name in evaluation.pictures},
        measures=MEASURES,
        picture_digits=PICTURES,
        change_digits=CHANGES,
        rows=[patient_row(case, material) for case in shown(material, ROWS)],
        worst=[patient_row(case, material) for case in worst(material, CONTROL_ROWS)],
        pairs=_pairs(material),
        strips=_strips(material),
        legend=Markup(plots.fan_legend()),
        plots={name: Markup(text) for name, text in _plots(evaluation).items()},
    )


def stacked(value: Estimate | None, digits: int = 3, percent: bool = False) -> Markup:
    """A value above its interval, for tables of many columns; a dash where nothing was measured."""
    if value is None or not np.isfinite(value.value):
        return Markup("–")
    factor, digits, unit = (100, 0, " %") if percent else (1, digits, "")
    middle, low, high = (f"{factor * x:.{digits}f}".replace("-", "−") for x in (value.value, value.low, value.high))
    return Markup(f"{middle}{unit}<small>{low} to {high}</small>" if np.isfinite(value.low) else f"{middle}{unit}")


def shown(material: Material, count: int) -> list[Sampled]:
    """Patients to show, chosen without looking at their forecasts: evenly spaced in the order of how much was expected to change."""

    def moving(case: Sampled) -> float:
        return max(expected_changes(material.real[case.record_id].patient, material.spread).values(), default=0.0)

    cases = sorted((case for case in material.cases if case.purpose == "forecast"), key=moving, reverse=True)
    upper = cases[: max(count, 3 * len(cases) // 4)]  # most of the rest have nothing that moves
    return [upper[i] for i in sorted({int(i) for i in np.linspace(0, len(upper) - 1, min(count, len(upper)))})]


def worst(material: Material, count: int) -> list[Sampled]:
    """Patients whose primary biomarker is furthest from what came, worst first."""

    def error(case: Sampled) -> float:
        real, name = material.real[case.record_id], _biomarker(case, material)
        came = real.readings[name][[real.index(time) for time in case.times]]
        return float(np.mean(np.abs(case.middle(name) - came)) / material.spread[name])

    return sorted((case for case in material.cases if case.purpose == "forecast"), key=error, reverse=True)[:count]


def _biomarker(case: Sampled, material: Material) -> str:
    patient = material.real[case.record_id].patient
    usable = {name: unit for name, unit in material.spread.items() if name in case.readings}
    return primary(patient, usable) or next(iter(usable))


def patient_row(case: Sampled, material: Material) -> dict[str, Any]:
    """A patient's past, what came and a few futures as pictures with their days, and the fan plot of the primary biomarker."""
    real, name = material.real[case.record_id], _biomarker(case, material)
    known = real.known
    wanted = [real.index(time) for time in case.times]
    chosen = _few(len(case.times), 3)
    files = [[case.files[k][t] for t in chosen] for k in range(min(FUTURES, len(case.files)))]
    unit = _unit(real)
    past = list(range(known))[-3:]
    return {
        "name": real.patient.record_id,
        "biomarker": plots.named(name),
        "known": known,
        "past": [_picture(real.images[i], f"{unit} {real.times[i]:g}", real.readings[name][i]) for i in past],
        "truth": [_picture(real.images[wanted[t]], f"{unit} {case.times[t]:g}", real.readings[name][wanted[t]]) for t in chosen],
        "futures": [
            [
                _picture(image, f"{unit} {case.times[t]:g}", case.readings[name][k, t])
                for image, t in zip(material.reader.images(row), chosen)
            ]
            for k, row in enumerate(files)
        ],
        "fan": Markup(plots.fan_plot(case, real, name)),
    }


def _unit(real: Real) -> str:
    return {"days": "day", "order": "visit", "phase": "phase"}[real.patient.series.time_unit]


def _few(length: int, count: int) -> list[int]:
    return sorted({int(i) for i in np.linspace(0, length - 1, min(count, length))})


def _pairs(material: Material) -> list[dict[str, Any]]:
    """Of each paired purpose a few: last real image, both variants, and their difference."""
    found = []
    for purpose, variants, title in (
        ("treatment", ("off", "on"), "treatment off, then on"),
        ("longer_gap", ("short", "long"), "a short gap, then a long one"),
    ):
        pairs: dict[str, dict[str, Sampled]] = {}
        for case in material.cases:
            if case.purpose == purpose and case.line.get("biomarker") in case.readings:
                pairs.setdefault(str(case.line["pair_id"]), {})[str(case.line["variant"])] = case
        whole = [pair for _, pair in sorted(pairs.items()) if set(pair) == set(variants)]
        for pair in [whole[i] for i in _few(len(whole), 3)]:
            found.append(_pair(material, [pair[variant] for variant in variants], title))
    return found


def _pair(material: Material, pair: Sequence[Sampled], title: str) -> dict[str, Any]:
    real, name = material.real[pair[0].record_id], str(pair[0].line["biomarker"])
    images = [material.reader.images(case.files[0][-1:])[0] for case in pair]
    last = real.known - 1
    said = [_picture(real.images[last], f"last visit, {_unit(real)} {real.times[last]:g}", real.readings[name][last])]
    for case, image in zip(pair, images, strict=True):
        added = [event["name"] for event in case.line["events"] if event["time"] > real.times[last]]
        label = f"{case.line['variant']}, {_unit(real)} {case.times[-1]:g}" + (
            f", {', '.join(added)}" if added and case.line["variant"] == "on" else ""
        )
        said.append(_picture(image, label, case.readings[name][0, -1]))
    said.append(_difference(images[1] - images[0]))
    return {"title": title, "biomarker": plots.named(name), "pictures": said}


def _strips(material: Material) -> list[dict[str, Any]]:
    """A roll-out of each mode, and states between two known visits, frame by frame."""
    found = []
    for purpose, count in (("rollout", 2), ("between", 3)):
        cases = [case for case in material.cases if case.purpose == purpose][:count]
        for case in cases:
            asked, unit = str(case.line.get("biomarker")), _unit(material.real[case.record_id])
            name = asked if asked in case.readings else _biomarker(case, material)
            title = (
                f"12 steps, {case.line.get('variant')}" if purpose == "rollout" else "between two known visits (first and last)"
            )
            frames = zip(material.reader.images(case.files[0]), case.times, case.readings[name][0], strict=True)
            pictures = [_picture(image, f"{unit} {time:.4g}", value) for image, time, value in frames]
            found.append({"title": title, "name": case.record_id, "biomarker": plots.named(name), "pictures": pictures})
    return found


def _plots(evaluation: Evaluation) -> dict[str, str]:
    drawn: dict[str, str] = {}
    found = evaluation.calibration
    if found is not None:
        bands = {"simulated futures, seen through the judge": found.seen, "simulated futures as they are": found.futures}
        bands = {"what came": found.realised, **bands}
        drawn["coverage"] = plots.coverage_plot({label: one for label, one in bands.items() if one is not None})
        drawn["ranks"] = plots.rank_plot(found.ranks)
    for name, pairs in (("longer_gap", evaluation.longer_gap), ("treatment", evaluation.treatment)):
        points = [(wanted, moved) for _, wanted, moved in pairs.points if np.isfinite(wanted)] if pairs else []
        if points:
            wanted, moved = (np.array(column) for column in zip(*points, strict=True))
            drawn[name] = plots.scatter_plot(wanted, moved, ("mean of the simulated (spreads)", "of the forecasts (spreads)"))
    if evaluation.rollout is not None:
        drawn["drift"] = plots.drift_plot(evaluation.rollout.curves)
    return drawn


def _picture(image: Images, caption: str, value: float) -> dict[str, str]:
    """An image [*S] in [0,1] (a volume: its middle coronal slice) as a data URI, with its time and what the judge reads."""
    flat = middle_coronal(torch.from_numpy(image)).numpy() if image.ndim == 3 else image
    return {"source": _uri(np.clip(flat, 0, 1)), "caption": caption, "value": _number(value)}


def _difference(change: Images) -> dict[str, str]:
    """Brighter (orange) and darker (blue) than the first of a pair; full colour is a difference of a quarter of the grey range."""
    flat = middle_coronal(torch.from_numpy(change)).numpy() if change.ndim == 3 else change
    up, down = np.clip(flat * 4, 0, 1)[..., None], np.clip(-flat * 4, 0, 1)[..., None]
    colour = 1 - up * (1 - np.array([0.82, 0.4, 0.06])) - down * (1 - np.array([0.12, 0.44, 0.92]))
    return {"source": _uri(np.clip(colour, 0, 1)), "caption": "difference", "value": "model response"}


def _uri(values: NDArray[np.floating]) -> str:
    picture = Image.fromarray((values * 255).round().astype(np.uint8))
    picture.thumbnail((SHOWN_PIXELS, SHOWN_PIXELS))
    content = io.BytesIO()
    picture.save(content, "WEBP", quality=80)
    return f"data:image/webp;base64,{base64.b64encode(content.getvalue()).decode()}"


def _number(value: float) -> str:
    return "–" if not np.isfinite(value) else f"{value:.2f}" if abs(value) < 10 else f"{value:.0f}"
