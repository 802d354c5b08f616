"""Do images show what their prompts say? An independent classifier (the judge) looks at them.

Finding AUROC against the prompts, and two counterfactual tests with the same noise: the other side named, the finding negated.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import rankdata

from medgen.data.records import FINDINGS
from medgen.data.report_labels import label_text
from medgen.evaluation.features import FeatureEncoder, Features, fingerprint
from medgen.evaluation.images import EvaluationError, ImageSet
from medgen.evaluation.statistics import Estimate, Floats, Indices, group_bootstrap, wilson
from medgen.models.classifier import OUTPUTS, SIDED_FINDINGS, FindingClassifier, finding_targets

Bools = NDArray[np.bool_]
VARIANTS = {"laterality": ("left", "right"), "negation": ("present", "absent")}


@dataclass(frozen=True)
class OutputAUROC:
    """AUROC of one output of the judge; `auroc` is None where a class is missing."""

    name: str
    auroc: Estimate | None
    positives: int
    negatives: int


@dataclass(frozen=True)
class FindingAUROC:
    """AUROC per output; macro over the eight findings and over the sided outputs; the worst finding."""

    outputs: tuple[OutputAUROC, ...]
    macro: Estimate
    macro_sides: Estimate
    worst: OutputAUROC


@dataclass(frozen=True)
class Pair:
    """Two images from one noise: indices of the left/present and of the right/absent one, and the finding their prompts differ in."""

    pair_id: str
    kind: str  # "laterality" or "negation"
    finding: str
    first: int
    second: int


@dataclass(frozen=True)
class PairResult:
    """How many pairs changed as asked. `strict`: each image, seen alone, is on its asked side / over or under the threshold."""

    kind: str
    accuracy: Estimate
    strict: Estimate
    per_finding: dict[str, Estimate]
    failures: tuple[Pair, ...]


def judge_encoder(model: FindingClassifier) -> FeatureEncoder:
    """The judge's logits [b,len(OUTPUTS)] as an encoder, so that they are streamed and cached like features."""
    if model.outputs != OUTPUTS:
        raise EvaluationError(f"the classifier has the outputs {', '.join(model.outputs)}; the judge needs {', '.join(OUTPUTS)}")
    device = next(model.parameters()).device
    mark = fingerprint(model, "logits", model.config["image_size"])
    return FeatureEncoder("judge", mark, int(model.config["image_size"]), len(OUTPUTS), lambda images: model(images.to(device)))


def prompt_targets(prompts: Sequence[str]) -> tuple[Bools, Bools]:
    """What the prompts ask for and where they are sure about it: two [N,len(OUTPUTS)] arrays."""
    targets, known = zip(*(finding_targets(label_text(prompt)) for prompt in prompts), strict=True)
    return torch.stack(targets).numpy().astype(bool), torch.stack(known).numpy().astype(bool)


def label_targets(images: ImageSet) -> tuple[Bools, Bools]:
    """The same for reference images, from their records' labels."""
    targets, known = zip(*(finding_targets(entry["labels"]) for entry in images.metadata), strict=True)
    return torch.stack(targets).numpy().astype(bool), torch.stack(known).numpy().astype(bool)


def auroc(scores: NDArray[np.floating], positive: Bools) -> float:
    """Area under the ROC curve (Mann-Whitney, ties count half); NaN where a class is missing."""
    n, m = int(positive.sum()), int((~positive).sum())
    if n == 0 or m == 0:
        return float("nan")
    return float((rankdata(scores)[positive].sum() - n * (n + 1) / 2) / (n * m))


def finding_auroc(logits: Features, targets: Bools, known: Bools, groups: Sequence[str], seed: int = 0) -> FindingAUROC:
    """AUROC of `logits` [N,O] against `targets` where `known`, with intervals over resampled `groups` (case or patient)."""
    scores, findings = np.asarray(logits), len(FINDINGS)

    def statistic(rows: Indices) -> Floats:
        values = np.array([auroc(scores[r, o], targets[r, o]) for o in range(len(OUTPUTS)) for r in [rows[known[rows, o]]]])
        return np.concatenate([values, [_mean(values[:findings]), _mean(values[findings:])]])

    *estimates, macro, macro_sides = group_bootstrap(statistic, groups, seed)
    outputs = []
    for o, (name, estimate) in enumerate(zip(OUTPUTS, estimates, strict=True)):
        counts = int((targets[:, o] & known[:, o]).sum()), int((~targets[:, o] & known[:, o]).sum())
        outputs.append(OutputAUROC(name, estimate if min(counts) else None, *counts))
    measured = [output for output in outputs[:findings] if output.auroc is not None]
    if not measured:
        raise EvaluationError(
            "no finding is both asked for and not asked for among these prompts, so none can be scored; `medgen evaluate cases` "
            "writes prompts balanced over findings"
        )
    worst = min(measured, key=lambda output: output.auroc.value if output.auroc else 1.0)
    return FindingAUROC(tuple(outputs), macro, macro_sides, worst)


def _mean(values: Floats) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else float("nan")


def find_pairs(generated: ImageSet) -> list[Pair]:
    """Counterfactual pairs among generated images: metadata fields `pair_id` and `variant` (left/right or present/absent).

    Both images must come from the same seed and trajectory, and their prompts must differ in exactly one finding.
    Raises `EvaluationError` naming the pair that does not.
    """
    groups: dict[tuple[str, int], dict[str, int]] = defaultdict(dict)
    for index, line in enumerate(generated.metadata):
        if line.get("pair_id") is not None:
            variants = groups[str(line["pair_id"]), int(line.get("trajectory", 0))]
            if str(line.get("variant")) in variants:
                raise EvaluationError(f"pair {line['pair_id']!r} has two images of variant {line.get('variant')!r}")
            variants[str(line.get("variant"))] = index
    return [_pair(generated, pair_id, variants) for (pair_id, _), variants in groups.items()]


def _pair(generated: ImageSet, pair_id: str, variants: dict[str, int]) -> Pair:
    kind = next((kind for kind, names in VARIANTS.items() if set(names) == set(variants)), None)
    if kind is None:
        raise EvaluationError(
            f"pair {pair_id!r} has the variants {sorted(variants)}; expected left and right, or present and absent"
        )
    first, second = (variants[name] for name in VARIANTS[kind])
    lines = generated.metadata[first], generated.metadata[second]
    if lines[0].get("seed") != lines[1].get("seed"):
        raise EvaluationError(f"pair {pair_id!r} was sampled from two seeds ({lines[0].get('seed')}, {lines[1].get('seed')})")
    said = [{label.name: label for label in label_text(str(line["prompt"])) if label.state == "present"} for line in lines]
    sides: list[dict[str, str | None]] = [{name: label.side for name, label in labels.items()} for labels in said]
    differing = [name for name in FINDINGS if sides[0].get(name, "no") != sides[1].get(name, "no")]
    expected = [("left", "right")] if kind == "laterality" else [(side, "no") for side in (None, "left", "right", "bilateral")]
    if len(differing) != 1 or (sides[0].get(differing[0], "no"), sides[1].get(differing[0], "no")) not in expected:
        raise EvaluationError(
            f"pair {pair_id!r}: the prompts must differ in one finding's {'side' if kind == 'laterality' else 'presence'}, they say "
            f"{sides[0]} and {sides[1]}"
        )
    return Pair(pair_id, kind, differing[0], first, second)


def score_pairs(kind: str, pairs: Sequence[Pair], logits: Features, thresholds: Sequence[float]) -> PairResult | None:
    """Share of the pairs of `kind` in which the judge's scores change as the prompts ask; None without such pairs.

    laterality: the left score is higher in the image asked for the left, the right score in the image asked for the right.
    negation: the finding's score is higher where it is asserted, and below the judge's threshold where it is negated.
    """
    chosen = [pair for pair in pairs if pair.kind == kind]
    if not chosen:
        return None
    judged = [_laterality(pair, logits) if kind == "laterality" else _negation(pair, logits, thresholds) for pair in chosen]
    moved, strict = (np.array(column) for column in zip(*judged, strict=True))
    per_finding = {}
    for name in FINDINGS:
        mine = np.array([pair.finding == name for pair in chosen])
        if mine.any():
            per_finding[name] = wilson(int(moved[mine].sum()), int(mine.sum()))
    failures = tuple(pair for pair, good in zip(chosen, moved, strict=True) if not good)
    return PairResult(kind, wilson(int(moved.sum()), len(chosen)), wilson(int(strict.sum()), len(chosen)), per_finding, failures)


def _laterality(pair: Pair, logits: Features) -> tuple[bool, bool]:
    if pair.finding not in SIDED_FINDINGS:
        raise EvaluationError(f"pair {pair.pair_id!r}: the judge has no sides for {pair.finding}")
    left, right = (OUTPUTS.index(f"{pair.finding}_{side}") for side in ("left", "right"))
    a, b = logits[pair.first], logits[pair.second]
    return bool(a[left] > b[left] and b[right] > a[right]), bool(a[left] > a[right] and b[right] > b[left])


def _negation(pair: Pair, logits: Features, thresholds: Sequence[float]) -> tuple[bool, bool]:
    output = OUTPUTS.index(pair.finding)
    asserted, negated = (1 / (1 + np.exp(-float(logits[index][output]))) for index in (pair.first, pair.second))
    below = negated < thresholds[output]
    return bool(asserted > negated and below), bool(asserted >= thresholds[output] and below)
