from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from medgen.data.records import ManifestError, read_manifest, write_manifest
from medgen.data.report_text import PromptConfig
from medgen.evaluation.images import EvaluationError
from medgen.evaluation.privacy.membership import losses, membership, true_positives
from medgen.evaluation.privacy.predictor import load_predictor
from medgen.evaluation.privacy.subjects import draw_subjects, read_apart


def test_who_was_memorised_is_found_and_who_was_not_is_not(leaky: Path, innocent: Path, hospital: Path) -> None:
    guilty, other = load_predictor(leaky), load_predictor(innocent)
    train, heldout = (draw_subjects(side, guilty, PromptConfig(view=True), 12) for side in read_apart(hospital, hospital))
    found = membership(guilty, train, heldout, reference=other)
    assert found.decisive == "reference" and found.attack.found
    assert found.attack.auc.value > 0.95
    clean = membership(other, train, heldout)
    assert clean.decisive == "loss" and not clean.attack.found
    assert [attack.score for attack in clean.attacks] == ["loss", "caption"]


def test_few_strangers_cannot_show_a_low_rate_of_false_alarms(leaky: Path, hospital: Path) -> None:
    predictor = load_predictor(leaky)
    train, heldout = (draw_subjects(side, predictor, PromptConfig(view=True), 12) for side in read_apart(hospital, hospital))
    found = membership(predictor, train, heldout, draws=1)
    assert found.smallest_rate == pytest.approx(1 / 12)
    by_rate = {at.false_positive_rate: at.true_positive_rate for at in found.attack.at}
    assert by_rate[0.01] is None and by_rate[0.001] is None
    assert by_rate[1 / 12] is not None and by_rate[1 / 12].value > 0.5


def test_the_same_noise_meets_every_film(leaky: Path, hospital: Path) -> None:
    predictor = load_predictor(leaky)
    train, _ = (draw_subjects(side, predictor, PromptConfig(view=True), 12) for side in read_apart(hospital, hospital))
    first, again = (losses(predictor, train, (0.5,), 1).captioned for _ in range(2))
    assert np.array_equal(first, again)


def test_members_are_counted_above_the_strangers_threshold() -> None:
    scores = np.array([5.0, 3.0, 1.0, 4.0, 2.0, 0.0, -1.0])
    member = np.array([True, True, True, False, False, False, False])
    assert true_positives(scores, member, 0.0) == pytest.approx(1 / 3)  # above every stranger
    assert true_positives(scores, member, 0.25) == pytest.approx(2 / 3)  # one of four strangers may stand above


def test_a_patient_on_both_sides_is_refused_by_name(hospital: Path, tmp_path: Path) -> None:
    strangers = read_manifest(hospital, "test")
    known = [replace(record, split="train") for record in strangers.records]
    mixed = write_manifest(known, tmp_path / "mixed.parquet", name="mixed", source="test")
    with pytest.raises(EvaluationError, match=r"12 patients \(first: 'p12'\) are both in .*mixed.parquet"):
        read_apart(mixed, hospital)


def test_too_few_patients_are_refused(hospital: Path, tmp_path: Path) -> None:
    few = write_manifest(read_manifest(hospital, "train").records[:9], tmp_path / "few.parquet", name="few", source="test")
    with pytest.raises(EvaluationError, match=r"few.parquet \(train\) holds 9 patients"):
        read_apart(few, hospital)


def test_a_manifest_of_another_kind_is_refused(hospital: Path, tmp_path: Path) -> None:
    path = tmp_path / "echo.jsonl"
    path.write_text('{"medgen_manifest": 1, "kind": "echo", "name": "echo", "source": "test"}\n')
    with pytest.raises(ManifestError, match="records of kind 'echo'"):
        read_apart(path, hospital)
