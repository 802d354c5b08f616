"""From an evaluation to one self-contained HTML page that a radiologist and a newcomer can read."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from medgen.data.records import FINDINGS
from medgen.evaluation import plots
from medgen.evaluation.alignment import Bools, FindingAUROC, Pair, PairResult
from medgen.evaluation.diversity import Diversity
from medgen.evaluation.features import Features
from medgen.evaluation.fidelity import Fidelity
from medgen.evaluation.images import ImageSet, load_square
from medgen.evaluation.memorisation import Memorisation
from medgen.evaluation.statistics import Estimate
from medgen.evaluation.subgroups import FindingDistance, Subgroups
from medgen.models.classifier import OUTPUTS, SIDED_FINDINGS

SHOWN_PIXELS = 256


@dataclass(frozen=True)
class Verdict:
    """What the judge says of one asked-for or unasked-for finding: `state` is seen, missed, unasked, side or doubtful."""

    text: str
    probability: float
    state: str


@dataclass(frozen=True)
class Evaluation:
    """All that one run measured. `facts` are plain statements about the run (names, counts, hashes)."""

    facts: dict[str, Any]
    fidelity: Fidelity
    by_finding: tuple[FindingDistance, ...]
    subgroups: Subgroups | None
    findings: FindingAUROC
    ceiling: FindingAUROC | None
    laterality: PairResult | None
    negation: PairResult | None
    diversity: Diversity | None
    memorisation: tuple[Memorisation, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Material:
    """The images and arrays behind the numbers, for pictures and plots. logits, targets, known: [N,len(OUTPUTS)]."""

    generated: ImageSet
    reference: ImageSet
    train: ImageSet | None
    logits: Features
    targets: Bools
    known: Bools
    thresholds: Sequence[float]
    pairs: Sequence[Pair]
    generated_features: Features
    reference_features: Features


def render(evaluation: Evaluation, material: Material, real_images: bool = True) -> str:
    """The page; without `real_images` it shows no image of a real patient, reference or training."""
    environment = Environment(
        loader=PackageLoader("medgen.evaluation"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"estimate": estimate, "percent": percent, "words": plots.words}
    return environment.get_template("text_to_cxr.html.j2").render(
        e=evaluation,
        samples=[card(material, index) for index in spread(material)],
        real=[_picture(material.reference, index) for index in _evenly(len(material.reference), 8)] if real_images else [],
        worst=[card(material, index) for index in worst_cases(material)],
        pairs={kind: _pair_cards(material, result) for kind, result in _results(evaluation)},
        copies=[_copies(material, result) if real_images else [] for result in evaluation.memorisation],
        auroc_plot=Markup(plots.auroc_plot(evaluation.findings, evaluation.ceiling)),
        floor_plot=Markup(plots.floor_plot(evaluation.fidelity)),
        population_plot=Markup(plots.population_plot(material.reference_features, material.generated_features)),
    )


def _results(evaluation: Evaluation) -> list[tuple[str, PairResult]]:
    named = (("laterality", evaluation.laterality), ("negation", evaluation.negation))
    return [(kind, result) for kind, result in named if result is not None]


def estimate(value: Estimate | None, digits: int = 3) -> str:
    """ "0.953 (0.94–0.97)"; a dash where nothing was measured."""
    if value is None or not math.isfinite(value.value):
        return "–"
    middle = f"{value.value:.{digits}f}"
    return middle if not math.isfinite(value.low) else f"{middle} ({value.low:.{digits}f}–{value.high:.{digits}f})"


def percent(value: Estimate | None) -> str:
    """ "97 % (93–99)"."""
    if value is None or not math.isfinite(value.value):
        return "–"
    middle = f"{100 * value.value:.0f} %"
    return middle if not math.isfinite(value.low) else f"{middle} ({100 * value.low:.0f}–{100 * value.high:.0f})"


def card(material: Material, index: int) -> dict[str, Any]:
    """One generated image with its prompt and what the judge says."""
    line = material.generated.metadata[index]
    seed = f"{line['case_id']} · seed {line.get('seed', '?')}"
    return {**_picture(material.generated, index), "prompt": line["prompt"], "seed": seed, "verdicts": verdicts(material, index)}


def verdicts(material: Material, index: int) -> list[Verdict]:
    """The judge on every finding that was asked for, and on those it sees although they were not."""
    probability = 1 / (1 + np.exp(-np.asarray(material.logits[index], dtype=np.float64)))
    asked, known = material.targets[index], material.known[index]
    result = []
    for o, name in enumerate(FINDINGS):
        seen = bool(probability[o] >= material.thresholds[o])
        if not asked[o]:
            if seen and known[o]:
                result.append(Verdict(plots.words(name), float(probability[o]), "unasked"))
            elif not known[o]:
                result.append(Verdict(f"possible {plots.words(name)}", float(probability[o]), "doubtful"))
            continue
        side = _asked_side(name, asked, known)
        state = "seen" if seen else "missed"
        if seen and side and _other_side_wins(name, side, probability):
            state = "side"
        result.append(Verdict(f"{side} {plots.words(name)}" if side else plots.words(name), float(probability[o]), state))
    return result


def _asked_side(name: str, asked: Bools, known: Bools) -> str:
    if name not in SIDED_FINDINGS:
        return ""
    places = {side: OUTPUTS.index(f"{name}_{side}") for side in ("left", "right")}
    sides = [side for side, o in places.items() if asked[o] and known[o]]
    return "bilateral" if len(sides) == 2 else sides[0] if sides else ""


def _other_side_wins(name: str, side: str, probability: np.ndarray) -> bool:
    if side == "bilateral":
        return False
    other = "right" if side == "left" else "left"
    return bool(probability[OUTPUTS.index(f"{name}_{other}")] > probability[OUTPUTS.index(f"{name}_{side}")])


def disagreement(material: Material) -> np.ndarray:
    """Mean cross-entropy between the judge and the prompt over what the prompt is sure about, [N]; large is bad."""
    logits = np.asarray(material.logits, dtype=np.float64)
    losses = np.logaddexp(0, np.where(material.targets, -logits, logits)) * material.known
    return np.asarray(losses.sum(1) / np.maximum(material.known.sum(1), 1))


def worst_cases(material: Material, count: int = 8) -> list[int]:
    """The images that the judge disagrees with most, worst first."""
    return [int(i) for i in np.argsort(-disagreement(material))[:count]]


def spread(material: Material, count: int = 18) -> list[int]:
    """Images to show, chosen without looking at them: the first trajectory of evenly spaced single cases."""
    lines = material.generated.metadata
    first = [i for i, line in enumerate(lines) if not line.get("trajectory") and line.get("pair_id") is None]
    chosen = first or list(range(len(lines)))
    return [chosen[i] for i in _evenly(len(chosen), count)]


def _evenly(length: int, count: int) -> list[int]:
    return sorted({int(i) for i in np.linspace(0, length - 1, min(count, length))})


def _pair_cards(material: Material, result: PairResult, count: int = 6) -> list[dict[str, Any]]:
    """Failed pairs first (at most half of what is shown), then others, evenly spaced."""
    failed = list(result.failures)[: count // 2]
    good = [pair for pair in material.pairs if pair.kind == result.kind and pair not in result.failures]
    chosen = failed + [good[i] for i in _evenly(len(good), count - len(failed))] if good else failed
    return [
        {"finding": pair.finding, "failed": pair in result.failures, "images": [_pair_image(material, pair, i) for i in (0, 1)]}
        for pair in chosen
    ]


def _pair_image(material: Material, pair: Pair, which: int) -> dict[str, Any]:
    index = (pair.first, pair.second)[which]
    probability = 1 / (1 + np.exp(-np.asarray(material.logits[index], dtype=np.float64)))
    names = [f"{pair.finding}_{side}" for side in ("left", "right")] if pair.kind == "laterality" else [pair.finding]
    scores = [(plots.words(name), float(probability[OUTPUTS.index(name)])) for name in names]
    return {**_picture(material.generated, index), "prompt": material.generated.metadata[index]["prompt"], "scores": scores}


def _copies(material: Material, result: Memorisation) -> list[dict[str, Any]]:
    train = material.train
    assert train is not None
    return [
        {"generated": _picture(material.generated, n.generated), "train": _picture(train, n.train), "distance": n.distance}
        for n in result.worst
    ]


def _picture(images: ImageSet, index: int) -> dict[str, Any]:
    """An image as a data URI; training and reference images are resized to the report's size, never linked."""
    values = load_square(images.paths[index], min(images.native or SHOWN_PIXELS, SHOWN_PIXELS))[0]
    grey = Image.fromarray(((values.numpy() + 1) * 127.5).round().clip(0, 255).astype(np.uint8))
    content = io.BytesIO()
    grey.save(content, "PNG", optimize=True)
    return {"source": f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"}
