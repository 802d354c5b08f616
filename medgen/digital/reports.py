"""Reports in a radiologist's register about digital patients, from a grammar: paraphrase, negation, doubt, side and size.

The words follow the numbers: "small", "moderate" and "large" have thresholds in mL or mm (`size_word`). What is not mentioned
is not present; what is negated is truly absent; doubt is expressed only about things that are really there and slight.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from medgen.data.records import FindingLabel
from medgen.digital.patient import Finding, Study
from medgen.seeds import stable_seed

SEVERITY_WORDS = ((0.4, "mild"), (0.7, "moderate"), (1.01, "severe"))
SIZE_WORDS = ((0.4, "small"), (0.7, "moderate"), (1.01, "large"))

_SIDED = {
    "pleural_effusion": (
        "{size} {side} pleural effusion.",
        "There is a {size} {side} pleural effusion.",
        "A {size} pleural effusion on the {side}.",
        "{size} {side}-sided pleural effusion with blunting of the costophrenic angle.",
        "Layering {size} {side} pleural fluid.",
    ),
    "pneumothorax": (
        "{size} {side} pneumothorax.",
        "There is a {size} {side} apical pneumothorax.",
        "{size} {side}-sided pneumothorax with a visible pleural line.",
        "A {size} pneumothorax on the {side}.",
        "{size} {side} pneumothorax, with partial collapse of the lung.",
    ),
    "consolidation": (
        "{severity} consolidation in the {side} {lobe} lobe.",
        "{side} {lobe} lobe consolidation, {severity}.",
        "{severity} airspace opacity in the {side} {lobe} lobe, consistent with pneumonia.",
        "There is {severity} consolidation of the {side} {lobe} lobe with air bronchograms.",
    ),
    "nodule": (
        "{mm} mm {noun} in the {side} {lobe} lobe.",
        "There is a {mm} mm {noun} in the {side} {lobe} lobe.",
        "A rounded {side} {lobe} lobe {noun} measures {mm} mm.",
        "{side} {lobe} lobe {noun}, {mm} mm.",
    ),
    "atelectasis": (
        "{severity} {side} {lobe} lobe atelectasis with volume loss.",
        "{severity} volume loss in the {side} {lobe} lobe consistent with atelectasis.",
        "There is {severity} atelectasis of the {side} {lobe} lobe.",
    ),
    "linear atelectasis": (
        "{severity} linear atelectasis at the {side} base.",
        "Plate-like atelectasis at the {side} lung base, {severity}.",
        "{severity} bandlike atelectasis in the {side} {lobe} lobe.",
    ),
}
_BOTH = {
    "pleural_effusion": (
        "Bilateral pleural effusions, {rsize} on the right and {lsize} on the left.",
        "There are bilateral pleural effusions, {rsize} right and {lsize} left.",
    ),
    "consolidation": (
        "Bilateral consolidation in the right {rlobe} and left {llobe} lobes.",
        "Multifocal bilateral airspace opacities in the right {rlobe} and left {llobe} lobes.",
    ),
    "atelectasis": ("Bilateral atelectasis with volume loss.", "There is atelectasis in both lungs."),
}
_WHOLE = {
    "cardiomegaly": (
        "{severity} cardiomegaly.",
        "The heart is enlarged, {severity}.",
        "{severity} enlargement of the cardiac silhouette.",
    ),
    "edema": (
        "{severity} pulmonary edema.",
        "{severity} perihilar haziness consistent with pulmonary edema.",
        "There is {severity} interstitial and alveolar pulmonary edema.",
    ),
    "hyperinflation": (
        "{severity} hyperinflation of the lungs with flattened diaphragms.",
        "The lungs are hyperinflated, {severity}.",
        "Hyperinflated lungs, {severity}.",
    ),
}
_DOUBT = {
    "pleural_effusion": ("Possible small {side} pleural effusion.", "A small {side} pleural effusion cannot be excluded."),
    "consolidation": (
        "{side} {lobe} lobe opacity may represent early consolidation.",
        "Possible consolidation in the {side} {lobe} lobe.",
    ),
    "edema": ("Possible mild pulmonary edema.", "Mild pulmonary edema is suspected."),
    "cardiomegaly": ("Possible mild cardiomegaly.", "The heart may be mildly enlarged, cardiomegaly is not excluded."),
}
_ABSENT = {
    "pleural_effusion": (
        "No pleural effusion.",
        "No pleural fluid is seen.",
        "The costophrenic angles are sharp, without effusion.",
    ),
    "pneumothorax": ("No pneumothorax.", "There is no pneumothorax.", "No evidence of pneumothorax."),
    "consolidation": ("No consolidation.", "No focal consolidation.", "Lungs without focal consolidation."),
    "nodule": ("No pulmonary nodule.", "No lung nodule or mass."),
    "cardiomegaly": ("The heart size is normal.", "No cardiomegaly.", "Heart is normal in size."),
    "edema": ("No pulmonary edema.", "There is no pulmonary edema."),
    "atelectasis": ("No atelectasis.", "No volume loss or atelectasis."),
    "hyperinflation": ("The lungs are normally inflated, not hyperinflated.", "No hyperinflation."),
}
_NORMAL = (
    "No acute cardiopulmonary abnormality.",
    "Normal chest radiograph.",
    "No acute cardiopulmonary process.",
    "Clear lungs and normal heart.",
    "Unremarkable chest film.",
)
_LISTS = ("No {a} or {b}.", "There is no {a} or {b}.", "Without {a} or {b}.")


def severity_word(severity: float) -> str:
    """Mild, moderate or severe."""
    return next(word for limit, word in SEVERITY_WORDS if severity < limit)


def size_word(severity: float) -> str:
    """Small, moderate or large."""
    return next(word for limit, word in SIZE_WORDS if severity < limit)


def write_report(study: Study, paraphrase: int = 0) -> tuple[str, str, tuple[FindingLabel, ...]]:
    """The sections findings and impression of `study`, and the labels they state. Same study and `paraphrase`, same words."""
    rng = np.random.default_rng(stable_seed("report", study.patient.seed, study.study_id, paraphrase))
    positive, labels = _positive_sentences(study.findings, rng)
    present = {label.name for label in labels}
    absent = [name for name in _ABSENT if name not in present]
    negated = [str(name) for name in rng.permutation(absent)[: int(rng.integers(1, 4 if positive else 5))]]
    labels += [FindingLabel(name, "absent") for name in negated]  # type: ignore[arg-type]
    negatives = _negative_sentences(negated, rng)
    sentences = [str(s) for s in rng.permutation(positive)] + negatives
    if not positive:
        return " ".join(negatives), str(rng.choice(_NORMAL)), tuple(labels)
    if rng.random() < 0.25:
        sentences = negatives + sentences[: len(positive)]
    return " ".join(sentences), " ".join(positive), tuple(labels)


def _positive_sentences(findings: tuple[Finding, ...], rng: np.random.Generator) -> tuple[list[str], list[FindingLabel]]:
    sentences, labels = [], []
    by_name: dict[str, list[Finding]] = {}
    for finding in findings:
        by_name.setdefault(finding.name, []).append(finding)
    for name, group in by_name.items():
        first = group[0]
        if len(group) == 2:
            right, left = sorted(group, key=lambda f: f.side != "right")
            words = {
                "rsize": size_word(right.severity),
                "lsize": size_word(left.severity),
                "rlobe": right.lobe,
                "llobe": left.lobe,
            }
            sentences.append(_fill(rng, _BOTH[name], words))
            labels.append(FindingLabel(name, "present", "bilateral"))  # type: ignore[arg-type]
            continue
        doubtful = first.severity < 0.3 and name in _DOUBT and rng.random() < 0.3
        forms = (_DOUBT if doubtful else _WHOLE if name in _WHOLE else _SIDED)["linear atelectasis" if first.linear else name]
        sentences.append(_fill(rng, forms, _words(first)))
        size = None if doubtful else _size(first)
        labels.append(FindingLabel(name, "uncertain" if doubtful else "present", first.side, size))  # type: ignore[arg-type]
    return sentences, labels


def _size(f: Finding) -> str:
    if f.name == "nodule":
        return f"{round(f.diameter_mm or 0)} mm"
    return (size_word if f.name in ("pleural_effusion", "pneumothorax") else severity_word)(f.severity)


def _words(f: Finding) -> Mapping[str, object]:
    diameter = round(f.diameter_mm or 0)
    return {
        "side": f.side,
        "lobe": f.lobe,
        "size": size_word(f.severity),
        "severity": severity_word(f.severity),
        "mm": diameter,
        "noun": "mass" if diameter > 30 else "nodule",
    }


def _fill(rng: np.random.Generator, forms: tuple[str, ...], words: Mapping[str, object]) -> str:
    sentence = str(rng.choice(forms)).format(**words)
    return sentence[0].upper() + sentence[1:]


def _negative_sentences(names: list[str], rng: np.random.Generator) -> list[str]:
    plain = {
        "pleural_effusion": "pleural effusion",
        "pneumothorax": "pneumothorax",
        "consolidation": "focal consolidation",
        "edema": "pulmonary edema",
    }
    pair = [name for name in names if name in plain]
    sentences = []
    if len(pair) >= 2 and rng.random() < 0.6:
        sentences.append(str(rng.choice(_LISTS)).format(a=plain[pair[0]], b=plain[pair[1]]))
        names = [name for name in names if name not in pair[:2]]
    return sentences + [str(rng.choice(_ABSENT[name])) for name in names]
