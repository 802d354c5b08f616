"""Alignment: AUROC as scikit-learn has it, pairs found and checked, right sides score 1 and swapped ones 0."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score
from toy_films import KINDS, film, report, write_generated

from medgen.data.records import FINDINGS
from medgen.evaluation.alignment import auroc, find_pairs, finding_auroc, judge_encoder, prompt_targets, score_pairs
from medgen.evaluation.features import extract, load_judge
from medgen.evaluation.images import EvaluationError, read_generated
from medgen.models.classifier import OUTPUTS, FindingClassifier


def test_auroc_is_scikit_learns_ties_included():
    rng = np.random.default_rng(0)
    scores, positive = rng.integers(0, 7, 200).astype(float), rng.random(200) < 0.3
    assert auroc(scores, positive) == pytest.approx(roc_auc_score(positive, scores))
    assert np.isnan(auroc(scores, np.ones(200, bool)))


def test_prompts_become_targets_and_doubt_is_left_out():
    targets, known = prompt_targets(
        ["Small left pleural effusion. No pneumothorax.", "Possible right pleural effusion.", "Edema."]
    )
    column = OUTPUTS.index
    assert targets[:, column("pleural_effusion")].tolist() == [True, False, False]
    assert known[:, column("pleural_effusion")].tolist() == [True, False, True]
    assert targets[0, column("pleural_effusion_left")]
    assert not targets[0, column("pleural_effusion_right")]
    assert targets[2, column("edema")]


def test_finding_auroc_counts_skips_what_is_unknown_and_names_the_worst():
    rng = np.random.default_rng(1)
    targets = np.zeros((300, len(OUTPUTS)), bool)
    targets[:, :2] = rng.random((300, 2)) < 0.4
    known = np.ones_like(targets)
    known[:100, 0] = False
    logits = targets * np.array([[3.0, 0.5] + [0] * 16]) + rng.normal(size=targets.shape)
    logits[:100, 0] = np.where(targets[:100, 0], -9, 9)  # wrong, but unknown: must not count
    result = finding_auroc(logits, targets, known, [str(i) for i in range(300)])
    first, second, third = result.outputs[:3]
    assert first.auroc is not None
    assert first.auroc.value == pytest.approx(roc_auc_score(targets[100:, 0], logits[100:, 0]))
    assert first.positives + first.negatives == 200
    assert result.worst.name == FINDINGS[1]
    assert third.auroc is None
    assert second.auroc is not None
    assert result.macro.value == pytest.approx((first.auroc.value + second.auroc.value) / 2)
    assert second.auroc.low < second.auroc.value < second.auroc.high


def pair(number: int, kind: str) -> list[dict]:
    prompts = {
        "laterality": {"left": report("left", False), "right": report("right", False)},
        "negation": {"present": report("left", True), "absent": report("left", False)},
    }[kind]
    return [
        {
            "case_id": f"{kind}-{number}-{variant}",
            "prompt": prompt,
            "seed": number,
            "pair_id": f"{kind}-{number}",
            "variant": variant,
        }
        for variant, prompt in prompts.items()
    ]


def judged(folder, judge, tmp_path):
    generated, model = read_generated(folder), load_judge(judge, "cpu")
    return find_pairs(generated), extract(generated, judge_encoder(model), tmp_path / "cache"), model.thresholds.tolist()


def test_the_right_side_scores_one_and_the_swapped_side_zero(tmp_path, judge):
    entries = [entry for number in range(12) for entry in pair(number, "laterality")]
    right = [film(entry["variant"], False, i) for i, entry in enumerate(entries)]
    swapped = [film({"left": "right", "right": "left"}[entry["variant"]], False, i) for i, entry in enumerate(entries)]
    for name, images, expected in (("right", right, 1.0), ("swapped", swapped, 0.0)):
        pairs, logits, thresholds = judged(write_generated(tmp_path / name, entries, images), judge, tmp_path)
        result = score_pairs("laterality", pairs, logits, thresholds)
        assert result is not None
        assert result.accuracy.value == result.strict.value == expected
        assert result.accuracy.n == 12
        assert len(result.failures) == (0 if expected else 12)
        assert score_pairs("negation", pairs, logits, thresholds) is None


def test_negation_needs_the_finding_to_go(tmp_path, judge):
    entries = [entry for number in range(10) for entry in pair(number, "negation")]
    obeyed = [film("left", entry["variant"] == "present", i) for i, entry in enumerate(entries)]
    ignored = [film("left", True, i) for i in range(len(entries))]
    for name, images, right in (("obeyed", obeyed, True), ("ignored", ignored, False)):
        pairs, logits, thresholds = judged(write_generated(tmp_path / name, entries, images), judge, tmp_path)
        result = score_pairs("negation", pairs, logits, thresholds)
        assert result is not None
        assert result.accuracy.value == float(right)
        assert set(result.per_finding) == {"cardiomegaly"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"variant": "up"}, "variants"),
        ({"seed": 99}, "two seeds"),
        ({"prompt": report("left", False)}, "must differ in one finding's side"),
        ({"prompt": report("right", True)}, "must differ in one finding's side"),
        ({"variant": "left"}, "two images of variant"),
    ],
)
def test_a_broken_pair_is_named(tmp_path, change, message):
    left, right = pair(0, "laterality")
    folder = write_generated(tmp_path / "g", [left, right | change], [film(*KINDS[0], 0), film(*KINDS[1], 1)])
    with pytest.raises(EvaluationError, match=message) as error:
        find_pairs(read_generated(folder))
    assert "laterality-0" in str(error.value)


def test_a_judge_of_other_findings_is_refused():
    with pytest.raises(EvaluationError, match="the judge needs"):
        judge_encoder(FindingClassifier(image_size=32, channels=(8,), outputs=["cat"]))
