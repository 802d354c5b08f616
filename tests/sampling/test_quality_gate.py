"""The quality gate with the shipped judge on films whose truth is known: right prompts pass, wrong ones say what is wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from medgen.digital.chest import render
from medgen.digital.patient import Acquisition, Finding, Study, draw_patient
from medgen.models.classifier import FindingClassifier
from medgen.sampling.cases import Case, TextConditions
from medgen.sampling.gates import Gate, GateError
from medgen.sampling.quality_gate import JUDGE, QualityGate


def case(prompt: str) -> Case[TextConditions]:
    return Case("a", 0, 1, TextConditions(prompt=prompt))


def film(*findings: Finding) -> Tensor:
    """[1,1,128,128] in [-1,1] of a digital patient with `findings`."""
    (shown,) = render(Study(draw_patient(7, 0), "s", findings, (Acquisition("PA"),)))
    return torch.from_numpy(shown.image)[None, None] * 2 - 1


@pytest.fixture(scope="module")
def gate() -> QualityGate:
    return QualityGate.load(None)


@pytest.fixture(scope="module")
def effusion() -> Tensor:
    return film(Finding("pleural_effusion", 0.7, "left"))


def test_a_film_passes_the_prompt_that_describes_it(gate: QualityGate, effusion: Tensor) -> None:
    assert isinstance(gate, Gate) and gate.validated
    (verdict,) = gate.check(effusion, [case("PA chest X-ray. Large left pleural effusion. No pneumothorax.")])
    assert verdict.passed and verdict.score > 0 and verdict.reason == "as the prompt says"


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        ("Large right pleural effusion.", "pleural_effusion not seen on the right"),
        ("No pleural effusion.", "pleural_effusion seen, negated"),
        ("Large left pleural effusion. Large right pneumothorax.", "pneumothorax not seen"),
        ("Bilateral pleural effusions, small right and large left.", "pleural_effusion not seen on both sides"),
    ],
)
def test_what_is_wrong_is_named(gate: QualityGate, effusion: Tensor, prompt: str, reason: str) -> None:
    (verdict,) = gate.check(effusion, [case(prompt)])
    assert not verdict.passed and verdict.score < 0 and reason in verdict.reason


def test_doubt_and_silence_are_not_checked_unless_asked(gate: QualityGate, effusion: Tensor) -> None:
    for prompt in ("Possible small left pleural effusion.", "No pneumothorax."):
        assert gate.check(effusion, [case(prompt)])[0].passed
    strict = QualityGate.load(None, unmentioned=True)
    assert "pleural_effusion seen, not mentioned" in strict.check(effusion, [case("No pneumothorax.")])[0].reason
    assert strict.describe() != gate.describe()


def test_no_verdict_depends_on_its_neighbours(gate: QualityGate, effusion: Tensor) -> None:
    images = torch.cat([effusion, film()])
    cases = [case("Large left pleural effusion."), case("Large left pleural effusion.")]
    together = gate.check(images, cases)
    assert together == [gate.check(images[i : i + 1], cases[i : i + 1])[0] for i in (0, 1)]
    assert [verdict.passed for verdict in together] == [True, False]


def test_the_gate_abstains_where_its_judge_cannot_read(effusion: Tensor, tmp_path: Path) -> None:
    shutil.copytree(JUDGE, tmp_path / "judge")
    measured = json.loads((JUDGE / "validation.json").read_text())
    measured["outputs"]["pleural_effusion"]["auroc"] = 0.75
    (tmp_path / "judge/validation.json").write_text(json.dumps(measured))
    poor = QualityGate.load(tmp_path / "judge")
    (verdict,) = poor.check(effusion, [case("No pleural effusion. No pneumothorax.")])
    assert verdict.passed and "not judged: pleural_effusion" in verdict.reason
    assert poor.describe()["abstains"] == {"pleural_effusion": 0.75}


def test_a_judge_that_was_never_measured_says_so(tmp_path: Path) -> None:
    shutil.copytree(JUDGE, tmp_path / "judge")
    (tmp_path / "judge/validation.json").unlink()
    assert not QualityGate.load(tmp_path / "judge").validated


def test_folders_without_a_judge_and_other_classifiers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(GateError, match="holds no finding classifier"):
        QualityGate.load(tmp_path)
    FindingClassifier(channels=(8, 8), outputs=("a", "b")).save_pretrained(tmp_path)
    with pytest.raises(GateError, match="has the outputs a, b"):
        QualityGate.load(tmp_path)
