"""The privacy gate, from manifests to verdicts: it finds planted copies, passes strangers, and says when nobody may believe it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from medgen.data.images import load_image
from medgen.evaluation.images import EvaluationError
from medgen.evaluation.privacy.gate import BuiltGate, build_gate, gate_cost
from medgen.evaluation.privacy.planted import CHANGES, planted
from medgen.sampling.aligned import SIDE, STORED, aligned_correlation, reduced
from medgen.sampling.cases import Case, TextConditions
from medgen.sampling.gates import GateError, load_gate
from medgen.sampling.privacy_gate import PrivacyGate
from tests.privacy_films import SIZE, write_network, write_patients

CASE = Case("c", 0, 1, TextConditions(prompt="a film"))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("gate")
    write_patients(root, {"train": 30, "test": 100})
    write_network(root / "network")
    return root


@pytest.fixture(scope="module")
def built(world: Path) -> BuiltGate:
    manifest = world / "manifest.parquet"
    return build_gate(manifest, manifest, world / "gate", model=world / "network", copies=60)


@pytest.fixture(scope="module")
def film(world: Path) -> torch.Tensor:
    return load_image(world / "images" / "p3-0.png", SIZE)[None]


def test_planted_copies_are_found_and_strangers_pass(built: BuiltGate) -> None:
    validation = built.validation
    assert validation.validated and validation.recall.value >= 0.95 and validation.false_alarms.value <= 0.05
    assert set(validation.recall_by_change) == set(CHANGES) and validation.recall.n == 60
    assert validation.false_alarms.n == 100  # films of the 50 patients who did not set the threshold
    assert str(built).startswith(f"{built.folder}: privacy gate validated: planted copies found")
    saved = json.loads((built.folder / "validation.json").read_text())
    assert saved["validated"] and saved["threshold"] == validation.threshold and saved["threshold_from_patients"] == 50
    card = (built.folder / "README.md").read_text()
    assert "**validated**" in card and "patient data" in card and "anonym" not in card


def test_the_folder_loads_as_a_gate_that_rejects_a_mirrored_crop_and_passes_a_stranger(
    built: BuiltGate, film: torch.Tensor
) -> None:
    gate = load_gate(built.folder)
    assert gate.validated and gate.describe()["films"] == 60
    copy = planted(film, ["crop"], seed=5).flip(-1)
    stranger = load_image(built.folder.parent / "images" / "p60-0.png", SIZE)[None]
    (caught,), (passed,) = gate.check(copy, [CASE]), gate.check(stranger, [CASE])
    assert not caught.passed and caught.score > built.validation.threshold >= passed.score and passed.passed
    assert "training film 6 of the gate's index" in caught.reason, "the seventh film: of patient 3, first"


def test_another_size_makes_no_difference(built: BuiltGate, film: torch.Tensor) -> None:
    gate = load_gate(built.folder)
    large = torch.nn.functional.interpolate(film, (96, 96), mode="bicubic").clamp(-1, 1)
    assert not gate.check(large, [CASE])[0].passed


def test_a_gate_that_finds_too_little_says_not_validated_everywhere(world: Path, built: BuiltGate, tmp_path: Path) -> None:
    """The unseen patients are the training patients' twins, so a threshold that passes them passes every copy."""
    write_patients(tmp_path, {"train": 25})
    records = (tmp_path / "manifest.parquet", tmp_path / "twins" / "manifest.parquet")
    write_patients(tmp_path / "twins", {"test": 40}, first=100)
    for k in range(80):
        source = tmp_path / "images" / f"p{k % 50 // 2}-{k % 2}.png"
        (tmp_path / "twins" / "images" / f"p{100 + k // 2}-{k % 2}.png").write_bytes(source.read_bytes())
    poor = build_gate(*records, tmp_path / "gate", model=world / "network", copies=20)
    assert not poor.validation.validated and "NOT VALIDATED" in str(poor)
    assert "**not validated**" in (poor.folder / "README.md").read_text()
    assert json.loads((poor.folder / "gate.json").read_text())["validated"] is False
    assert load_gate(poor.folder).validated is False


def test_a_gate_that_was_changed_is_refused(built: BuiltGate, world: Path, tmp_path: Path) -> None:
    with pytest.raises(GateError, match="needs its folder"):
        load_gate("privacy")
    gate = load_gate(built.folder)
    assert isinstance(gate, PrivacyGate)
    gate.save(tmp_path, {})
    (tmp_path / "index.safetensors").write_bytes((tmp_path / "index.safetensors").read_bytes()[:-1] + b"x")
    with pytest.raises(GateError, match=r"not as it was validated \(index_sha256 differs\)"):
        load_gate(tmp_path)
    (tmp_path / "index.safetensors").unlink()
    with pytest.raises(GateError, match="not a whole privacy gate"):
        load_gate(tmp_path)


def test_too_few_strangers_or_shared_patients_are_refused(world: Path, tmp_path: Path) -> None:
    few = write_patients(tmp_path, {"test": 12}, first=500)
    with pytest.raises(EvaluationError, match="holds 12 unseen patients; .* at least 40"):
        build_gate(world / "manifest.parquet", few, tmp_path / "gate", model=world / "network")
    with pytest.raises(EvaluationError, match="30 patients .* are both in"):
        build_gate(world / "manifest.parquet", world / "manifest.parquet", tmp_path / "gate", heldout_split="train")


def test_the_cost_hardly_grows_with_the_training_set(built: BuiltGate) -> None:
    gate = load_gate(built.folder)
    assert isinstance(gate, PrivacyGate)
    assert gate_cost(gate, 10_000, repeats=5) < 5 * gate_cost(gate, 30, repeats=5)


def test_alignment_sees_through_zoom_shift_and_contrast_and_not_through_another_film(world: Path) -> None:
    films = torch.stack([load_image(world / "images" / f"p{i}-0.png", SIZE) for i in range(12)])
    copies = planted(films, ["crop"] * 6 + ["contrast"] * 6, seed=1)
    candidates = reduced(films, STORED)[None].expand(12, -1, -1, -1)
    alike = aligned_correlation(reduced(copies, SIDE), candidates)
    assert alike.diagonal().min() > 0.97
    assert alike[~torch.eye(12, dtype=torch.bool)].max() < alike.diagonal().min()


def test_planted_copies_are_the_same_every_time_and_each_change_does_something(film: torch.Tensor) -> None:
    films = film.expand(len(CHANGES), -1, -1, -1)
    first, again, other = planted(films, CHANGES, 1), planted(films, CHANGES, 1), planted(films, CHANGES, 2)
    assert torch.equal(first, again) and not torch.equal(first[1:], other[1:])
    assert torch.equal(first[0], film[0].flip(-1)) and first.abs().max() <= 1
    assert all(not torch.equal(copy, film[0]) for copy in first)
